"""The tiles that `kernels.tune` tries for a problem: what fits into registers and shared memory and leaves no part of
the GPU without work."""

from __future__ import annotations

from itertools import product
from typing import Any

from .tuning import DecodeConfig, HopperConfig, PrefillConfig, SkinnyConfig, WideConfig


def planes_candidates(m: int) -> list[Any]:
    bm = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    if m <= 16:
        return [
            SkinnyConfig(bm, bn, s, w, st)
            for bn, w, st, s in product((32, 64, 128, 256), (1, 2, 4, 8), (3, 4, 5), (1, 2, 3, 4, 6, 8, 10, 12, 16))
            if 16 <= bn // w <= 64 and (bn < 256 or s > 2)
        ]
    return [
        SkinnyConfig(b, bn, s, w, st)
        for b, bn, w, st, s in product((bm // 2, bm), (64, 128, 256), (2, 4, 8), (2, 3, 4), (1, 2, 4, 8))
        if 16 <= bn // w <= 64
    ]


def wide_candidates(m: int) -> list[Any]:
    return [
        WideConfig(bm, bn, s, w, st)
        for bm, bn, w, st, s in product((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4), (1, 2, 4))
        if bm <= m and bm * bn <= 1 << 15 and bm * bn // w >= 1024 and (s == 1 or m <= 256) and (bm < 256 or st < 4)
    ]


def hopper_candidates(kind: str, m: int, n: int) -> list[Any]:
    """Tiles of `a16w4_hopper` (of the kind "hopper") and `a16w8_hopper` ("pairs_hopper") above 32 rows that give work
    to most multiprocessors, in about as many stages as fit; two programs of four warps share one, or three of 64 x
    64."""
    rows = (64,) if m <= 64 else (64, 128) if m <= 128 else (128, 256)
    shapes = [
        (bm, bn, warps, stages, programs)
        for bm, bn, warps, stages in product(rows, (64, 128, 256), (4, 8), (2, 3, 4, 5))
        for programs in ((2, 3) if bm * bn <= 1 << 12 else (2,) if warps == 4 and bm * bn <= 1 << 14 else (1,))
        if bn >= 16 * warps and 1 << 10 <= bm * bn // warps <= 1 << 12
        and 140 << 10 <= (bm * 256 + bn * row_bytes(kind)) * stages * programs <= 224 << 10
    ]  # fmt: skip
    return [
        HopperConfig(bm, bn, splits, warps, stages, producer, programs, band=band)
        for (bm, bn, warps, stages, programs), splits, producer, band in product(
            shapes, (1, 2, 3, 4, 6, 8), (False, True), (0, 4) if m > 512 else (0,)
        )
        if 90 <= -(-n // bn) * -(-m // bm) * splits and (splits == 1 or m <= 512)
        and -(-n // bn) * -(-m // bm) * splits <= max(600, -(-n // bn) * -(-m // bm))
    ]  # fmt: skip


def row_bytes(kind: str) -> int:
    """Of a weight's row in a slot of a kernel for Hopper: 128 numbers, 128 codes in pairs, or in 4 bits and a scale."""
    return 256 if kind.endswith("bf16") else 128 if "pairs" in kind else 68


def deepest_ring(kind: str, block_m: int, block_n: int, programs: int) -> int:
    """Stages of a kernel for Hopper that fit into a multiprocessor's shared memory beside those of other programs."""
    return ((228 << 10) // programs - 2560) // (block_m * 256 + block_n * row_bytes(kind))


def registers(warps: int, producer: bool, programs: int) -> int:
    """Of a thread of a kernel for Hopper, where so many programs share a multiprocessor."""
    return min(255, 65536 // (32 * (warps + 4 * producer) * programs) // 8 * 8)


def fewest_registers(block_m: int) -> int:
    """What ptxas wants of a thread for a product of a warp group (its sums, and 26 more), or it refuses (C7602)."""
    return block_m // 2 + 26


FEW_ROWS_SHAPES = {
    "planes": ((64, 4, 4), (64, 4, 5), (64, 4, 6), (128, 4, 2), (128, 4, 3), (128, 4, 4), (128, 8, 2), (256, 4, 2),
               (256, 8, 2)),
    "pairs": ((64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 1), (128, 4, 2), (128, 4, 3), (128, 8, 1), (128, 8, 2),
              (256, 8, 1)),
    "bf16": ((64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 1), (128, 4, 2), (128, 8, 1), (256, 8, 1)),
}  # fmt: skip
"""block_n, warps and programs of the kernels for Hopper at few rows, by the kind of tuned entry."""


MOST_FEW_ROWS = {"planes": 32, "pairs": 32, "bf16": 64}  # above, 4-bit and int8 weights have kinds of their own


def few_rows_candidates(kind: str, m: int, n: int) -> list[Any]:
    """Of the kernels for Hopper at few rows: about one turn of the multiprocessors, and where that is uneven, around
    it; a ring as deep as fits, or half of that."""
    bm = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    found = []
    for (bn, warps, programs), splits in product(FEW_ROWS_SHAPES[kind], (1, 2, 3, 4, 6, 8, 12, 16)):
        deepest, turns = deepest_ring(kind, bm, bn, programs), -(-n // bn) * splits / (132 * programs)
        if deepest < 3 or turns < 0.4 or (turns > 1.7 and splits > 1):
            continue
        for producer, stages, ahead in product((False, True), {deepest, max(2, deepest // 2)}, (0, 1, 16)):
            registers = 65536 // (32 * (warps + 4 * producer) * programs)
            if producer:
                registers = (registers * (warps + 4) - 24 * 4) // warps
            needed = {8: 0, 16: 106, 32: 150}[bm] if kind == "planes" and bn // warps >= 32 else 0
            if registers >= needed:  # or it spills
                found.append(HopperConfig(bm, bn, splits, warps, stages, producer, programs, min(ahead, stages)))
    return found


def gated_hopper_candidates(kind: str, m: int) -> list[HopperConfig]:
    """Of the same with SiLU-mul at the end, up to 64 rows; kind: "gated planes", "gated pairs" or "gated bf16"."""
    bm = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    return [
        HopperConfig(bm, bn, 1, warps, stages, producer, programs, ahead)
        for (bn, warps, programs), producer, ahead in product(
            ((128, 4, 1), (128, 4, 2), (128, 4, 3), (256, 8, 1), (256, 8, 2)), (False, True), (0, 1)
        )
        if (stages := deepest_ring(kind, bm, bn, programs)) >= 2 and (bm <= 16 or programs < 3)
    ]


RANGES = {"block_n": (32, 256), "block_k": (64, 256), "splits": (1, 16), "warps": (1, 8), "stages": (2, 12)}


def aheads_of(kind: str) -> tuple[int, ...]:
    """Steps of K whose weights a kernel without a ring may ask for ahead: of those for 8-bit activations none."""
    return () if kind.startswith("a8") else (0, 1, 2, 4)


def neighbours(config: dict[str, Any], kind: str, k: int) -> list[dict[str, Any]]:
    """A configuration with one field changed at a time; block_k means nothing to 4-bit weights and is 128 or more of
    pairs, and a gated product does not split K. k: columns of the weight."""
    changes: list[dict[str, Any]] = [{"late": not config.get("late", False)}]
    hopper = "producer" in config
    if hopper:
        changes.append({"producer": not config["producer"]})
        held = config.get("programs", 1)
        changes += [{"programs": count} for count in (held - 1, held + 1) if count]
    aheads = (0, 1, config["stages"]) if hopper else aheads_of(kind)
    changes += [{"ahead": ahead} for ahead in aheads if ahead != config.get("ahead", 0)]
    unread = "splits" if kind.startswith("gated ") else "block_k" if kind in ("planes", "hopper") else ""
    for name, (least, most) in RANGES.items():
        if name == unread or name not in config:
            continue
        held = config[name]
        near = [held + 1, held - 1] if name == "stages" else [held * 2, held // 2]
        if name == "splits":
            near += other_splits(held, k)
        least = 128 if name == "block_k" and kind.endswith("pairs") else least
        changes += [{name: value} for value in dict.fromkeys(near) if least <= value <= most and value != held]
    found = [config | change for change in changes]
    if not hopper:
        return [c for c in found if c["block_n"] >= 16 * c["warps"]]
    rows = 32 if kind.startswith("gated ") else 16  # of block_n a warp
    return [
        c for c in found
        if c["block_n"] >= rows * c["warps"] and c["warps"] % 4 == 0
        and registers(c["warps"], c["producer"], c.get("programs", 1)) >= fewest_registers(c["block_m"])
    ]  # fmt: skip


def other_splits(splits: int, k: int) -> list[int]:
    """Of K's steps of 128, when each split has one or two more or fewer: between 8 and 16 lie 10 and 12, but where 112
    steps are to be parted evenly 14."""
    steps = -(-k // 128)
    each = -(-steps // splits)
    return [-(-steps // (each + more)) for more in (-2, -1, 1, 2) if each + more > 0]


def matmul_candidates(kind: str, m: int, n: int, hopper: bool = False) -> list[Any]:
    """Of a product that reads x in 16 bits, by the kind of tuned entry."""
    if kind in ("hopper", "pairs_hopper"):
        return hopper_candidates(kind, m, n)
    if kind == "wide":
        return wide_candidates(m)
    few = few_rows_candidates(kind, m, n) if hopper and m <= MOST_FEW_ROWS.get(kind, 0) else []
    if kind == "planes":
        return planes_candidates(m) + few
    return (pairs_candidates(m) if kind == "pairs" else plain_candidates(m, 2 if kind == "bf16" else 1)) + few


def pairs_candidates(m: int) -> list[Any]:
    """Whole groups of 128 columns a step, 12 to 200 kB on their way; up to 64 rows few warps a program, whose products
    need no group of four."""
    rows = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    tiles = product((rows,), (32, 64, 128), (1, 2, 4), (3, 4, 5), (128, 256), (1, 2, 4, 6, 8))
    if m > 64:
        tiles = product((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4), (128,), (1, 2, 4))
    return [
        SkinnyConfig(bm, bn, s, w, st, bk)
        for bm, bn, w, st, bk, s in tiles
        if bm <= max(m, 8) and bn >= 16 * w and bm * bn // w <= 1 << 12 and (m <= 64 or bm * bn // w >= 1 << 10)
        and (12 if m <= 64 else 32) << 10 <= (bm * 2 + bn) * bk * st <= 200 << 10
    ]  # fmt: skip


def plain_candidates(m: int, element_bytes: int) -> list[Any]:
    bm = 8 if m <= 8 else 16 if m <= 16 else 32 if m <= 32 else 64
    if m > 16:
        shapes = [
            (bn, bk, w, st)
            for bn, bk, w, st in product((64, 128, 256), (64, 128), (4, 8), (3, 4, 5, 6))
            if 40960 <= (bm * 2 + bn * element_bytes) * bk * st <= 212992 and bn // w >= 16
        ]
    elif element_bytes == 2:
        shapes = [
            (bn, bk, w, st)
            for bn, bk, w, st in product((16, 32, 64), (128, 256), (1, 2, 4), (2, 3, 4, 5, 6))
            if 8192 <= bn * bk * st <= 49152 and bn // w >= 16
        ]
    else:
        shapes = [
            (bn, bk, w, st)
            for bn, bk, w, st in product((32, 64, 128), (128, 256), (2, 4), (2, 3, 4))
            if 12288 <= bn * bk * st <= 98304 and bn // w >= 16
        ]
    return [SkinnyConfig(bm, bn, s, w, st, bk) for (bn, bk, w, st), s in product(shapes, (1, 2, 4, 6))]


def a8w8_candidates(m: int) -> list[Any]:
    """At few rows as many programs as fill the GPU, by narrow tiles or splits of K; then ever larger tiles."""
    if m <= 64:
        return [
            WideConfig(bm, bn, s, 4, st, bk)
            for bm, bn, s, st, bk in product((16, 32, 64), (32, 64, 128), (1, 2, 4, 8), (3, 4, 5), (128, 256))
            if bm <= m and bm * bn >= 1024 and (bm + bn) * bk * st <= 160 << 10
        ]
    sizes = (64, 128) if m <= 256 else (64, 128, 256)
    return [
        WideConfig(bm, bn, s, w, st, bk)
        for bm, bn, s, w, st, bk in product(sizes[-2:], sizes, (1, 2), (4, 8), (3, 4), (64, 128))
        if bm * bn <= 1 << 15 and 512 <= bm * bn // w <= 1 << 12 and (s == 1 or m <= 256)
    ]


def a8w4_candidates(m: int) -> list[Any]:
    """Each warp multiplies whole rows of 16 weights, 4096 sums at most; two programs share a multiprocessor, or one of
    8 warps has it."""
    return [
        WideConfig(bm, bn, s, w, st)
        for bm, bn, w, st, s in product((64, 128, 256), (64, 128, 256), (4, 8), (3, 4), (1, 2, 4, 8))
        if bm < 2 * m and bn >= 16 * w and 1 << 10 <= bm * bn // w <= 1 << 12 and (s <= 2 or m <= 256)
    ]


def decode_candidates(batch: int, kv_heads: int) -> list[Any]:
    wanted = [max(1, round(132 * c / (batch * kv_heads))) for c in (2, 3, 4, 6, 8, 12)]
    return [
        DecodeConfig(tile, s, 128, w, st)
        for tile, w, st, s in product((32, 64, 128), (1, 2, 4), (2, 3, 4), sorted(set(wanted)))
        if 16 <= tile // w <= 64
    ]


def prefill_candidates() -> list[Any]:
    return [
        PrefillConfig(bq, tile, w, st)
        for bq, tile, w, st in product((64, 128), (32, 64, 128), (4, 8), (2, 3))
        if bq * tile // w <= 2048
    ]
