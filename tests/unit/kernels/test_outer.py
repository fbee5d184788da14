"""What a step computes outside its layers, on a CPU and as the reference has it."""

from __future__ import annotations

import pytest
import torch

import kernels
from tests.unit.kernels import checks_outer

BOTH = pytest.mark.parametrize("impl", ["aten", "torch"])


@BOTH
@pytest.mark.parametrize("head_dim", [64, 80])
def test_rotation(head_dim: int, impl: str) -> None:
    checks_outer.check_rotation(5, head_dim, "cpu", impl=impl)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, vocab", [(18, 50), (9, 1), (20, 1025)])
def test_highest(rows: int, vocab: int, dtype: torch.dtype, impl: str) -> None:
    checks_outer.check_highest(rows, vocab, dtype, "cpu", impl=impl)


@BOTH
def test_feed(impl: str) -> None:
    checks_outer.check_feed(8, 5, "cpu", impl=impl)


@BOTH
@pytest.mark.parametrize("format, rows", [("bf16", 3), ("w8a8", 16), ("w8a8", 17), ("fp8", 17)])
def test_embed(format: str, rows: int, impl: str) -> None:
    checks_outer.check_embed(rows, 256, format, "cpu", impl=impl)


def test_what_does_not_fit_is_refused() -> None:
    positions, table = torch.arange(3), torch.randn(10, 8)
    with pytest.raises(ValueError, match=r"positions \(3, 1\) and cos_sin \(10, 8\)"):
        kernels.rotation(positions[:, None], table)
    with pytest.raises(ValueError, match=r"an even D"):
        kernels.rotation(positions, table[:, :7])
    with pytest.raises(ValueError, match=r"tokens \(3,\), table \(10, 8\) and weight \(7,\) do not fit"):
        kernels.embed_rms_norm(positions, table, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match=r"logits \(10, 0\) must be \[S, vocab\]"):
        kernels.highest(table[:, :0])
    with pytest.raises(ValueError, match=r"the indices in out must be torch.int64 \[10\], not torch.int32 \[10\]"):
        kernels.highest(table, (torch.empty(10), torch.empty(10, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"the values in out must be torch.float32 \[10\], not torch.float32 \[9\]"):
        kernels.highest(table, (torch.empty(9), torch.empty(9, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"feed \(3, 1\) must have one dimension"):
        kernels.feed_tokens(positions, positions, positions[:, None])
