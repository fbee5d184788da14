"""A session alive after every failure: interrupts, refusals, broken steps, a stop while loading, close."""

import threading
from dataclasses import replace

import pytest

from engine.engine import Engine
from engine.errors import RequestError
from engine.loading import loader
from tests.unit.workbench.support import CONFIG, ENDLESS, SHORT, TINY, started, tiny_load
from workbench import Session
from workbench.runs.driver import LoadDriver
from workbench.runs.metrics import SLO
from workbench.runs.run import Run


def test_a_stop_while_the_model_loads_ends_before_the_engine_is_built(session, monkeypatch):
    plain = loader.load_model

    def stopped(config):
        session.active.stop()
        return plain(config)

    with monkeypatch.context() as patch:
        patch.setattr(loader, "load_model", stopped)
        run = session.run(CONFIG, SHORT, progress=False)
    assert run.status == "stopped" and run.error is None and session._engine is None
    assert session.run(CONFIG, SHORT, progress=False).status == "done"


def test_an_interrupt_is_passed_on_and_the_session_stays_usable(session, monkeypatch):
    steps = 0
    plain = Run.on_step

    def interrupted(self, event):
        nonlocal steps
        steps += 1
        plain(self, event)
        if steps == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "on_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.run(CONFIG, SHORT, progress=False)
    assert session.runs[0].status == "stopped" and session.runs[0].metrics.num_steps == 30
    session._engine.check_integrity()
    assert not session._engine.has_unfinished()
    assert session.run(CONFIG, SHORT, progress=False).status == "done"


@pytest.mark.parametrize(
    ("config", "workload", "said"),
    [
        (replace(CONFIG, gpu="abacus"), SHORT, "gpu is 'abacus'; it must be one of"),
        (replace(CONFIG, memory_limit=1 << 20), SHORT, "memory_limit is 1.1 MB"),
        (replace(CONFIG, model="synthetic:9000b"), SHORT, "9000b"),
        (replace(CONFIG, model="nowhere"), SHORT, "model is 'nowhere'"),
        (replace(CONFIG, session_len=64), SHORT, "at most session_len (64)"),
    ],
)
def test_a_run_that_cannot_be_made_fails_with_one_sentence(session, config, workload, said):
    run = session.run(config, workload, progress=False)
    assert run.status == "failed" and said in run.error and "\n" not in run.error and run.traceback is None
    assert run.snapshot().sentence == run.error and run.error in run.summary()
    assert session.run(CONFIG, SHORT, progress=False).status == "done"


@pytest.mark.parametrize("problem", [RuntimeError("the wire is cut\nsecond line"), MemoryError()])
def test_a_failure_in_a_step_ends_only_the_run(session, monkeypatch, problem):
    def broken(self, event):
        raise problem

    with monkeypatch.context() as patch:
        patch.setattr(Run, "on_step", broken)
        run = session.start(CONFIG, SHORT)
        assert run.wait(60)
    assert run.status == "failed" and "\n" not in run.error
    assert run.error.startswith(type(problem).__name__) and "Traceback" in run.traceback
    assert session.run(CONFIG, SHORT, progress=False).status == "done"


def test_a_refused_request_does_not_hold_up_the_others(session, monkeypatch):
    plain = Engine.add_request

    def picky(self, prompt, *args, **kwargs):
        if len(prompt) % 2:
            raise RequestError("odd prompts are refused")
        return plain(self, prompt, *args, **kwargs)

    monkeypatch.setattr(Engine, "add_request", picky)
    run = session.run(CONFIG, replace(SHORT, rate=None, concurrency=2), progress=False)
    m = run.metrics
    assert run.status == "done" and m.num_rejected > 0 and m.num_finished + m.num_rejected == 20
    assert run.snapshot().finished == 20 and "a request was refused: odd prompts are refused" in run.notes


def test_an_interrupted_warm_up_is_made_up_for(session, monkeypatch):
    def interrupted(self, tokens, params):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "warm_up", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.run(TINY, tiny_load(8), progress=False)
    run = session.run(TINY, tiny_load(8), progress=False)
    assert any("warmed up with 4 unmeasured requests" in note for note in run.notes)


def test_what_a_second_interrupt_left_in_the_engine_is_not_measured(session, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    session.run(TINY, tiny_load(8), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(LoadDriver, "_finished", lambda self, output: interrupted(self))
        patch.setattr(LoadDriver, "_abort_rest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.run(TINY, tiny_load(8, num_requests=6, concurrency=6, output_len=(4, 64)), progress=False)
    m = session.run(TINY, tiny_load(8), progress=False).metrics
    assert (m.num_finished, m.output_tokens, m.peak_running) == (4, 16, 2)


@pytest.fixture
def failing(monkeypatch):
    """Engines in which the model has no answer for most requests."""
    from engine.errors import NonFiniteLogitsError
    from engine.running.simulated import SimulatedRunner

    plain = SimulatedRunner.launch

    def launch(self, batch):
        bad = [item.request.request_id for item in batch.prefills if int(item.request.request_id.split("-")[1]) % 4]
        if bad:
            raise NonFiniteLogitsError(bad)
        return plain(self, batch)

    monkeypatch.setattr(SimulatedRunner, "launch", launch)


def test_requests_that_failed_count_against_the_slo_and_are_told_once(session, failing):
    run = session.run(CONFIG, replace(SHORT, rate=None, concurrency=2), SLO(ttft=9.0, tpot=9.0), progress=False)
    m = run.metrics
    assert run.status == "done" and (m.num_finished, m.num_failed) == (5, 15)
    assert run.snapshot().finished == 20 and m.good_fraction == 0.25 and m.slo_met is False
    assert sum("a request failed" in note for note in run.notes) == 1
    assert "15 failed" in run.summary() and run.row()["num_failed"] == 15
    assert "\n  SLO         missed" in run.summary()


def test_close_stops_the_run_joins_its_thread_and_is_final():
    session = Session()
    run = started(session)
    session.close()
    session.close()
    assert run.status == "stopped" and not session._thread.is_alive()
    assert session._engine is None and session._model is None
    with pytest.raises(RuntimeError, match="closed"):
        session.start(CONFIG, SHORT)


def test_close_waits_for_a_blocking_run_in_another_thread():
    session = Session()
    thread = threading.Thread(target=session.run, args=(CONFIG, ENDLESS), kwargs={"progress": False}, daemon=True)
    thread.start()
    while session.active is None or not session.active.snapshot().finished:
        thread.join(0.01)
    session.close()
    assert session.runs[0].status == "stopped" and session.runs[0].error is None
    thread.join(timeout=60)
    assert not thread.is_alive()
