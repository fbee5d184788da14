"""The KV cache as the scheduler sees it: blocks for requests, and an index that finds equal prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.request import Request
from engine.scheduling.blocks import BlockPool

ROOT = 0


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Blocks that already hold the first `num_tokens` tokens of a request."""

    block_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    """Identity of a findable block: `uid` names it as a parent and is never used again."""

    uid: int
    parent: int
    tokens: tuple[int, ...]


class KVCache:
    """Hands out blocks and remembers full ones by (parent, tokens).

    The index key is the exact tokens plus the identity of the block before, so a hit is an equality of the whole
    prefix, not of a hash alone. A block is published when its tokens are known and the step that fills it is
    scheduled: steps run in order, and each writes the keys and values of all its tokens before it reads any, so even a
    request of the same step may build on it. A step that breaks off takes the whole index with it. When the parent of
    a findable block is evicted the child can no longer be reached and leaves in its turn.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_blocks, self._evict)
        self._by_content: dict[tuple[int, tuple[int, ...]], int] = {}
        self._entries: dict[int, _Entry] = {}
        self._next_uid = ROOT + 1

    @property
    def num_tokens(self) -> int:
        return self.pool.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, request: Request) -> PrefixMatch:
        """Longest run of findable full blocks, leaving at least one token to compute (its logits are needed)."""
        if not self.prefix_caching or request.params.prompt_logprobs:
            return PrefixMatch()
        size, blocks, parent = self.block_size, [], ROOT
        for start in range(0, request.num_tokens - size, size):
            block = self._by_content.get((parent, tuple(request.token_range(start, start + size))))
            if block is None:
                break
            blocks.append(block)
            parent = self._entries[block].uid
        return PrefixMatch(blocks, len(blocks) * size)

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """Blocks still to be taken so that `request` can hold `num_tokens` tokens."""
        return max(0, self.blocks_for(num_tokens) - len(request.block_ids))

    def can_extend(self, request: Request, num_tokens: int) -> bool:
        return self.num_missing(request, num_tokens) <= self.pool.num_free

    def can_admit(self, request: Request, match: PrefixMatch, num_tokens: int) -> bool:
        """Matched blocks that nobody holds are free ones too, and will be taken by the match itself."""
        idle = sum(self.pool.is_free(block) for block in match.block_ids)
        return self.blocks_for(num_tokens) - len(match.block_ids) + idle <= self.pool.num_free

    def adopt(self, request: Request, match: PrefixMatch) -> None:
        """Give a request without blocks the matched ones."""
        for block in match.block_ids:
            self.pool.share(block)
            request.block_ids.append(block)
        request.num_computed = match.num_tokens
        request.num_published = len(match.block_ids)
        request.prefix_uid = self._entries[match.block_ids[-1]].uid if match.block_ids else ROOT

    def extend(self, request: Request, num_tokens: int) -> None:
        """Take blocks until `request` can hold `num_tokens` tokens; check `can_extend` first."""
        for _ in range(self.num_missing(request, num_tokens)):
            request.block_ids.append(self.pool.take())

    def publish(self, request: Request, num_tokens: int) -> None:
        """Make the full blocks among the first `num_tokens` findable: of known tokens, that are computed or scheduled.

        Blocks that the request has lost meanwhile are not; of equal blocks the first one published stays.
        """
        if not self.prefix_caching:
            return
        size = self.block_size
        num_blocks = min(num_tokens // size, len(request.block_ids))
        while request.num_published < num_blocks:
            start = request.num_published * size
            key = (request.prefix_uid, tuple(request.token_range(start, start + size)))
            block = self._by_content.get(key)
            if block is None:
                block = request.block_ids[request.num_published]
                self._by_content[key] = block
                self._entries[block] = _Entry(self._next_uid, *key)
                self._next_uid += 1
            request.prefix_uid = self._entries[block].uid
            request.num_published += 1

    def release(self, request: Request) -> None:
        """Take all blocks back, the tail first so that it is evicted before the prefix others may share."""
        for block in reversed(request.block_ids):
            self.pool.release(block, findable=block in self._entries)
        request.block_ids.clear()
        request.num_computed = 0
        request.num_published = 0
        request.prefix_uid = ROOT

    def reset(self) -> None:
        """Forget every findable block nobody holds; those in use stay findable."""
        idle = [block for block in self._entries if self.pool.is_free(block)]
        for block in idle:
            self._drop(block)
        self.pool.forget(idle)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raises AssertionError when counts, lists and index disagree."""
        holders: dict[int, int] = {}
        for request in requests:
            assert len(set(request.block_ids)) == len(request.block_ids), f"{request.request_id} lists a block twice"
            assert request.num_computed <= len(request.block_ids) * self.block_size, (
                f"{request.request_id}: {request.num_computed} tokens computed, {len(request.block_ids)} blocks held"
            )
            for block in request.block_ids:
                holders[block] = holders.get(block, 0) + 1
        self.pool.check_integrity(holders)
        assert len(self._by_content) == len(self._entries), "the index and its entries differ in number"
        for block, entry in self._entries.items():
            found = self._by_content[entry.parent, entry.tokens]
            assert found == block, f"block {block} and block {found} are findable under the same tokens"
        cached = sum(self.pool.is_free(block) for block in self._entries)
        assert cached == self.pool.num_cached, f"{cached} findable free blocks, the pool counts {self.pool.num_cached}"

    def _evict(self, block: int) -> None:
        self._drop(block)

    def _drop(self, block: int) -> None:
        entry = self._entries.pop(block)
        del self._by_content[entry.parent, entry.tokens]
