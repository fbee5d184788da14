"""What is served: prompts of random tokens, and how many tokens each is answered with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Work:
    """Prompts and the number of output tokens of each; end-of-text is ignored so that lengths are exact."""

    prompts: list[list[int]]
    num_outputs: list[int]

    @property
    def output_tokens(self) -> int:
        return sum(self.num_outputs)

    @property
    def params(self) -> list[SamplingParams]:
        return [SamplingParams(max_tokens=n, ignore_eos=True) for n in self.num_outputs]


def uniform_work(vocab_size: int, count: int, low: int, high: int, seed: int) -> Work:
    """`count` requests of random tokens, lengths in and out uniform in [low, high]."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(low, high))] for _ in range(count)]
    return Work(prompts, [rng.randint(low, high) for _ in range(count)])


def fixed_work(vocab_size: int, count: int, prompt: int, output: int, seed: int) -> Work:
    """`count` prompts of `prompt` random tokens, `output` tokens each."""
    rng = random.Random(seed)
    return Work([[rng.randrange(vocab_size) for _ in range(prompt)] for _ in range(count)], [output] * count)


def shared_work(vocab_size: int, count: int, prefix: int, own: int, output: int, seed: int) -> Work:
    """`count` prompts that begin with the same `prefix` random tokens and end with `own` different ones."""
    rng = random.Random(seed)
    common = [rng.randrange(vocab_size) for _ in range(prefix)]
    return Work([common + [rng.randrange(vocab_size) for _ in range(own)] for _ in range(count)], [output] * count)


WORKS: dict[str, Callable[[int, int], Work]] = {
    "single": lambda vocab, seed: uniform_work(vocab, 1, 64, 64, seed),
    "mixed": lambda vocab, seed: uniform_work(vocab, 64, 16, 128, seed),
    "decode1": lambda vocab, seed: fixed_work(vocab, 1, 512, 129, seed),
    "decode8": lambda vocab, seed: fixed_work(vocab, 8, 512, 129, seed),
    "decode64": lambda vocab, seed: fixed_work(vocab, 64, 512, 129, seed),
}
