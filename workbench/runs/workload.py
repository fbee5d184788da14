"""What is asked of the engine: how many requests, when they arrive, and what their prompts share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from engine.errors import ConfigError
from engine.sampling_params import SamplingParams

MAX_REQUESTS = 1_000_000
MAX_LENGTH = 1 << 20


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low:,} to {high:,}")


def _range(name: str, value: tuple[int, int]) -> None:
    pair = value if isinstance(value, tuple) and len(value) == 2 else None
    if pair is None or not all(isinstance(v, int) for v in pair) or not 1 <= pair[0] <= pair[1] <= MAX_LENGTH:
        raise ConfigError(f"{name} is {value!r}; it must be (low, high) with 1 <= low <= high <= {MAX_LENGTH:,} tokens")


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request of a workload. arrival: seconds after the start; None in a closed loop (sent when another ends)."""

    arrival: float | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A load that its seed determines wholly. All lengths are tokens.

    Give exactly one of rate and concurrency.
    rate: requests per second, > 0; math.inf sends all at once. The gaps are gamma distributed with shape `burstiness`
        (1 is Poisson, larger is steadier) and scaled so that the last request arrives at exactly num_requests / rate,
        as vLLM's benchmark does: fewer seeds are needed for the same certainty.
    concurrency: closed loop; this many requests are in flight until none is left.
    input_len, output_len: uniform in [low, high], the part of the prompt that is each request's own, and the answer.
    shared_len: tokens at the start of every prompt (a system prompt, an instruction).
    groups, group_len: after those, `group_len` tokens that every groups-th request shares (a conversation so far, a
        document); groups 0 leaves this part out.
    prompts: own texts, used in turn instead of everything above about prompts; answers then end where the model does.
    """

    name: str = "custom"
    num_requests: int = 64
    rate: float | None = None
    concurrency: int | None = None
    burstiness: float = 1.0
    input_len: tuple[int, int] = (16, 128)
    output_len: tuple[int, int] = (16, 128)
    shared_len: int = 0
    groups: int = 0
    group_len: int = 0
    prompts: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("num_requests", self.num_requests, 1, MAX_REQUESTS)
        _whole("seed", self.seed, 0, 1 << 63)
        if (self.rate is None) == (self.concurrency is None):
            raise ConfigError(
                f"rate is {self.rate} and concurrency is {self.concurrency}; give exactly one of them: "
                "rate in requests per second (inf sends all at once), or concurrency in requests in flight"
            )
        if self.rate is not None and not self.rate > 0:  # also refuses NaN
            raise ConfigError(f"rate is {self.rate}; it must be greater than 0 requests per second")
        if self.concurrency is not None:
            _whole("concurrency", self.concurrency, 1, MAX_REQUESTS)
        if not 0 < self.burstiness < math.inf:
            raise ConfigError(f"burstiness is {self.burstiness}; it must be greater than 0 and finite")
        _range("input_len", self.input_len)
        _range("output_len", self.output_len)
        _whole("shared_len", self.shared_len, 0, MAX_LENGTH)
        _whole("groups", self.groups, 0, MAX_REQUESTS)
        _whole("group_len", self.group_len, 0, MAX_LENGTH)
        if isinstance(self.prompts, str):
            raise ConfigError("prompts is one text; give a list of texts")
        object.__setattr__(self, "prompts", tuple(self.prompts))  # a list is accepted, and frozen here
        if any(not isinstance(text, str) or not text for text in self.prompts):
            raise ConfigError("prompts holds an empty text or something that is not a text")
        SamplingParams(temperature=self.temperature)  # one place knows the range of a temperature

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Workload:
        """A named workload with some values changed; giving rate puts concurrency away, and the other way round."""
        if name not in PRESETS:
            raise ConfigError(f"workload is {name!r}; it must be one of {', '.join(PRESETS)}")
        if changes.get("rate") is not None:
            changes.setdefault("concurrency", None)
        elif changes.get("concurrency") is not None:
            changes.setdefault("rate", None)
        return replace(PRESETS[name], **changes)

    @property
    def prefix_len(self) -> int:
        """Prompt tokens shared with other requests."""
        return self.shared_len + (self.group_len if self.groups else 0)

    @property
    def max_total(self) -> int:
        """Longest prompt plus answer; own prompts are not counted, only their answers."""
        own = 0 if self.prompts else self.prefix_len + self.input_len[1]
        return own + self.output_len[1]

    @property
    def arrivals_text(self) -> str:
        """The arrival process in a few words."""
        if self.concurrency is not None:
            return f"{self.concurrency} in flight"
        return "all at once" if self.rate == math.inf else f"{self.rate:g} requests/s"

    def arrivals(self) -> list[float | None]:
        """Seconds after the start, ascending; None for each request of a closed loop."""
        if self.rate is None:
            return [None] * self.num_requests
        if self.rate == math.inf:
            return [0.0] * self.num_requests
        random = Random(f"{self.seed}/arrivals")
        moments, moment = [], 0.0
        for _ in range(self.num_requests):
            moment += random.gammavariate(self.burstiness, 1.0)
            moments.append(moment)
        end = self.num_requests / self.rate
        return [end * moment / moments[-1] if moments[-1] else end for moment in moments]

    def requests(
        self,
        *,
        vocab_size: int,
        session_len: int,
        encode: Callable[[str], Sequence[int]] | None = None,
        text: str | None = None,
        avoid: Collection[int] = (),
    ) -> list[WorkItem]:
        """The whole load, the same for the same seed and tokenizer.

        text: prompts are cut from it (it needs `encode`); without it they are random token ids below `vocab_size`
        other than those in `avoid`. Raises ConfigError when a request could exceed `session_len`.
        """
        random = Random(f"{self.seed}/requests")
        if self.prompts:
            if encode is None:
                raise ConfigError("prompts are texts, and no tokenizer was given to encode them")
            encoded = [tuple(encode(prompt)) for prompt in self.prompts]
            prompts = [encoded[i % len(encoded)] for i in range(self.num_requests)]
        else:
            source = _TokenSource(random, vocab_size, avoid, encode(text) if encode and text else None)
            prompts = self._synthetic_prompts(random, source)
        outputs = [random.randint(*self.output_len) for _ in prompts]
        longest = max(len(prompt) + output for prompt, output in zip(prompts, outputs, strict=True))
        if longest > session_len:
            raise ConfigError(
                f"the longest request of workload {self.name!r} is {longest:,} tokens; prompt and answer together must "
                f"be at most session_len ({session_len:,})"
            )
        return [
            WorkItem(
                arrival,
                prompt,
                SamplingParams(
                    max_tokens=output, temperature=self.temperature, seed=self.seed + i, ignore_eos=not self.prompts
                ),
            )
            for i, (arrival, prompt, output) in enumerate(zip(self.arrivals(), prompts, outputs, strict=True))
        ]

    def _synthetic_prompts(self, random: Random, source: _TokenSource) -> list[tuple[int, ...]]:
        shared = source.take(self.shared_len)
        groups = [source.take(self.group_len) for _ in range(self.groups)] or [()]
        return [
            shared + groups[i % len(groups)] + source.take(random.randint(*self.input_len))
            for i in range(self.num_requests)
        ]


class _TokenSource:
    """Runs of token ids: cut from a text at random places, or drawn at random."""

    def __init__(self, random: Random, vocab_size: int, avoid: Collection[int], text_ids: Sequence[int] | None) -> None:
        self._random = random
        self._text_ids = text_ids
        self._permitted = [] if text_ids else sorted(set(range(vocab_size)) - set(avoid))

    def take(self, length: int) -> tuple[int, ...]:
        if self._text_ids is None:
            return tuple(self._random.choices(self._permitted, k=length))
        start = self._random.randrange(max(1, len(self._text_ids) - length))
        run = tuple(self._text_ids[start : start + length])
        repeats = -(-length // max(1, len(run)))  # a text shorter than the run is repeated
        return (run * repeats)[:length]


PRESETS = {
    "dialogue service": Workload(
        name="dialogue service",
        rate=8.0,
        num_requests=64,
        shared_len=64,
        groups=16,
        group_len=64,
        input_len=(16, 64),
        output_len=(16, 96),
    ),
    "batch processing": Workload(
        name="batch processing",
        rate=math.inf,
        num_requests=64,
        shared_len=32,
        groups=4,
        group_len=128,
        input_len=(8, 32),
        output_len=(64, 128),
    ),
}
"""Dialogue: one system prompt, 16 conversations with what was said so far, each turn its own question, Poisson
arrivals. Batch: one instruction, four documents asked about many times, everything sent at once, longer answers. Both
stay within 384 tokens a request."""
