"""What ptxas makes of the kernels outside the layers: nothing spilled, wide loads, and the order of early launches."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

from kernels.rows import elementwise_triton, tokens_triton
from tests.unit.kernels.sass import Compiled, before_wait, compile_kernel, opcodes

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])


def built(
    kernel: object, signature: dict[str, str], constants: dict[str, object], warps: int, capability: int
) -> Compiled:
    known = [name for name, kind in signature.items() if kind != "fp32"]
    early = {"EARLY": capability >= 90}
    return compile_kernel(kernel, signature, constants | early, known, warps, 1, capability)


def check(found: Compiled, capability: int, registers: int, parameters: bool = False) -> None:
    """parameters: read before the wait for the previous kernel, before which nothing else may be read."""
    assert found.spilled == 0 and found.stack == 0 and found.registers <= registers
    counts = opcodes(found.sass)
    assert (counts["ACQBULK"] == 1, counts["PREEXIT"] == 1) == (capability >= 90,) * 2, counts
    assert parameters == ("LDG" in opcodes(before_wait(found)))


@CAPABILITIES
def test_rotation(capability: int) -> None:
    signature = {"positions": "*i64", "cos_sin": "*fp32", "turn": "*fp32", "stride": "i32", "D": "i32"}
    check(built(elementwise_triton.rotation_kernel, signature, {"BLOCK": 128}, 1, capability), capability, 40)


@CAPABILITIES
def test_embed_rms_norm(capability: int) -> None:
    """The weight, a parameter, is asked for before the wait."""
    signature = {"tokens": "*i64"} | dict.fromkeys(("table", "weight", "out", "rows"), "*bf16")
    signature |= {"D": "i32", "eps": "fp32"}
    constants: dict[str, object] = {"BLOCK": 4096, "INTERP": False}
    found = built(elementwise_triton.embed_rms_norm_kernel, signature, constants, 8, capability)
    check(found, capability, 64, parameters=capability >= 90)


@CAPABILITIES
@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("block", [1024, 4096])
def test_best_of_part(block: int, element: str, capability: int) -> None:
    signature = {"logits": f"*{element}", "best": "*i64", "stride": "i32", "V": "i32"}
    found = built(tokens_triton.best_of_part_kernel, signature, {"BLOCK": block}, block // 512, capability)
    check(found, capability, 80)
    assert opcodes(found.sass)["LDG"] == (2 if element == "bf16" else 4), "16 bytes each"


@CAPABILITIES
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_best_of_row(element: str, capability: int) -> None:
    signature = {"best": "*i64", "values": f"*{element}", "indices": "*i64", "PARTS": "i32"}
    constants: dict[str, object] = {"BLOCK": 256, "INTERP": False}
    check(built(tokens_triton.best_of_row_kernel, signature, constants, 1, capability), capability, 64)


@CAPABILITIES
def test_feed_tokens(capability: int) -> None:
    signature = dict.fromkeys(("sampled", "given", "feed", "out"), "*i64") | {"R": "i32", "T": "i32"}
    check(built(tokens_triton.feed_tokens_kernel, signature, {"BLOCK": 256}, 1, capability), capability, 64)
