"""One step of the torch runner on its way: what was asked for, and how the answer is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from engine.errors import NonFiniteLogitsError
from engine.request import Request, TokenLogprobs
from engine.running.readback import Slot
from engine.running.step_arrays import Arrays
from engine.scheduling.batch import ScheduledRequest, StepResult

T = TypeVar("T")


@dataclass(slots=True)
class TorchStep:
    """See `engine.running.runner.Pending`.

    sampled: the requests that get a token, in the order of the slot's rows. samples: which items they are, None = all.
    """

    slot: Slot
    sampled: Sequence[Request]
    samples: Sequence[bool] | None
    logprobs: Sequence[TokenLogprobs | None]
    prompt_logprobs: Sequence[Sequence[float] | None] | None
    host_seconds: float

    def result(self) -> StepResult:
        seconds = self.slot.wait()
        count = len(self.sampled)
        tokens: Sequence[int | None] = self.slot.tokens(count)
        finite = self.slot.finite(count)
        if not finite.all():
            answered = zip(self.sampled, finite.tolist(), strict=True)
            raise NonFiniteLogitsError([request.request_id for request, yes in answered if not yes])
        logprobs: Sequence[TokenLogprobs | None] | None = self.logprobs or None
        if self.samples is not None:
            tokens = _spread(tokens, self.samples)
            logprobs = _spread(self.logprobs, self.samples) if logprobs else None
        return StepResult(tokens, logprobs, self.prompt_logprobs, seconds, self.host_seconds)


def _spread(values: Sequence[T], where: Sequence[bool]) -> list[T | None]:
    following = iter(values)
    return [next(following) if yes else None for yes in where]


@dataclass(frozen=True, slots=True)
class Scored:
    """An item whose request asks for prompt log-probabilities: its rows from `first_row` on predict `targets`."""

    index: int
    first_row: int
    targets: list[int]


def scored_items(items: Sequence[ScheduledRequest]) -> list[Scored]:
    scored, row = [], 0
    for i, (request, start, num_new) in enumerate(items):
        if request.params.prompt_logprobs and start + 1 < request.num_prompt:
            scored.append(Scored(i, row, request.prompt_token_ids[start + 1 : start + num_new + 1]))
        row += num_new
    return scored


def add_scored(arrays: Arrays, scored: Sequence[Scored]) -> None:
    """Ask for the hidden states that predict known prompt tokens, behind those that are sampled from."""
    wanted = [np.arange(s.first_row, s.first_row + len(s.targets)) for s in scored]
    arrays["rows"] = np.concatenate((arrays["rows"], *wanted))
    arrays["targets"] = np.array([token for s in scored for token in s.targets], np.int64)


def by_item(scored: Sequence[Scored], known: Sequence[float], count: int) -> list[Sequence[float] | None]:
    """Log-probabilities of all targets, cut up by the `count` items of the step."""
    prompts: list[Sequence[float] | None] = [None] * count
    first = 0
    for s in scored:
        prompts[s.index] = known[first : first + len(s.targets)]
        first += len(s.targets)
    return prompts
