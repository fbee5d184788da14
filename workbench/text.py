"""Quantities as a person reads them; an absent one is a dash, never a zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ABSENT = "–"
_NOISE = 1e-9  # of adding up


def seconds(value: float | None) -> str:
    """Three digits in the unit that fits: 182 ms, 1.25 s."""
    if value is None:
        return ABSENT
    if abs(value) < 0.5e-9:  # the noise of adding up, or nothing
        return "0 s"
    if abs(value) < 0.9995e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if abs(value) < 0.9995 else f"{value:,.3g} s" if value < 999.5 else f"{value:,.0f} s"


def size(value: float | None) -> str:
    """Bytes in decimal units, as data sheets give them: 9.12 MB, 141 GB."""
    if value is None:
        return ABSENT
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} bytes"


def percent(share: float | None, digits: int = 0) -> str:
    """A share in 0..1 as per cent; near both ends a digit is kept, so that little does not look like nothing, nor
    nearly all like all."""
    if share is None:
        return ABSENT
    value = 100.0 * share
    if _NOISE < value < 0.05:
        return "<0.1 %"
    if 99.95 <= value < 100.0 - _NOISE:
        return ">99.9 %"
    if abs(value - round(value)) < _NOISE and round(value) in (0, 100):
        return f"{value:.0f} %"
    near = 0.0 < value < 9.95 or 99.0 < value < 100.0
    return f"{value:.{max(digits, int(near))}f} %"


def times(factor: float) -> str:
    """A ratio: x1.02, x0.0031, x1,230."""
    return f"x{factor:.2f}" if 0.0995 <= factor < 99.95 else f"x{factor:,.0f}" if factor >= 1.0 else f"x{factor:.2g}"


def number(value: float | None) -> str:
    """Three digits or the whole number: 0.123, 12.3, 1,240."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if abs(value) >= 99.95 or value == int(value) else f"{value:.3g}"


def count(value: int, noun: str) -> str:
    """1 request, 2 requests."""
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns under their names: the first two to the left, figures to the right."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}

    def line(values: Mapping[str, str]) -> str:
        padded = [
            value.ljust(widths[name]) if i < 2 else value.rjust(widths[name])
            for i, (name, value) in enumerate(values.items())
        ]
        return "  ".join(padded).rstrip()

    head = line({name: name for name in rows[0]})
    return "\n".join([head, "-" * len(head), *(line(row) for row in rows)])
