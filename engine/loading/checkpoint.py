"""A model folder, checked before it is used: config.json against the tensors that are really there.

Only safetensors are read, and no code of the checkpoint is run. Every defect is a CheckpointError of one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.loading.quantization_config import IGNORED, read_quantization
from engine.loading.quantized import FLOATS, Matrix, Scheme, Wanted, convert, join
from engine.model.decoder import layer_shapes, outer_shapes
from engine.model.rope import check_rope
from engine.model.spec import ModelSpec

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
HEAD_DIMS = (64, 128)
_SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_positions"
)  # fmt: skip
INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_PROJECTIONS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "input_norm": ("input_layernorm",),
    "post_norm": ("post_attention_layernorm",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}
OUTER_NAMES = {
    "embeddings": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight",
}  # fmt: skip


def read_spec(folder: Path) -> ModelSpec:
    """The dimensions that config.json states, refused by name where this engine does not compute them."""
    raw = _read_json(folder / "config.json")
    name = folder.name
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "(none named)"
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{folder}: architecture {architecture} is not supported; these are: {', '.join(ARCHITECTURES)}"
        )
    quantization = read_quantization(str(folder), raw.get("quantization_config"))
    config = _transformers_config(folder)
    heads = int(config.num_attention_heads)
    window = _window(folder, config)
    max_positions = int(config.max_position_embeddings)
    spec = ModelSpec(
        name=name,
        architecture=architecture,
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        intermediate_size=int(config.intermediate_size),
        max_positions=max_positions if window is None else min(max_positions, window),
        rms_norm_eps=float(config.rms_norm_eps),
        tie_embeddings=bool(config.tie_word_embeddings),
        attention_bias=architecture == "Qwen2ForCausalLM" or bool(getattr(config, "attention_bias", False)),
        output_bias=architecture != "Qwen2ForCausalLM" and bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=window,
        rope=dict(config.rope_parameters),
        eos_token_ids=_eos_token_ids(folder, config),
        stored=None if quantization is None else quantization.stored,
    )
    _check_dimensions(folder, spec, str(config.hidden_act))
    return spec


def _check_dimensions(folder: Path, spec: ModelSpec, activation: str) -> None:
    for size in _SIZES:
        if getattr(spec, size) < 1:
            raise CheckpointError(f"{folder}: {size} is {getattr(spec, size)} in config.json; it must be at least 1")
    if spec.num_heads % spec.num_kv_heads:
        raise CheckpointError(f"{folder}: {spec.num_heads} heads cannot share {spec.num_kv_heads} KV heads evenly")
    if spec.head_dim not in HEAD_DIMS:
        raise CheckpointError(f"{folder}: head_dim is {spec.head_dim}; it must be one of {HEAD_DIMS}")
    if activation != "silu":
        raise CheckpointError(f"{folder}: hidden_act is {activation!r}; only 'silu' is supported")
    if not 0 <= spec.rms_norm_eps < math.inf:  # also refuses NaN
        raise CheckpointError(f"{folder}: rms_norm_eps is {spec.rms_norm_eps}; it must be at least 0 and finite")
    check_rope(spec)


def _window(folder: Path, config: Any) -> int | None:
    """Sliding window in tokens where some layer really uses one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    if not isinstance(window, int):
        raise CheckpointError(f"{folder}: sliding_window is {window!r} in config.json; it must be a number of tokens")
    return int(window) if kinds is None or "sliding_attention" in kinds else None


