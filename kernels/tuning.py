"""Which tile sizes run at which problem: data per GPU in `tuned/`, found by `python -m kernels.tune` and `tune_layer`,
and a rule for everything else.

A file holds for each problem that was tuned on that GPU the configuration that was fastest, alone or in whole layers.
Shapes that are not in it, and GPUs without a file, follow the rules below, which were fitted to the same measurements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class SkinnyConfig:
    """Tiles of a small-M matmul. block_k is read by the plain kernel only (planes step by one group), of pairs it is a
    multiple of 128. late: the next kernel is let in after the loop, see `triton_common.admit_next`. ahead: steps of K,
    0, 1, 2 or 4, whose weights are asked for, into the L2, before the kernel before has ended."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int
    block_k: int = 128
    late: bool = False
    ahead: int = 0


@dataclass(frozen=True)
class WideConfig:
    """Tiles of a large-M matmul. block_k is read by A8W8 only (planes step by one group). late: as in SkinnyConfig."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int
    block_k: int = 128
    late: bool = False


@dataclass(frozen=True)
class HopperConfig:
    """Tiles of `a16w4_hopper`, `a16w8_hopper` and `bf16_hopper`. warps: those that multiply; producer: four more issue
    the copies. programs: that are to share a multiprocessor. ahead: groups whose weights are copied before the kernel
    before has ended. late: as in SkinnyConfig. band: how many tiles of x meet one tile of weights before the
    next does, 0 for all."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int
    producer: bool = False
    programs: int = 1
    ahead: int = 0
    late: bool = False
    band: int = 0


@dataclass(frozen=True)
class DecodeConfig:
    """Decode attention: tokens per tile, splits of the context, and the fewest tokens a split is worth."""

    tile: int
    splits: int
    min_split: int
    warps: int
    stages: int


@dataclass(frozen=True)
class PrefillConfig:
    """Prefill attention: queries and tokens per tile."""

    block_q: int
    tile: int
    warps: int
    stages: int


