"""What a format costs: perplexity, divergence from bf16, agreement of answers; `python -m workbench.quality`."""

from workbench.quality.perplexity import (
    MIN_WINDOW,
    Perplexity,
    check_meaning,
    cut_windows,
    perplexity,
    small_pool,
    text_windows,
)

__all__ = ["MIN_WINDOW", "Perplexity", "check_meaning", "cut_windows", "perplexity", "small_pool", "text_windows"]
