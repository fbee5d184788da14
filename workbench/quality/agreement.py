"""How long an engine's greedy text stays that of the bf16 model: the loss that grows with the output's length.

One token that differs changes everything after it, so a small divergence per token adds up over an answer. The curve
over the length says what a single figure per token cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from workbench.quality.perplexity import MIN_WINDOW, check_meaning, cut_windows

if TYPE_CHECKING:
    from engine.engine import Engine

Answers = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of `prompts` answers, by length n = 1, 2, ...: index n - 1 of each curve.

    identical: share of the answers that are equal through token n; it can only fall.
    equal: share of all tokens up to n that are equal at their place.
    """

    prompts: int
    identical: tuple[float, ...]
    equal: tuple[float, ...]

    @classmethod
    def of(cls, answers: Answers, baseline: Answers) -> Agreement:
        """ValueError unless both hold as many answers, all of one length."""
        lengths = {len(answer) for answer in (*answers, *baseline)}
        if len(answers) != len(baseline) or len(lengths) != 1 or lengths == {0}:
            raise ValueError(
                f"{len(answers)} and {len(baseline)} answers of {sorted(lengths)} tokens; agreement needs pairs of "
                "answers of one length"
            )
        matches = [[a == b for a, b in zip(x, y, strict=True)] for x, y in zip(answers, baseline, strict=True)]
        first_change = [row.index(False) if False in row else len(row) for row in matches]
        count, length = len(matches), lengths.pop()
        identical = tuple(sum(first >= n for first in first_change) / count for n in range(1, length + 1))
        equal = tuple(sum(sum(row[:n]) for row in matches) / (count * n) for n in range(1, length + 1))
        return cls(count, identical, equal)

    @property
    def half_life(self) -> int | None:
        """The first length at which at most half of the answers are still identical; None where it was not reached."""
        return next((n for n, share in enumerate(self.identical, 1) if share <= 0.5), None)

    def interval(self, length: int) -> tuple[float, float]:
        """95 % interval of `identical` at that length (Wilson, 1927)."""
        z, n, p = 1.96, self.prompts, self.identical[length - 1]
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def prompts_from(
    engine: Engine, text: str | None = None, *, count: int = 32, prompt: int = 64, answer: int = 128
) -> list[list[int]]:
    """`count` prompts of `prompt` tokens spread over the text, the bundled model's held-out excerpt by default.

    ConfigError for a model whose text means nothing, a text that is too short, or lengths beyond the engine's sessions.
    """
    check_meaning(engine)
    if prompt < MIN_WINDOW or count < 1 or answer < 1 or prompt + answer > engine.session_len:
        raise ConfigError(
            f"{count} prompts of {prompt} tokens with answers of {answer} do not fit: prompts have {MIN_WINDOW} tokens "
            f"or more, and one session holds {engine.session_len:,}"
        )
    if text is None:
        from engine.bundled import heldout_text

        text = heldout_text()
    return [list(window) for window in cut_windows(engine.tokenizer.encode(text), prompt, count * prompt)]


def greedy_answers(
    engine: Engine, prompts: Sequence[Sequence[int]], length: int, *, stopped: Callable[[], bool] = lambda: False
) -> list[list[int]]:
    """The most likely continuation of each prompt, `length` tokens, end-of-text ignored so that lengths are equal.

    Prompts that earlier formats have cached are computed again. InterruptedError when `stopped` says so.
    """
    engine.reset_prefix_cache()
    if stopped():
        raise InterruptedError("the quality measurement was stopped")
    outputs = engine.generate(list(prompts), SamplingParams(max_tokens=length, ignore_eos=True))
    return [list(output.token_ids) for output in outputs]
