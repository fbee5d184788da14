"""How far an engine's next-token distributions are from the bf16 model's, token by token over a known text.

Perplexity asks for one token's probability, and gains on some tokens hide losses on others. The Kullback-Leibler
divergence sees every change of the distribution, its p99 the tokens where a format breaks, and top-1 agreement whether
greedy text would go on alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from engine.errors import ConfigError
from engine.scoring import CHUNK, prompt_logits
from workbench import text as words
from workbench.quality.perplexity import MIN_WINDOW, Perplexity, check_meaning, text_windows

if TYPE_CHECKING:
    from engine.engine import Engine

Floats = NDArray[np.float64]
Stopped = Callable[[], bool]

BASELINE_BYTES = 2 << 30
"""Most host memory for the baseline's logits; fewer windows of the text are used where the vocabulary is large."""
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval (None for one window), as resampling whole windows of the text varies it."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def over(cls, windows: Sequence[Floats], figure: Callable[[Floats], Any]) -> Estimate:
        """`figure` of all tokens. Percentile bootstrap with windows as units, since tokens of one text are not
        independent (Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13); seeded."""
        value = float(figure(np.concatenate(windows)))
        if len(windows) < 2:
            return cls(value, None, None)
        rng = np.random.default_rng(0)
        draws = rng.integers(0, len(windows), (RESAMPLES, len(windows)))
        spread = [float(figure(np.concatenate([windows[i] for i in draw]))) for draw in draws]
        low, high = np.quantile(spread, (0.025, 0.975))
        return cls(value, float(low), float(high))


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distance from a baseline over the same tokens.

    kl_mean, kl_p99: nats, of KL(baseline || this) per token. top1: share of tokens after which both find the same
    token the most likely. perplexity: this engine's own, from the same pass.
    """

    kl_mean: Estimate
    kl_p99: Estimate
    top1: Estimate
    perplexity: Perplexity

    @property
    def tokens(self) -> int:
        return self.perplexity.tokens

    def __str__(self) -> str:
        return (
            f"KL {self.kl_mean.value:.4f} nats per token (p99 {self.kl_p99.value:.3f}), top-1 agreement "
            f"{words.percent(self.top1.value, 1)} over {self.tokens:,} tokens"
        )


class Baseline:
    """Logits of one engine over windows of a text, kept in host memory as they were computed, so without loss."""

    def __init__(self, windows: Sequence[Sequence[int]], logits: Sequence[Tensor], perplexity: Perplexity) -> None:
        self.windows, self._logits, self.perplexity = windows, logits, perplexity

    @classmethod
    def record(
        cls,
        engine: Engine,
        text: str | None = None,
        *,
        max_tokens: int = 8192,
        window: int = 512,
        progress: bool = False,
        stopped: Stopped = lambda: False,
    ) -> Baseline:
        """From an engine with bf16 weights and bf16 KV, as a rule: whatever is compared later is compared with it.

        Windows as in `workbench.quality.perplexity`, and no more than BASELINE_BYTES of logits. ConfigError for a
        model whose text means nothing or a text that is too short; InterruptedError when `stopped` says so.
        """
        check_meaning(engine)
        row = 4 * engine.spec.vocab_size if engine.config.impl == "torch" else 2 * engine.spec.vocab_size
        fitting = max(BASELINE_BYTES // row, MIN_WINDOW)
        window = min(window, fitting)
        windows = text_windows(engine, text, max_tokens=min(max_tokens, fitting), window=window)
        rows: list[list[Tensor]] = [[] for _ in windows]
        losses: list[list[Tensor]] = [[] for _ in windows]
        for i, _, logits, targets in _predictions(engine, windows, "baseline", progress, stopped):
            rows[i].append(logits.cpu())
            losses[i].append(_logprobs(logits).gather(1, targets[:, None])[:, 0].cpu())
        return cls(windows, [torch.cat(row) for row in rows], Perplexity.of([torch.cat(x).tolist() for x in losses]))

    @property
    def nbytes(self) -> int:
        return sum(logits.nbytes for logits in self._logits)

    def compare(self, engine: Engine, *, progress: bool = False, stopped: Stopped = lambda: False) -> Divergence:
        """What `engine`, of the same model in another format, makes of the same windows.

        ConfigError for a model with another vocabulary.
        """
        vocabulary = self._logits[0].shape[1]
        if engine.spec.vocab_size != vocabulary:
            raise ConfigError(
                f"{engine.model.source} has a vocabulary of {engine.spec.vocab_size:,}, the baseline one of "
                f"{vocabulary:,}; only forms of one model are compared"
            )
        kl: list[list[Tensor]] = [[] for _ in self.windows]
        same: list[list[Tensor]] = [[] for _ in self.windows]
        known: list[list[Tensor]] = [[] for _ in self.windows]
        for i, start, logits, targets in _predictions(engine, self.windows, "KL divergence", progress, stopped):
            expected = self._logits[i][start : start + len(logits)].to(logits.device)
            ours, theirs = _logprobs(logits), _logprobs(expected)
            kl[i].append(divergence(theirs, ours).cpu())
            same[i].append((logits.argmax(-1) == expected.argmax(-1)).cpu())
            known[i].append(ours.gather(1, targets[:, None])[:, 0].cpu())
        kls, sames = _arrays(kl), _arrays(same)
        return Divergence(
            kl_mean=Estimate.over(kls, np.mean),
            kl_p99=Estimate.over(kls, lambda values: np.quantile(values, 0.99)),
            top1=Estimate.over(sames, np.mean),
            perplexity=Perplexity.of([torch.cat(values).tolist() for values in known]),
        )


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row, from natural-log probabilities [R, vocab]; never below zero."""
    return (p.exp() * (p - q)).sum(-1).clamp_(min=0.0)


def _predictions(
    engine: Engine, windows: Sequence[Sequence[int]], what: str, progress: bool, stopped: Stopped
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(window, start, logits, targets): the rows that predict a token of the window, and that token."""
    tokens = sum(len(window) - 1 for window in windows)
    with tqdm(total=tokens, disable=not progress, desc=what, unit="token", leave=False) as bar:
        for i, start, logits in prompt_logits(engine, windows, chunk=CHUNK):
            if stopped():
                raise InterruptedError("the quality measurement was stopped")
            following = list(windows[i][start + 1 : start + 1 + len(logits)])
            if following:
                yield i, start, logits[: len(following)], torch.tensor(following, device=logits.device)
            bar.update(len(following))


def _logprobs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _arrays(parts: Sequence[Sequence[Tensor]]) -> list[Floats]:
    return [torch.cat(list(window)).double().numpy() for window in parts]
