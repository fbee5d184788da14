"""What a run measured, from step events and finished requests only; None means that it was not measured.

Definitions follow vLLM's benchmark: TTFT counts from the scheduled arrival, TPOT is (latency - TTFT) / (tokens - 1) of
one request, ITL pools the gaps between the tokens of all requests. Percentiles are pooled over the run, never averaged.
p50 and p95 are interpolated as there, p99 is not (see `distribution`); from some hundred requests on the two agree.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.request import RequestOutput
from engine.scheduling.batch import StepEvent
from workbench.runs.distribution import Distribution
from workbench.runs.timeseries import Sample, TimeSeries

MOST_LOST = 0.01


@dataclass(frozen=True, kw_only=True)
class SLO:
    """Bounds that a request must meet, in seconds; a run meets them when the p99 of both does, and no more than one
    request in a hundred was lost (failed, refused, overdue at a stop)."""

    ttft: float = 1.0
    tpot: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft), ("tpot", self.tpot)):
            if not 0.0 < value < math.inf:
                raise ConfigError(f"SLO {name} is {value}; it must be greater than 0 s and finite")

    def met_by(self, ttft: float, tpot: float | None) -> bool:
        """One request; an answer of one token has no TPOT and cannot miss it."""
        return ttft <= self.ttft and (tpot or 0.0) <= self.tpot


SLOS: Mapping[str, SLO] = {
    "laptop": SLO(ttft=1.0, tpot=0.1),
    "chat": SLO(ttft=0.2, tpot=0.05),
    "retrieval": SLO(ttft=0.3, tpot=0.1),
    "content": SLO(ttft=0.6, tpot=0.2),
    "code": SLO(ttft=0.5, tpot=0.15),
    "mlperf server": SLO(ttft=2.0, tpot=0.2),
    "mlperf interactive": SLO(ttft=0.45, tpot=0.04),
}
"""chat, retrieval, content, code: GuideLLM's SLO guide (its ITL is our TPOT); mlperf: Llama-2-70B of the MLPerf
inference rules; laptop: ours, comfortable reading speed on the bundled model without a GPU."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Figures of one run, or of its part so far. Times in seconds; shares in 0..1; None = not measured.

    duration: from the start of the load to the last finish or step. output_tokens count all tokens that were produced,
    also of requests aborted later; the latencies are of finished requests only.
    num_failed: without an answer for an error's sake; num_rejected: refused before they began; num_overdue: ended by a
        stop when their first token was late already, so that a stop does not hide a queue.
    goodput: requests per second that met the SLO; good_tokens_per_s: output tokens of those; good_fraction: their share
    of all that ended, the failed, refused and overdue included.
    mean_batch: requests computed per step; occupancy: share of the batch's slots that did useful work (below 1 only
    where a padded batch holds finished members); padding_waste: share of the computed tokens that padding would waste.
    device_s, host_s: device time within steps and the rest of the steps; None where the runner cannot tell them apart.
    blocked_steps: in how many steps each reason kept requests waiting.
    """

    duration: float
    num_finished: int
    num_failed: int
    num_rejected: int
    num_overdue: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    latency: Distribution | None
    prompt_tokens: int
    output_tokens: int
    tokens_per_s: float | None
    requests_per_s: float | None
    goodput: float | None
    good_tokens_per_s: float | None
    good_fraction: float | None
    slo_met: bool | None
    hit_rate: float | None
    num_steps: int
    step_s: float
    device_s: float | None
    host_s: float | None
    busy: float | None
    mean_batch: float | None
    peak_batch: int
    occupancy: float | None
    padding_waste: float | None
    peak_running: int
    peak_waiting: int
    num_preemptions: int
    recomputed_tokens: int
    kv_blocks: int | None
    kv_peak: float | None
    kv_mean: float | None
    blocked_steps: Mapping[str, int]

    @property
    def num_lost(self) -> int:
        """Requests that missed the SLO without a latency to show for it."""
        return self.num_failed + self.num_rejected + self.num_overdue


class MetricsCollector:
    """Adds up events as they come, in constant memory per step; not thread-safe (Run guards it).

    start: the engine clock when the load began. prefix_caching False leaves the hit rate unmeasured.
    """

    def __init__(self, start: float, slo: SLO, *, prefix_caching: bool = True) -> None:
        self.start = start
        self.slo = slo
        self.series = TimeSeries(start)
        self._prefix_caching = prefix_caching
        self._end = start
        self._ttft, self._tpot, self._itl, self._latency = (array("d") for _ in range(4))
        self._good = self._good_tokens = 0
        self._failed = self._rejected = self._overdue = 0
        self._sums: Counter[str] = Counter()
        self._peaks: Counter[str] = Counter()
        self._blocked: Counter[str] = Counter()
        self._step_s = self._device_s = self._kv_area = 0.0
        self._device_known = True

    def on_step(self, event: StepEvent) -> None:
        """Account for one step of the engine."""
        self._end = max(self._end, event.end)
        seconds = event.end - event.start
        self._step_s += seconds
        if event.device_seconds is None:
            self._device_known = False
        else:
            self._device_s += event.device_seconds
        batch = event.num_decodes + event.num_prefills
        used = event.blocks_used / event.blocks_total if event.blocks_total else 0.0
        self._kv_area += used * seconds
        sums = self._sums
        sums["steps"] += 1
        sums["batch"] += batch
        sums["slots"] += event.num_slots
        sums["prompt"] += event.num_prefill_tokens
        sums["computed"] += event.num_decodes + event.num_prefill_tokens
        sums["padding"] += event.padding_tokens
        sums["output"] += event.num_new_tokens
        sums["preempted"] += event.num_preempted
        sums["recomputed"] += event.num_recomputed
        sums["query"] += event.query_tokens
        sums["hit"] += event.hit_tokens
        peaks = self._peaks
        peaks["batch"] = max(peaks["batch"], batch)
        peaks["running"] = max(peaks["running"], event.num_running)
        peaks["waiting"] = max(peaks["waiting"], event.num_waiting)
        peaks["blocks"] = max(peaks["blocks"], event.blocks_used)
        peaks["total"] = max(peaks["total"], event.blocks_total)
        if event.blocked_by is not None:
            self._blocked[event.blocked_by] += 1
        self.series.add(event)

    def on_finish(self, output: RequestOutput) -> None:
        """Account for a request that ended; an aborted or failed one leaves no latency behind."""
        timing = output.timing
        if output.finish_reason == "error":
            self._failed += 1
        elif output.finish_reason == "abort":
            waited = timing.latency if timing.ttft is None else timing.ttft
            self._overdue += waited is not None and waited > self.slo.ttft
        if output.finish_reason in ("abort", "error") or timing.ttft is None or timing.latency is None:
            return
        self._end = max(self._end, timing.finish or self._end)
        self._ttft.append(timing.ttft)
        self._latency.append(timing.latency)
        self._itl.extend(timing.itl)
        if timing.tpot is not None:
            self._tpot.append(timing.tpot)
        if self.slo.met_by(timing.ttft, timing.tpot):
            self._good += 1
            self._good_tokens += len(output.token_ids)

    def on_reject(self) -> None:
        """Account for a request that the engine refused."""
        self._rejected += 1

    @property
    def num_finished(self) -> int:
        return len(self._latency)

    @property
    def num_failed(self) -> int:
        return self._failed

    @property
    def num_rejected(self) -> int:
        return self._rejected

    def copy(self) -> MetricsCollector:
        """A frozen moment, cheap to take: the sums are done later, outside the engine's thread."""
        other = MetricsCollector.__new__(MetricsCollector)
        other.__dict__.update(self.__dict__)
        for name in ("_ttft", "_tpot", "_itl", "_latency"):
            setattr(other, name, getattr(self, name)[:])
        for name in ("_sums", "_peaks", "_blocked"):
            setattr(other, name, getattr(self, name).copy())
        other.series = self.series.copy()
        return other

    def samples(self) -> tuple[Sample, ...]:
        return self.series.samples()

    def metrics(self) -> Metrics:
        """Everything so far, as one immutable record."""
        sums, peaks = self._sums, self._peaks
        duration = self._end - self.start
        steps = sums["steps"]
        ttft, tpot = Distribution.of(self._ttft), Distribution.of(self._tpot)
        finished = self.num_finished
        lost = self._failed + self._rejected + self._overdue
        ended = finished + lost
        device_s = self._device_s if steps and self._device_known else None
        return Metrics(
            duration=duration,
            num_finished=finished,
            num_failed=self._failed,
            num_rejected=self._rejected,
            num_overdue=self._overdue,
            ttft=ttft,
            tpot=tpot,
            itl=Distribution.of(self._itl, independent=False),
            latency=Distribution.of(self._latency),
            prompt_tokens=sums["prompt"],
            output_tokens=sums["output"],
            tokens_per_s=_ratio(sums["output"], duration),
            requests_per_s=_ratio(finished, duration),
            goodput=_ratio(self._good, duration),
            good_tokens_per_s=_ratio(self._good_tokens, duration),
            good_fraction=_ratio(self._good, ended),
            slo_met=self._slo_met(ttft, tpot, lost / ended) if ended else None,
            hit_rate=_ratio(sums["hit"], sums["query"]) if self._prefix_caching else None,
            num_steps=steps,
            step_s=self._step_s,
            device_s=device_s,
            host_s=None if device_s is None else max(0.0, self._step_s - device_s),
            busy=_ratio(self._step_s, duration),
            mean_batch=_ratio(sums["batch"], steps),
            peak_batch=peaks["batch"],
            occupancy=_ratio(sums["batch"], sums["slots"]),
            padding_waste=_ratio(sums["padding"], sums["padding"] + sums["computed"]),
            peak_running=peaks["running"],
            peak_waiting=peaks["waiting"],
            num_preemptions=sums["preempted"],
            recomputed_tokens=sums["recomputed"],
            kv_blocks=peaks["total"] or None,
            kv_peak=_ratio(peaks["blocks"], peaks["total"]),
            kv_mean=_ratio(self._kv_area, self._step_s),
            blocked_steps=dict(self._blocked),
        )

    def _slo_met(self, ttft: Distribution | None, tpot: Distribution | None, lost: float) -> bool:
        if ttft is None or lost > MOST_LOST:
            return False
        return self.slo.met_by(ttft.p99, None if tpot is None else tpot.p99)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
