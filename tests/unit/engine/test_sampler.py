"""The sampler against exact probabilities and against each filter written plainly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.request import Request
from engine.running.sampler import SamplingPlan, known_logprobs, sample, token_logprobs, uniforms
from engine.sampling_params import SamplingParams

VOCAB = 50


def make_request(
    prompt: Sequence[int] = (1, 2, 3), output: Sequence[int] = (), seed: int = 0, **params: Any
) -> Request:
    made = Request("r", list(prompt), SamplingParams(**params), 0.0, 0.0, seed=seed)
    made.output_token_ids += output
    return made


def draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    plan = SamplingPlan.of(requests, logits.shape[1])
    staged = {name: torch.from_numpy(array) for name, array in plan.arrays.items()}
    tokens, highest = sample(logits, plan, staged)
    assert torch.equal(highest.isfinite(), logits.amax(-1).isfinite())
    assert int(tokens.min()) >= 0 and int(tokens.max()) < logits.shape[1], "the next step looks every token up"
    chosen: list[int] = tokens.where(highest.isfinite(), -1).tolist()
    return chosen


def probabilities(logits: list[float], seen: set[int], params: SamplingParams) -> list[float]:
    """What SamplingParams says, in plain Python: penalty, temperature, top-k, top-p, min-p; equals stay together."""
    penalty = params.repetition_penalty
    values = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)]
    weights = [math.exp((x - max(values)) / params.temperature) for x in values]
    if params.top_k:
        floor = sorted(weights, reverse=True)[min(params.top_k, len(weights)) - 1]
        weights = [w if w >= floor else 0.0 for w in weights]
    total, reached = sum(weights), 0.0
    for floor in sorted(weights, reverse=True):
        reached += floor
        if reached >= params.top_p * total:
            break
    weights = [w if w >= floor else 0.0 for w in weights]
    weights = [w if w >= params.min_p * max(weights) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    assert draw(logits, [make_request() for _ in range(6)]) == logits.argmax(-1).tolist()


FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 5},
    "top_k of one": {"top_k": 1},
    "top_k above the vocabulary": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "top_p tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "min_p of one": {"min_p": 1.0},
    "penalty": {"repetition_penalty": 1.8},
    "penalty below one": {"repetition_penalty": 0.5},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("case", FILTERS)
def test_support_and_frequencies_are_those_of_the_plain_reference(case: str) -> None:
    """Chi-square over 4,000 draws, as rows of one batch; its mean plus 5 standard deviations is allowed."""
    params = {"temperature": 1.0, **FILTERS[case]}
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(7)) * 2
    expected = probabilities(row.double().tolist(), {1, 2, 3, 9}, SamplingParams(**params))
    count = 4000
    found = draw(row.expand(count, -1), [make_request(output=[9], seed=seed, **params) for seed in range(count)])
    frequency = np.bincount(found, minlength=VOCAB)
    assert {i for i in range(VOCAB) if frequency[i]} <= {i for i in range(VOCAB) if expected[i] > 0}
    likely = [i for i in range(VOCAB) if expected[i] * count >= 5]
    chi_square = sum((frequency[i] - count * expected[i]) ** 2 / (count * expected[i]) for i in likely)
    assert chi_square < len(likely) + 5 * math.sqrt(2 * len(likely))


def test_a_row_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(FILTERS) * 3, VOCAB, generator=generator).bfloat16()  # bfloat16 has ties
    requests = [
        make_request(seed=31 * i, output=[i % VOCAB], **{"temperature": 1.0, **FILTERS[case]})
        for i, case in enumerate([*FILTERS] * 3)
    ]
    together = draw(logits, requests)
    assert together == [draw(logits[i : i + 1], [request])[0] for i, request in enumerate(requests)]
    backwards = draw(logits.flip(0), requests[::-1])
    assert together == backwards[::-1]


def test_equally_likely_tokens_are_kept_together() -> None:
    row = torch.tensor([[2.0, 2.0, 2.0, 1.0, 0.0]])
    found = {draw(row, [make_request(seed=seed, temperature=1.0, top_k=1)])[0] for seed in range(60)}
    assert found == {0, 1, 2}


def test_uniforms_are_uniform_and_depend_on_seed_and_position() -> None:
    values = uniforms([5] * 10_000, range(10_000))
    assert values.min() >= 0.0 and values.max() < 1.0
    counts, _ = np.histogram(values, 20, (0.0, 1.0))
    assert ((counts - 500) ** 2 / 500).sum() < 19 + 5 * math.sqrt(2 * 19)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert len({*uniforms(range(1000), [3] * 1000).tolist()}) == 1000
    assert uniforms([-1, 1 << 80], [0, 0]).shape == (2,)  # any Python integer is a seed


def test_the_extreme_uniform_number_chooses_a_token_that_can_be_chosen() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -1e30]])
    plan = SamplingPlan.of([make_request(temperature=1.0)], 4)
    staged = {name: torch.from_numpy(array) for name, array in plan.arrays.items()}
    for number, token in ((0.0, 1), (1.0 - 2.0**-53, 2)):
        staged["uniform"] = torch.tensor([number], dtype=torch.float64)
        assert sample(logits, plan, staged)[0].tolist() == [token]


@pytest.mark.parametrize("logits", [[0.1, 1.0, 0.9], [-5.0, -1.0, -1.1]])
def test_a_penalty_makes_seen_tokens_less_likely_whatever_their_sign(logits: list[float]) -> None:
    seen = make_request(output=[1, 1], repetition_penalty=1.5)
    seen.prompt_token_ids[:] = [0]
    assert draw(torch.tensor([logits, logits]), [make_request(), seen]) == [1, 2]


def test_a_tiny_temperature_is_greedy_not_nan() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    found = draw(logits, [make_request(temperature=1e-30, seed=seed) for seed in range(4)])
    assert found == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_marked(temperature: float, poison: float) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 20] = poison
    found = draw(logits, [make_request(temperature=temperature, seed=seed) for seed in range(3)])
    assert [token < 0 for token in found] == [False, True, False]


def test_masked_logits_are_fine() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 7] = 0.0
    assert draw(logits, [make_request(temperature=1.0)]) == [7]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))
    requests = [
        make_request(temperature=0.3, logprobs=2, repetition_penalty=2.0),
        make_request(),
        make_request(temperature=0.3, top_k=1, logprobs=0),
    ]
    tokens = torch.tensor([4, 5, 6])
    raw = torch.log_softmax(logits.double(), -1)
    first, second, third = token_logprobs(logits, tokens, requests)
    assert second is None and first is not None and third is not None
    assert first.token_id == 4 and first.logprob == pytest.approx(float(raw[0, 4]), abs=1e-5)
    ranked = raw[0].sort(descending=True)
    assert [token for token, _ in first.top] == ranked.indices[:2].tolist()
    assert [value for _, value in first.top] == pytest.approx(ranked.values[:2].tolist(), abs=1e-5)
    assert third.token_id == 6 and third.top == ()
    assert token_logprobs(logits, tokens, [make_request()] * 3) == []
    assert known_logprobs(logits, tokens).tolist() == pytest.approx(raw[range(3), tokens].tolist(), abs=1e-5)
