"""What a decoder computes in one step: tensors on the device, whoever laid them there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step on the device: T tokens of B sequences, the first `num_decodes` of them with one token each.

    tokens, positions, slots: int64 [T]; a slot is block * block_size + offset in the KV pool.
    block_tables: int32 [B, max_blocks]. lengths: int32 [B], tokens of each sequence once this step is written.
    query_starts: int32 [B - num_decodes + 1], where each prompt chunk begins, counted from the first chunk's begin.
    rows: int64 [S], the tokens whose hidden state is wanted.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    lengths: Tensor
    query_starts: Tensor
    rows: Tensor
    num_decodes: int
