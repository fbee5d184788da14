"""Static plotly figures that look like the panel's charts: readable on light and dark pages, no colour on its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from workbench.drawing import BLUE, GREEN, GREY, PURPLE, VERMILLION

STYLES = tuple(
    (colour, dash, symbol)
    for dash, offset in (("solid", 0), ("dash", 2), ("dot", 4))
    for colour, symbol in zip(
        (BLUE, VERMILLION, GREEN, PURPLE),
        (("circle", "square", "diamond", "cross", "x", "star", "hexagon", "pentagon") * 2)[offset : offset + 4],
        strict=True,
    )
)
"""Colour, dash and marker of the first, second, ... line: no two share more than one of them within four lines."""


MODEBAR = {
    "bgcolor": "rgba(0,0,0,0)",
    "color": GREY,
    "activecolor": BLUE,
    "remove": ["sendChartToCloud", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}
"""plotly's buttons: on any page readable, and without the one that uploads the figure and what others do already."""


def blank(title: str, x: str, y: str, *, height: int = 380, **layout: Any) -> go.Figure:
    """An empty figure with named axes; `title`, plain text, is also what a reader without the picture gets first."""
    axis = {
        "zeroline": False,
        "showline": True,
        "linecolor": GREY,
        "gridcolor": "rgba(128,128,128,0.22)",
        "ticks": "outside",
        "tickcolor": GREY,
    }
    figure = go.Figure()
    figure.update_layout(
        title={"text": f"<b>{escape(title)}</b>", "x": 0.0, "xref": "paper", "font": {"size": 14}},
        height=height,
        margin={"l": 70, "r": 20, "t": 50, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": GREY},
        hovermode="closest",
        dragmode=False,
        showlegend=True,  # of one line too: an interrupt may have left no more
        modebar=MODEBAR,
        xaxis={**axis, "title": {"text": x}},
        yaxis={**axis, "title": {"text": y}},
    )
    figure.update_layout(**layout)
    return figure


def line(figure: go.Figure, name: str, x: Sequence[float], y: Sequence[float | None], hover: str, **more: Any) -> None:
    """One more line in a style of its own, with a marker at every point unless there are many."""
    colour, dash, symbol = STYLES[len(figure.data) % len(STYLES)]
    options: dict[str, Any] = {
        "mode": "lines+markers" if len(x) <= 40 else "lines",
        "line": {"color": colour, "dash": dash},
        "marker": {"symbol": symbol, "size": 8, "color": colour},
        "hovertemplate": f"{hover}<extra></extra>",
    }
    figure.add_scatter(x=list(x), y=list(y), name=escape(name), **{**options, **more})
