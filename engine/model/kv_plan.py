"""Which KV format each layer has: one for all, chosen layer by layer, or changed where a key bias asks for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import ConfigError
from kernels import KV_FORMATS

_NAME = re.compile(r"layers\.(0|[1-9]\d*)")


@dataclass(frozen=True)
class KVPlan:
    """A KV format for every layer: `default`, but for those in `layers`.

    layers: (layer, format) pairs, kept sorted. A layer that is named keeps its format whatever its key bias, also where
        it names the default.
    Made from its JSON form by `of`: {"default": "int4", "layers.0": "int8"}; numbers serve as well: {0: "int8"}.
    ConfigError for a name or a format that does not exist; whether the model has such a layer is `ModelSpec`'s to say.
    """

    default: str = "bf16"
    layers: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        _check_format("kv", self.default)
        for layer, chosen in self.layers:
            _check_format(f"kv of layer {layer}", chosen)
        twice = [layer for layer, count in Counter(layer for layer, _ in self.layers).items() if count > 1]
        if twice:
            raise ConfigError(f"kv names layer {twice[0]} more than once")
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    @classmethod
    def of(cls, kv: KV | Mapping[str | int, str]) -> KVPlan:
        """From a format's name, or from a mapping of layers to formats that may hold a "default" (else "bf16")."""
        if isinstance(kv, KVPlan):
            return kv
        if isinstance(kv, Mapping):
            named = tuple((_layer(name), chosen) for name, chosen in kv.items() if name != "default")
            return cls(dict(kv).get("default", "bf16"), named)
        return cls(kv)

    def formats(self, num_layers: int) -> tuple[str, ...]:
        """The format of each layer. ConfigError where the plan names a layer that is not there."""
        named = dict(self.layers)
        for layer in named:
            if layer >= num_layers:
                raise ConfigError(f"kv names layer {layer}; the layers are 0 to {num_layers - 1}")
        return tuple(named.get(layer, self.default) for layer in range(num_layers))

    @property
    def simplest(self) -> KV:
        """The format's name where no layer is named, else the plan."""
        return self if self.layers else self.default

    def as_json(self) -> str | dict[str, str]:
        """What `of` takes back."""
        named = {f"layers.{layer}": chosen for layer, chosen in self.layers}
        return {"default": self.default, **named} if named else self.default

    def __str__(self) -> str:
        """As in "int4 but layers 0 and 3 int8"."""
        by_format: dict[str, list[int]] = {}
        for layer, chosen in self.layers:
            if chosen != self.default:
                by_format.setdefault(chosen, []).append(layer)
        parts = [f"{layer_names(layers)} {chosen}" for chosen, layers in by_format.items()]
        return f"{self.default} but {', '.join(parts)}" if parts else self.default


KV = str | KVPlan
"""A key of kernels.KV_FORMATS for every layer, or a plan."""


def layer_names(layers: Sequence[int]) -> str:
    """ "layer 3", "layers 0 and 3", "layers 0, 2 to 5 and 9"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [word for run in runs for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    listed = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
    return f"layer {listed}" if len(layers) == 1 else f"layers {listed}"


def _layer(name: object) -> int:
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        return name
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(f"kv names {name!r}; a layer is called layers.<number>, or by its number from 0")
    return int(found[1])


def _check_format(what: str, chosen: object) -> None:
    if not isinstance(chosen, str) or chosen not in KV_FORMATS:
        raise ConfigError(f"{what} is {chosen!r}; it must be one of {', '.join(KV_FORMATS)}")


# key bias


KEY_NOISE = 0.25
"""The largest rounding error of keys, in units of their own spread, that a layer may have without a repair.

The bundled model with a bias given to its keys, perplexity against bf16 KV of the same model: int4 at an error of 0.10
(no bias) to 0.5 +2.5 to +3.3 %, at 1.0 +15 %, at 4.0 25 times as much; fp8 at 0.2 +1.2 %, at 0.4 +4.5 %; int8 keys at
0.23 +0.8 %, at 0.46 +2.0 %."""

REPAIRS = {"int4": ("k8v4",), "fp8": ("int8",)}
"""What replaces a format whose keys are too coarse, where its own error suffices; else bf16 does."""


@dataclass(frozen=True)
class KeyBias:
    """What a layer's keys are like for a quantizer, in units of their spread over tokens; its worst KV head counts.

    span: from the smallest to the largest element of one key. rms: root mean square of its elements. A bias that is
    large in few channels widens the span, and the steps of every channel with it; the part of the key that tells
    tokens apart then falls between two steps (Hooper et al., "KVQuant", 2024, on outlier channels of keys)."""

    span: float
    rms: float

    def repaired(self, format: str) -> str:
        """`format`, or what a layer with these keys should have instead."""
        candidates = (format, *REPAIRS.get(format, ()))
        return next((name for name in candidates if self.noise(name) <= KEY_NOISE), "bf16")

    def noise(self, format: str) -> float:
        """Rounding error of keys in a format, in units of their spread."""
        return KV_FORMATS[format].key.noise(self.span, self.rms)
