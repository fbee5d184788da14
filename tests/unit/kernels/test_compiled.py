"""What ptxas makes of the kernels for sm_90, without a GPU: no spills, no conversions in the loop, instructions within
the budget.

The budget: an H200 reads 4.3 TB/s and issues about 32e12 thread instructions a second, so 3.7 instructions per 4-bit
weight or element, 7.5 per 8-bit and 15 per 16-bit one, everything in the loop counted. Values here are what the kernels
reach, rounded up.
"""

from __future__ import annotations

import re
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

import torch

from kernels import KV_FORMATS, tuning
from kernels.paged import decode_triton, kv_cache_triton, prefill_triton, qkv_triton
from kernels.products import a8w4, a8w8, a16w4, skinny, wide
from kernels.rows import elementwise_triton, rounding_triton
from tests.unit.kernels.sass import Compiled, before_wait, compile_kernel, mma, opcodes

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

CODES = {"bf16": torch.bfloat16, "i8": torch.int8, "i16": torch.int16, "fp8e4nv": torch.float8_e4m3fn}
CONVERSIONS = ("I2F", "I2FP", "F2F")
INTEGERS = ("M", "N", "N_PADDED", "K", "groups_per_split", "k_per_split")


def matmul(
    kernel: object, pointers: dict[str, str], constants: dict[str, object], integers: str, warps: int, stages: int,
    capability: int = 90,
) -> Compiled:
    signature = pointers | dict.fromkeys(integers.split(), "i32")
    known = [name for name in signature if name not in ("M", "groups_per_split")]
    fixed = {"STAGES": stages, "EARLY": capability >= 90, "INTERP": False}
    return compile_kernel(kernel, signature, fixed | constants, known, warps, stages, capability)


def check(built: Compiled, elements: int, warps: int, budget: float, conversions: bool = False) -> None:
    loop = built.loop()
    assert built.spilled == 0, f"{built.spilled} spills"
    assert mma(loop) > 0, "no tensor-core instruction in the loop"
    found = sum(opcodes(loop)[name] for name in CONVERSIONS)
    assert conversions or found == 0, f"{found} conversions in the loop"
    written = built.overwritten()
    assert not written, f"{len(written)} writes to operands of products in flight, the first: {written[0]}"
    per_element = len(loop) * 32 * warps / elements
    assert per_element <= budget, f"{per_element:.2f} instructions per element, the budget is {budget}"


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(
    "summed, gated, block_m, block_n, group_size, warps, stages, budget",
    [
        (True, False, 8, 64, 128, 1, 4, 1.9), (True, False, 8, 64, 128, 2, 3, 2.2), (True, False, 8, 64, 64, 1, 4, 2.4),
        (True, False, 16, 64, 128, 2, 3, 2.5), (True, False, 16, 128, 128, 2, 3, 2.3),
        (False, False, 8, 64, 128, 1, 4, 2.4), (False, False, 8, 64, 64, 1, 4, 2.9),
        (False, False, 16, 64, 128, 2, 3, 2.9), (False, False, 64, 128, 128, 4, 3, 3.2),
        (False, True, 8, 64, 128, 1, 4, 2.4), (False, True, 64, 128, 128, 4, 3, 3.2),
    ],
)  # fmt: skip
def test_a16w4(
    summed: bool, gated: bool, block_m: int, block_n: int, group_size: int, warps: int, stages: int, budget: float,
    ahead: int,
) -> None:
    pointers = {"x": "*bf16", "words": "*i16", "scales": "*i32", "out": "*bf16" if gated else "*fp32"}
    pointers |= {"sums": "*fp32"} if summed else {}
    constants = {"ROWS": 64, "BM": block_m, "BN": block_n, "G": group_size, "GATED": gated, "AHEAD": ahead}
    constants |= {} if summed else {"sums": None}
    integers = "M N N_PADDED K groups_per_split"
    built = matmul(a16w4.a16w4_kernel, pointers, constants, integers, warps, stages)
    check(built, block_n * group_size, warps, budget)
    assert opcodes(built.loop())["LDG"] == 0  # every load of the loop is asynchronous


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(
    "element, gated, block_m, block_n, block_k, warps, stages, budget",
    [
        ("bf16", False, 16, 32, 128, 2, 3, 3.0), ("i8", False, 16, 64, 128, 4, 3, 6.3),
        ("fp8e4nv", False, 16, 64, 128, 4, 3, 4.5), ("bf16", True, 16, 32, 128, 2, 3, 3.0),
        ("i8", True, 16, 64, 128, 4, 3, 6.4), ("i8", False, 64, 64, 128, 4, 3, 6.6),
        ("i16", False, 8, 64, 128, 2, 4, 2.5), ("i16", False, 8, 64, 256, 2, 3, 2.4),
        ("i16", False, 16, 64, 128, 2, 3, 2.7), ("i16", True, 16, 64, 128, 2, 3, 2.8),
        ("i16", False, 16, 64, 256, 4, 3, 3.1), ("i16", False, 32, 64, 128, 4, 4, 3.6),
        ("i16", False, 64, 64, 128, 4, 4, 3.7), ("i16", False, 64, 128, 128, 4, 3, 3.0),
        ("i16", True, 64, 128, 128, 4, 3, 3.0), ("i16", False, 128, 128, 128, 8, 3, 3.7),
        ("i16", False, 256, 128, 128, 8, 3, 4.3),
        ("fp8e4nv", False, 64, 128, 128, 8, 3, 4.5), ("fp8e4nv", False, 128, 64, 128, 4, 3, 5.4),
    ],
)  # fmt: skip
def test_skinny(
    element: str, gated: bool, block_m: int, block_n: int, block_k: int, warps: int, stages: int, budget: float,
    ahead: int,
) -> None:
    """i16: int8 in pairs."""
    scale = {"bf16": None, "i8": "*bf16", "i16": "*bf16", "fp8e4nv": "*fp32"}[element]
    pointers = {"x": "*bf16", "w": f"*{element}", "out": "*bf16" if gated else "*fp32"}
    config = tuning.SkinnyConfig(block_m, block_n, 1, warps, stages, block_k)
    constants: dict[str, object] = {"BM": block_m, "BN": block_n, "BK": block_k, "EVEN": True, "GATED": gated}
    constants["AHEAD"] = ahead
    constants["DOTS"] = skinny.products_per_step(CODES[element], config)
    pointers, constants = (pointers | {"scale": scale}, constants) if scale else (pointers, constants | {"scale": None})
    built = matmul(skinny.skinny_kernel, pointers, constants, "M N K k_per_split", warps, stages)
    check(built, block_n * block_k, warps, budget)
    assert opcodes(built.loop())["LDG"] == 0  # every load of the loop is asynchronous


