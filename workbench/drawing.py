"""What every drawing here shares, made by plotly or by hand: colours, and where ticks stand."""

from __future__ import annotations

import math

# Okabe and Ito, "Color Universal Design" (2008): the members with about 3:1 contrast or more on white and on black.
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#808080"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most about `most`."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each decade, thinned to the decades where there are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 300 else (1,)
    return [value for decade in decades for factor in factors if low <= (value := factor * 10.0**decade) <= high]
