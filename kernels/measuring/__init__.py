"""What `kernels.bench`, `kernels.tune` and `kernels.tune_layer` measure, and how it is timed."""