@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_rope_write(format: str, together: int, capability: int) -> None:
    chosen = KV_FORMATS[format]
    data = "*bf16" if format == "bf16" else "*i16"
    strides = "key_block key_token key_head value_block value_token value_head scale_block scale_token scale_head"
    signature = {"qkv": "*fp32", "q_out": "*bf16", "turn": "*fp32", "slots": "*i64", "q_norm": "*bf16"}
    signature |= {"k_norm": "*bf16", "key": data, "value": data, "eps": "fp32"}
    signature |= dict.fromkeys(f"size H HKV {strides}".split(), "i32")
    constants: dict[str, object] = {"SPLITS": 3, "D": 128, "BH": together, "BLOCK": 64, "KEY": chosen.key.name}
    constants |= {"VALUE": chosen.value.name, "NORM": True, "EARLY": capability >= 90, "INTERP": False}
    constants |= {"SETTLED": True}
    scales = ("key_scale", "value_scale")
    if format == "bf16":
        constants |= dict.fromkeys(scales)
    else:
        signature |= dict.fromkeys(scales, "*i32")
    known = [name for name in signature if name not in ("eps", "H", "HKV")]
    built = compile_kernel(qkv_triton.rope_write_kernel, signature, constants, known, 1, 1, capability)
    assert built.spilled == 0 and built.registers <= 168
    read = opcodes(before_wait(built))["LDG"]
    assert read == (3 if capability >= 90 else 0), "a slot, cosines and sines, before the wait where there is one"


@pytest.mark.parametrize(
    "block_m, block_n, warps, budget", [(128, 256, 8, 3.2), (256, 128, 8, 4.5), (64, 128, 4, 3.2)]
)
def test_wide(block_m: int, block_n: int, warps: int, budget: float) -> None:
    pointers = {"x": "*bf16", "words": "*i16", "scales": "*i32", "out": "*bf16"}
    constants = {"ROWS": 64, "BM": block_m, "BN": block_n, "G": 128}
    built = matmul(wide.wide_kernel, pointers, constants, "M N N_PADDED K groups_per_split", warps, 3)
    check(built, block_n * 128, warps, budget)
    waits = sum("WARPGROUP.DEPBAR" in line for line in built.loop())
    assert waits <= 3 < mma(built.loop()), f"{waits} waits: ptxas serialized the products (C7515)"


