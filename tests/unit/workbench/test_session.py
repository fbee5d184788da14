"""Sessions on simulated GPUs: exact, repeatable, stoppable, and alive after every failure."""

import math
import threading
from dataclasses import replace

import pytest

from engine.clock import MonotonicClock
from engine.config import EngineConfig
from engine.engine import Engine
from tests.unit.workbench.support import CONFIG, SHORT, TINY, started, tiny_load
from workbench import Session, Workload
from workbench.quality import Perplexity
from workbench.runs.driver import LoadDriver
from workbench.runs.metrics import SLO
from workbench.runs.run import Run
from workbench.runs.session import SessionBusy, work_items


def test_a_run_is_exact_and_repeatable(session):
    first, second = (session.run(CONFIG, SHORT, progress=False) for _ in range(2))
    assert first.status == "done" and first.error is None
    assert first.metrics == second.metrics and first.samples == second.samples
    m = first.metrics
    assert m.num_finished == 20 and m.duration > 1.0 - 1e-9  # the last of them arrives after 20 / 20 seconds
    expected = sum(item.params.max_tokens for item in items_of(CONFIG, SHORT))
    assert m.output_tokens == expected and m.tokens_per_s == pytest.approx(expected / m.duration)


def items_of(config, workload):
    with Engine(config) as engine:
        return work_items(engine, workload)


def test_one_request_takes_what_the_cost_model_says(session):
    run = session.run(CONFIG, Workload(num_requests=1, concurrency=1, output_len=(5, 5)), progress=False)
    m = run.metrics
    assert m.num_steps == 5 and m.itl.count == 4
    assert m.latency.p50 == pytest.approx(m.step_s) and m.busy == pytest.approx(1.0)
    assert m.ttft.p50 + 4 * m.tpot.p50 == pytest.approx(m.latency.p50)
    assert m.host_s == pytest.approx(0.0, abs=1e-12)


def test_latency_counts_from_the_scheduled_arrival(session):
    """Two requests sent at the same moment through a batch of one: the second waits for all of the first."""
    one_by_one = replace(CONFIG, max_batch_size=1)
    burst = Workload(num_requests=2, rate=1e9, input_len=(16, 16), output_len=(4, 4))
    m = session.run(one_by_one, burst, progress=False).metrics
    assert m.num_steps == 8
    assert m.latency.values[1] == pytest.approx(m.step_s, rel=1e-6)
    assert m.ttft.values[1] > m.latency.values[0]


def test_a_closed_loop_keeps_its_concurrency(session):
    workload = Workload(num_requests=30, concurrency=3, output_len=(8, 8), input_len=(16, 16))
    m = session.run(CONFIG, workload, progress=False).metrics
    assert m.peak_batch == 3 and m.num_finished == 30 and m.peak_waiting == 0
    assert m.mean_batch == pytest.approx(3.0, rel=0.02)


def test_the_policies_do_what_they_are_for(session):
    burst = Workload(num_requests=64, rate=1e6, input_len=(8, 16), output_len=(2, 64))
    static, continuous = (
        session.run(replace(CONFIG, batching=name), burst, progress=False).metrics for name in ("static", "continuous")
    )
    assert static.occupancy < 0.8 < 1.0 == continuous.occupancy
    assert static.padding_waste > 0.2 > 0.0 == continuous.padding_waste
    assert continuous.tokens_per_s > 1.3 * static.tokens_per_s
    dynamic = session.run(replace(CONFIG, batching="dynamic", batch_window=0.5), SHORT, progress=False)
    assert dynamic.status == "done" and dynamic.metrics.num_finished == 20


def test_start_returns_at_once_and_reports_while_it_runs(session):
    run = started(session)
    snapshot = run.snapshot()
    assert snapshot.status == "running" and not snapshot.is_over and session.active is run
    assert 0 < snapshot.finished < snapshot.total == 5000
    assert snapshot.metrics.tokens_per_s > 0 and snapshot.samples and snapshot.memory.tokens_that_fit > 0
    assert snapshot.sentence.endswith(".")


