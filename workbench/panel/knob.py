"""What a knob is: its kinds, and what they permit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from engine.errors import ConfigError

Options = Mapping[str, str]
"""Value to label, in the order of a list."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One knob; `check` gives the value back in its type, or raises ConfigError naming it and what is permitted."""

    name: str
    label: str
    help: str
    group: str
    default: Any

    def check(self, value: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Text(Knob):
    """Free text beside suggestions."""

    suggestions: Callable[[], Options]

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                f"{self.name} is {value!r}; it must be one of {', '.join(self.suggestions())}, a folder or a hub id"
            )
        return value.strip()


@dataclass(frozen=True, kw_only=True)
class Choice(Knob):
    """One of a fixed list."""

    options: Options

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.options:
            raise ConfigError(f"{self.name} is {value!r}; it must be one of {', '.join(self.options)}")
        return str(value)


@dataclass(frozen=True, kw_only=True)
class Switch(Knob):
    """On or off."""

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{self.name} is {value!r}; it must be True or False")
        return value


@dataclass(frozen=True, kw_only=True)
class Number(Knob):
    """A number in [low, high]; slider: "linear", "log" or none, over `reach` where the whole range is too wide."""

    low: float
    high: float
    step: float = 1
    whole: bool = True
    slider: str | None = None
    reach: tuple[float, float] | None = None

    def check(self, value: Any) -> float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high or (self.whole and value != int(value)):
            raise ConfigError(f"{self.name} is {value!r}; it must be {self.permitted}")
        return int(value) if self.whole else float(value)

    @property
    def permitted(self) -> str:
        return f"a {'whole ' if self.whole else ''}number from {self.low:,.10g} to {self.high:,.10g}"
