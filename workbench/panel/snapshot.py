"""The panel as it stands, for a page without a kernel: one SVG drawn by hand, a table, and plain text."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from workbench.drawing import BLUE, GREEN, GREY, PURPLE, VERMILLION, log_ticks, ticks
from workbench.panel.headline import Tile, sentence
from workbench.panel.view import PARTS, Array, Curve, MemoryBar, View, byte_unit, corner
from workbench.runs.verdict import LIKELY, MET

WIDTH, HEIGHT = 960, 620
_INK, _SOFT, _GRID = "#222222", "#555555", "#dddddd"
_DASHES = {"solid": "", "dash": "7 4", "dot": "2 4"}
_PLOTS = {
    "memory": (96, 92, 360, 170),
    "trend": (560, 92, 340, 170),
    "latency": (96, 390, 360, 170),
    "runs": (560, 390, 340, 170),
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of the panel. Shows itself in any notebook viewer; `svg` and `html` may be written to files."""

    svg: str
    html: str
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}

    def __str__(self) -> str:
        return self.text


def snapshot(view: View, tiles: Sequence[Tile], title: str, words: str, text: str) -> Snapshot:
    """title: of the run; words: what limited it; text: the summary, for readers without pictures."""
    svg = draw(view)
    rows = "".join(
        f"<tr><th>{escape(tile.name)}</th><td>{escape(tile.value)}</td><td>{escape(tile.detail)}</td><td>{escape(tile.before)}</td></tr>"
        for tile in tiles
    )
    html = (
        f"<p><b>{escape(title)}</b><br>{escape(words)}</p>"
        f"{image(svg, sentence(tiles) or title)}<table><tbody>{rows}</tbody></table>"
    )
    return Snapshot(svg, html, text)


