"""What a step costs the host: scheduling, preparing and handing out, with a device that is done at once.

The engine, the scheduler, the cache and the preparation are the real ones, and the arrays are laid into one buffer as
for a copy to a GPU; nothing is computed. On a GPU add the launches, which `--suite peers` includes in its host time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import load_model
from engine.running.preparation import Preparation
from engine.running.runner import Done
from engine.running.simulated import SimulatedRunner
from engine.running.step_arrays import Staging
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledBatch, StepResult

SHAPE = "synthetic:7b"
PROMPT = 512
STEPS = 150
BUDGET = 1 << 16  # tokens of one step
MOST_RUNNING = 4096  # EngineConfig's largest batch
POOL = 1 << 40  # bytes: all of them run to the end; an H200's own memory holds 1,000 of these contexts
KINDS = {"greedy": SamplingParams(max_tokens=4096, ignore_eos=True)}
KINDS["drawn"] = SamplingParams(max_tokens=4096, ignore_eos=True, temperature=0.8, top_p=0.9)


class IdleDevice(SimulatedRunner):
    """Every step is done when it is launched; every token is 0."""

    asynchronous = True

    def __init__(self, runner: SimulatedRunner, rows: int) -> None:
        self.__dict__.update(runner.__dict__)
        self._prepare = Preparation(self.memory.block_size, self.spec.vocab_size, rows)
        self._staging = Staging(torch.device("cpu"))
        self.prepare_seconds: list[float] = []
        self.decodes: list[int] = []

    def launch(self, batch: ScheduledBatch) -> Done:
        begun = time.perf_counter()
        step = self._prepare(batch)
        self._staging.copy({**step.arrays, **step.plan.arrays})
        seconds = time.perf_counter() - begun
        self.prepare_seconds.append(seconds)
        self.decodes.append(len(batch.decodes))
        samples = step.samples or [True] * len(step.sampled)
        return Done(StepResult([0 if yes else None for yes in samples], host_seconds=seconds))


def run_host(counts: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Decode steps of so many running requests; medians in milliseconds."""
    rows = []
    for kind, params in KINDS.items():
        for count in counts:
            rows.append(_row(kind, params, count, seed))
            row = rows[-1]
            print(
                f"  {count:>5} running, {kind:<6}: {row['host_ms']:.3f} ms per step ({row['p95_ms']:.3f} at p95), of "
                f"it preparing {row['prepare_ms']:.3f}; {row['host_ms'] / count * 1e3:.2f} µs per request",
                flush=True,
            )
    return rows


def configuration(count: int, seed: int) -> EngineConfig:
    """Holds `count` requests to the last step."""
    return EngineConfig(
        model=SHAPE,
        runner="simulated",
        memory_limit=POOL,
        max_batch_size=count,
        max_batched_tokens=BUDGET,
        block_size=64,
        seed=seed,
    )


def _row(kind: str, params: SamplingParams, count: int, seed: int) -> dict[str, Any]:
    config = configuration(count, seed)
    with load_model(config) as model, Engine(config, model=model) as engine:
        device = IdleDevice(engine.runner, count)  # type: ignore[arg-type]
        engine.core.runner = device
        for i in range(count):
            engine.add_request([(7 * i + j) % 1000 for j in range(PROMPT)], params)
        while any(not request.is_decoding for request in [*engine.scheduler.waiting, *engine.scheduler.running]):
            engine.step()
        device.prepare_seconds.clear()
        device.decodes.clear()
        steps = []
        for _ in range(STEPS):
            begun = time.perf_counter()
            engine.step()
            steps.append((time.perf_counter() - begun) * 1e3)
        running = min(device.decodes)
        if running != count:
            raise RuntimeError(f"a step computed {running} requests, not {count}")
    return {
        "model": SHAPE,
        "running": count,
        "sampling": kind,
        "prompt": PROMPT,
        "steps": STEPS,
        "host_ms": statistics.median(steps),
        "p95_ms": statistics.quantiles(steps, n=20)[-1],
        "prepare_ms": statistics.median(device.prepare_seconds) * 1e3,
    }
