"""The sentences: the right cause for what the engine did, with the numbers that were measured."""

import math
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from workbench import Session, Workload
from workbench.runs.explain import change_sentence, limiting_sentence
from workbench.runs.metrics import SLO, MetricsCollector

CONFIG = EngineConfig(model="synthetic:0.5b", runner="simulated", gpu="l4", max_batch_size=8)
BURST = Workload(num_requests=40, rate=1e6, input_len=(16, 64), output_len=(8, 64))


@pytest.fixture(scope="module")
def session():
    with Session() as session:
        yield session


def sentence(session, workload=BURST, **changes):
    run = session.run(replace(CONFIG, **changes), workload, progress=False)
    assert run.status == "done", run.error
    return run.snapshot().sentence, run.metrics


def small_pool(session, tokens):
    """memory_limit that leaves room for so many tokens of KV, as the memory plan itself counts."""
    plan = session.run(replace(CONFIG, block_size=16), Workload(num_requests=1, rate=1.0), progress=False).memory
    blocks = -(-tokens // 16)
    return plan.weights_total + plan.workspace + int(blocks * plan.block_bytes / 0.8) + plan.block_bytes


def test_a_small_pool_is_named_with_its_preemptions(session):
    text, m = sentence(session, block_size=16, memory_limit=small_pool(session, 400), prefix_caching=False)
    assert m.num_preemptions > 0
    assert text.startswith("KV pool full in ")
    assert f": {m.num_preemptions:,} preemption" in text and f"{m.recomputed_tokens:,} tokens recomputed" in text
    assert "more tokens fit with KV int8 or a higher cache ratio." in text


def test_advice_is_what_is_left_to_do(session):
    m = replace(MetricsCollector(0.0, SLO()).metrics(), num_steps=10, num_preemptions=2, blocked_steps={"blocks": 5})
    assert "with KV int4." in limiting_sentence(m, replace(CONFIG, kv="int8", cache_ratio=0.95), BURST)
    assert "only in more memory." in limiting_sentence(m, replace(CONFIG, kv="int4", cache_ratio=0.95), BURST)
    assert "in 50 % of the steps" in limiting_sentence(m, CONFIG, BURST)


def test_a_full_batch(session):
    text, m = sentence(session)
    share = m.blocked_steps["batch size"] / m.num_steps
    assert f"Batch full (8 requests) in {100 * share:.0f} % of the steps" in text
    assert f"up to {m.peak_waiting} waited" in text


def test_a_policy_that_makes_requests_wait(session):
    text, m = sentence(session, batching="static")
    assert text.startswith("Static batching kept up to") and f"{100 * (1 - m.occupancy):.0f} %" in text


def test_a_small_token_budget(session):
    long = Workload(num_requests=40, rate=1e6, input_len=(200, 300), output_len=(2, 2))
    text, _ = sentence(session, long, max_batch_size=64, max_batched_tokens=64)
    assert text.startswith("Token budget of 64 per step used up in ")


def test_a_load_that_leaves_the_engine_idle(session):
    text, m = sentence(session, Workload(num_requests=5, rate=0.5, output_len=(4, 4)))
    assert m.busy < 0.5 and "the engine was idle" in text and "at 0.5 requests/s" in text


def test_a_closed_loop_that_never_fills_the_batch(session):
    text, _ = sentence(session, Workload(num_requests=20, concurrency=2))
    assert text.startswith("The load limited the run: 2 in flight made a mean batch of ")


def test_speed_itself(session):
    text, m = sentence(session, Workload(num_requests=8, rate=1e6, output_len=(64, 64)))
    assert text.startswith("The engine's speed limited the run: nobody waited") and m.busy > 0.99
    assert "omput" not in text, "a decode step is bound by the memory more often than by arithmetic"


def test_one_preemption_does_not_hide_a_batch_that_is_always_full():
    m = replace(
        MetricsCollector(0.0, SLO()).metrics(),
        num_steps=100,
        num_preemptions=1,
        blocked_steps={"blocks": 1, "batch size": 90},
    )
    assert limiting_sentence(m, CONFIG, BURST).startswith("Batch full (8 requests) in 90 % of the steps")
    rare = limiting_sentence(replace(m, blocked_steps={"blocks": 1}), CONFIG, BURST)
    assert rare.startswith("KV pool full in 1.0 % of the steps: 1 preemption,")


def test_nothing_computed():
    assert limiting_sentence(MetricsCollector(0.0, SLO()).metrics(), CONFIG, BURST) == "No step was computed."


def test_changes_come_first_then_ratios(session):
    before = session.run(CONFIG, BURST, progress=False)
    after = session.run(replace(CONFIG, weights="int4", batching="static"), replace(BURST, seed=3), progress=False)
    text = change_sentence(after.snapshot(), before.snapshot())
    knobs = f"Against run {before.id}: weights bf16 -> int4, batching continuous -> static, seed 0 -> 3; "
    assert text.startswith(knobs)
    assert f"weights x{after.memory.weights_total / before.memory.weights_total:.2f}" in text
    assert f"tokens/s x{after.metrics.tokens_per_s / before.metrics.tokens_per_s:.2f}" in text
    assert "perplexity" not in text
    other = session.run(CONFIG, replace(BURST, name="mine"), progress=False)
    assert f": workload {BURST.name} -> mine; " in change_sentence(other.snapshot(), before.snapshot())
    assert "nothing changed but the moment" in change_sentence(before.snapshot(), before.snapshot())


def test_changes_carry_units_and_the_names_of_the_knobs(session):
    before = session.run(CONFIG, BURST, progress=False)
    limit = replace(CONFIG, memory_limit=12 * 10**9)
    after = session.run(limit, replace(BURST, num_requests=10), SLO(ttft=0.25), progress=False)
    text = change_sentence(after.snapshot(), before.snapshot())
    assert ": memory_limit unset -> 12 GB, requests 40 -> 10, SLO TTFT 1 s -> 250 ms; " in text


def test_the_machine_changes_only_where_something_ran_on_it(session):
    before = session.run(CONFIG, BURST, progress=False).snapshot()
    all_at_once = replace(before, workload=replace(BURST, rate=math.inf))
    after = session.run(replace(CONFIG, gpu="h200"), replace(BURST, rate=8.0), progress=False).snapshot()
    real = replace(all_at_once, config=replace(CONFIG, runner="torch"))
    assert ": gpu l4 -> h200, rate all at once -> 8; " in change_sentence(after, all_at_once)
    assert ": runner torch -> simulated h200, rate all at once -> 8; " in change_sentence(after, real)
    assert ": runner torch -> simulated l4; " in change_sentence(all_at_once, real)


def test_a_failed_run_has_nothing_to_compare(session):
    failed = session.run(replace(CONFIG, gpu="abacus"), BURST, progress=False)
    done = session.run(CONFIG, BURST, progress=False)
    sentence = change_sentence(failed.snapshot(), done.snapshot())
    assert sentence == f"Against run {done.id}: gpu l4 -> abacus; nothing to compare yet."
