"""From the constructor to the first token, and from one configuration to the next in a session that goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import LoadedModel, load_model
from engine.sampling_params import SamplingParams

PROMPT = 512
FEW = SamplingParams(max_tokens=2, ignore_eos=True)


def changes(weights: Sequence[str], kv: Sequence[str]) -> list[dict[str, Any]]:
    """Each knob that a session may turn, one at a time; the last ones go back to formats that were there before."""
    ways: list[dict[str, Any]] = [{"weights": name} for name in weights]
    ways += [{"kv": name} for name in kv]
    return [*ways, {"cache_ratio": 0.5}, {"batching": "static"}, {"max_batch_size": 16}, {"weights": "bf16"}]


def run_switch(config: EngineConfig, weights: Sequence[str], kv: Sequence[str]) -> dict[str, Any]:
    """Seconds of each phase; the first token comes with a step of decode behind it, so its kernels are counted too."""
    begun = time.perf_counter()
    with load_model(config) as model:
        loaded = time.perf_counter() - begun
        row, engine = _open(config, model)
        start = {"load_s": loaded, **row, "seconds": loaded + row["seconds"]}
        print(f"  {engine.description}")
        _say("constructor to first token", start)
        begun = time.perf_counter()
        engine.warm_up()
        warm = time.perf_counter() - begun
        print(f"  every batch size made ready: {warm:.2f} s more", flush=True)
        rows = []
        try:
            for change in changes(weights, kv):
                begun = time.perf_counter()
                engine.close()
                closed = time.perf_counter() - begun
                config = replace(config, **change)
                row, engine = _open(config, model)
                row = {"change": change, "close_s": closed, **row, "seconds": closed + row["seconds"]}
                rows.append(row)
                _say(", ".join(f"{name} to {value}" for name, value in change.items()), row)
        finally:
            engine.close()
    return {"config": asdict(config), "start": start, "warm_up_s": warm, "changes": rows}


def _open(config: EngineConfig, model: LoadedModel) -> tuple[dict[str, Any], Engine]:
    begun = time.perf_counter()
    engine = Engine(config, model=model)
    built = time.perf_counter() - begun
    engine.generate([[(7 * j) % engine.spec.vocab_size for j in range(PROMPT)]], FEW)
    seconds = time.perf_counter() - begun
    return {"build_s": built, "first_token_s": seconds - built, "seconds": seconds}, engine


def _say(what: str, row: dict[str, Any]) -> None:
    parts = ", ".join(f"{name.removesuffix('_s')} {row[name]:.2f}" for name in row if name.endswith("_s"))
    print(f"  {what}: {row['seconds']:.2f} s ({parts})", flush=True)
