"""One run: what was asked, how far it is, what it measured. Written by the engine's thread, read by any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from engine.config import EngineConfig
from engine.request import RequestOutput
from engine.running.memory import MemoryPlan
from engine.scheduling.batch import StepEvent
from workbench.quality import Perplexity
from workbench.runs.explain import limiting_sentence
from workbench.runs.metrics import SLO, Metrics, MetricsCollector
from workbench.runs.report import row, summary
from workbench.runs.run_snapshot import RunSnapshot, Status
from workbench.runs.timeseries import Sample
from workbench.runs.workload import Workload


class Run:
    """Handle of a run that a Session drives. `snapshot` may be read at any time from any thread.

    is_synthetic: the weights are random, or nothing is computed at all: speed and memory mean something, text and
    quality do not.
    """

    def __init__(self, id: int, config: EngineConfig, workload: Workload, slo: SLO, label: str | None = None) -> None:
        self.id = id
        self.config = config
        self.workload = workload
        self.slo = slo
        self.label = label or default_label(config)
        self.status: Status = "loading"
        self.phase = "loading the model"
        self.error: str | None = None
        self.traceback: str | None = None
        self.notes: tuple[str, ...] = ()
        self.description = ""
        self.is_synthetic = False
        self.memory: MemoryPlan | None = None
        self.measured_memory: Mapping[str, int] = {}
        self.others: float | None = None
        self.perplexity: Perplexity | None = None
        self.decode: Callable[[Sequence[int]], str] | None = None
        self.stop_requested = threading.Event()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._collector: MetricsCollector | None = None
        self._final: tuple[Metrics, tuple[Sample, ...]] | None = None
        self._last_output: RequestOutput | None = None

    # Readers

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    @property
    def metrics(self) -> Metrics | None:
        """None until the load has begun."""
        return self._measured()[0]

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self._measured()[1]

    def snapshot(self) -> RunSnapshot:
        """Everything at this moment; the engine is held up only while the raw values are copied."""
        same = {name: getattr(self, name) for name in _SHARED}  # the status first: "done" promises the final figures
        metrics, samples = self._measured()
        finished = metrics.num_finished + metrics.num_failed + metrics.num_rejected if metrics else 0
        sentence = self.error or (limiting_sentence(metrics, self.config, self.workload) if metrics else "")
        return RunSnapshot(
            **same, finished=finished, total=self.workload.num_requests, metrics=metrics, samples=samples,
            sentence=sentence,
        )  # fmt: skip

    def sample(self) -> tuple[str, str] | None:
        """Prompt and answer of the request that finished last. Whatever a model wrote: escape it before showing it."""
        output, decode = self._last_output, self.decode
        return None if output is None or decode is None else (decode(output.prompt_token_ids), output.text)

    def summary(self) -> str:
        """The run as text of a fixed form."""
        return summary(self.snapshot())

    def row(self) -> dict[str, Any]:
        """The run as one row of a table; None where nothing was measured."""
        return row(self.snapshot())

    def stop(self) -> None:
        """Ask the run to end after the step it is in; returns at once."""
        self.stop_requested.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Until the run is over, or `timeout` seconds; True when it is over."""
        return self._over.wait(timeout)

    def __repr__(self) -> str:
        return f"<Run {self.id}: {self.label}, {self.status}>"

    # Writers: the thread that drives the engine

    def note(self, sentence: str) -> None:
        """Something a reader of the figures must know."""
        self.notes = (*self.notes, sentence)

    def begin(self, start: float) -> None:
        """The load begins at `start` on the engine's clock."""
        self.status, self.phase = "running", "serving"
        self._collector = MetricsCollector(start, self.slo, prefix_caching=self.config.prefix_caching)

    def on_step(self, event: StepEvent) -> None:
        """An observer of the engine."""
        assert self._collector is not None, "a step before the load began"
        with self._lock:
            self._collector.on_step(event)

    def on_finish(self, output: RequestOutput) -> None:
        assert self._collector is not None, "a finished request before the load began"
        with self._lock:
            self._collector.on_finish(output)
        if output.error is not None and self._collector.num_failed == 1:  # the reason of the first stands for all
            self.note(f"a request failed: {output.error}")
        if output.finish_reason not in ("abort", "error"):
            self._last_output = output

    def on_reject(self, reason: str) -> None:
        """The engine refused a request; the first reason is kept as a note."""
        assert self._collector is not None, "a refused request before the load began"
        with self._lock:
            if not self._collector.num_rejected:
                self.note(f"a request was refused: {reason}")
            self._collector.on_reject()

    def end(self, status: Status, error: str | None = None) -> None:
        """The last word; later changes are ignored."""
        if self.is_over:
            return
        if self._collector is not None:
            self._final = (self._collector.metrics(), self._collector.samples())
        self.error, self.status, self.phase = error, status, status
        self._over.set()

    def _measured(self) -> tuple[Metrics | None, tuple[Sample, ...]]:
        if self._final is not None:
            return self._final
        with self._lock:
            collector = self._collector.copy() if self._collector else None
        return (collector.metrics(), collector.samples()) if collector else (None, ())


_DERIVED = ("finished", "total", "metrics", "samples", "sentence")
_SHARED = [field.name for field in fields(RunSnapshot) if field.name not in _DERIVED]


def default_label(config: EngineConfig) -> str:
    """The knobs that people turn most, in a few words."""
    where = f" on a simulated {config.gpu}" if config.runner == "simulated" else ""
    return f"{config.model}{where}: {config.weights} weights, {config.kv} KV, {config.batching} batching"
