"""Runs workloads on engines, one after another, and keeps what can be used again."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tqdm.auto import tqdm

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, RequestError
from workbench.quality import Perplexity, perplexity
from workbench.runs.driver import LoadDriver
from workbench.runs.metrics import SLO
from workbench.runs.neighbours import ProcessorTimes
from workbench.runs.run import Run
from workbench.runs.run_snapshot import Status
from workbench.runs.workload import WorkItem, Workload

if TYPE_CHECKING:
    import pandas

    from engine.engine import Engine
    from engine.loading.loader import LoadedModel
    from engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
UNDERSTOOD = (ConfigError, CheckpointError, RequestError, OSError)
WARM_UP_REQUESTS = 4
WARM_UP_TOKENS = 4
THREAD_NAME = "inferlab-run-"


class SessionBusy(RuntimeError):
    """A session drives one run at a time."""


class Session:
    """Experiments on one machine, one run at a time; a context manager.

    `run` blocks, `start` returns at once; both give a Run, kept in `runs`. The model stays loaded between runs, and so
    does the engine while its config is unchanged (its prefix cache is emptied, so that runs do not help each other).
    A run that cannot be made ends as "failed" with one sentence, and the session goes on.
    """

    def __init__(self, *, quality_tokens: int = 8192) -> None:
        """quality_tokens: of held-out text that a perplexity is measured on."""
        self.runs: list[Run] = []
        self._quality_tokens = quality_tokens
        self._engine: Engine | None = None
        self._warm_for = 0  # tokens of the longest request that the engine was warmed up for
        self._warm_with: set[SamplingParams] = set()  # how they were sampled
        self._model: LoadedModel | None = None
        self._model_key: tuple[object, ...] = ()
        self._qualities: dict[tuple[object, ...], Perplexity] = {}
        self._lock = threading.Lock()
        self._active: Run | None = None
        self._thread: threading.Thread | None = None
        self._driver: threading.Thread | None = None
        self._closed = False

    @property
    def active(self) -> Run | None:
        """The run in progress, if any."""
        return self._active

    def run(
        self,
        config: EngineConfig | None = None,
        workload: Workload | str = "dialogue service",
        slo: SLO | None = None,
        *,
        label: str | None = None,
        quality: bool = False,
        progress: bool = True,
    ) -> Run:
        """Drive a run to its end in this thread, with a progress bar.

        quality: also measure the perplexity, once per combination of formats. An interrupt aborts the requests, keeps
        what was measured as a "stopped" run, and is passed on; the session stays usable.
        """
        run = self._admit(config, workload, slo, label)
        self._execute(run, quality=quality, progress=progress, polite=False)
        return run

    def start(
        self,
        config: EngineConfig | None = None,
        workload: Workload | str = "dialogue service",
        slo: SLO | None = None,
        *,
        label: str | None = None,
        quality: bool = False,
    ) -> Run:
        """Begin a run in a thread of its own and return at once; `run.snapshot()` tells how it goes."""
        run = self._admit(config, workload, slo, label)
        options = {"quality": quality, "progress": False, "polite": True}
        self._thread = threading.Thread(
            target=self._execute, args=(run,), kwargs=options, name=f"{THREAD_NAME}{run.id}", daemon=True
        )
        self._thread.start()
        return run

    def stop(self, timeout: float | None = None) -> bool:
        """Stop the run in progress and wait for its last step; True when nothing runs any more."""
        run, thread = self._active, self._thread
        if run is not None:
            run.stop()
            if self._driver is threading.current_thread():  # called from within the run: it ends after this step
                return False
            if not run.wait(timeout):
                return False
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
            return not thread.is_alive()
        return True

    def frame(self) -> pandas.DataFrame:
        """All runs as a table, one row each, indexed by the run's number."""
        import pandas

        rows = [run.row() for run in self.runs]
        return pandas.DataFrame(rows).set_index("run") if rows else pandas.DataFrame()

    def close(self) -> None:
        """Stop what runs, join its thread, and give all memory back; a second call does nothing."""
        with self._lock:
            self._closed = True
        self.stop()
        self._drop_engine()
        self._drop_model()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _admit(self, config: EngineConfig | None, workload: Workload | str, slo: SLO | None, label: str | None) -> Run:
        if isinstance(workload, str):
            workload = Workload.preset(workload)
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed; open a new one")
            if self._active is not None:
                raise SessionBusy(f"run {self._active.id} is still going on; stop it or wait for it first")
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join()  # of the run before, which is over
            run = Run(len(self.runs) + 1, config or EngineConfig(), workload, slo or SLO(), label)
            self.runs.append(run)
            self._active = run
        return run

    def _execute(self, run: Run, *, quality: bool, progress: bool, polite: bool) -> None:
        status: Status = "failed"
        error: str | None = None
        self._driver = threading.current_thread()
        try:
            self._measure(run, quality=quality, progress=progress, polite=polite)
            status = "stopped" if run.stop_requested.is_set() else "done"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        except InterruptedError:
            status = "stopped"
        except UNDERSTOOD as problem:
            error = _sentence(problem)
            self._drop_engine()
        except Exception as problem:  # the thread must not die in silence, whatever it meets
            error = f"{type(problem).__name__}: {_sentence(problem)}"
            run.traceback = traceback.format_exc()
            if not _out_of_memory(problem):
                logger.exception("run %d failed", run.id)
            self._drop_engine()
            self._drop_model()
        finally:
            if status == "stopped":
                run.note("stopped before its end: the figures cover the requests that had finished")
            with self._lock:  # first, so that whoever waited for the end can start the next run at once
                self._active = self._driver = None
            run.end(status, error)

    def _measure(self, run: Run, *, quality: bool, progress: bool, polite: bool) -> None:
        from engine.running.device import resolve_device  # here, because it imports torch

        engine = self._engine_for(run)
        items = work_items(engine, run.workload)
        if not isinstance(engine.clock, VirtualClock):
            self._warm_up(engine, run, items)
            if _others_run():
                run.note("another run was going on in this kernel when this one began: both are slower for it")
        begin = ProcessorTimes.now()
        with tqdm(total=len(items), disable=not progress, desc=run.label, unit="req") as bar:
            LoadDriver(engine, run, items, polite=polite).drive(bar.update)
        if not isinstance(engine.clock, VirtualClock) and resolve_device(run.config.device).type == "cpu":
            run.others = ProcessorTimes.now().others_since(begin)
        run.measured_memory = engine.measured_memory()
        if quality and not run.stop_requested.is_set():
            run.phase = "measuring perplexity"
            self._measure_quality(engine, run, progress)

    def _engine_for(self, run: Run) -> Engine:
        """The engine for this run's config: the one at hand, where it has the same and nothing is left in it."""
        from engine.engine import Engine  # here, because it imports torch
        from engine.loading.loader import load_model

        config = run.config
        # A simulated engine costs nothing to build, and a clock that starts at 0 makes its runs equal to the last bit.
        held = self._engine if config.runner != "simulated" else None
        if held is not None and held.config == config and not held.has_unfinished():
            held.reset_prefix_cache()
            run.note("engine reused from the run before, prefix cache emptied")
        else:
            self._drop_engine()
            key = (config.model, config.runner, config.seed, config.session_len)
            if self._model is not None and key != self._model_key:
                self._drop_model()
            if self._model is None:
                self._model, self._model_key = load_model(config), key
            if run.stop_requested.is_set():
                raise InterruptedError("stopped while the model was loaded")
            run.phase = "building the engine"
            self._engine, self._warm_for, self._warm_with = Engine(config, model=self._model), 0, set()
        engine = self._engine
        assert engine is not None
        run.description, run.memory, run.decode = engine.description, engine.memory, engine.tokenizer.decode
        run.is_synthetic = engine.model.is_synthetic or config.runner == "simulated"
        if run.is_synthetic:
            run.note("random weights or none: speed and memory count, text and quality do not")
        return engine

    def _warm_up(self, engine: Engine, run: Run, items: Sequence[WorkItem]) -> None:
        """First steps allocate, compile and tune; they are not part of what is measured. An engine that has served
        requests as long, and sampled alike, is warm."""
        longest = max(len(item.prompt_token_ids) + item.params.max_tokens for item in items)
        ways = {_sampled_like(item.params) for item in items}
        if (longest <= self._warm_for and ways <= self._warm_with) or run.stop_requested.is_set():
            return
        run.phase = "warming up"
        engine.warm_up(longest, list(ways))
        chosen = items[:WARM_UP_REQUESTS]
        engine.generate([item.prompt_token_ids for item in chosen], [_sampled_like(item.params) for item in chosen])
        engine.reset_prefix_cache()
        self._warm_for, self._warm_with = max(longest, self._warm_for), self._warm_with | ways
        run.note(f"warmed up with {len(chosen)} unmeasured requests of {WARM_UP_TOKENS} tokens")

    def _measure_quality(self, engine: Engine, run: Run, progress: bool) -> None:
        if run.is_synthetic:
            return
        c = run.config
        key = (c.model, c.weights, c.group_size, c.kv, c.kv_repair, c.device, c.impl, c.session_len)
        if key not in self._qualities:
            try:
                self._qualities[key] = perplexity(
                    engine, max_tokens=self._quality_tokens, progress=progress, stopped=run.stop_requested.is_set
                )
            except InterruptedError:
                return
            finally:
                engine.reset_prefix_cache()
        run.perplexity = self._qualities[key]

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _drop_model(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None


def work_items(engine: Engine, workload: Workload) -> list[WorkItem]:
    """The workload for this engine: held-out Python for the bundled model, random token ids for any other."""
    text = None
    if engine.config.model == "bundled" and not workload.prompts:
        from engine.bundled import heldout_text

        text = heldout_text()
    return workload.requests(
        vocab_size=engine.spec.vocab_size,
        session_len=engine.session_len,
        encode=engine.tokenizer.encode,
        text=text,
        avoid=engine.spec.eos_token_ids,
    )


def _sampled_like(params: SamplingParams) -> SamplingParams:
    """A short request that takes the same ways through the engine."""
    return replace(params, seed=0, max_tokens=WARM_UP_TOKENS, ignore_eos=True, stop=(), stop_token_ids=())


def _others_run() -> bool:
    """Whether another session's thread computes: sessions do not know of each other, threads have names."""
    here = threading.current_thread()
    return any(thread.name.startswith(THREAD_NAME) and thread is not here for thread in threading.enumerate())


def _sentence(error: BaseException) -> str:
    """The first line of an error, or its name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
