"""What the four charts show, as plain numbers: one description, drawn live by `charts` and on paper by `snapshot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workbench import text
from workbench.drawing import BLUE, GREEN, GREY, PURPLE
from workbench.runs.verdict import LIKELY, MET, MISSED, verdict

if TYPE_CHECKING:
    from engine.running.memory import MemoryPlan
    from workbench.runs.distribution import Distribution
    from workbench.runs.run_snapshot import RunSnapshot

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Part:
    """One segment of a memory bar; pattern: plotly's hatch, and mark a character of that look, for a legend in text."""

    key: str
    label: str
    colour: str
    pattern: str
    mark: str


PARTS = (
    Part("weights", "weights", BLUE, "", "■"),
    Part("workspace", "workspace", PURPLE, "x", "▩"),
    Part("kv_used", "KV in use", GREEN, "", "■"),
    Part("kv_empty", "KV free", GREEN, "/", "▨"),
    Part("free", "not reserved", GREY, "", "□"),
)


def _none() -> Array:
    return np.empty(0)


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """label: whose; parts: bytes by `Part.key`; tokens: that fit in the KV pool; note: about the use of KV."""

    label: str
    parts: dict[str, float]
    tokens: int
    note: str = ""

    @property
    def limit(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Trend:
    """Over seconds since the run began: output tokens per second, requests running and waiting (NaN: no step)."""

    seconds: Array = field(default_factory=_none)
    tokens_per_s: Array = field(default_factory=_none)
    running: Array = field(default_factory=_none)
    waiting: Array = field(default_factory=_none)


@dataclass(frozen=True, slots=True)
class Curve:
    """An empirical distribution: at or below `seconds` lie `percent` of the requests."""

    seconds: Array = field(default_factory=_none)
    percent: Array = field(default_factory=_none)


@dataclass(frozen=True, slots=True)
class RunPoint:
    """One run in the throughput-latency chart. state: its `verdict`; text: what a pointer over it shows."""

    number: int
    ttft_p99: float
    tokens_per_s: float
    state: str
    text: str
    is_baseline: bool = False
    is_latest: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """Everything the charts show at one moment; a part that was not measured is empty, never zero."""

    memory: Sequence[MemoryBar] = ()
    trend: Trend = field(default_factory=Trend)
    ttft: Curve = field(default_factory=Curve)
    tpot: Curve = field(default_factory=Curve)
    baseline_ttft: Curve = field(default_factory=Curve)
    baseline_tpot: Curve = field(default_factory=Curve)
    slo_ttft: float | None = None
    slo_tpot: float | None = None
    points: Sequence[RunPoint] = ()


def view_of(
    run: RunSnapshot | None,
    plan: MemoryPlan | None,
    runs: Sequence[RunSnapshot] = (),
    baseline: RunSnapshot | None = None,
) -> View:
    """run: the newest one; plan: for the next run, or for this one while it loads; runs: each gives a point."""
    going_on = run is not None and not run.is_over
    bars = []
    if plan is not None and not going_on:
        bars.append(_bar("next run", plan, None))
    if run is not None and (own := run.memory or (plan if going_on else None)):
        bars.append(_bar("this run", own, run))
    if baseline is not None and baseline.memory and (run is None or baseline.id != run.id):
        bars.append(_bar("baseline", baseline.memory, baseline))
    m, old = (run.metrics if run else None), (baseline.metrics if baseline else None)
    latest = run.id if run else None
    return View(
        memory=bars,
        trend=_trend(run),
        ttft=_curve(m.ttft if m else None),
        tpot=_curve(m.tpot if m else None),
        baseline_ttft=_curve(old.ttft if old else None),
        baseline_tpot=_curve(old.tpot if old else None),
        slo_ttft=run.slo.ttft if run else None,
        slo_tpot=run.slo.tpot if run else None,
        points=[
            point
            for over in runs
            if (point := _point(over, over.id == latest, baseline is not None and over.id == baseline.id))
        ],
    )


def corner(number: int) -> tuple[int, int]:
    """Where the number of a run stands beside its point, -1 or 1 down and to the right: the runs before and after it,
    which are often nearly the same, have theirs elsewhere."""
    return ((1, 1), (-1, 1), (1, -1), (-1, -1))[number % 4]


def byte_unit(most: float) -> tuple[float, str]:
    """Divisor and name of the decimal unit in which `most` bytes read well."""
    return (1e9, "GB") if most >= 1e9 else (1e6, "MB")


def _bar(label: str, plan: MemoryPlan, run: RunSnapshot | None) -> MemoryBar:
    share, note = None, ""
    if run is not None and run.is_over and run.metrics:
        share, note = run.metrics.kv_peak, " at its peak"
    elif run is not None:
        share = next((sample.kv_used for sample in reversed(run.samples) if sample.kv_used is not None), None)
    used = (share or 0.0) * plan.kv
    parts = {
        "weights": plan.weights_total,
        "workspace": plan.workspace,
        "kv_used": used,
        "kv_empty": plan.kv - used,
        "free": plan.free,
    }
    return MemoryBar(label, parts, plan.tokens_that_fit, note)


def _trend(run: RunSnapshot | None) -> Trend:
    samples = run.samples if run else ()

    def column(name: str) -> Array:
        return np.array([getattr(sample, name) for sample in samples], dtype=np.float64)

    return Trend(column("t"), column("tokens_per_s"), column("running"), column("waiting"))


def _curve(d: Distribution | None) -> Curve:
    return Curve(np.array(d.values), 100.0 * np.array(d.fractions)) if d else Curve()


def _point(run: RunSnapshot, is_latest: bool, is_baseline: bool) -> RunPoint | None:
    m = run.metrics
    if m is None or m.ttft is None or m.tokens_per_s is None:
        return None
    state = verdict(m, run.slo)
    words = {MET: "SLO met", LIKELY: "SLO met, too few requests to be sure", MISSED: "SLO missed"}[state]
    ended = f", {run.status}" if run.status in ("stopped", "failed") else ""
    lines = [f"run {run.id}{ended}: {run.label}", f"{run.workload.name}, {run.workload.arrivals_text}",
             f"{text.number(m.tokens_per_s)} tokens/s, TTFT p99 {text.seconds(m.ttft.p99)}", words]  # fmt: skip
    hover = "<br>".join(escape(line) for line in lines)
    return RunPoint(run.id, m.ttft.p99, m.tokens_per_s, state, hover, is_baseline, is_latest)
