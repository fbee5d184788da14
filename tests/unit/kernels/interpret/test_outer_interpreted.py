"""What a step computes outside its layers, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import kernels
from tests.unit.kernels import checks_outer


@pytest.mark.parametrize("rows, head_dim", [(5, 64), (3, 80), (2, 128)])
def test_rotation(rows: int, head_dim: int) -> None:
    checks_outer.check_rotation(rows, head_dim, "cpu", impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, vocab", [(9, 1), (9, 50), (16, 1024), (9, 3001), (18, 8193)])
def test_highest(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """One part and several, whole and ragged, of 1024 (up to 16 rows) and of 4096 logits."""
    checks_outer.check_highest(rows, vocab, dtype, "cpu", impl="triton")


@pytest.mark.parametrize("sampled, rows", [(1, 2), (8, 5), (32, 600)])
def test_feed(sampled: int, rows: int) -> None:
    checks_outer.check_feed(sampled, rows, "cpu", impl="triton")


@pytest.mark.parametrize("format, rows", [("bf16", 3), ("w8a8", 16), ("w8a8", 17), ("fp8", 17)])
@pytest.mark.parametrize("width", [256, 208])
def test_embed(format: str, rows: int, width: int) -> None:
    checks_outer.check_embed(rows, width, format, "cpu", impl="triton", layout="plain")


def test_what_the_kernels_do_not_read_is_refused() -> None:
    logits = torch.randn(3, 40)
    with pytest.raises(ValueError, match=r"bfloat16 or float32 with a contiguous last dimension, not torch\.float64"):
        kernels.highest(logits.double(), impl="triton")
    with pytest.raises(ValueError, match=r"not torch.float32 of strides \(1, 40\)"):
        kernels.highest(logits.t(), impl="triton")
    with pytest.raises(ValueError, match="rotation: impl 'triton' takes float32"):
        kernels.rotation(torch.arange(3), logits.double(), impl="triton")
    with pytest.raises(ValueError, match=r"feed must be contiguous int64, not torch\.int32"):
        kernels.feed_tokens(torch.arange(3), torch.arange(3), torch.arange(3).int(), impl="triton")
