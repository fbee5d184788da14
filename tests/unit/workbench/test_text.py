"""Quantities as text: rounding must not turn them into something else."""

import pytest

from workbench import text


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (None, "–"), (0.0, "0 %"), (1.0, "100 %"), (0.5, "50 %"), (0.123, "12 %"), (0.0312, "3.1 %"), (0.98, "98 %"),
        (299 / 300, "99.7 %"), (0.9996, ">99.9 %"), (1 - 1e-9, ">99.9 %"), (0.9994, "99.9 %"), (0.0004, "<0.1 %"),
        (0.0006, "0.1 %"), (1e-9, "<0.1 %"),
    ],
)  # fmt: skip
def test_all_and_none_are_said_only_of_all_and_none(share, words):
    assert text.percent(share) == words


def test_a_share_may_keep_digits():
    assert text.percent(0.8731, digits=1) == "87.3 %" and text.percent(0.5, digits=1) == "50.0 %"
    assert text.percent(0.99996, digits=1) == ">99.9 %" and text.percent(1.0, digits=1) == "100 %"


@pytest.mark.parametrize(("factor", "words"), [(1.0, "x1.00"), (4.704, "x4.70"), (0.0031, "x0.0031"), (0.28, "x0.28"),
                                               (1234.4, "x1,234")])  # fmt: skip
def test_a_small_ratio_is_not_nothing(factor, words):
    assert text.times(factor) == words
