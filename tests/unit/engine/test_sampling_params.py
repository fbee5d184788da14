"""Sampling options refuse what is out of range, in words, and take whole numbers of any library."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import RequestError
from engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -3}, "top_k is -3"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": ("",)}, "must not be empty"),
        ({"logprobs": 50}, "logprobs is 50"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"top_p": "0.9"}, "top_p is '0.9'; it must be a number"),
        ({"max_tokens": float("nan")}, "max_tokens is nan; it must be a whole number"),
        ({"max_tokens": None}, "max_tokens is None; it must be a whole number"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"logprobs": 1.5}, "logprobs is 1.5; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": "a"}, "seed is 'a'; it must be a whole number"),
        ({"stop": (5,)}, "must be text"),
        ({"stop": None}, "must be text"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids is 1.5; it must be a whole number"),
        ({"stop_token_ids": 7}, "must be token ids"),
    ],
)
def test_bad_sampling_options_name_value_and_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_whole_numbers_of_other_libraries_are_taken() -> None:
    """A seed drawn by NumPy, ids out of an array: a step would fail on them, for everybody in it."""
    params = SamplingParams(
        seed=np.int64(-3),  # type: ignore[arg-type]
        top_k=np.int32(4),  # type: ignore[arg-type]
        max_tokens=np.uint8(3),  # type: ignore[arg-type]
        stop=["a", "b"],  # type: ignore[arg-type]
        stop_token_ids=np.array([7, 8]),  # type: ignore[arg-type]
    )
    assert params == SamplingParams(seed=-3, top_k=4, max_tokens=3, stop=("a", "b"), stop_token_ids=(7, 8))
    assert {type(params.seed), type(params.top_k), type(params.max_tokens)} == {int} and hash(params)
