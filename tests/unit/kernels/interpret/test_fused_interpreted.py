"""Partials and `rope_write` in Triton's interpreter."""

from __future__ import annotations

import pytest

import kernels
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
