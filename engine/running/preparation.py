"""The host's part of a step: a scheduled batch as arrays, with what the step before leaves to build on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from engine.request import Request
from engine.running.sampler import SamplingPlan
from engine.running.step_arrays import Arrays, BlockTables, feed_rows, prompt_arrays, step_arrays
from engine.scheduling.batch import ScheduledBatch


@dataclass(slots=True)
class PreparedStep:
    """arrays: of `step_arrays`, and "feed" where tokens are pending. sampled: the requests that get a token, in the
    order of the logits' rows. samples: which items of the batch they are; None = all."""

    arrays: Arrays
    num_decodes: int
    sampled: Sequence[Request]
    samples: Sequence[bool] | None
    plan: SamplingPlan


class Preparation:
    """Prepares steps in the order of their launches. What stays the same from step to step is not made again: block
    tables, sampling parameters, and the order of the rows."""

    def __init__(self, block_size: int, vocab_size: int, rows: int) -> None:
        """rows: of sampled tokens on the device; see `engine.running.readback.Readback`."""
        self._block_size, self._vocab_size, self._rows = block_size, vocab_size, rows
        self._tables = BlockTables()
        self._sampled: Sequence[Request] = ()
        self._plan = SamplingPlan({})

    def __call__(self, batch: ScheduledBatch) -> PreparedStep:
        items, decodes = batch.items, batch.decodes
        samples = [True] * len(decodes) + [item.samples for item in batch.prefills] if batch.prefills else None
        if samples is None or all(samples):
            samples, sampled = None, [item[0] for item in items]
        else:
            sampled = [item[0] for item in compress(items, samples)]
        if decodes or len(items) > 1:
            arrays = step_arrays(items, len(decodes), self._block_size, self._tables)
        else:
            arrays = prompt_arrays(items[0], self._block_size)
        feed = feed_rows(decodes, len(arrays["tokens"]), self._sampled, self._rows)
        if feed is not None:
            arrays["feed"] = feed
        lengths = arrays["lengths"] if samples is None else arrays["lengths"][samples]
        self._plan = self._plan.next(sampled, lengths, self._vocab_size)
        self._sampled = sampled
        return PreparedStep(arrays, len(decodes), sampled, samples, self._plan)
