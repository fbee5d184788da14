"""A run as text and as a table row; both read a RunSnapshot and nothing else."""

from __future__ import annotations

import math
from typing import Any

from workbench import text
from workbench.runs import neighbours
from workbench.runs.distribution import ENOUGH_FOR_P99, Distribution
from workbench.runs.run_snapshot import RunSnapshot
from workbench.runs.verdict import verdict


def summary(run: RunSnapshot) -> str:
    """Fixed form: a title, then one line per subject, names in the same column."""
    lines = [f"run {run.id} · {run.label} · {run.status}"]
    if run.error:
        lines.append(_line("error", run.error))
    lines.append(_line("engine", run.description or text.ABSENT))
    workload = f"{run.workload.name}: {text.count(run.total, 'request')}, {run.workload.arrivals_text}"
    lines.append(_line("workload", f"{workload}, seed {run.workload.seed}; {run.finished:,} ended"))
    lines.append(_line("memory", _memory(run)))
    if run.metrics:
        lines += _measured_lines(run)
    if run.perplexity is not None:
        lines.append(_line("quality", str(run.perplexity)))
    if run.sentence and not run.error:
        lines.append(_line("limited by", run.sentence))
    beside = neighbours.words(run.others)
    notes = [*run.notes, f"{beside} meanwhile; alone, the engine is faster"] if beside else run.notes
    lines += [_line("note", note) for note in notes]
    return "\n".join(lines)


def _measured_lines(run: RunSnapshot) -> list[str]:
    m = run.metrics
    assert m is not None
    causes = f"{m.num_failed:,} failed, {m.num_rejected:,} refused, {m.num_overdue:,} overdue at the stop"
    bounds = f"p99 TTFT <= {text.seconds(run.slo.ttft)}, p99 TPOT <= {text.seconds(run.slo.tpot)}"
    return [
        _line("SLO", f"{verdict(m, run.slo)} ({bounds})"),
        _line("TTFT", distribution(m.ttft)),
        _line("TPOT", distribution(m.tpot)),
        _line("ITL", distribution(m.itl, interval=False)),
        _line("latency", distribution(m.latency)),
        _line(
            "throughput",
            f"{text.number(m.tokens_per_s)} tokens/s, {text.number(m.requests_per_s)} requests/s; "
            f"goodput {text.number(m.goodput)} requests/s ({text.percent(m.good_fraction)} of those that ended)",
        ),
        *([_line("lost", causes)] if m.num_lost else []),
        _line(
            "cache",
            f"prefix hit rate {text.percent(m.hit_rate)}, KV use mean {text.percent(m.kv_mean)} and peak "
            f"{text.percent(m.kv_peak)}, {text.count(m.num_preemptions, 'preemption')}, "
            f"{text.count(m.recomputed_tokens, 'token')} recomputed",
        ),
        _line(
            "batch",
            f"mean {text.number(m.mean_batch)}, peak {m.peak_batch:,}; occupancy {text.percent(m.occupancy)}, "
            f"padding waste {text.percent(m.padding_waste)}; longest queue {m.peak_waiting:,}",
        ),
        _line(
            "time",
            f"{text.seconds(m.duration)}, busy {text.percent(m.busy)}, {text.count(m.num_steps, 'step')}; "
            f"device {text.seconds(m.device_s)}, host {text.seconds(m.host_s)}",
        ),
    ]


def distribution(d: Distribution | None, *, interval: bool = True) -> str:
    """p50, p95, p99 and what the p99 is worth."""
    if d is None:
        return text.ABSENT
    line = f"p50 {text.seconds(d.p50)}, p95 {text.seconds(d.p95)}, p99 {text.seconds(d.p99)}"
    return f"{line} ({p99_interval(d)})" if interval else line


def p99_interval(d: Distribution) -> str:
    """The 95 % interval in words; says so where the sample is too small to bound it above."""
    low = "no lower bound" if d.p99_low is None else f"{text.seconds(d.p99_low)}"
    if d.p99_high is None:
        return f"95 %: {low} or more; {d.count:,} are too few for a p99, {ENOUGH_FOR_P99} bound it"
    return f"95 %: {low} to {text.seconds(d.p99_high)}"


def _memory(run: RunSnapshot) -> str:
    plan = run.memory
    if plan is None:
        return text.ABSENT
    line = (
        f"weights {text.size(plan.weights_total)}, KV pool {text.size(plan.kv)} ({plan.tokens_that_fit:,} tokens that "
        f"fit), workspace {text.size(plan.workspace)}, free {text.size(plan.free)} of {text.size(plan.limit)}"
    )
    measured = ", ".join(f"{part} {text.size(value)}" for part, value in run.measured_memory.items())
    return f"{line}; measured: {measured or 'nothing'}"


def _line(name: str, value: str) -> str:
    return f"  {name:<11} {value}"


def row(run: RunSnapshot) -> dict[str, Any]:
    """One row: knobs, then memory (bytes), times (seconds), rates, quality. None = not measured."""
    config, plan, m = run.config, run.memory, run.metrics
    knobs = {
        "run": run.id,
        "label": run.label,
        "status": run.status,
        "model": config.model,
        "engine": run.description or None,
        "weights": str(config.weights),
        "kv": str(config.kv),
        "memory_limit": config.memory_limit,
        "cache_ratio": config.cache_ratio,
        "batching": config.batching,
        "max_batch_size": config.max_batch_size,
        "prefix_caching": config.prefix_caching,
        "workload": run.workload.name,
        "rate": run.workload.rate,
        "concurrency": run.workload.concurrency,
        "requests": run.total,
        "seed": run.workload.seed,
        "slo_ttft_s": run.slo.ttft,
        "slo_tpot_s": run.slo.tpot,
    }
    memory = {
        "weights_bytes": plan and plan.weights_total,
        "kv_bytes": plan and plan.kv,
        "tokens_that_fit": plan and plan.tokens_that_fit,
    }
    times: dict[str, Any] = {"duration_s": m and m.duration}
    for name in ("ttft", "tpot", "itl", "latency"):
        d: Distribution | None = getattr(m, name, None)
        bounds = () if name == "itl" else ("p99_low", "p99_high")  # gaps of one request are not independent
        times |= {f"{name}_{q}_s": getattr(d, q, None) for q in ("mean", "p50", "p95", "p99", *bounds)}
    names = (
        "num_finished num_failed num_rejected num_overdue tokens_per_s requests_per_s goodput good_tokens_per_s "
        "good_fraction slo_met hit_rate mean_batch occupancy padding_waste num_preemptions recomputed_tokens kv_peak "
        "num_steps device_s host_s busy"
    )
    rates = {name: getattr(m, name, None) for name in names.split()}
    quality = {"perplexity": run.perplexity and run.perplexity.value}
    return knobs | memory | times | rates | quality | {"error": run.error}


def finite(value: Any) -> Any:
    """For JSON, which knows no infinity: inf becomes the text "inf"."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
