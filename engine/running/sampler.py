"""Choosing the next token for a whole batch on the device.

Each request and position has one uniform number, computed on the host from (request.seed, position) by a counter-based
generator, and the device inverts the distribution at it. So the choice does not depend on what a request was batched
with, nor on how often it was preempted; only its logits can.

Tokens that are exactly as likely as the last one kept by top-k or top-p are kept as well: an arbitrary choice between
equals would differ between devices and batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from engine.request import Request, TokenLogprobs
from engine.running.step_arrays import Arrays
from kernels import highest

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SORTED_ELEMENTS = 1 << 21
"""Logits sorted at once, 16 MB of them: what a sort takes besides then stays small whatever the batch."""
SORT_BYTES = 56
"""Per logit, beside the logits themselves: sorted values and indices, 8 bytes each, and in torch's sort of several rows
on CUDA (SortStable.cu) pairs of row and index, before and after, sorted keys, and as much again as keys and pairs for
cub's radix sort."""


def uniforms(seeds: Sequence[int], positions: ArrayLike) -> NDArray[np.float64]:
    """One number in [0, 1) per (seed, position): SplitMix64 (Steele, Lea, Flood 2014) of seed, then position."""
    return _at(_streams(seeds), positions)


def _streams(seeds: Sequence[int]) -> NDArray[np.uint64]:
    return _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64) + _GOLDEN)


