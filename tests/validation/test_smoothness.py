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
    sentence = verdict(growth, errors)
    assert expected in sentence
    assert ("learning rate" in sentence) == (expected not in ("up to about 5%", "Smooth as far"))
