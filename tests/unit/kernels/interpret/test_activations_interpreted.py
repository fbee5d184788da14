"""8-bit activations and weights in Triton's interpreter (see `test_interpreted`)."""

from __future__ import annotations

import pytest
import torch

from kernels.products import matmul_triton
from kernels.tuning import WideConfig
from tests.unit.kernels import checks_8_bit as checks

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # NumPy's, of NaN


@pytest.mark.parametrize("format", ["w8a8", "fp8"])
@pytest.mark.parametrize("m, n, k", [(1, 100, 256), (5, 64, 208), (16, 130, 256), (17, 40, 208), (70, 72, 256)])
def test_linear(format: str, m: int, n: int, k: int) -> None:
    checks.check_linear(m, n, k, format, "cpu", impl="triton", layout="plain", bias=m in (5, 17))


@pytest.mark.parametrize("format", ["w8a8", "fp8"])
@pytest.mark.parametrize("m", [3, 40])
def test_linear_integers_exact(format: str, m: int) -> None:
    checks.check_linear_exact(m, 80, 256, format, "cpu", impl="triton", layout="plain")


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("m, n, k", [(5, 100, 256), (64, 64, 384), (65, 100, 256), (130, 72, 384)])
def test_4_bit_weights(group_size: int, m: int, n: int, k: int) -> None:
    bias = m in (5, 65)
    checks.check_linear(m, n, k, "w4a8", "cpu", impl="triton", layout="planes", bias=bias, group_size=group_size)


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_4_bit_weights_bit_for_bit(group_size: int, splits: int) -> None:
    checks.check_a8w4_exact(70, 150, 640, group_size, "cpu", WideConfig(64, 128, splits, 4, 2))


@pytest.mark.parametrize("group_size", [64, 128])
def test_4_bit_weights_requantized_once(group_size: int) -> None:
    checks.check_requantized_once(40, 150, 256, group_size, "cpu", 64 * 256)


@pytest.mark.parametrize("m", [70, 90])
def test_rows_that_are_not_finite(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_triton, "REQUANTIZED_ROWS", 80)
    checks.check_broken_rows(m, "w4a8", "cpu", impl="triton", layout="planes")


@pytest.mark.parametrize("format", ["w8a8", "fp8"])
def test_splits_of_k(format: str) -> None:
    checks.check_splits(20, 72, 336, format, "cpu")


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows, width", [(6, 300), (1, 64)])
def test_quantize_rows(codes: torch.dtype, rows: int, width: int) -> None:
    checks.check_quantize(rows, width, codes, "cpu", impl="triton")


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_fused(codes: torch.dtype) -> None:
    checks.check_fused(6, 300, codes, "cpu", impl="triton")
