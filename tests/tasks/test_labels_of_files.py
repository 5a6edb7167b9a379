"""Labels as files have them: accepted with the right class, or refused with file and line."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracmod.config import TaskConfig
from tracmod.tasks import load_task, read_examples, read_model_examples, read_model_files

UNNAMED = ["LABEL_0", "LABEL_1"]


def _rows(labels: list[Any], **values: Any) -> list[dict[str, Any]]:
    common = {"language": "en", "text_a": "a cat"} | values
    return [{"id": str(row), **common, "label": label} for row, label in enumerate(labels)]


def _jsonl(path: Path, labels: list[Any], **values: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows(labels, **values)))
    return path


def _tsv(path: Path, labels: list[Any]) -> Path:
    rows = _rows(labels)
    lines = [list(rows[0]), *(map(str, row.values()) for row in rows)]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


def _parquet(path: Path, labels: Any, names: list[str] | None = None) -> Path:
    """Write a Parquet file, with the names of the label numbers as `datasets` states them."""
    table = pa.Table.from_pylist(_rows([None] * len(labels)))
    table = table.drop_columns("label").append_column("label", labels)
    if names is not None:
        features = {"id": {"_type": "Value"}, "label": {"_type": "ClassLabel", "names": names}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path)
    return path


def _labels(path: Path, names: list[str] | None) -> list[Any]:
    return read_examples(path, label_names=names)["label"].to_pylist()


# Names that the file states


@pytest.mark.parametrize(
    ("stated", "names", "expected"),
    [
        (["pos", "neg"], ["neg", "pos"], [1, 0, 1]),
        (["b", "c", "a"], ["a", "b", "c"], [1, 2, 1]),
        (["pos", "neg"], ["neg", "neutral", "pos"], [2, 0, 2]),
        (["neg", "pos", "never used"], ["pos", "neg"], [1, 0, 1]),
        (["2", "1"], ["1", "2"], [1, 0, 1]),
        (["neg", "pos"], UNNAMED, [0, 1, 0]),
        (["0", "1"], ["neg", "pos"], [0, 1, 0]),
        (["pos", "neg"], None, [0, 1, 0]),
    ],
)
def test_names_in_the_schema_win_over_numbers(
    tmp_path: Path, stated: list[str], names: list[str] | None, expected: list[int]
) -> None:
    path = _parquet(tmp_path / "x.parquet", pa.array([0, 1, 0]), stated)
    assert _labels(path, names) == expected


def test_names_in_the_schema_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "x.parquet", pa.array([0, 1, 0]), ["neg", "positive"])
    with pytest.raises(ValueError, match=r"x\.parquet:2: .*'positive', expected one of neg, pos\b"):
        read_model_examples(path, ["neg", "pos"])
    unknown = _parquet(tmp_path / "y.parquet", pa.array([0, -1]), ["neg", "pos"])
    with pytest.raises(ValueError, match=r"y\.parquet:2: unknown label -1, .*neg, pos"):
        read_model_examples(unknown, ["neg", "pos"])


def test_schemas_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    files = [
        _parquet(tmp_path / f"{number}.parquet", pa.array([0, 1]), names)
        for number, names in enumerate((["neg", "pos"], ["pos", "neg"]))
    ]
    with pytest.raises(ValueError, match=r"1\.parquet: .*neg, pos .*0\.parquet.* got pos, neg"):
        read_model_files(files, UNNAMED)
    named = read_model_files(files, ["neg", "pos"])
    assert [table["label"].to_pylist() for table in named] == [[0, 1], [1, 0]]


def test_a_dictionary_of_arrow_is_read_as_its_names(tmp_path: Path) -> None:
    labels = pa.array(["pos", "neg", "pos"]).dictionary_encode()
    assert _labels(_parquet(tmp_path / "x.parquet", labels), ["neg", "pos"]) == [1, 0, 1]


def test_a_task_of_files_has_the_names_of_the_schema_in_their_order(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "x.parquet", pa.array([0, 1] * 20), ["pos", "neg"])
    task = load_task(
        TaskConfig(
            name="files",
            languages=["en"],
            train_file=str(path),
            train_per_language=20,
            dev_per_language=5,
            test_per_language=5,
        )
    )
    assert task.label_names == ["pos", "neg"]
    assert {int(row["id"]) % 2 == row["label"] for row in task.train.to_pylist()} == {True}


# Names in one file, numbers in another


@pytest.mark.parametrize(
    ("first", "second"),
    [(["0", "1"], ["neg", "pos"]), (["neg", "pos"], ["0", "1"]), ([0, 1], ["neg", "pos"])],
)
def test_numbers_in_one_file_and_names_in_another(
    tmp_path: Path, first: list[Any], second: list[Any]
) -> None:
    write = _jsonl if isinstance(first[0], int) else _tsv
    files = [write(tmp_path / "a.jsonl" if write is _jsonl else tmp_path / "a.tsv", first)]
    files.append(_tsv(tmp_path / "b.tsv", second))
    tables = read_model_files(files, ["neg", "pos"])
    assert [table["label"].to_pylist() for table in tables] == [[0, 1], [0, 1]]


def test_names_and_numbers_mixed_within_a_file(tmp_path: Path) -> None:
    """Text of both kinds is refused; a number of JSON is one whatever stands around it."""
    with pytest.raises(ValueError, match=r"x\.tsv:3: unknown label '1', expected one of neg, pos"):
        read_model_examples(_tsv(tmp_path / "x.tsv", ["neg", "1"]), ["neg", "pos"])
    assert _labels(_jsonl(tmp_path / "x.jsonl", ["neg", 1]), ["neg", "pos"]) == [0, 1]


def test_numbers_beside_names_that_are_other_numbers_are_refused(tmp_path: Path) -> None:
    stars = ["1", "2", "3", "4", "5"]
    files = [_jsonl(tmp_path / "a.jsonl", [3, 4]), _tsv(tmp_path / "b.tsv", ["1", "5"])]
    with pytest.raises(ValueError, match=r"a\.jsonl: labels 1, 3, 4, 5 .* their numbers"):
        read_model_files(files, stars)


# Booleans


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["False", "True"], [1, 0, 1]),
        (["true", "false"], [0, 1, 0]),
        (["unknown", "FALSE", "TRUE"], [2, 1, 2]),
        (UNNAMED, [1, 0, 1]),
        (None, [1, 0, 1]),
    ],
)
def test_booleans_are_accepted(
    tmp_path: Path, names: list[str] | None, expected: list[int]
) -> None:
    labels = [True, False, True]
    assert _labels(_jsonl(tmp_path / "x.jsonl", labels), names) == expected
    assert _labels(_parquet(tmp_path / "x.parquet", pa.array(labels)), names) == expected


@pytest.mark.parametrize("names", [["entailment", "not_entailment"], ["a", "b", "c"], ["score"]])
def test_booleans_that_may_mean_either_class_are_refused(tmp_path: Path, names: list[str]) -> None:
    path = _jsonl(tmp_path / "x.jsonl", [True, False])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: unknown label 'True'"):
        read_model_examples(path, names)


def test_true_and_false_as_text(tmp_path: Path) -> None:
    path = _tsv(tmp_path / "x.tsv", ["true", "FALSE"])
    assert _labels(path, ["False", "True"]) == [1, 0]
    with pytest.raises(ValueError, match=r"x\.tsv:2: unknown label 'true'"):
        read_model_examples(path, UNNAMED)


# Real-valued targets


@pytest.mark.parametrize(
    "labels", [[0.25, -2.75, 3], ["0.25", "-2.75", "3"], [Decimal("0.25"), Decimal("-2.75"), 3]]
)
def test_targets_of_a_model_with_one_output_are_real_numbers(
    tmp_path: Path, labels: list[Any]
) -> None:
    is_decimal = isinstance(labels[0], Decimal)
    path = tmp_path / ("x.parquet" if is_decimal else "x.jsonl")
    _parquet(path, pa.array(labels)) if is_decimal else _jsonl(path, labels)
    table = read_model_examples(path, ["score"])
    assert table.schema.field("label").type == pa.float64()
    assert table["label"].to_pylist() == [0.25, -2.75, 3.0]


@pytest.mark.parametrize(
    "label", ["nan", "inf", "1e39", "1_000", "0,5", "٣", "good", "0x1", "9" * 5000, 10**400]
)
def test_what_is_no_target_is_refused(tmp_path: Path, label: Any) -> None:
    path = _jsonl(tmp_path / "x.jsonl", [0.5, label])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: unknown label .*expected a finite number"):
        read_model_examples(path, ["score"])


# Values that are not finite, not text, or not representable


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"label": float("nan")}, "label is not finite: nan"),
        ({"label": float("-inf")}, "label is not finite: -inf"),
        ({"label": 0.5}, r"unknown label '0\.5'"),
        ({"label": "9" * 5000}, "unknown label '9999"),
        ({"label": 10**30}, "unknown label '1000"),
        ({"label": [1]}, r"label is neither .*\[1\]"),
        ({"label": {"a": 1}}, r"label is neither .*\{'a': 1\}"),
        ({"id": float("nan")}, "id is not finite"),
        ({"language": float("nan")}, "language is not finite"),
        ({"group": float("inf")}, "group is not finite"),
        ({"text_a": float("nan")}, "text_a is not text: nan"),
        ({"text_a": "a \ud83d"}, r"text_a .*U\+D83D"),
        ({"text_b": "\udc00"}, r"text_b .*U\+DC00"),
        ({"id": "\ud83d"}, r"id .*U\+D83D"),
        ({"label": "\ud83d"}, r"label .*U\+D83D"),
        ({"group": "\ud83d"}, r"group .*U\+D83D"),
    ],
)
@pytest.mark.parametrize("names", [["neg", "pos"], ["score"]])
def test_a_value_is_refused_with_file_and_line(
    tmp_path: Path, names: list[str], values: dict[str, Any], fault: str
) -> None:
    if names == ["score"] and values.get("label") in (0.5, 10**30):
        return  # targets
    rows = _rows([0, 1])
    rows[1] |= values
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: {fault}"):
        read_model_examples(path, names)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"id": 1, "label": 0, "label": 1}', "label twice"),
        ("[" * 100_000, "not valid JSON"),
        (f'{{"id": {"9" * 5000}}}', "not valid JSON"),
    ],
)
def test_json_that_python_misreads_is_refused(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*{fault}"):
        read_examples(path)


def test_parquet_that_python_misreads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = pa.array([b"ok", b"\xff"]).view(pa.string())
    table = pa.table({"id": ["1", "2"], "language": ["en", "en"], "text_a": texts, "label": [0, 1]})
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=r"x\.parquet:2: .*utf-8"):
        read_examples(path)
    columns = [pa.array([value]) for value in ("1", "en", "text", 0, 1)]
    names = ["id", "language", "text_a", "label", "label"]
    pq.write_table(pa.Table.from_arrays(columns, names=names), path)
    with pytest.raises(ValueError, match=r"x\.parquet: .*label twice"):
        read_examples(path)
