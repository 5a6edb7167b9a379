"""What each question of the study compares: differences paired per test example, and their tests.

Shape legend: Q all test examples of the run, G training languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tracmod.analysis.languages import MEASURES
from tracmod.analysis.reliance import in_language, interval_table, known_rows, own_values
from tracmod.analysis.results import RunResults, View
from tracmod.analysis.statistics import Resampling, adjusted_p_values, sign_flip_test

# (model, view) against (base model, base view).
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
)


def present_comparisons(views: Sequence[View]) -> list[tuple[View, View]]:
    """The pairs of `COMPARISONS` that the run has both of, for some of the same test examples."""
    found = {(view.model, view.name): view for view in views}
    pairs = [
        (found[a, b], found[c, d]) for a, b, c, d in COMPARISONS if {(a, b), (c, d)} <= set(found)
    ]
    return [pair for pair in pairs if known_rows(paired_difference(*pair)).any()]


def change_table(
    run: RunResults, comparisons: Sequence[tuple[View, View]], resampling: Resampling
) -> pa.Table | None:
    """Every comparison for each test and training language (`changes.parquet`).

    Per measure m beside its interval: m_p_value of a sign-flip test over the language's test
    examples (whole parallel items), m_p_adjusted for all cells of the comparison (false discovery
    rate), m_effect_size (d_z over parallel items).
    """
    tables = []
    for view, base in comparisons:
        difference = paired_difference(view, base)
        table = interval_table(run, difference, resampling)
        for name, values in _cell_tests(run, difference, resampling).items():
            table = table.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
        tables.append(named(table, _names(view, base)))
    return pa.concat_tables(tables) if tables else None


def in_language_changes(
    run: RunResults, comparisons: Sequence[tuple[View, View]], resampling: Resampling
) -> list[dict[str, Any]]:
    """Every comparison for the test examples' own languages (`changes` of summary.json).

    Each measure with its interval and `p_value`, `effect_size` as in `change_table`, `p_adjusted`
    over all comparisons; comparisons without any test example of a training language are left out.
    """
    entries = [
        _names(view, base) | in_language_change(run, paired_difference(view, base), resampling)
        for view, base in comparisons
    ]
    return adjusted_over([entry for entry in entries if "num_test" in entry], MEASURES)


def in_language_change(
    run: RunResults, difference: dict[str, np.ndarray], resampling: Resampling
) -> dict[str, Any]:
    """`in_language` of differences, with the sign-flip test of each measure."""
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
    """Add each measure's `p_adjusted`: the entries are one family of tests."""
    for measure in measures:
        adjusted = adjusted_p_values([entry[measure]["p_value"] for entry in entries])
        for entry, p_value in zip(entries, adjusted, strict=True):
            entry[measure]["p_adjusted"] = p_value
    return entries


def paired_difference(view: View, base: View) -> dict[str, np.ndarray]:
    """(Q, G) of each measure: the same test example seen both ways."""
    return {name: view.measures[name] - base.measures[name] for name in MEASURES}


def named(table: pa.Table, names: dict[str, str]) -> pa.Table:
    """The table with these constant columns first."""
    for position, (name, value) in enumerate(names.items()):
        column = pa.array([value] * table.num_rows, pa.string())
        table = table.add_column(position, name, column)
    return table


def _names(view: View, base: View) -> dict[str, str]:
    return {
        "model": view.model,
        "view": view.name,
        "base_model": base.model,
        "base_view": base.name,
    }


def _cell_tests(
    run: RunResults, difference: dict[str, np.ndarray], resampling: Resampling
) -> dict[str, list[float | None]]:
    """Columns of tests, in the order of `interval_table`'s rows."""
    known_Q = known_rows(difference)
    languages_Q = np.array(run.test["language"].to_pylist())
    columns: dict[str, list[float | None]] = {
        f"{name}_{what}": []
        for name in difference
        for what in ("p_value", "p_adjusted", "effect_size")
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
        for what, array_D in (("p_value", test.p_value), ("effect_size", test.effect_size)):
            for name, part in zip(difference, np.split(array_D, len(difference)), strict=True):
                columns[f"{name}_{what}"] += part.tolist()
    for name in difference:
        columns[f"{name}_p_adjusted"] = adjusted_p_values(columns[f"{name}_p_value"])
    return columns
