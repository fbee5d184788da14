"""A small engine on the simulated runner, without a model."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.engine import Engine
from tests.unit.engine.support import StubModel, tiny_spec


def build(**options: object) -> Engine:
    defaults = {"runner": "simulated", "memory_limit": 64 << 20, "block_size": 16, "max_batch_size": 8}
    return Engine(EngineConfig(**{**defaults, **options}), model=StubModel(tiny_spec()))  # type: ignore[arg-type]
