"""Candidates side by side: interleaved, repeated, medians with their range, ratios within rounds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from engine.bench.work import Work
from engine.engine import Engine
from engine.errors import ConfigError
from engine.request import RequestOutput
from engine.scheduling.batch import StepEvent


@dataclass
class Measured:
    """One candidate's repeats. Seconds; `tpot` is the mean over requests of each repeat."""

    name: str
    seconds: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    output_tokens: int = 0

    @property
    def tokens_per_second(self) -> list[float]:
        return [self.output_tokens / seconds for seconds in self.seconds]

    def line(self) -> str:
        rate = self.tokens_per_second
        parts = [f"{self.name:<42} {statistics.median(rate):10,.1f} tokens/s ({min(rate):,.1f} .. {max(rate):,.1f})"]
        if self.tpot:
            parts.append(f"TPOT {statistics.median(self.tpot) * 1e3:.2f} ms")
        if self.ttft:
            parts.append(f"TTFT {statistics.median(self.ttft) * 1e3:.1f} ms")
        return "   ".join(parts)


Candidate = Callable[[Work], tuple[float, list[RequestOutput] | None]]


def serve(engine: Engine, work: Work) -> tuple[float, list[RequestOutput]]:
    """Seconds that the whole work took, and what came out. ConfigError where a session holds too little for it,
    RuntimeError where a request was answered with fewer tokens: no rate may count those that were not made."""
    longest = max(len(prompt) + count for prompt, count in zip(work.prompts, work.num_outputs, strict=True))
    if longest > engine.session_len:
        raise ConfigError(
            f"the longest request of this work takes {longest:,} tokens, and a session of {engine.config.model} holds "
            f"{engine.session_len:,} (positions: {engine.spec.max_positions:,}, tokens that fit: "
            f"{engine.memory.tokens_that_fit:,})"
        )
    start = time.perf_counter()
    outputs = engine.generate(work.prompts, work.params)
    seconds = time.perf_counter() - start
    for output, count in zip(outputs, work.num_outputs, strict=True):
        if len(output.token_ids) != count:
            why = output.error or f"it ended as {output.finish_reason}"
            raise RuntimeError(f"{output.request_id} made {len(output.token_ids)} tokens of {count}: {why}")
    return seconds, outputs


def engine_candidate(engine: Engine) -> Candidate:
    def run(work: Work) -> tuple[float, list[RequestOutput] | None]:
        engine.reset_prefix_cache()
        return serve(engine, work)

    return run


def measure(candidates: dict[str, Candidate], work: Work, repeats: int) -> list[Measured]:
    """Interleaved: every candidate once per round, in turn, after one warm-up round that is not counted."""
    results = {name: Measured(name, output_tokens=work.output_tokens) for name in candidates}
    with tqdm(total=(repeats + 1) * len(candidates), desc="runs", unit="run", file=sys.stderr) as bar:
        for number in range(repeats + 1):
            for name, run in candidates.items():
                seconds, outputs = run(work)
                bar.update()
                if number:
                    _record(results[name], seconds, outputs)
    return list(results.values())


def _record(result: Measured, seconds: float, outputs: list[RequestOutput] | None) -> None:
    result.seconds.append(seconds)
    timings = [output.timing for output in outputs or ()]
    for into, values in (
        (result.ttft, [timing.ttft for timing in timings if timing.ttft is not None]),
        (result.tpot, [timing.tpot for timing in timings if timing.tpot is not None]),
    ):
        if values:
            into.append(statistics.fmean(values))


def paired_ratio(first: Sequence[float], other: Sequence[float]) -> float:
    """How many times as fast `other` is: the median of first / other over rounds."""
    return statistics.median(a / b for a, b in zip(first, other, strict=True))


def print_suite(suite: str, results: list[Measured]) -> None:
    """Ratios say how many times as fast as the first candidate; decode is the ratio of TPOT.

    Each is the median over rounds of the ratio within a round, so that a machine that slows down meets both alike.
    """
    print(f"{suite}:")
    first = results[0]
    for result in results:
        ratios = [f"{paired_ratio(first.seconds, result.seconds):.2f}x the first"]
        if result.tpot and first.tpot:
            ratios.append(f"decode {paired_ratio(first.tpot, result.tpot):.2f}x")
        print(f"  {result.line()}   {', '.join(ratios)}")


class StepTimes:
    """An observer: where the time of steps goes. Decode steps alone, and all of them together."""

    def __init__(self) -> None:
        self.events: list[StepEvent] = []

    def __call__(self, event: StepEvent) -> None:
        self.events.append(event)

    def decode(self) -> dict[str, Any]:
        """Medians over steps that only decode, in milliseconds; None where it cannot be told."""
        steps = [event for event in self.events if event.num_decodes and not event.num_prefills]
        return {
            "steps": len(steps),
            "step_ms": _median([event.end - event.start for event in steps]),
            "device_ms": _median([event.device_seconds for event in steps if event.device_seconds is not None]),
            "host_ms": _median([event.host_seconds for event in steps]),
            "overlapped": sum(event.overlapped for event in steps),
        }

    def total(self) -> dict[str, Any]:
        """Sums over all steps, in seconds."""
        device = [event.device_seconds for event in self.events if event.device_seconds is not None]
        return {
            "steps": len(self.events),
            "mixed_steps": sum(bool(event.num_decodes and event.num_prefills) for event in self.events),
            "device_s": sum(device) if device else None,
            "host_s": sum(event.host_seconds for event in self.events),
            "preempted": sum(event.num_preempted for event in self.events),
            "hit_tokens": sum(event.hit_tokens for event in self.events),
        }


def _median(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) * 1e3 if seconds else None
