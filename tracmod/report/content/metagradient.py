"""Figures and tables of the metagradient beside TracIn's shares, from `metagradient/`.

Shape legend: R test languages, C training languages.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.figures import HeatMaps, Matrix
from tracmod.report.content.influence import TEST_AXIS, TRAIN_AXIS
from tracmod.report.content.retraining import scaled
from tracmod.report.wording import labels as words


def metagradient(tables: AnalysisTables) -> Iterator[HeatMaps]:
    """Yield the metagradient, TracIn's shares, and retraining if there is one, for each model."""
    for model, foretold in foretold_matrices(tables).items():
        panels = [_panel("Metagradient: foretold", foretold)]
        path = path_matrix(tables, model)
        on_paths = ""
        if path is not None:
            panels.append(_panel("Metagradient along paths: foretold", path))
            on_paths = "Along paths: the whole change, from derivatives at several weights. "
        shares = shares_matrix(tables, model)
        if shares is not None:
            values_RC = 100 * np.asarray(shares, dtype=float)
            names = list(shares.index), list(shares.columns)
            panels.append(Matrix("TracIn: share of proponents, %", values_RC, *names))
        actual = actual_matrix(tables, model)
        if actual is not None:
            panels.append(_panel("Retrained: actual", actual))
        yield HeatMaps(
            name=f"metagradient-{model}",
            tab=words.MODEL_NAMES[model],
            caption="Metagradient: the first-order change of the test language's mean loss when "
            "the training language is left out. Blue: the loss rises, so the language helps; "
            "orange: it falls. "
            + on_paths
            + "TracIn: how many of the strongest proponents are in the training "
            "language. Each matrix has its own color scale.",
            x_axis=TRAIN_AXIS,
            y_axis=TEST_AXIS,
            panels=panels,
            scale="diverging",
            limits=None,
            digits=(2, 1, 0),
        )


def foretold_matrices(tables: AnalysisTables) -> dict[str, pd.DataFrame]:
    """Return for each model the sums of the metagradient, test languages x training languages."""
    rows = tables.metagradient_languages
    if not len(rows):
        return {}
    return {str(model): _wide(own, "foretold") for model, own in rows.groupby("model", sort=False)}


def path_matrix(tables: AnalysisTables, model: str) -> pd.DataFrame | None:
    """Return the changes without a language by paths of weights; None if there are no paths."""
    rows = tables.metagradient_paths
    rows = rows[rows["model"] == model] if len(rows) else rows
    return _wide(rows, "foretold") if len(rows) else None


def shares_matrix(tables: AnalysisTables, model: str) -> pd.DataFrame | None:
    """Return TracIn's shares among proponents with all heads; None if there are none."""
    rows = tables.table("matrices")
    if len(rows):
        rows = rows[(rows["model"] == model) & (rows["view"] == "full")]
    return _wide(rows, "share_positive") if len(rows) else None


def actual_matrix(tables: AnalysisTables, model: str) -> pd.DataFrame | None:
    """Return the changes of mean loss by retraining without each language; None if not done."""
    rows = tables.retraining_table("leave_one_out")
    if model != "full" or not len(rows):  # retraining is of the full model
        return None
    return _wide(rows[rows["method"] == rows["method"].iloc[0]], "actual")


def _wide(rows: pd.DataFrame, values: str) -> pd.DataFrame:
    wide = rows.pivot(index="test_language", columns="train_language", values=values)
    return wide.loc[rows["test_language"].unique(), rows["train_language"].unique()]


def _panel(title: str, matrix: pd.DataFrame) -> Matrix:
    values_RC = np.asarray(matrix, dtype=float)
    return scaled(title, values_RC, list(matrix.index), list(matrix.columns))
