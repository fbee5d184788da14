"""int8 on CPU as two planes of nibbles: the same codes, the same product, rows that can be looked up."""

from __future__ import annotations

import pytest
import torch

from kernels import linear, pack_weight
from kernels.formats.packing import NIBBLES_ABOVE, device_layout

CPU = torch.device("cpu")


def table(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k"), [(64, 64), (300, 128), (130, 896)])
def test_codes_survive_the_packing(n: int, k: int) -> None:
    weight = table(n, k)
    plain, nibbles = (pack_weight(weight, "int8", device="cpu", layout=layout) for layout in ("int8pack", "nibbles"))
    assert torch.equal(nibbles.to_plain().codes, plain.data)
    assert torch.equal(nibbles.dequantize(), plain.dequantize())
    index = torch.tensor([n - 1, 0, 33, 33, 32])
    assert torch.equal(nibbles.rows(index, torch.float32), plain.rows(index, torch.float32))


@pytest.mark.parametrize("m", [1, 5, 16, 17, 64])
@pytest.mark.parametrize(("n", "k"), [(300, 128), (130, 896)])
def test_product_against_float64(m: int, n: int, k: int) -> None:
    packed = pack_weight(table(n, k), "int8", device="cpu", layout="nibbles")
    x = table(m, k, seed=m).bfloat16()
    expected = x.double() @ packed.dequantize(torch.float64).t()
    found = linear(x, packed, impl="aten").double()
    assert (found - expected).norm() / expected.norm() < 4e-3


@pytest.mark.parametrize("m", [3, 20])
def test_integers_are_exact(m: int) -> None:
    """Codes and activations that are small integers: sums stay below 256, which bf16 holds exactly."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-2, 3, (128, 64), generator=generator).float()
    codes[:, 0] = 127  # the scale becomes 1
    packed = pack_weight(codes, "int8", device="cpu", layout="nibbles")
    x = torch.randint(-1, 2, (m, 64), generator=generator).bfloat16()
    x[:, 0] = 0
    assert torch.equal(linear(x, packed, impl="aten").float(), x.float() @ codes.t())


def test_where_it_is_used() -> None:
    big = NIBBLES_ABOVE // 896 + 1
    assert device_layout("int8", CPU, (big, 896)) == "nibbles"
    for other in ((big - 1, 896), (big, 4096), (NIBBLES_ABOVE, 40)):
        assert device_layout("int8", CPU, other) == "int8pack"
