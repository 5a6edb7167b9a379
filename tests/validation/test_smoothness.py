"""The verdict on how smooth a training is."""

from __future__ import annotations

import numpy as np
import pytest

from tracmod.validation.smoothness import relative_error, verdict


def test_the_relative_error_is_that_of_the_predictions():
    actual = np.array([3.0, 4.0])
    assert relative_error(actual, actual) == 0
    assert relative_error(np.zeros(2), actual) == 1
    assert relative_error(np.array([3.0, 1.0]), actual) == pytest.approx(0.6)
    assert relative_error(actual, np.zeros(2)) == float("inf")


@pytest.mark.parametrize(
    ("growth", "errors", "expected"),
    [
        (2.0, {0.01: 0.1, 0.05: 0.2, 0.2: 0.5}, "up to about 5%"),
        (2.0, {0.01: 0.4, 0.05: 0.6}, "not their size"),
        (300.0, {0.01: 1.5, 0.05: 2.0}, "too rough"),
        (2.0, {}, "Smooth as far"),
        (300.0, {}, "Probably too rough"),
    ],
)
def test_the_verdict_says_what_is_foretold(growth, errors, expected):
    """From the shares alone."""
    sentence = verdict(growth, errors)
    assert expected in sentence
    assert ("learning rate" in sentence) == (expected not in ("up to about 5%", "Smooth as far"))


@pytest.mark.parametrize(
    ("of_small_change", "expected"),
    [
        (0.1, "Foretells small changes of weights, but leaving out 5%"),
        (0.9, "This training is too rough"),
    ],
)
def test_a_change_that_is_too_large_is_told_from_a_training_that_is_too_rough(
    of_small_change, expected
):
    sentence = verdict(2.0, {0.05: 1.5, 0.2: 2.0}, of_small_change)
    assert sentence.startswith(expected)
    assert f"small change of weights: {of_small_change:.2f}" in sentence
    assert ("path_points" in sentence) == (of_small_change == 0.1)
    # Where changes are foretold, it does not matter.
    assert "up to about 5%" in verdict(2.0, {0.05: 0.1}, of_small_change)
