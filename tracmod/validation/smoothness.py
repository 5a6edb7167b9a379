"""Whether a fine-tuning is smooth enough for its metagradient to foretell other trainings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Relative errors of predicted changes. With 0.3, a change is foretold to about a third of its size.
FORETELLS, RANKS = 0.3, 0.8
# Growth of the adjoint over the training. It was about 2 in a fine-tuning whose changes were
# foretold almost perfectly (rank correlation 0.95), and 60 to 880 in one where they were not
# (0.37).
SMOOTH_GROWTH = 10.0

ADVICE = (
    "lower the learning rate, train for fewer steps, use larger batches or a longer warm-up, or "
    "start from a pretrained encoder"
)


def relative_error(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Return `|actual - predicted| / |actual|` in the L2 norm; infinite where nothing changed.

    Args:
        predicted, actual: changes of losses, of the same shape.
    """
    size = float(np.linalg.norm(actual))
    return float(np.linalg.norm(actual - predicted)) / size if size else float("inf")


def verdict(
    growth: float, error_of_share: Mapping[float, float], error_of_small_change: float | None = None
) -> str:
    """Say in one sentence what the metagradient of a training foretells.

    Args:
        growth: largest ratio of a quantity's adjoint norm before the first step to that after the
            last.
        error_of_share: share of the training examples left out -> relative error of the predicted
            changes; empty if no training was made to check.
        error_of_small_change: the relative error where examples lose a little of their weight; None
            if there was no such training.
    """
    grew = f"the adjoint's norm changed by a factor of {growth:.2g}"
    if not error_of_share:
        if growth <= SMOOTH_GROWTH:
            return f"Smooth as far as the adjoint shows ({grew}); no training was made to check it."
        return f"Probably too rough ({grew}): {ADVICE}, and check it by trainings."
    errors = ", ".join(f"{share:.3g}: {e:.2f}" for share, e in sorted(error_of_share.items()))
    measured = f"({grew}; relative error by share left out: {errors}"
    if error_of_small_change is not None:
        measured += f"; of a small change of weights: {error_of_small_change:.2f}"
    measured += ")"
    foretold = [share for share, error in error_of_share.items() if error <= FORETELLS]
    if foretold:
        return f"Foretells changes of up to about {max(foretold):.0%} of the examples {measured}."
    if min(error_of_share.values()) <= RANKS:
        return f"Foretells the direction of changes but not their size {measured}: {ADVICE}."
    if error_of_small_change is not None and error_of_small_change <= FORETELLS:
        return (
            f"Foretells small changes of weights, but leaving out {min(error_of_share):.0%} of the "
            f"examples is too large a change for derivatives at full weight {measured}: use "
            f"path_points for whole languages, check smaller shares, or {ADVICE}."
        )
    return f"This training is too rough to be foretold {measured}: {ADVICE}."
