"""KV codecs in Triton's interpreter: the bits of a row, all of e4m3, and whole numbers that come through attention."""

from __future__ import annotations

import pytest

import kernels
from tests.unit.kernels import checks_kv


@pytest.mark.parametrize("name", checks_kv.CODECS)
@pytest.mark.parametrize("rows, head_dim", [(1, 64), (4, 128)])
def test_encode(name: str, rows: int, head_dim: int) -> None:
    checks_kv.check_encode(name, rows, head_dim, "cpu")


def test_e4m3() -> None:
    checks_kv.check_e4m3("cpu")


@pytest.mark.parametrize("format", kernels.KV_FORMATS)
def test_exact(format: str) -> None:
    checks_kv.check_exact(format, 64, 64, "cpu", impl="triton", order="block")


@pytest.mark.parametrize("format", kernels.KV_FORMATS)
def test_constant(format: str) -> None:
    checks_kv.check_constant(format, 16, 64, "cpu", impl="triton", order="block")
