"""Which tile sizes run at which shape: data per GPU, and a sane default for any other. Found by `python -m kernels.tune`."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SkinnyConfig:
    """Tiles of a small-M matmul. block_k is read by the plain kernel only (planes step by one group)."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int
    block_k: int = 128


def default_splits(n: int, k: int, block_n: int, step: int, programs: int = 528) -> int:
    """Splits of K that give about `programs` programs (four per multiprocessor of an H200), each at least four steps long."""
    tiles = -(-n // block_n)
    return max(1, min(round(programs / tiles), k // (4 * step)))


def planes_config(m: int, n: int, k: int, group_size: int) -> SkinnyConfig:
    """A16W4: the configuration for x [m, k] and a planes weight [n, k]."""
    if m <= 16:
        return SkinnyConfig(8 if m <= 8 else 16, 64, default_splits(n, k, 64, group_size), 1 if m <= 8 else 2, 4)
    return SkinnyConfig(32 if m <= 32 else 64, 64, default_splits(n, k, 64, group_size, 264), 4, 3)


def plain_config(m: int, n: int, k: int, element_bytes: int) -> SkinnyConfig:
    """bf16 and A16W8: the configuration for x [m, k] and a plain weight [n, k]."""
    block_n, block_k = (32, 128) if element_bytes == 2 else (32, 256)
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    return SkinnyConfig(block_m, block_n, default_splits(n, k, block_n, block_k), 4, 4 if element_bytes == 2 else 3, block_k)


@dataclass(frozen=True)
class DecodeConfig:
    """Decode attention: tokens per tile, splits of the context, the fewest tokens a split is worth, and a limit on registers."""

    tile: int
    splits: int
    min_split: int
    warps: int
    stages: int
    registers: int | None = None


def decode_config(format: str, batch: int, kv_heads: int, max_tokens: int, multiprocessors: int = 132) -> DecodeConfig:
    """The configuration for a batch whose block tables hold max_tokens; lengths are not known on the host."""
    tile = 64
    min_split = 128
    wanted = -(-multiprocessors * 4 // (batch * kv_heads))
    splits = max(1, min(wanted, -(-max_tokens // min_split), 128))
    return DecodeConfig(tile, splits, min_split, 2 if format != "bf16" else 4, 3)


@dataclass(frozen=True)
class PrefillConfig:
    """Prefill attention: queries and tokens per tile."""

    block_q: int
    tile: int
    warps: int
    stages: int


def prefill_config(format: str, head_dim: int) -> PrefillConfig:
    """The configuration for a cache format and head size."""
    return PrefillConfig(64, 64, 4, 3)
