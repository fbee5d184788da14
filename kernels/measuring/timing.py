"""Device time of a call: CUDA-graph replays over rotating inputs, so that neither launches nor the L2 cache are
measured.

Bursts of some milliseconds, as other kernels' figures are measured with: 50 ms of replays before each measurement bring
an H200 to its power limit, where 8192^3 runs at 660 instead of 785 TFLOP/s and small products vary more, not less."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

L2_ROTATION_BYTES = 256 << 20  # inputs are rotated through more than four times the L2 of any current GPU


def copies_for(nbytes: int, at_most: int = 64) -> int:
    """How many copies of an input of nbytes to rotate through."""
    return max(2, min(at_most, -(-L2_ROTATION_BYTES // max(1, nbytes))))


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 7, at_least_us: float = 1500.0) -> float:
    """Median time of one call, in microseconds: all `calls` captured in one graph, repeated until a replay is long
    enough."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls[:4]:
            call()
        end.record()
        end.synchronize()
        rough = max(1.0, begin.elapsed_time(end) * 1000 / len(calls[:4]))
    rounds = max(1, min(400 // len(calls), round(at_least_us / (rough * len(calls)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(replays):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / (rounds * len(calls)))
    return statistics.median(times)


@triton.jit
def _read_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0)
    tl.store(out + tl.program_id(0), tl.sum(value, 0))


CLOCKS_UP_US = 50_000.0
"""Long enough for clocks that have fallen to rise: on an H200, 2 GB that are read at 4.6 TB/s were read at 4.0 by
1.5 ms of work right after one engine had been closed and another one was to come."""


def read_bandwidth() -> float:
    """The read ceiling in TB/s: 2 GB summed once."""
    x = torch.randint(0, 100, (1 << 29,), dtype=torch.int32, device="cuda")
    block = 8192
    out = torch.empty(triton.cdiv(x.numel(), block), dtype=torch.int32, device="cuda")
    sums = [lambda: _read_kernel[(len(out),)](x, out, x.numel(), block, num_warps=8)]
    us = microseconds(sums, at_least_us=CLOCKS_UP_US)
    return x.nbytes / us / 1e6


def matmul_rate(size: int = 8192) -> float:
    """The bf16 matrix ceiling in TFLOP/s, by cuBLAS on random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / microseconds([lambda: a @ b]) / 1e6
