"""`tracmod attribute`, `query` and `check` on plain files: other columns, no ids or languages."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from own_model import LABELS, TEXTS, save_model

import tracmod as tm
from tracmod.attribution.attribute import read_attribution
from tracmod.cli import main

COLUMNS = "text_a=premise,text_b=hypothesis,label=gold_label"


def _tracmod(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _write(path: Path, rows: int) -> Path:
    lines = ["premise,hypothesis,gold_label"]
    for row in range(rows):
        lines.append(f'"{TEXTS[row % 4]}, {row}",{TEXTS[row % 3]},{LABELS[row % 3]}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, plain files and their attribution, `out`."""
    folder = tmp_path_factory.mktemp("plain")
    save_model(folder / "model", num_hidden_layers=1)
    files = {"--train": _write(folder / "train.csv", 7), "--query": _write(folder / "query.csv", 3)}
    options = {"--model": folder / "model", **files, "--out": folder / "out"}
    options |= {"--projection-dim": 64, "-k": 2, "--columns": COLUMNS}
    result = _tracmod("attribute", *(part for pair in options.items() for part in pair))
    assert result.exit_code == 0, result.output
    (folder / "said").write_text(result.output)
    return folder


def test_ids_are_row_numbers_and_there_is_one_language(folder):
    out = folder / "out"
    examples = pq.read_table(out / "examples.parquet").to_pylist()
    assert [row["test_id"] for row in examples] == ["0", "1", "2"]
    assert [row["test_label"] for row in examples] == [0, 1, 2]
    own = pq.read_table(out / "self_influence.parquet")
    assert own["train_id"].to_pylist() == [str(row) for row in range(7)]
    (pair,) = pq.read_table(out / "languages.parquet").to_pylist()
    assert (pair["test_language"], pair["train_language"]) == ("und", "und")
    assert (pair["share_positive"], pair["num_train"]) == (1.0, 7)
    said = (folder / "said").read_text()
    for name in ("train.csv", "query.csv"):
        assert f"{name}: no column id: ids are the numbers of the rows, from 0" in said
        assert f"{name}: no column language: all examples have the language und" in said


def test_a_query_reads_the_files_as_the_attribution_did(folder):
    record = json.loads((folder / "out" / "run.json").read_text())
    assert record["arguments"]["columns"] == {
        "text_a": "premise", "text_b": "hypothesis", "label": "gold_label"
    }  # fmt: skip
    assert record["arguments"]["language"] is None
    result = _tracmod("query", folder / "out", "the cat", "--text-b", "a dog", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    best = answer["proponents"][0]
    row = int(best["id"])
    assert best["text_a"] == f"{TEXTS[row % 4]}, {row}"
    assert (best["text_b"], best["language"]) == (TEXTS[row % 3], "und")


def test_columns_that_were_renamed_since_are_named_to_a_query(folder):
    files = [folder / "train.csv", folder / "query.csv"]
    before = [path.read_text() for path in files]
    try:
        for path, text in zip(files, before, strict=True):
            path.write_text(text.replace("premise", "first"))
        result = _tracmod("query", folder / "out", "the cat", "--text-b", "a dog")
        assert result.exit_code == 2
        assert "train.csv: expected a column premise, got first" in result.output
        columns = ("--columns", "text_a=first")
        result = _tracmod("query", folder / "out", "the cat", "--text-b", "a dog", *columns)
        assert result.exit_code == 0, result.output
    finally:
        for path, text in zip(files, before, strict=True):
            path.write_text(text)


def test_a_record_without_columns_is_read(folder, tmp_path):
    record = json.loads((folder / "out" / "run.json").read_text())
    for name in ("columns", "language"):
        del record["arguments"][name]
    (tmp_path / "run.json").write_text(json.dumps(record))
    options = read_attribution(tmp_path)
    assert (options.columns, options.language) == ({}, None)


def test_features_of_other_columns_are_not_taken_over(folder):
    files = ("--train", folder / "train.csv", "--query", folder / "query.csv")
    other = ("--columns", "text_a=hypothesis,text_b=,label=gold_label", "--projection-dim", 64)
    result = _tracmod(
        "attribute", "--model", folder / "model", *files, "--out", folder / "out", *other
    )
    assert result.exit_code == 2
    assert "train" in result.output
    with pytest.raises(ValueError, match="run folder"):
        tm.Attributor(folder / "model", columns={"text_a": "premise"})


def test_exact_scores_of_other_columns_are_not_taken_over(folder, tmp_path):
    def run(*options: str) -> Result:
        files = ("--train", folder / "train.csv", "--query", folder / "query.csv")
        out = ("--out", tmp_path / "out", "--exact")
        return _tracmod("attribute", "--model", folder / "model", *files, *out, *options)

    assert run("--columns", COLUMNS).exit_code == 0
    assert run("--columns", COLUMNS).exit_code == 0
    for options in (
        ("--columns", "text_a=premise,text_b=,label=gold_label"),
        ("--columns", COLUMNS, "--language", "en"),
    ):
        result = run(*options)
        assert result.exit_code == 2
        assert "was made with other settings" in result.output


def test_check_reads_other_columns(folder):
    arguments = ("check", "--model", folder / "model", "--data", folder / "query.csv")
    result = _tracmod(*arguments)
    assert result.exit_code == 2
    assert f"--columns {COLUMNS}" in result.output
    result = _tracmod(*arguments, "--columns", COLUMNS)
    assert result.exit_code == 0, result.output
