"""Formats for bytes: greedy steps against every combination there is."""

import itertools
import random

import pytest

from engine.errors import ConfigError
from workbench.sensitivity.assignment import Assignment, Choice, assign, frontier

BITS = {"bf16": 16, "int8": 8, "int4": 4}


def random_choices(seed, matrices=6):
    rng = random.Random(seed)
    choices = []
    for i in range(matrices):
        weights, scale = rng.choice([100, 100, 200, 700]), 10 ** rng.uniform(-3, 0)
        losses = {"bf16": 0.0, "int8": scale * rng.uniform(0.0, 0.1), "int4": scale * rng.uniform(0.05, 1.0)}
        choices += [Choice(f"m{i}", name, weights * BITS[name] // 8, loss) for name, loss in losses.items()]
    return choices


def every_combination(choices):
    by_matrix = {}
    for choice in choices:
        by_matrix.setdefault(choice.matrix, []).append(choice)
    return [Assignment(combination) for combination in itertools.product(*by_matrix.values())]


@pytest.mark.parametrize("seed", range(12))
def test_where_a_step_ends_nothing_is_better(seed):
    choices = random_choices(seed)
    everything = every_combination(choices)
    passed = frontier(choices)
    assert passed[0].loss == 0.0 and passed[-1].nbytes == min(one.nbytes for one in everything)
    for found in passed:
        best = min(one.loss for one in everything if one.nbytes <= found.nbytes)
        assert found.loss == pytest.approx(best, abs=1e-12)
        assert assign(choices, budget_bytes=found.nbytes).loss == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_between_the_steps_it_loses_less_than_one_step(seed):
    """The greedy answer to any budget lies between the exhaustive one and the step that overshot it."""
    choices = random_choices(seed)
    everything = every_combination(choices)
    passed = frontier(choices)
    for budget in range(passed[-1].nbytes, passed[0].nbytes, 67):
        found = assign(choices, budget_bytes=budget)
        best = min(one.loss for one in everything if one.nbytes <= budget)
        stopped_at = max((one for one in passed if one.nbytes <= budget), key=lambda one: one.nbytes)
        assert found.nbytes <= budget
        assert best - 1e-12 <= found.loss <= stopped_at.loss + 1e-12


@pytest.mark.parametrize("seed", range(12))
def test_the_loss_is_kept_with_about_the_fewest_bytes(seed):
    choices = random_choices(seed)
    everything = every_combination(choices)
    largest = max(choice.nbytes for choice in choices)
    for bound in (0.0, 0.01, 0.1, 0.5, 10.0):
        found = assign(choices, max_loss=bound)
        fewest = min(one.nbytes for one in everything if one.loss <= bound)
        assert found.loss <= bound and fewest <= found.nbytes < fewest + largest


def test_room_that_a_large_step_leaves_is_used():
    """Saving 8 needs the large matrix; the small one can then return to 16 bits within the budget."""
    choices = [Choice("small", "bf16", 2, 0.0), Choice("small", "int8", 1, 0.001)]
    choices += [Choice("large", "bf16", 20, 0.0), Choice("large", "int8", 10, 1.0)]
    assert assign(choices, budget_bytes=13).formats == {"small": "bf16", "large": "int8"}


def test_a_format_off_the_hull_is_skipped_but_for_filling_up():
    choices = [Choice("m", "bf16", 16, 0.0), Choice("m", "int8", 8, 0.9), Choice("m", "int4", 4, 1.0)]
    assert [one.formats["m"] for one in frontier(choices)] == ["bf16", "int4"]
    assert assign(choices, budget_bytes=9).formats == {"m": "int8"}


def test_refusals():
    choices = random_choices(0)
    least, most = frontier(choices)[-1].nbytes, frontier(choices)[0].nbytes
    with pytest.raises(ConfigError, match=f"budget_bytes is {least - 1:,}; the smallest formats take {least:,} bytes"):
        assign(choices, budget_bytes=least - 1)
    assert assign(choices, budget_bytes=most).loss == 0.0
    with pytest.raises(ConfigError, match="either budget_bytes or max_loss"):
        assign(choices)
    with pytest.raises(ConfigError, match="max_loss is -1; the least that these formats allow is 0"):
        assign(choices, max_loss=-1.0)
    with pytest.raises(ConfigError, match="nothing to assign"):
        assign([], max_loss=1.0)
    with pytest.raises(ConfigError, match="loss of m in int4 is nan"):
        assign([Choice("m", "int4", 4, float("nan"))], max_loss=1.0)
