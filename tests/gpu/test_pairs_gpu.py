"""int8 in pairs on a CUDA device: every code, whole numbers bit for bit, ragged K (for Hopper see test_hopper_gpu too).

    python -m pytest tests/gpu/test_pairs_gpu.py -q
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from kernels.tuning import HopperConfig, SkinnyConfig
from tests.unit.kernels import checks_8_bit as checks
from tests.unit.kernels.checks import normal, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch sees none here"),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
hopper_only = pytest.mark.skipif(not HOPPER, reason="needs a CUDA device of compute capability 9.0")

SKINNY = [
    SkinnyConfig(8, 64, 1, 2, 4), SkinnyConfig(8, 32, 3, 1, 5), SkinnyConfig(8, 128, 2, 4, 3, 256),
    SkinnyConfig(16, 64, 1, 4, 3), SkinnyConfig(16, 64, 2, 2, 3, 256), SkinnyConfig(32, 64, 3, 4, 4),
    SkinnyConfig(32, 128, 1, 4, 3), SkinnyConfig(64, 64, 2, 4, 4), SkinnyConfig(64, 128, 1, 8, 3),
    SkinnyConfig(64, 128, 3, 4, 3, late=True), SkinnyConfig(128, 128, 1, 8, 3), SkinnyConfig(128, 64, 2, 4, 3),
    SkinnyConfig(256, 128, 1, 8, 3),
]  # fmt: skip
WIDE = [
    HopperConfig(block_m, block_n, 1, warps, stages, producer)
    for block_m, block_n, warps, stages in (
        (256, 128, 8, 2), (128, 256, 8, 3), (128, 128, 4, 2), (128, 128, 8, 4), (128, 64, 4, 3), (64, 128, 4, 3),
        (64, 256, 8, 3), (64, 64, 4, 4), (32, 128, 4, 4), (16, 64, 4, 5),
    )
    for producer in (False, True)
]  # fmt: skip


def test_every_word() -> None:
    checks.check_every_word("cuda", (8, 32, 64, 128))


@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 128, 200, 256])
@pytest.mark.parametrize("n, k", [(4608, 4096), (320, 512), (200, 14336), (72, 1992), (100, 63)])
def test_few_rows(m: int, n: int, k: int) -> None:
    for config in SKINNY:
        if config.block_m <= max(8, 4 * m):
            checks.check_pairs_exact(m, n, k, "cuda", config)


@hopper_only
@pytest.mark.parametrize("m", [1, 33, 64, 65, 200, 256, 1000, 2048])
@pytest.mark.parametrize("n, k", [(4608, 4096), (320, 512), (200, 14336), (4612, 1992)])  # 4612: out not by TMA
def test_many_rows(m: int, n: int, k: int) -> None:
    for config in (replace(config, splits=splits) for config in WIDE for splits in (1, 3)):
        if config.block_m <= max(16, 4 * m):
            checks.check_pairs_exact(m, n, k, "cuda", config)


@pytest.mark.parametrize("m", [1, 16, 64, 100, 256, 300, 2048, 2100])
@pytest.mark.parametrize("n, k", [(4096, 4096), (1000, 2304), (1000, 1992), (72, 202)])
def test_linear(m: int, n: int, k: int) -> None:
    weight = kernels.pack_weight(normal((n, k), 1, "cuda").float() * 0.05 + 0.01, "int8", device="cuda")
    assert weight.layout == "pairs"
    x = normal((m, k), m, "cuda")
    got = kernels.linear(x, weight, impl="triton")
    assert relative_error(got, x.double() @ weight.dequantize(torch.float64).t()) < 4e-3


def test_rows_of_a_table() -> None:
    table = kernels.pack_weight(normal((1000, 1536), 1, "cuda"), "int8", device="cuda")
    index = torch.tensor([999, 0, 17, 17], device="cuda")
    assert torch.equal(table.rows(index, torch.float32), table.dequantize()[index])
