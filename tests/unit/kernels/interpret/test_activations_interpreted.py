"""8-bit activations and weights in Triton's interpreter (see `test_interpreted`)."""

from __future__ import annotations

import pytest
import torch

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
