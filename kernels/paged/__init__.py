"""The paged KV cache: its formats, writing, reading, and attention over it."""
