"""Writes report/index.html of a run folder: one file, no network."""

from __future__ import annotations

import functools
import json
import shlex
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import plotly.offline
import pyarrow.parquet as pq
import yaml
from markupsafe import Markup

from tracmod.analysis import RunResults, head_usage
from tracmod.files.durable import read_json, write_file
from tracmod.report.html.blocks import block_panels
from tracmod.report.html.explorer import explorer
from tracmod.report.html.packed import packed, packed_json
from tracmod.report.html.planted import planted_section
from tracmod.report.html.plotly_plots import Figure, Panel
from tracmod.report.html.pruning import pruning_panels, threshold_rows
from tracmod.report.html.retraining import retraining_section, signed
from tracmod.report.html.sections import (
    accuracy_figures,
    by_k_panels,
    change_panels,
    course_panels,
    influence_panels,
    reliance_panels,
    scatter_panels,
    similarity_panels,
)
from tracmod.report.wording import labels as words
from tracmod.report.wording.findings import (
    CONTROLS,
    cautions,
    fidelity,
    findings,
    how_sure,
    listed,
    same_group,
    seeds,
    tiles,
)
from tracmod.validation.fidelity import failure

_TABLES = (
    "matrices",
    "changes",
    "shares_by_k",
    "course",
    "similarity",
    "similarity_seeds",
    "pairs",
    "blocks",
    "planted",
)
SAME_TEST_MASK = ("subnetwork-own", "subnetwork-test", "random-own")


def write_report(run_dir: str | Path) -> Path:
    """Make report/index.html from what lies in the run folder.

    Sections whose tables are not there are left out.

    Args:
        run_dir: a run folder that `analyze` has been through.

    Returns:
        Path of the page.

    Raises:
        ValueError: no analysis/summary.json in the folder, or one of an earlier version.
    """
    run = RunResults(run_dir)
    summary_path = run.path / "analysis" / "summary.json"
    if not summary_path.is_file():
        raise ValueError(f"{run.path}: no analysis/summary.json; run `tracmod analyze` first")
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    if "seed_baseline" not in summary:
        raise ValueError(
            f"{summary_path}: of an earlier version of tracmod; run `tracmod analyze` again"
        )
    page = run.path / "report" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_file(page, _render(run, summary).encode())
    return page


def _render(run: RunResults, summary: dict[str, Any]) -> str:
    figures: list[Figure] = []

    def place(figure: Figure) -> int:
        """The figure's number in the page; the same each time that it is asked for."""
        known = [number for number, one in enumerate(figures) if one is figure]
        if not known:
            figures.append(figure)
        return known[0] if known else len(figures) - 1

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals.update(place=place, words=words, signed=signed)
    template = environment.from_string(_file("page.html.j2"))
    body = template.render(_context(run, summary))
    # The figures are numbered while the template is drawn, so their data is added after it.
    title = run.settings.get("config", {}).get("name", "run")
    return framed(title, body, [figure.plot for figure in figures], explorer(run))


def framed(title: str, body: str, figures: list[Any], examples: Markup | None = None) -> str:
    """A whole page, with all it needs in it, from its body.

    Args:
        title: of the window.
        body: HTML; `data-figure="0"` marks the place of the first of the figures.
        figures: Plotly's JSON of each.
        examples: packed data of the examples to be looked through; None: a page without.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_file("frame.html.j2")).render(
        title=title,
        body=Markup(body),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        explorer=Markup(_file("explorer.js")) if examples else "",
        plotly=_plotly(),
        figures=packed_json(figures),
        examples=examples or "",
    )


@functools.cache
def _plotly() -> Markup:
    """Plotly's script: 4.8 MB, packed 1.9 MB."""
    return packed(plotly.offline.get_plotlyjs())


