"""Plain sentences: what limited a run, and what changed against another. Every number comes from the measurements."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from engine.config import EngineConfig
from engine.model.kv_plan import KVPlan
from workbench import text
from workbench.runs.metrics import Metrics
from workbench.runs.run_snapshot import RunSnapshot
from workbench.runs.workload import Workload

RARELY = 0.05
IDLE = 0.5


def limiting_sentence(metrics: Metrics, config: EngineConfig, workload: Workload) -> str:
    """What kept the run from being faster.

    The reason that kept requests waiting in the most steps wins, if it did so in more than RARELY of them; a KV pool
    that preempted goes before the others, for it also makes work. With nobody kept waiting it is the load, or the
    engine's speed; whether memory or arithmetic bounds that is not measured, so no sentence says it.
    """
    if not metrics.num_steps:
        return "No step was computed."
    shares = {reason: steps / metrics.num_steps for reason, steps in metrics.blocked_steps.items()}
    often = [reason for reason, share in shares.items() if share > RARELY and reason in _REASONS]
    if metrics.num_preemptions and ("blocks" in often or not often):
        reason = "blocks"
    elif often:
        reason = max(often, key=shares.__getitem__)
    else:
        return _unblocked(metrics, workload)
    return _REASONS[reason](metrics, config, text.percent(shares.get(reason, 0.0)))


def _blocks(metrics: Metrics, config: EngineConfig, share: str) -> str:
    advice = []
    smaller = {"bf16": "int8", "int8": "int4", "fp8": "int4", "k8v4": "int4"}.get(KVPlan.of(config.kv).default)
    if smaller is not None:
        advice.append(f"KV {smaller}")
    if config.cache_ratio < 0.9:
        advice.append("a higher cache ratio")
    remedy = f"; more tokens fit with {' or '.join(advice)}" if advice else "; more tokens fit only in more memory"
    return (
        f"KV pool full in {share} of the steps: {text.count(metrics.num_preemptions, 'preemption')}, "
        f"{text.count(metrics.recomputed_tokens, 'token')} recomputed, up to {metrics.peak_waiting:,} waiting{remedy}."
    )


def _batch_size(metrics: Metrics, config: EngineConfig, share: str) -> str:
    return (
        f"Batch full ({config.max_batch_size:,} requests) in {share} of the steps while up to {metrics.peak_waiting:,} "
        f"waited; the KV pool was at most {text.percent(metrics.kv_peak)} full, a larger max batch admits more."
    )


def _token_budget(metrics: Metrics, config: EngineConfig, share: str) -> str:
    return (
        f"Token budget of {config.max_batched_tokens:,} per step used up in {share} of the steps while up to "
        f"{metrics.peak_waiting:,} waited; a larger budget starts prompts sooner and makes each step longer."
    )


def _batch_policy(metrics: Metrics, config: EngineConfig, share: str) -> str:
    wasted = None if metrics.occupancy is None else 1.0 - metrics.occupancy
    return (
        f"{config.batching.capitalize()} batching kept up to {metrics.peak_waiting:,} waiting in {share} of the steps "
        f"while {text.percent(wasted)} of the batch's slots stood empty; continuous batching admits at every step."
    )


_REASONS = {"blocks": _blocks, "batch size": _batch_size, "token budget": _token_budget, "batch policy": _batch_policy}


def _unblocked(metrics: Metrics, workload: Workload) -> str:
    step = metrics.step_s / metrics.num_steps
    idle = 1.0 - (metrics.busy or 0.0)
    if idle > IDLE:
        return (
            f"The load limited the run: the engine was idle {text.percent(idle)} of the time at "
            f"{workload.arrivals_text}; more would fit."
        )
    if workload.concurrency is not None:
        return (
            f"The load limited the run: {workload.arrivals_text} made a mean batch of "
            f"{text.number(metrics.mean_batch)} at {text.seconds(step)} a step, and nobody waited for room."
        )
    return (
        f"The engine's speed limited the run: nobody waited for room, it was busy {text.percent(metrics.busy)} of the "
        f"time at {text.seconds(step)} a step with a mean batch of {text.number(metrics.mean_batch)}."
    )


def change_sentence(run: RunSnapshot, baseline: RunSnapshot) -> str:
    """What was changed and what came of it: knobs first, then ratios to the baseline."""
    knobs = [
        f"{_CALLED.get(name, name)} {_knob(name, before)} -> {_knob(name, after)}"
        for now, then in ((run.config, baseline.config), (run.workload, baseline.workload), (run.slo, baseline.slo))
        for name, before, after in _differences(then, now)
    ]
    effects = [
        f"{name} {text.times(after / before)}"
        for name, before, after in zip(_EFFECTS, _effects(baseline), _effects(run), strict=True)
        if before and after is not None
    ]
    changed = ", ".join(knobs) if knobs else "nothing changed but the moment of the run"
    return f"Against run {baseline.id}: {changed}; {', '.join(effects) if effects else 'nothing to compare yet'}."


_CALLED = {"name": "workload", "num_requests": "requests", "ttft": "SLO TTFT", "tpot": "SLO TPOT"}
_WRITTEN = {
    "memory_limit": text.size,
    "rate": lambda rate: "all at once" if rate == math.inf else f"{rate:g}",
    "ttft": text.seconds,
    "tpot": text.seconds,
}
_EFFECTS = ("weights", "tokens that fit", "tokens/s", "TTFT p99", "TPOT p50", "latency p99", "perplexity")


def _effects(run: RunSnapshot) -> list[float | None]:
    plan, m, quality = run.memory, run.metrics, run.perplexity
    return [
        plan.weights_total if plan else None,
        plan.tokens_that_fit if plan else None,
        m.tokens_per_s if m else None,
        m.ttft.p99 if m and m.ttft else None,
        m.tpot.p50 if m and m.tpot else None,
        m.latency.p99 if m and m.latency else None,
        quality.value if quality else None,
    ]


def _differences(before: Any, after: Any) -> list[tuple[str, Any, Any]]:
    pairs = ((f.name, getattr(before, f.name), getattr(after, f.name)) for f in fields(before))
    differing = {name: (a, b) for name, a, b in pairs if a != b}
    if isinstance(before, EngineConfig) and {before.runner, after.runner} != {"simulated"}:
        differing.pop("gpu", None)  # a config of this machine names a GPU too, which nothing ran on
        if "runner" in differing:
            differing["runner"] = (_runner(before), _runner(after))
    return [(name, a, b) for name, (a, b) in differing.items()]


def _runner(config: EngineConfig) -> str:
    return f"simulated {config.gpu}" if config.runner == "simulated" else config.runner


def _knob(name: str, value: Any) -> str:
    if value is None:
        return "unset"
    return _WRITTEN[name](value) if name in _WRITTEN else f"{value:g}" if isinstance(value, float) else str(value)
