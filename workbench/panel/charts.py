"""The four live charts, in one figure: each FigureWidget brings its own copy of plotly to the browser."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench import text
from workbench.panel.blank_figure import blank_figure, blank_traces
from workbench.panel.view import PARTS, Array, Curve, MemoryBar, RunPoint, Trend, View, byte_unit, corner
from workbench.runs.verdict import LIKELY, MET, MISSED

MAX_POINTS = 300
"""Points of one line: the browser redraws each update whole, so this bounds what a tick costs."""

_CONFIG = {
    "displaylogo": False,
    "responsive": True,
}

Changes = dict[str, dict[str, Any]]


class _Figure(go.FigureWidget):  # type: ignore[misc]
    """A figure that does not lose updates to the browser's own messages.

    The browser answers each update, and ipywidgets holds back all notifications of a widget while it takes an answer
    in. An update that another thread sends in that moment would go out as None (plotly resets it right after setting
    it), so the two wait for each other.
    """

    def __init__(self, contents: dict[str, Any]) -> None:
        self._writing = threading.RLock()
        super().__init__(contents)

    def set_state(self, sync_data: dict[str, Any]) -> None:
        with self._writing:
            super().set_state(sync_data)


class LiveCharts:
    """Owns the figure. Only one thread at a time may call `show`: plotly's batch flag is shared, two lose messages."""

    def __init__(self) -> None:
        self.figure = _Figure(blank_figure())  # ImportError where anywidget is missing
        self.figure._config = {**self.figure._config, **_CONFIG}  # no public way to keep the logo out
        self._traces = dict(zip((trace["uid"] for trace in blank_traces()), self.figure.data, strict=True))
        with self.figure.batch_update():  # a new figure draws its uids at random; a saved one should not differ by them
            for uid, trace in self._traces.items():
                trace.uid = uid
        self._drawn: dict[str, Any] = {}

    def show(self, view: View, *, slow: bool = True) -> None:
        """Bring the figure to `view` in one message; slow False leaves the two lower charts as they are."""
        traces, layout = updates(view, slow=slow)
        traces = {uid: change for uid, change in traces.items() if not _same(self._drawn.get(uid), change)}
        layout = {key: value for key, value in layout.items() if self._drawn.get(key) != value}
        if not traces and not layout:
            return
        with self.figure._writing, self.figure.batch_update():
            for uid, change in traces.items():
                self._traces[uid].update(change, overwrite=True)
            if layout:
                self.figure.update_layout(layout)
        self._drawn |= traces
        self._drawn |= layout

    def forget(self) -> None:
        """Make the next `show` send everything: what was sent while the browser built the figure may be lost.

        The data is taken away first, because plotly sends no property that it believes to be there already.
        """
        self.show(View())
        self._drawn.clear()

    def close(self) -> None:
        self.figure.close()


def updates(view: View, *, slow: bool = True) -> tuple[Changes, dict[str, Any]]:
    """Properties by trace uid, and of the layout, that show `view`."""
    traces = {**_memory(view.memory), **_trend(view.trend)}
    if slow:
        curves = {
            "ttft-now": view.ttft,
            "tpot-now": view.tpot,
            "ttft-baseline": view.baseline_ttft,
            "tpot-baseline": view.baseline_tpot,
        }
        traces |= {uid: _curve(curve) for uid, curve in curves.items()}
        traces |= {"ttft-slo": _bound(view.slo_ttft), "tpot-slo": _bound(view.slo_tpot)}
        traces |= _points(view.points)
    layout = _memory_layout(view.memory)
    if slow:
        bounds = [bound for bound in (view.slo_ttft, view.slo_tpot) if bound]
        shown = np.concatenate([*(curve.seconds for curve in curves.values()), np.array(bounds)])
        layout |= _log_axis("xaxis3", shown) | _log_axis("xaxis4", np.array([point.ttft_p99 for point in view.points]))
    return traces, layout


def thin(values: Array) -> Array:
    """At most MAX_POINTS of `values`, evenly spread, first and last kept."""
    if len(values) <= MAX_POINTS:
        return values
    chosen = np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)
    return np.asarray(values[chosen])


