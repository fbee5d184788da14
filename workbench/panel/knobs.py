"""The knobs of the panel: names, ranges, plain words, and how their values become a config, a workload and an SLO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.config import BATCHING, EngineConfig
from engine.errors import ConfigError
from engine.running.simulated import GPUS
from kernels import KV_FORMATS, WEIGHT_FORMATS
from workbench.panel.knob import Choice, Knob, Number, Options, Switch, Text
from workbench.runs.metrics import SLO
from workbench.runs.workload import PRESETS, Workload

MB = 10**6
BUNDLED_LIMIT = 66
"""MB for the bundled model: weights and workspace leave so little for the KV pool that every knob shows."""

def model_options() -> Options:
    """The models that need no download."""
    from engine.loading.shapes import SHAPES  # imports torch

    shapes = {f"synthetic:{name}": f"synthetic {name}" for name in SHAPES if name != "tiny"}
    return {"bundled": "bundled: writes Python", **shapes}


DEVICES: Options = {
    "auto": "this machine",
    "cpu": "this machine, CPU only",
    **{key: f"simulated {gpu.name.removeprefix('NVIDIA ').removeprefix('GeForce ')}" for key, gpu in GPUS.items()},
}
LOADS: Options = {"rate": "arrivals per second", "concurrency": "fixed number in flight", "burst": "all at once"}
_JOINS = {
    "static": "when the whole batch before them has ended",
    "dynamic": "as static, but a batch first gathers for a moment, requests of similar length together",
    "continuous": "at every step",
}
_CHAT = PRESETS["dialogue service"]
_START = next(iter(PRESETS))

MODEL, PRECISION, BATCHES, LOAD, TARGET = (
    "Model and machine",
    "Precision and memory",
    "Batching",
    "Load",
    "Target (SLO)",
)

_KNOBS: tuple[Knob, ...] = (
    Text(
        name="model",
        label="Model",
        group=MODEL,
        default="bundled",
        suggestions=model_options,
        help="What is served: the small model that ships with InferLab, published dimensions with random weights, "
        "a folder with safetensors, or a Hugging Face hub id",
    ),
    Choice(
        name="device",
        label="Runs on",
        group=MODEL,
        default="auto",
        options=DEVICES,
        help="This machine computes for real; a simulated GPU follows a cost model on a virtual clock",
    ),
    Number(
        name="memory_limit_mb",
        label="Memory, MB",
        group=MODEL,
        default=BUNDLED_LIMIT,
        low=0,
        high=10**7,
        step=8,
        help="Bytes the engine may use, in millions; 0 takes the whole GPU, or a modest share of the RAM",
    ),
    Choice(
        name="weights",
        label="Weights",
        group=PRECISION,
        default="bf16",
        options={name: form.label for name, form in WEIGHT_FORMATS.items()},
        help="How weights are stored: "
        + "; ".join(f"{name}: {form.description}" for name, form in WEIGHT_FORMATS.items()),
    ),
    Choice(
        name="kv",
        label="KV cache",
        group=PRECISION,
        default="bf16",
        options={name: form.label for name, form in KV_FORMATS.items()},
        help="How keys and values are stored: "
        + "; ".join(f"{name}: {form.description}" for name, form in KV_FORMATS.items()),
    ),
    Number(
        name="cache_ratio",
        label="Cache ratio",
        group=PRECISION,
        default=0.8,
        low=0.05,
        high=0.95,
        step=0.05,
        whole=False,
        slider="linear",
        help="Share of the memory left after weights and workspace that the KV pool takes",
    ),
    Choice(
        name="batching",
        label="Policy",
        group=BATCHES,
        default="continuous",
        options={name: name for name in BATCHING},
        help="When waiting requests start. " + "; ".join(f"{name}: {_JOINS.get(name, '')}" for name in BATCHING),
    ),
    Number(
        name="max_batch_size",
        label="Max batch",
        group=BATCHES,
        default=64,
        low=1,
        high=2048,
        slider="log",
        reach=(1, 512),
        help="Most requests computed in one step",
    ),
    Switch(
        name="prefix_caching",
        label="Prefix caching",
        group=BATCHES,
        default=True,
        help="Keep the keys and values of finished prompts and reuse them for prompts that begin alike",
    ),
    Choice(
        name="workload",
        label="Preset",
        group=LOAD,
        default=_START,
        options={name: name for name in PRESETS},
        help="Lengths, shared prompts and arrivals: chats that come one by one, or a batch of documents at once",
    ),
    Choice(
        name="load",
        label="Arrivals",
        group=LOAD,
        default="rate",
        options=LOADS,
        help="How requests come: at random moments, the next when one ends, or all at the start",
    ),
    Number(
        name="rate",
        label="Requests/s",
        group=LOAD,
        default=_CHAT.rate,
        low=0.01,
        high=10_000,
        step=1,
        whole=False,
        slider="log",
        reach=(0.5, 200),
        help="Mean arrivals per second (Poisson)",
    ),
    Number(
        name="concurrency",
        label="In flight",
        group=LOAD,
        default=16,
        low=1,
        high=4096,
        slider="log",
        reach=(1, 512),
        help="Requests that are always under way, in the closed loop",
    ),
    Number(
        name="requests",
        label="Requests",
        group=LOAD,
        default=_CHAT.num_requests,
        low=1,
        high=100_000,
        step=16,
        help="How many requests a run has; about 300 are needed before a p99 is worth its name",
    ),
    Number(
        name="seed",
        label="Seed",
        group=LOAD,
        default=0,
        low=0,
        high=2**31 - 1,
        help="The same seed gives the same prompts, lengths and arrivals",
    ),
    Number(
        name="slo_ttft_ms",
        label="TTFT p99, ms",
        group=TARGET,
        default=1000,
        low=1,
        high=600_000,
        step=50,
        whole=False,
        help="Time to first token that 99 of 100 requests must meet, counted from the scheduled arrival",
    ),
    Number(
        name="slo_tpot_ms",
        label="TPOT p99, ms",
        group=TARGET,
        default=100,
        low=0.1,
        high=60_000,
        step=5,
        whole=False,
        help="Time per output token after the first that 99 of 100 requests must meet",
    ),
)
KNOBS: dict[str, Knob] = {knob.name: knob for knob in _KNOBS}
GROUPS = (MODEL, PRECISION, BATCHES, LOAD, TARGET)


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` in their types; ConfigError for a name that is no knob or a value outside its range."""
    for name in values:
        if name not in KNOBS:
            raise ConfigError(f"unknown knob {name!r}; the knobs are {', '.join(KNOBS)}")
    return {name: KNOBS[name].check(value) for name, value in values.items()}


