"""What goes with influence between two languages: similar subnetworks, or any table of distances.

Shape legend: n languages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tracmod.analysis.changes import named
from tracmod.analysis.matrix_correlation import MantelResult, mantel, partial_mantel
from tracmod.analysis.results import RunResults, View
from tracmod.analysis.similarity import similarity_matrix
from tracmod.analysis.statistics import Resampling, adjusted_p_values
from tracmod.tasks.readers import read_rows

MANTEL_VIEWS = ("full", "subnetwork", "random")
MANTEL_MEASURES = ("share_positive", "mean_influence")


def similarity_influence(
    run: RunResults,
    views: Sequence[View],
    similarity: pa.Table,
    seeds: pa.Table | None,
    resampling: Resampling,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], pa.Table | None]:
    """Mantel tests of subnetwork similarity (Jaccard) against influence between two languages.

    Influence of m on l is not that of l on m: the mean of both is set against the symmetric
    similarity, and the diagonal is left out. `p_adjusted` bounds the false discovery rate over the
    tests of one list. The partial tests take out of both what goes with the controls: how far the
    two languages' training labels are distributed differently (`label_distance`, total variation)
    and how alike subnetworks of one language are from seed to seed (`seed_similarity`, the mean of
    the two languages'). A control that is the same for every pair takes out nothing and is not
    listed; without any there are no partial tests.

    Args:
        run, views: the run.
        similarity: `similarity_table` of its subnetworks.
        seeds: `seed_similarity_table`, if there are several seeds.
        resampling: of the tests.

    Returns:
        Tests, partial tests (with `controls`), and the pairs behind both (`pairs.parquet`).
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
                entry = names | {"controls": list(varying)}
                given = list(varying.values())
                partial.append(entry | _result(partial_mantel, jaccard, matrix, resampling, given))
    return _adjusted(tests), _adjusted(partial), pa.concat_tables(pairs) if pairs else None


@dataclass(frozen=True)
class Distances:
    """One metric of a table of distances between languages.

    Attributes:
        metric: its column.
        languages: the n languages that have a distance to each other.
        left_out: languages asked for that lack one.
        matrix: (n, n) symmetric float, 0 on the diagonal.
    """

    metric: str
    languages: list[str]
    left_out: list[str]
    matrix: np.ndarray


def read_distances(
    path: str | Path, languages: Sequence[str], names: Mapping[str, str] | None = None
) -> list[Distances]:
    """Distances between the study's languages from a table with one row per pair of languages.

    The languages stand in `language_a` and `language_b`, or, where there are no such columns, in
    the first two; every other column is a metric. A pair may be given in either order; an empty
    cell is a missing distance. Languages are left out, those with most distances missing first,
    until every pair has one.

    Args:
        path: .tsv, .csv, .jsonl or .parquet, plain or .gz (`tasks.readers`).
        languages: of the study.
        names: our language -> the table's, where they differ.

    Raises:
        ValueError: no such file, no metric, a distance that is no number, a pair given twice with
            two distances, or no pair of the study's languages.
    """
    language_of = {(names or {}).get(language, language): language for language in languages}
    found: dict[str, dict[frozenset[str], float]] = {}
    for line, row in read_rows(path):
        first, second, metrics = _columns(path, row)
        pair = frozenset(language_of.get(str(row[column]), "") for column in (first, second))
        known = len(pair) == 2 and "" not in pair
        for metric in metrics:
            value = _number(row[metric], f"{path}:{line}: {metric}")
            of_metric = found.setdefault(metric, {})
            if known and value is not None and of_metric.setdefault(pair, value) != value:
                raise ValueError(
                    f"{path}:{line}: {metric} of {' and '.join(sorted(pair))}: {value}, but "
                    f"{of_metric[pair]} in an earlier row"
                )
    if not any(found.values()):
        raise ValueError(
            f"{path}: no distance between two of {', '.join(sorted(language_of))}; "
            f"analyze.distance_names maps our languages to the table's names"
        )
    return [_complete(metric, list(languages), pairs) for metric, pairs in found.items()]


def distance_influence(
    run: RunResults, views: Sequence[View], distances: Sequence[Distances], resampling: Resampling
) -> list[dict[str, Any]]:
    """Mantel tests of every metric of distance against influence, as in `similarity_influence`.

    A negative correlation: languages that are near each other draw more on each other's examples.
    """
    tests = []
    for view in _tested(views):
        for measure in MANTEL_MEASURES:
            for one in distances:
                entry: dict[str, Any] = {"model": view.model, "view": view.name, "measure": measure}
                entry |= {"metric": one.metric, "left_out": one.left_out}
                if len(one.languages) < 3:
                    reason = f"mantel: expected at least 3 items, got {len(one.languages)}"
                    tests.append(entry | _no_result(reason))
                    continue
                influence = symmetric_influence(run, view, measure, one.languages)
                tests.append(entry | _result(mantel, one.matrix, influence, resampling))
    return _adjusted(tests)


def symmetric_influence(
    run: RunResults, view: View, measure: str, languages: Sequence[str]
) -> np.ndarray:
    """(n, n) influence between two languages: the mean of its two directions."""
    column_of = {language: column for column, language in enumerate(run.num_train)}
    test_languages = np.array(run.test["language"].to_pylist())
    values = view.measures[measure][:, [column_of[language] for language in languages]]
    known = np.isfinite(values).all(axis=1)
    rows = [values[known & (test_languages == name)] for name in languages]
    means = [row.mean(axis=0) if len(row) else np.full(len(languages), np.nan) for row in rows]
    matrix = np.stack(means)
    return (matrix + matrix.T) / 2


def label_distances(run: RunResults, languages: Sequence[str]) -> np.ndarray:
    """(n, n) total variation distance of two languages' distributions of training labels."""
    train = run.examples("train")
    labels, names = np.array(train["label"].to_pylist()), np.array(train["language"].to_pylist())
    shares = [np.bincount(labels[names == name], minlength=labels.max() + 1) for name in languages]
    shares = [counts / counts.sum() for counts in shares]
    return np.array([[np.abs(a - b).sum() / 2 for b in shares] for a in shares])


def _seed_controls(seeds: pa.Table, languages: Sequence[str]) -> dict[str, np.ndarray]:
    within = {
        row["language_a"]: row["jaccard"]
        for row in seeds.to_pylist()
        if row["language_a"] == row["language_b"]
    }
    if not set(languages) <= set(within):
        return {}
    values = np.array([within[language] for language in languages])
    return {"seed_similarity": (values[:, None] + values) / 2}


def _tested(views: Sequence[View]) -> list[View]:
    return [view for view in views if view.name in MANTEL_VIEWS]


def _pair_rows(view: View, languages: list[str], matrices: Mapping[str, np.ndarray]) -> pa.Table:
    upper = np.triu_indices(len(languages), k=1)
    columns: dict[str, Any] = {
        "language_a": [languages[i] for i in upper[0]],
        "language_b": [languages[i] for i in upper[1]],
        **{name: matrix[upper] for name, matrix in matrices.items()},
    }
    return named(pa.table(columns), {"model": view.model, "view": view.name})


def _result(test: Any, a: np.ndarray, b: np.ndarray, resampling: Resampling, *more: Any) -> Any:
    """A Mantel test's outcome, or why there is none."""
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
    adjusted = adjusted_p_values([test["p_value"] for test in tests])
    return [test | {"p_adjusted": p} for test, p in zip(tests, adjusted, strict=True)]


def _columns(path: str | Path, row: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    columns = list(row)
    first, second = ("language_a", "language_b")
    if not {first, second} <= set(columns):
        first, second = [*columns[:2], "", ""][:2]
    metrics = [column for column in columns if column not in (first, second)]
    if not metrics:
        raise ValueError(
            f"{path}: expected language_a, language_b and one or more columns of distances, got "
            f"{', '.join(columns)}"
        )
    return first, second, metrics


def _number(value: Any, where: str) -> float | None:
    """None for an empty cell."""
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
    """The languages that have every distance to each other."""
    kept = list(languages)
    while kept:
        missing = [sum(a != b and frozenset((a, b)) not in pairs for b in kept) for a in kept]
        if not any(missing):
            break
        kept.pop(int(np.argmax(missing)))
    matrix = np.array(
        [[0.0 if a == b else pairs[frozenset((a, b))] for b in kept] for a in kept]
    ).reshape(len(kept), len(kept))
    left_out = [language for language in languages if language not in kept]
    return Distances(metric, kept, left_out, matrix)
