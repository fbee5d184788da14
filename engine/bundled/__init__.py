"""The model that ships with the project: a small Llama that writes Python, its tokenizer and a held-out excerpt.

Importing this package imports neither torch nor transformers. `README.md` beside this file is the model card.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""A checkpoint folder in transformers' layout, for anything that takes a local model path."""

END_OF_TEXT = "<|endoftext|>"
"""Ends each file in the training data; the tokenizer maps it to one id (bos, eos and padding)."""


def heldout_text() -> str:
    """About 200 kB of Python that the model was never trained on: whole files, each followed by `END_OF_TEXT`."""
    return (MODEL_DIR / "heldout.txt").read_text(encoding="utf-8")
