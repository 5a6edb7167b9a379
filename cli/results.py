"""Commands that write the results of a run for a paper: figures and tables."""

from __future__ import annotations

from pathlib import Path

import click

from tracmod.choices import FigureFormat, FigureWidth, TableFormat
from tracmod.cli.options import EXISTING, FOLDER, choice


@click.command()
@click.argument("run_dir", metavar="RUN", type=EXISTING)
@click.option(
    "--format",
    "form",
    type=choice(FigureFormat),
    default="pdf",
    show_default=True,
    help="pdf with embedded fonts, svg with text as text, or png with 300 dots per inch.",
)
@click.option(
    "--width",
    type=choice(FigureWidth),
    default="page",
    show_default=True,
    help="Width of a column (3.3 inches) or of a page (6.9 inches). Text has at least 7 points.",
)
@click.option("--out", type=FOLDER, help="Folder for the files. Default: RUN/figures.")
def figures(run_dir: Path, form: str, width: str, out: Path | None) -> None:
    """Draw the results of a run for a paper.

    There is one file per figure. The figures are: influence between languages under every view and
    its changes, reliance on the own language, its course over the epochs, accuracy, subnetworks,
    pruning, similarity against influence, and influence by head and layer. Figures whose tables the
    analysis did not write are left out and named. Figures have no titles, because captions take
    their place; the names of the files say what they show.

    \b
    Examples:
      tracmod figures runs/demo
      tracmod figures runs/demo --format svg --width column --out paper/figures
    """
    from tracmod.report.paper.figures import write_figures

    written = write_figures(run_dir, out or run_dir / "figures", form=form, width=width)
    for path in written.files:
        click.echo(path)
    for text in written.left_out:
        click.echo(f"tracmod: left out: {text}", err=True)


@click.command()
@click.argument("run_dir", metavar="RUN", type=EXISTING)
@click.option(
    "--format",
    "form",
    type=choice(TableFormat),
    default="csv",
    show_default=True,
    help="csv with all digits; latex (booktabs) or markdown, rounded for reading, with intervals.",
)
@click.option("--out", type=FOLDER, help="Folder for the files. Default: RUN/tables.")
def tables(run_dir: Path, form: str, out: Path | None) -> None:
    """Write the results of a run as CSV, LaTeX or Markdown.

    The tables are those of analysis/ and retraining/, the summary of the analysis, and the language
    x language matrices. The rows of a matrix are the languages of test examples, its columns the
    languages of training examples.

    \b
    Examples:
      tracmod tables runs/demo
      tracmod tables runs/demo --format latex --out paper/tables
    """
    from tracmod.report.paper.tables import write_tables

    for path in write_tables(run_dir, out or run_dir / "tables", form):
        click.echo(path)


COMMANDS = [figures, tables]
