"""What is kept from step to step is what making it anew gives: block tables, sampling plans, where tokens come from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, RequestStatus
from engine.running.preparation import Preparation
from engine.running.readback import Readback
from engine.running.sampler import SamplingPlan
from engine.running.step_arrays import BlockTables, block_tables, feed_rows, prompt_arrays, step_arrays
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledBatch, ScheduledRequest
from kernels.tuning import TUNED_ROWS
from tests.unit.engine.support import make_request, make_scheduler

SIZE = 4


def held_by(request: Request, blocks: int, rng: random.Random) -> Request:
    request.block_ids += [rng.randrange(1, 1000) for _ in range(blocks)]
    return request


def test_kept_block_tables_are_those_made_anew() -> None:
    """Requests join, grow, leave, lose their blocks and come back in another order; sometimes more rows than ever."""
    rng = random.Random(0)
    tables = BlockTables()
    alive: list[Request] = []
    for number in range(600):
        for request in alive:
            if rng.random() < 0.3:
                request.block_ids.append(rng.randrange(1, 1000))
            if rng.random() < 0.02:  # preempted: other blocks
                request.num_preemptions += 1
                request.block_ids[:] = [rng.randrange(1, 1000) for _ in request.block_ids]
        if rng.random() < 0.2 and alive:
            alive.remove(rng.choice(alive))
        if rng.random() < 0.4 or number == 300:
            for _ in range(90 if number == 300 else 1):
                alive.insert(rng.randrange(len(alive) + 1), held_by(make_request("x", [1]), rng.randint(1, 3), rng))
        batch = [request for request in alive if rng.random() < 0.95]
        if not batch:
            continue
        items = [ScheduledRequest(request, len(request.block_ids) * SIZE - 1, 1) for request in batch]
        held = np.array([len(request.block_ids) for request in batch])
        assert np.array_equal(tables(items, held), block_tables(items, held))


def test_arrays_of_a_run_with_and_without_memory() -> None:
    scheduler = make_scheduler(num_blocks=24, max_batch_size=5, max_batched_tokens=16)
    for i in range(12):
        scheduler.add(make_request(str(i), range(i, i + 3 + 2 * i), max_tokens=6 + i))
    tables, mixed = BlockTables(), 0
    while scheduler.num_unfinished:
        batch = scheduler.schedule(0.0)
        if batch:
            kept = step_arrays(batch.items, len(batch.decodes), SIZE, tables)
            anew = step_arrays(batch.items, len(batch.decodes), SIZE)
            assert all(np.array_equal(kept[name], array) for name, array in anew.items())
            assert all(kept[name].dtype == array.dtype for name, array in anew.items())
            mixed += bool(batch.decodes and batch.prefills)
        tokens = [7 if item.samples else None for item in batch.items]
        scheduler.advance(batch)
        scheduler.complete(batch, tokens, 0.0)
        for request in list(scheduler.running):
            if request.num_output >= request.max_tokens:
                scheduler.finish(request, RequestStatus.LENGTH, 0.0)
    assert mixed > 3


@pytest.mark.parametrize("start, num_new", [(0, 1), (0, 4), (0, 13), (3, 1), (4, 4), (7, 9), (12, 8)])
@pytest.mark.parametrize("rest", [0, 2])
def test_a_prompt_alone_has_the_arrays_of_any_step(start: int, num_new: int, rest: int) -> None:
    request = held_by(make_request("a", range(50, 50 + start + num_new + rest)), 7, random.Random(start))
    item = ScheduledRequest(request, start, num_new)
    quick, any_step = prompt_arrays(item, SIZE), step_arrays([item], 0, SIZE)
    assert quick.keys() == any_step.keys()
    for name, array in any_step.items():
        assert np.array_equal(quick[name], array) and quick[name].dtype == array.dtype, name
    assert len(quick["rows"]) == (rest == 0)


def test_pending_tokens_are_fed_from_the_rows_of_the_step_before() -> None:
    requests = [make_request(name, [1, 2, 3]) for name in "abcd"]
    for request in requests[:3]:
        request.num_pending = 1
    requests[3].output_token_ids.append(9)
    decodes = [ScheduledRequest(request, 3, 1) for request in (requests[2], requests[3], requests[0])]
    chunk = ScheduledRequest(make_request("e", range(40, 50)), 2, 4)
    arrays = step_arrays([*decodes, chunk], 3, 16, lambda items, held: np.zeros((len(items), 1), np.int32))  # type: ignore[arg-type]
    assert arrays["tokens"].tolist() == [0, 9, 0, 42, 43, 44, 45]
    feed = feed_rows(decodes, 7, requests[:3], 100)
    assert feed is not None and feed.tolist() == [2, 101, 0, 103, 104, 105, 106]
    board = Readback(100, torch.float32, torch.device("cpu"))
    board.store(torch.tensor([70, 71, 72]), torch.zeros(3))
    fed = board.feed(torch.from_numpy(arrays["tokens"]), torch.from_numpy(feed))
    assert fed.tolist() == [72, 9, 70, 42, 43, 44, 45]
    assert feed_rows(decodes[1:2], 1, requests[:3], 100) is None, "the host knows that token"
    with pytest.raises(KeyError):
        feed_rows(decodes, 7, requests[:1], 100)  # nobody sampled for c


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5, "min_p": 0.1}])
def test_a_plan_carried_on_is_the_plan_made_anew(params: dict[str, Any]) -> None:
    requests = [
        Request(str(i), [1] * (i + 2), SamplingParams(**(params if i % 2 else {})), 0.0, 0.0, seed=i) for i in range(6)
    ]
    plan = SamplingPlan({})
    for _ in range(4):
        plan = plan.next(requests, np.array([request.num_tokens for request in requests]), 50)
        anew = SamplingPlan.of(requests, 50)
        assert plan.arrays.keys() == anew.arrays.keys()
        assert all(np.array_equal(plan.arrays[name], array) for name, array in anew.arrays.items())
        assert (plan.max_top_k, plan.top_p, plan.min_p) == (anew.max_top_k, anew.top_p, anew.min_p)
        for request in requests:
            request.output_token_ids.append(3)
        requests = requests[1:] if len(requests) == 6 else requests


def test_a_prepared_step_names_who_samples() -> None:
    prepare = Preparation(SIZE, 50, 8)
    whole, chunk = make_request("a", range(5)), make_request("b", range(9))
    for request in (whole, chunk):
        request.block_ids += [1, 2, 3]
    step = prepare(ScheduledBatch(prefills=[ScheduledRequest(chunk, 0, 4), ScheduledRequest(whole, 0, 5)]))
    assert step.samples == [False, True] and step.sampled == [whole] and "feed" not in step.arrays
    whole.num_computed, whole.num_pending = 5, 1
    step = prepare(ScheduledBatch(decodes=[ScheduledRequest(whole, 5, 1)]))
    assert step.samples is None and step.arrays["feed"].tolist() == [0]


def test_results_come_back_from_two_steps_at_once() -> None:
    board = Readback(4, torch.bfloat16, torch.device("cpu"))
    slots = []
    for number in (1, 2):
        slots.append(board.take())
        slots[-1].begin()
        board.store(torch.tensor([number, 10 * number]), torch.tensor([0.5, float("nan")], dtype=torch.bfloat16))
        slots[-1].fetch(board.buffer)
    for number, slot in zip((1, 2), slots, strict=True):
        assert slot.wait() is None, "a CPU has no device time of its own"
        assert slot.tokens(2) == [number, 10 * number]
        assert slot.finite(2).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_that_are_not_finite_are_told_by_their_bits(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, 1.5, limits.max, limits.min, limits.tiny, -limits.tiny / 2]
    values += [float("inf"), -float("inf"), float("nan"), -float("nan")]
    board = Readback(len(values), dtype, torch.device("cpu"))
    highest = torch.tensor(values, dtype=dtype)
    board.store(torch.zeros(len(values), dtype=torch.int64), highest)
    slot = board.take()
    slot.fetch(board.buffer)
    assert slot.finite(len(values)).tolist() == highest.isfinite().tolist() == [True] * 7 + [False] * 4


@pytest.mark.parametrize("longest, budget, batch", [(2048, 2048, 8), (300, 2048, 8), (2048, 700, 8), (100, 2048, 4)])
def test_warm_up_meets_what_is_tuned_for_any_step(longest: int, budget: int, batch: int) -> None:
    """Whatever number of tokens a step has, one was computed before that reads the same tuned entry."""
    config = EngineConfig(
        model="synthetic:tiny", device="cpu", memory_limit=64 << 20, session_len=longest, max_batched_tokens=budget,
        max_batch_size=batch,
    )  # fmt: skip
    with Engine(config) as engine:
        shapes = engine.runner._prompt_shapes()  # type: ignore[attr-defined]
    most = min(budget + batch, batch * longest)  # requests that decode ride along
    assert all(length <= longest and count <= batch and count * length <= most for count, length in shapes)

    def entry(tokens: int) -> int:
        return sum(tokens > rows for rows in TUNED_ROWS)

    met = {entry(count * length) for count, length in shapes}
    assert {entry(tokens) for tokens in range(9, most + 1)} <= met


@pytest.mark.parametrize(("kv", "impl"), [("bf16", "torch"), ("int8", "auto")])
def test_a_warm_up_step_writes_nothing(kv: str, impl: str) -> None:
    config = EngineConfig(model="synthetic:tiny", device="cpu", impl=impl, kv=kv, memory_limit=32 << 20)
    with Engine(config) as engine:
        runner: Any = engine.runner
        want = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))[0].token_ids
        before = [layer.key.clone() for layer in runner._kv]
        shapes = runner._prompt_shapes()
        assert {(1, 1), (2, 1), (4, 1), (1, 16), (1, 2048)} <= set(shapes) and max(map(max, shapes)) == 2048
        with torch.inference_mode():
            for count, length in [(4, 1), (1, 64), (3, 20)]:
                runner._compute_inert(count, length)
        assert all(torch.equal(layer.key, kept) for layer, kept in zip(runner._kv, before, strict=True))
        assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))[0].token_ids == want
