"""Time as the engine sees it: the machine's, or a virtual one that only a cost model moves."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never run backwards. `wait_until` returns at once when the moment has passed."""

    def now(self) -> float: ...

    def wait_until(self, moment: float) -> None: ...


class MonotonicClock:
    """The machine's own clock (`time.perf_counter`)."""

    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        delay = moment - time.perf_counter()
        if delay > 0:
            time.sleep(delay)


class VirtualClock:
    """Stands still until it is told to move: simulated runs are exact, repeatable, and as fast as the host allows."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wait_until(self, moment: float) -> None:
        self._now = max(self._now, moment)

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"a clock cannot run backwards: {seconds = }")
        self._now += seconds
