"""A quantized model in memory, and as a folder of safetensors that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import ConfigError
from engine.loading.checkpoint import INDEX, OUTER_NAMES, expected_tensors, full_names
from engine.loading.quantized import Matrix
from engine.model.spec import ModelSpec
from engine.quantize.write import leaves_of, quantization_config
from kernels import QuantizedWeight

SHARD_BYTES = 4 * 10**9
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
RECIPE = "quantize.json"


class QuantizedWeights:
    """Every tensor of a quantized model by (canonical name, layer), on the host: a source that decoders are built from.

    folder: of the model it was made from, None where there is none. recipe: how it was made.
    """

    def __init__(
        self, tensors: dict[tuple[str, int | None], Matrix], folder: Path | None, recipe: Mapping[str, Any]
    ) -> None:
        self.tensors, self.folder, self.recipe = tensors, folder, dict(recipe)

    def __call__(self, name: str, layer: int | None, shape: tuple[int, ...], device: torch.device) -> Matrix:
        return self.tensors[name, layer]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        self.tensors = {}


def check_folder(folder: Path) -> Path:
    """`folder`, if it can be made; ConfigError where it exists already or its parent does not."""
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"out is {str(folder)!r}, which exists already; name a folder that does not")
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"out is {str(folder)!r}, but there is no folder {str(parent)!r} to make it in")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"out is {str(folder)!r}, but nothing may be written in {str(parent)!r}")
    return folder


def save(spec: ModelSpec, weights: QuantizedWeights, folder: Path, layout: str) -> None:
    """Write the checkpoint beside its place and move it there when it is complete; an error or interrupt leaves
    nothing behind."""
    check_folder(folder)
    assert weights.folder is not None
    partial = folder.absolute().parent / f".{folder.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        _write_tensors(spec, weights, partial, layout)
        _write_config(spec, weights, partial, layout)
        for pattern in COPIED:
            for path in weights.folder.glob(pattern):
                shutil.copyfile(path, partial / path.name)
        (partial / RECIPE).write_text(json.dumps(weights.recipe, indent=1) + "\n")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _stored_tensors(spec: ModelSpec, weights: QuantizedWeights, layout: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the checkpoint, one module at a time."""
    rows = {name: wanted.shapes[0][0] for name, wanted in expected_tensors(spec).items()}
    for (name, layer), held in weights.tensors.items():
        if layer is None:
            yield OUTER_NAMES[name], held  # type: ignore[misc]  # outside the layers nothing is quantized
            continue
        first = 0
        for full in full_names(name, layer):
            part = slice(first, first + rows[full])
            first += rows[full]
            if isinstance(held, Tensor):
                yield full, held[part].contiguous()
            else:
                module = full.removesuffix(".weight")
                leaves = leaves_of(_rows(held, part), layout)
                yield from ((f"{module}.{leaf}", tensor) for leaf, tensor in leaves.items())


def _rows(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    scale, zero = (None if held is None else held[rows] for held in (weight.scale, weight.zero))
    return QuantizedWeight(weight.format, weight.codes[rows], scale, zero, weight.group_size, weight.order)


def _write_tensors(spec: ModelSpec, weights: QuantizedWeights, folder: Path, layout: str) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        path = folder / _shard(len(shards))
        path.touch()  # with the user's own permissions, where safetensors would let nobody else read it
        mode = path.stat().st_mode
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(mode)
        shards.append(list(pending))
        pending.clear()

    for name, tensor in _stored_tensors(spec, weights, layout):
        if pending and sum(held.nbytes for held in pending.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / _shard(0)).rename(folder / "model.safetensors")
        return
    final = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(final):
        (folder / _shard(i)).rename(folder / name)
    weight_map = {name: final[i] for i, names in enumerate(shards) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _shard(index: int) -> str:
    return f"shard-{index}.safetensors"


def _write_config(spec: ModelSpec, weights: QuantizedWeights, folder: Path, layout: str) -> None:
    """config.json of the source, with the dtype that is stored and what was quantized how."""
    assert weights.folder is not None
    config = json.loads((weights.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the name of `dtype` until transformers 4
    config["dtype"] = "bfloat16"
    formats = {}
    for (name, layer), held in weights.tensors.items():
        if layer is not None and name in spec.linears():
            kind = held.format if isinstance(held, QuantizedWeight) else "bf16"
            formats.update({full.removesuffix(".weight"): kind for full in full_names(name, layer)})
    with_order = any(isinstance(held, QuantizedWeight) and held.order is not None for held in weights.tensors.values())
    described = quantization_config(layout, formats, int(weights.recipe["group_size"]), with_order=with_order)
    if described is not None:
        config["quantization_config"] = described
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
