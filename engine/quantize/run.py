"""Quantizing a model: layer after layer, each for the inputs that the quantized layers before it really send.

    python -m engine.quantize --model bundled --method gptq --calibration text.py --out DIR

The result runs in an engine at once, and is saved as a folder of safetensors that other tools read too. The methods
themselves are in `engine.quantize.layers`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from engine.config import GROUP_SIZES, EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.files import writable
from engine.loading.checkpoint import CheckpointWeights
from engine.loading.loader import LoadedModel, load_model
from engine.loading.quantized import Matrix
from engine.machine import write_report
from engine.model.spec import ModelSpec, StoredFormat
from engine.model.weight_plan import MODULES, WeightPlan, Weights
from engine.quantize.calibration import BUDGET, WINDOW, calibration_windows
from engine.quantize.layers import METHODS, Method, Options, quantized_tensors
from engine.quantize.save import QuantizedWeights, check_folder, save
from engine.quantize.write import LAYOUTS, choose_layout
from kernels import WEIGHT_FORMATS
from kernels.formats.gptq import ORDERS

DEVICES = ("auto", "cpu", "cuda")


def quantize(
    model: str | LoadedModel,
    method: str = "gptq",
    *,
    calibration: str | None = None,
    weights: Weights = "int4",
    group_size: int = 128,
    out: str | Path | None = None,
    budget: int = BUDGET,
    layout: str | None = None,
    order: str = "static",
    device: str = "auto",
    bar: Callable[..., Any] | None = tqdm,
    stopped: Callable[[], bool] = lambda: False,
) -> LoadedModel:
    """A copy of `model` with its layers quantized; runs in an Engine at once, and is saved where `out` is given.

    model: what EngineConfig takes, or a LoadedModel, which stays open. method: a key of METHODS.
    calibration: text like that which the model will see; AWQ, GPTQ and SmoothQuant need it.
    budget: most calibration tokens, in windows of 512; time and memory grow with them.
    weights: a format or a WeightPlan; the lm_head and the embeddings stay bf16. SmoothQuant takes formats of 8 or 16
        bits: "bf16" gives a smoothed checkpoint that still is to be quantized.
    out: a folder that does not exist yet, written when everything else is done. layout: "awq", "gptq",
        "compressed-tensors" or "plain" (bf16); None takes the first of them that holds the result.
    order: of GPTQ's columns, see `kernels.formats.gptq`; "group" needs the layout "gptq".
    bar: tqdm or what takes its place, None for silence. stopped: asked between matrices.
    Raises ConfigError, CheckpointError, or InterruptedError when `stopped` says so.
    """
    options = Options(plan=WeightPlan.of(weights), group_size=group_size, order=order)
    chosen = _check(method, options, calibration)
    form = choose_layout(layout, options.plan, with_order=order == "group" and method == "gptq")
    folder = None if out is None else check_folder(Path(out).expanduser())
    loaded = load_model(EngineConfig(model=model)) if isinstance(model, str) else model
    try:
        source = loaded.weights
        origin = source.folder if isinstance(source, CheckpointWeights | QuantizedWeights) else None
        _check_model(loaded, options, saved=folder is not None)
        target = _device(device)
        windows = None
        if chosen.calibrated:
            length = min(WINDOW, loaded.spec.max_positions)
            windows = calibration_windows(loaded.tokenizer.encode(calibration or ""), budget, length)
        tensors: dict[tuple[str, int | None], Matrix] = {}
        with _bar(bar, loaded.spec.num_layers * len(MODULES), method) as progress, torch.no_grad():
            for key, tensor in quantized_tensors(loaded, chosen, options, windows, target, progress.update):
                if stopped():
                    raise InterruptedError("the quantization was stopped; nothing was written")
                tensors[key] = tensor
        spec = replace(loaded.spec, stored=_stored(method, options))
        recipe = {
            "source": loaded.source,
            "method": method,
            "weights": options.plan.as_json(),
            "group_size": group_size,
            "order": order if method == "gptq" else None,
            "calibration_tokens": 0 if windows is None else windows.numel(),
        }
        result = QuantizedWeights(tensors, origin, recipe)
        if folder is not None:
            save(spec, result, folder, form)
        return LoadedModel(spec, loaded.tokenizer, result, f"{loaded.source} quantized by {method}")
    finally:
        if loaded is not model:
            loaded.close()


def _check(method: str, options: Options, calibration: str | None) -> Method:
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    if options.order not in ORDERS:
        raise ConfigError(f"order is {options.order!r}; it must be one of {', '.join(ORDERS)}")
    if options.plan.head not in (None, "bf16"):
        raise ConfigError(f"weights of lm_head is {options.plan.head!r}; a saved checkpoint keeps it at 'bf16'")
    chosen = METHODS[method]
    grouped = [name for name in options.plan.formats if WEIGHT_FORMATS[name].grouped]
    if chosen.to_int4 is None and grouped:
        refused = " and ".join(sorted(grouped))
        raise ConfigError(f"weights is '{options.plan}'; {method} prepares formats of 8 or 16 bits, not {refused}")
    if chosen.prepare is None and options.plan == WeightPlan("bf16"):
        raise ConfigError(f"weights is 'bf16': {method} would change nothing")
    if chosen.calibrated and not calibration:
        free = ", ".join(name for name, entry in METHODS.items() if not entry.calibrated)
        raise ConfigError(f"method {method} needs a calibration text; without one there are {free}")
    return chosen


def _check_model(model: LoadedModel, options: Options, *, saved: bool) -> None:
    spec = model.spec
    if spec.stored is not None:
        raise ConfigError(f"{spec.name} is quantized already ({spec.stored.method}); quantize what it was made from")
    if saved and model.is_synthetic:
        raise ConfigError(f"model {model.source!r} has random weights: it can be quantized, but is not worth saving")
    spec.check_weights(options.plan)
    if options.group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size is {options.group_size}; it must be one of {', '.join(map(str, GROUP_SIZES))}")
    for name, (_, k) in spec.matrices().items():
        if name.startswith("layers.") and WEIGHT_FORMATS[options.plan[name]].grouped and k % options.group_size:
            raise ConfigError(f"group_size is {options.group_size}; it does not divide the {k} in features of {name}")


def _device(name: str) -> torch.device:
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}; it must be one of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no CUDA device here")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _stored(method: str, options: Options) -> StoredFormat | None:
    """None where everything stays bf16: such a model is still to be quantized."""
    formats = [name for name in (options.plan.default, *sorted(options.plan.formats)) if name != "bf16"]
    return StoredFormat(method, formats[0], options.group_size) if formats else None


def _bar(bar: Callable[..., Any] | None, total: int, method: str) -> Any:
    return (bar or tqdm)(total=total, desc=method, unit="matrix", disable=bar is None, leave=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 2 for what cannot be done as asked, 130 after an interrupt; then nothing was written."""
    parser = argparse.ArgumentParser(prog="python -m engine.quantize", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="'bundled' (default), 'synthetic:<shape>', folder, hub id")
    parser.add_argument("--method", default="gptq", choices=METHODS, help="; ".join(
        f"{name}: {method.label}" for name, method in METHODS.items()))
    parser.add_argument("--weights", default="int4", type=_plan, help="a format, or a plan as JSON: "
                        '\'{"default": "int4", "layers.0.down": "int8"}\'')
    parser.add_argument("--group-size", type=int, default=128, help="of int4 and w4a8: 64 or 128")
    parser.add_argument("--calibration", metavar="FILE", nargs="+", type=Path, help="text like that the model will see")
    parser.add_argument("--budget", type=int, default=BUDGET, help="most calibration tokens (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="folder to write; without it the work is only timed")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: the first that holds the result")
    parser.add_argument("--order", default="static", choices=ORDERS, help="of GPTQ's columns (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--json", metavar="FILE", type=writable, help="also write seconds, bytes, machine, versions")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        text = "\n".join(path.read_text(encoding="utf-8") for path in options.calibration or ())
        with load_model(EngineConfig(model=options.model)) as model:
            read = time.perf_counter()
            result = quantize(
                model, options.method, calibration=text or None, weights=options.weights,
                group_size=options.group_size, out=options.out, budget=options.budget, layout=options.layout,
                order=options.order, device=options.device, bar=None if options.quiet else tqdm,
            )  # fmt: skip
    except (ConfigError, CheckpointError, OSError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - read
    bits = bits_per_weight(result.spec, options.weights, options.group_size)
    print(f"{result.source}: {bits:.2f} bits per weight of the layers' matrices, scales and zeros counted; "
          "embeddings and lm_head bf16")
    print(f"read in {read - started:.1f} s, quantized{' and saved' if options.out else ''} in {seconds:.1f} s"
          f"{f': {options.out}' if options.out else ''}")
    if options.json:
        used = torch.cuda.is_available() and options.device != "cpu"
        record = {
            "model": options.model,
            **result.weights.recipe,  # type: ignore[attr-defined]  # always a QuantizedWeights
            "bits_per_weight": bits,
            "seconds": seconds,
            "peak_device_bytes": torch.cuda.max_memory_allocated() if used else None,
            "host_bytes": result.host_bytes,
        }
        write_report(options.json, record, argv)
    return 0


def _plan(text: str) -> WeightPlan:
    return WeightPlan.of(json.loads(text) if text.startswith("{") else text)


def bits_per_weight(spec: ModelSpec, weights: Weights, group_size: int) -> float:
    """Of the layers' matrices, scales and zeros counted."""
    sizes = spec.matrix_bytes(weights, group_size)
    elements = {name: n * k for name, (n, k) in spec.matrices().items() if name.startswith("layers.")}
    return 8 * sum(sizes[name] for name in elements) / sum(elements.values())
