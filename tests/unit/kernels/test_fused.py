"""`rope_write` and the consumers of partials on a CPU; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch

import kernels
from tests.unit.kernels import checks_fused


@pytest.mark.parametrize("splits", [1, 3])
def test_consumers_of_the_reference(splits: int) -> None:
    checks_fused.check_consumers(3, 200, splits, "cpu", impl="torch")


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize("rows, norm", [(1, False), (5, True), (70, True)])
def test_rope_write(format: str, rows: int, norm: bool) -> None:
    checks_fused.check_rope_write(format, rows, 6, 2, 64, 1, norm, "cpu", impl="aten")


@pytest.mark.parametrize("format", list(kernels.WEIGHT_FORMATS))
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("impl", ["torch", "aten"])
def test_gated(format: str, rows: int, impl: str) -> None:
    checks_fused.check_gated(
        format, 128, rows, 192, 256, "cpu", impl=impl, layout="plain" if format == "fp8" else None
    )


def test_shapes_that_do_not_fit() -> None:
    layer = kernels.allocate_kv("bf16", 2, 16, 2, 64, "cpu")
    turn = torch.zeros(3, 2, 64)
    with pytest.raises(ValueError, match=r"qkv \(3, 200\).* 2 KV heads of 64"):
        kernels.rope_write(torch.zeros(3, 200), layer, torch.zeros(3, dtype=torch.int64), turn)
    with pytest.raises(ValueError, match=r"slots \(2,\)"):
        kernels.rope_write(torch.zeros(3, 384), layer, torch.zeros(2, dtype=torch.int64), turn)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.add_rms_norm(torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.ones(8), 1e-5)
