"""A run at one moment: what sentences, tables and panels are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig
from engine.running.memory import MemoryPlan
from workbench.quality import Perplexity
from workbench.runs.metrics import SLO, Metrics
from workbench.runs.timeseries import Sample
from workbench.runs.workload import Workload

Status = Literal["loading", "running", "done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """A run at one moment, immutable: what a panel draws from. None = not known or not measured.

    phase: what is going on, in words. finished, total: requests. sentence: what limits the run so far.
    memory: the plan; measured_memory: bytes by part after the run, empty where nothing could be measured. others: share
    of the processor that other programs took while the load ran, after the run, where a processor is what computes.
    """

    id: int
    label: str
    config: EngineConfig
    workload: Workload
    slo: SLO
    status: Status
    phase: str
    finished: int
    total: int
    error: str | None
    notes: tuple[str, ...]
    description: str
    is_synthetic: bool
    memory: MemoryPlan | None
    measured_memory: Mapping[str, int]
    others: float | None
    metrics: Metrics | None
    samples: tuple[Sample, ...]
    perplexity: Perplexity | None
    sentence: str

    @property
    def is_over(self) -> bool:
        return self.status in ("done", "stopped", "failed")
