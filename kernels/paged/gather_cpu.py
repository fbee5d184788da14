"""A batch's blocks of the CPU's KV cache as matrices: which to gather, the gathering, and what in them is nobody's.

In the CPU's memory order (heads outermost, see `kv_cache`) gathering a batch's blocks is one index_select, and what it
gives is already the batch of matrices [heads * batch, tokens, D] that bmm wants: no transpose, no loop over sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_cache import KVLayer


@dataclass(frozen=True)
class Tails:
    """Which tokens of gathered blocks, int64 [n] counted through all rows, are not a row's own: the rest of its last
    block, and the repetitions of its first block where that one is not full. Repetitions of a full block stay: they are
    a row's own numbers, which a weight of zero takes out."""

    tokens: Tensor

    def clear(self, x: Tensor) -> None:
        """Zero them in x [Hkv, B, tokens, D], in place: somebody else's NaN would survive a weight of zero."""
        x.view(x.shape[0], -1, x.shape[-1]).index_fill_(1, self.tokens, 0)


def gathered_blocks(
    block_tables: Tensor, lengths: Tensor, counts: list[int], layer: KVLayer
) -> tuple[Tensor, Tensor, int]:
    """The blocks to gather, how many each row holds [B], and n, the longest's count, to which the others are padded.

    The blocks are int64 [Hkv * B * n], head after head, numbered through all heads' blocks in the CPU's memory order;
    a shorter row repeats its first. ValueError for tables that do not reach so far.
    """
    n = -(-max(counts) // layer.block_size)
    if n > (width := block_tables.shape[1]):
        raise ValueError(f"attention: {max(counts)} tokens take {n} blocks of {layer.block_size}, tables hold {width}")
    held = (lengths + (layer.block_size - 1)) // layer.block_size
    table = block_tables[:, :n]
    if min(counts) <= (n - 1) * layer.block_size:
        table = torch.where(torch.arange(n) < held[:, None], table, block_tables[:, :1])
    heads = torch.arange(0, layer.kv_heads * layer.num_blocks, layer.num_blocks)
    return (table.reshape(-1) + heads[:, None]).view(-1), held, n


def gather(
    words: Tensor, table: Tensor, batch: int, space: dict[str, Tensor] | None = None, side: str = ""
) -> Tensor:
    """words [blocks, block_size, Hkv, ...] of the blocks in `table` -> [Hkv, B, tokens, ...], contiguous in the CPU's
    memory order; in `space` under the name `side` if given."""
    by_head = words.movedim(2, 0)
    rows = by_head.flatten(0, 1).flatten(1)
    held = None if space is None else space.get(side)
    if held is not None and held.shape[1] == rows.shape[1]:  # the same format as the layer before
        torch.index_select(rows, 0, table, out=held)
    else:
        held = rows.index_select(0, table)
        if space is not None:
            space[side] = held
    return held.view(by_head.shape[0], batch, -1, *by_head.shape[3:])


def find_tails(held: Tensor, lengths: Tensor, block_size: int, width: int) -> Tails:
    """Of rows that hold `held` blocks each, gathered `width` at a time."""
    token = torch.arange(width * block_size)
    own = torch.where(lengths < block_size, width, held) * block_size  # what is gathered beyond may stay
    return Tails(((token >= lengths[:, None]) & (token < own[:, None])).view(-1).nonzero().view(-1))
