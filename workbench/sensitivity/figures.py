"""Sensitivity and its frontier as figures. Every figure's numbers are also in a DataFrame beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from engine.model.weight_plan import MODULES
from workbench import figure as figures
from workbench.drawing import GREY, log_ticks

Mark = tuple[float, float, str]
"""Of one plan: bits per weight, loss, and what a pointer over it shows."""


def heat_map(losses: Mapping[tuple[int | None, str], float], num_layers: int, format: str) -> go.Figure:
    """Loss by layer (down) and module (across) in one format; a cell also holds its number, for eyes and printers
    that see no colours. Light is little loss: the scale is logarithmic."""
    layers = range(num_layers)
    table = [[losses.get((layer, module)) for module in MODULES] for layer in layers]
    known = [max(loss, 1e-9) for loss in losses.values()] or [1e-9]
    marks = log_ticks(min(known), max(known)) or [min(known), max(known)]
    drawn = figures.blank(
        f"KL divergence from bf16 when one matrix is {format}",
        "matrix",
        "layer",
        height=120 + 26 * num_layers,
        yaxis_autorange="reversed",
        yaxis_dtick=1 if num_layers <= 40 else None,
    )
    drawn.add_heatmap(
        x=list(MODULES),
        y=list(layers),
        z=[[None if loss is None else math.log10(max(loss, 1e-9)) for loss in row] for row in table],
        text=[["" if loss is None else f"{loss:.2g}" for loss in row] for row in table],
        texttemplate="%{text}",
        colorscale="Cividis_r",
        colorbar={
            "title": {"text": "nats per token"},
            "tickvals": [math.log10(mark) for mark in marks],
            "ticktext": [f"{mark:g}" for mark in marks],
        },
        hovertemplate=f"layer %{{y}}, %{{x}} as {format}: %{{text}} nats per token<extra></extra>",
        xgap=2,
        ygap=2,
    )
    return drawn


def frontier_figure(
    model: str,
    predicted: Sequence[tuple[float, float]],
    assigned: Mapping[str, Sequence[Mark]],
    uniform: Mapping[str, Sequence[Mark]],
) -> go.Figure:
    """Loss against bits per weight: what the single losses add up to, and what was measured of whole plans, those that
    were assigned and those of one format, by the method of their int4 codes."""
    drawn = figures.blank(
        f"Loss against bits per weight, {model}",
        "bits per weight of the layers' matrices, scales and zeros counted",
        "KL divergence from bf16, nats per token",
        yaxis_type="log",
        yaxis_exponentformat="power",
    )
    figures.line(
        drawn,
        "predicted: sum of single losses",
        [bits for bits, _ in predicted],
        [loss for _, loss in predicted],
        "predicted %{y:.2g} at %{x:.2f} bits",
        mode="lines",
    )
    for kind, measured, mode in (("assigned", assigned, "lines+markers"), ("one format", uniform, "markers")):
        for method, marks in measured.items():
            figures.line(
                drawn,
                f"{kind}, {method}",
                [bits for bits, _, _ in marks],
                [loss for _, loss, _ in marks],
                "%{text}",
                text=[text for _, _, text in marks],
                mode=mode,
            )
    drawn.update_layout(legend={"orientation": "h", "y": -0.25, "font": {"color": GREY}})
    return drawn
