"""Writes report/index.html of a run folder: one file that needs no network."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from tracmod.files.durable import write_file
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.blocks import block_differences, blocks
from tracmod.report.content.figures import Figure, with_unit
from tracmod.report.content.influence import (
    accuracy,
    changes,
    course,
    influence,
    reliance,
    reliance_by_k,
)
from tracmod.report.content.metagradient import (
    actual_matrix,
    foretold_matrices,
    metagradient,
    shares_matrix,
)
from tracmod.report.content.retraining import leave_one_out, removal
from tracmod.report.content.subnetworks import (
    pruning,
    similarity,
    similarity_influence,
    subnetworks,
)
from tracmod.report.html import tables as page_tables
from tracmod.report.html.explorer import explorer
from tracmod.report.html.packed import packed, packed_json
from tracmod.report.html.plotly_plots import SHOW_NUMBERS_UP_TO, Plot, plotly_script, plots
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
from tracmod.report.wording.metagradient import disagreement, verdicts
from tracmod.report.wording.retraining import METHOD_NAMES, sentences
from tracmod.validation.fidelity import failure
from tracmod.validation.retraining import HALF_OF_SEEDS


def write_report(run_dir: str | Path) -> Path:
    """Write report/index.html from the contents of a run folder.

    Sections whose tables are missing are left out.

    Args:
        run_dir: a run folder that has been analyzed.

    Returns:
        Path of the page.

    Raises:
        ValueError: the folder has no analysis/summary.json, or one of an earlier version.
    """
    tables = AnalysisTables(run_dir)
    if "seed_baseline" not in tables.summary:
        raise ValueError(
            f"{tables.folder / 'summary.json'}: of an earlier version of tracmod; run `tracmod "
            "analyze` again"
        )
    title = tables.run.settings.get("config", {}).get("name", "run")
    content = page("page.html.j2", title, _context(tables), explorer(tables.run))
    path = tables.run.path / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.encode())
    return path


class _NumberedPlots:
    """The plots of a page: each figure is drawn when the page first shows it, and numbered."""

    def __init__(self) -> None:
        self.json: list[dict[str, Any]] = []
        self._of_figure: dict[str, list[tuple[int, Plot]]] = {}

    def __call__(self, figure: Figure) -> list[tuple[int, Plot]]:
        if figure.name not in self._of_figure:
            drawn = list(enumerate(plots(figure), start=len(self.json)))
            self.json += [plot.json for _, plot in drawn]
            self._of_figure[figure.name] = drawn
        return self._of_figure[figure.name]


def page(template: str, title: str, context: dict[str, Any], examples: Markup | None = None) -> str:
    """Return a page with all that it needs: styles, scripts and data.

    Args:
        template: name of the template of the page's body.
        title: title of the window.
        context: variables of the template.
        examples: packed data of the explorer of examples; None if the page has none.
    """
    numbered = _NumberedPlots()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        plots=numbered,
        by_tab=_by_tab,
        with_unit=with_unit,
        most_numbers=SHOW_NUMBERS_UP_TO,
        words=words,
    )
    body = environment.get_template(template).render(context)
    # The plots are numbered while the body is rendered, so their data is added after it.
    return environment.get_template("frame.html.j2").render(
        title=title,
        body=Markup(body),
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        explorer=Markup(_file("explorer.js")) if examples else "",
        plotly=_packed_plotly(),
        figures=packed_json(numbered.json),
        examples=examples or "",
    )


@functools.cache
def _packed_plotly() -> Markup:
    return packed(plotly_script())


def _by_tab(figures: Sequence[Figure]) -> list[tuple[str, list[Figure]]]:
    tabs = dict.fromkeys(figure.tab for figure in figures)
    return [(tab, [figure for figure in figures if figure.tab == tab]) for tab in tabs]


def _file(name: str) -> str:
    return resources.files("tracmod.report.html").joinpath(name).read_text(encoding="utf-8")


def _context(tables: AnalysisTables) -> dict[str, Any]:
    """Return everything that the template of the report shows."""
    run, summary = tables.run, tables.summary
    config = run.settings.get("config", {})
    over_epochs, learning = list(course(tables)), list(accuracy(tables))
    if over_epochs:  # the learning curves are shown below the mean over languages
        heading, tab = "Test accuracy over the same epochs", over_epochs[0].tab
        over_epochs += [replace(figure, tab=tab, heading=heading) for figure in learning]
        learning = []
    failures = [
        failure(certificate, f"the {model} model")
        for model, certificate in tables.certificates.items()
    ]
    partial = summary["partial_similarity_influence"]
    left_out = {test["metric"]: test["left_out"] for test in summary["distance_influence"]}
    return {
        "run": run,
        "summary": summary,
        "unit": tables.unit,
        "config": config,
        "again": shlex.quote(f"runs/{config.get('name') or 'again'}"),
        "config_yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "findings": findings(summary),
        "certificates": page_tables.fidelity_table(tables),
        "fidelity": fidelity(tables.certificates) if tables.certificates else "",
        "failures": [text for text in failures if text],
        "same_group": same_group(summary),
        "seeds": seeds(summary),
        "controls": listed([CONTROLS[name] for name in partial[0]["controls"]]) if partial else "",
        "left_out": [(metric, listed(names)) for metric, names in left_out.items() if names],
        "tiles": tiles(summary),
        "how_sure": how_sure(summary),
        "cautions": cautions(summary, run.section("task")),
        "accuracy": page_tables.accuracy_table(tables),
        "accuracy_figures": learning,
        "influence": list(influence(tables)),
        "changes": list(changes(tables)),
        "changes_table": page_tables.changes_table(tables),
        "reliance": list(reliance(tables)),
        "by_k": list(reliance_by_k(tables)),
        "translations": page_tables.translations_table(tables),
        "course": over_epochs,
        "masks": list(subnetworks(tables)),
        "pruning": list(pruning(tables)),
        "thresholds": page_tables.thresholds_table(tables),
        "heads": page_tables.heads_table(tables),
        "similarity": list(similarity(tables)),
        "similarity_table": page_tables.similarity_table(tables),
        "similarity_influence": list(similarity_influence(tables)),
        "similarity_tests": page_tables.tests_table(tables, "similarity_influence"),
        "partial_tests": page_tables.tests_table(tables, "partial_similarity_influence"),
        "distance_tests": page_tables.tests_table(tables, "distance_influence"),
        "blocks": [*block_differences(tables), *blocks(tables)],
        "blocks_table": page_tables.blocks_table(tables),
        "planted": page_tables.planted_table(tables),
        "metagradient": _metagradient(tables),
        "retraining": _retraining(tables),
        "stages": [
            (name, str(entry.get("state", "")), words.seconds(entry["seconds"]))
            for name, entry in run.settings.get("stages", {}).items()
            # While the report is written, its own stage is not done.
            if name != "report" and entry.get("seconds") is not None
        ],
    }


def _metagradient(tables: AnalysisTables) -> dict[str, Any] | None:
    """Return what the section on the metagradient shows; None if it is not configured."""
    summary = tables.metagradient_summary
    if summary is None:
        return None
    texts = verdicts(summary)
    for model, foretold in foretold_matrices(tables).items():
        shares = shares_matrix(tables, model)
        if shares is not None:
            text = disagreement(model, foretold, shares, actual_matrix(tables, model))
            texts += [text] if text else []
    return {"sentences": texts, "figures": list(metagradient(tables))}


def _retraining(tables: AnalysisTables) -> dict[str, Any] | None:
    """Return what the section on retraining shows; None if the config has no `retrain`."""
    summary = tables.retraining_summary
    if summary is None:
        return None
    lds, removals = (
        table.astype(object).where(table.notna(), None).to_dict("records")
        for table in map(tables.retraining_table, ("lds", "removal"))
    )
    return {
        "summary": summary,
        "half_of_seeds": METHOD_NAMES[HALF_OF_SEEDS],
        "sentences": sentences(summary, lds, removals),
        "overview": page_tables.retraining_overview(tables),
        "by_example": page_tables.lds_by_language(tables, "example"),
        "by_language": page_tables.lds_by_language(tables, "language"),
        "figures": [*leave_one_out(tables), *removal(tables)],
    }
