"""A table that serves as embeddings and as lm_head gives the same rows to both."""

from __future__ import annotations

import pytest
import torch

from kernels import pack_weight


@pytest.mark.parametrize("layout_format", ["int8"])
def test_rows_are_those_of_the_dequantized_table(layout_format: str) -> None:
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(5))
    packed = pack_weight(weight, layout_format, device="cpu")
    index = torch.tensor([299, 0, 17, 17])
    assert torch.equal(packed.rows(index, torch.float32), packed.dequantize()[index])


def test_a_layout_that_splits_rows_says_so() -> None:
    packed = pack_weight(torch.randn(128, 128), "int4", device="cpu")
    with pytest.raises(ValueError, match="'int4pack' does not keep rows together; plain, pairs"):
        packed.rows(torch.tensor([0]), torch.float32)
