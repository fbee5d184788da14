"""The figure of the live charts before a run: every trace in place with nothing to draw, axes, titles and legends."""

from __future__ import annotations

from typing import Any

from workbench.drawing import BLUE, GREEN, GREY, PURPLE, VERMILLION
from workbench.figure import MODEBAR
from workbench.panel.view import PARTS

HEIGHT = 652
_MARGIN = {"l": 84, "r": 48, "t": 26, "b": 44, "autoexpand": False}  # at the top plotly's buttons, beside no title
_LEFT, _RIGHT = (0.0, 0.43), (0.555, 1.0)


def blank_figure() -> dict[str, Any]:
    """Data and layout with every trace in place and nothing to draw: updates only ever fill what exists."""
    return {"data": blank_traces(), "layout": _layout()}


def blank_traces() -> list[dict[str, Any]]:
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
            "textposition": [],
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
        "modebar": MODEBAR,
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
