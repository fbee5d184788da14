"""Experiments on the engine: workloads, sessions, metrics, quality, explanations, and the panel that shows them.

    from workbench import Session, Workload
    from engine import EngineConfig
    with Session() as session:
        print(session.run(EngineConfig(weights="int4"), Workload.preset("dialogue service")).summary())

Names load when they are first used: the headless half needs no plotly and no ipywidgets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.metrics import SLO
    from workbench.panel import Workbench
    from workbench.quality import perplexity
    from workbench.run import Run
    from workbench.session import Session
    from workbench.workload import Workload

_HOMES = {
    "SLO": "workbench.metrics",
    "Run": "workbench.run",
    "Session": "workbench.session",
    "Workbench": "workbench.panel",
    "Workload": "workbench.workload",
    "perplexity": "workbench.quality",
}
__all__ = ["SLO", "Run", "Session", "Workbench", "Workload", "perplexity"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
