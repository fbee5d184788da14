"""Compile a Triton kernel without a GPU, for sm_90 or an older one, and count what the assembler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
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

    def loops(self) -> list[list[str]]:
        """Everything between a backward branch and its target."""
        at = {m.group(1): i for i, line in enumerate(self.sass) if (m := re.match(r"/\*([0-9a-f]+)\*/", line))}
        found = []
        for i, line in enumerate(self.sass):
            if m := re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", line):
                target = at.get(f"{int(m.group(1), 16):04x}")
                if target is not None and target < i:
                    found.append(self.sass[target : i + 1])
        return found

    def loop(self) -> list[str]:
        """The body of the hottest loop: the one with the most tensor-core instructions."""
        return max(filter(mma, self.loops()), key=lambda body: (mma(body), -len(body)), default=[])

    def overwritten(self) -> list[str]:
        """Writes to registers that hold the left operand of a warp-group product still in flight, which may not have
        read them yet. Loops are walked twice: the second turn begins with the products that the first left behind."""
        walks = [self.sass] + [2 * body for body in self.loops() if mma(body)]
        return list(dict.fromkeys(line for walk in walks for line in _overwriting(walk)))


INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]\S*)\s*(.*?)\s*;")
LEFT_REGISTERS = 4  # 32-bit ones a thread, of 64 x 16 bf16 or 64 x 32 bytes over four warps


def _overwriting(lines: list[str]) -> Iterator[str]:
    flying: list[list[int]] = [[]]  # registers that are read by each group of products, the last still being issued
    for line in lines:
        found = INSTRUCTION.match(line)
        if found is None:
            continue
        opcode, operands = found.groups()
        if "GMMA" in opcode:
            if left := re.match(r"R\d+, R(\d+), gdesc", operands):
                first = int(left.group(1))
                flying[-1] += range(first, first + LEFT_REGISTERS)
            if "gsb0" in operands:
                flying.append([])
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            outstanding = int(operands.split()[-1], 16)
            flying = flying[-1 - outstanding :]
        elif any(register in group for register in _written(opcode, operands) for group in flying):
            yield line


def _written(opcode: str, operands: str) -> range:
    """The registers of the first operand, behind a predicate that is written too, unless it is only read."""
    first = re.match(r"(?:U?P[0-9T], )?R(\d+)\b", operands)
    if first is None or re.match(r"(ST|RED|BAR|WARPSYNC|BR|RET|CALL|NANOSLEEP)", opcode):
        return range(0)
    count = 4 if re.search(r"\.(128|4)(\.|$)", opcode) else 2 if re.search(r"\.(64|2|WIDE)(\.|$)|^CS2R$", opcode) else 1
    return range(int(first.group(1)), int(first.group(1)) + count)


def opcodes(lines: list[str]) -> Counter[str]:
    """How often each opcode (without its modifiers) occurs."""
    found = (re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line) for line in lines)
    return Counter(m.group(1) for m in found if m)


def before_wait(built: Compiled) -> list[str]:
    """What comes before the wait for the kernel before: nothing where nobody waits."""
    return built.sass[: next((i for i, line in enumerate(built.sass) if "ACQBULK" in line), 0)]


def mma(lines: list[str]) -> int:
    counts = opcodes(lines)
    return counts["HMMA"] + counts["HGMMA"] + counts["IGMMA"] + counts["QGMMA"] + counts["IMMA"]


class _Target:
    """What kernels ask which GPU they are compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target


def compile_kernel(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], divisible: list[str], warps: int, stages: int,
    capability: int = 90, **options: Any,
) -> Compiled:
    """signature: type of each runtime argument ("*bf16", "i32", ...); constants: the constexpr arguments; divisible:
    those known to be multiples of 16; options: more of Triton's."""
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel, signature=full, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=attrs
    )
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(_Target(target))
    try:
        built = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages} | options)
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
