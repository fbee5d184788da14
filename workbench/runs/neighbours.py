"""What other programs took of the processor while a run was measured: without a GPU the engine waits for them."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from workbench import text

RARELY = 0.1
"""Share of the processor's time up to which other programs are not worth a word."""


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """Seconds of all cores since the machine began: all of them, those with nothing to do, and this process's."""

    total: float
    idle: float
    own: float

    @classmethod
    def now(cls) -> ProcessorTimes:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        parts = times._asdict()
        total = sum(seconds for name, seconds in parts.items() if not name.startswith("guest"))  # "user" holds these
        return cls(total, parts["idle"] + parts.get("iowait", 0.0), own.user + own.system)

    def others_since(self, begin: ProcessorTimes) -> float | None:
        """Share of the time since `begin` that other programs took, or on a virtual machine its host for others; None
        where too little time has passed to tell."""
        total = self.total - begin.total
        if total <= 0:
            return None
        busy = total - (self.idle - begin.idle)
        return min(1.0, max(0.0, busy - (self.own - begin.own)) / total)


def words(others: float | None) -> str:
    """Nothing where there is nothing to say; short, for a line that is cut where it is full."""
    if others is None or others <= RARELY:
        return ""
    return f"others took {text.percent(others)} of the CPU"
