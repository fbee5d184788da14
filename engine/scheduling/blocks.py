"""The pool of KV blocks: who holds which, and which may be taken next. Numbers only; the tensors live in the runner."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Reference-counted blocks 0 .. num_blocks-1.

    A block that nobody holds is free but keeps its contents until it is taken again, so a prefix may still find it.
    Free blocks stand in eviction order: those without findable contents first, then the least recently released.
    `on_evict(block)` is called when a findable block is taken for new contents.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        if num_blocks < 1:
            raise ValueError(f"{num_blocks = }; a pool needs at least one block")
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self.num_shared = 0
        self._blank: list[int] = list(range(num_blocks - 1, -1, -1))
        self._findable: OrderedDict[int, None] = OrderedDict()
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._findable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Free blocks whose contents a prefix can still find."""
        return len(self._findable)

    def is_free(self, block: int) -> bool:
        return self.ref_counts[block] == 0

    def take(self) -> int:
        """One block for new contents, reference count 1. Raises IndexError when none is free: ask `num_free` first."""
        if self._blank:
            block = self._blank.pop()
        elif self._findable:
            block, _ = self._findable.popitem(last=False)
            self._on_evict(block)
        else:
            raise IndexError(f"all {self.num_blocks} KV blocks are held by requests")
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder for a findable block, which may be free at the moment."""
        if self.ref_counts[block] == 0:
            del self._findable[block]
        elif self.ref_counts[block] == 1:
            self.num_shared += 1
        self.ref_counts[block] += 1

    def release(self, block: int, *, findable: bool) -> None:
        """One holder fewer; the last one to leave makes the block free."""
        count = self.ref_counts[block]
        if count <= 0:
            raise ValueError(f"block {block} is released but nobody holds it")
        self.ref_counts[block] = count - 1
        if count == 2:
            self.num_shared -= 1
        elif count == 1:
            if findable:
                self._findable[block] = None
            else:
                self._blank.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Contents of these free blocks are no longer findable."""
        for block in blocks:
            del self._findable[block]
            self._blank.append(block)

    def check_integrity(self, holders: dict[int, int]) -> None:
        """`holders[block]` = how many requests list the block. Raises AssertionError naming the first mismatch."""
        free = set(self._blank) | set(self._findable)
        assert len(free) == self.num_free, "a block stands twice among the free ones"
        for block in range(self.num_blocks):
            count = self.ref_counts[block]
            held_by = holders.get(block, 0)
            assert count == held_by, f"block {block}: {count = }, held by {held_by} requests"
            assert (count == 0) == (block in free), f"block {block}: {count = }, free: {block in free}"
        shared = sum(count > 1 for count in self.ref_counts)
        assert self.num_shared == shared, f"{self.num_shared = }, counted {shared}"
