"""What ptxas makes of `wide_hopper` and `a16w8_hopper`, without a GPU: products overlap with dequantization, and what
one is still reading is neither written nor given back.

Which kernel a tile becomes depends on where it ends: out by TMA, or masked, in bf16 or float32; so these alternate.
"""

from __future__ import annotations

import re
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

import torch
from triton.experimental.gluon.language import NVMMASharedLayout

from kernels import a16w8_hopper, pack_weight, wide_hopper
from kernels.tuning import HopperConfig
from tests.unit.kernels.sass import Compiled, compile_kernel, mma, opcodes

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def descriptor(element: str, box: list[int], layout: NVMMASharedLayout) -> str:
    return f"tensordesc<{element}{box},{layout!r}>"


def compiled(config: HopperConfig, out: torch.dtype, by_tma: bool) -> Compiled:
    element = "bf16" if out == torch.bfloat16 else "fp32"
    signature = {
        "x_desc": descriptor("bf16", [config.block_m, 128], wide_hopper.X_LAYOUT),
        "w_desc": descriptor("i16", [config.block_n // 64, 64, 32], wide_hopper.WORDS_LAYOUT),
        "scales": "*i32",
        "out": f"*{element}",
    }
    signature |= dict.fromkeys("M N N_PADDED K groups_per_split".split(), "i32")
    constants = {"BN": config.block_n, "STAGES": config.stages, "EARLY": 1, "PRODUCER": config.producer}
    if by_tma:
        signature["y_desc"] = descriptor(element, [1, config.block_m, config.block_n], wide_hopper.OUT_LAYOUTS[out])
    else:
        constants["y_desc"] = None
    known = ["scales", "out", "N_PADDED", "K"]
    options = wide_hopper.launch_options(config)
    return compile_kernel(
        wide_hopper.wide_hopper_kernel, signature, constants, known, options.pop("num_warps"), config.stages, **options
    )


@pytest.mark.parametrize(
    "config, out, by_tma, budget",
    [
        (HopperConfig(256, 128, 1, 8, 3, True), torch.bfloat16, True, 3.4),
        (HopperConfig(256, 128, 1, 8, 3, True), torch.float32, False, 3.4),
        (HopperConfig(128, 128, 1, 4, 2, False), torch.bfloat16, True, 3.1),
        (HopperConfig(256, 64, 1, 4, 3, True), torch.float32, True, 3.4),
        (HopperConfig(128, 64, 1, 4, 3, False), torch.float32, True, 3.8),
        (HopperConfig(64, 128, 1, 4, 3, True), torch.bfloat16, False, 2.8),
        (HopperConfig(64, 256, 1, 8, 3, True), torch.bfloat16, True, 2.8),
        (HopperConfig(128, 128, 1, 8, 3, False), torch.float32, False, 3.9),
    ],
)
def test_wide_hopper(config: HopperConfig, out: torch.dtype, by_tma: bool, budget: float) -> None:
    """budget: thread instructions per weight, as in test_compiled."""
    check(compiled(config, out, by_tma), config, budget)


def compiled_pairs(config: HopperConfig, out: torch.dtype, by_tma: bool) -> Compiled:
    element = "bf16" if out == torch.bfloat16 else "fp32"
    signature = {
        "x_desc": descriptor("bf16", [config.block_m, 128], wide_hopper.X_LAYOUT),
        "w_desc": descriptor("i16", [config.block_n, 1, 64], a16w8_hopper.WORDS_LAYOUT),
        "scale": "*bf16",
        "out": f"*{element}",
    }
    signature |= dict.fromkeys("M N groups groups_per_split".split(), "i32")
    constants = {"STAGES": config.stages, "EARLY": 1, "PRODUCER": config.producer}
    if by_tma:
        signature["y_desc"] = descriptor(element, [1, config.block_m, config.block_n], wide_hopper.OUT_LAYOUTS[out])
    else:
        constants["y_desc"] = None
    options = a16w8_hopper.launch_options(config)
    return compile_kernel(
        a16w8_hopper.a16w8_hopper_kernel, signature, constants, ["scale", "out"], options.pop("num_warps"),
        config.stages, **options,
    )


@pytest.mark.parametrize(
    "config, out, by_tma, budget",
    [
        (HopperConfig(128, 256, 1, 8, 3, True), torch.bfloat16, True, 2.5),
        (HopperConfig(256, 128, 1, 8, 2, True), torch.float32, False, 3.0),
        (HopperConfig(256, 128, 1, 8, 2, False), torch.bfloat16, True, 3.6),
        (HopperConfig(128, 128, 1, 4, 2, False), torch.float32, True, 2.8),
        (HopperConfig(128, 64, 1, 4, 3, False), torch.bfloat16, False, 3.5),
        (HopperConfig(64, 128, 1, 4, 3, True), torch.float32, True, 2.5),
        (HopperConfig(64, 256, 1, 8, 3, False), torch.bfloat16, True, 2.8),
        (HopperConfig(32, 128, 1, 4, 4, False), torch.float32, False, 2.8),
        (HopperConfig(16, 64, 1, 4, 6, True), torch.bfloat16, True, 3.0),
    ],
)
def test_pairs(config: HopperConfig, out: torch.dtype, by_tma: bool, budget: float) -> None:
    check(compiled_pairs(config, out, by_tma), config, budget)


def check(built: Compiled, config: HopperConfig, budget: float) -> None:
    assert built.spilled == 0, f"{built.spilled} spills"
    assert not built.overwritten(), built.overwritten()
    loop, counts = built.loop(), opcodes(built.loop())
    assert mma(loop) == counts["HGMMA"] == 8 * config.block_n // (16 * config.warps)
    assert not {"I2F", "I2FP", "F2F", "STS", "SHFL"} & counts.keys()
    per_weight = len(loop) * 32 * config.warps / (config.block_n * 128)
    assert per_weight <= budget, f"{per_weight:.2f} instructions per weight, the budget is {budget}"
    # Each wait leaves one product running; had ptxas serialized them (C7515), there were waits for all.
    waits = [line for line in loop if "WARPGROUP.DEPBAR" in line]
    assert len(waits) == 4 and all("gsb0, 0x1 " in line for line in waits), waits
    assert slots_are_free(loop, config.warps), "a slot is given back that some warps may still read"


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
    "group_size, config, match",
    [
        (64, HopperConfig(128, 64, 1, 4, 3), "group size must be 128, not 64"),
        (128, HopperConfig(128, 64, 1, 8, 3), "not 64 for 8 warps"),
        (128, HopperConfig(128, 64, 1, 4, 1), "4 warps and 1"),
    ],
)
def test_what_it_does_not_take(group_size: int, config: HopperConfig, match: str) -> None:
    weight = pack_weight(torch.ones(64, 128), "int4", group_size=group_size, device="cpu", layout="planes")
    with pytest.raises(ValueError, match=match):
        wide_hopper.wide_hopper_partials(torch.ones(70, 128, dtype=torch.bfloat16), weight, config)


@pytest.mark.parametrize(
    "k, config, match",
    [
        (130, HopperConfig(128, 64, 1, 4, 3), "multiple of 8, 130 is not"),
        (128, HopperConfig(128, 64, 1, 8, 3), "not 64 for 8 warps"),
        (128, HopperConfig(128, 64, 1, 4, 1), "4 warps and 1"),
    ],
)
def test_what_the_one_for_pairs_does_not_take(k: int, config: HopperConfig, match: str) -> None:
    weight = pack_weight(torch.ones(64, k), "int8", device="cpu", layout="pairs")
    with pytest.raises(ValueError, match=match):
        a16w8_hopper.a16w8_hopper_partials(torch.ones(70, k, dtype=torch.bfloat16), weight, config)
