"""The memory plan of a config before anything is loaded, for a panel that answers while a knob moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.bundled import MODEL_DIR
from engine.config import EngineConfig
from engine.loading.checkpoint import read_spec
from engine.loading.key_bias import key_biases
from engine.loading.shapes import synthetic_spec
from engine.model.spec import ModelSpec
from engine.model.weight_plan import WeightPlan
from engine.running.device import resolve_device
from engine.running.memory import MemoryPlan, plan_memory
from engine.running.simulated import SimulatedRunner
from engine.running.workspace import default_limit, workspace_bytes


def predicted_plan(config: EngineConfig) -> MemoryPlan | None:
    """From dimensions alone; None where they are not at hand (a hub id).

    ConfigError and CheckpointError as the engine raises them.
    """
    spec = _spec(config.model)
    if spec is None:
        return None
    if config.runner == "simulated":
        return SimulatedRunner(config, spec).memory
    device = resolve_device(config.device)
    weights = spec.weight_bytes(config.weights, config.group_size)
    twice = spec.tie_embeddings and spec.head_format(WeightPlan.of(config.weights)) == "bf16"
    if twice and device.type == "cpu" and config.impl != "torch":  # oneDNN keeps its own layout of a shared table
        weights["lm_head"] = weights["embeddings"]
    workspace = workspace_bytes(spec, config, itemsize=2)
    block_size = config.block_size or (64 if device.type == "cuda" else 16)
    return plan_memory(
        limit=config.memory_limit or default_limit(device, sum(weights.values()), workspace),
        weights=weights,
        workspace=workspace,
        cache_ratio=config.cache_ratio,
        block_bytes=block_size * spec.kv_bytes_per_token(config.kv, config.kv_repair),
        block_size=block_size,
    )


def _spec(model: str) -> ModelSpec | None:
    if model.startswith("synthetic:"):
        return synthetic_spec(model.removeprefix("synthetic:"))
    folder = MODEL_DIR if model == "bundled" else Path(model).expanduser()
    if not folder.is_dir():
        return None
    spec = read_spec(folder)
    return replace(spec, key_biases=key_biases(folder, spec))
