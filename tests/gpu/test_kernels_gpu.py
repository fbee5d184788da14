"""The Triton kernels on a CUDA device, against float64."""

from __future__ import annotations

import pytest
import torch

import kernels
from tests.unit.kernels import checks, checks_fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none here")


@pytest.mark.parametrize("format, group_size", [("bf16", 128), ("int8", 128), ("int4", 128), ("int4", 64)])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 16, 17, 64, 65, 256, 1000])
@pytest.mark.parametrize("n, k", [(4096, 4096), (1000, 2304), (6144, 896 * 2)])
def test_linear(m: int, n: int, k: int, format: str, group_size: int) -> None:
    checks.check_linear(m, n, k, format, group_size, "cuda", impl="triton", bias=m == 5)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("m", [1, 7, 16, 17, 33, 64, 128, 300])
@pytest.mark.parametrize("n, k", [(128, 256), (4096, 1024), (1000, 4096), (72, 14336)])
def test_linear_integers_exact(m: int, n: int, k: int, format: str) -> None:
    checks.check_linear_exact(m, n, k, format, 128, "cuda", impl="triton")


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize(
    "head_dim, group, block_size", [(64, 3, 16), (64, 7, 32), (128, 4, 16), (128, 4, 64), (128, 1, 128), (128, 20, 64)]
)
def test_decode(format: str, head_dim: int, group: int, block_size: int) -> None:
    checks.check_decode(format, [1, 0, 64, 127, 130, 2000], block_size, 2, group, head_dim, "cuda", impl="triton")
    checks.check_decode(format, [900] * 70, block_size, 8, group, head_dim, "cuda", impl="triton")


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize("head_dim, group, block_size", [(64, 3, 16), (128, 4, 64), (128, 2, 128)])
def test_prefill(format: str, head_dim: int, group: int, block_size: int) -> None:
    checks.check_prefill(
        format,
        [(1, 40), (0, 20), (70, 90), (333, 333), (128, 1024), (5, 3000)],
        block_size,
        2,
        group,
        head_dim,
        "cuda",
        impl="triton",
    )


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_write(format: str, head_dim: int) -> None:
    checks.check_write(format, 16, 2, head_dim, "cuda", impl="triton")


@pytest.mark.parametrize("rows, width", [(1, 896), (7, 4096), (300, 14336)])
def test_elementwise(rows: int, width: int) -> None:
    checks.check_elementwise(rows, width, 28, 4, 128, "cuda", impl="triton")


@pytest.mark.parametrize(
    "rows, width, splits", [(1, 4096, 8), (3, 896, 3), (64, 4096, 2), (5, 14336, 4), (300, 4096, 1)]
)
def test_consumers_of_partials(rows: int, width: int, splits: int) -> None:
    checks_fused.check_consumers(rows, width, splits, "cuda", impl="triton")


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize("rows, splits, norm", [(1, 8, False), (5, 3, True), (300, 1, True)])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(14, 2, 64), (32, 8, 128), (7, 1, 128)])
def test_rope_write(
    format: str, rows: int, splits: int, norm: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    checks_fused.check_rope_write(format, rows, heads, kv_heads, head_dim, splits, norm, "cuda", impl="triton")


@pytest.mark.parametrize("format, group_size", [("bf16", 128), ("int8", 128), ("int4", 128), ("int4", 64)])
@pytest.mark.parametrize("rows, splits", [(1, 8), (5, 3), (16, 2), (40, 1)])
def test_operands(format: str, group_size: int, rows: int, splits: int) -> None:
    layout = {"int4": "planes", "int8": "pairs"}.get(format, "plain")
    checks_fused.check_operands(format, group_size, rows, splits, "cuda", impl="triton", layout=layout)


@pytest.mark.parametrize(
    "format, group_size", [("bf16", 128), ("int8", 128), ("int4", 128), ("int4", 64), ("w8a8", 128)]
)
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64, 70])
@pytest.mark.parametrize("inner, k", [(14336, 4096), (4864, 896), (208, 1024)])
def test_gated(format: str, group_size: int, rows: int, inner: int, k: int) -> None:
    checks_fused.check_gated(format, group_size, rows, inner, k, "cuda", impl="triton")
