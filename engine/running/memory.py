"""Where the memory goes: a plan before the run, from the same numbers the allocation uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError

MIN_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """All sizes in bytes. `cache_ratio` is the share of what is free after weights and workspace (LMDeploy >= 0.2.1),

    so a smaller KV format keeps the bytes of the pool and raises `tokens_that_fit`.
    weights: by part ("embeddings", "attention", "mlp", "norms", "lm_head"), scales and zeros counted.
    """

    limit: int
    weights: Mapping[str, int]
    workspace: int
    block_bytes: int
    block_size: int
    num_blocks: int

    @property
    def weights_total(self) -> int:
        return sum(self.weights.values())

    @property
    def kv(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def free(self) -> int:
        return self.limit - self.weights_total - self.workspace - self.kv

    @property
    def tokens_that_fit(self) -> int:
        return self.num_blocks * self.block_size


def megabytes(nbytes: int) -> str:
    """Rounded up, so that what is said to be needed is enough."""
    return f"{-(-nbytes // 100_000) / 10:,.1f} MB"


def plan_memory(
    *,
    limit: int,
    weights: Mapping[str, int],
    workspace: int,
    cache_ratio: float,
    block_bytes: int,
    block_size: int,
) -> MemoryPlan:
    """Split `limit` bytes; raises ConfigError when fewer than MIN_BLOCKS blocks of KV would fit."""
    free = limit - sum(weights.values()) - workspace
    num_blocks = int(max(free, 0) * cache_ratio) // block_bytes
    if num_blocks < MIN_BLOCKS:
        need = sum(weights.values()) + workspace + int(MIN_BLOCKS * block_bytes / cache_ratio) + 1
        raise ConfigError(
            f"memory_limit is {megabytes(limit)}; weights take {megabytes(sum(weights.values()))}, workspace "
            f"{megabytes(workspace)} (by max_batch_size and max_batched_tokens), and cache_ratio {cache_ratio:g} of "
            f"the rest holds {num_blocks} KV blocks: at least {megabytes(need)} are needed"
        )
    return MemoryPlan(
        limit=limit,
        weights=dict(weights),
        workspace=workspace,
        block_bytes=block_bytes,
        block_size=block_size,
        num_blocks=num_blocks,
    )
