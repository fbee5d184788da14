"""How the next token is chosen, and when a request stops."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import SupportsIndex

from engine.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Per-request sampling options, applied in this order: repetition penalty, temperature, top-k, top-p, min-p.

    temperature: 0 is greedy; otherwise in (0, 2].
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set whose probability reaches top_p, in (0, 1] (Holtzman et al., 2020).
    min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
    repetition_penalty: in (0, 10]; 1 changes nothing. Divides positive and multiplies negative logits of every token
        already in the prompt or the output (Keskar et al., CTRL, 2019).
    seed: makes the request reproducible whatever it is batched with; None draws one from the engine's seed.
    stop: strings that end the request; they are not part of the returned text.
    stop_token_ids: token ids that end the request; the model's own end-of-text ids count unless `ignore_eos`.
    max_tokens: most output tokens, >= 1.
    logprobs: log-probabilities returned per output token for this many of the most likely tokens (0..20) and for the
        chosen one; None returns none.
    prompt_logprobs: also return the log-probability of every prompt token given those before it (quality measurements);
        such a request computes its whole prompt, it takes no prefix hits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        for name in ("top_k", "max_tokens", "seed", "logprobs"):
            value = getattr(self, name)
            if value is not None or name in ("top_k", "max_tokens"):
                object.__setattr__(self, name, _whole(name, value))
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (keep all) or a positive number of tokens")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise RequestError(f"logprobs is {self.logprobs}; it must be between 0 and 20, or None")
        object.__setattr__(self, "stop", _texts("stop", self.stop))
        if not isinstance(self.stop_token_ids, Iterable):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}; it must be token ids")
        ids = tuple(_whole("stop_token_ids", token) for token in self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", ids)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_values(self) -> bool:
        """The host reads tokens or probabilities after each step, so that no step can be prepared before."""
        return self.logprobs is not None or self.prompt_logprobs or self.repetition_penalty != 1.0


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not isinstance(value, Real):
        raise RequestError(f"{name} is {value!r}; it must be a number")
    inside = (low < value if open_low else low <= value) and value <= high
    if math.isnan(value) or not inside:
        raise RequestError(f"{name} is {value}; it must be in {'(' if open_low else '['}{low:g}, {high:g}]")


def _whole(name: str, value: SupportsIndex) -> int:
    """As an int, which a number of NumPy's is not: its arithmetic overflows. Found here and not in a step, where it
    would break off the others of the batch."""
    try:
        return operator.index(value)
    except TypeError:
        raise RequestError(f"{name} is {value!r}; it must be a whole number") from None


def _texts(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name} is {value!r}; it must be text, or a sequence of texts")
    if not all(texts):
        raise RequestError(f"{name} is {value!r}; a {name} string must not be empty")
    return texts