@lru_cache(maxsize=2)
def table(part: str = "entries") -> dict[tuple[Any, ...], dict[str, Any]]:
    """What was tuned on this GPU by (kind, problem); empty where there is no file. part: "entries", which products
    follow, or "alone", by which `kernels.bench` says what a product could do if nothing stood beside it."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    path = TUNED / f"{name.replace(' ', '_')}.json"
    if not path.exists():
        return {}
    return {(e["kind"], *e["problem"]): e["config"] for e in json.loads(path.read_text()).get(part, [])}


@lru_cache(maxsize=1)
def roomy() -> bool:
    """Whether a program may have 200 kB of shared memory, as on data-centre GPUs from Hopper on."""
    if not torch.cuda.is_available():
        return True
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(torch.cuda.current_device())
    return int(properties["max_shared_mem"]) >= 200 << 10


TUNED_ROWS = (1, 8, 16, 32, 64, 128, 192, 256, 512, 2048)
"""The M that are tuned; each serves down to the one before."""


def _tuned(kind: str, m: int, n: int, k: int) -> dict[str, Any] | None:
    """The entry for m rows of a problem, or where there is none, that of the next larger M, whose tiles fit too."""
    fitting = [rows for rows in TUNED_ROWS if m <= rows] or TUNED_ROWS[-1:]
    return next((found for rows in fitting if (found := table().get((kind, rows, n, k))) is not None), None)


def _splits(n: int, k: int, block_n: int, step: int, programs: int, least_steps: int) -> int:
    """Splits of K that give about `programs` programs, each at least `least_steps` steps of K long."""
    return max(1, min(round(programs / -(-n // block_n)), k // (least_steps * step), 16))


def skinny_or_hopper(fields: dict[str, Any]) -> SkinnyConfig | HopperConfig:
    """A tuned entry by its fields: on Hopper either kernel may be the better one at few rows."""
    return HopperConfig(**fields) if "producer" in fields else SkinnyConfig(**fields)


def planes_config(m: int, n: int, k: int, group_size: int) -> SkinnyConfig | HopperConfig:
    """A16W4, M <= 64: the configuration for x [m, k] and a planes weight [n, k]."""
    found = _tuned("planes", m, n, k)
    if found is not None and group_size == 128:
        return skinny_or_hopper(found)
    if m <= 16:
        block_m = 8 if m <= 8 else 16
        if n >= 1 << 14:
            return SkinnyConfig(block_m, 128, _splits(n, k, 128, group_size, 450, 2), 2, 4)
        return SkinnyConfig(block_m, 64, _splits(n, k, 64, group_size, 700, 2), 2, 3)
    return SkinnyConfig(32 if m <= 32 else 64, 64, _splits(n, k, 64, group_size, 264, 4), 4, 3)


def wide_config(m: int, n: int, k: int, group_size: int) -> WideConfig:
    """A16W4, M > 64: the configuration for x [m, k] and a planes weight [n, k]."""
    found = _tuned("wide", m, n, k)
    if found is not None and group_size == 128:
        return WideConfig(**found)
    return WideConfig(256 if m > 128 and roomy() else 128, 128, 1, 8, 3)


def hopper_config(m: int, n: int, k: int) -> HopperConfig:
    """A16W4, M > 32, on a Hopper GPU: the configuration for x [m, k] and a planes weight [n, k]."""
    found = _tuned("hopper", m, n, k)
    if found is not None:
        return HopperConfig(**found)
    if m <= 128:
        return _one_row_of_tiles(m, n, k)
    programs = 132 // -(-m // 256)
    return HopperConfig(256, 128, _splits(n, k, 128, 128, programs, 8) if m <= 512 else 1, 8, 3, True)


def _one_row_of_tiles(m: int, n: int, k: int) -> HopperConfig:
    """Up to 128 rows of x: two programs a multiprocessor."""
    splits = _splits(n, k, 128, 128, 264, 4)
    return HopperConfig(64, 128, splits, 4, 3, True, 2) if m <= 64 else HopperConfig(128, 128, splits, 4, 2, False, 2)


def pairs_config(m: int, n: int, k: int) -> SkinnyConfig | HopperConfig:
    """A16W8, M <= 256: the configuration for x [m, k] and a pairs weight [n, k]."""
    found = _tuned("pairs", m, n, k)
    if found is not None:
        return skinny_or_hopper(found)
    if m <= 16:
        return SkinnyConfig(8 if m <= 8 else 16, 64, _splits(n, k, 64, 128, 512, 4), 2, 4)
    if m <= 64:
        return SkinnyConfig(32 if m <= 32 else 64, 64, _splits(n, k, 64, 128, 264, 4), 4, 3)
    return SkinnyConfig(128, 128, _splits(n, k, 128, 128, 132 // -(-m // 128), 4), 8, 2)


def pairs_hopper_config(m: int, n: int, k: int) -> HopperConfig:
    """A16W8, M > 32, on a Hopper GPU: the configuration for x [m, k] and a pairs weight [n, k]."""
    found = _tuned("pairs_hopper", m, n, k)
    if found is not None:
        return HopperConfig(**found)
    if m <= 128:
        return _one_row_of_tiles(m, n, k)
    programs = 132 // -(-m // 128)
    return HopperConfig(128, 256, _splits(n, k, 256, 128, programs, 8) if m <= 512 else 1, 8, 3, True)


def plain_config(m: int, n: int, k: int, element_bytes: int) -> SkinnyConfig | HopperConfig:
    """bf16 and, of w8a8 and fp8, A16W8: the configuration for x [m, k] and a plain weight [n, k]."""
    found = _tuned("bf16" if element_bytes == 2 else "int8", m, n, k)
    if found is not None:
        return skinny_or_hopper(found)
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    if element_bytes == 2:
        return SkinnyConfig(block_m, 32, _splits(n, k, 32, 128, 640, 4), 2, 3, 128)
    return SkinnyConfig(block_m, 64, _splits(n, k, 64, 128, 512, 4), 4, 3, 128)


def gated_config(
    kind: str, m: int, n: int, k: int, plain: SkinnyConfig | HopperConfig
) -> SkinnyConfig | HopperConfig:
    """The configuration for a product that ends in SiLU-mul: a tuned one, which does not split K, or that of the
    product alone, which may."""
    found = _tuned(f"gated {kind}", m, n, k)
    return plain if found is None else skinny_or_hopper(found)


def a8w4_config(m: int, n: int, k: int, group_size: int) -> WideConfig:
    """A8W4, M > 64: the configuration for x [m, k] and a planes weight [n, k]."""
    found = _tuned("a8w4", m, n, k)
    if found is not None and group_size == 128:
        return WideConfig(**found)
    block_m, rows = (128, -(-m // 128)) if m <= 128 else (256, -(-m // 256))
    return WideConfig(block_m, 128, _splits(n, k, 128, group_size, 264 // rows, 4), 8, 3)


def a8w8_config(m: int, n: int, k: int, integer: bool = True) -> WideConfig:
    """A8W8: the configuration for x [m, k] and w [n, k] in int8, or e4m3, whose second set of sums takes registers."""
    found = _tuned("a8w8", m, n, k)
    if found is not None and integer:
        return WideConfig(**found)
    if m <= 64:
        return WideConfig(64, 64, _splits(n, k, 64, 128, 264, 8), 4, 4)
    return WideConfig(128, 256 if integer and m * n >= 1 << 22 and roomy() else 128, 1, 8, 4)


def decode_config(format: str, batch: int, kv_heads: int, max_tokens: int, multiprocessors: int = 132) -> DecodeConfig:
    """The configuration for a batch whose block tables hold max_tokens; lengths are not known on the host.

    The fewer (sequence, head) pairs there are, the more the context is split: down to 128 tokens a split, or to 64
    where hardly any program would run besides. For codes one warp a program has no barriers, and many programs with
    five tiles on their way hide each other's latency; 4-bit codes leave so little to wait for that two programs share
    a context until there are 11 pairs a multiprocessor. One or two short sequences are a matter of latency alone: few
    large tiles, and few splits to merge."""
    pairs = batch * kv_heads
    few, many = pairs <= multiprocessors // 2, pairs > 3 * multiprocessors
    crowded = pairs > 11 * multiprocessors

    def splits(programs: int) -> int:
        """For so many programs a multiprocessor."""
        return round(multiprocessors * programs / pairs)

    if pairs <= 16 and max_tokens <= 1024:
        wanted, tile, warps, stages = (8, 128, 4, 2) if roomy() else (splits(3), 64, 4, 3)
        if format in ("int4", "k8v4"):
            wanted, tile, warps, stages = splits(3), 64, 2, 3
    elif format == "bf16" and few:
        wanted, tile, warps, stages = splits(2), 64, 2, 5 if roomy() else 3
    elif format == "bf16":
        wanted, tile, warps, stages = splits(4), 64, 2, 3 if many else 2
    elif not many:
        programs = 8 if format == "int4" and pairs > multiprocessors // 4 else 4
        wanted, tile, warps, stages = max(4, splits(programs)), 32, 1, 5
    elif format in ("int4", "k8v4"):
        wanted, tile, warps, stages = 1 if crowded else 2, 64 if format == "int4" else 32, 1, 6
    else:
        wanted, tile, warps, stages = (1, 32, 1, 5) if crowded else (1, 64, 2, 5)
    least = 64 if few else 128
    return DecodeConfig(tile, max(1, min(wanted, -(-max_tokens // least), 128)), least, warps, stages)


def prefill_config(format: str, head_dim: int) -> PrefillConfig:
    """The configuration for a cache format and head size."""
    found = table().get(("prefill", format, head_dim))
    if found is not None:
        return PrefillConfig(**found)
    # fp8 at 64 x 64 spills registers. k8v4 there computes garbage by 4 warps in Triton 3.6 (not by 8, nor do int8 and
    # int4, whose two sides it is made of): the GPU tests found it, why is not known.
    return PrefillConfig(64, 32 if format in ("fp8", "k8v4") else 64, 4, 3)
