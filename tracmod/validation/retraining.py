"""What is left out when a model is trained again, and what that says of a method's scores.

Shape legend: N training examples, Q test examples, S subsets, R trainings (seeds) of each set,
L test languages, G training languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tracmod.analysis.matrix_correlation import permuted_columns
from tracmod.analysis.statistics import Resampling
from tracmod.validation.lds import Draws, by_language, lds_table
from tracmod.validation.retrained_changes import Changes, Compared

ALL = "all"
HALF_OF_SEEDS = "half of the seeds"
SIDES = ("proponents", "opponents")
RANDOM = "random"
REMOVAL_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("method", "side", "test_language")),
        *((name, pa.int64()) for name in ("removed", "trainings")),
        *((name, pa.float64()) for name in ("loss_before", "accuracy_before")),
        *(
            (f"{name}_change{bound}", pa.float64())
            for name in ("loss", "accuracy")
            for bound in ("", "_low", "_high")
        ),
    ]
)
LEAVE_ONE_OUT_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("method", "test_language", "train_language")),
        *((name, pa.float64()) for name in ("predicted", "actual", "actual_low", "actual_high")),
    ]
)


@dataclass(frozen=True)
class Summed:
    """What of a method's (Q, N) scores the checks need.

    Attributes:
        subsets_QS: sum of the scores over each subset.
        means_LN: mean of each training example's scores over the test examples of each language.
    """

    subsets_QS: np.ndarray
    means_LN: np.ndarray

    @staticmethod
    def of(scores_QN: np.ndarray, members_SN: np.ndarray, languages_Q: Sequence[str]) -> Summed:
        """Sums in float64, a test example at a time: scores may be many."""
        members_NS = members_SN.T.astype(np.float64)
        means = [
            scores_QN[own_Q].mean(axis=0, dtype=np.float64)
            for own_Q in by_language(languages_Q).values()
        ]
        sums = [row.astype(np.float64) @ members_NS for row in scores_QN]
        return Summed(np.stack(sums), np.stack(means))


@dataclass(frozen=True)
class Retrained:
    """Test examples after trainings: set -> (R, Q) `losses` and `correct` (0 or 1), by seed."""

    losses: Mapping[str, np.ndarray]
    correct: Mapping[str, np.ndarray]


# --- what is left out -----------------------------------------------------------------------


def draw_subsets(languages_N: Sequence[str], number: int, fraction: float, seed: int) -> np.ndarray:
    """(S, N) bool: which training examples each subset holds, drawn without return.

    Raises:
        ValueError: a subset without any training example of a language.
    """
    rng, total = np.random.default_rng([seed, 1]), len(languages_N)
    members_SN = np.zeros((number, total), dtype=bool)
    for members_N in members_SN:
        members_N[rng.choice(total, round(fraction * total), replace=False)] = True
    for language, own_N in by_language(languages_N).items():
        without = np.flatnonzero(~members_SN[:, own_N].any(axis=1))
        if len(without):
            raise ValueError(
                f"retrain.fraction: expected training examples of every language in every subset, "
                f"got none of {language} ({len(own_N)} in all) in subset {without[0]}: a larger "
                f"fraction than {fraction}, or more training examples of {language}"
            )
    return members_SN


def strongest(scores_N: np.ndarray, number: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of the `number` highest scores (proponents) and of the lowest; equal ones at random."""
    chance_N = np.random.default_rng([seed, 2]).random(len(scores_N))
    ascending = np.lexsort((chance_N, scores_N))
    return {"proponents": np.sort(ascending[-number:]), "opponents": np.sort(ascending[:number])}


def subset_set(number: int) -> str:
    """Name of the set of a subset."""
    return f"subset {number}"


def removal_set(method: str, side: str, language: str) -> str:
    """Name of the set without a method's strongest examples for a test language."""
    return f"without {side} by {method} of {language}"


def random_set(draw: int) -> str:
    """Name of the set without examples drawn at random."""
    return f"without random {draw}"


def language_set(language: str) -> str:
    """Name of the set without a training language."""
    return f"without language {language}"


