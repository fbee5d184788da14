"""A pooled sample of times: percentiles, an interval for the highest, and a curve to draw.

p50 and p95 are interpolated; the p99 is a value that occurred, the least that 99 of 100 do not exceed: it lies within
its interval, and meets a bound just when 99 of 100 requests do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import numpy as np

ENOUGH_FOR_P99 = 300
MAX_POINTS = 200


@dataclass(frozen=True, slots=True)
class Distribution:
    """A pooled sample in seconds.

    p99_low, p99_high: 95 % interval of the p99 from order statistics, without an assumption about the shape; None is
        unbounded on that side (below 299 independent values no upper bound exists), and both are None where the values
        are not independent (ITL).
    values, fractions: the empirical distribution function at no more than MAX_POINTS values, for charts.
    """

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    p99_low: float | None
    p99_high: float | None
    values: tuple[float, ...] = field(repr=False)
    fractions: tuple[float, ...] = field(repr=False)

    @property
    def enough_for_p99(self) -> bool:
        return self.count >= ENOUGH_FOR_P99

    @classmethod
    def of(cls, sample: Sequence[float], *, independent: bool = True) -> Distribution | None:
        """None for an empty sample."""
        if not sample:
            return None
        ordered = np.sort(np.asarray(sample, dtype=np.float64))
        n = len(ordered)
        low, high = p99_bounds(n) if independent else (None, None)
        p50, p95 = (float(value) for value in np.quantile(ordered, (0.5, 0.95)))
        kept = np.unique(np.linspace(0, n - 1, min(n, MAX_POINTS)).round().astype(int))
        return cls(
            count=n,
            mean=float(ordered.mean()),
            p50=p50,
            p95=p95,
            p99=float(ordered[-1 - n // 100]),
            p99_low=None if low is None else float(ordered[low]),
            p99_high=None if high is None else float(ordered[high]),
            values=tuple(ordered[kept].tolist()),
            fractions=tuple(((kept + 1) / n).tolist()),
        )


@lru_cache(maxsize=64)
def p99_bounds(n: int, level: float = 0.95) -> tuple[int | None, int | None]:
    """Indices (from 0, ascending order) of the values that enclose the true p99 with probability >= `level`.

    The number of values above the p99 is binomial(n, 0.01), whatever the distribution (David and Nagaraja, Order
    Statistics, 2003, section 7.1). The two tails share 1 - level equally where they can; a sample too small for an
    upper bound at its share takes more of it, and when even all of it is too little the interval is open above.
    """
    tail = 1.0 - level
    p = 0.01
    centre, spread = n * p, 10.0 * math.sqrt(n * p) + 10.0  # beyond ten standard deviations nothing counts
    above = range(max(0, int(centre - spread)), min(n, int(centre + spread)) + 1)
    pmf = [math.exp(_log_choose(n, k) + k * math.log(p) + (n - k) * math.log1p(-p)) for k in above]
    at_most = list(accumulate(pmf))  # P(k values above the p99, or fewer): value n-1-k then lies below it
    budget = max(tail / 2, at_most[0]) if at_most[0] <= tail else 0.0
    missing = [(k, miss) for k, miss in zip(above, at_most, strict=True) if miss <= budget]
    high, upper_miss = (n - 1 - missing[-1][0], missing[-1][1]) if missing else (None, 0.0)
    enough = (k for k, below in zip(above, at_most, strict=True) if 1.0 - below <= tail - upper_miss)
    low = n - 1 - next(enough, n)
    return (low if low >= 0 else None), high


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
