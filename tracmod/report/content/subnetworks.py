"""Figures of subnetworks: masks, pruning, similarity, and similarity compared with influence.

Shape legend: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from tracmod.analysis import head_usage
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.figures import (
    Chart,
    HeatMaps,
    LineCharts,
    Mark,
    Matrix,
    Points,
    ScatterPlots,
    Series,
    series_color,
)
from tracmod.report.content.influence import measure_axis
from tracmod.report.wording import labels as words

# Measure of similarity -> its name, and how to read it.
_SIMILARITIES = {
    "jaccard": ("Jaccard", "Heads kept by both, over heads kept by either. 1: the same heads."),
    "corrected_jaccard": (
        "Jaccard beyond chance",
        "0: as similar as random masks of the same sizes; below 0: less similar. 1: the same "
        "heads.",
    ),
    "overlap": (
        "overlap coefficient",
        "Heads kept by both, over the heads of the smaller subnetwork. 1: one contains the other.",
    ),
    "cosine": ("cosine", "Heads kept by both, over the geometric mean of the two sizes."),
}


def subnetworks(tables: AnalysisTables) -> Iterator[HeatMaps]:
    """Yield which heads each language's subnetwork keeps, and how many languages keep each head."""
    masks = tables.run.masks
    if not masks:
        return
    panels = []
    for language, mask_LH in masks.items():
        entry = tables.run.subnetworks[language]
        score, full_score = entry.get("score"), entry.get("full_score")
        scores = f"score {words.percent(score)}, all heads {words.percent(full_score)}"
        caption = "" if None in (score, full_score) else scores
        title = f"{language}: {int(mask_LH.sum())} of {mask_LH.size}"
        panels.append(head_matrix(title, mask_LH, caption))
    yield HeatMaps(
        name="subnetworks",
        x_axis="head",
        y_axis="layer",
        panels=panels,
        scale="mask",
        limits=(0, 1),
        digits=(),
    )
    yield HeatMaps(
        name="subnetworks-overlap",
        heading="All languages",
        x_axis="head",
        y_axis="layer",
        panels=[head_matrix("", head_usage(masks), "number of languages that keep the head")],
        color_axis="languages that keep the head",
        scale="sequential",
        limits=(0, len(masks)),
        digits=(0,),
    )


def pruning(tables: AnalysisTables) -> Iterator[LineCharts | HeatMaps]:
    """Yield the score that is left while heads are masked, and the importance of the heads."""
    entries = tables.run.subnetworks
    courses = {language: entry["course"] for language, entry in entries.items()
               if entry.get("course") and entry.get("full_score")}  # fmt: skip
    if not courses:
        return
    first = next(iter(entries.values()))
    threshold = first["threshold"]
    several = " The figure shows the first seed." if len(first.get("seeds", [])) > 1 else ""
    yield LineCharts(
        name="pruning",
        tab="Score while pruning",
        caption="Score on the development examples, relative to the full model, while heads are "
        "masked from the least important on. The subnetwork is the last mask above the "
        f"threshold of {threshold:.0%}.{several}",
        x_axis="heads kept",
        y_axis="share of the full score",
        unit="%",
        panels=[
            Chart("", [
                Series(language, series_color(position), [step["heads"] for step in steps],
                       [100 * step["score"] / steps[0]["score"] for step in steps])
                for position, (language, steps) in enumerate(courses.items())
            ])
        ],
        mark=Mark(100 * threshold, "threshold"),
    )  # fmt: skip
    maps = {language: np.array(steps[0]["importance"]) for language, steps in courses.items()
            if steps[0].get("importance") is not None}  # fmt: skip
    if maps:
        highest = max(float(importance_LH.max()) for importance_LH in maps.values())
        yield HeatMaps(
            name="head-importance",
            tab="Importance of heads",
            caption="Mean absolute sensitivity of the loss to each head's output, with all heads "
            "kept. Each layer is divided by its norm, so that heads of one layer can be compared.",
            x_axis="head",
            y_axis="layer",
            panels=[head_matrix(*one) for one in maps.items()],
            color_axis="importance, each layer of norm 1",
            scale="sequential",
            limits=(0.0, highest or 1.0),
            digits=(),
        )


