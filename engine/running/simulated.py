"""A runner that computes nothing: a roofline cost model moves a virtual clock, everything above it is the real code.

Each step costs max(bytes / bandwidth, operations / rate) per part plus a fixed overhead (Williams et al., "Roofline",
2009). It knows no cache effects, no tail of a launch and no interconnect, so its times are lower bounds with a stated
efficiency; its use is exact, repeatable experiments on hardware that is not at hand.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model.spec import ModelSpec
from engine.running.memory import MemoryPlan, plan_memory
from engine.running.runner import Done
from engine.scheduling.batch import ScheduledBatch, StepResult
from kernels.rows.activations import activation_codes

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class GPU:
    """Data-sheet figures: bytes, bytes/s, dense operations/s in bf16, int8 and fp8 with float32 sums (None where the
    tensor cores have no fp8: it is computed in bf16). `source` says which sheet."""

    name: str
    memory: int
    bandwidth: float
    bf16_flops: float
    int8_ops: float
    fp8_flops: float | None
    source: str

    def rate(self, activations: torch.dtype | None) -> float:
        """Operations/s of a product whose activations have these codes, or 16 bits."""
        if activations is None:
            return self.bf16_flops
        return self.int8_ops if activations == torch.int8 else self.fp8_flops or self.bf16_flops


GPUS: dict[str, GPU] = {
    "h200": GPU("NVIDIA H200 SXM", 141 * 10**9, 4.8e12, 989e12, 1979e12, 1979e12, "NVIDIA H200 data sheet, 2024"),
    "h100": GPU("NVIDIA H100 SXM", 80 * 10**9, 3.35e12, 989e12, 1979e12, 1979e12, "NVIDIA H100 data sheet, 2023"),
    "a100-80g": GPU(
        "NVIDIA A100 SXM 80 GB", 80 * 10**9, 2.039e12, 312e12, 624e12, None, "NVIDIA A100 data sheet, 2021"
    ),
    "l40s": GPU("NVIDIA L40S", 48 * 10**9, 0.864e12, 362e12, 733e12, 733e12, "NVIDIA L40S data sheet, 2023"),
    "l4": GPU("NVIDIA L4", 24 * 10**9, 0.3e12, 121e12, 242e12, 242e12, "NVIDIA L4 data sheet, 2023"),
    "t4": GPU("NVIDIA T4", 16 * 10**9, 0.32e12, 65e12, 130e12, None, "NVIDIA T4 data sheet, 2018 (fp16)"),
    "rtx4090": GPU(
        "NVIDIA GeForce RTX 4090", 24 * 10**9, 1.008e12, 165e12, 660e12, 330e12, "NVIDIA Ada white paper, 2022"
    ),
}
BANDWIDTH_EFFICIENCY = 0.85
COMPUTE_EFFICIENCY = 0.70
STEP_OVERHEAD = 200e-6
LAYER_OVERHEAD = 15e-6


class SimulatedRunner:
    """Implements engine.runner.Runner for a GPU of `GPUS`. Tokens are pseudo-random in (request seed, position)."""

    def __init__(self, config: EngineConfig, spec: ModelSpec) -> None:
        if config.gpu not in GPUS:
            raise ConfigError(f"gpu is {config.gpu!r}; it must be one of {', '.join(GPUS)}")
        self.gpu = GPUS[config.gpu]
        self.spec = spec
        self.clock = VirtualClock()
        self._config = config
        block_size = config.block_size or 64
        self.memory: MemoryPlan = plan_memory(
            limit=config.memory_limit or self.gpu.memory,
            weights=spec.weight_bytes(config.weights, config.group_size),
            workspace=spec.workspace_bytes(config.max_batched_tokens + config.max_batch_size, config.max_batch_size),
            cache_ratio=config.cache_ratio,
            block_bytes=block_size * spec.kv_bytes_per_token(config.kv, config.kv_repair),
            block_size=block_size,
        )
        looked_up = 0 if spec.tie_embeddings else self.memory.weights["embeddings"]
        self._weight_bytes = self.memory.weights_total - looked_up
        self._kv_bytes = spec.kv_bytes_per_token(config.kv, config.kv_repair)
        self._operations = spec.operations_by_format(config.weights)

    @property
    def description(self) -> str:
        return (
            f"simulated {self.gpu.name} ({self.gpu.bandwidth / 1e12:g} TB/s, {self.gpu.bf16_flops / 1e12:g} TFLOP/s "
            f"bf16; {self.gpu.source}), virtual clock, no model is run"
        )

    def step_seconds(self, batch: ScheduledBatch) -> float:
        """Weights are read once per step; each token costs its operations, each sequence its keys and values."""
        items = batch.items
        tokens = sum(item.num_new for item in items)
        context = sum(item.stop for item in items)
        attended = sum(item.num_new * (item.start + (item.num_new + 1) / 2) for item in items)
        attention = attended * (self.spec.flops_per_token(1) - self.spec.flops_per_token(0))
        bandwidth = self.gpu.bandwidth * BANDWIDTH_EFFICIENCY
        matmul = sum(
            tokens * operations / self.gpu.rate(activation_codes(name, tokens))
            for name, operations in self._operations.items()
        )
        weights = max(self._weight_bytes / bandwidth, matmul / COMPUTE_EFFICIENCY)
        keys = max(context * self._kv_bytes / bandwidth, attention / (self.gpu.bf16_flops * COMPUTE_EFFICIENCY))
        return weights + keys + STEP_OVERHEAD + self.spec.num_layers * LAYER_OVERHEAD

    @property
    def asynchronous(self) -> bool:
        """No: on a clock that the host does not move there is nothing to hide."""
        return False

    def launch(self, batch: ScheduledBatch) -> Done:
        seconds = self.step_seconds(batch)
        self.clock.advance(seconds)
        tokens = [self._token(item.request.seed, item.stop) if item.samples else None for item in batch.items]
        return Done(StepResult(tokens, device_seconds=seconds))

    def warm_up(self, num_tokens: int, logits: Collection[bool]) -> None:
        """A cost model is always warm."""

    def measured_memory(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass

    def _token(self, seed: int, position: int) -> int:
        """splitmix64 (Steele, Lea, Flood, 2014) of seed and position; never an end-of-text id."""
        ends = self.spec.eos_token_ids
        value = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03) & MASK
        while True:
            value = (value + 0x9E3779B97F4A7C15) & MASK
            mixed = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
            token = (mixed ^ (mixed >> 31)) % self.spec.vocab_size
            if token not in ends:
                return token