def _same(old: dict[str, Any] | None, new: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return np.array_equal(a, b, equal_nan=True) if isinstance(b, np.ndarray) else a == b

    return old is not None and old.keys() == new.keys() and all(equal(old[key], new[key]) for key in new)


def _memory(bars: Sequence[MemoryBar]) -> Changes:
    divisor, unit = byte_unit(max((bar.limit for bar in bars), default=0.0))
    changes = {}
    for part in PARTS:
        sizes = np.array([bar.parts[part.key] / divisor for bar in bars])
        notes = [bar.note if part.key.startswith("kv") else "" for bar in bars]
        changes[f"memory-{part.key}"] = {
            "x": sizes,
            "y": [_row(bar) for bar in bars],
            "text": [f"{size:.3g}" if size > 0 and not part.pattern and part.key != "free" else "" for size in sizes],
            "customdata": [
                f"{bar.label}: {part.label}{note} {size:.3g} {unit}"
                for bar, note, size in zip(bars, notes, sizes, strict=True)
            ],
        }
    return changes


def _row(bar: MemoryBar) -> str:
    return f"<b>{bar.label}</b><br>{bar.tokens:,}<br>tokens fit"


def _log_axis(axis: str, values: Array) -> dict[str, Any]:
    """Range in steps of a quarter decade, so that it seldom moves, and as many labels as fit side by side."""
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.01, 1.0)
    left, right = math.floor(4 * math.log10(low) - 0.2) / 4, math.ceil(4 * math.log10(high) + 0.2) / 4
    span = right - left
    factors = (1, 1.5, 2, 3, 5, 7) if span <= 0.75 else (1, 2, 5) if span <= 1.25 else (1, 3) if span <= 2.5 else (1,)
    marks = [f * 10.0**decade for decade in range(math.floor(left), math.ceil(right) + 1) for f in factors]
    return {
        f"{axis}.range": [left, right],
        f"{axis}.tickvals": marks,
        f"{axis}.ticktext": [text.seconds(mark) for mark in marks],
    }


def _memory_layout(bars: Sequence[MemoryBar]) -> dict[str, Any]:
    most = max((bar.limit for bar in bars), default=1e6)
    divisor, unit = byte_unit(most)
    return {"xaxis.title.text": unit, "xaxis.range": [0, most / divisor]}


def _trend(trend: Trend) -> Changes:
    x = thin(trend.seconds)
    lines = {"tokens": trend.tokens_per_s, "running": trend.running, "waiting": trend.waiting}
    return {f"trend-{name}": {"x": x, "y": thin(values)} for name, values in lines.items()}


def _curve(curve: Curve) -> dict[str, Any]:
    shown = curve.seconds > 0  # a logarithmic axis has no zero
    return {"x": thin(curve.seconds[shown]), "y": thin(curve.percent[shown])}


def _bound(seconds: float | None) -> dict[str, Any]:
    there = seconds is not None and 0 < seconds < math.inf
    return {"x": np.array([seconds, seconds] if there else []), "y": np.array([0.0, 100.0] if there else [])}


_CORNERS = {(-1, 1): "top right", (1, -1): "bottom left", (-1, -1): "top left", (1, 1): "bottom right"}


def _points(points: Sequence[RunPoint]) -> Changes:
    def chosen(which: list[RunPoint]) -> dict[str, Any]:
        return {
            "x": np.array([point.ttft_p99 for point in which]),
            "y": np.array([point.tokens_per_s for point in which]),
            "text": [str(point.number) for point in which],
            "textposition": [_CORNERS[corner(point.number)] for point in which],
            "customdata": [point.text for point in which],
        }

    shown = [point for point in points if point.ttft_p99 > 0]
    return {
        "run-met": chosen([point for point in shown if point.state == MET]),
        "run-likely": chosen([point for point in shown if point.state == LIKELY]),
        "run-missed": chosen([point for point in shown if point.state == MISSED]),
        "run-latest": chosen([point for point in shown if point.is_latest]),
        "run-baseline": chosen([point for point in shown if point.is_baseline]),
    }
