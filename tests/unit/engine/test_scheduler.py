"""One rule under a token budget: chunks, admission, batching policies, preemption."""

from __future__ import annotations

import pytest

from engine.request import Request, RequestStatus
from tests.unit.engine.support import SlotMemory, make_request, make_scheduler, run_step


def test_one_token_decodes_stand_before_prefill_chunks() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, max_batched_tokens=10, max_batch_size=4), SlotMemory(4)
    scheduler.add(make_request("a", range(4)))
    run_step(scheduler, memory)
    scheduler.add(make_request("b", range(20, 40)))
    batch = run_step(scheduler, memory)
    assert [(item.request.request_id, item.num_new) for item in batch.items] == [("a", 1), ("b", 10)]
    assert batch.items == [*batch.decodes, *batch.prefills]


def test_decodes_ride_along_with_prompts_that_fill_the_budget() -> None:
    """Else each one that begins would part the next prompt in two, and the last step be for the leftovers."""
    scheduler, memory = make_scheduler(num_blocks=64, max_batched_tokens=16, max_batch_size=8), SlotMemory(4)
    for number in range(8):
        scheduler.add(make_request(str(number), range(100 * number, 100 * number + 8), max_tokens=9))
    sizes = [[item.num_new for item in run_step(scheduler, memory).items] for _ in range(5)]
    assert sizes == [[8, 8], [1] * 2 + [8, 8], [1] * 4 + [8, 8], [1] * 6 + [8, 8], [1] * 8]


def test_a_budget_smaller_than_the_batch_lets_everybody_decode() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, max_batched_tokens=2, max_batch_size=5), SlotMemory(4)
    for number in range(5):
        scheduler.add(make_request(str(number), [number, 7], max_tokens=9))
    for _ in range(5):
        run_step(scheduler, memory)
    assert len(run_step(scheduler, memory).decodes) == 5


def test_a_long_prompt_ahead_keeps_nobody_from_decoding() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, max_batched_tokens=8), SlotMemory(4)
    scheduler.add(make_request("long", range(12)))
    scheduler.add(make_request("short", range(50, 54), max_tokens=9))
    run_step(scheduler, memory)  # 8 of the long one
    run_step(scheduler, memory)  # its 4 others, and the short one
    scheduler.add(make_request("next", range(100, 140), max_tokens=9))
    for _ in range(3):
        batch = run_step(scheduler, memory)
        assert "short" in [item.request.request_id for item in batch.decodes]
        assert [item.num_new for item in batch.prefills] == [8]


def test_decodes_stand_in_the_order_of_their_contexts_longest_first() -> None:
    """Of equal ones the older stands first; who runs how long is as before."""
    scheduler, memory = make_scheduler(num_blocks=64, max_batched_tokens=64), SlotMemory(4)
    for name, length in (("a", 3), ("b", 9), ("c", 5), ("d", 9)):
        scheduler.add(make_request(name, range(100, 100 + length), max_tokens=9))
    run_step(scheduler, memory)
    scheduler.add(make_request("e", range(300, 312), max_tokens=9))
    for last in ([], ["e"]):
        batch = run_step(scheduler, memory)
        assert [item.request.request_id for item in batch.decodes] == ["e"] * bool(last) + ["b", "d", "c", "a"]
    assert [request.request_id for request in scheduler.running] == ["a", "b", "c", "d", "e"]


def test_a_long_prompt_is_computed_in_chunks_and_samples_once() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, max_batched_tokens=16), SlotMemory(4)
    request = make_request("a", range(40))
    scheduler.add(request)
    chunks = [run_step(scheduler, memory).prefills[0] for _ in range(3)]
    assert [chunk.num_new for chunk in chunks] == [16, 16, 8]
    assert request.num_output == 1


def test_without_chunking_a_prompt_beyond_the_budget_goes_alone() -> None:
    scheduler = make_scheduler(num_blocks=64, max_batched_tokens=16, chunked_prefill=False)
    scheduler.add(make_request("small", range(8)))
    scheduler.add(make_request("long", range(100, 140)))
    memory = SlotMemory(4)
    first = run_step(scheduler, memory)
    assert [item.request.request_id for item in first.items] == ["small"]
    assert first.blocked_by == "token budget"
    scheduler.finish(first.items[0].request, RequestStatus.ABORTED, 0.0)
    assert run_step(scheduler, memory).prefills[0].num_new == 40


def test_batch_size_bounds_the_running_list() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, max_batch_size=2, max_batched_tokens=64), SlotMemory(4)
    for i in range(4):
        scheduler.add(make_request(str(i), [i, i, i]))
    batch = run_step(scheduler, memory)
    assert len(batch.items) == 2
    assert batch.blocked_by == "batch size"


def test_a_full_pool_holds_back_the_next_request() -> None:
    scheduler, memory = make_scheduler(num_blocks=3, max_batched_tokens=64), SlotMemory(4)
    scheduler.add(make_request("a", range(8)))
    scheduler.add(make_request("b", range(50, 58)))
    batch = run_step(scheduler, memory)
    assert [item.request.request_id for item in batch.items] == ["a"]
    assert batch.blocked_by == "blocks"


