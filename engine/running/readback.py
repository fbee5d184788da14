"""Sampled tokens on the device, and their way back to the host: one copy per step, read when it has arrived."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import feed_tokens

EXPONENTS = {torch.float32: (torch.int32, 0x7F800000), torch.bfloat16: (torch.int16, 0x7F80)}
"""Bits that are all set in a number that is not finite. NumPy knows no bfloat16, and calling torch for a few numbers
right after the host has waited costs more than everything else that is done with them."""


class Slot:
    """Where the results of one step arrive. Three events on a GPU: the step begins, ends, and has been copied."""

    def __init__(self, readback: Readback) -> None:
        on_gpu = readback.buffer.device.type == "cuda"
        self._host = torch.zeros(readback.buffer.numel(), dtype=torch.uint8, pin_memory=on_gpu)
        ids, highest = readback.split(self._host)
        bits, self._exponent = EXPONENTS[highest.dtype]
        self._ids: NDArray[np.int64] = ids.numpy()
        self._highest: NDArray[np.signedinteger] = highest.view(bits).numpy()
        self._events = [torch.cuda.Event(enable_timing=timed) for timed in (True, True, False)] if on_gpu else []

    def begin(self) -> None:
        if self._events:
            self._events[0].record()

    def fetch(self, buffer: Tensor) -> None:
        """Send the results on their way; does not wait."""
        if self._events:
            self._events[1].record()
        self._host.copy_(buffer, non_blocking=True)
        if self._events:
            self._events[2].record()

    def wait(self) -> float | None:
        """Until the results are here; returns the seconds that a GPU spent between begin and end."""
        if not self._events:
            return None
        begin, end, copied = self._events
        copied.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def tokens(self, count: int) -> list[int]:
        """Of the first rows, once they are here."""
        ids: list[int] = self._ids[:count].tolist()
        return ids

    def finite(self, count: int) -> NDArray[np.bool_]:
        """Whether the largest logit of each of the first rows is a number."""
        finite: NDArray[np.bool_] = (self._highest[:count] & self._exponent) != self._exponent
        return finite


class Readback:
    """The tokens that the newest step sampled, where the next step can read them, and two slots on the host.

    ids: int64 [rows] on the device. highest: the largest logit of each row, in the activations' dtype; a row whose
    largest one is not finite has no answer, which the host finds out when it reads both. Two slots suffice where at
    most one step is on its way while the next is launched.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, impl: str = "auto") -> None:
        """impl: as in `kernels`, of what feeds tokens."""
        self._rows, self._dtype, self._impl = rows, dtype, impl
        self.buffer = torch.zeros(rows * (8 + dtype.itemsize), dtype=torch.uint8, device=device)
        self.ids, self.highest = self.split(self.buffer)
        self._slots = [Slot(self), Slot(self)]

    def split(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """ids and highest as views of one buffer."""
        return buffer[: self._rows * 8].view(torch.int64), buffer[self._rows * 8 :].view(self._dtype)

    def take(self) -> Slot:
        """The slot for a new step."""
        self._slots.reverse()
        return self._slots[0]

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """highest and ids of the first `count` rows, to be written."""
        return self.highest[:count], self.ids[:count]

    def store(self, tokens: Tensor, highest: Tensor) -> None:
        self.ids[: len(tokens)] = tokens
        self.highest[: len(highest)] = highest

    def feed(self, tokens: Tensor, feed: Tensor) -> Tensor:
        """tokens int64 [T] with the pending ones filled in; feed: see `engine.running.step_arrays.feed_rows`."""
        return feed_tokens(self.ids, tokens, feed, impl=self._impl)
