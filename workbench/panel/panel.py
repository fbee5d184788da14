"""The panel: knobs on the left, what they do on the right, live, on an engine in the same process.

Threads: the session's thread runs the engine; one thread of the panel's own, alive only while there is something to do,
ticks a few times a second and draws. What a button or a knob calls puts a word in a queue and returns, on whatever
thread the kernel calls it. What people call from code takes its turn with the ticking thread: nobody begins a run, or
draws, in the middle of another's tick.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, ConfigError, RequestError
from workbench.panel import headline
from workbench.panel.controls import Controls
from workbench.panel.forecast import predicted_plan
from workbench.panel.knobs import config_from, slo_from, workload_from
from workbench.panel.screen import Screen
from workbench.panel.snapshot import Snapshot, snapshot
from workbench.panel.view import View, view_of
from workbench.runs.explain import change_sentence
from workbench.runs.session import Session, SessionBusy

if TYPE_CHECKING:
    import pandas

    from engine.running.memory import MemoryPlan
    from workbench.runs.run import Run
    from workbench.runs.run_snapshot import RunSnapshot

TICK = 0.22
SLOW = 1.0
SPOKEN = 2.0
UNDERSTOOD = (ConfigError, CheckpointError, RequestError, SessionBusy, OSError)


class Workbench:
    """The panel; the last expression of a cell shows it. Keywords turn knobs: `Workbench(weights="int4", rate=4)`.

    run, stop, keep_baseline: what the buttons do. runs: a DataFrame, which the link beside the buttons saves as CSV.
    summary(): text. snapshot(): static, for a page without a kernel. close(): frees the engine and the model.
    threaded=False leaves the ticking to the caller.
    """

    def __init__(self, *, threaded: bool = True, **knobs: Any) -> None:
        self.controls = Controls(knobs)
        self.controls.on_move = lambda: self._ask(self._predict)
        self.session = Session()
        self._threaded = threaded
        self._asked: deque[Callable[[], None]] = deque()
        self._turn = threading.RLock()
        self._guard = threading.Lock()  # of `_ticker`; never held while waiting for a turn
        self._ticker: threading.Thread | None = None
        self._lent = self._closed = False
        self._run: Run | None = None
        self._shown: RunSnapshot | None = None
        self._baseline: RunSnapshot | None = None
        self._plan: MemoryPlan | None = None
        self._drawn_slow = self._spoken_at = 0.0
        self._screen: Screen | None = None

    # What people call

    def run(self, *, blocking: bool = False, **knobs: Any) -> Run:
        """Turn `knobs`, then start a run; returns at once, or with `blocking` when the run is over.

        ConfigError for a value outside its range. An interrupt of a blocking run stops it and is passed on.
        """
        if knobs:
            self.controls.set(**knobs)
        if not blocking:
            with self._turn:
                run = self._begin()
            self._wake()
            return run
        self._lent = True  # this thread ticks now, and no other
        try:
            if self.session.active is None:
                self._join()  # its last tick shows the run before
            with self._turn:
                run = self._begin()
            while not run.wait(TICK):
                self.tick()
        except KeyboardInterrupt:
            self.session.stop()
            raise
        finally:
            try:
                self.tick()
            finally:  # interrupted once more: the run has not ended yet, and somebody must follow it
                self._lent = False
                if self._asked or self._is_running:
                    self._wake()
        return run

    def stop(self) -> None:
        """Ask the run in progress to end after the step it is in; returns at once."""
        if self._run is not None:
            self._run.stop()

    def keep_baseline(self) -> None:
        """Keep the latest finished run that measured something to compare the next ones with."""
        measured = self._comparable
        if not measured:
            raise ConfigError("there is no finished run to keep as baseline yet: run first")
        with self._turn:
            self._follow()
            self._baseline = measured[-1]
            self._draw(slow=True)

    def set(self, **knobs: Any) -> None:
        """Turn knobs from code; names and ranges are checked."""
        self.controls.set(**knobs)
        self._ask(self._predict)

    @property
    def runs(self) -> pandas.DataFrame:
        """All runs of this panel, one row each."""
        return self.session.frame()

    def summary(self) -> str:
        """The latest run, and how it compares with the baseline, as text; before a run what the plan says."""
        if self._run is None:
            return f"no run yet · {headline.sentence(self._tiles()) or 'the memory plan needs the model loaded'}"
        lines = [self._run.summary()]
        if self._baseline is not None and self._baseline.id != self._run.id and not self._run.error:
            lines.append(change_sentence(self._run.snapshot(), self._baseline))
        return "\n".join(lines)

    def snapshot(self) -> Snapshot:
        """The panel as it stands, without anything live in it."""
        words = "The memory plan of the knobs as they are; Run measures the rest."
        with self._turn:
            try:
                if self._run is None and self._plan is None:
                    self._predict()
                self._follow()
            except UNDERSTOOD as problem:  # knobs that cannot be had: the panel is where they are mended
                words = str(problem)
            run, title = self._shown, "no run yet"
            if run is not None:
                title = f"run {run.id} · {run.label} · {run.workload.name}, {run.workload.arrivals_text}"
                words = self._sentence(run)
            return snapshot(self._view(), self._tiles(), title, words, self.summary())

    def close(self) -> None:
        """Stop what runs, join the threads, give back memory; a picture stays. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._join()
        self.session.close()
        self._asked.clear()
        self.tick()  # a run that was going on is over now
        if self._screen is not None:
            self._screen.close(self._view())

    @property
    def screen(self) -> Screen:
        """The widgets, built when first shown: a panel that only computes needs none of them."""
        if self._screen is None:
            self._screen = Screen(self.controls)
            for button, act in (
                (self._screen.run, self._begin),
                (self._screen.stop, self.stop),
                (self._screen.keep, self.keep_baseline),
            ):
                button.on_click(lambda _, act=act: self._ask(act))
            self._screen.status.observe(lambda _: self._ask(self._redraw), names="renders")
            self._ask(self._redraw)
        return self._screen

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = dict(self.screen.root._repr_mimebundle_(**kwargs) or {})
        still = self.snapshot()
        return bundle | {"text/html": still.html, "text/plain": still.text}

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The ticking thread

    def tick(self) -> bool:
        """Do what was asked, show how the run goes; True while there is more to come."""
        with self._turn:
            try:
                while self._asked:
                    self._asked.popleft()()
                self._follow()
            except UNDERSTOOD as problem:
                self._complain(str(problem))
            except Exception as problem:  # an error in a callback would vanish otherwise
                self._complain(f"{type(problem).__name__}: {problem}")
            return bool(self._asked) or self._is_running

    def _ask(self, act: Callable[[], object]) -> None:
        self._asked.append(lambda: (act(), None)[1])
        self._wake()

    def _wake(self) -> None:
        """See that somebody ticks."""
        with self._guard:
            if not self._threaded or self._lent or self._closed or self._ticker is not None:
                return
            self._ticker = threading.Thread(target=self._keep_ticking, name="inferlab-panel", daemon=True)
            self._ticker.start()

    def _keep_ticking(self) -> None:
        """Until there is nothing to show; pauses grow with what drawing takes, which stays below half the time."""
        while True:
            began = time.perf_counter()
            more = self.tick()
            with self._guard:
                if self._closed or not (more or self._asked):
                    self._ticker = None
                    return
            if not self._asked:
                time.sleep(max(TICK, time.perf_counter() - began))

    def _join(self) -> None:
        ticker = self._ticker
        if ticker is not None and ticker is not threading.current_thread():
            ticker.join()

    # Only whose turn it is comes here

    def _begin(self) -> Run:
        values = self.controls.values()
        self._run = self.session.start(config_from(values), workload_from(values), slo_from(values))
        self._shown = None
        self._drawn_slow = self._spoken_at = 0.0
        if self._screen is not None:
            self._screen.busy(True)
        return self._run

    def _predict(self) -> None:
        """What the memory would hold with the knobs as they are; during a run the screen belongs to the run."""
        if self._is_running:
            return
        self._plan = None
        try:
            self._plan = predicted_plan(config_from(self.controls.values()))
        except UNDERSTOOD:
            if self._screen is not None:
                self._screen.step(0.0, "No next run with the knobs as they are.")
            raise
        finally:
            if self._screen is not None:
                self._screen.charts.show(self._view())
                if self._run is None:
                    self._screen.tiles.value = headline.tiles_html(self._tiles())
        if self._screen is not None:
            self._screen.forecast(self._plan)
            if self._screen.alert.text:
                self._screen.say("")

    @property
    def _finished(self) -> list[RunSnapshot]:
        """As the session has them, so that none is missed that ended between two ticks."""
        return [run.snapshot() for run in self.session.runs if run.is_over]

    @property
    def _comparable(self) -> list[RunSnapshot]:
        """What broke off in the middle measured another load than was asked for."""
        return [run for run in self._finished if run.metrics and not run.error]

    @property
    def _is_running(self) -> bool:
        """Until its end has been shown."""
        return self._run is not None and not (self._shown is not None and self._shown.is_over)

    def _follow(self) -> None:
        run = self._run
        if run is None or not self._is_running:
            return
        shown = run.snapshot()
        turned = self._shown is None or self._shown.status != shown.status
        if shown.is_over:
            self._plan = None
        self._shown = shown
        now = time.monotonic()
        try:
            self._draw(slow=shown.is_over or now - self._drawn_slow > SLOW)
            if shown.is_over and self._screen is not None:
                self._screen.offer(self.runs.to_csv())
        finally:  # whatever becomes of the picture, a next run must be possible
            if shown.is_over and self._screen is not None:
                self._screen.busy(False, can_keep=bool(self._comparable))
        if turned or now - self._spoken_at > SPOKEN:
            self._spoken_at = now
            self._speak(shown)

    def _draw(self, *, slow: bool) -> None:
        if self._screen is None:
            return
        self._screen.show(self._view(), self._tiles(), self._shown, slow=slow)
        if self._plan is not None and not self._is_running:  # a knob was turned after the run that is shown
            self._screen.forecast(self._plan)
        if slow:
            self._drawn_slow = time.monotonic()
            if self._run is not None:
                self._screen.show_sample(self._run)

    def _redraw(self) -> None:
        """Everything anew: the browser has just built the charts, the first time or again."""
        if self._screen is not None:
            self._screen.charts.forget()
        self._draw(slow=True)
        if self._run is None:
            self._predict()

    def _speak(self, run: RunSnapshot) -> None:
        if self._screen is None:
            return
        if run.error:
            self._screen.complain(run.error)
        else:
            self._screen.say(self._sentence(run), headline.sentence(self._tiles()) if run.is_over else "")

    def _complain(self, sentence: str) -> None:
        if self._screen is not None:
            self._screen.complain(sentence)

    def _sentence(self, run: RunSnapshot) -> str:
        if not run.is_over:
            return run.sentence if run.metrics and run.metrics.num_steps else f"{run.phase.capitalize()} …"
        if self._other_baseline is None or run.error:
            return run.sentence
        return f"{run.sentence} {change_sentence(run, self._other_baseline)}"

    @property
    def _other_baseline(self) -> RunSnapshot | None:
        """The baseline, unless it is the run itself that is shown."""
        kept, shown = self._baseline, self._shown
        return kept if kept is not None and (shown is None or kept.id != shown.id) else None

    def _tiles(self) -> list[headline.Tile]:
        run = self._shown
        return headline.tiles(run, (run.memory if run else None) or self._plan, self._other_baseline)

    def _view(self) -> View:
        runs, shown = self._finished, self._shown
        if shown is not None and not shown.is_over:
            runs = [*(run for run in runs if run.id != shown.id), shown]
        return view_of(shown, self._plan, runs, self._baseline)