def _transformers_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # huggingface_hub's strict dataclasses raise their own kinds
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder / 'config.json'} is refused by transformers: {reason}") from error


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    stated: list[Any] = [getattr(config, "eos_token_id", None)]
    if (folder / "generation_config.json").is_file():
        stated.append(_read_json(folder / "generation_config.json").get("eos_token_id"))
    ids: set[int] = set()
    for value in stated:
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in tokens):
            raise CheckpointError(f"{folder}: eos_token_id is {value!r}; it must be a token id, or a list of them")
        ids.update(tokens)
    return tuple(sorted(ids))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def expected_tensors(spec: ModelSpec) -> dict[str, Wanted]:
    """What a checkpoint in transformers' layout must hold where nothing is quantized."""
    tensors = {OUTER_NAMES[name]: shape for name, shape in outer_shapes(spec).items()}
    rows = {
        "self_attn.q_proj": spec.num_heads * spec.head_dim,
        "self_attn.k_proj": spec.num_kv_heads * spec.head_dim,
        "self_attn.v_proj": spec.num_kv_heads * spec.head_dim,
        "mlp.gate_proj": spec.intermediate_size,
        "mlp.up_proj": spec.intermediate_size,
    }
    for layer in range(spec.num_layers):
        for part, fused in layer_shapes(spec).items():
            for name, leaf in _sources(part):
                tensors[f"model.layers.{layer}.{name}.{leaf}"] = (rows.get(name, fused[0]), *fused[1:])
    return {name: Wanted((shape,), tuple(FLOATS)) for name, shape in tensors.items()}


def _sources(part: str) -> list[tuple[str, str]]:
    """(module, "weight" or "bias") of the tensors that make up one canonical part."""
    leaf = "bias" if part.endswith("_bias") else "weight"
    return [(module, leaf) for module in _PROJECTIONS[part.removesuffix("_bias")]]


def full_names(part: str, layer: int) -> list[str]:
    """The tensors of a checkpoint that one canonical part of a layer is joined from, in the order of their rows."""
    return [f"model.layers.{layer}.{module}.{leaf}" for module, leaf in _sources(part)]


class CheckpointWeights:
    """A checkpoint's tensors in host memory as stored: read once, so that each weight format quantizes the original.

    Matrices that are quantized already are held unpacked, a byte per code.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.folder = folder
        expected = expected_tensors(spec)
        self._tensors, modules = _read_tensors(folder, expected, tied=spec.tie_embeddings)
        quantized = convert(self._tensors, modules, expected)
        self._quantized: dict[tuple[str, int], Matrix] = {}
        for layer in range(spec.num_layers):
            for name in spec.linears():
                full = full_names(name, layer)
                if any(part in quantized for part in full):
                    parts = [quantized[part] if part in quantized else self._tensors[part] for part in full]
                    self._quantized[name, layer] = join(parts, full)
                    for part in full:
                        quantized.pop(part, None)

    def __call__(self, name: str, layer: int | None, shape: tuple[int, ...], device: torch.device) -> Matrix:
        """The canonical tensor in its stored dtype; parts that the engine fuses are joined on the host."""
        if layer is None:
            return self._tensors[OUTER_NAMES[name]]
        if (name, layer) in self._quantized:
            return self._quantized[name, layer]
        parts = [self._tensors[full] for full in full_names(name, layer)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in (*self._tensors.values(), *self._quantized.values()))

    def close(self) -> None:
        self._tensors, self._quantized = {}, {}


def read_modules(folder: Path, spec: ModelSpec, modules: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a few modules at high precision, those of quantized matrices dequantized."""
    expected = expected_tensors(spec)
    tensors, schemes = _read_tensors(folder, expected, tied=spec.tie_embeddings, only=modules)
    quantized = convert(tensors, {name: schemes[name] for name in modules if name in schemes}, expected)
    return tensors | {name: matrix.dequantize() for name, matrix in quantized.items()}


@dataclass(frozen=True)
class _Header:
    path: Path
    shape: tuple[int, ...]
    dtype: str


