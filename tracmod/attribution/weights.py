"""The weights of an attribution's checkpoints, where they come from, and what is guessed of them.

A weight is the mean learning rate of the steps that a checkpoint stands for. Where it is not known
for certain, the attribution goes on with the best guess, and says so on stderr and in run.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from tracmod.influence.scores import checkpoint_weights
from tracmod.models.checkpoints import Checkpoint, training_conflicts
from tracmod.models.weight_files import equal_pairs

MOST_NAMED = 3  # checkpoints that a note names


class Weights(NamedTuple):
    """Weights of C checkpoints.

    Attributes:
        values: (C,) the weights.
        sources: (C,) a phrase each that says where the weight comes from.
        notes: sentences about what was guessed.
    """

    values: list[float]
    sources: list[str]
    notes: list[str]


def choose_weights(
    checkpoints: Sequence[Checkpoint], given: Sequence[float] | Literal["uniform"] | None
) -> Weights:
    """Return the weights that are given, or the learning rates, or 1 each if none is known.

    Args:
        checkpoints: The checkpoints.
        given: As in `AttributionOptions.weights`.

    Raises:
        ValueError: The weights given are not valid; or only some learning rates are known, one is
            negative, or all are 0.
    """
    rates = [checkpoint.learning_rate for checkpoint in checkpoints]
    if given == "uniform":
        return Weights([1.0] * len(rates), ["uniform"] * len(rates), [])
    if given is not None:
        values = checkpoint_weights(given, len(rates))
        return Weights(values, ["given"] * len(rates), _zero_notes(checkpoints, values))
    sources = [checkpoint.rate_source for checkpoint in checkpoints]
    if all(rate is None for rate in rates):
        note = (
            "no checkpoint has a learning rate in tracmod.json or trainer_state.json: each has "
            "weight 1 (--weights sets others)"
        )
        return Weights([1.0] * len(rates), sources, [note])
    for checkpoint in checkpoints:
        if checkpoint.learning_rate is None:
            raise ValueError(
                f"{checkpoint.path}: expected a learning rate, as the other checkpoints have, in "
                f"tracmod.json or trainer_state.json, found none; --weights sets the weights"
            )
        if checkpoint.learning_rate < 0:
            raise ValueError(
                f"{checkpoint.path}: expected a learning rate of 0 or more, got "
                f"{checkpoint.learning_rate}"
            )
    if not any(rates):
        raise ValueError(
            f"{checkpoints[0].path}: expected a learning rate above 0 at one checkpoint or more, "
            f"got 0 at all {len(rates)}: every score would be 0. A scheduler's last logged rate is "
            f"0; tracmod.TracInCallback records the mean rate of the steps instead, and --weights "
            f"sets the weights"
        )
    values = [float(rate) for rate in rates if rate is not None]
    guesses = [
        f"{checkpoint.path.name}: {checkpoint.rate_source}"
        for checkpoint in checkpoints
        if checkpoint.is_guess
    ]
    notes = _zero_notes(checkpoints, values)
    if guesses:
        notes.insert(
            0,
            f"the weights of {len(guesses)} of {len(rates)} checkpoints are guesses "
            f"({_some(guesses)}); tracmod.TracInCallback records the learning rates, --weights "
            f"sets the weights",
        )
    return Weights(values, sources, notes)


def checkpoint_notes(
    checkpoints: Sequence[Checkpoint], digests: Sequence[dict[str, str]]
) -> list[str]:
    """Return sentences about checkpoints that do not fit together.

    Args:
        checkpoints: (C,) the checkpoints.
        digests: (C,) the digests of their tensors.
    """
    pairs = [
        f"{checkpoints[first].path.name} and {checkpoints[second].path.name}"
        for first, second in equal_pairs(digests)
    ]
    equal = [f"{_some(pairs)} have the same tensors: their gradients count twice"] if pairs else []
    return equal + training_conflicts([checkpoint.path for checkpoint in checkpoints])


def _zero_notes(checkpoints: Sequence[Checkpoint], values: Sequence[float]) -> list[str]:
    pairs = zip(checkpoints, values, strict=True)
    names = [checkpoint.path.name for checkpoint, weight in pairs if weight == 0]
    if not names:
        return []
    verb = "has weight 0 and does" if len(names) == 1 else "have weight 0 and do"
    return [f"{_some(names)} {verb} not count"]


def _some(items: Sequence[str]) -> str:
    """Return the first items, and how many more there are."""
    more = len(items) - MOST_NAMED
    return "; ".join(items[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