def head_matrix(title: str, values_LH: np.ndarray, caption: str = "") -> Matrix:
    """Return a matrix of a value per head: layers from 0 downwards, heads from 0 across."""
    layers, heads = (list(map(str, range(size))) for size in values_LH.shape)
    return Matrix(title, values_LH.astype(float), layers, heads, caption=caption)


def similarity(tables: AnalysisTables) -> Iterator[HeatMaps]:
    """Yield the similarity of two languages' subnetworks; on the diagonal, of two seeds of one."""
    pairs, seeds = tables.table("similarity"), tables.table("similarity_seeds")
    if not len(pairs):
        return
    languages = list(tables.run.masks)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in pairs.to_dict("records"):
        rows[row["language_a"], row["language_b"]] = row
        rows[row["language_b"], row["language_a"]] = row
    for row in seeds.to_dict("records"):
        if row["language_a"] == row["language_b"]:
            rows[row["language_a"], row["language_a"]] = row
    panels = [
        Matrix(
            name,
            np.array([[rows[a, b][measure] if (a, b) in rows else np.nan for b in languages]
                      for a in languages], dtype=float),
            languages,
            languages,
            notes=[[_similarity_notes(rows.get((a, b))) for b in languages] for a in languages],
            caption=caption,
        )
        for measure, (name, caption) in _SIMILARITIES.items()
    ]  # fmt: skip
    negative = min(float(np.nanmin(panel.values_RC)) for panel in panels) < 0
    yield HeatMaps(
        name="similarity",
        x_axis="language",
        y_axis="language",
        panels=panels,
        color_axis="similarity of subnetworks",
        scale="diverging" if negative else "sequential",
        limits=(-1.0 if negative else 0.0, 1.0),
        digits=(2,),
    )


def _similarity_notes(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return []
    chance = f"Jaccard by chance {words.number(row['expected_jaccard'])}"
    if "mask_pairs" in row:
        return [f"mean over {row['mask_pairs']} pairs of seeds", chance]
    return [f"{row['shared_heads']} shared heads of {row['heads_a']} and {row['heads_b']}", chance]


def similarity_influence(tables: AnalysisTables) -> Iterator[ScatterPlots]:
    """Yield influence between languages against similarity of their subnetworks, with a test."""
    pairs = tables.table("pairs")
    tests = {(test["model"], test["view"], test["measure"]): test
             for test in tables.summary["similarity_influence"]}  # fmt: skip
    for measure in ("share_positive", "mean_influence") if len(pairs) else ():
        factor, axis, unit = measure_axis(tables, pairs, measure)
        for model, of_model in pairs.groupby("model", sort=False):
            yield ScatterPlots(
                name=f"similarity-{words.measure_id(measure)}-{model}",
                tab=words.MEASURE_NAMES[measure],
                heading=words.MODEL_NAMES[str(model)],
                caption="One point per pair of languages: the influence of each language's "
                "training examples on the other's test examples (mean of both directions), against "
                "the similarity of the two subnetworks. ρ: Spearman correlation.",
                x_axis="Jaccard similarity of subnetworks",
                y_axis=axis,
                unit=unit,
                panels=[_points(str(view), rows, measure, factor, tests.get((model, view, measure)))
                        for view, rows in of_model.groupby("view", sort=False)],
            )  # fmt: skip


def _points(
    view: str, rows: pd.DataFrame, measure: str, factor: float, test: Mapping[str, Any] | None
) -> Points:
    caption = "no test"
    if test is not None and test["p_value"] is not None:
        p_text = words.p_value(test["p_value"])
        caption = f"ρ = {words.number(test['correlation'])}, Mantel {p_text}"
    languages = zip(rows["language_a"], rows["language_b"], strict=True)
    return Points(
        words.VIEW_NAMES[view],
        list(rows["jaccard"]),
        list(factor * rows[measure]),
        [f"{a}\N{EN DASH}{b}" for a, b in languages],
        caption,
    )
