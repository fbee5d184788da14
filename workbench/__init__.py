"""Experiments on the engine: workloads, sessions, metrics, quality, explanations, and the panel that shows them.

    from workbench import Session, Workload
    from engine import EngineConfig
    with Session() as session:
        print(session.run(EngineConfig(weights="int4"), Workload.preset("dialogue service")).summary())

Here lie the commands (`demo`, `crossover`, `quantizers`, `overhead`, `lm_eval`, `results`) and how all write and draw
(`text`, `drawing`, `figure`); below them, in rooms:

    runs         workloads, sessions, what a run measures, and what is said of it
    panel        knobs, charts and screen
    quality      what formats cost: perplexity, divergence, agreement
    sensitivity  which matrices pay for a coarser format, and what a budget is best spent on

Names load when they are first used: the headless half needs no plotly and no ipywidgets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.panel.panel import Workbench
    from workbench.quality import perplexity
    from workbench.runs.metrics import SLO
    from workbench.runs.run import Run
    from workbench.runs.session import Session
    from workbench.runs.workload import Workload

_HOMES = {
    "SLO": "workbench.runs.metrics",
    "Run": "workbench.runs.run",
    "Session": "workbench.runs.session",
    "Workbench": "workbench.panel.panel",
    "Workload": "workbench.runs.workload",
    "perplexity": "workbench.quality",
}
__all__ = ["SLO", "Run", "Session", "Workbench", "Workload", "perplexity"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
