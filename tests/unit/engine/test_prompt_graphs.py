"""Which steps a captured prompt may compute."""

from __future__ import annotations

import numpy as np
import pytest

from engine.running.graphs import padded_size
from engine.running.prompt_graphs import LEAST_TOKENS, MOST_TOKENS, WIDTH, graph_size
from engine.running.step_arrays import Arrays, inert_prompts
from kernels import WEIGHT_FORMATS
from kernels.rows.activations import activation_codes


@pytest.mark.parametrize("tokens, size", [(LEAST_TOKENS, 64), (64, 64), (65, 128), (500, 512), (MOST_TOKENS, 512)])
def test_padded_to_the_next_size(tokens: int, size: int) -> None:
    assert graph_size(inert_prompts(1, tokens, 64)) == size


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_padding_changes_no_format(format: str) -> None:
    """Activations are rounded in a padded step where they are in the step itself, decodes too."""
    for tokens in range(LEAST_TOKENS, MOST_TOKENS + 1):
        padded = graph_size(inert_prompts(1, tokens, 64))
        assert padded is not None and activation_codes(format, padded) == activation_codes(format, tokens)
    for batch in range(1, 300):
        assert activation_codes(format, padded_size(batch)) == activation_codes(format, batch)


def unfit() -> dict[str, Arrays]:
    one = inert_prompts(1, 100, 64)
    return {
        "two prompts": inert_prompts(2, 100, 64),
        "too few tokens": inert_prompts(1, LEAST_TOKENS - 1, 64),
        "too many tokens": inert_prompts(1, MOST_TOKENS + 1, 64),
        "a long context before it": {**one, "block_tables": np.zeros((1, WIDTH + 1), np.int32)},
        "a chunk that samples nothing": {**one, "rows": one["rows"][:0]},
    }


@pytest.mark.parametrize("why", list(unfit()))
def test_everything_else_runs_eagerly(why: str) -> None:
    assert graph_size(unfit()[why]) is None
