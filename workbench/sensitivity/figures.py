"""Sensitivity and its frontier as figures. Every figure's numbers are also in a DataFrame beside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from engine.model.weight_plan import MODULES
from workbench import figure as figures
from workbench.sensitivity.assignment import frontier
from workbench.snapshot import log_ticks
from workbench.view import GREY

if TYPE_CHECKING:
    from workbench.sensitivity.frontier import Frontier
    from workbench.sensitivity.losses import Sensitivity


def heat_map(found: Sensitivity, format: str | None = None) -> go.Figure:
    """Loss by layer (down) and module (across) in one format; a cell also holds its number, for eyes and printers
    that see no colours. Light is little loss: the scale is logarithmic."""
    format = format or next((row.format for row in found.rows), "int4")
    losses = {(row.layer, row.module): row.loss.value for row in found.rows if row.format == format}
    layers = range(found.spec.num_layers)
    table = [[losses.get((layer, module)) for module in MODULES] for layer in layers]
    known = [max(loss, 1e-9) for loss in losses.values()] or [1e-9]
    marks = log_ticks(min(known), max(known)) or [min(known), max(known)]
    drawn = figures.blank(
        f"KL divergence from bf16 when one matrix is {format}",
        "matrix",
        "layer",
        height=120 + 26 * found.spec.num_layers,
        yaxis_autorange="reversed",
        yaxis_dtick=1 if found.spec.num_layers <= 40 else None,
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


def frontier_figure(found: Frontier) -> go.Figure:
    """Loss against bits per weight: what the single losses add up to, and what was measured of whole plans."""
    drawn = figures.blank(
        f"Loss against bits per weight, {found.sensitivity.config.model}",
        "bits per weight of the layers' matrices, scales and zeros counted",
        "KL divergence from bf16, nats per token",
        yaxis_type="log",
        yaxis_exponentformat="power",
    )
    weights = sum(choice.nbytes // 2 for choice in found.sensitivity.choices() if choice.format == "bf16")
    passed = [one for one in frontier(found.sensitivity.choices()) if one.loss > 0]
    figures.line(
        drawn,
        "predicted: sum of single losses",
        [8 * one.nbytes / weights for one in passed],
        [one.loss for one in passed],
        "predicted %{y:.2g} at %{x:.2f} bits",
        mode="lines",
    )
    for kind, name in (("assigned", "assigned, {}"), ("uniform", "one format, {}")):
        for method in dict.fromkeys(point.method for point in found.points if point.kind == kind):
            points = [point for point in found.points if (point.kind, point.method) == (kind, method)]
            points.sort(key=lambda point: point.planned.bits_per_weight)
            figures.line(
                drawn,
                name.format(method),
                [point.planned.bits_per_weight for point in points],
                [point.divergence.kl_mean.value for point in points],
                "%{text}",
                text=[point.text for point in points],
                mode="lines+markers" if kind == "assigned" else "markers",
            )
    drawn.update_layout(legend={"orientation": "h", "y": -0.25, "font": {"color": GREY}})
    return drawn
