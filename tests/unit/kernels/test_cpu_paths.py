"""The CPU implementations and the reference itself, against float64."""

from __future__ import annotations

import pytest
import torch

import kernels
from tests.unit.kernels import checks

FORMATS = ["bf16", "int8", "int4"]


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format, group_size", [("bf16", 128), ("int8", 128), ("int4", 128), ("int4", 64)])
@pytest.mark.parametrize("m", [1, 2, 5, 8, 16, 17, 64, 65, 256, 1000])
@pytest.mark.parametrize("n, k", [(192, 256), (100, 384)])
def test_linear(m: int, n: int, k: int, format: str, group_size: int, impl: str) -> None:
    checks.check_linear(m, n, k, format, group_size, "cpu", impl=impl, bias=m == 5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [3, 40, 100])
def test_linear_integers_exact(format: str, m: int) -> None:
    checks.check_linear_exact(m, 80, 256, format, 128, "cpu", impl="aten")


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("head_dim, group, block_size", [(64, 3, 16), (128, 4, 64), (64, 1, 128)])
@pytest.mark.parametrize("lengths", [[130], [64, 64], [1, 0, 64, 130], [0, 0], [7, 300, 16, 32, 33]])
def test_decode(format: str, head_dim: int, group: int, block_size: int, lengths: list[int], impl: str) -> None:
    checks.check_decode(format, lengths, block_size, 2, group, head_dim, "cpu", impl=impl)


def test_decode_splits_a_wasteful_batch() -> None:
    checks.check_decode("bf16", [3000] + list(range(1, 24)), 16, 2, 2, 64, "cpu", impl="aten")


@pytest.mark.parametrize("impl", ["aten", "torch"])
@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("head_dim, group, block_size", [(64, 3, 16), (128, 2, 128)])
def test_prefill(format: str, head_dim: int, group: int, block_size: int, impl: str) -> None:
    chunks = [(1, 40), (0, 20), (70, 90), (33, 33), (1, 1), (300, 300), (2, 41), (68, 100)]
    checks.check_prefill(format, chunks, block_size, 2, group, head_dim, "cpu", impl=impl)


@pytest.mark.parametrize("format", kernels.KV_FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_write(format: str, head_dim: int) -> None:
    checks.check_write(format, 16, 2, head_dim, "cpu", impl="aten")


@pytest.mark.parametrize("impl", ["aten", "torch"])
def test_elementwise(impl: str) -> None:
    checks.check_elementwise(5, 200, 6, 2, 64, "cpu", impl=impl)


def test_float32_and_float64_reference() -> None:
    x = torch.randn(3, 256, dtype=torch.float64)
    weight = kernels.pack_weight(torch.randn(64, 256), "int4", device="cpu")
    want = x @ weight.dequantize(torch.float64).t()
    assert torch.allclose(kernels.linear(x, weight, impl="torch"), want, atol=1e-12)
    assert torch.allclose(kernels.linear(x.float(), weight, impl="torch"), want.float(), atol=1e-4)
