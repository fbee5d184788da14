"""The course of a run in at most MAX_SAMPLES points, however long it lasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from engine.scheduling.batch import StepEvent

MAX_SAMPLES = 300
FIRST_WIDTH = 0.1

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class Sample:
    """One window that ends `t` seconds after the start; None where no step ran in it.

    running, waiting: requests, the highest in the window; kv_used: share of the blocks; hit_rate: of the prompts
    admitted in the window.
    """

    t: float
    tokens_per_s: float
    running: int | None
    waiting: int | None
    kv_used: float | None
    hit_rate: float | None


@dataclass(slots=True)
class _Window:
    tokens: float = 0.0
    running: int | None = None
    waiting: int | None = None
    kv_used: float | None = None
    query: int = 0
    hit: int = 0

    def merge(self, other: _Window) -> _Window:
        return _Window(
            self.tokens + other.tokens,
            _highest(self.running, other.running),
            _highest(self.waiting, other.waiting),
            _highest(self.kv_used, other.kv_used),
            self.query + other.query,
            self.hit + other.hit,
        )


class TimeSeries:
    """Windows of equal width from `start` on; when they grow too many, neighbours merge and the width doubles."""

    def __init__(self, start: float, width: float = FIRST_WIDTH) -> None:
        self.start = start
        self.width = width
        self._windows: list[_Window] = []
        self._end = start

    def add(self, event: StepEvent) -> None:
        """Spread a step's tokens evenly over its duration, so that one long step is not a spike between zeros."""
        begin, end = max(0.0, event.start - self.start), max(0.0, event.end - self.start)
        self._end = max(self._end, event.end)
        while end >= self.width * MAX_SAMPLES:
            self._halve()
        first, last = int(begin / self.width), int(end / self.width)
        while len(self._windows) <= last:
            self._windows.append(_Window())
        for index in range(first, last + 1):
            window = self._windows[index]
            overlap = min(end, (index + 1) * self.width) - max(begin, index * self.width)
            share = overlap / (end - begin) if end > begin else 1.0
            window.tokens += event.num_new_tokens * max(0.0, share)
            window.running = _highest(window.running, event.num_running)
            window.waiting = _highest(window.waiting, event.num_waiting)
            used = event.blocks_used / event.blocks_total if event.blocks_total else None
            window.kv_used = _highest(window.kv_used, used)
        self._windows[last].query += event.query_tokens
        self._windows[last].hit += event.hit_tokens

    def copy(self) -> TimeSeries:
        other = TimeSeries(self.start, self.width)
        other._windows = [window.merge(_Window()) for window in self._windows]
        other._end = self._end
        return other

    def samples(self) -> tuple[Sample, ...]:
        """The last window counts only the time that has passed in it."""
        elapsed = self._end - self.start
        points = []
        for index, window in enumerate(self._windows):
            ends = min((index + 1) * self.width, elapsed)
            seconds = ends - index * self.width
            if seconds <= 0.0:
                continue
            rate = window.hit / window.query if window.query else None
            points.append(Sample(ends, window.tokens / seconds, window.running, window.waiting, window.kv_used, rate))
        return tuple(points)

    def _halve(self) -> None:
        windows = self._windows
        if len(windows) % 2:
            windows.append(_Window())
        self._windows = [a.merge(b) for a, b in zip(windows[::2], windows[1::2], strict=True)]
        self.width *= 2


def _highest(a: _Number | None, b: _Number | None) -> _Number | None:
    if a is None or b is None:
        return b if a is None else a
    return max(a, b)
