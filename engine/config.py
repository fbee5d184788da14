"""Every knob of the engine in one frozen place: typed, validated, and never written back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.model.kv_plan import KV, KVPlan
from engine.model.weight_plan import WeightPlan, Weights

BATCHING = ("static", "dynamic", "continuous")
RUNNERS = ("torch", "simulated")
IMPLS = ("auto", "torch", "aten", "triton")
GROUP_SIZES = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What to serve and how.

    model: "bundled", "synthetic:<shape>", a local folder, or a hub id.
    weights, kv: a key of kernels.WEIGHT_FORMATS and kernels.KV_FORMATS. group_size: of int4 and w4a8
        weights, 64 or 128; the tuned tiles and the kernel for Hopper are for 128.
        For mixed precision `weights` is a WeightPlan, or its mapping: {"default": "int4", "layers.3.down": "int8"}.
        A checkpoint quantized elsewhere keeps its own format and group: "bf16" takes it, another format is refused.
        For a choice by layer `kv` is a KVPlan, or its mapping: {"default": "int4", "layers.0": "int8"}.
    kv_repair: give layers whose key bias is too large for their KV format a finer one; the runner's description names
        them. Layers that `kv` names keep what it says.
    cache_ratio: share of the memory left after weights and workspace that the KV pool takes, in (0, 1).
    memory_limit: bytes the engine may use; None takes the whole GPU, or a modest share of the RAM on a CPU.
    block_size: tokens per KV block (16, 32, 64, 128); None picks 64 on a GPU and 16 on a CPU.
    max_batch_size: most requests in one step. max_batched_tokens: most prompt tokens of one step; requests that decode
        ride along with one token each.
    session_len: most tokens (prompt + output) of one request; None is what the model and the pool allow.
    batching: "static" (a batch runs until its last member ends), "dynamic" (a batch forms within `batch_window`
        seconds out of requests of similar length), "continuous" (requests join and leave at every step).
    prefix_caching: reuse the blocks of equal prefixes. chunked_prefill: split prompts over steps, each of which holds
        max_batched_tokens.
    runner: "torch" computes; "simulated" runs a cost model of `gpu` on a virtual clock.
    graphs: replay decode steps as CUDA graphs on a GPU; off runs them eagerly, with the same results.
    overlap: prepare the next step while a GPU computes one; off takes one step at a time, with the same results. Steps
        with log-probabilities or a repetition penalty, and every step on a CPU, are taken one at a time in any case.
    device: "auto", "cpu" or "cuda". impl: "auto", or "torch" for the readable reference path.
    seed: of everything random in the engine.
    """

    model: str = "bundled"
    weights: Weights = "bf16"
    group_size: int = 128
    kv: KV = "bf16"
    kv_repair: bool = True
    cache_ratio: float = 0.8
    memory_limit: int | None = None
    block_size: int | None = None
    max_batch_size: int = 64
    max_batched_tokens: int = 2048
    session_len: int | None = None
    batching: str = "continuous"
    batch_window: float = 0.05
    prefix_caching: bool = True
    chunked_prefill: bool = True
    runner: str = "torch"
    gpu: str = "h200"
    device: str = "auto"
    impl: str = "auto"
    graphs: bool = True
    overlap: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", WeightPlan.of(self.weights).simplest)  # one value for equal choices
        object.__setattr__(self, "kv", KVPlan.of(self.kv).simplest)
        _one_of("batching", self.batching, BATCHING)
        _one_of("runner", self.runner, RUNNERS)
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("impl", self.impl, IMPLS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        if self.block_size is not None:
            _one_of("block_size", self.block_size, BLOCK_SIZES)
        if not (0.0 < self.cache_ratio < 1.0):  # also refuses NaN
            raise ConfigError(f"cache_ratio is {self.cache_ratio}; it must be greater than 0 and less than 1")
        if not (0.0 <= self.batch_window <= 60.0) or math.isnan(self.batch_window):
            raise ConfigError(f"batch_window is {self.batch_window} s; it must be between 0 and 60 seconds")
        _at_least("max_batch_size", self.max_batch_size, 1, 4096)
        _at_least("max_batched_tokens", self.max_batched_tokens, 16, 1 << 20)
        if self.session_len is not None:
            _at_least("session_len", self.session_len, 2, 1 << 24)
        if self.memory_limit is not None:
            _at_least("memory_limit", self.memory_limit, 1 << 20, 1 << 50)
        _at_least("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        if not self.model:
            raise ConfigError("model is empty; give 'bundled', 'synthetic:<shape>', a folder, or a hub id")

    @classmethod
    def from_lmdeploy(cls, model: str, **options: Any) -> EngineConfig:
        """Accept LMDeploy's names: cache_max_entry_count, quant_policy (0, 8, 4), max_batch_size, session_len,
        enable_prefix_caching, cache_block_seq_len / block_size, max_prefill_token_num."""
        policy = {0: "bf16", 8: "int8", 4: "int4"}
        ours: dict[str, Any] = {}
        for name, value in options.items():
            if name == "quant_policy":
                if value not in policy:
                    raise ConfigError(f"quant_policy is {value!r}; it must be one of 0 (16 bit), 8 (int8), 4 (int4)")
                ours["kv"] = policy[value]
            elif name in LMDEPLOY_NAMES:
                ours[LMDEPLOY_NAMES[name]] = value
            else:
                known = ", ".join(sorted([*LMDEPLOY_NAMES, "quant_policy"]))
                raise ConfigError(f"unknown LMDeploy option {name!r}; the ones understood here are {known}")
        return cls(model=model, **ours)


LMDEPLOY_NAMES = {
    "cache_max_entry_count": "cache_ratio",
    "max_batch_size": "max_batch_size",
    "session_len": "session_len",
    "enable_prefix_caching": "prefix_caching",
    "cache_block_seq_len": "block_size",
    "block_size": "block_size",
    "max_prefill_token_num": "max_batched_tokens",
}


def _one_of(name: str, value: object, options: Any) -> None:
    if value not in options:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(str(option) for option in options)}")


def _at_least(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from {low:,} to {high:,}")
