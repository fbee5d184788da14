"""The Triton kernels in Triton's interpreter, on the CPU. Needs TRITON_INTERPRET=1 at import, so
`test_triton_interpreted.py` runs this folder in a process of its own."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels.products import matmul_triton
from kernels.triton_common import banded
from kernels.tuning import SkinnyConfig
from tests.unit.kernels import checks, checks_8_bit

LAYOUT = {"bf16": "plain", "int8": "pairs", "int4": "planes"}


@pytest.mark.parametrize("format, group_size", [("bf16", 128), ("int8", 128), ("int4", 128), ("int4", 64)])
@pytest.mark.parametrize("m, n, k", [(1, 100, 256), (5, 64, 512), (16, 130, 256), (17, 64, 384), (70, 72, 256)])
def test_linear(format: str, group_size: int, m: int, n: int, k: int) -> None:
    checks.check_linear(m, n, k, format, group_size, "cpu", impl="triton", layout=LAYOUT[format], bias=m == 5)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("m", [3, 40])
def test_linear_integers_exact(format: str, m: int) -> None:
    checks.check_linear_exact(m, 80, 256, format, 64, "cpu", impl="triton", layout=LAYOUT[format])


@pytest.mark.parametrize("format, n", [("int8", 150), ("int8", 160), ("int4", 150)])
def test_linear_by_slices_of_the_weight(format: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What many rows do: the weight in bf16, 64 rows of it at a time here, the last slice smaller."""
    monkeypatch.setitem(matmul_triton.FUSED_ROWS, format, 4)
    monkeypatch.setattr(matmul_triton, "DEQUANTIZED_ELEMENTS", 64 * 640)
    checks.check_linear(9, n, 640, format, 128, "cpu", impl="triton", layout=LAYOUT[format])


@pytest.mark.parametrize("m", [3, 9, 300])
@pytest.mark.parametrize("format, k", [("bf16", 200), ("int8", 200), ("int8", 328), ("int8", 63)])
def test_linear_ragged_k(format: str, k: int, m: int) -> None:
    """Also behind tiles of a K that they do not divide (9 rows) and by rows in bf16 (300)."""
    checks.check_linear(m, 40, k, format, 128, "cpu", impl="triton", layout=LAYOUT[format])


def test_every_word_of_pairs() -> None:
    checks_8_bit.check_every_word("cpu", (128,))


@pytest.mark.parametrize("block_k, splits, k", [(128, 1, 256), (128, 3, 600), (256, 2, 600), (256, 2, 640)])
def test_tiles_of_pairs(block_k: int, splits: int, k: int) -> None:
    checks_8_bit.check_pairs_exact(5, 100, k, "cpu", SkinnyConfig(16, 64, splits, 4, 3, block_k))


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize(
    "head_dim, group, block_size, order", [(64, 3, 16, "block"), (128, 4, 64, "block"), (64, 1, 128, "head")]
)
def test_decode(format: str, head_dim: int, group: int, block_size: int, order: str) -> None:
    checks.check_decode(format, [130, 0], block_size, 2, group, head_dim, "cpu", impl="triton", order=order)


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize("head_dim, group, block_size", [(64, 3, 16), (128, 2, 128)])
def test_prefill(format: str, head_dim: int, group: int, block_size: int) -> None:
    checks.check_prefill(
        format, [(1, 40), (0, 20), (70, 90), (33, 33)], block_size, 2, group, head_dim, "cpu", impl="triton",
        order="block",
    )


@pytest.mark.parametrize("padding", [0, 1, 200])
@pytest.mark.parametrize("chunks", [[(64, 64)], [(3, 5), (61, 61)], [(65, 70)], [(40, 40), (0, 9)]])
def test_prefill_of_padding_rows_is_zero(chunks: list[tuple[int, int]], padding: int) -> None:
    """More of them than a tile of queries, behind sequences that end inside and at the edge of one."""
    checks.check_prefill("bf16", chunks, 16, 1, 2, 64, "cpu", impl="triton", padding=padding, order="block")


@pytest.mark.parametrize("format", [name for name in kernels.KV_FORMATS if name != "bf16"])
def test_prefill_expanding_first(format: str) -> None:
    checks.check_prefill(format, [(130, 150)], 64, 1, 1, 64, "cpu", impl="triton", order="block")


@pytest.mark.parametrize("format", list(kernels.KV_FORMATS))
@pytest.mark.parametrize("order", ["block", "head"])
def test_write(format: str, order: str) -> None:
    checks.check_write(format, 16, 2, 64, "cpu", impl="triton", order=order)


def test_elementwise() -> None:
    checks.check_elementwise(3, 200, 6, 2, 64, "cpu", impl="triton")


@triton.jit
def tiles_kernel(out, rows, columns, BAND: tl.constexpr):
    row, column = banded(tl.program_id(0), rows, columns, BAND)
    tl.store(out + tl.program_id(0), row * columns + column)


@pytest.mark.parametrize("rows, columns, band", [(8, 5, 4), (7, 3, 4), (3, 6, 8), (5, 1, 2), (1, 4, 1)])
def test_bands_visit_every_tile_once(rows: int, columns: int, band: int) -> None:
    out = torch.full((rows * columns,), -1, dtype=torch.int32)
    tiles_kernel[(rows * columns,)](out, rows, columns, band)
    assert sorted(out.tolist()) == list(range(rows * columns))
    first = out[: min(band, rows) * columns] // columns
    assert first.unique().tolist() == list(range(min(band, rows))), "a band is left before it is done"
    assert out[: min(band, rows)].tolist() == [row * columns for row in range(min(band, rows))], "down, not across"
