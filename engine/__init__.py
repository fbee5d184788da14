"""An inference engine in one process: requests in, tokens out.

    from engine import Engine, EngineConfig, SamplingParams
    with Engine(EngineConfig(weights="int4")) as engine:
        print(engine.generate(["def fibonacci(n):"], SamplingParams(max_tokens=64))[0].text)

Here lie what callers see (`engine`, `config`, `request`, ...) and the loop of steps (`core`); below them, in rooms:

    model        dimensions, formats, tokens, and the network
    loading      checkpoints, and random weights of published dimensions
    scheduling   who computes what in the next step, and the blocks of the KV cache
    running      the runners, what they keep on the device, and the memory that takes
    quantize, bench, bundled: checkpoints made, the engine measured, the model that ships with it

Names load when they are first used, so that the host logic (requests, blocks, scheduler) imports without torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig as EngineConfig
    from engine.engine import Engine as Engine
    from engine.errors import CheckpointError as CheckpointError
    from engine.errors import ConfigError as ConfigError
    from engine.errors import RequestError as RequestError
    from engine.loading.loader import load_model as load_model
    from engine.request import RequestOutput as RequestOutput
    from engine.sampling_params import SamplingParams as SamplingParams
    from engine.scheduling.batch import StepEvent as StepEvent

_HOMES = {
    "CheckpointError": "engine.errors",
    "ConfigError": "engine.errors",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "RequestError": "engine.errors",
    "RequestOutput": "engine.request",
    "SamplingParams": "engine.sampling_params",
    "StepEvent": "engine.scheduling.batch",
    "load_model": "engine.loading.loader",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}; it offers {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _refuse_foreign_kernels() -> None:
    """Hugging Face publishes a distribution named `kernels` whose import name is the same as ours."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution 'kernels' {version} is installed and hides InferLab's package of the same name: "
        "run 'pip uninstall kernels', or use an environment of InferLab's own (make lab builds one)"
    )


_refuse_foreign_kernels()
