"""Which examples to leave out of retraining, and how the results agree with a method's scores.

Three checks, each of which compares scores with the losses of models that were retrained without
some training examples: random subsets (`subset_lds`), the strongest proponents and opponents of a
test language (`removal_table`), and whole training languages (`leave_one_out_table`).

Shape suffixes: N training examples, Q test examples, S subsets, R trainings (seeds) on each set,
L test languages, G training languages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """The sums and means of a method's (Q, N) scores that the checks need.

    Attributes:
        subsets_QS: sum of the scores over each subset.
        means_LN: mean of the scores of each training example over each language's test examples.
    """

    subsets_QS: np.ndarray
    means_LN: np.ndarray

    @staticmethod
    def of(scores_QN: np.ndarray, members_SN: np.ndarray, languages_Q: Sequence[str]) -> Summed:
        """Sum in float64, one test example at a time because the scores may be large.

        Args:
            scores_QN: scores of a method.
            members_SN: which training examples each subset holds, bool.
            languages_Q: language of each test example.
        """
        members_NS = members_SN.T.astype(np.float64)
        means = [
            scores_QN[own_Q].mean(axis=0, dtype=np.float64)
            for own_Q in by_language(languages_Q).values()
        ]
        sums = [row.astype(np.float64) @ members_NS for row in scores_QN]
        return Summed(np.stack(sums), np.stack(means))


@dataclass(frozen=True)
class Retrained:
    """Results on the test examples after retraining.

    Attributes:
        losses: set -> (R, Q) loss, by seed.
        correct: set -> (R, Q) 1 for a correct prediction, otherwise 0.
    """

    losses: Mapping[str, np.ndarray]
    correct: Mapping[str, np.ndarray]


# --- sets of training examples ---------------------------------------------------------------


def draw_subsets(languages_N: Sequence[str], number: int, fraction: float, seed: int) -> np.ndarray:
    """Draw random subsets of the training examples, without replacement.

    More subsets with the same seed begin with the same ones, so that none is retrained in vain.

    Args:
        languages_N: language of each training example.
        number: S.
        fraction: share of the training examples in each subset.
        seed: seed of the draw.

    Returns:
        (S, N) bool, whether a subset holds a training example.

    Raises:
        ValueError: a subset has no training example of some language.
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
    """Return the rows of the highest scores ("proponents") and of the lowest ("opponents").

    Args:
        scores_N: score of each training example.
        number: how many of each.
        seed: seed of the random order of equal scores.
    """
    chance_N = np.random.default_rng([seed, 2]).random(len(scores_N))
    ascending = np.lexsort((chance_N, scores_N))
    return {"proponents": np.sort(ascending[-number:]), "opponents": np.sort(ascending[:number])}


def subset_set(number: int) -> str:
    """Return the name of the set that holds a random subset."""
    return f"subset {number}"


def removal_set(method: str, side: str, language: str) -> str:
    """Return the name of the set without a method's strongest examples for a test language."""
    return f"without {side} by {method} of {language}"


def random_set(draw: int) -> str:
    """Return the name of the set without random examples."""
    return f"without random {draw}"


def language_set(language: str) -> str:
    """Return the name of the set without a training language."""
    return f"without language {language}"