def _read_tensors(
    folder: Path, expected: Mapping[str, Wanted], *, tied: bool, only: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Scheme]]:
    """The tensors, of the modules named in `only` where it is given, and which modules are quantized. All headers are
    checked before the first tensor is read."""
    files = _safetensors_files(folder)
    quantization = read_quantization(str(folder), _read_json(folder / "config.json").get("quantization_config"))
    found: dict[str, _Header] = {}
    for path in files:
        found.update(_headers(path, tied, quantized=quantization is not None))
    modules: dict[str, Scheme] = {}
    wanted = dict(expected)
    if quantization is not None:
        shapes, dtypes = ({k: getattr(h, what) for k, h in found.items()} for what in ("shape", "dtype"))
        wanted, modules = quantization.expected(expected, shapes, dtypes)
        if not modules:
            raise CheckpointError(
                f"{folder}: config.json says it is quantized already by {quantization.method}, but every matrix "
                "is stored unquantized"
            )
    _check_headers(folder, found, wanted)
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as held:
            for name in [name for name, header in found.items() if header.path == path]:
                if only is not None and name.rsplit(".", 1)[0] not in only:
                    continue
                tensors[name] = held.get_tensor(name).clone()  # a copy, so that closing the file unmaps it
                if not _finite(tensors[name]):
                    raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity")
    return tensors, modules


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.to(torch.bfloat16)).all())


def _check_headers(folder: Path, found: Mapping[str, _Header], wanted: Mapping[str, Wanted]) -> None:
    for path in sorted({header.path for header in found.values()}):
        unexpected = [name for name, header in found.items() if header.path == path and name not in wanted]
        if unexpected:
            raise CheckpointError(f"{path}: {_few(unexpected)} not expected by config.json")
    for name, header in found.items():
        shapes, dtypes = wanted[name].shapes, wanted[name].dtypes
        if header.shape not in shapes:
            raise CheckpointError(
                f"{header.path}: tensor {name} has shape {list(header.shape)}, config.json asks for {list(shapes[0])}"
            )
        if header.dtype not in dtypes:
            raise CheckpointError(
                f"{header.path}: tensor {name} is stored as {header.dtype}; {', '.join(dtypes)} "
                f"{'is' if len(dtypes) == 1 else 'are'} read"
            )
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(f"{folder}: {_few(missing)} missing, config.json asks for {len(wanted)} tensors")


def _headers(path: Path, tied: bool, *, quantized: bool) -> dict[str, _Header]:
    """What one file holds."""
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated ({path.stat().st_size:,} bytes): {error}") from error
    with opened as held:
        names = [name for name in held.keys() if not _ignorable(name, tied, quantized)]  # noqa: SIM118 (not a dict)
        return {name: _Header(path, *_describe(held, name)) for name in names}


def _describe(held: Any, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype from the header. A slice keeps the file mapped: none may outlive this call in a traceback."""
    view = held.get_slice(name)
    return tuple(view.get_shape()), view.get_dtype()


def _ignorable(name: str, tied: bool, quantized: bool) -> bool:
    """Tensors that are not read: rotary tables and a copy of tied embeddings in older checkpoints; scales of quantized
    activations and keys, which are bf16 here or have scales of their own."""
    if quantized and name.rsplit(".", 1)[-1] in IGNORED:
        return True
    return name.endswith("rotary_emb.inv_freq") or (tied and name == OUTER_NAMES["lm_head"])


def _safetensors_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        files = [folder / name for name in sorted({str(name) for name in index.values()})]
        for path in files:
            if path.parent != folder or not path.is_file():
                raise CheckpointError(f"{folder / INDEX} names {path.name}, which is not in the folder")
        return files
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is no file: a folder, or a link that leads nowhere")
    if files:
        return files
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({pickled[0]}); a pickle can run code, so only safetensors are read"
        )
    raise CheckpointError(f"{folder} has no weights: no *.safetensors file is there")


def _few(names: list[str]) -> str:
    """'tensor a is', or 'tensors a, b and 3 more are'."""
    shown = ", ".join(names[:2])
    if len(names) == 1:
        return f"tensor {shown} is"
    return f"tensors {shown}{f' and {len(names) - 2} more' if len(names) > 2 else ''} are"
