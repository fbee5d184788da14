"""The load generator: sends a workload's requests when they are due, and steps the engine until none is left."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.clock import VirtualClock
from engine.errors import RequestError
from workbench.runs.workload import WorkItem

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.request import RequestOutput
    from workbench.runs.run import Run

YIELD_EVERY = 0.02
YIELD_FOR = 0.0001


class LoadDriver:
    """Drives one run on one engine, in the calling thread.

    Open loop: each request counts from its scheduled arrival, however late the engine gets to it. Closed loop: a
    request is sent when another ends. A stop takes effect before the next step, and ends a wait at once.
    polite: give the interpreter's lock away for a moment every YIELD_EVERY seconds, so that a notebook's kernel answers
    while a loop of short steps runs beside it; costs less than one per cent.
    """

    def __init__(self, engine: Engine, run: Run, items: Sequence[WorkItem], *, polite: bool = False) -> None:
        self._engine = engine
        self._clock = engine.clock
        self._run = run
        self._stop: threading.Event = run.stop_requested
        self._line = deque(items)
        self._room = run.workload.concurrency or len(items)
        self._in_flight: set[str] = set()
        self._polite = polite
        self._last_yield = time.perf_counter()
        self._start = 0.0

    def drive(self, on_finish: Callable[[], object] = lambda: None) -> None:
        """Until every request has ended or the run is stopped; `on_finish` is called once per ended request."""
        self._start = self._clock.now()
        self._run.begin(self._start)
        self._engine.observers.append(self._run.on_step)
        try:
            while (self._line or self._in_flight) and not self._stop.is_set():
                self._send_due(on_finish)
                moment = self._next_moment()
                if moment is not None:
                    self._wait_until(moment)
                    continue
                for output in self._engine.step():
                    if output.finished:
                        self._finished(output)
                        on_finish()
                self._give_way()
        finally:
            if self._run.on_step in self._engine.observers:
                self._engine.observers.remove(self._run.on_step)
            self._abort_rest()

    def _send_due(self, on_finish: Callable[[], object]) -> None:
        while self._line and len(self._in_flight) < self._room:
            arrival = self._line[0].arrival
            now = self._clock.now()
            if arrival is not None and self._start + arrival > now:
                return
            item = self._line.popleft()
            try:
                name = self._engine.add_request(
                    item.prompt_token_ids,
                    item.params,
                    scheduled_arrival=now if arrival is None else self._start + arrival,
                )
            except RequestError as error:
                self._run.on_reject(str(error))
                on_finish()
            else:
                self._in_flight.add(name)

    def _next_moment(self) -> float | None:
        """Until when there is nothing to compute; None when a step has work now."""
        wakeup = self._engine.next_wakeup() if self._in_flight else None
        if self._in_flight and wakeup is None:
            return None
        arrival = self._line[0].arrival if self._line else None
        moments = [wakeup, None if arrival is None else self._start + arrival]
        return min((moment for moment in moments if moment is not None), default=None)

    def _wait_until(self, moment: float) -> None:
        if isinstance(self._clock, VirtualClock):
            self._clock.wait_until(moment)
        else:
            self._stop.wait(max(0.0, moment - self._clock.now()))

    def _finished(self, output: RequestOutput) -> None:
        self._in_flight.discard(output.request_id)
        self._run.on_finish(output)

    def _give_way(self) -> None:
        if self._polite and time.perf_counter() - self._last_yield > YIELD_EVERY:
            time.sleep(YIELD_FOR)
            self._last_yield = time.perf_counter()

    def _abort_rest(self) -> None:
        """Leave the engine empty; of those who are aborted the run learns who had waited too long."""
        rest = {name for name in self._in_flight if self._engine.abort(name)}
        self._in_flight.clear()
        for output in self._engine.step() if rest else ():
            if output.finished and output.request_id in rest:
                self._run.on_finish(output)