def subsets_left_out(members_SN: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows that each random subset leaves out, by name of the set."""
    return {
        subset_set(number): np.flatnonzero(~members_N)
        for number, members_N in enumerate(members_SN)
    }


def removals_left_out(
    summed: Mapping[str, Summed],
    languages: Sequence[str],
    removed: int,
    random_removals: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Return the rows that each removal leaves out, by name of the set.

    Args:
        summed: method -> its sums; the method `random` is left out.
        languages: the L test languages.
        removed: number of examples of each removal.
        random_removals: number of removals of random examples.
        seed: seed of the draws.
    """
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
    """Return the rows of each training language, by name of the set without it."""
    return {language_set(name): own_N for name, own_N in by_language(languages_N).items()}


def _not_random(methods: Iterable[str]) -> list[str]:
    return [method for method in methods if method != RANDOM]


# --- results ---------------------------------------------------------------------------------


def subset_lds(
    summed: Mapping[str, Summed],
    retrained: Retrained,
    languages_Q: Sequence[str],
    clusters_Q: Sequence[Any] | np.ndarray,
    resampling: Resampling,
    subsets: Sequence[int] | None = None,
) -> pa.Table:
    """Compute `lds_table` of every method, and with half of the seeds as the prediction.

    The latter (`HALF_OF_SEEDS`) is a ceiling: no method can predict differences in which two
    trainings on the same examples disagree. With a single seed it is left out.

    Args:
        summed: method -> its sums.
        retrained: losses after training on each subset.
        languages_Q, clusters_Q: language and parallel item of each test example.
        resampling: options of the intervals.
        subsets: numbers of the subsets that are compared; None for all.
    """
    if subsets is None:
        subsets = range(next(iter(summed.values())).subsets_QS.shape[1])
    losses_RQS = np.stack([retrained.losses[subset_set(s)] for s in subsets], axis=-1)
    draws = Draws.of(clusters_Q, len(subsets), resampling)
    predicted = {method: sums.subsets_QS[:, list(subsets)] for method, sums in summed.items()}
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
    """Build `removal.parquet`: change of loss and accuracy when strong examples are removed.

    It has one row per method, side and test language, and one for the mean over languages. A change
    is relative to the model that was trained on all examples with the same seed. Random removals
    remove the same examples for every test language. Bounds are those of `Changes`, null with a
    single seed.

    Args:
        methods: names of the methods.
        retrained: results after training on each set.
        removed: number of examples of each removal.
        random_removals: number of removals of random examples.
        languages_Q, clusters_Q: language and parallel item of each test example.
        resampling: options of the intervals.

    Returns:
        A table with `REMOVAL_SCHEMA`.
    """
    rows_of = by_language(languages_Q)
    groups: dict[tuple[str, str], Compared] = {
        (method, side): {name: (removal_set(method, side, name),) for name in rows_of}
        for method in _not_random(methods)
        for side in SIDES
    }
    groups[RANDOM, RANDOM] = dict.fromkeys(rows_of, tuple(map(random_set, range(random_removals))))
    sets = [name for compared in groups.values() for names in compared.values() for name in names]
    changes = _changes(retrained, sets, rows_of, clusters_Q, resampling)
    rows = []
    for (method, side), compared in groups.items():
        trainings = len(next(iter(compared.values()))) * len(retrained.losses[ALL])
        names = {"method": method, "side": side, "removed": removed, "trainings": trainings}
        intervals = {name: dict(change.intervals(compared)) for name, change in changes.items()}
        rows += [
            {**names, "test_language": language, **_bounds(intervals, language)}
            for language in (None, *rows_of)
        ]
    _add_before(rows, retrained, rows_of)
    return pa.Table.from_pylist(rows, REMOVAL_SCHEMA)


def _bounds(
    intervals: Mapping[str, Mapping[str | None, Mapping[str, float | None]]], language: str | None
) -> dict[str, float | None]:
    """Return a language's columns of `REMOVAL_SCHEMA` from intervals of loss and accuracy."""
    return {
        f"{name}_change{suffix}": interval_of[language][bound]
        for name, interval_of in intervals.items()
        for suffix, bound in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def _changes(
    retrained: Retrained,
    sets: Sequence[str],
    rows_of: Mapping[str, np.ndarray],
    clusters_Q: Sequence[Any] | np.ndarray,
    resampling: Resampling,
) -> dict[str, Changes]:
    """Return the changes of "loss" and "accuracy" by training on sets instead of all examples.

    Sets that leave out the same examples were trained once; they are recognised by equal losses.
    """
    draws = Draws.of(clusters_Q, 1, resampling)
    first_with: dict[bytes, str] = {}
    same = {
        name: first_with.setdefault(retrained.losses[name].tobytes(), name) for name in (ALL, *sets)
    }
    return {
        name: Changes.of(values, same, ALL, rows_of, draws, resampling.seed)
        for name, values in (("loss", retrained.losses), ("accuracy", retrained.correct))
    }


def _add_before(
    rows: Sequence[dict[str, Any]], retrained: Retrained, rows_of: Mapping[str, np.ndarray]
) -> None:
    """Add the loss and accuracy of the models that were trained on all examples."""
    for name, values in (("loss", retrained.losses), ("accuracy", retrained.correct)):
        before = {
            language: float(values[ALL][:, own_Q].mean()) for language, own_Q in rows_of.items()
        }
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
    """Build `leave_one_out.parquet`: one row per method, test language and training language.

    `predicted` is the sum over the training language's examples of their mean score on the test
    language's examples: the predicted increase of the loss without them, in the unit of the method.
    `actual` is the change of the test language's mean loss without the training language, relative
    to the models that were trained on all examples with the same seeds; bounds as in
    `removal_table`.

    Args:
        summed: method -> its sums.
        retrained: results after training on each set.
        languages_N: language of each training example.
        languages_Q, clusters_Q: language and parallel item of each test example.
        resampling: options of the intervals.

    Returns:
        A table with `LEAVE_ONE_OUT_SCHEMA`.
    """
    trained, tested = by_language(languages_N), by_language(languages_Q)
    sets = [language_set(left_out) for left_out in trained]
    change = _changes(retrained, sets, tested, clusters_Q, resampling)["loss"]
    actual = {
        left_out: dict(change.intervals(dict.fromkeys(tested, (language_set(left_out),))))
        for left_out in trained
    }
    rows = []
    for method, sums in summed.items():
        for test_language, means_N in zip(tested, sums.means_LN, strict=True):
            for train_language, own_N in trained.items():
                interval = actual[train_language][test_language]
                rows.append(
                    {
                        "method": method,
                        "test_language": test_language,
                        "train_language": train_language,
                        "predicted": float(means_N[own_N].sum()),
                        "actual": interval["value"],
                        "actual_low": interval["low"],
                        "actual_high": interval["high"],
                    }
                )
    return pa.Table.from_pylist(rows, LEAVE_ONE_OUT_SCHEMA)


def leave_one_out_tests(table: pa.Table, resampling: Resampling) -> list[dict[str, Any]]:
    """Correlate predicted with actual changes over the cells, for each method.

    Spearman's correlation over all cells, and over those of two different languages
    (`between_only`), with the test of `permuted_columns`: do the scores tell which *other*
    languages matter?

    Args:
        table: result of `leave_one_out_table`.
        resampling: options of the test.
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
            result = permuted_columns(
                predicted_LG,
                actual_LG,
                tested,
                trained,
                between_only=between_only,
                permutations=resampling.permutations,
                seed=resampling.seed,
            )
            tests.append({"method": method, "between_only": between_only} | result.__dict__)
    return tests
