"""Which weight format each matrix has: one for all, or chosen matrix by matrix (mixed precision)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import ConfigError
from kernels import WEIGHT_FORMATS

MODULES = ("qkv", "o", "gate_up", "down")
"""The fused matrices of one layer, in the order of its computation."""

LM_HEAD = "lm_head"
_NAME = re.compile(rf"layers\.(0|[1-9]\d*)\.({'|'.join(MODULES)})|{LM_HEAD}")


@dataclass(frozen=True)
class WeightPlan:
    """A format for every matrix: `default`, but for those in `named`.

    named: (name, format) pairs; a name is "layers.<i>.<module>" with a module of MODULES, or "lm_head", which follows
        the default where it is not named (engine.model.spec.HEAD_FORMAT). Kept sorted and without entries that say
        what holds anyway, so that equal plans are equal.
    Made from its JSON form by `of`: {"default": "int4", "layers.3.down": "int8", "lm_head": "bf16"}.
    ConfigError for a name or a format that does not exist; whether the model has such a layer is `ModelSpec`'s to say.
    """

    default: str = "bf16"
    named: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _check_format("weights", self.default)
        for name, chosen in self.named:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"weights names {name!r}; a matrix is called layers.<number>.<{'|'.join(MODULES)}> or {LM_HEAD}"
                )
            _check_format(f"weights of {name}", chosen)
        twice = [name for name, count in Counter(name for name, _ in self.named).items() if count > 1]
        if twice:
            raise ConfigError(f"weights names {twice[0]} more than once")
        kept = sorted(pair for pair in self.named if pair[0] == LM_HEAD or pair[1] != self.default)
        object.__setattr__(self, "named", tuple(kept))

    @classmethod
    def of(cls, weights: Weights | Mapping[str, str]) -> WeightPlan:
        """From a format's name, or from a mapping of names to formats that may hold a "default" (else "bf16")."""
        if isinstance(weights, WeightPlan):
            return weights
        if isinstance(weights, Mapping):
            named = tuple((str(name), chosen) for name, chosen in weights.items() if name != "default")
            return cls(weights.get("default", "bf16"), named)
        return cls(weights)

    def __getitem__(self, name: str) -> str:
        """The format of a layer's matrix."""
        return dict(self.named).get(name, self.default)

    @property
    def head(self) -> str | None:
        """The lm_head's format where it was chosen."""
        return dict(self.named).get(LM_HEAD)

    @property
    def formats(self) -> frozenset[str]:
        """Every format that is asked for, also one that no matrix is left to have."""
        return frozenset((self.default, *(chosen for _, chosen in self.named)))

    @property
    def simplest(self) -> Weights:
        """The format's name where one serves all, else the plan."""
        return self if self.named else self.default

    def label(self, group_size: int) -> str:
        """The plan in words, with the group size where a format has groups."""
        grouped = any(WEIGHT_FORMATS[chosen].grouped for chosen in self.formats)
        return f"{self} group {group_size}" if grouped else str(self)

    def as_json(self) -> str | dict[str, str]:
        """What `of` takes back."""
        return {"default": self.default, **dict(self.named)} if self.named else self.default

    def __str__(self) -> str:
        """As in "int4 but 3 matrices int8, lm_head bf16"."""
        counts = Counter(chosen for name, chosen in self.named if name != LM_HEAD)
        parts = [f"{count} {'matrix' if count == 1 else 'matrices'} {name}" for name, count in sorted(counts.items())]
        if self.head is not None:
            parts.append(f"{LM_HEAD} {self.head}")
        return f"{self.default} but {', '.join(parts)}" if parts else self.default


Weights = str | WeightPlan
"""A key of kernels.WEIGHT_FORMATS for every matrix, or a plan."""


def _check_format(what: str, chosen: object) -> None:
    if not isinstance(chosen, str) or chosen not in WEIGHT_FORMATS:
        raise ConfigError(f"{what} is {chosen!r}; it must be one of {', '.join(WEIGHT_FORMATS)}")