def start_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Every knob's value from the few that are given: a preset and a device bring what suits them."""
    given = dict(given)
    if given.get("rate") == math.inf:
        given |= {"load": "burst"}
        del given["rate"]
    if "load" not in given and ("rate" in given) != ("concurrency" in given):
        given["load"] = "rate" if "rate" in given else "concurrency"
    given = checked(given)
    values = {knob.name: knob.default for knob in _KNOBS} | given
    values |= suggestions_for_preset(values["workload"]) | suggestions_for_machine(values["model"], values["device"])
    return values | given


def suggestions_for_preset(workload: str) -> dict[str, Any]:
    """The load that a preset comes with."""
    preset = PRESETS[workload]
    if preset.concurrency is not None:
        load: dict[str, Any] = {"load": "concurrency", "concurrency": preset.concurrency}
    else:
        load = {"load": "burst"} if preset.rate == math.inf else {"load": "rate", "rate": preset.rate}
    return {**load, "requests": preset.num_requests}


def suggestions_for_machine(model: str, device: str) -> dict[str, Any]:
    """A memory limit with which the knobs show: tight for the bundled model, the whole device for others."""
    return {"memory_limit_mb": BUNDLED_LIMIT if model == "bundled" and device not in GPUS else 0}


def config_from(values: Mapping[str, Any]) -> EngineConfig:
    """The engine's configuration; it checks combinations that no single knob can."""
    device = values["device"]
    simulated = device in GPUS
    return EngineConfig(
        model=values["model"],
        weights=values["weights"],
        kv=values["kv"],
        cache_ratio=values["cache_ratio"],
        memory_limit=values["memory_limit_mb"] * MB or None,
        batching=values["batching"],
        max_batch_size=values["max_batch_size"],
        prefix_caching=values["prefix_caching"],
        runner="simulated" if simulated else "torch",
        gpu=device if simulated else EngineConfig.gpu,
        device="auto" if simulated else device,
    )


def workload_from(values: Mapping[str, Any]) -> Workload:
    """The preset with the panel's load."""
    rate = {"rate": values["rate"], "burst": math.inf}.get(values["load"])
    concurrency = values["concurrency"] if rate is None else None
    return Workload.preset(
        values["workload"],
        rate=rate,
        concurrency=concurrency,
        num_requests=values["requests"],
        seed=values["seed"],
    )


def slo_from(values: Mapping[str, Any]) -> SLO:
    return SLO(ttft=values["slo_ttft_ms"] / 1e3, tpot=values["slo_tpot_ms"] / 1e3)
