"""Tokens of a step: where they come from, and the most likely ones that come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose


def highest(
    logits: Tensor, out: tuple[Tensor, Tensor] | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The largest of each row of logits [S, vocab] and where it is, written to `out` if given: values [S] in logits'
    dtype, indices int64 [S].

    The first of equals. A row with NaN gives NaN, and the index of one.
    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"highest: logits {tuple(logits.shape)} must be [S, vocab], and vocab not 0")
    rows = len(logits)
    if out is None:
        out = logits.new_empty(rows), logits.new_empty(rows, dtype=torch.int64)
    for name, held, dtype in (("values", out[0], logits.dtype), ("indices", out[1], torch.int64)):
        if held.shape != (rows,) or held.dtype != dtype:
            raise ValueError(
                f"highest: the {name} in out must be {dtype} [{rows}], not {held.dtype} {list(held.shape)}"
            )
    choose("highest", HIGHEST, impl, logits.device)(logits, out)
    return out


def feed_tokens(sampled: Tensor, given: Tensor, feed: Tensor, *, impl: str = "auto") -> Tensor:
    """int64 [T]: entry feed[i] of sampled [R] and given [T] as if one followed the other, for feed int64 [T] in
    0 .. R + T - 1, which nobody checks on a GPU. A new tensor."""
    if not sampled.dim() == given.dim() == feed.dim() == 1:
        raise ValueError(
            f"feed_tokens: sampled {tuple(sampled.shape)}, given {tuple(given.shape)} and feed {tuple(feed.shape)} "
            "must have one dimension"
        )
    out: Tensor = choose("feed_tokens", FEED_TOKENS, impl, feed.device)(sampled, given, feed)
    return out


def _highest_torch(logits: Tensor, out: tuple[Tensor, Tensor]) -> None:
    torch.max(logits, -1, out=out)


def _feed_tokens_torch(sampled: Tensor, given: Tensor, feed: Tensor) -> Tensor:
    return torch.cat((sampled, given)).take(feed)


def _triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from . import tokens_triton

        return getattr(tokens_triton, name)(*args)

    return run


HIGHEST = {"torch": _highest_torch, "aten": _highest_torch, "triton": _triton("highest")}
FEED_TOKENS = {"torch": _feed_tokens_torch, "aten": _feed_tokens_torch, "triton": _triton("feed_tokens")}
