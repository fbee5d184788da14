"""What computes a step, on a CPU, a GPU or a simulated one, and the memory that it takes."""
