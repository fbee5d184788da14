"""What ptxas makes of the kernels for Hopper, without a GPU: products overlap with dequantization, what one is still
reading is neither written nor given back, and only weights are read before the wait for the kernel before.

Which kernel a tile becomes depends on where it ends: out by TMA, or masked, in bf16 or float32; so these alternate.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

import torch
from triton.experimental.gluon.language import NVMMASharedLayout

from kernels import pack_weight
from kernels.products import a16w4_hopper, a16w8_hopper, bf16_hopper, hopper_ring
from kernels.tuning import HopperConfig
from tests.unit.kernels.sass import Compiled, before_wait, compile_kernel, mma, opcodes

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def descriptor(element: str, box: list[int], layout: NVMMASharedLayout) -> str:
    return f"tensordesc<{element}{box},{layout!r}>"


def compiled(config: HopperConfig, out: torch.dtype, by_tma: bool, gated: bool, format: str = "int4") -> Compiled:
    element = "bf16" if out == torch.bfloat16 else "fp32"
    module, kernel, held, layout = {
        "int4": (a16w4_hopper, a16w4_hopper.a16w4_hopper_kernel, "i16", a16w4_hopper.WORDS_LAYOUT),
        "int8": (a16w8_hopper, a16w8_hopper.a16w8_hopper_kernel, "i16", a16w8_hopper.WORDS_LAYOUT),
        "bf16": (bf16_hopper, bf16_hopper.bf16_hopper_kernel, "bf16", bf16_hopper.WEIGHT_LAYOUT),
    }[format]
    x_box, w_box, *s_box = module.boxes(config, gated)
    signature = {"x_desc": descriptor("bf16", x_box, hopper_ring.X_LAYOUT), "w_desc": descriptor(held, w_box, layout)}
    signature |= {"s_desc": descriptor("i32", s_box[0], a16w4_hopper.SCALES_LAYOUT)} if s_box else {}
    signature |= {"scale": "*bf16"} if format == "int8" else {}
    signature |= {"out": f"*{element}"} | dict.fromkeys("M N K groups_per_split".split(), "i32")
    constants: dict[str, object] = {"STAGES": config.stages, "EARLY": 2 if config.late else 1, "GATED": gated}
    constants |= {"PRODUCER": config.producer, "AHEAD": config.ahead, "BAND": config.band}
    if by_tma:
        box = [1, config.block_m, config.block_n // (2 if gated else 1)]
        signature["y_desc"] = descriptor(element, box, hopper_ring.OUT_LAYOUTS[out])
    else:
        constants["y_desc"] = None
    options = hopper_ring.launch_options(config)
    warps = options.pop("num_warps")
    return compile_kernel(kernel, signature, constants, ["out", "K"], warps, config.stages, **options)


def check(built: Compiled, config: HopperConfig, budget: float) -> list[str]:
    """budget: thread instructions per weight, as in test_compiled. -> the loop."""
    assert built.spilled == 0, f"{built.spilled} spills"
    assert not built.overwritten(), built.overwritten()
    loop, counts = built.loop(), opcodes(built.loop())
    assert mma(loop) == counts["HGMMA"] == 8 * config.block_n // (16 * config.warps)
    assert not {"I2F", "I2FP", "F2F", "STS", "SHFL", "LDG"} & counts.keys()
    per_weight = len(loop) * 32 * config.warps / (config.block_n * 128)
    assert per_weight <= budget, f"{per_weight:.2f} instructions per weight, the budget is {budget}"
    assert slots_are_free(loop, config.warps), "a slot is given back that some warps may still read"
    return loop


def waits(loop: list[str]) -> list[int]:
    """How many groups of products each wait of the loop leaves running."""
    return [int(m.group(1), 16) for line in loop if (m := re.search(r"WARPGROUP\.DEPBAR.* gsb0, (0x\d+)", line))]


@pytest.mark.parametrize(
    "config, out, by_tma, budget",
    [
        (HopperConfig(256, 128, 1, 8, 3, True), torch.bfloat16, True, 3.4),
        (HopperConfig(256, 128, 1, 8, 3, True, band=4), torch.float32, False, 3.4),
        (HopperConfig(256, 128, 1, 8, 2, False, band=4), torch.bfloat16, True, 4.3),
        (HopperConfig(128, 128, 1, 4, 2, False, 2), torch.bfloat16, True, 3.2),
        (HopperConfig(256, 64, 1, 4, 3, True), torch.float32, True, 3.4),
        (HopperConfig(128, 64, 1, 4, 3, False, 2), torch.float32, True, 3.9),
        (HopperConfig(64, 128, 1, 4, 3, True, 2), torch.bfloat16, False, 2.8),
        (HopperConfig(64, 256, 1, 8, 3, True), torch.bfloat16, True, 2.8),
        (HopperConfig(128, 128, 1, 8, 3, False), torch.float32, False, 4.2),
    ],
)
def test_many_rows(config: HopperConfig, out: torch.dtype, by_tma: bool, budget: float) -> None:
    """Each wait leaves one product running; had ptxas serialized them (C7515), there were waits for all."""
    assert waits(check(compiled(config, out, by_tma, False), config, budget)) == [1] * 4


@pytest.mark.parametrize(
    "config, gated, budget",
    [
        (HopperConfig(8, 256, 1, 4, 5, True, 2, 5), False, 2.1), (HopperConfig(8, 64, 1, 4, 8, False, 4), False, 3.8),
        (HopperConfig(8, 128, 1, 4, 7, True, 3, 1, True), True, 2.4),
        (HopperConfig(16, 64, 1, 4, 6, True, 4, 6), False, 2.8), (HopperConfig(16, 128, 1, 4, 5, False, 3), True, 3.0),
        (HopperConfig(32, 128, 1, 4, 4, True, 2, 1), False, 2.6),
    ],
)  # fmt: skip
def test_few_rows(config: HopperConfig, gated: bool, budget: float) -> None:
    """The last wait of a group is for all of its products, behind which the scale is applied."""
    out = torch.bfloat16 if gated else torch.float32
    built = compiled(config, out, False, gated)
    assert waits(check(built, config, budget)) == [1, 1, 1, 1, 0]
    assert early_copies(built, config.producer) == config.ahead * 2


@pytest.mark.parametrize(
    "config", [HopperConfig(64, 128, 1, 4, 4, True, 2), HopperConfig(64, 256, 1, 8, 4, False)], ids=str
)
def test_gates_at_many_rows(config: HopperConfig) -> None:
    assert waits(check(compiled(config, torch.bfloat16, True, True), config, 3.2)) == [1] * 4


@pytest.mark.parametrize(
    "config, out, by_tma, gated, budget",
    [
        (HopperConfig(128, 256, 1, 8, 3, True), torch.bfloat16, True, False, 2.5),
        (HopperConfig(256, 128, 1, 8, 2, True), torch.float32, False, False, 3.0),
        (HopperConfig(256, 128, 1, 8, 2, False), torch.bfloat16, True, False, 3.7),
        (HopperConfig(128, 128, 1, 4, 2, False, 2), torch.float32, True, False, 2.9),
        (HopperConfig(128, 64, 1, 4, 3, False), torch.bfloat16, False, False, 3.6),
        (HopperConfig(64, 128, 1, 4, 3, True, 2), torch.float32, True, False, 2.5),
        (HopperConfig(64, 256, 1, 8, 3, False, 1, 1), torch.bfloat16, True, True, 3.0),
        (HopperConfig(64, 128, 1, 4, 3, True, 2, 1), torch.bfloat16, True, True, 2.6),
        (HopperConfig(32, 128, 1, 4, 4, False, 2), torch.float32, False, False, 3.0),
        (HopperConfig(16, 64, 1, 4, 4, True, 3, 4), torch.float32, False, False, 3.0),
        (HopperConfig(8, 128, 1, 4, 6, True, 2, 2, True), torch.bfloat16, False, True, 2.5),
        (HopperConfig(8, 64, 1, 4, 6, False, 3, 6), torch.float32, False, False, 3.6),
    ],
)
def test_pairs(config: HopperConfig, out: torch.dtype, by_tma: bool, gated: bool, budget: float) -> None:
    """Scales of channels wait for nobody, as words do not."""
    built = compiled(config, out, by_tma, gated, "int8")
    assert waits(check(built, config, budget)) == [1] * 4
    assert early_copies(built, config.producer, 1) == config.ahead


@pytest.mark.parametrize(
    "config, gated",
    [
        (HopperConfig(8, 64, 1, 4, 6, False, 2, 2), False), (HopperConfig(8, 128, 1, 4, 3, True, 2, 2), True),
        (HopperConfig(16, 128, 1, 8, 6, False, 1, 6), False), (HopperConfig(64, 128, 1, 4, 4, False), True),
        (HopperConfig(64, 64, 1, 4, 3, True, 2, 3), False),
    ],
)  # fmt: skip
def test_bf16(config: HopperConfig, gated: bool) -> None:
    """Nothing but products, waits and copies: an eighth of an instruction a weight, and no operand in registers."""
    built = compiled(config, torch.bfloat16 if gated else torch.float32, config.block_m == 64, gated, "bf16")
    loop, counts = built.loop(), opcodes(built.loop())
    assert built.spilled == 0 and waits(loop) == [1] and slots_are_free(loop, config.warps)
    assert mma(loop) == counts["HGMMA"] == 8 * config.block_n // (16 * config.warps)
    assert not {"LDS", "LDSM", "STS", "SHFL", "LDG"} & counts.keys() and len(loop) <= 120
    assert early_copies(built, config.producer, 1) == config.ahead


def early_copies(built: Compiled, producer: bool, parts: int = 2) -> int:
    """Copies before the wait for the kernel before, which may write x: of the `parts` of a weight (words and scales)
    for each group. The loop of a producer, which ptxas puts first, is left out."""
    before = before_wait(built)
    assert not any(re.search(r"\b(STG|LDG|UTMASTG)", line) for line in before)
    return sum("UTMALDG" in line for line in before) - (parts + 1) * producer


def slots_are_free(loop: list[str], warps: int) -> bool:
    """Whether all warps meet between a wait for products and what lets a slot be filled again: one thread does that,
    and a wait is for the products of its own four warps only."""
    met = True
    for line in loop:
        if "WARPGROUP.DEPBAR" in line:
            met = warps == 4
        elif "BAR.SYNC" in line:
            met = True
        elif re.search(r"SYNCS\.ARRIVE\.\S*A1T0|UTMALDG", line) and not met:
            return False
    return True


@pytest.mark.parametrize(
    "group_size, config, gated, match",
    [
        (64, HopperConfig(128, 64, 1, 4, 3), False, "group size must be 128, not 64"),
        (128, HopperConfig(128, 64, 1, 8, 3), False, "by 8 warps block_n must be a multiple of 128 and stages"),
        (128, HopperConfig(128, 64, 1, 4, 1), False, "not 64, N = 64 and 1"),
        (128, HopperConfig(16, 64, 1, 4, 3), True, "a multiple of 128, and divide N,"),
        (128, HopperConfig(16, 128, 1, 4, 3), True, "divide N, and stages 2 or more, not 128"),
    ],
)
def test_what_it_does_not_take(group_size: int, config: HopperConfig, gated: bool, match: str) -> None:
    weight = pack_weight(torch.ones(64, 128), "int4", group_size=group_size, device="cpu", layout="planes")
    with pytest.raises(ValueError, match=match):
        a16w4_hopper.a16w4_hopper_partials(torch.ones(70, 128, dtype=torch.bfloat16), weight, config, gated)


@pytest.mark.parametrize(
    "format, layout, run",
    [("bf16", "plain", bf16_hopper.bf16_hopper_partials), ("int8", "pairs", a16w8_hopper.a16w8_hopper_partials)],
)
@pytest.mark.parametrize(
    "k, config, gated, match",
    [
        (130, HopperConfig(16, 64, 1, 4, 3), False, "multiples of 16 bytes, not 260"),
        (128, HopperConfig(16, 64, 1, 8, 3), False, "a multiple of 128 and stages 2 or more, not 64, N = 64 and 3"),
        (128, HopperConfig(16, 64, 1, 4, 3), True, "a multiple of 128, and divide N,"),
    ],
)
def test_what_the_others_do_not_take(
    format: str, layout: str, run: Callable[..., torch.Tensor], k: int, config: HopperConfig, gated: bool, match: str
) -> None:
    weight = pack_weight(torch.ones(64, k), format, device="cpu", layout=layout)
    with pytest.raises(ValueError, match=match):
        run(torch.ones(16, k, dtype=torch.bfloat16), weight, config, gated)
