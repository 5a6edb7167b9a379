"""Differences between views and models, paired per test example, and their tests.

Shape suffixes: Q all test examples of the run, G training languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tracmod.analysis.languages import MEASURES
from tracmod.analysis.reliance import in_language, interval_table, known_rows, own_values
from tracmod.analysis.results import RunResults, ViewResults
from tracmod.analysis.statistics import Resampling, adjusted_p_values, sign_flip_test

# What each question of the study compares: (model, view) with (base model, base view).
COMPARISONS = (
    ("full", "subnetwork", "full", "full"),
    ("full", "subnetwork", "full", "random"),
    ("full", "subnetwork", "full", "other"),
    ("full", "subnetwork-own", "full", "full"),
    ("full", "subnetwork-own", "full", "subnetwork"),
    ("full", "subnetwork-own", "full", "random-own"),
    ("full", "subnetwork-test", "full", "full"),
    ("full", "subnetwork-test", "full", "subnetwork"),
    ("full", "union", "full", "subnetwork"),
    ("full", "intersection", "full", "subnetwork"),
    ("sparse", "subnetwork", "sparse", "full"),
    ("sparse", "subnetwork", "sparse", "random"),
    ("sparse", "subnetwork", "sparse", "other"),
    ("sparse", "subnetwork-own", "sparse", "full"),
    ("sparse", "subnetwork-own", "sparse", "subnetwork"),
    ("sparse", "subnetwork-own", "sparse", "random-own"),
    ("sparse", "subnetwork-test", "sparse", "full"),
    ("sparse", "subnetwork-test", "sparse", "subnetwork"),
    ("sparse", "union", "sparse", "subnetwork"),
    ("sparse", "intersection", "sparse", "subnetwork"),
    ("sparse", "full", "full", "full"),
    ("sparse", "subnetwork", "full", "subnetwork"),
    ("sparse", "random", "full", "random"),
    ("sparse", "other", "full", "other"),
    ("sparse", "subnetwork", "full", "full"),
    ("full", "full", "untrained", "full"),
    ("full", "subnetwork", "untrained", "subnetwork"),
    ("full", "random", "untrained", "random"),
    ("full", "subnetwork-own", "untrained", "subnetwork-own"),
    ("sparse", "full", "untrained", "full"),
    ("sparse", "subnetwork", "untrained", "subnetwork"),
    ("untrained", "subnetwork", "untrained", "random"),
    ("untrained", "subnetwork-own", "untrained", "random-own"),
)


def present_comparisons(views: Sequence[ViewResults]) -> list[tuple[ViewResults, ViewResults]]:
    """Return the pairs of `COMPARISONS` of which the run has both views, on common examples."""
    view_of = {(view.model, view.name): view for view in views}
    pairs = [
        (view_of[model, view], view_of[base_model, base_view])
        for model, view, base_model, base_view in COMPARISONS
        if (model, view) in view_of and (base_model, base_view) in view_of
    ]
    return [pair for pair in pairs if known_rows(paired_difference(*pair)).any()]


def change_table(
    run: RunResults, comparisons: Sequence[tuple[ViewResults, ViewResults]], resampling: Resampling
) -> pa.Table | None:
    """Build `changes.parquet`: every comparison for each test language and training language.

    Each measure m has, beside its interval, the columns m_p_value (sign-flip test over the
    language's test examples, whole parallel items), m_p_adjusted (false discovery rate over all
    cells of the comparison) and m_effect_size (d_z over parallel items).

    Returns:
        The table, or None without comparisons.
    """
    tables = []
    for view, base in comparisons:
        difference = paired_difference(view, base)
        table = interval_table(run, difference, resampling)
        for name, values in _cell_tests(run, difference, resampling).items():
            table = table.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
        tables.append(with_names(table, _names(view, base)))
    return pa.concat_tables(tables) if tables else None


def in_language_changes(
    run: RunResults, comparisons: Sequence[tuple[ViewResults, ViewResults]], resampling: Resampling
) -> list[dict[str, Any]]:
    """Return every comparison for the test examples' own languages (`changes` of summary.json).

    Each measure has its interval, `p_value` and `effect_size` as in `change_table`, and
    `p_adjusted` over all comparisons. Comparisons in which no test example has training data in
    its language are left out.
    """
    entries = [
        _names(view, base) | in_language_change(run, paired_difference(view, base), resampling)
        for view, base in comparisons
    ]
    return adjusted_over([entry for entry in entries if "num_test" in entry], MEASURES)


def in_language_change(
    run: RunResults, difference: dict[str, np.ndarray], resampling: Resampling
) -> dict[str, Any]:
    """Return `in_language` of differences, with the sign-flip test of each measure.

    Args:
        run: the run.
        difference: measure -> (Q, G) differences, of `paired_difference`.
        resampling: options of intervals and tests.
    """
    entry = in_language(run, difference, resampling)
    for name in difference.keys() & entry.keys():
        own_Q = own_values(run, difference[name])
        known_Q = np.isfinite(own_Q)
        test = sign_flip_test(
            own_Q[known_Q],
            run.clusters[known_Q],
            permutations=resampling.permutations,
            seed=resampling.seed,
        )
        entry[name] |= {"p_value": float(test.p_value), "effect_size": float(test.effect_size)}
        entry["tested"] = {
            "clusters": test.clusters,
            "permutations": test.permutations,
            "exact": test.exact,
        }
    return entry


def adjusted_over(entries: list[dict[str, Any]], measures: Sequence[str]) -> list[dict[str, Any]]:
    """Add `p_adjusted` to each measure of entries that form one family of tests."""
    for measure in measures:
        adjusted = adjusted_p_values([entry[measure]["p_value"] for entry in entries])
        for entry, p_value in zip(entries, adjusted, strict=True):
            entry[measure]["p_adjusted"] = p_value
    return entries


def paired_difference(view: ViewResults, base: ViewResults) -> dict[str, np.ndarray]:
    """Return the (Q, G) difference of each measure, `view - base` for the same test example."""
    return {name: view.measures[name] - base.measures[name] for name in MEASURES}


def with_names(table: pa.Table, names: dict[str, str]) -> pa.Table:
    """Return the table with constant columns in front.

    Args:
        table: any table.
        names: column -> its value.
    """
    for position, (name, value) in enumerate(names.items()):
        column = pa.array([value] * table.num_rows, pa.string())
        table = table.add_column(position, name, column)
    return table


def _names(view: ViewResults, base: ViewResults) -> dict[str, str]:
    return {
        "model": view.model,
        "view": view.name,
        "base_model": base.model,
        "base_view": base.name,
    }


def _cell_tests(
    run: RunResults, difference: dict[str, np.ndarray], resampling: Resampling
) -> dict[str, list[float | None]]:
    """Return the columns with the tests of every cell, in the order of `interval_table`.

    All measures and training languages of a test language are tested at once, as columns of one
    matrix, so that they share the choices of signs.
    """
    known_Q = known_rows(difference)
    languages_Q = np.array(run.test["language"].to_pylist())
    columns: dict[str, list[float | None]] = {
        f"{name}_{statistic}": []
        for name in difference
        for statistic in ("p_value", "p_adjusted", "effect_size")
    }
    values_QD = np.concatenate(list(difference.values()), axis=1)
    for language in dict.fromkeys(languages_Q[known_Q].tolist()):
        rows_Q = known_Q & (languages_Q == language)
        test = sign_flip_test(
            values_QD[rows_Q],
            run.clusters[rows_Q],
            permutations=resampling.permutations,
            seed=resampling.seed,
        )
        for statistic, array_D in (("p_value", test.p_value), ("effect_size", test.effect_size)):
            for name, part in zip(difference, np.split(array_D, len(difference)), strict=True):
                columns[f"{name}_{statistic}"] += part.tolist()
    for name in difference:
        columns[f"{name}_p_adjusted"] = adjusted_p_values(columns[f"{name}_p_value"])
    return columns
