"""Sampled tokens on the device, and their way back to the host: one copy per step, read when it has arrived."""

from __future__ import annotations

import torch
from torch import Tensor


class Slot:
    """Where the results of one step arrive. Three events on a GPU: the step begins, ends, and has been copied."""

    def __init__(self, readback: Readback) -> None:
        on_gpu = readback.buffer.device.type == "cuda"
        self._host = torch.zeros(readback.buffer.numel(), dtype=torch.uint8, pin_memory=on_gpu)
        self.ids, self.highest = readback.split(self._host)
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


class Readback:
    """The tokens that the newest step sampled, where the next step can read them, and two slots on the host.

    ids: int64 [rows] on the device. highest: the largest logit of each row, in the activations' dtype; a row whose
    largest one is not finite has no answer, which the host finds out when it reads both. Two slots suffice where at
    most one step is on its way while the next is launched.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows, self._dtype = rows, dtype
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

    def store(self, tokens: Tensor, highest: Tensor) -> None:
        self.ids[: len(tokens)] = tokens
        self.highest[: len(highest)] = highest

    def feed(self, tokens: Tensor, feed: Tensor) -> Tensor:
        """tokens int64 [T] with the pending ones filled in; feed: see `engine.step_inputs.feed_rows`."""
        return torch.cat((self.ids, tokens)).take(feed)