def image(svg: str, alt: str) -> str:
    """As an image with its data inside: pages that strip SVG elements and styles out of HTML still show it."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(alt)}" width="{WIDTH}" src="data:image/svg+xml;base64,{data}">'


def draw(view: View) -> str:
    """The four charts on a white card, so that they read the same on a dark page."""
    body = [_hatch(), f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>']
    body += _memory(view.memory) + _trend(view) + _latency(view) + _runs(view)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}">{"".join(body)}</svg>'
    )


@dataclass(frozen=True, slots=True)
class _Axes:
    """A plot's place on the card and its scales; `x` and `y` give pixels."""

    place: tuple[float, float, float, float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_x: bool = False

    def x(self, value: Any) -> Any:
        scale: Callable[[Any], Any] = np.log10 if self.log_x else np.asarray
        low, high = scale(self.x_range[0]), scale(self.x_range[1])
        return self.place[0] + (scale(value) - low) / (high - low) * self.place[2]

    def y(self, value: Any) -> Any:
        low, high = self.y_range
        return self.place[1] + self.place[3] - (np.asarray(value) - low) / (high - low) * self.place[3]

    def frame(self, x_label: str, y_format: Callable[[float], str] | None, y_label: str = "") -> list[str]:
        left, top, width, height = self.place
        bottom = top + height
        parts = []
        for value in (log_ticks if self.log_x else ticks)(*self.x_range):
            at = self.x(value)
            parts.append(
                f'<path d="M{at:.1f} {top}V{bottom}" stroke="{_GRID}"/>'
                + _label(f"{value:g}", at, bottom + 16, "middle")
            )
        for value in ticks(*self.y_range) if y_format else []:
            at = self.y(value)
            assert y_format is not None
            parts.append(
                f'<path d="M{left} {at:.1f}h{width}" stroke="{_GRID}"/>'
                + _label(y_format(value), left - 6, at + 4, "end")
            )
        parts.append(f'<path d="M{left} {top}V{bottom}h{width}" fill="none" stroke="{GREY}"/>')
        parts.append(_label(x_label, left + width / 2, bottom + 34, "middle", _SOFT))
        if y_label:
            parts.append(_label(y_label, left - 6, top - 8, "end", _SOFT))
        return parts

    def line(self, x: Array, y: Array, colour: str, dash: str, width: float, *, step: bool = False) -> str:
        known = np.isfinite(x) & np.isfinite(y)
        if not known.any():
            return ""
        points = list(zip(self.x(x[known]).round(1).tolist(), self.y(y[known]).round(1).tolist(), strict=True))
        path = f"M{points[0][0]:g} {points[0][1]:g}"
        path += "".join(f"H{a:g}V{b:g}" if step else f"L{a:g} {b:g}" for a, b in points[1:])
        dashes = f' stroke-dasharray="{_DASHES[dash]}"' if _DASHES[dash] else ""
        return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _label(words: str, x: float, y: float, anchor: str = "start", colour: str = _INK, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{extra}>{escape(words)}</text>'


def _heading(name: str, title: str) -> str:
    left, top, _, _ = _PLOTS[name]
    return _label(title, left if name in ("trend", "runs") else 24, top - 60, extra=' font-size="14" font-weight="600"')


def _key(name: str, entries: Sequence[tuple[str, str]], row: int = 0) -> list[str]:
    """A legend: a drawn sample, then its name."""
    left, top, _, _ = _PLOTS[name]
    at: float = left if name in ("trend", "runs") else 24
    parts = []
    for sample, words in entries:
        parts.append(
            f'<g transform="translate({at:.0f} {top - 42 + 16 * row})">{sample}</g>'
            + _label(words, at + 28, top - 38 + 16 * row)
        )
        at += 40 + 6.6 * len(words)
    return parts


def _stroke(colour: str, dash: str = "solid", width: float = 2.5) -> str:
    dashes = f' stroke-dasharray="{_DASHES[dash]}"' if _DASHES[dash] else ""
    return f'<path d="M0 0h22" stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _hatch() -> str:
    def pattern(name: str, colour: str, path: str) -> str:
        return (
            f'<pattern id="{name}" width="8" height="8" patternUnits="userSpaceOnUse">'
            '<rect width="8" height="8" fill="#fff"/>'
            f'<path d="{path}" stroke="{colour}" stroke-width="1.4"/></pattern>'
        )

    slant = "M-2 2l4 -4M0 8l8 -8M6 10l4 -4"
    cross = slant + "M-2 6l4 4M0 0l8 8M6 -2l4 4"
    return f"<defs>{pattern('slant', GREEN, slant)}{pattern('cross', PURPLE, cross)}</defs>"


_FILLS = {"": None, "/": "url(#slant)", "x": "url(#cross)"}


def _fill(key: str, colour: str, pattern: str) -> str:
    return "#ffffff" if key == "free" else _FILLS[pattern] or colour


def _memory(bars: Sequence[MemoryBar]) -> list[str]:
    divisor, unit = byte_unit(max((bar.limit for bar in bars), default=0.0))
    most = max((bar.limit for bar in bars), default=divisor) / divisor
    axes = _Axes(_PLOTS["memory"], (0.0, most), (0.0, 1.0))
    samples = [
        (
            f'<rect y="-6" width="20" height="12" stroke="{p.colour}" fill="{_fill(p.key, p.colour, p.pattern)}"/>',
            p.label,
        )
        for p in PARTS
    ]
    parts = [_heading("memory", "Where the memory goes"), *_key("memory", samples[:3]), *_key("memory", samples[3:], 1)]
    parts += axes.frame(unit, None)
    height = min(44.0, 160.0 / max(len(bars), 1) - 12.0)
    for row, bar in enumerate(bars):
        y, x = axes.place[1] + 8 + row * (height + 12), 0.0
        parts.append(_label(bar.label, 88, y + height / 2 - 3, "end", extra=' font-weight="600"'))
        parts.append(_label(f"{bar.tokens:,}", 88, y + height / 2 + 11, "end", _SOFT))
        parts.append(_label("tokens fit", 88, y + height / 2 + 24, "end", _SOFT))
        for part in PARTS:
            size = bar.parts[part.key] / divisor
            left, right = axes.x(x), axes.x(x + size)
            parts.append(
                f'<rect x="{left:.1f}" y="{y:.1f}" width="{right - left:.1f}" height="{height:.1f}" '
                f'stroke="{part.colour}" '
                f'fill="{_fill(part.key, part.colour, part.pattern)}"/>'
            )
            if right - left > 34:
                colour = "#ffffff" if not part.pattern and part.key != "free" else _INK
                halo = ' paint-order="stroke" stroke="#ffffff" stroke-width="4"' if colour == _INK else ""
                parts.append(_label(f"{size:.3g}", (left + right) / 2, y + height / 2 + 4, "middle", colour, halo))
            x += size
    return parts


def _trend(view: View) -> list[str]:
    trend = view.trend
    end = float(trend.seconds[-1]) if len(trend.seconds) else 1.0
    axes = _Axes(_PLOTS["trend"], (0.0, end), (0.0, _top(trend.tokens_per_s)))
    counts = _Axes(_PLOTS["trend"], (0.0, end), (0.0, _top(trend.running, trend.waiting)))
    samples = [
        (_stroke(BLUE), "tokens/s"),
        (_stroke(GREEN, "dash"), "running"),
        (_stroke(VERMILLION, "dot"), "waiting"),
    ]
    parts = [_heading("trend", "Throughput, and who waits"), *_key("trend", samples)]
    parts += axes.frame("seconds since the run began", _mark, "tokens/s")
    left, top, width, _ = axes.place
    parts += [_label(f"{value:g}", left + width + 6, counts.y(value) + 4) for value in ticks(*counts.y_range)]
    parts.append(_label("requests", left + width + 42, top - 8, "end", _SOFT))
    parts.append(axes.line(trend.seconds, trend.tokens_per_s, BLUE, "solid", 2.2))
    parts.append(counts.line(trend.seconds, trend.running, GREEN, "dash", 1.6, step=True))
    parts.append(counts.line(trend.seconds, trend.waiting, VERMILLION, "dot", 1.8, step=True))
    return parts


def _latency(view: View) -> list[str]:
    curves: list[tuple[Curve, str, str, float]] = [
        (view.baseline_ttft, GREY, "solid", 1.2),
        (view.baseline_tpot, GREY, "dash", 1.2),
        (view.ttft, BLUE, "solid", 2.4),
        (view.tpot, VERMILLION, "dash", 2.4),
    ]
    bounds = [(bound, colour) for bound, colour in ((view.slo_ttft, BLUE), (view.slo_tpot, VERMILLION)) if bound]
    values = np.concatenate([*(curve.seconds for curve, *_ in curves), np.array([bound for bound, _ in bounds])])
    axes = _Axes(_PLOTS["latency"], _decades(values), (0.0, 100.0), log_x=True)
    samples = [
        (_stroke(BLUE), "TTFT"),
        (_stroke(VERMILLION, "dash"), "TPOT"),
        (_stroke(GREY, width=1.2), "baseline"),
        ('<path d="M11 -7v14" stroke="#222" stroke-dasharray="2 3" stroke-width="1.6"/>', "SLO"),
    ]
    parts = [_heading("latency", "Latency: requests done within"), *_key("latency", samples)]
    parts += axes.frame("seconds, log scale", lambda v: f"{v:.0f} %", "requests")
    for bound, colour in bounds:
        parts.append(axes.line(np.array([bound, bound]), np.array([0.0, 100.0]), colour, "dot", 1.6))
    for curve, colour, dash, width in curves:
        shown = curve.seconds > 0
        parts.append(axes.line(curve.seconds[shown], curve.percent[shown], colour, dash, width))
    return parts


def _runs(view: View) -> list[str]:
    shown = [point for point in view.points if point.ttft_p99 > 0]
    axes = _Axes(
        _PLOTS["runs"],
        _decades(np.array([p.ttft_p99 for p in shown])),
        (0.0, _top(np.array([p.tokens_per_s for p in shown]))),
        log_x=True,
    )
    marks = {
        MET: f'<circle cx="11" r="6" fill="{GREEN}"/>',
        LIKELY: f'<circle cx="11" r="5" fill="#fff" stroke="{GREEN}" stroke-width="2.5"/>',
    }
    missed = f'<path d="M6 -5l10 10M16 -5l-10 10" stroke="{VERMILLION}" stroke-width="3.5"/>'
    diamond = f'<path d="M11 -13l13 13l-13 13l-13 -13z" fill="none" stroke="{PURPLE}" stroke-width="2"/>'
    key = [
        (marks[MET], "SLO met"),
        (marks[LIKELY], "met so far"),
        (missed, "missed"),
        (f'<g transform="translate(5 0) scale(.6)">{diamond}</g>', "baseline"),
    ]
    parts = [_heading("runs", "Throughput against latency"), *_key("runs", key)]
    parts += axes.frame("TTFT p99 in seconds, log scale", _mark, "tokens/s")
    for point in shown:
        x, y = float(axes.x(point.ttft_p99)), float(axes.y(point.tokens_per_s))
        mark = marks.get(point.state, missed) + (diamond if point.is_baseline else "")
        down, to_right = corner(point.number)
        anchor = "start" if to_right > 0 else "end"
        number = _label(str(point.number), x + 11 * to_right, y + (18 if down > 0 else -8), anchor)
        parts.append(f'<g transform="translate({x - 11:.1f} {y:.1f})">{mark}</g>' + number)
    return parts


def _mark(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 1e-9 else f"{value:g}"


def _top(*columns: Array) -> float:
    """The upper end of an axis that begins at zero."""
    highest = max((float(np.nanmax(values)) for values in columns if np.isfinite(values).any()), default=0.0)
    return 1.08 * highest if highest > 0 else 1.0


def _decades(values: Array) -> tuple[float, float]:
    """The ends of a logarithmic axis around the positive `values`."""
    positive = values[values > 0]
    if not len(positive):
        return 0.01, 1.0
    return float(positive.min()) / 1.4, float(positive.max()) * 1.4
