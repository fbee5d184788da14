"""The four live charts, in one figure: each FigureWidget brings its own copy of plotly to the browser."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from workbench import text
from workbench.headline import LIKELY, MET, MISSED
from workbench.view import (
    BLUE,
    GREEN,
    GREY,
    PARTS,
    PURPLE,
    VERMILLION,
    Array,
    Curve,
    MemoryBar,
    RunPoint,
    Trend,
    View,
    byte_unit,
)

MAX_POINTS = 300
"""Points of one line: the browser redraws each update whole, so this bounds what a tick costs."""

HEIGHT = 630
_MARGIN = {"l": 84, "r": 48, "t": 4, "b": 44, "autoexpand": False}
_LEFT, _RIGHT = (0.0, 0.43), (0.555, 1.0)
_CONFIG = {
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],
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
        self.figure._config = {**self.figure._config, **_CONFIG}  # no public way to keep the upload button out
        self._traces = dict(zip((trace["uid"] for trace in _traces()), self.figure.data, strict=True))
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


def blank_figure() -> dict[str, Any]:
    """Data and layout with every trace in place and nothing to draw: updates only ever fill what exists."""
    return {"data": _traces(), "layout": _layout()}


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


def _points(points: Sequence[RunPoint]) -> Changes:
    def chosen(which: list[RunPoint]) -> dict[str, Any]:
        return {
            "x": np.array([point.ttft_p99 for point in which]),
            "y": np.array([point.tokens_per_s for point in which]),
            "text": [str(point.number) for point in which],
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


def _traces() -> list[dict[str, Any]]:
    def line(
        uid: str, axes: str, colour: str, dash: str, width: float, hover: str, shape: str = "linear"
    ) -> dict[str, Any]:
        return {
            "type": "scatter",
            "mode": "lines",
            "uid": uid,
            "xaxis": f"x{axes[0]}",
            "yaxis": f"y{axes[1]}",
            "x": [],
            "y": [],
            "line": {"color": colour, "dash": dash, "width": width, "shape": shape},
            "showlegend": False,
            "hovertemplate": f"{hover}<extra></extra>",
        }

    def marks(uid: str, mode: str, **marker: Any) -> dict[str, Any]:
        return {
            "type": "scatter",
            "mode": mode,
            "uid": uid,
            "xaxis": "x4",
            "yaxis": "y4",
            "x": [],
            "y": [],
            "text": [],
            "customdata": [],
            "textposition": "top right",
            "cliponaxis": False,
            "marker": marker,
            "showlegend": False,
            "hovertemplate": "%{customdata}<extra></extra>",
        }

    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "uid": f"memory-{part.key}",
            "x": [],
            "y": [],
            "text": [],
            "customdata": [],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "showlegend": False,
            "insidetextfont": {"color": "white"},
            "hovertemplate": "%{customdata}<extra></extra>",
            "marker": {
                "color": part.colour if part.key != "free" else "rgba(0,0,0,0)",
                "line": {"color": part.colour, "width": 1.5},
                "pattern": {"shape": part.pattern, "fillmode": "replace", "size": 7, "solidity": 0.2},
            },
        }
        for part in PARTS
    ]
    share = "%{y:.4~g} % at or below %{x:.3~g} s"
    return [
        *bars,
        line("trend-tokens", "22", BLUE, "solid", 2.5, "%{y:,.0f} tokens/s at %{x:.1f} s"),
        line("trend-running", "25", GREEN, "dash", 1.8, "%{y:.0f} running at %{x:.1f} s", "hv"),
        line("trend-waiting", "25", VERMILLION, "dot", 2.2, "%{y:.0f} waiting at %{x:.1f} s", "hv"),
        line("ttft-baseline", "33", GREY, "solid", 1.3, f"baseline TTFT: {share}"),
        line("tpot-baseline", "33", GREY, "dash", 1.3, f"baseline TPOT: {share}"),
        line("ttft-now", "33", BLUE, "solid", 2.5, f"TTFT: {share}"),
        line("tpot-now", "33", VERMILLION, "dash", 2.5, f"TPOT: {share}"),
        line("ttft-slo", "33", BLUE, "dot", 1.6, "SLO: TTFT p99 at most %{x:.3~g} s"),
        line("tpot-slo", "33", VERMILLION, "dot", 1.6, "SLO: TPOT p99 at most %{x:.3~g} s"),
        marks("run-met", "markers+text", symbol="circle", size=11, color=GREEN),
        marks("run-likely", "markers+text", symbol="circle-open", size=10, color=GREEN, line={"width": 2.5}),
        marks("run-missed", "markers+text", symbol="x", size=10, color=VERMILLION),
        marks("run-latest", "markers", symbol="square-open", size=19, color=BLUE, line={"width": 2}),
        marks("run-baseline", "markers", symbol="diamond-open", size=23, color=PURPLE, line={"width": 2}),
    ]


def _span(colour: str, mark: str, label: str) -> str:
    return f'<span style="color:{colour}">{mark}</span> {label}'


def _titles() -> list[tuple[str, str, float, float]]:
    """Title, legend and place of each chart. The legends are text: plotly's own run into the neighbour's chart."""
    memory = [_span(part.colour, part.mark, part.label) for part in PARTS]
    trend = [_span(BLUE, "━━", "tokens/s"), _span(GREEN, "╍╍", "running"), _span(VERMILLION, "┅┅", "waiting")]
    latency = [_span(BLUE, "━━", "TTFT"), _span(VERMILLION, "╍╍", "TPOT"), _span(GREY, "──", "baseline"), "┊ SLO"]
    points = [
        _span(GREEN, "●", "SLO met"),
        _span(GREEN, "○", "met so far"),
        _span(VERMILLION, "✖", "missed"),
        _span(BLUE, "□", "latest"),
        _span(PURPLE, "◇", "baseline"),
    ]
    top, bottom = 1.0, _share(310)
    return [
        ("Where the memory goes", "  ".join(memory[:3]) + "<br>" + "  ".join(memory[3:]), 0.0, top),
        ("Throughput, and who waits", "  ".join(trend), _RIGHT[0], top),
        ("Latency: requests done within", "  ".join(latency), 0.0, bottom),
        ("Throughput against latency", "  ".join(points[:3]) + "<br>" + "  ".join(points[3:]), _RIGHT[0], bottom),
    ]


def _share(pixels: float) -> float:
    """Height in paper coordinates of a place so many pixels below the top."""
    room = HEIGHT - _MARGIN["t"] - _MARGIN["b"]
    return 1.0 - pixels / room


_TOP, _BOTTOM = (_share(256), _share(64)), (0.0, _share(310 + 64))


def _layout() -> dict[str, Any]:
    """Fixed sizes and margins throughout: nothing on the page moves while numbers change."""

    def axis(anchor: str, domain: tuple[float, float], title: str, **more: Any) -> dict[str, Any]:
        return {
            "anchor": anchor,
            "domain": domain,
            "title": {"text": title, "standoff": 6, "font": {"size": 12}},
            "zeroline": False,
            "showline": True,
            "linecolor": GREY,
            "gridcolor": "rgba(128,128,128,0.22)",
            "ticks": "outside",
            "ticklen": 4,
            "tickcolor": GREY,
            "automargin": False,
            "nticks": 6,
            **more,
        }

    zero: dict[str, Any] = {"rangemode": "tozero"}
    log: dict[str, Any] = {
        "type": "log",
        "tickmode": "array",
        "minor": {"ticks": "outside", "ticklen": 2, "dtick": "D1"},
    }
    return {
        "height": HEIGHT,
        "autosize": True,
        "margin": _MARGIN,
        "showlegend": False,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 11.5, "color": GREY},
        "barmode": "stack",
        "bargap": 0.3,
        "uirevision": "keep",
        "hovermode": "closest",
        "dragmode": False,
        "uniformtext": {"minsize": 10, "mode": "hide"},
        "annotations": [
            {
                "text": f"<b>{title}</b><br><span style='font-size:11px'>{legend}</span>",
                "x": x,
                "y": y,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "top",
                "showarrow": False,
                "align": "left",
                "font": {"size": 13},
            }
            for title, legend, x, y in _titles()
        ],
        "xaxis": axis("y", _LEFT, "MB", **zero),
        "yaxis": axis("x", _TOP, "", type="category", showgrid=False, ticks="", range=[2.5, -0.5]),
        "xaxis2": axis("y2", _RIGHT, "seconds since the run began", **zero),
        "yaxis2": axis("x2", _TOP, "tokens/s", **zero),
        "yaxis5": axis("x2", _TOP, "requests", **zero, overlaying="y2", side="right", showgrid=False, tickmode="auto"),
        "xaxis3": axis("y3", _LEFT, "time (log scale)", **log),
        "yaxis3": axis("x3", _BOTTOM, "share of requests", range=[0, 104], ticksuffix=" %", dtick=25),
        "xaxis4": axis("y4", _RIGHT, "TTFT p99 (log scale)", **log),
        "yaxis4": axis("x4", _BOTTOM, "tokens/s", **zero),
    }