def _at(streams: NDArray[np.uint64], positions: ArrayLike) -> NDArray[np.float64]:
    mixed = _mix(streams + np.asarray(positions, np.uint64) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What the host knows of one step's sampling. `arrays` travel with the step's inputs; greedy batches have none.

    drawn: rows that are not greedy, with their temperature, top_k (vocab where off), top_p, min_p and uniform number.
    penalized: rows with a repetition penalty; seen_rows, seen_ids: their tokens so far.
    logprobs: whether a request asks for log-probabilities. requests, streams: whose plan this is, and what their
    uniform numbers are drawn from.
    """

    arrays: Arrays
    max_top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    requests: Sequence[Request] = ()
    streams: NDArray[np.uint64] | None = None
    logprobs: bool = False

    def next(self, requests: Sequence[Request], positions: NDArray[Any], vocab_size: int) -> SamplingPlan:
        """The plan of the step after this one's, as `of`; where the requests are the same, only what changes is made.

        positions: the length of each request's sequence, the token that is to be sampled not counted.
        """
        if requests != self.requests or "penalized" in self.arrays:
            return SamplingPlan.of(requests, vocab_size)
        if self.streams is None:
            return self
        uniform = _at(self.streams, positions[self.arrays["drawn"]])
        return replace(self, arrays={**self.arrays, "uniform": uniform})

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int) -> SamplingPlan:
        """`requests` sample one token each, in the order of the logits' rows."""
        arrays: Arrays = {}
        streams = None
        drawn = [i for i, request in enumerate(requests) if request.params.temperature != 0.0]
        params = [requests[i].params for i in drawn]
        if drawn:
            arrays["drawn"] = np.array(drawn)
            arrays["temperature"] = np.array([p.temperature for p in params])
            arrays["top_k"] = np.array([min(p.top_k or vocab_size, vocab_size) for p in params])
            arrays["top_p"] = np.array([p.top_p for p in params])
            arrays["min_p"] = np.array([p.min_p for p in params])
            chosen = [requests[i] for i in drawn]
            streams = _streams([r.seed for r in chosen])
            arrays["uniform"] = _at(streams, [r.num_tokens for r in chosen])
        penalized = [i for i, request in enumerate(requests) if request.params.repetition_penalty != 1.0]
        if penalized:
            seen = [np.unique(requests[i].token_range(0, requests[i].num_tokens)) for i in penalized]
            arrays["penalized"] = np.array(penalized)
            arrays["penalty"] = np.array([requests[i].params.repetition_penalty for i in penalized], np.float32)
            arrays["seen_rows"] = np.arange(len(penalized)).repeat([len(ids) for ids in seen])
            arrays["seen_ids"] = np.concatenate(seen)
        ks = [p.top_k for p in params if 0 < p.top_k < vocab_size]
        top_p, min_p = any(p.top_p < 1.0 for p in params), any(p.min_p > 0.0 for p in params)
        logprobs = any(request.params.logprobs is not None for request in requests)
        return cls(arrays, max(ks, default=0), top_p, min_p, list(requests), streams, logprobs)


def sample(
    logits: Tensor, plan: SamplingPlan, staged: Mapping[str, Tensor], *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """logits [S, vocab], bf16 or float32 -> tokens int64 [S] and the largest logit of each row [S] in their dtype.

    staged: `plan.arrays` on the logits' device. impl: as in `kernels`, of what finds the largest. Where the largest
    logit is not finite (a row with NaN has NaN), the token means nothing, but is one of the vocabulary.
    """
    largest, tokens = highest(logits, impl=impl)
    if "penalized" in staged:
        rows, logits = staged["penalized"], logits.float()
        logits = logits.index_copy(0, rows, _penalize(logits[rows], staged))
        tokens = logits.argmax(-1)
    if "drawn" in staged:
        tokens = tokens.index_copy(0, staged["drawn"], _draw(logits[staged["drawn"]].float(), plan, staged))
    return tokens, largest


def _penalize(logits: Tensor, staged: Mapping[str, Tensor]) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens; seen ids are unique per row."""
    where = (staged["seen_rows"], staged["seen_ids"])
    held, penalty = logits[where], staged["penalty"][staged["seen_rows"]]
    return logits.index_put(where, torch.where(held > 0, held / penalty, held * penalty))


def _draw(logits: Tensor, plan: SamplingPlan, staged: Mapping[str, Tensor]) -> Tensor:
    """float32 [R, vocab] -> int64 [R], by inverting the cumulative distribution in vocabulary order."""
    logits = (logits - logits.amax(-1, keepdim=True)).double() / staged["temperature"][:, None]
    cumulative = filter_logits(logits, plan, staged).softmax(-1).cumsum(-1)
    target = staged["uniform"] * cumulative[:, -1]
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def filter_logits(logits: Tensor, plan: SamplingPlan, staged: Mapping[str, Tensor]) -> Tensor:
    """Set what top-k, then top-p, then min-p drop to -inf; logits [R, vocab], already divided by the temperature."""
    dropped = float("-inf")
    if plan.max_top_k:
        limited = staged["top_k"] <= plan.max_top_k
        floor = _by_parts(partial(_kth_largest, most=plan.max_top_k), logits, staged["top_k"].clamp(max=plan.max_top_k))
        logits = logits.masked_fill((logits < floor) & limited[:, None], dropped)
    if plan.top_p:
        floor = _by_parts(_nucleus_floor, logits, staged["top_p"])
        logits = logits.masked_fill((logits < floor) & (staged["top_p"] < 1.0)[:, None], dropped)
    if plan.min_p:
        floor = logits.amax(-1, keepdim=True) + staged["min_p"].log()[:, None]
        logits = logits.masked_fill(logits < floor, dropped)
    return logits


def _by_parts(find: Callable[[Tensor, Tensor], Tensor], logits: Tensor, bounds: Tensor) -> Tensor:
    """`find` of all rows, `SORTED_ELEMENTS` logits at a time: a sort takes seven times the memory of what is sorted."""
    rows = _sorted_rows(logits.shape[1])
    return torch.cat([find(*part) for part in zip(logits.split(rows), bounds.split(rows), strict=True)])


def _sorted_rows(vocab_size: int) -> int:
    return max(1, SORTED_ELEMENTS // vocab_size)


def sampling_bytes(rows: int, vocab_size: int, itemsize: int) -> int:
    """Most bytes that logits of `itemsize` bytes and `sample` take for so many rows, what sorts take left out: the
    logits, float32 of them where a penalty changes some, three times float64 where tokens are drawn, and a mask."""
    return rows * vocab_size * (itemsize + 4 + 3 * 8 + 1)


def sorting_bytes(rows: int, vocab_size: int) -> int:
    """Most bytes that `sample` takes besides while it sorts, for so many rows on a GPU."""
    return SORT_BYTES * vocab_size * min(rows, _sorted_rows(vocab_size))


def _kth_largest(logits: Tensor, k: Tensor, most: int) -> Tensor:
    """[R, 1]: of each row of logits [R, vocab] the k-th largest, k int64 [R] up to `most`."""
    return logits.topk(most).values.gather(1, k[:, None] - 1)


def _nucleus_floor(logits: Tensor, top_p: Tensor) -> Tensor:
    """[R, 1]: the smallest logit of those whose probability together reaches top_p [R]."""
    ranked = logits.sort(descending=True).values
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return ranked.gather(1, (before < top_p[:, None]).sum(-1, keepdim=True) - 1)


def token_logprobs(logits: Tensor, tokens: Tensor, requests: Sequence[Request]) -> list[TokenLogprobs | None]:
    """Chosen and most likely tokens under the model's own distribution (before temperature and filters), in float32.

    One entry per request, None for those that did not ask; [] when nobody did.
    """
    asked = [i for i, request in enumerate(requests) if request.params.logprobs is not None]
    if not asked:
        return []
    answers: list[TokenLogprobs | None] = [None] * len(requests)
    counts = [requests[i].params.logprobs or 0 for i in asked]
    rows = torch.tensor(asked, device=logits.device)
    distribution = logits[rows].float().log_softmax(-1)
    chosen = tokens[rows]
    values = distribution.gather(1, chosen[:, None])[:, 0].tolist()
    top = distribution.topk(min(max(counts), logits.shape[1]))
    best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    for i, count, token, value, (ids, logprobs) in zip(asked, counts, chosen.tolist(), values, best, strict=True):
        answers[i] = TokenLogprobs(token, value, tuple(zip(ids[:count], logprobs[:count], strict=True)))
    return answers


def known_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 [S]: log-probability of `targets` int64 [S] under logits [S, vocab]."""
    wide = logits.float()
    return wide.gather(1, targets[:, None])[:, 0] - wide.logsumexp(-1)
