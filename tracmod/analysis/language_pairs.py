"""Correlation of influence between languages with similar subnetworks or with given distances.

Shape suffixes: n languages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tracmod.analysis.changes import with_names
from tracmod.analysis.matrix_correlation import MantelResult, mantel, partial_mantel
from tracmod.analysis.results import RunResults, ViewResults
from tracmod.analysis.similarity import similarity_matrix
from tracmod.analysis.statistics import Resampling, adjusted_p_values
from tracmod.tasks.readers import read_rows

MANTEL_VIEWS = ("full", "subnetwork", "random")
MANTEL_MEASURES = ("share_positive", "mean_influence")


def similarity_influence(
    run: RunResults,
    views: Sequence[ViewResults],
    similarity: pa.Table,
    seeds: pa.Table | None,
    resampling: Resampling,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], pa.Table | None]:
    """Test whether languages with similar subnetworks (Jaccard) influence each other more.

    Influence of m on l differs from that of l on m, so their mean is compared with the symmetric
    similarity; the diagonal is left out. `p_adjusted` controls the false discovery rate over the
    tests of one list. The partial tests remove the linear effect of two controls from both sides:
    how differently the training labels of the two languages are distributed (`label_distance`,
    total variation), and how similar the subnetworks of one language are from seed to seed
    (`seed_similarity`, mean of the two languages). A control that is the same for every pair has no
    effect and is not listed; without any control there are no partial tests.

    Args:
        run, views: the run.
        similarity: result of `similarity_table` for its subnetworks.
        seeds: result of `seed_similarity_table`, or None.
        resampling: options of the tests.

    Returns:
        The Mantel tests, the partial tests (with `controls`), and the pairs of languages that both
        are based on (`pairs.parquet`); with fewer than 3 languages no tests and None.
    """
    languages = [name for name in run.masks if name in run.num_train and name in run.num_test]
    if len(languages) < 3:
        return [], [], None
    jaccard = similarity_matrix(similarity, languages, "jaccard")
    controls = {"label_distance": label_distances(run, languages)}
    if seeds is not None:
        controls |= _seed_controls(seeds, languages)
    upper = np.triu_indices(len(languages), k=1)
    varying = {name: m for name, m in controls.items() if np.ptp(m[upper]) > 1e-12}
    between: dict[str, np.ndarray] = {
        "jaccard": jaccard,
        "corrected_jaccard": similarity_matrix(similarity, languages, "corrected_jaccard"),
        **controls,
    }
    tests, partial, pairs = [], [], []
    for view in _tested(views):
        influence = {m: symmetric_influence(run, view, m, languages) for m in MANTEL_MEASURES}
        pairs.append(_pair_rows(view, languages, between | influence))
        for measure, matrix in influence.items():
            names = {"model": view.model, "view": view.name, "measure": measure}
            tests.append(names | _result(mantel, jaccard, matrix, resampling))
            if varying:
                matrices = list(varying.values())
                partial.append(
                    names
                    | {"controls": list(varying)}
                    | _result(partial_mantel, jaccard, matrix, resampling, matrices)
                )
    return _adjusted(tests), _adjusted(partial), pa.concat_tables(pairs) if pairs else None


@dataclass(frozen=True)
class Distances:
    """One metric of a table of distances between languages.

    Attributes:
        metric: name of its column.
        languages: the n languages that have distances to each other.
        left_out: languages of the study that lack a distance.
        matrix: (n, n) symmetric float, 0 on the diagonal.
    """

    metric: str
    languages: list[str]
    left_out: list[str]
    matrix: np.ndarray


def read_distances(
    path: str | Path, languages: Sequence[str], names: Mapping[str, str] | None = None
) -> list[Distances]:
    """Read distances between languages from a table with one row per pair of languages.

    The languages are in the columns `language_a` and `language_b` or, if these do not exist, in the
    first two columns; every other column is a metric. A pair may be listed in either order, and an
    empty cell is a missing distance. Languages are left out, those with the most missing distances
    first, until every pair has a distance.

    Args:
        path: .tsv, .csv, .jsonl or .parquet, plain or .gz (see `tasks.readers`).
        languages: languages of the study.
        names: language of the study -> its name in the table, where they differ.

    Returns:
        One entry per metric.

    Raises:
        ValueError: the file does not exist, has no metric or no pair of the study's languages, or a
            distance is not a number or differs between two rows of the same pair.
    """
    language_of = {(names or {}).get(language, language): language for language in languages}
    distances: dict[str, dict[frozenset[str], float]] = {}
    for line, row in read_rows(path):
        first, second, metrics = _columns(path, row)
        pair = frozenset(language_of.get(str(row[column]), "") for column in (first, second))
        is_of_study = len(pair) == 2 and "" not in pair
        for metric in metrics:
            value = _number(row[metric], f"{path}:{line}: {metric}")
            distance_of = distances.setdefault(metric, {})
            if is_of_study and value is not None and distance_of.setdefault(pair, value) != value:
                raise ValueError(
                    f"{path}:{line}: {metric} of {' and '.join(sorted(pair))}: expected "
                    f"{distance_of[pair]}, as in an earlier row, got {value}"
                )
    if not any(distances.values()):
        raise ValueError(
            f"{path}: expected distances between {', '.join(sorted(language_of))}, got none; "
            f"analyze.distance_names maps languages of the study to the names in the table"
        )
    return [_complete(metric, list(languages), pairs) for metric, pairs in distances.items()]


def distance_influence(
    run: RunResults,
    views: Sequence[ViewResults],
    distances: Sequence[Distances],
    resampling: Resampling,
) -> list[dict[str, Any]]:
    """Test whether languages that are closer to each other influence each other more or less.

    Mantel tests of every metric, view and measure, as in `similarity_influence`. With a negative
    correlation, close languages rely more on each other's examples.

    Args:
        run, views: the run.
        distances: result of `read_distances`.
        resampling: options of the tests.
    """
    tests = []
    for view in _tested(views):
        for measure in MANTEL_MEASURES:
            for metric in distances:
                entry: dict[str, Any] = {"model": view.model, "view": view.name, "measure": measure}
                entry |= {"metric": metric.metric, "left_out": metric.left_out}
                if len(metric.languages) < 3:
                    reason = f"mantel: expected at least 3 items, got {len(metric.languages)}"
                    tests.append(entry | _no_result(reason))
                    continue
                influence = symmetric_influence(run, view, measure, metric.languages)
                tests.append(entry | _result(mantel, metric.matrix, influence, resampling))
    return _adjusted(tests)


def symmetric_influence(
    run: RunResults, view: ViewResults, measure: str, languages: Sequence[str]
) -> np.ndarray:
    """Return the (n, n) influence between two languages, the mean of its two directions."""
    column_of = {language: column for column, language in enumerate(run.num_train)}
    test_languages = np.array(run.test["language"].to_pylist())
    values = view.measures[measure][:, [column_of[language] for language in languages]]
    known = np.isfinite(values).all(axis=1)
    rows = [values[known & (test_languages == name)] for name in languages]
    means = [row.mean(axis=0) if len(row) else np.full(len(languages), np.nan) for row in rows]
    matrix = np.stack(means)
    return (matrix + matrix.T) / 2


def label_distances(run: RunResults, languages: Sequence[str]) -> np.ndarray:
    """Return the (n, n) total variation distance between distributions of training labels."""
    train = run.examples("train")
    labels, names = np.array(train["label"].to_pylist()), np.array(train["language"].to_pylist())
    shares = [np.bincount(labels[names == name], minlength=labels.max() + 1) for name in languages]
    shares = [counts / counts.sum() for counts in shares]
    return np.array([[np.abs(a - b).sum() / 2 for b in shares] for a in shares])


def _seed_controls(seeds: pa.Table, languages: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the control `seed_similarity`, if every language has several seeds."""
    within = {
        row["language_a"]: row["jaccard"]
        for row in seeds.to_pylist()
        if row["language_a"] == row["language_b"]
    }
    if not set(languages) <= set(within):
        return {}
    values = np.array([within[language] for language in languages])
    return {"seed_similarity": (values[:, None] + values) / 2}


