"""Blocks and the prefix index: exact sharing, exact eviction order, no block lost or held twice."""

from __future__ import annotations

import pytest

from engine.scheduling.blocks import BlockPool
from engine.scheduling.cache import KVCache
from tests.unit.engine.support import make_request


def filled(cache: KVCache, name: str, tokens: list[int]):
    """A request whose tokens are all computed and published."""
    request = make_request(name, tokens)
    match = cache.match(request)
    assert cache.can_admit(request, match, request.num_tokens)
    cache.adopt(request, match)
    cache.extend(request, request.num_tokens)
    request.num_computed = request.num_tokens
    cache.publish(request, request.num_computed)
    return request


def test_pool_hands_out_every_block_once() -> None:
    pool = BlockPool(5, on_evict=lambda block: None)
    assert sorted(pool.take() for _ in range(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError, match="all 5 KV blocks"):
        pool.take()
    pool.release(3, findable=False)
    assert pool.take() == 3


def test_releasing_a_free_block_is_an_error() -> None:
    pool = BlockPool(2, on_evict=lambda block: None)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(0, findable=False)


def test_equal_prefix_is_shared_by_block() -> None:
    cache = KVCache(16, 4, prefix_caching=True)
    first = filled(cache, "a", list(range(10)))
    match = cache.match(make_request("b", [*range(8), 99, 98, 97]))
    assert match.num_tokens == 8
    assert match.block_ids == first.block_ids[:2]


def test_a_full_hit_leaves_the_last_block_to_compute() -> None:
    """Prompt length an exact multiple of the block: its last token's logits are still needed."""
    cache = KVCache(16, 4, prefix_caching=True)
    filled(cache, "a", list(range(8)))
    assert cache.match(make_request("b", list(range(8)))).num_tokens == 4
    assert cache.match(make_request("c", list(range(9)))).num_tokens == 8


def test_nothing_is_findable_before_it_is_computed() -> None:
    cache = KVCache(16, 4, prefix_caching=True)
    request = make_request("a", list(range(12)))
    cache.extend(request, 12)
    request.num_computed = 7
    cache.publish(request, request.num_computed)
    assert cache.match(make_request("b", list(range(12)))).num_tokens == 4


def test_equal_tokens_after_different_prefixes_are_different_blocks() -> None:
    cache = KVCache(16, 4, prefix_caching=True)
    filled(cache, "a", [1, 1, 1, 1, 5, 5, 5, 5])
    assert cache.match(make_request("b", [2, 2, 2, 2, 5, 5, 5, 5, 0])).num_tokens == 0


def test_two_equal_prompts_in_one_batch_publish_once_and_go_on() -> None:
    cache = KVCache(16, 4, prefix_caching=True)
    a, b = make_request("a", list(range(8))), make_request("b", list(range(8)))
    for request in (a, b):
        cache.extend(request, 12)
        request.num_computed = 8
        cache.publish(request, request.num_computed)
    assert set(a.block_ids).isdisjoint(b.block_ids)
    b.output_token_ids = [7, 7, 7, 7]
    b.num_computed = 12
    cache.publish(b, b.num_computed)  # its own third block hangs under the twin's second
    assert cache.match(make_request("c", [*range(8), 7, 7, 7, 7, 0])).num_tokens == 12
    cache.check_integrity([a, b])


def test_least_recently_released_goes_first_and_tails_before_heads() -> None:
    cache = KVCache(4, 4, prefix_caching=True)
    old = filled(cache, "old", list(range(8)))
    cache.release(old)
    new = filled(cache, "new", [50, 51, 52, 53, 54, 55, 56, 57])
    cache.release(new)
    other = make_request("x", [9, 9, 9])
    cache.extend(other, 3)  # takes the tail of `old`
    assert cache.match(make_request("b", [*range(8), 0])).num_tokens == 4
    assert cache.match(make_request("c", [50, 51, 52, 53, 54, 55, 56, 57, 0])).num_tokens == 8
    cache.check_integrity([other])


def test_match_counts_its_own_idle_blocks_as_taken() -> None:
    """Two idle matched blocks and one more needed do not fit into a pool with two free blocks."""
    cache = KVCache(3, 4, prefix_caching=True)
    cache.release(filled(cache, "a", list(range(8))))
    blocker = make_request("x", [9])
    cache.extend(blocker, 1)
    request = make_request("b", list(range(12)))
    match = cache.match(request)
    assert match.num_tokens == 8
    assert not cache.can_admit(request, match, 12)


def test_reset_forgets_what_nobody_holds() -> None:
    cache = KVCache(8, 4, prefix_caching=True)
    cache.release(filled(cache, "a", list(range(8))))
    held = filled(cache, "b", [5, 5, 5, 5])
    cache.reset()
    assert cache.match(make_request("c", [*range(8), 0])).num_tokens == 0
    assert cache.match(make_request("d", [5, 5, 5, 5, 0])).num_tokens == 4
    cache.check_integrity([held])


def test_prefix_caching_off_finds_nothing() -> None:
    cache = KVCache(8, 4, prefix_caching=False)
    filled(cache, "a", list(range(8)))
    assert cache.match(make_request("b", [*range(8), 0])).num_tokens == 0


def test_quality_measurements_compute_their_whole_prompt() -> None:
    from dataclasses import replace

    cache = KVCache(8, 4, prefix_caching=True)
    filled(cache, "a", list(range(8)))
    request = make_request("b", [*range(8), 0])
    request.params = replace(request.params, prompt_logprobs=True)
    assert cache.match(request).num_tokens == 0
