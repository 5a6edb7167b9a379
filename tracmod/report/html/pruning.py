"""The report's figures of pruning: score while heads are masked, importance, other thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tracmod.files.durable import read_json
from tracmod.report.html.plotly_plots import Figure, Legend, Panel, head_map, lines
from tracmod.report.wording.labels import number

Row = dict[str, Any]


def pruning_panels(subnetworks: Mapping[str, Row]) -> list[Panel]:
    """Course of pruning and head importance of every language; [] where none was kept.

    Args:
        subnetworks: `subnetworks/<language>.json` by language.
    """
    courses = {
        language: entry["course"]
        for language, entry in subnetworks.items()
        if entry.get("course") and entry.get("full_score")
    }
    if not courses:
        return []
    threshold = next(iter(subnetworks.values()))["threshold"]
    course = Panel(
        "Score while pruning",
        [("", [_course_figure(courses, threshold)])],
        note="Share of the full model's score on the development examples that is left, as heads "
        "are masked, least important first. The subnetwork is the last mask before the line is "
        "crossed"
        + (
            ". Of the first of several seeds."
            if len(next(iter(subnetworks.values())).get("seeds", [])) > 1
            else "."
        ),
    )
    return [course, *_importance_panel(courses)]


def _course_figure(courses: Mapping[str, list[Row]], threshold: float) -> Figure:
    series = [
        {
            "name": language,
            "color": f"series-{place % 8}",
            "x": [row["heads"] for row in course],
            "y": [100 * row["score"] / course[0]["score"] for row in course],
        }
        for place, (language, course) in enumerate(courses.items())
    ]
    values = [value for one in series for value in one["y"]]
    limits = (max(0.0, min([*values, 100 * threshold]) - 5), max(values) + 5)
    mark = (100 * threshold, f"threshold {threshold:.0%}")
    axes = ("heads kept", "share of the full score")
    return lines("Score while heads are masked", series, axes=axes, limits=limits, mark=mark)


def _importance_panel(courses: Mapping[str, list[Row]]) -> list[Panel]:
    """Importance with every head kept, a map of layers and heads per language."""
    maps = {
        language: np.array(course[0]["importance"])
        for language, course in courses.items()
        if course[0].get("importance") is not None
    }
    if not maps:
        return []
    highest = max(float(importance_LH.max()) for importance_LH in maps.values())
    limits = (0.0, highest or 1.0)
    figures = [
        head_map(language, one, scale="sequential", limits=limits) for language, one in maps.items()
    ]
    note = (
        "Mean absolute sensitivity of the loss to each head's output, with every head kept; each "
        "layer divided by its norm, so that heads of one layer compare."
    )
    legend = Legend("sequential", "0", number(highest))
    return [Panel("Importance of heads", [("", figures)], legend, note=note)]


def threshold_rows(run_path: Path, subnetworks: Mapping[str, Row]) -> tuple[list[float], list[Row]]:
    """Heads kept at every threshold of a run, main and other.

    Returns:
        The thresholds, lowest first, and a row per language: `language`, and `kept` by threshold;
        ([], []) where there is only the one.
    """
    kept: dict[str, dict[float, int]] = {}
    for language, entry in subnetworks.items():
        kept[language] = {entry["threshold"]: int(np.sum(entry["mask"]))}
        for file in (run_path / "subnetworks" / "thresholds").glob(f"*/{language}.json"):
            other = read_json(file)
            kept[language][other["threshold"]] = int(np.sum(other["mask"]))
    thresholds = sorted({one for by_threshold in kept.values() for one in by_threshold})
    if len(thresholds) < 2:
        return [], []
    return thresholds, [{"language": name, "kept": one} for name, one in kept.items()]
