"""`quantization_config` of a checkpoint's config.json: what it claims, and what its tensors must then be.

Which modules are quantized is told by the tensors: a floating `weight` stays bf16. What config.json claims of the
others decides the shapes and dtypes that they must have (`engine.loading.quantized`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.loading.quantized import FLOATS, GROUPS, KINDS, Scheme, UnreadableError, Wanted
from engine.model.spec import StoredFormat
from kernels import WEIGHT_FORMATS

METHODS = ("awq", "gptq", "compressed-tensors")
IGNORED = ("input_scale", "input_zero_point", "k_scale", "v_scale")  # activations and keys are scaled as they come
BF16_ACTIVATIONS = "activations computed in bf16, though made to be quantized too"
SCALED_PER_TOKEN = "activations scaled per token as they come, not as the checkpoint says"
ROUNDED_TOO = f"activations rounded to fp8 too, in steps of more than {WEIGHT_FORMATS['fp8'].sixteen_bit_rows} tokens"


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's own quantization: what its tensors must be, and what they become."""

    method: str
    schemes: tuple[Scheme, ...]
    notes: tuple[str, ...] = ()  # where what is computed differs from what the checkpoint was made for

    @property
    def stored(self) -> StoredFormat:
        """What `ModelSpec` needs to know; of several schemes the first stands for all."""
        first = self.schemes[0]
        group = next(size for size in GROUPS if (first.group or size) % size == 0)
        return StoredFormat(self.method, KINDS[first.kind].weights, group, "; ".join(self.notes))

    def expected(
        self, dense: Mapping[str, Wanted], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
    ) -> tuple[dict[str, Wanted], dict[str, Scheme]]:
        """The tensors that must be there, given those of the dense model; the quantized modules with their schemes.

        shapes, dtypes: of the tensors found, from the headers.
        """
        wanted: dict[str, Wanted] = {}
        modules: dict[str, Scheme] = {}
        for name, matrix in dense.items():
            module = name.removesuffix(".weight")
            is_linear = name.endswith("_proj.weight")
            if not is_linear or dtypes.get(name) in FLOATS:
                wanted[name] = matrix
                continue
            n, k = matrix.shapes[0]
            scheme, leaves = self._choose(module, n, k, shapes)
            if k % (scheme.group or k):
                raise CheckpointError(f"{module}: {k} in features are not a multiple of the group size {scheme.group}")
            modules[module] = scheme
            wanted.update(
                (f"{module}.{leaf}", want)
                for leaf, want in leaves.items()
                if not want.optional or f"{module}.{leaf}" in shapes
            )
        for module in modules:  # the zero biases that AutoGPTQ gives to every module
            if f"{module}.bias" in shapes and f"{module}.bias" not in dense and self.method == "gptq":
                wanted[f"{module}.bias"] = Wanted((dense[f"{module}.weight"].shapes[0][:1],), tuple(FLOATS))
        return wanted, modules

    def _choose(
        self, module: str, n: int, k: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[Scheme, dict[str, Wanted]]:
        """The scheme whose shapes are those of the tensors; the first one where none is, for the refusal to name."""
        layouts = [(scheme, KINDS[scheme.kind].wanted(scheme, module, n, k)) for scheme in self.schemes]
        for scheme, leaves in layouts:
            required = {leaf: want for leaf, want in leaves.items() if not want.optional}
            if all(shapes.get(f"{module}.{leaf}") in want.shapes for leaf, want in required.items()):
                return scheme, leaves
        return layouts[0]


def read_quantization(where: str, raw: object) -> Quantization | None:
    """`quantization_config` of config.json; CheckpointError where this engine cannot compute what it says."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}: quantization_config is {raw!r}; it must be an object")
    method = raw.get("quant_method", "unnamed")
    if method not in METHODS:
        raise CheckpointError(
            f"{where} is quantized already by method {method!r}; these are read: {', '.join(METHODS)}, and "
            "checkpoints of 16 or 32 bits"
        )
    try:
        schemes = {"awq": _awq, "gptq": _gptq}.get(method, _compressed)(raw)
    except UnreadableError as error:
        raise CheckpointError(f"{where} is quantized already ({method}): {error}") from error
    groups = raw.get("config_groups")
    given = groups.values() if isinstance(groups, dict) else ()
    inputs = [group.get("input_activations") if isinstance(group, dict) else None for group in given]
    notes = {_note(scheme, given) for scheme, given in zip(schemes, inputs, strict=False)} - {""}
    return Quantization(method, schemes, tuple(sorted(notes)))


def _note(scheme: Scheme, inputs: object) -> str:
    """What the user should know of the activations of one config group; "" where they are computed as it says."""
    if not inputs:
        return ROUNDED_TOO if scheme.kind == "fp8" else ""
    if WEIGHT_FORMATS[KINDS[scheme.kind].weights].activations is None:
        return BF16_ACTIVATIONS
    if not isinstance(inputs, dict):
        return SCALED_PER_TOKEN
    return "" if inputs.get("dynamic") is True and inputs.get("strategy") == "token" else SCALED_PER_TOKEN


def _in_int8(inputs: object) -> bool:
    """Whether activations are meant to be what `w8a8` and `w4a8` make of them, but for where their scales come from."""
    if not isinstance(inputs, dict):
        return False
    kind = inputs.get("num_bits"), inputs.get("type", "int"), inputs.get("symmetric", True)
    return kind == (8, "int", True)


def _awq(raw: Mapping[str, Any]) -> tuple[Scheme, ...]:
    version = str(raw.get("version") or raw.get("format") or "gemm").lower()
    if version != "gemm":
        raise UnreadableError(f"its version is {version!r}; 'gemm' is read")
    _only_bits(raw.get("bits", 4), (4,))
    return (Scheme("awq", _group(raw.get("group_size", 128)), symmetric=False),)


def _gptq(raw: Mapping[str, Any]) -> tuple[Scheme, ...]:
    version = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        raise UnreadableError(f"its checkpoint_format is {version!r}; 'gptq' and 'gptq_v2' are read")
    _only_bits(raw.get("bits"), (4,))
    return (Scheme(version, _group(raw.get("group_size", 128)), symmetric=False),)


def _compressed(raw: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """config_groups as in the compressed-tensors library's QuantizationConfig and QuantizationArgs."""
    if raw.get("transform_config"):
        raise UnreadableError("its transform_config asks for rotations while running, which are not computed")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UnreadableError("it has no config_groups")
    schemes = []
    for name, group in groups.items():
        args = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(args, dict):
            raise UnreadableError(f"config group {name} says nothing of weights")
        form = str(group.get("format") or raw.get("format"))
        schemes.append(_compressed_scheme(form, args, integer_inputs=_in_int8(group.get("input_activations"))))
    return tuple(schemes)


def _compressed_scheme(form: str, args: Mapping[str, Any], *, integer_inputs: bool) -> Scheme:
    bits, strategy, symmetric = args.get("num_bits"), args.get("strategy"), bool(args.get("symmetric", True))
    if args.get("type", "int") != ("float" if form == "float-quantized" else "int"):
        raise UnreadableError(f"its weights are of type {args.get('type')!r} in the format {form!r}")
    if form == "pack-quantized":
        _only_bits(bits, (4, 8))
        if bits == 4:
            group = _group(args.get("group_size") if strategy == "group" else -1)
            return Scheme("packed4a8" if integer_inputs else "packed4", group, symmetric)
    elif form in ("int-quantized", "float-quantized"):
        _only_bits(bits, (8,))
    else:
        raise UnreadableError(
            f"its format is {form!r}; 'pack-quantized', 'int-quantized' and 'float-quantized' are read"
        )
    if strategy not in ("channel", "tensor") or not symmetric:
        kind = strategy if symmetric else f"asymmetric {strategy}"
        raise UnreadableError(f"its 8-bit weights are scaled by {kind!r}; symmetric 'channel' and 'tensor' are read")
    if form == "int-quantized" and integer_inputs:
        return Scheme("w8a8")
    return Scheme({"pack-quantized": "packed8", "int-quantized": "int8", "float-quantized": "fp8"}[form])


def _only_bits(bits: object, read: tuple[int, ...]) -> None:
    if bits not in read:
        raise UnreadableError(f"its weights have {bits} bits; {' and '.join(map(str, read))} are read")


def _group(size: object) -> int | None:
    """None for -1, one scale per channel. A multiple of the kernels' groups is read by repeating its scales."""
    if size == -1:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % GROUPS[-1]:
        raise UnreadableError(f"its group size is {size}; multiples of {GROUPS[-1]} and -1 (per channel) are read")
    return size
