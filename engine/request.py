"""A request owns its lengths and its timestamps; everything else about it is a property."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from engine.sampling_params import SamplingParams


class RequestStatus(IntEnum):
    """Ordered: everything from STOPPED on is finished."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    STOPPED = 3
    LENGTH = 4
    ABORTED = 5
    FAILED = 6

    @property
    def is_finished(self) -> bool:
        return self >= RequestStatus.STOPPED


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one output position: of the chosen token, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way to an answer.

    The scheduler knows one rule: `num_computed` (tokens whose keys and values are in the cache, or will be once the
    steps on their way are done) chases `num_tokens` (prompt plus output so far). Prefill, decode, chunked prefill and
    recomputation after preemption are all that rule. `num_pending` of those tokens are sampled on the device by a step
    that is still on its way: they count, the next step may already be built on them, but nobody knows their value.
    `ends`: tokens that end the output. `num_told`: output tokens that are in the outputs made so far.
    Times are seconds on the engine's clock. Latency counts from `scheduled_arrival`, the moment the load generator
    meant to send the request, so that a stalled engine cannot hide its own queue (coordinated omission).
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    scheduled_arrival: float
    arrival: float
    seed: int = 0
    max_tokens: int = 0
    ends: frozenset[int] = frozenset()
    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    num_published: int = 0
    prefix_uid: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    num_recomputed: int = 0
    num_told: int = 0
    token_times: list[float] = field(default_factory=list)
    finish_time: float | None = None
    error: str | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is missing from the cache, and it is one the model produced."""
        return self.num_output + self.num_pending > 0 and self.num_uncomputed == 1

    @property
    def awaits_last(self) -> bool:
        """The token on its way is the last one allowed: there is nothing more to compute."""
        return self.num_pending > 0 and len(self.output_token_ids) + self.num_pending >= self.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    def token_range(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt followed by output, the two lists not joined; pending ones are missing."""
        n = self.num_prompt
        if stop <= n:
            return self.prompt_token_ids[start:stop]
        if start >= n:
            return self.output_token_ids[start - n : stop - n]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - n]

    @property
    def timing(self) -> RequestTiming:
        return RequestTiming(self.scheduled_arrival, self.arrival, tuple(self.token_times), self.finish_time)


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When things happened to one request, in seconds; the measures follow vLLM's definitions, None = not measured.

    ttft: scheduled arrival to first token. tpot: mean gap between output tokens after the first.
    itl: each of those gaps. latency: scheduled arrival to the finish.
    """

    scheduled_arrival: float
    arrival: float
    token_times: tuple[float, ...] = ()
    finish: float | None = None

    @property
    def first_token(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def ttft(self) -> float | None:
        return self.token_times[0] - self.scheduled_arrival if self.token_times else None

    @property
    def tpot(self) -> float | None:
        n = len(self.token_times)
        return (self.token_times[-1] - self.token_times[0]) / (n - 1) if n > 1 else None

    @property
    def itl(self) -> tuple[float, ...]:
        return tuple(b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False))

    @property
    def latency(self) -> float | None:
        return self.finish - self.scheduled_arrival if self.finish is not None else None


class Decodes(Protocol):
    """Text of a growing list of tokens; see `engine.model.detokenizer.Detokenizer`."""

    def update(self, token_ids: Sequence[int]) -> str: ...


@dataclass(slots=True, eq=False)
class RequestOutput:
    """What a caller sees of a request after a step: `new_token_ids`, and a live view of everything so far.

    One is made per request and step, so it holds as little as can be: `text` is decoded when it is read and `timing`
    built when it is asked for. (Frozen, it would take three times as long to make; with lists of its own, the garbage
    collector would run three times as often.)
    """

    finished: bool
    _request: Request
    _detokenizer: Decodes
    _first: int
    _stop: int

    def note(self) -> None:
        """The next output of the request begins behind this one."""
        self._request.num_told = self._stop

    def is_of(self, request: Request | None) -> bool:
        """Whether it tells of this request, not of another one with the same id."""
        return self._request is request

    @property
    def new_token_ids(self) -> list[int]:
        """The tokens since the output before: those of one step."""
        return self._request.output_token_ids[self._first : self._stop]

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self._request.prompt_token_ids

    @property
    def token_ids(self) -> list[int]:
        return self._request.output_token_ids

    @property
    def text(self) -> str:
        """The output as text, without the stop string that ended it. Not escaped: whoever shows it must."""
        return self._detokenizer.update(self._request.output_token_ids)

    @property
    def finish_reason(self) -> str | None:
        """One of "stop", "length", "abort", "error", or None while running."""
        return FINISH_REASONS.get(self._request.status)

    @property
    def error(self) -> str | None:
        """One sentence where finish_reason is "error"."""
        return self._request.error

    @property
    def num_cached(self) -> int:
        """Prompt tokens that a cached prefix spared."""
        return self._request.num_cached

    @property
    def num_preemptions(self) -> int:
        return self._request.num_preemptions

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return self._request.logprobs

    @property
    def prompt_logprobs(self) -> list[float]:
        """Natural-log probability of prompt tokens 1 .. num_prompt-1; empty unless the request asked."""
        return self._request.prompt_logprobs

    @property
    def timing(self) -> RequestTiming:
        return self._request.timing


FINISH_REASONS = {
    RequestStatus.STOPPED: "stop",
    RequestStatus.LENGTH: "length",
    RequestStatus.ABORTED: "abort",
    RequestStatus.FAILED: "error",
}
