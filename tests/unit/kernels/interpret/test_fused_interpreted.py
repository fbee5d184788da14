"""Partials and `rope_write` in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from kernels.products import matmul_triton
from kernels.rows.elementwise_triton import summed_rms_norm
from tests.unit.kernels import checks_fused


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_consumers(splits: int) -> None:
    checks_fused.check_consumers(3, 200, splits, "cpu", impl="triton")


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize("splits, rows, norm", [(1, 5, False), (3, 4, True), (1, 70, True)])
def test_rope_write(format: str, splits: int, rows: int, norm: bool) -> None:
    checks_fused.check_rope_write(format, rows, 6, 2, 64, splits, norm, "cpu", impl="triton", order="block")


def test_rope_write_wide_heads() -> None:
    checks_fused.check_rope_write("int8", 3, 8, 4, 128, 2, False, "cpu", impl="triton", order="block")


@pytest.mark.parametrize(
    "format, group_size, layout",
    [("bf16", 128, "plain"), ("int8", 128, "pairs"), ("int4", 128, "planes"), ("int4", 64, "planes"),
     ("w8a8", 128, "plain"), ("fp8", 128, "plain")],
)  # fmt: skip
@pytest.mark.parametrize("rows, splits", [(3, 2), (20, 1)])
def test_operands(format: str, group_size: int, layout: str, rows: int, splits: int) -> None:
    checks_fused.check_operands(format, group_size, rows, splits, "cpu", impl="triton", layout=layout)


@pytest.mark.parametrize(
    "format, group_size, layout",
    [
        ("bf16", 128, "plain"), ("int8", 128, "pairs"), ("int4", 128, "planes"), ("int4", 64, "planes"),
        ("w4a8", 128, "planes"), ("int8", 128, "plain"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows, inner", [(3, 128), (17, 192), (2, 80)])
def test_gated(
    format: str, group_size: int, layout: str, rows: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """192 and 80 are no multiples of every tile's half; 80 of none."""
    fused = []
    monkeypatch.setattr(
        matmul_triton, "gated_config", lambda kind, m, n, k, plain: fused.append(n) or replace(plain, splits=1)
    )
    checks_fused.check_gated(format, group_size, rows, inner, 256, "cpu", impl="triton", layout=layout)
    assert fused == [2 * inner] * (2 if rows <= 16 else 1)  # not for a reader in 8 bits, nor with a bias


@pytest.mark.parametrize("format", ["w8a8", "fp8"])
@pytest.mark.parametrize("rows", [16, 17])
def test_gated_rounds_where_the_product_does(format: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel x keeps its 16 bits: only where `linear` leaves them too."""
    fused = []
    monkeypatch.setattr(
        matmul_triton, "gated_config", lambda kind, m, n, k, plain: fused.append(n) or replace(plain, splits=1)
    )
    weight = kernels.pack_weight(torch.randn(256, 128) * 0.1, format, device="cpu", layout="plain")
    x = torch.randn(rows, 128).bfloat16()
    got = kernels.gated_linear(x, weight, impl="triton")
    if rows > 16:
        assert torch.equal(got, kernels.silu_mul(kernels.linear(x, weight, impl="triton"), impl="triton"))
    assert fused == [256] * (rows <= 16)


def test_a_layout_that_kernels_cannot_read_is_refused_when_gated() -> None:
    weight = kernels.pack_weight(torch.randn(256, 128), "int8", device="cpu")
    with pytest.raises(ValueError, match="impl 'triton' cannot read the layout 'int8pack' of int8"):
        kernels.gated_linear(torch.randn(3, 128).bfloat16(), weight, impl="triton")


def test_sums_of_other_groups_are_refused() -> None:
    dense = torch.randn(64, 256)
    weights = [kernels.pack_weight(dense, "int4", group_size=g, device="cpu", layout="planes") for g in (64, 128)]
    x = summed_rms_norm(torch.randn(2, 256).bfloat16(), torch.ones(256).bfloat16(), 1e-5, 64)
    kernels.linear(x, weights[0], impl="triton")
    with pytest.raises(ValueError, match=r"sums \(4, 2\) are not those of groups of 128"):
        kernels.linear(x, weights[1], impl="triton")