def test_the_youngest_gives_way_and_both_end_with_the_right_tokens() -> None:
    alone: dict[str, list[int]] = {}
    prompts = {"a": [1, 2, 3, 4, 5, 6, 7], "b": [9, 8, 7, 6, 5, 4, 3]}
    for name, prompt in prompts.items():
        scheduler, memory = make_scheduler(num_blocks=64), SlotMemory(4)
        request = make_request(name, prompt, max_tokens=9)
        scheduler.add(request)
        while scheduler.num_unfinished:
            run_step(scheduler, memory)
        alone[name] = request.output_token_ids
    scheduler, memory = make_scheduler(num_blocks=5, prefix_caching=False), SlotMemory(4)
    requests = [make_request(name, prompt, max_tokens=9) for name, prompt in prompts.items()]
    for request in requests:
        scheduler.add(request)
    preempted: list[Request] = []
    for _ in range(200):
        preempted += run_step(scheduler, memory).preempted
        scheduler.check_integrity()
    assert not scheduler.num_unfinished
    assert {request.request_id for request in preempted} == {"b"}
    assert requests[1].num_preemptions >= 1
    assert requests[1].num_recomputed > 0
    assert {request.request_id: request.output_token_ids for request in requests} == alone


def test_preemption_then_a_prefix_hit_resumes_where_it_stood() -> None:
    scheduler, memory = make_scheduler(num_blocks=5, max_batched_tokens=64), SlotMemory(4)
    a, b = make_request("a", range(7), max_tokens=9), make_request("b", range(50, 57), max_tokens=9)
    scheduler.add(a)
    scheduler.add(b)
    while scheduler.num_unfinished:
        run_step(scheduler, memory)
        scheduler.check_integrity()
    assert b.num_preemptions >= 1
    assert len(b.output_token_ids) == 9


def test_static_batch_waits_for_its_last_member() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, batching="static", max_batch_size=2), SlotMemory(4)
    short, long, late = (make_request(n, [i], max_tokens=m) for i, (n, m) in enumerate([("s", 1), ("l", 4), ("x", 1)]))
    for request in (short, long, late):
        scheduler.add(request)
    seen = [[item.request.request_id for item in run_step(scheduler, memory).items] for _ in range(5)]
    assert seen == [["s", "l"], ["l"], ["l"], ["l"], ["x"]]


def test_static_padding_counts_finished_rows_and_short_prompts() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, batching="static", max_batch_size=2), SlotMemory(4)
    scheduler.add(make_request("s", [1, 2], max_tokens=1))
    scheduler.add(make_request("l", [3, 4, 5, 6, 7], max_tokens=2))
    prefill, decode = run_step(scheduler, memory), run_step(scheduler, memory)
    assert (prefill.num_slots, prefill.padding_tokens) == (2, 3)
    assert (decode.num_slots, decode.padding_tokens) == (2, 1)


def test_continuous_batching_pads_nothing() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, max_batch_size=4), SlotMemory(4)
    scheduler.add(make_request("s", [1, 2]))
    scheduler.add(make_request("l", range(9)))
    assert run_step(scheduler, memory).padding_tokens == 0


def test_dynamic_batch_waits_for_its_window_and_groups_similar_lengths() -> None:
    scheduler = make_scheduler(num_blocks=64, batching="dynamic", max_batch_size=2, batch_window=0.5)
    memory = SlotMemory(4)
    scheduler.add(make_request("a", range(8), max_tokens=1, arrival=10.0))
    assert not scheduler.schedule(10.1)
    assert scheduler.next_wakeup(10.1) == pytest.approx(10.5)
    scheduler.add(make_request("far", range(30), max_tokens=1, arrival=10.2))
    scheduler.add(make_request("near", range(60, 69), max_tokens=1, arrival=10.3))
    assert scheduler.next_wakeup(10.3) is None  # the batch is full before the window ends
    batch = run_step(scheduler, memory, now=10.3)
    assert {item.request.request_id for item in batch.items} == {"a", "near"}
    run_step(scheduler, memory, now=10.8)
    assert not scheduler.num_unfinished


@pytest.mark.parametrize("batching", ["static", "dynamic", "continuous"])
def test_every_policy_serves_everybody(batching: str) -> None:
    scheduler = make_scheduler(num_blocks=12, batching=batching, max_batch_size=3, max_batched_tokens=16)
    memory = SlotMemory(4)
    requests = [make_request(str(i), [i] * (1 + 3 * (i % 5)), max_tokens=1 + i % 6) for i in range(20)]
    for request in requests:
        scheduler.add(request)
    for now in range(400):
        run_step(scheduler, memory, now=float(now))
        scheduler.check_integrity()
    assert all(request.status == RequestStatus.LENGTH for request in requests)
    assert scheduler.cache.pool.num_used == 0


def test_after_a_broken_step_nobody_is_lost() -> None:
    scheduler, memory = make_scheduler(num_blocks=12, max_batch_size=3), SlotMemory(4)
    requests = [make_request(str(i), [i] * 5, max_tokens=3) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    run_step(scheduler, memory)
    scheduler.schedule(0.0)  # and the runner breaks off here
    scheduler.recover()
    scheduler.check_integrity()
    while scheduler.num_unfinished:
        run_step(scheduler, memory)
    assert all(len(request.output_token_ids) == 3 for request in requests)


def test_equal_prefixes_in_one_step_are_computed_once() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, max_batched_tokens=64), SlotMemory(4)
    for i in range(3):
        scheduler.add(make_request(str(i), [*range(12), 50 + i, 60]))
    batch = run_step(scheduler, memory)
    assert [(item.start, item.num_new) for item in batch.items] == [(0, 14), (12, 2), (12, 2)]
    assert scheduler.cache.pool.num_used == 3 + 3
    scheduler.check_integrity()


def test_a_prefix_that_is_half_computed_is_followed_at_once() -> None:
    scheduler, memory = make_scheduler(num_blocks=64, max_batched_tokens=16), SlotMemory(4)
    scheduler.add(make_request("a", range(24)))
    run_step(scheduler, memory)
    scheduler.add(make_request("b", [*range(24), 99]))
    batch = run_step(scheduler, memory)
    assert [(item.request.request_id, item.start, item.num_new) for item in batch.items] == [("a", 16, 8), ("b", 24, 1)]