@pytest.mark.parametrize(
    "element, block_m, block_n, block_k, warps, stages, product",
    [
        ("i8", 128, 128, 128, 4, 3, "IGMMA"), ("i8", 128, 256, 128, 8, 4, "IGMMA"), ("i8", 64, 64, 128, 4, 4, "IGMMA"),
        ("fp8e4nv", 128, 128, 128, 8, 4, "QGMMA"), ("fp8e4nv", 64, 64, 128, 4, 4, "QGMMA"),
    ],
)
def test_a8w8(
    element: str, block_m: int, block_n: int, block_k: int, warps: int, stages: int, product: str
) -> None:
    pointers = {"x": f"*{element}", "w": f"*{element}", "x_scale": "*fp32", "w_scale": "*bf16", "out": "*bf16"}
    constants = {"BM": block_m, "BN": block_n, "BK": block_k, "BAND": 8, "EVEN": True}
    built = matmul(a8w8.a8w8_kernel, pointers, constants, "out_row M N K k_per_split", warps, stages)
    check(built, min(block_m, block_n) * block_k, warps, 2.5)
    assert opcodes(built.loop())[product] > 0 and opcodes(built.loop())["LDG"] == 0


@pytest.mark.parametrize(
    "block_m, block_n, group_size, warps, budget",
    [(256, 128, 128, 8, 4.5), (128, 256, 128, 8, 3.5), (128, 128, 128, 8, 3.9), (128, 128, 64, 8, 5.0)],
)
def test_a8w4(block_m: int, block_n: int, group_size: int, warps: int, budget: float) -> None:
    """int8 is made in registers and goes from there into the tensor core: nothing is written back or converted."""
    pointers = {"x": "*i8", "words": "*i16", "scales": "*i32", "x_scale": "*fp32", "channel": "*fp32", "out": "*bf16"}
    constants = {"ROWS": 64, "BM": block_m, "BN": block_n, "G": group_size}
    built = matmul(a8w4.a8w4_kernel, pointers, constants, "M N N_PADDED K groups_per_split", warps, 3)
    check(built, block_n * group_size, warps, budget)
    loop = built.loop()
    products = [line for line in loop if "IGMMA" in line]
    assert len(products) == mma(loop) and all(re.search(r"S8\.S8 R\d+, R\d+, gdesc", line) for line in products)
    assert not {"STS", "LDG", "SHFL"} & opcodes(loop).keys()


@pytest.mark.parametrize("add, splits", [(True, 4), (True, 1), (False, 1)])
def test_rms_norm(add: bool, splits: int) -> None:
    """A row in registers, and where one is added, the residual asked for before the wait."""
    pointers = dict.fromkeys(("x", "residual", "weight", "out", "total"), "*bf16")
    pointers |= {"x": "*fp32"} if splits > 1 else {}
    integers = dict.fromkeys(("stride_outer", "stride_inner", "INNER", "size", "D"), "i32")
    constants: dict[str, object] = {"SPLITS": splits, "BLOCK": 4096, "ADD": add, "G": 0, "sums": None}
    constants |= {"EARLY": True, "INTERP": False}
    signature = pointers | integers | {"eps": "fp32"}
    built = compile_kernel(elementwise_triton.rms_norm_kernel, signature, constants, list(pointers), 8, 1)
    assert built.spilled == 0 and built.registers <= 128
    assert (opcodes(built.sass)["CCTL"] > 0) == add


@pytest.mark.parametrize("codes, largest", [("i8", 127.0), ("fp8e4nv", 448.0)])
@pytest.mark.parametrize("name, width, warps", [("rms_norm", 4096, 8), ("silu_mul", 14336, 16)])
def test_quantized_operations(name: str, width: int, warps: int, codes: str, largest: float) -> None:
    """A row stays in registers between its largest element and its codes."""
    kernel = getattr(rounding_triton, f"quantized_{name}_kernel")
    pointers = {"codes": f"*{codes}", "scales": "*fp32", "size": "i32"}
    constants: dict[str, object] = {"BLOCK": 1 << (width - 1).bit_length(), "LARGEST": largest, "SMALLEST": 1e-30}
    constants |= {"SPLITS": 1}
    if name == "rms_norm":
        pointers |= dict.fromkeys(("x", "residual", "weight", "total"), "*bf16") | {"D": "i32", "eps": "fp32"}
        constants |= {"ADD": True}
    else:
        pointers |= {"gate_up": "*bf16", "I": "i32"}
    known = [argument for argument in pointers if argument != "eps"]
    built = compile_kernel(kernel, pointers, constants | {"EARLY": True, "INTERP": False}, known, warps, 1)
    assert built.spilled == 0 and built.registers <= 128
    lines = opcodes(built.sass)
    assert lines["LDG"] * 8 * 32 * warps <= 4 * constants["BLOCK"]  # type: ignore[operator]
    assert lines["F2F"] == 0, "conversions by the slow pipe"


