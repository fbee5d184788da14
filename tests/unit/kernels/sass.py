"""Compile a Triton kernel without a GPU, for sm_90 or an older one, and count what the assembler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What one kernel became: registers and spilled bytes per thread, shared memory, and SASS lines in order."""

    registers: int
    stack: int
    spilled: int
    shared: int
    sass: list[str]

    def loop(self) -> list[str]:
        """The body of the hottest loop: between a backward branch and its target, the one with the most tensor-core
        instructions."""
        at = {m.group(1): i for i, line in enumerate(self.sass) if (m := re.match(r"/\*([0-9a-f]+)\*/", line))}
        best: list[str] = []
        for i, line in enumerate(self.sass):
            if m := re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", line):
                target = at.get(f"{int(m.group(1), 16):04x}")
                if target is not None and target < i:
                    body = self.sass[target : i + 1]
                    if (mma(body), -len(body)) > (mma(best), -len(best)):
                        best = body
        return best


def opcodes(lines: list[str]) -> Counter[str]:
    """How often each opcode (without its modifiers) occurs."""
    found = (re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line) for line in lines)
    return Counter(m.group(1) for m in found if m)


def mma(lines: list[str]) -> int:
    counts = opcodes(lines)
    return counts["HMMA"] + counts["HGMMA"] + counts["IGMMA"] + counts["QGMMA"] + counts["IMMA"]


class _Target:
    """What kernels ask which GPU they are compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target


def compile_kernel(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], divisible: list[str], warps: int, stages: int,
    capability: int = 90,
) -> Compiled:
    """signature: type of each runtime argument ("*bf16", "i32", ...); constants: the constexpr arguments; divisible:
    those known to be multiples of 16."""
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(
        fn=kernel, signature=full, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=attrs
    )
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(_Target(target))
    try:
        built = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    finally:
        driver.set_active(None)  # looked for again when somebody asks
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [BIN / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
        usage = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line)]
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    spills = sum(1 for line in lines if re.search(r"\b(STL|LDL)\b", line))
    return Compiled(numbers["REG"], numbers["STACK"], spills, built.metadata.shared, lines)