def test_stop_ends_a_run_and_keeps_what_it_measured(session):
    run = started(session)
    assert session.stop(timeout=60)
    assert run.status == "stopped" and run.wait(0) and session.active is None
    assert 0 < run.metrics.num_finished < 5000
    assert "stopped before its end" in run.notes[-1]
    assert not session._engine.has_unfinished() and not session._engine.observers
    session._engine.check_integrity()
    again = session.run(CONFIG, SHORT, progress=False)
    assert again.status == "done" and again.metrics.num_finished == 20


def test_a_stop_does_not_hide_those_who_had_waited_too_long(session):
    """One answer at a time: the first comes at once, and everybody else is still in line when it is over."""
    run = Run(1, CONFIG, SHORT, SLO(ttft=0.05, tpot=9.0))
    burst = Workload(num_requests=8, rate=math.inf, input_len=(16, 16), output_len=(64, 64))
    with Engine(replace(CONFIG, max_batch_size=1)) as engine:
        LoadDriver(engine, run, work_items(engine, burst)).drive(run.stop)
        assert not engine.has_unfinished()
    run.end("stopped")
    m = run.metrics
    assert (m.num_finished, m.num_overdue, run.snapshot().finished) == (1, 7, 1)
    assert m.ttft.p99 < 0.05 and m.slo_met is False and m.good_fraction == 0.125
    assert "7 overdue at the stop" in run.summary() and run.row()["num_overdue"] == 7


class Idle:
    """An engine on the machine's clock with nothing to do: whoever drives it waits."""

    def __init__(self):
        self.clock = MonotonicClock()
        self.observers = []

    def next_wakeup(self):
        return None


def test_stop_also_ends_the_wait_for_an_arrival():
    run = Run(1, CONFIG, Workload(num_requests=1, rate=1e-6), SLO())
    items = SHORT.requests(vocab_size=9, session_len=999)[:1]
    driver = LoadDriver(Idle(), run, [replace(items[0], arrival=1e6)])
    thread = threading.Thread(target=driver.drive, daemon=True)
    thread.start()
    run.stop()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_one_run_at_a_time(session):
    run = started(session)
    with pytest.raises(SessionBusy, match="run 1 is still going on"):
        session.run(CONFIG, SHORT)
    assert len(session.runs) == 1 and not run.is_over


def test_a_second_run_reuses_the_model(session):
    session.run(CONFIG, SHORT, progress=False)
    model = session._model
    session.run(replace(CONFIG, weights="int4", kv="int8"), SHORT, progress=False)
    assert session._model is model
    session.run(replace(CONFIG, model="synthetic:1.5b"), SHORT, progress=False)
    assert session._model is not model


def test_on_this_machine_the_engine_is_warmed_up_reused_and_judged_once(session, monkeypatch):
    from workbench.runs import session as module

    judged = []

    def judge(engine, **options):
        judged.append(engine.config)
        return Perplexity.of([[-1.0], [-2.0]])

    monkeypatch.setattr(module, "perplexity", judge)
    config = EngineConfig(device="cpu", memory_limit=100 * 10**6)
    load = Workload(num_requests=4, concurrency=2, shared_len=32, input_len=(4, 8), output_len=(2, 4))
    first, second = (session.run(config, load, quality=True, progress=False) for _ in range(2))
    assert first.status == second.status == "done", first.error or second.error
    assert "warmed up with 4 unmeasured requests" in first.notes[0] and "engine reused" in second.notes[0]
    for run in (first, second):
        m = run.metrics
        assert m.num_finished == 4 and 0 < m.hit_rate < 0.8  # the first two found nothing in the cache
        assert m.output_tokens == sum(item.params.max_tokens for item in items_of(config, load))
        assert run.measured_memory["kv"] > 0 and run.memory.kv > 0 and not run.is_synthetic
        assert run.perplexity.value == pytest.approx(math.exp(1.5))
    assert first.metrics.hit_rate == second.metrics.hit_rate and len(judged) == 1
    third = session.run(replace(config, weights="int8"), load, quality=True, progress=False)
    assert third.memory.weights_total < first.memory.weights_total and len(judged) == 2