def _tested(views: Sequence[ViewResults]) -> list[ViewResults]:
    return [view for view in views if view.name in MANTEL_VIEWS]


def _pair_rows(
    view: ViewResults, languages: list[str], matrices: Mapping[str, np.ndarray]
) -> pa.Table:
    upper = np.triu_indices(len(languages), k=1)
    columns: dict[str, Any] = {
        "language_a": [languages[i] for i in upper[0]],
        "language_b": [languages[i] for i in upper[1]],
        **{name: matrix[upper] for name, matrix in matrices.items()},
    }
    return with_names(pa.table(columns), {"model": view.model, "view": view.name})


def _result(test: Any, a: np.ndarray, b: np.ndarray, resampling: Resampling, *more: Any) -> Any:
    """Return the result of a Mantel test, or the reason why it could not be made."""
    try:
        result: MantelResult = test(
            a, b, *more, permutations=resampling.permutations, seed=resampling.seed
        )
    except ValueError as error:
        return _no_result(str(error))
    return dict(result.__dict__)


def _no_result(reason: str) -> dict[str, Any]:
    return {"correlation": None, "p_value": None, "reason": reason}


def _adjusted(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `p_adjusted` over one family of tests."""
    adjusted = adjusted_p_values([test["p_value"] for test in tests])
    return [test | {"p_adjusted": p} for test, p in zip(tests, adjusted, strict=True)]


def _columns(path: str | Path, row: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    """Return the two columns with languages and those with metrics."""
    columns = list(row)
    first, second = ("language_a", "language_b")
    if not {first, second} <= set(columns):
        first, second = [*columns[:2], "", ""][:2]
    metrics = [column for column in columns if column not in (first, second)]
    if not metrics:
        raise ValueError(
            f"{path}: expected the columns language_a, language_b and at least one of distances, "
            f"got {', '.join(columns)}"
        )
    return first, second, metrics


def _number(value: Any, where: str) -> float | None:
    """Return the number in a cell; None if it is empty or not finite.

    Raises:
        ValueError: it is no number; the message begins with `where`.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected a number, got {value!r}") from None
    return number if math.isfinite(number) else None


def _complete(
    metric: str, languages: list[str], pairs: Mapping[frozenset[str], float]
) -> Distances:
    """Leave out languages, those with the most missing distances first, until none is missing."""
    complete = list(languages)
    while complete:
        missing = [
            sum(a != b and frozenset((a, b)) not in pairs for b in complete) for a in complete
        ]
        if not any(missing):
            break
        complete.pop(int(np.argmax(missing)))
    matrix = np.array(
        [[0.0 if a == b else pairs[frozenset((a, b))] for b in complete] for a in complete]
    ).reshape(len(complete), len(complete))
    left_out = [language for language in languages if language not in complete]
    return Distances(metric, complete, left_out, matrix)
