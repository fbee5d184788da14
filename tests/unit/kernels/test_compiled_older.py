"""GPUs before Hopper, without one: by the rules for shapes that nobody tuned every kernel assembles there, and takes no
more shared memory than the smallest of them have."""

from __future__ import annotations

import sys
from itertools import product

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

from kernels import KV_FORMATS, tuning
from kernels.paged import decode_triton, prefill_triton
from kernels.products import a8w4, a8w8, a16w4, skinny, wide
from tests.unit.kernels.sass import Compiled
from tests.unit.kernels.test_compiled import CODES, attention, matmul

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

SHARED = 99 << 10  # of compute capability 8.6 and 8.9; 8.0 has more
SHAPES = ((6144, 4096), (28672, 4096))


@pytest.fixture(autouse=True, params=[80, 89])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(tuning, "table", dict)
    monkeypatch.setattr(tuning, "roomy", lambda: False)
    return int(request.param)


def check(built: Compiled) -> None:
    assert built.shared <= SHARED, f"{built.shared:,} bytes of shared memory"


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", [1, 16, 64])
def test_a16w4(m: int, n: int, k: int, capability: int) -> None:
    config = tuning.planes_config(m, n, k, 128)
    pointers = {"x": "*bf16", "words": "*i16", "scales": "*i32", "out": "*fp32"}
    constants = {"ROWS": 64, "BM": config.block_m, "BN": config.block_n, "G": 128, "GATED": False, "sums": None}
    constants |= {"AHEAD": 2}
    integers = "M N N_PADDED K groups_per_split"
    check(matmul(a16w4.a16w4_kernel, pointers, constants, integers, config.warps, config.stages, capability))


@pytest.mark.parametrize("m", [100, 256])
@pytest.mark.parametrize("format", ["int4", "w4a8"])
def test_many_rows(format: str, m: int, capability: int) -> None:
    int4 = format == "int4"
    config = (tuning.wide_config if int4 else tuning.a8w4_config)(m, *SHAPES[0], 128)
    pointers = {"x": "*bf16" if int4 else "*i8", "words": "*i16", "scales": "*i32", "out": "*bf16"}
    pointers |= {} if int4 else {"x_scale": "*fp32", "channel": "*fp32"}
    constants = {"ROWS": 64, "BM": config.block_m, "BN": config.block_n, "G": 128}
    kernel, integers = wide.wide_kernel if int4 else a8w4.a8w4_kernel, "M N N_PADDED K groups_per_split"
    check(matmul(kernel, pointers, constants, integers, config.warps, config.stages, capability))


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("element, m", [*product(("bf16", "i8"), (1, 16, 64)), *product(("i16",), (1, 16, 64, 256))])
def test_skinny(element: str, m: int, n: int, k: int, capability: int) -> None:
    pairs, codes = element == "i16", CODES[element]
    config = tuning.pairs_config(m, n, k) if pairs else tuning.plain_config(m, n, k, codes.itemsize)
    pointers = {"x": "*bf16", "w": f"*{element}", "out": "*fp32"} | ({} if element == "bf16" else {"scale": "*bf16"})
    constants: dict[str, object] = {"BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "EVEN": True}
    constants |= {"GATED": False, "AHEAD": 2, "DOTS": skinny.products_per_step(codes, config)}
    constants |= {"scale": None} if element == "bf16" else {}
    built = matmul(
        skinny.skinny_kernel, pointers, constants, "M N K k_per_split", config.warps, config.stages, capability
    )
    check(built)
    assert built.spilled == 0


@pytest.mark.parametrize("m", [17, 64, 256, 8192])
def test_a8w8(m: int, capability: int) -> None:
    config = tuning.a8w8_config(m, *SHAPES[0])
    pointers = {"x": "*i8", "w": "*i8", "x_scale": "*fp32", "w_scale": "*bf16", "out": "*bf16"}
    constants = {"BM": config.block_m, "BN": config.block_n, "BK": config.block_k, "BAND": 8, "EVEN": True}
    integers = "out_row M N K k_per_split"
    check(matmul(a8w8.a8w8_kernel, pointers, constants, integers, config.warps, config.stages, capability))


@pytest.mark.parametrize("batch", [1, 8, 32, 64, 256])
@pytest.mark.parametrize("format", list(KV_FORMATS))
def test_decode(format: str, batch: int, capability: int) -> None:
    config = tuning.decode_config(format, batch, 8, 2048, multiprocessors=128)
    constants: dict[str, object] = {"TILE": config.tile, "SPLIT": True, "MIN_SPLIT": config.min_split, "ROWS": 16}
    constants |= {"SETTLED": True, "EARLY": False} | shifted(format, capability)
    extra = {"partial": "*fp32", "partial_ml": "*fp32"}
    kernel = decode_triton.decode_kernel
    check(attention(kernel, format, constants, extra, "table_row", config.warps, config.stages, capability))


@pytest.mark.parametrize("format", list(KV_FORMATS))
def test_prefill(format: str, capability: int) -> None:
    config = tuning.prefill_config(format, 128)
    constants: dict[str, object] = {"TILE": config.tile, "BQ": config.block_q, "B_PADDED": 64}
    constants |= shifted(format, capability)
    more, integers = {"query_starts": "*i32", "T": "i32"}, "table_row T B"
    kernel = prefill_triton.prefill_kernel
    check(attention(kernel, format, constants, more, integers, config.warps, config.stages, capability))


def shifted(format: str, capability: int) -> dict[str, object]:
    """Before 8.9 there is no instruction that reads e4m3; see `codec_triton.reading`."""
    return {"KEY": "fp8_shifted", "VALUE": "fp8_shifted"} if format == "fp8" and capability < 89 else {}
