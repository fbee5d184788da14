"""A workload run on an engine: how it is driven, what is measured, and what is said of it."""