def attention(
    kernel: object, format: str, constants: dict[str, object], extra: dict[str, str], integers: str, warps: int,
    stages: int, capability: int = 90,
) -> Compiled:
    chosen = KV_FORMATS[format]
    data = "*bf16" if format == "bf16" else "*i16"
    strides = "q_row q_head key_block key_token key_head value_block value_token value_head scale_block scale_head H"
    signature = {"q": "*bf16", "key": data, "value": data, "tables": "*i32", "lengths": "*i32", "out": "*bf16", **extra}
    signature |= dict.fromkeys(f"{strides} {integers}".split(), "i32")
    fixed = {
        "D": 128,
        "KEY": chosen.key.name,
        "VALUE": chosen.value.name,
        "BLOCK": 64,
        "GROUP": 4,
        "STAGES": stages,
        "INTERP": False,
        "scale_token": 1,
    }
    if format == "bf16":
        fixed |= {"key_scale": None, "value_scale": None}
    else:
        signature |= {"key_scale": "*i32", "value_scale": "*i32"}
    known = [name for name in signature if name not in ("scale", *integers.split())]
    return compile_kernel(kernel, signature | {"scale": "fp32"}, fixed | constants, known, warps, stages, capability)


@pytest.mark.parametrize(
    "format, tile, warps, stages, budget",
    [
        ("bf16", 64, 2, 3, 1.8), ("bf16", 128, 4, 2, 1.8), ("int8", 32, 1, 4, 3.6), ("int4", 64, 1, 4, 2.8),
        ("fp8", 32, 1, 4, 3.6), ("k8v4", 32, 1, 4, 3.6),
    ],
)
def test_decode(format: str, tile: int, warps: int, stages: int, budget: float) -> None:
    """Lengths are read before the wait, and the table only asked for."""
    constants = {"TILE": tile, "SPLIT": True, "MIN_SPLIT": 128, "ROWS": 16, "SETTLED": True, "EARLY": 2}
    built = attention(
        decode_triton.decode_kernel, format, constants, {"partial": "*fp32", "partial_ml": "*fp32"}, "table_row", warps,
        stages,
    )
    check(built, 2 * tile * 128, warps, budget)
    before = opcodes(before_wait(built))
    assert before["LDG"] == 1 and before["CCTL"] >= 1 and not before["LDGSTS"]


@pytest.mark.parametrize("settled", [False, True])
def test_combine(settled: bool) -> None:
    """The length is read before the wait where it may be, and nothing else."""
    signature = {"partial": "*fp32", "partial_ml": "*fp32", "lengths": "*i32", "out": "*bf16", "H": "i32"}
    signature |= {"splits": "i32"}
    constants = {"D": 128, "TILE": 128, "PADDED": 8, "MIN_SPLIT": 64, "SETTLED": settled, "EARLY": 2, "INTERP": False}
    built = compile_kernel(decode_triton.combine_kernel, signature, constants, ["partial", "lengths", "out"], 2, 1)
    assert built.spilled == 0 and opcodes(before_wait(built))["LDG"] == settled


STORE = "k_row k_head v_row v_head key_block key_token key_head value_block value_token value_head"
EXPAND = "table_row key_block key_token key_head value_block value_token value_head"
SCALES = "scale_block scale_token scale_head"


@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("op", ["write", "expand"])
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kv(format: str, op: str, capability: int) -> None:
    """Writing and expanding: they compile, and spill nothing."""
    chosen, data = KV_FORMATS[format], "*bf16" if format == "bf16" else "*i16"
    signature = {"key": data, "value": data}
    shifted = format == "fp8" and op == "expand" and capability < 89  # `codec_triton.reading`
    names = ("fp8_shifted",) * 2 if shifted else (chosen.key.name, chosen.value.name)
    constants: dict[str, object] = {"BLOCK": 64, "D": 128, "KEY": names[0], "VALUE": names[1]}
    if op == "write":
        signature |= {"k": "*bf16", "v": "*bf16", "slots": "*i64"}
    else:
        signature |= {"tables": "*i32", "lengths": "*i32", "key_out": "*bf16", "value_out": "*bf16"}
    scales = dict.fromkeys(("key_scale", "value_scale"), "*i32")
    if format == "bf16":
        constants |= dict.fromkeys(scales)
    else:
        signature |= scales
    signature |= dict.fromkeys(f"{STORE if op == 'write' else EXPAND} {SCALES}".split(), "i32")
    kernel = kv_cache_triton.write_kv_kernel if op == "write" else kv_cache_triton.expand_kernel
    warps = 1 if op == "write" else 2
    built = compile_kernel(kernel, signature, constants | {"INTERP": False}, [], warps, 1, capability)
    assert built.spilled == 0, f"{built.spilled} spills"


@pytest.mark.parametrize("format", KV_FORMATS)
def test_prefill(format: str) -> None:
    tile = 32 if format == "fp8" else 64
    constants = {"TILE": tile, "BQ": 64, "B_PADDED": 4}
    more = {"query_starts": "*i32", "T": "i32"}
    built = attention(prefill_triton.prefill_kernel, format, constants, more, "table_row T B", 4, 3)
    check(built, 2 * tile * 128, 4, 8.0)
