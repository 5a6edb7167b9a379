"""From influential training examples to shares of languages, per test example and per language.

The influence of a language on a test example is described by three measures (`MEASURES`): its share
among the k strongest proponents and among the k strongest opponents, and the mean influence of its
training examples. `example_table` has them per test example, `language_table` their means per test
language with intervals.

Shape suffixes: Q test (query) examples, k listed per sign, N training examples, G training
languages, D = measures x G.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tracmod.analysis.statistics import bootstrap_mean

MEASURES = ("share_positive", "share_negative", "mean_influence")

EXAMPLE_SCHEMA = pa.schema(
    [
        ("test_id", pa.string()),
        ("test_language", pa.string()),
        ("test_label", pa.int64()),
        ("test_prediction", pa.int64()),
        ("train_language", pa.string()),
        *((measure, pa.float64()) for measure in MEASURES),
    ]
)

LANGUAGE_SCHEMA = pa.schema(
    [
        ("test_language", pa.string()),
        ("train_language", pa.string()),
        *((measure, pa.float64()) for measure in MEASURES),
        *(
            (f"{measure}_{bound}", pa.float64())
            for measure in MEASURES
            for bound in ("low", "high")
        ),
        ("num_test", pa.int64()),
        ("num_train", pa.int64()),
        ("null_share", pa.float64()),
    ]
)


def language_shares(indices: Any, train_groups: Any, num_groups: int) -> np.ndarray:
    """Compute the share of each training language among the listed training examples.

    Args:
        indices: (Q, k) int, training examples; -1 for none, which is not counted.
        train_groups: (N,) int, number of the language of each training example, 0 to G - 1.
        num_groups: G.

    Returns:
        (Q, G) float64. Rows sum to 1, or to 0 where no example is listed.
    """
    indices_Qk = np.asarray(indices)
    groups_N = np.asarray(train_groups)
    listed_Qk = indices_Qk >= 0
    rows_Qk = np.broadcast_to(np.arange(len(indices_Qk))[:, None], indices_Qk.shape)
    cells = rows_Qk[listed_Qk] * num_groups + groups_N[indices_Qk[listed_Qk]]
    counts = np.bincount(cells, minlength=len(indices_Qk) * num_groups)
    counts_QG = counts.reshape(len(indices_Qk), num_groups)
    return counts_QG / np.maximum(counts_QG.sum(axis=1, keepdims=True), 1)


def example_table(
    indices: Any,
    opponent_indices: Any,
    group_sums: Any,
    *,
    languages: Sequence[str],
    train_languages: Sequence[str],
    test_ids: Sequence[str],
    test_languages: Sequence[str],
    test_labels: Sequence[int],
    test_predictions: Sequence[int] | None = None,
    group_sizes: Any | None = None,
) -> pa.Table:
    """Build `examples.parquet`: one row per test example and training language.

    `share_positive` (`share_negative`) is the share of the language among the k most positive
    (most negative) training examples. `mean_influence` is the mean influence of the language's
    training examples, in the unit of the scores (positive lowers the test loss).

    Args:
        indices: (Q, k) int, most positive training examples; -1 for none.
        opponent_indices: (Q, k) int, most negative training examples.
        group_sums: (Q, G) float, influence summed over the training examples of each language.
        languages: the G training languages, in the order of the columns of `group_sums`.
        train_languages: (N,) language of each training example.
        test_ids, test_languages, test_labels: (Q,) columns of the test examples.
        test_predictions: (Q,) predicted labels, under the mask of the view; None for null.
        group_sizes: (Q, G) int, number of training examples in each sum; None for all of the
            language.

    Returns:
        A table with `EXAMPLE_SCHEMA`.

    Raises:
        ValueError: sizes do not agree, or a training language is not in `languages`.
    """
    sums_QG = np.asarray(group_sums, dtype=np.float64)
    num_test, num_groups = len(test_ids), len(languages)
    if sums_QG.shape != (num_test, num_groups):
        raise ValueError(
            f"group_sums: expected the shape (test examples, languages) = ({num_test}, "
            f"{num_groups}), got {sums_QG.shape}"
        )
    group_of = {language: group for group, language in enumerate(languages)}
    unknown = sorted(set(train_languages) - set(group_of))
    if unknown:
        raise ValueError(f"train_languages: expected some of {list(languages)}, got {unknown}")
    groups_N = np.array([group_of[language] for language in train_languages], dtype=np.int64)
    sizes_QG = np.bincount(groups_N, minlength=num_groups) if group_sizes is None else group_sizes
    labels = [int(label) for label in test_labels]
    predictions = (
        [None] * num_test
        if test_predictions is None
        else [int(label) for label in test_predictions]
    )
    columns = {
        "test_id": _repeat(test_ids, num_groups),
        "test_language": _repeat(test_languages, num_groups),
        "test_label": _repeat(labels, num_groups),
        "test_prediction": _repeat(predictions, num_groups),
        "train_language": list(languages) * num_test,
        "share_positive": language_shares(indices, groups_N, num_groups).ravel(),
        "share_negative": language_shares(opponent_indices, groups_N, num_groups).ravel(),
        "mean_influence": (sums_QG / np.maximum(sizes_QG, 1)).ravel(),
    }
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def language_table(
    examples: pa.Table,
    num_train: Mapping[str, int],
    *,
    clusters: Mapping[str, str] | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    null_shares: np.ndarray | None = None,
) -> pa.Table:
    """Build `languages.parquet`: means per test language with intervals.

    `null_share` is the share that is expected if language plays no role: the language's share of
    the training examples. Intervals are percentile bootstraps over the test examples of one
    language; with a single test example low = high = value.

    Args:
        examples: result of `example_table`; languages keep the order in which they appear.
        num_train: training language -> number of its training examples.
        clusters: test id -> parallel item, whose examples are drawn together; an example without
            an item is drawn alone.
        bootstrap, confidence, seed: see `bootstrap_mean`.
        null_shares: (Q, G) null shares where they differ between test examples; their means are
            written.

    Returns:
        A table with `LANGUAGE_SCHEMA`.

    Raises:
        ValueError: a test example does not have exactly one row per training language.
    """
    pivot = pivot_examples(examples)
    rows = interval_columns(
        pivot.measures,
        pivot.test_languages,
        pivot.train_languages,
        [(clusters or {}).get(test_id) or test_id for test_id in pivot.test_ids],
        bootstrap=bootstrap,
        confidence=confidence,
        seed=seed,
    )
    rows["num_train"] = [num_train[language] for language in rows["train_language"]]
    total = sum(num_train[language] for language in pivot.train_languages)
    rows["null_share"] = [size / total for size in rows["num_train"]]
    if null_shares is not None:
        test_languages = np.array(pivot.test_languages)
        means = [
            null_shares[test_languages == language].mean(axis=0)
            for language in dict.fromkeys(test_languages)
        ]
        rows["null_share"] = np.concatenate(means).tolist()
    return pa.table(rows, schema=LANGUAGE_SCHEMA)


def interval_columns(
    measures: Mapping[str, np.ndarray],
    test_languages: Sequence[str],
    train_languages: Sequence[str],
    clusters: Sequence[str],
    *,
    bootstrap: int,
    confidence: float,
    seed: int,
) -> dict[str, list[Any]]:
    """Compute mean and interval of every measure, per test language and training language.

    All measures and training languages of a test language share the resamples.

    Args:
        measures: name -> (Q, G) float.
        test_languages, clusters: (Q,) language and parallel item of each row.
        train_languages: (G,) language of each column.
        bootstrap, confidence, seed: see `bootstrap_mean`.

    Returns:
        Columns test_language, train_language, num_test, and m, m_low and m_high per measure m.
    """
    names = list(measures)
    values_QD = np.concatenate([measures[name] for name in names], axis=1)
    languages_Q, clusters_Q = np.array(test_languages), np.array(clusters)
    columns: dict[str, list[Any]] = {"test_language": [], "train_language": [], "num_test": []}
    columns |= {f"{name}{end}": [] for name in names for end in ("", "_low", "_high")}
    for language in dict.fromkeys(test_languages):
        chosen_Q = languages_Q == language
        interval = bootstrap_mean(
            values_QD[chosen_Q],
            clusters_Q[chosen_Q],
            resamples=bootstrap,
            confidence=confidence,
            seed=seed,
        )
        columns["test_language"] += [language] * len(train_languages)
        columns["train_language"] += list(train_languages)
        columns["num_test"] += [int(chosen_Q.sum())] * len(train_languages)
        for end, array in (("", interval.value), ("_low", interval.low), ("_high", interval.high)):
            for name, part in zip(names, np.split(array, len(names)), strict=True):
                columns[f"{name}{end}"] += part.tolist()
    return columns


@dataclass(frozen=True)
class ExamplePivot:
    """`examples.parquet` as arrays: one row per test example, one column per training language.

    Attributes:
        test_ids, test_languages, labels, predictions: (Q,) columns, in the order of the table.
        train_languages: the G training languages.
        measures: name -> (Q, G) float64.
    """

    test_ids: list[str]
    test_languages: list[str]
    labels: list[int | None]
    predictions: list[int | None]
    train_languages: list[str]
    measures: dict[str, np.ndarray]


def pivot_examples(examples: pa.Table) -> ExamplePivot:
    """Turn the long table of `example_table` into arrays.

    Raises:
        ValueError: a test example does not have exactly one row per training language.
    """
    columns = {name: examples.column(name).to_pylist() for name in EXAMPLE_SCHEMA.names[:5]}
    row_of = {test_id: row for row, test_id in enumerate(dict.fromkeys(columns["test_id"]))}
    train_languages = list(dict.fromkeys(columns["train_language"]))
    column_of = {language: column for column, language in enumerate(train_languages)}
    rows = np.array([row_of[test_id] for test_id in columns["test_id"]], dtype=np.int64)
    cells = rows * len(column_of) + [column_of[name] for name in columns["train_language"]]
    shape = (len(row_of), len(column_of))
    if len(cells) != shape[0] * shape[1] or len(np.unique(cells)) != len(cells):
        raise ValueError(
            f"examples: expected one row for each of {shape[0]} test examples and {shape[1]} "
            f"training languages, got {len(cells)} rows"
        )
    measures = {}
    for measure in MEASURES:
        values = np.empty(shape)
        values.reshape(-1)[cells] = examples.column(measure).to_numpy()
        measures[measure] = values
    first = np.unique(rows, return_index=True)[1]
    return ExamplePivot(
        test_ids=list(row_of),
        test_languages=[columns["test_language"][row] for row in first],
        labels=[columns["test_label"][row] for row in first],
        predictions=[columns["test_prediction"][row] for row in first],
        train_languages=train_languages,
        measures=measures,
    )


def _repeat(values: Sequence[Any], times: int) -> list[Any]:
    """Repeat each value, `[a, a, b, b]`."""
    return [value for value in values for _ in range(times)]
