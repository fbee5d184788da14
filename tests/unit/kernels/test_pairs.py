"""int8 as CUDA reads it: the same codes, two of a row in a word, and rows that can be looked up."""

from __future__ import annotations

import pytest
import torch

from kernels import pack_weight, quantize_weight
from kernels.formats.packing import device_layout

SHAPES = [(64, 128), (300, 384), (5, 200), (7, 63)]  # of K whole groups, one and a half, one with an odd end


def table(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_codes_survive_the_packing(n: int, k: int) -> None:
    weight = quantize_weight(table(n, k), "int8")
    plain, pairs = (pack_weight(weight, "int8", device="cpu", layout=layout) for layout in ("plain", "pairs"))
    assert pairs.shape == (n, k) and pairs.data.dtype == torch.int16
    assert torch.equal(pairs.to_plain().codes, plain.data) and pairs.to_plain().codes.is_contiguous()
    assert torch.equal(pairs.dequantize(), plain.dequantize())
    index = torch.tensor([n - 1, 0, 3, 3])
    assert torch.equal(pairs.rows(index, torch.float32), plain.rows(index, torch.float32))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_where_each_code_lies(n: int, k: int) -> None:
    weight = quantize_weight(table(n, k), "int8")
    words = pack_weight(weight, "int8", device="cpu", layout="pairs").data.view(n, -1, 64).int()
    for group, i, high in ((0, 0, 0), (0, 5, 1), (0, 63, 0), (k // 128, 11, 0), (k // 128, 0, 1)):
        column = 128 * group + i + 64 * high
        if group < words.shape[1]:
            code = (words[:, group, i] >> 8 * high & 255).to(torch.uint8).view(torch.int8)
            want = weight.codes[:, column] if column < k else torch.zeros(n, dtype=torch.int8)
            assert torch.equal(code, want)


def test_what_is_paired() -> None:
    """w8a8 stays plain, since the product of its codes with 8-bit activations reads them so."""
    cuda = torch.device("cuda")
    found = {format: device_layout(format, cuda, (64, 200)) for format in ("bf16", "int8", "w8a8", "fp8")}
    assert found == {"bf16": "plain", "int8": "pairs", "w8a8": "plain", "fp8": "plain"}