def _context(run: RunResults, summary: dict[str, Any]) -> dict[str, Any]:
    tables = {name: _rows(run, name) for name in _TABLES}
    unit = words.influence_unit(run.section("influence"))
    config = run.settings.get("config", {})
    accuracy, certificates = summary["accuracy"], _certificates(run)
    learning = accuracy_figures(accuracy["epochs"], accuracy["chance"])
    return {
        "run": run,
        "summary": summary,
        "unit": unit,
        "config": config,
        "again": shlex.quote(f"runs/{config.get('name') or 'again'}"),
        "config_yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "findings": findings(summary),
        "certificates": certificates,
        "fidelity": fidelity(certificates) if certificates else "",
        "failures": _failures(certificates),
        "same_group": same_group(summary),
        "seeds": seeds(summary),
        "controls": _controls(summary),
        "left_out": _left_out(summary),
        "tiles": tiles(summary),
        "how_sure": how_sure(summary),
        "cautions": cautions(summary, run.section("task")),
        # Of views that differ in training gradients alone one predicts as the other does.
        "accuracy_views": [one for one in accuracy["views"] if one["view"] not in SAME_TEST_MASK],
        "accuracy_figures": [] if tables["course"] else learning,
        "influence": influence_panels(tables["matrices"], unit),
        "changes": change_panels(tables["changes"], unit) if tables["changes"] else [],
        "reliance": reliance_panels(tables["matrices"], summary["in_language"]),
        "by_k": by_k_panels(tables["shares_by_k"]),
        "course": _course(tables["course"], summary, learning),
        "masks": run.masks,
        "pruning": pruning_panels(run.subnetworks),
        "thresholds": threshold_rows(run.path, run.subnetworks),
        "usage": head_usage(run.masks) if run.masks else np.zeros((0, 0)),
        "similarity": _similarity(tables, list(run.masks)),
        "similarity_rows": tables["similarity"],
        "scatter": _scatter(tables["pairs"], summary, unit),
        "blocks": block_panels(tables["blocks"], unit),
        "planted": planted_section(tables["planted"]),
        "retraining": retraining_section(run),
        "stages": _stages(run.settings.get("stages", {})),
    }


def _certificates(run: RunResults) -> dict[str, dict[str, Any]]:
    file = run.path / "analysis" / "fidelity.json"
    return read_json(file) if file.is_file() else {}


def _failures(certificates: dict[str, dict[str, Any]]) -> list[str]:
    texts = [failure(one, words.MODEL_NAMES[name].lower()) for name, one in certificates.items()]
    return [text for text in texts if text]


def _course(
    rows: list[dict[str, Any]], summary: dict[str, Any], learning: list[Figure]
) -> list[Panel]:
    """Reliance over the epochs, and under its means the learning curves of the same epochs."""
    if not rows:
        return []
    nulls = {round(share, 9) for share in summary["null_share"].values()}
    means, *others = course_panels(rows, nulls.pop() if len(nulls) == 1 else None)
    beside = ("Test accuracy over the same epochs", learning)
    return [replace(means, groups=[*means.groups, beside]), *others]


def _similarity(tables: dict[str, list[dict[str, Any]]], languages: list[str]) -> list[Panel]:
    rows = tables["similarity"]
    return similarity_panels(rows, tables["similarity_seeds"], languages) if rows else []


def _scatter(rows: list[dict[str, Any]], summary: dict[str, Any], unit: str) -> list[Panel]:
    return scatter_panels(rows, summary["similarity_influence"], unit) if rows else []


def _controls(summary: dict[str, Any]) -> str:
    tests = summary["partial_similarity_influence"]
    return listed([CONTROLS[name] for name in tests[0]["controls"]]) if tests else ""


def _left_out(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Metrics of distance that some languages lack, with these."""
    tests = {test["metric"]: test["left_out"] for test in summary["distance_influence"]}
    return [(metric, listed(languages)) for metric, languages in tests.items() if languages]


def _stages(stages: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (name, str(entry.get("state", "")), words.seconds(entry["seconds"]))
        for name, entry in stages.items()
        if name != "report" and entry.get("seconds") is not None  # not done while it is written
    ]


def _rows(run: RunResults, name: str) -> list[dict[str, Any]]:
    path = run.path / "analysis" / f"{name}.parquet"
    return pq.read_table(path).to_pylist() if path.is_file() else []


def _file(name: str) -> str:
    return resources.files("tracmod.report.html").joinpath(name).read_text(encoding="utf-8")