def subsets_left_out(members_SN: np.ndarray) -> dict[str, np.ndarray]:
    """Set -> rows that are not in the subset."""
    return {subset_set(place): np.flatnonzero(~one) for place, one in enumerate(members_SN)}


def removals_left_out(
    summed: Mapping[str, Summed],
    languages: Sequence[str],
    removed: int,
    random_removals: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Set -> rows of the strongest of every method, side and test language, and random rows."""
    total = next(iter(summed.values())).means_LN.shape[1]
    rng = np.random.default_rng([seed, 3])
    sets = {
        random_set(draw): np.sort(rng.choice(total, removed, replace=False))
        for draw in range(random_removals)
    }
    for method in _not_random(summed):
        for language, means_N in zip(languages, summed[method].means_LN, strict=True):
            for side, rows in strongest(means_N, removed, seed).items():
                sets[removal_set(method, side, language)] = rows
    return sets


def languages_left_out(languages_N: Sequence[str]) -> dict[str, np.ndarray]:
    """Set -> rows of the one language that it is without."""
    return {language_set(name): own_N for name, own_N in by_language(languages_N).items()}


def _not_random(methods: Mapping[str, Any]) -> list[str]:
    return [method for method in methods if method != RANDOM]


# --- what it says ---------------------------------------------------------------------------


def subset_lds(
    summed: Mapping[str, Summed],
    retrained: Retrained,
    languages_Q: Sequence[str],
    clusters_Q: Sequence[Any] | np.ndarray,
    resampling: Resampling,
) -> pa.Table:
    """`lds_table` of every method, and of the losses of one half of the seeds as the prediction.

    The last (`HALF_OF_SEEDS`) says how far the losses can be known at all: a method that misses
    what two trainings on the same examples do not agree on misses nothing.
    """
    number = next(iter(summed.values())).subsets_QS.shape[1]
    losses_RQS = np.stack([retrained.losses[subset_set(s)] for s in range(number)], axis=-1)
    draws = Draws.of(clusters_Q, number, resampling)
    predicted = {method: one.subsets_QS for method, one in summed.items()}
    table = lds_table(predicted, losses_RQS.mean(axis=0), languages_Q, draws)
    half = len(losses_RQS) // 2
    if half == 0:
        return table
    halves = [part.mean(axis=0) for part in (losses_RQS[:half], losses_RQS[half:])]
    ceiling = lds_table({HALF_OF_SEEDS: -halves[0]}, halves[1], languages_Q, draws)
    return pa.concat_tables([table, ceiling])


def removal_table(
    methods: Sequence[str],
    retrained: Retrained,
    removed: int,
    random_removals: int,
    languages_Q: Sequence[str],
    clusters_Q: Sequence[Any] | np.ndarray,
    resampling: Resampling,
) -> pa.Table:
    """`removal.parquet`: change of loss and accuracy of a language's test examples.

    A row per method, side and test language, and one of all (the mean over languages). A change is
    against the model trained on all examples with the same seed. Random removals are the same
    examples for every test language. Bounds are as in `Changes`, null with one seed.
    """
    places = by_language(languages_Q)
    groups: dict[tuple[str, str], Compared] = {
        (method, side): {name: (removal_set(method, side, name),) for name in places}
        for method in _not_random(dict.fromkeys(methods))
        for side in SIDES
    }
    groups[RANDOM, RANDOM] = dict.fromkeys(places, tuple(map(random_set, range(random_removals))))
    sets = [name for group in groups.values() for own in group.values() for name in own]
    changes = _changes(retrained, sets, places, clusters_Q, resampling)
    rows = []
    for (method, side), compared in groups.items():
        trainings = len(next(iter(compared.values()))) * len(retrained.losses[ALL])
        names = {"method": method, "side": side, "removed": removed, "trainings": trainings}
        intervals = {name: dict(one.intervals(compared)) for name, one in changes.items()}
        rows += [
            {**names, "test_language": language, **_bounds(intervals, language)}
            for language in (None, *places)
        ]
    _add_before(rows, retrained, places)
    return pa.Table.from_pylist(rows, REMOVAL_SCHEMA)


def _bounds(
    intervals: Mapping[str, Mapping[str | None, Mapping[str, float | None]]], language: str | None
) -> dict[str, float | None]:
    """A language's columns of `REMOVAL_SCHEMA`, from the intervals of `loss` and `accuracy`."""
    return {
        f"{name}_change{suffix}": of_language[language][bound]
        for name, of_language in intervals.items()
        for suffix, bound in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def _changes(
    retrained: Retrained,
    sets: Sequence[str],
    places: Mapping[str, np.ndarray],
    clusters_Q: Sequence[Any] | np.ndarray,
    resampling: Resampling,
) -> dict[str, Changes]:
    """Of `loss` and `accuracy`, without each of the sets against all examples."""
    draws = Draws.of(clusters_Q, 1, resampling)
    first_of: dict[bytes, str] = {}
    same = {n: first_of.setdefault(retrained.losses[n].tobytes(), n) for n in (ALL, *sets)}
    return {
        name: Changes.of(values, same, ALL, places, draws, resampling.seed)
        for name, values in (("loss", retrained.losses), ("accuracy", retrained.correct))
    }


def _add_before(
    rows: Sequence[dict[str, Any]], retrained: Retrained, places: Mapping[str, np.ndarray]
) -> None:
    """Loss and accuracy of the models trained on all examples."""
    for name, of in (("loss", retrained.losses), ("accuracy", retrained.correct)):
        before = {language: float(of[ALL][:, own_Q].mean()) for language, own_Q in places.items()}
        mean = float(np.mean(list(before.values())))
        for row in rows:
            language = row["test_language"]
            row[f"{name}_before"] = mean if language is None else before[language]


def leave_one_out_table(
    summed: Mapping[str, Summed],
    retrained: Retrained,
    languages_N: Sequence[str],
    languages_Q: Sequence[str],
    clusters_Q: Sequence[Any] | np.ndarray,
    resampling: Resampling,
) -> pa.Table:
    """`leave_one_out.parquet`: a row per method, test and training language.

    predicted: sum over the language's training examples of their mean score on the test language's
        examples: what the loss is to rise by without them, in the method's own unit.
    actual: change of the test language's mean loss without that training language, against the
        models trained on all examples with the same seeds; bounds as in `removal_table`.
    """
    trained, tested = by_language(languages_N), by_language(languages_Q)
    sets = [language_set(left_out) for left_out in trained]
    change = _changes(retrained, sets, tested, clusters_Q, resampling)["loss"]
    actual = {
        left_out: dict(change.intervals(dict.fromkeys(tested, (language_set(left_out),))))
        for left_out in trained
    }
    rows = []
    for method, one in summed.items():
        for place, test_language in enumerate(tested):
            for train_language, own_N in trained.items():
                found = actual[train_language][test_language]
                rows.append(
                    {
                        "method": method,
                        "test_language": test_language,
                        "train_language": train_language,
                        "predicted": float(one.means_LN[place, own_N].sum()),
                        "actual": found["value"],
                        "actual_low": found["low"],
                        "actual_high": found["high"],
                    }
                )
    return pa.Table.from_pylist(rows, LEAVE_ONE_OUT_SCHEMA)


def leave_one_out_tests(table: pa.Table, resampling: Resampling) -> list[dict[str, Any]]:
    """For each method, Spearman of predicted with actual change over the cells, and its p.

    Over all cells, and over those of two different languages (`between_only`). See
    `permuted_columns` for the test: it asks whether the scores tell which *other* languages matter.
    """
    tests = []
    rows = table.to_pylist()
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        tested, trained = (
            list(dict.fromkeys(row[f"{side}_language"] for row in own))
            for side in ("test", "train")
        )
        predicted_LG, actual_LG = (
            np.array([row[name] for row in own]).reshape(len(tested), len(trained))
            for name in ("predicted", "actual")
        )
        for between_only in (False, True):
            found = permuted_columns(
                predicted_LG,
                actual_LG,
                tested,
                trained,
                between_only=between_only,
                permutations=resampling.permutations,
                seed=resampling.seed,
            )
            tests.append({"method": method, "between_only": between_only} | found.__dict__)
    return tests
