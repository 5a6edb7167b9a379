"""`tracmod tables`: every table of a run, with the same numbers in CSV, LaTeX and Markdown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from make_run import LANGUAGES, add_retraining, make_run
from pyarrow import csv

from tracmod.analysis import analyze
from tracmod.cli import main
from tracmod.report.content.result_tables import _format
from tracmod.report.content.tables import Column, Table
from tracmod.report.paper.tables import latex, write_tables

ENDINGS = {"csv": "csv", "latex": "tex", "markdown": "md"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("tables") / "run", num_train=16, num_test=6)
    add_retraining(path)
    analyze(path, bootstrap=50, permutations=50)
    return path


@pytest.fixture(scope="module")
def written(run: Path) -> dict[str, Path]:
    for form in ENDINGS:
        result = CliRunner().invoke(main, ["tables", str(run), "--format", form])
        assert result.exit_code == 0, result.output
        printed = {Path(line) for line in result.output.splitlines()}
        assert printed == {*(run / "tables").glob(f"*.{ENDINGS[form]}")}
    return {path.name: path for path in (run / "tables").iterdir()}


def body(text: str) -> list[list[str]]:
    """Return the header and rows of LaTeX or Markdown as plain text."""
    lines = text.splitlines()
    if "\\begin{tabular}" in text:
        for command, plain in [("$-$", "-"), (r"\_", "_"), (r"\%", "%"), (r"$\times$", "x"),
                               ("$<$", "<")]:  # fmt: skip
            lines = [line.replace(command, plain) for line in lines]
        rows = [line.removesuffix(r" \\") for line in lines if line.endswith(r"\\")]
        return [row.split(" & ") for row in rows]
    rows = [line[2:-2] for line in lines if line.startswith("| ") and "---" not in line]
    return [row.replace("\N{MINUS SIGN}", "-").split(" | ") for row in rows]


def test_every_table_is_written_in_every_format(run, written):
    names = {path.stem for path in (run / "analysis").glob("*.parquet")}
    names |= {"in_language", "in_language_changes", "accuracy", "subnetworks", "strongest",
              "similarity_influence"}  # fmt: skip
    for measure in ("proponents", "opponents", "mean-influence"):
        names |= {f"influence-{measure}-{model}-{view}" for model in ("full", "sparse")
                  for view in ("full", "subnetwork", "random")}  # fmt: skip
        names |= {f"change-{measure}-sparse-full-minus-full-full"}
    names |= {"lds", "removal", "leave_one_out", "leave_one_out_tests", "leave-one-out-actual"}
    names |= {f"leave-one-out-predicted-{method}" for method in ("tracin", "bm25", "random")}
    for ending in ENDINGS.values():
        assert {f"{name}.{ending}" for name in names} <= written.keys()
    stems = {ending: {Path(name).stem for name in written if name.endswith(ending)}
             for ending in ENDINGS.values()}  # fmt: skip
    assert stems["csv"] == stems["tex"] == stems["md"]


def test_csv_has_every_digit(run, written):
    empty_is_none = csv.ConvertOptions(strings_can_be_null=True)
    paths = [*(run / "analysis").glob("*.parquet"), *(run / "retraining").glob("*.parquet")]
    assert len(paths) > 6
    for path in paths:
        expected = pd.read_parquet(path)
        file = written[f"{path.stem}.csv"]
        table = csv.read_csv(file, convert_options=empty_is_none).to_pandas()
        assert list(table.columns) == list(expected.columns)
        pd.testing.assert_frame_equal(table, expected, check_dtype=False, check_exact=True)


def test_a_matrix_in_csv_has_the_numbers_of_the_long_table(run, written):
    file = written["influence-proponents-sparse-subnetwork.csv"]
    matrix = pd.read_csv(file).set_index("test_language")
    rows = pd.read_parquet(run / "analysis" / "matrices.parquet")
    rows = rows[(rows["model"] == "sparse") & (rows["view"] == "subnetwork")]
    assert list(matrix.index) == list(LANGUAGES)
    assert [name for name in matrix.columns if "_" not in name] == list(LANGUAGES)
    for row in rows.to_dict("records"):
        for end in ("", "_low", "_high"):
            value = matrix.loc[row["test_language"], f"{row['train_language']}{end}"]
            assert value == pytest.approx(row[f"share_positive{end}"], rel=1e-12)


@pytest.mark.parametrize("ending", ["tex", "md"])
@pytest.mark.parametrize(
    ("name", "measure", "key"),
    [
        ("influence-proponents-full-subnetwork", "share_positive", ("full", "subnetwork")),
        ("influence-mean-influence-sparse-full", "mean_influence", ("sparse", "full")),
    ],
)
def test_a_matrix_for_reading_has_the_same_numbers(run, written, ending, name, measure, key):
    text = written[f"{name}.{ending}"].read_text(encoding="utf-8")
    header, *rows = body(text)
    assert header == ["test language", *LANGUAGES]
    table = pd.read_parquet(run / "analysis" / "matrices.parquet")
    table = table[(table["model"] == key[0]) & (table["view"] == key[1])]
    cells = {(r["test_language"], r["train_language"]): r for r in table.to_dict("records")}
    factor, rounding = 100.0, 0.0501
    if measure == "mean_influence":
        exponent = re.search("10⁻([⁰¹²³⁴-⁹])", text)[1]
        factor, rounding = 10.0 ** "⁰¹²³⁴⁵⁶⁷⁸⁹".index(exponent), 0.00501
        assert "cosine × learning rate" in text
    for language, *values in rows:
        for other, value in zip(LANGUAGES, values, strict=True):
            numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", value)]
            ends = (measure, f"{measure}_low", f"{measure}_high")
            expected = [factor * cells[language, other][end] for end in ends]
            assert numbers == pytest.approx(expected, abs=rounding)
    assert "in brackets: 95% interval" in text


@pytest.mark.parametrize("ending", ["tex", "md"])
def test_long_tables_for_reading_have_units_and_the_same_numbers(run, written, ending):
    header, *rows = body(written[f"in_language_changes.{ending}"].read_text(encoding="utf-8"))
    summary = json.loads((run / "analysis" / "summary.json").read_text())["changes"]
    assert len(rows) == len(summary)
    column = header.index("share among proponents (percentage points)")
    p_column = header.index("share among proponents p adjusted")
    for cells, entry in zip(rows, summary, strict=True):
        change = entry["share_positive"]
        numbers = [float(text) for text in re.findall(r"[-+]?\d+\.\d+", cells[column])]
        expected = [100 * change[key] for key in ("value", "low", "high")]
        assert numbers == pytest.approx(expected, abs=0.0501)
        assert float(cells[p_column].removeprefix("< ")) == pytest.approx(
            change["p_adjusted"], abs=0.000501
        )
    header, *rows = body(written[f"accuracy.{ending}"].read_text(encoding="utf-8"))
    assert header == ["model", "view", "language", "accuracy (%)"]
    views = json.loads((run / "analysis" / "summary.json").read_text())["accuracy"]["views"]
    first = views[0]["languages"]["de"]
    assert next(row for row in rows if row[2] == "de")[3] == (
        f"{100 * first['value']:.1f} [{100 * first['low']:.1f}, {100 * first['high']:.1f}]"
    )


def test_languages_left_out_are_matrices_of_actual_and_predicted_changes(run, written):
    rows = pd.read_parquet(run / "retraining" / "leave_one_out.parquet")
    for name, method, measure in (("actual", "random", "actual"),
                                  ("predicted-bm25", "bm25", "predicted"),
                                  ("predicted-tracin", "tracin", "predicted")):  # fmt: skip
        matrix = pd.read_csv(written[f"leave-one-out-{name}.csv"]).set_index("test_language")
        assert list(matrix.index) == list(LANGUAGES)
        assert [column for column in matrix.columns if "_" not in column] == list(LANGUAGES)
        for row in rows[rows["method"] == method].to_dict("records"):
            for end in ("", "_low", "_high") if measure == "actual" else ("",):
                value = matrix.loc[row["test_language"], f"{row['train_language']}{end}"]
                assert value == pytest.approx(row[f"{measure}{end}"], rel=1e-12)
    for ending in ("tex", "md"):
        text = written[f"leave-one-out-predicted-tracin.{ending}"].read_text(encoding="utf-8")
        exponent = re.search("10⁻([⁰¹²³⁴-⁹]) *\\)", text)[1]
        factor = 10.0 ** "⁰¹²³⁴⁵⁶⁷⁸⁹".index(exponent)
        of_method = rows[rows["method"] == "tracin"].set_index(["test_language", "train_language"])
        for language, *values in body(text)[1:]:
            expected = [
                factor * of_method.loc[(language, other), "predicted"] for other in LANGUAGES
            ]
            assert [float(value) for value in values] == pytest.approx(expected, abs=0.00501)
        assert "predicted change in mean loss, in the method's own unit (10" in text.lower()


@pytest.mark.parametrize("ending", ["tex", "md"])
def test_tables_of_retraining_for_reading_have_units_and_the_same_numbers(run, written, ending):
    def read(name: str) -> tuple[list[str], list[tuple[list[str], dict]]]:
        header, *rows = body(written[f"{name}.{ending}"].read_text(encoding="utf-8"))
        table = pq.read_table(run / "retraining" / f"{name}.parquet").to_pylist()
        return header, list(zip(rows, table, strict=True))

    def numbers(cell: str) -> list[float]:
        return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", cell)]

    def ends(row: dict, name: str, factor: float = 1.0) -> list[float]:
        return [factor * row[f"{name}{end}"] for end in ("", "_low", "_high")]

    header, rows = read("removal")
    points = header.index("accuracy change (percentage points)")
    assert "accuracy before (%)" in header
    for cells, row in rows:
        assert cells[2] == (row["test_language"] or "-")
        expected = ends(row, "accuracy_change", 100)
        assert numbers(cells[points]) == pytest.approx(expected, abs=0.0501)
        expected = ends(row, "loss_change")
        assert numbers(cells[header.index("loss change")]) == pytest.approx(expected, abs=0.000501)
        assert cells[points].startswith("+" if row["accuracy_change"] > 0 else "-")
    header, rows = read("lds")
    for cells, row in rows:
        expected = [row["value"], row["low"], row["high"]]
        assert numbers(cells[header.index("value")]) == pytest.approx(expected, abs=0.000501)
        over = cells[header.index("over first")]
        assert (over == "-") == (row["method"] == "tracin")
    header, rows = read("leave_one_out")
    column = header.index("predicted change in mean loss, in the method's own unit")
    for cells, row in rows:  # every method has its own unit, so no number of decimals fits all
        assert float(cells[column]) == pytest.approx(row["predicted"], rel=0.00501)


def test_files_of_an_earlier_retraining_are_no_tables_of_a_run_without_one(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    record = json.loads((copy / "run.json").read_text())
    record["config"]["retrain"] = None
    (copy / "run.json").write_text(json.dumps(record))
    names = {path.stem for path in write_tables(copy, tmp_path / "out")}
    assert "accuracy" in names
    assert not [name for name in names if name in ("lds", "removal") or name.startswith("leave")]


def test_latex_is_complete_and_plain(written):
    for name, path in written.items():
        if name.endswith(".tex"):
            text = path.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if not line.startswith("%")]
            assert "\n".join(lines).isascii(), name
            columns = re.search(r"\\begin{tabular}{([lr]+)}", text)[1]
            rows = [line for line in lines if line.endswith(r"\\")]
            assert {len(row.split(" & ")) for row in rows} == {len(columns)}, name
            commands = set(re.findall(r"\\([a-z]+)", "\n".join(lines)))
            assert commands <= {"begin", "end", "toprule", "midrule", "bottomrule", "times"}
            assert text.count("{") == text.count("}")


HOSTILE = r"[a]_b & 100% \x {c} #1 $d ~ ^ <e> | f"
HOSTILE_TABLE = Table(
    "hostile",
    pd.DataFrame({"texts": [HOSTILE, "*"], "numbers": ["[1]", "2"]}),
    [Column("texts", HOSTILE, is_number=False), Column("numbers", "n\N{SUPERSCRIPT MINUS}¹²")],
)


def compiled(folder: Path, files: list[Path]) -> str:
    inputs = "\n".join(rf"\input{{{path}}}\par" for path in files)
    (folder / "all.tex").write_text(
        rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=folder, capture_output=True, text=True, check=False, errors="replace",
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stdout[-2000:]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
def test_latex_compiles_with_booktabs_alone(written, tmp_path):
    hostile = tmp_path / "hostile.tex"
    hostile.write_text(latex(HOSTILE_TABLE), encoding="utf-8")
    files = [path for name, path in sorted(written.items()) if name.endswith(".tex")]
    assert compiled(tmp_path, [*files, hostile]) == ""


def test_hostile_names_do_not_break_a_row():
    rows = [line for line in latex(HOSTILE_TABLE).splitlines() if line.endswith(r"\\")]
    assert rows[1].startswith(r"{}[a]\_b \& 100\% ")
    assert rows[2] == r"{}* & 2 \\"


def test_a_run_without_analysis_and_an_unknown_format_are_errors(run, tmp_path):
    bare = make_run(tmp_path / "run", num_test=1, models=())
    result = CliRunner().invoke(main, ["tables", str(bare)])
    assert result.exit_code == 2
    assert "tracmod analyze" in result.output
    with pytest.raises(ValueError, match="csv, latex, markdown, got html"):
        write_tables(run, tmp_path / "out", "html")


def test_numbers_of_very_different_sizes_in_a_column_are_written_with_own_powers() -> None:
    """Scores with and without learning rates have such errors; one power would make some 0.00."""
    rows = pd.DataFrame({"rmse": [9.19e-7, 4.09e-3], "rmse_low": [8.3e-7, 3.58e-3]})
    write, unit = _format("rmse", rows, False, "")
    assert ([write(value) for value in rows["rmse"]], unit) == (
        ["9.19e\N{MINUS SIGN}07", "0.00409"],
        "",
    )
    alike, unit = _format("rmse", rows.assign(rmse=[2e-3, 4.09e-3]), False, "")
    assert (alike(4.09e-3), unit) == ("4.09", "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT THREE}")