def test_an_engine_is_warmed_up_for_the_longest_load_that_it_serves(session, monkeypatch):
    lengths = []
    monkeypatch.setattr(Engine, "warm_up", lambda self, tokens, params: lengths.append(tokens))
    runs = [session.run(TINY, tiny_load(prompt), progress=False) for prompt in (8, 40, 8)]
    assert [run.status for run in runs] == ["done"] * 3
    assert lengths == [12, 44], "the second load is longer than what kernels and graphs were made for"


def test_an_engine_is_warmed_up_for_the_way_that_requests_are_sampled(session, monkeypatch):
    """A GPU captures other steps for them: in the middle of a run they would be somebody's latency."""
    seen = []
    monkeypatch.setattr(Engine, "warm_up", lambda self, tokens, params: seen.append([p.temperature for p in params]))
    loads = [replace(tiny_load(8), temperature=t) for t in (0.0, 0.8, 0.0, 0.8)]
    runs = [session.run(TINY, load, progress=False) for load in loads]
    assert [run.status for run in runs] == ["done"] * 4
    assert seen == [[0.0], [0.8]]


def test_a_run_beside_another_one_in_the_same_kernel_says_so(session):
    """A panel that was made anew while the old one computes: nobody sees the old one any more."""
    alone = session.run(TINY, tiny_load(8), progress=False)
    with Session() as unseen:
        started(unseen)
        beside = session.run(TINY, tiny_load(8), progress=False)
    again = session.run(TINY, tiny_load(8), progress=False)
    told = [any("another run was going on" in note for note in run.notes) for run in (alone, beside, again)]
    assert told == [False, True, False]


def test_the_table_has_one_row_per_run_and_no_zero_for_what_is_absent(session):
    session.run(CONFIG, SHORT, progress=False, label="mine")
    session.run(replace(CONFIG, gpu="abacus"), SHORT, progress=False)
    frame = session.frame()
    assert list(frame.index) == [1, 2] and list(frame["status"]) == ["done", "failed"]
    assert frame.loc[1, "label"] == "mine" and frame.loc[1, "tokens_per_s"] > 0
    assert frame.loc[2, ["tokens_per_s", "ttft_p99_s", "weights_bytes", "perplexity", "engine"]].isna().all()
    assert Session().frame().empty


def test_a_row_says_what_its_verdict_was_measured_on_and_against(session):
    load = Workload.preset("dialogue service", num_requests=300, rate=20.0)
    session.run(replace(CONFIG, memory_limit=20 * 10**9), load, SLO(ttft=0.5, tpot=0.2), progress=False)
    row = session.frame().loc[1]
    assert (row["slo_ttft_s"], row["slo_tpot_s"], row["memory_limit"]) == (0.5, 0.2, 20 * 10**9)
    assert row["engine"].startswith("simulated NVIDIA L4")
    assert row["ttft_p99_low_s"] <= row["ttft_p99_s"] <= row["ttft_p99_high_s"]


def test_the_summary_names_every_subject(session):
    text = session.run(CONFIG, SHORT, SLO(ttft=0.5, tpot=0.1), progress=False).summary()
    for word in ("engine", "workload", "memory", "SLO", "TTFT", "TPOT", "throughput", "cache", "batch", "limited by"):
        assert f"\n  {word} " in text
    assert "\n  SLO         met so far (p99 TTFT <= 500 ms, p99 TPOT <= 100 ms)\n" in text
    assert "20 are too few for a p99" in text and "text and quality do not" in text
    assert "quality     " not in text  # perplexity was not measured


def test_the_next_run_can_start_as_soon_as_one_is_over(session):
    for _ in range(20):
        assert session.start(CONFIG, Workload(num_requests=1, rate=1.0)).wait(60)


def test_readers_in_other_threads_see_whole_moments(session):
    """tokens and steps of a snapshot belong together: every step of this load makes one token."""
    run = session.start(CONFIG, Workload(num_requests=300, concurrency=1, input_len=(8, 8), output_len=(8, 8)))
    seen = []
    while not run.wait(0.001):
        metrics = run.metrics
        if metrics is not None:
            assert metrics.output_tokens == metrics.num_steps
            seen.append(metrics.num_steps)
    assert seen == sorted(seen) and run.metrics.output_tokens == 2400
