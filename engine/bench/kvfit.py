"""How many requests of 1,024 tokens run at the same time in the same bytes, per KV format: counted while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from engine.bench.measure import serve
from engine.bench.work import fixed_work
from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import LoadedModel
from engine.running.workspace import workspace_bytes
from engine.scheduling.batch import StepEvent

LENGTH = 1024
OUTPUT = 16
MORE = 8  # times the requests of the first format that another may hold
MOST_CONCURRENT = 512  # EngineConfig's largest batch, by MORE
BUDGET = 16 * LENGTH  # tokens of one step: so many that the first requests still run when the last prompt is computed


def run_kvfit(
    config: EngineConfig, model: LoadedModel, formats: Sequence[str], concurrent: int, seed: int
) -> list[dict[str, Any]]:
    """`concurrent`: how many fit in the first format; the others get the same bytes. None may be preempted."""
    config = replace(config, prefix_caching=False, max_batch_size=MORE * concurrent, cache_ratio=0.9)
    config = replace(config, max_batched_tokens=max(BUDGET, config.max_batch_size))
    with Engine(replace(config, kv=formats[0], memory_limit=None), model=model) as engine:
        plan = engine.memory
    pool = concurrent * -(-LENGTH // plan.block_size) * plan.block_bytes
    limit = plan.weights_total + plan.workspace + int((pool + plan.block_bytes / 2) / config.cache_ratio)
    configs = [replace(config, kv=name) for name in formats]
    workspaces = [workspace_bytes(model.spec, each, itemsize=2) for each in configs]  # it differs by the format
    limits = [limit + workspace - workspaces[0] for workspace in workspaces]
    rows = [
        _row(replace(each, memory_limit=most), model, concurrent, seed)
        for each, most in zip(configs, limits, strict=True)
    ]
    for row in rows:
        row["ratio"] = row["most_running"] / rows[0]["most_running"]
        print(
            f"  KV {row['kv']:<6} {row['most_running']:>5} requests of {LENGTH:,} tokens at once in "
            f"{row['pool_bytes'] / 1e6:,.1f} MB, {row['ratio']:.2f}x {rows[0]['kv']}; {row['preempted']} preempted",
            flush=True,
        )
    return rows


def _row(config: EngineConfig, model: LoadedModel, concurrent: int, seed: int) -> dict[str, Any]:
    with Engine(config, model=model) as engine:
        events: list[StepEvent] = []
        engine.observers.append(events.append)
        fits = engine.memory.tokens_that_fit // LENGTH
        work = fixed_work(engine.spec.vocab_size, fits + 2, LENGTH - OUTPUT, OUTPUT, seed)
        _, outputs = serve(engine, work)
        engine.check_integrity()
        return {
            "kv": config.kv,
            "pool_bytes": engine.memory.kv,
            "memory_limit": engine.memory.limit,
            "most_running": max(event.num_running for event in events),
            "preempted": sum(event.num_preempted for event in events),
            "requests": len(outputs),
            "config": asdict(config),
        }
