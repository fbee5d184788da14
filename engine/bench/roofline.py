"""The least time a decode step can take: its bytes over the bandwidth measured on this device."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from engine.engine import Engine
from engine.running.device import resolve_device


@dataclass(frozen=True)
class Roofline:
    """Bytes, and bytes per second. weight_bytes: read by every step; looked-up embeddings are not among them."""

    weight_bytes: int
    kv_bytes_per_token: float
    bandwidth: float
    measured_by: str

    @classmethod
    def of(cls, engine: Engine, bandwidth: tuple[float, str]) -> Roofline:
        weights = engine.memory.weights
        # One table may serve both. On a CPU oneDNN has tied ones twice, in the layouts of a product and of a lookup.
        looked_up = weights["embeddings"] if weights["lm_head"] else 0
        per_token = engine.memory.block_bytes / engine.memory.block_size
        return cls(engine.memory.weights_total - looked_up, per_token, *bandwidth)

    def floor(self, batch: int, context: float) -> float:
        """Seconds of one decode step of `batch` sequences of `context` tokens each."""
        return (self.weight_bytes + batch * context * self.kv_bytes_per_token) / self.bandwidth

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured_bandwidth(device: str) -> tuple[float, str]:
    """Bytes per second that this device ("auto", "cpu", "cuda") reads at, and how that was measured."""
    if resolve_device(device).type == "cuda":
        from kernels.measuring.timing import read_bandwidth

        return read_bandwidth() * 1e12, "2 GB summed once"
    source = torch.ones(1 << 26)
    copy = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        copy.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best, "256 MB copied, read and written"


def card(engine: Engine, roofline: Roofline) -> str:
    config, memory, spec = engine.config, engine.memory, engine.spec
    floor = roofline.weight_bytes / roofline.bandwidth * 1e3
    return (
        f"{config.model}, weights {config.weights}, KV {config.kv}: {spec.num_parameters / 1e6:,.1f} M parameters, "
        f"{memory.weights_total / 1e6:,.1f} MB of weights, {roofline.weight_bytes / 1e6:,.1f} MB of them read per "
        f"step, {roofline.kv_bytes_per_token / 1e3:,.2f} kB of KV per token, {memory.tokens_that_fit:,} tokens fit\n"
        f"  floor per step {floor:.3f} ms at {roofline.bandwidth / 1e9:,.0f} GB/s ({roofline.measured_by}), plus "
        f"{roofline.kv_bytes_per_token / roofline.bandwidth * 1e9:.3f} µs per 1,000 tokens of context\n"
        f"  {engine.description}"
    )
