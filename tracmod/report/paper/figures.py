"""Writes the figures of a run's analysis for papers, one file per figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tracmod.files.durable import write_file
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.blocks import blocks
from tracmod.report.content.figures import Figure
from tracmod.report.content.influence import (
    accuracy,
    changes,
    course,
    influence,
    reliance,
    reliance_by_k,
)
from tracmod.report.content.metagradient import metagradient
from tracmod.report.content.retraining import lds
from tracmod.report.content.subnetworks import (
    pruning,
    similarity,
    similarity_influence,
    subnetworks,
)
from tracmod.report.paper.matplotlib_plots import FORMATS, WIDTHS, Drawing, draw, saved

# What builds the figures, their name in messages, and what is missing if there are none.
_KINDS: list[tuple[Callable[[AnalysisTables], Iterator[Figure]], str, str]] = [
    (influence, "influence by language", "no analysis/matrices.parquet"),
    (changes, "differences", "no analysis/changes.parquet"),
    (reliance, "own-language shares", "no test language with training data of its own"),
    (reliance_by_k, "own-language shares by k", "influence.k is one number"),
    (course, "course over epochs", "no analysis/course.parquet"),
    (accuracy, "accuracy", "no models/*/metrics.json"),
    (subnetworks, "subnetworks", "no subnetworks/*.json"),
    (pruning, "pruning curves", "no course in subnetworks/*.json"),
    (similarity, "similarity of subnetworks", "no analysis/similarity.parquet"),
    (similarity_influence, "similarity against influence", "no analysis/pairs.parquet"),
    (blocks, "influence by head and layer", "no analysis/blocks.parquet; influence.blocks=true"),
    (metagradient, "metagradient", "no metagradient/; `metagradient` in the config"),
    (lds, "linear datamodeling score", "no retraining/lds.parquet; `retrain` in the config"),
]
# Small figures, which are never wider than a column.
_NARROW = ("subnetworks-overlap", "pruning")


@dataclass(frozen=True)
class Written:
    """The result of `write_figures`.

    Attributes:
        files: files that were written, in order.
        left_out: kinds of figures that were not drawn, and what they lack.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def write_figures(
    run_dir: str | Path, out: str | Path, *, form: str = "pdf", width: str = "page"
) -> Written:
    """Draw every figure that the tables of a run allow, a file per figure.

    The same run gives the same bytes. Text is 7 points or larger; fonts are embedded in PDF, and
    text stays text in SVG. Figures have no titles, which their captions would repeat; the names of
    the files say what they show.

    Args:
        run_dir: a run folder that has been analyzed.
        out: folder for the files; created if it does not exist.
        form: `pdf`, `svg` or `png` (300 dots per inch).
        width: `column` (3.3 inches) or `page` (6.9 inches).

    Raises:
        ValueError: `run_dir` has not been analyzed, or `form` or `width` is unknown.
    """
    if form not in FORMATS or width not in WIDTHS:
        raise ValueError(
            f"figures: expected a format of {', '.join(FORMATS)} and a width of "
            f"{', '.join(WIDTHS)}, got {form} and {width}"
        )
    tables = AnalysisTables(run_dir)
    written, out = Written(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for build, kind, missing in _KINDS:
        figures = list(build(tables))
        for figure in figures:
            path = out / f"{figure.name}.{form}"
            write_file(path, saved(_drawn(figure, WIDTHS[width]), form))
            written.files.append(path)
        if not figures:
            written.left_out.append(f"{kind} ({missing})")
    return written


def draw_figures(
    run_dir: str | Path, width: float = WIDTHS["page"]
) -> Iterator[tuple[str, Drawing]]:
    """Draw every figure of a run.

    Args:
        run_dir: a run folder that has been analyzed.
        width: width in inches.

    Yields:
        The name of each figure's file, without ending, and the figure of matplotlib.
    """
    tables = AnalysisTables(run_dir)
    for build, _, _ in _KINDS:
        for figure in build(tables):
            yield figure.name, _drawn(figure, width)


def _drawn(figure: Figure, width: float) -> Drawing:
    return draw(figure, min(width, WIDTHS["column"]) if figure.name in _NARROW else width)
