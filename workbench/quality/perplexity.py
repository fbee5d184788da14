"""Perplexity on the engine's own path, so that weight format, KV format and kernels all count."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.engine import Engine

MIN_WINDOW = 16
POOL_RATIO = 0.1


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token over `tokens` predictions in `windows` windows.

    low, high: 95 % interval from the spread between windows (Student's t of their means); None for one window. It
    tells how well the text pins down the model, and is wider than what formats differ by: two formats over the same
    text are compared window by window, as `window_nll` (nats per token) allows.
    """

    value: float
    tokens: int
    windows: int
    low: float | None
    high: float | None
    window_nll: tuple[float, ...]

    @classmethod
    def of(cls, logprobs: Sequence[Sequence[float]]) -> Perplexity:
        """From the natural-log probabilities of each window's predicted tokens."""
        tokens = sum(len(window) for window in logprobs)
        mean = -math.fsum(value for window in logprobs for value in window) / tokens
        window_nll = tuple(-math.fsum(window) / len(window) for window in logprobs)
        low = high = None
        if len(window_nll) > 1:
            margin = _margin(window_nll)
            low, high = math.exp(mean - margin), math.exp(mean + margin)
        return cls(math.exp(mean), tokens, len(window_nll), low, high, window_nll)

    def ratio(self, baseline: Perplexity) -> tuple[float, float | None]:
        """Perplexity over the baseline's on the same windows, and the half width of its 95 % interval."""
        if self.windows != baseline.windows or self.tokens != baseline.tokens:
            raise ValueError(
                f"{self.windows} windows of {self.tokens:,} tokens cannot be compared with {baseline.windows} of "
                f"{baseline.tokens:,}; measure both over the same text"
            )
        ratio = self.value / baseline.value
        gaps = [a - b for a, b in zip(self.window_nll, baseline.window_nll, strict=True)]
        if len(gaps) < 2:
            return ratio, None
        return ratio, ratio * _margin(gaps)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" (95 %: {self.low:.3f} to {self.high:.3f})"
        return f"perplexity {self.value:.3f}{interval} over {self.tokens:,} tokens"


def _margin(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of their mean."""
    return _student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, beyond them within 0.2 % (Abramowitz and
    Stegun, Handbook of Mathematical Functions, 1964, 26.7.5)."""
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))


def perplexity(
    engine: Engine,
    text: str | None = None,
    *,
    max_tokens: int = 8192,
    window: int = 512,
    progress: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Perplexity:
    """Perplexity of `text` (the held-out excerpt of the bundled model by default) as this engine computes it.

    Windows of `window` tokens, spread evenly over the text until `max_tokens` of them are used, each without memory of
    the one before. The engine must have nothing else to do. ConfigError for a model whose text means nothing, or a
    text that is too short; InterruptedError when `stopped` says so.
    """
    check_meaning(engine)
    windows = text_windows(engine, text, max_tokens=max_tokens, window=window)
    size = len(windows[0])
    params = SamplingParams(prompt_logprobs=True, max_tokens=1, ignore_eos=True)
    logprobs: list[list[float]] = []
    batch = max(1, engine.config.max_batched_tokens // size)
    with tqdm(total=len(windows), disable=not progress, desc="perplexity", unit="window", leave=False) as bar:
        for first in range(0, len(windows), batch):
            if stopped():
                raise InterruptedError("the perplexity measurement was stopped")
            outputs = engine.generate(windows[first : first + batch], params)
            logprobs += [list(output.prompt_logprobs) for output in outputs]
            bar.update(len(outputs))
    return Perplexity.of(logprobs)


def small_pool(config: EngineConfig) -> EngineConfig:
    """The same engine with a KV pool that a few windows fit into: it computes the same, and is built in less time."""
    return replace(config, cache_ratio=min(config.cache_ratio, POOL_RATIO))


def check_meaning(engine: Engine) -> None:
    """ConfigError where the text of a model means nothing, so that no quality can be told."""
    if engine.config.runner == "simulated" or engine.model.is_synthetic:
        raise ConfigError(
            f"model {engine.config.model!r} has no perplexity here: its weights are random or nothing is computed; "
            "use 'bundled', a local folder or a hub id with runner 'torch'"
        )


def text_windows(engine: Engine, text: str | None, *, max_tokens: int, window: int) -> list[Sequence[int]]:
    """Windows of `text`, or of the bundled model's held-out excerpt, that fit the engine's sessions."""
    if text is None:
        from engine.bundled import heldout_text

        text = heldout_text()
    size = min(window, engine.session_len - 1)
    if size < MIN_WINDOW or max_tokens < size:
        raise ConfigError(
            f"window is {window} and max_tokens {max_tokens}; window must be from {MIN_WINDOW} to max_tokens, and "
            f"session_len ({engine.session_len}) must leave room for {MIN_WINDOW + 1} tokens"
        )
    return cut_windows(engine.tokenizer.encode(text), size, max_tokens)


def cut_windows(tokens: Sequence[int], size: int, max_tokens: int) -> list[Sequence[int]]:
    """Windows of `size` tokens without overlap, evenly spread; a text shorter than one window is one window."""
    if len(tokens) < MIN_WINDOW:
        raise ConfigError(f"the text has {len(tokens)} tokens; perplexity needs at least {MIN_WINDOW}")
    if len(tokens) <= size:
        return [tokens]
    count = min(len(tokens) // size, max(1, max_tokens // size))
    gap = (len(tokens) - count * size) / max(1, count - 1)
    starts = [round(i * (size + gap)) for i in range(count)]
    return [tokens[start : start + size] for start in starts]
