"""Quantizing a model by its own text, and writing the checkpoint; `python -m engine.quantize`."""

from engine.quantize.run import bits_per_weight, main, quantize

__all__ = ["bits_per_weight", "main", "quantize"]
