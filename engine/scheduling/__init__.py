"""Who computes what, and in which blocks of the KV cache: numbers only, no torch."""
