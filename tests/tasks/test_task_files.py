"""Example files of every format: what is read, and that errors name the malformed row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracmod.config import TaskConfig
from tracmod.tasks import SCHEMA, load_task, read_examples, read_model_examples, read_model_files

ROWS: list[dict[str, Any]] = [
    {"id": "a", "language": "en", "text_a": 'He said "no', "text_b": "x, y", "label": "pos"},
    {"id": "b", "language": "de", "text_a": "Größe", "text_b": "ß", "label": "neg"},
    {"id": "c", "language": "zh", "text_a": "高大的国王。", "text_b": "国王", "label": "pos"},
]
HEADER = "id\tlanguage\ttext_a\tlabel\n"


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    elif kind == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        separator = "\t" if kind == "tsv" else ","
        quote = (lambda text: text) if kind == "tsv" else _quoted
        lines = [list(rows[0]), *([quote(str(value)) for value in row.values()] for row in rows)]
        data = "".join(separator.join(line) + "\r\n" for line in lines).encode("utf-8-sig")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_format_reads_the_same(tmp_path: Path, kind: str, compressed: str) -> None:
    table = read_examples(_write(tmp_path / f"x.{kind}{compressed}", ROWS))
    assert table.schema == SCHEMA
    expected = [{**row, "label": int(row["label"] == "pos"), "group": None} for row in ROWS]
    assert table.to_pylist() == expected


def test_a_line_break_in_a_quoted_csv_field_is_text_and_lines_still_count(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('id,language,text_a,label\na,en,"two\nlines",0\nb,en,,1\n')
    with pytest.raises(ValueError, match=r"x\.csv:4: empty text_a"):
        read_examples(path)
    path.write_text('id,language,text_a,label\na,en,"two\nlines",0\n')
    assert read_examples(path)["text_a"].to_pylist() == ["two\nlines"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\ten\tx\t0\nb\ten\tx\n", r"x\.tsv:3: expected 4 fields .*, got 3"),
        ("a\ten\tx\t0\nb\ten\tx\ty\t0\n", r"x\.tsv:3: expected 4 fields .*, got 5"),
        ("a\ten\tx\t0\n\nb\ten\t \t0\n", r"x\.tsv:4: empty text_a"),
        ("a\ten\tx\t\n", r"x\.tsv:2: no label"),
        ("\ten\tx\t0\n", r"x\.tsv:2: no id"),
        ("a\t\tx\t0\n", r"x\.tsv:2: no language"),
        ("a\ten\tx\t0\na\ten\ty\t1\n", r"x\.tsv:3: id 'a' .*twice"),
        ("", r"x\.tsv: expected examples, got none"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "x.tsv"
    path.write_text(HEADER + lines)
    with pytest.raises(ValueError, match=message):
        read_examples(path)


def test_other_faults_of_files(tmp_path: Path) -> None:
    def fault(name: str, data: bytes, match: str, **options: Any) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=match):
            read_examples(tmp_path / name, **options)

    fault("u.tsv", HEADER.encode() + b"a\ten\t\xff\t0\n", r"u\.tsv:2: not valid UTF-8")
    fault("j.jsonl", b'{"id": 1}\n', r"j\.jsonl: expected a column label, language, text_a")
    fault("k.jsonl", b"\n1\n", r"k\.jsonl:2: expected a JSON object, got int")
    fault("l.jsonl", b"\n{1}\n", r"l\.jsonl:2: not valid JSON")
    fault("c.csv", b'id,label\na,"x\n', r"c\.csv:2: not valid CSV")
    fault("g.tsv.gz", b"no gzip", r"g\.tsv\.gz: cannot be read")
    fault("p.parquet", b"no parquet", r"p\.parquet: not a readable Parquet file")
    fault("x.txt", b"", r"x\.txt: expected a name that ends in")
    fault("d.tsv", b"id\tid\n1\t2\n", r"d\.tsv:1: .*got id twice")
    fault(
        "m.tsv", HEADER.encode() + b"a\ten\tx\t0\n", "columns: .* got body", columns={"body": "x"}
    )
    fault(
        "n.jsonl",
        b'{"id": 1, "language": "en", "text_a": 5, "label": 0}\n',
        r"n\.jsonl:1: text_a is not text: 5",
    )
    with pytest.raises(ValueError, match=r"absent\.tsv: no such file"):
        read_examples(tmp_path / "absent.tsv")


def test_text_b_is_in_every_row_or_in_none(tmp_path: Path) -> None:
    empty = [{**row, "text_b": ""} for row in ROWS]
    assert read_examples(_write(tmp_path / "x.tsv", empty))["text_b"].null_count == 3
    with pytest.raises(ValueError, match=r"x\.tsv:3: empty text_b"):
        read_examples(_write(tmp_path / "x.tsv", [ROWS[0], empty[1], ROWS[2]]))


def test_columns_and_language_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("row\tpremise\tlabel\tsame\n7\tHi\t1\tp\n")
    columns = {"id": "row", "text_a": "premise", "group": "same"}
    (row,) = read_examples(path, columns=columns, language="sw").to_pylist()
    assert row == {
        "id": "7", "language": "sw", "text_a": "Hi", "text_b": None, "label": 1, "group": "p",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([1, 0, 2], ["neg", "neutral", "pos"], [1, 0, 2]),
        (["1", "0", "2"], ["neg", "neutral", "pos"], [1, 0, 2]),
        (["pos", "neg", "neg"], ["neg", "neutral", "pos"], [2, 0, 0]),
        (["5", "1", "2"], ["1", "2", "3", "4", "5"], [4, 0, 1]),
        ([4, 0, 1], ["1", "2", "3", "4", "5"], [4, 0, 1]),
        ([1.0, 0.0, 2.0], ["LABEL_0", "LABEL_1", "LABEL_2"], [1, 0, 2]),
        ([7, 0, 2], ["score"], [7, 0, 2]),
        (["b", "a", "b"], None, [1, 0, 1]),
        ([2, 0, 0], None, [2, 0, 0]),
    ],
)
def test_labels_are_names_or_numbers(
    tmp_path: Path, labels: list[Any], names: list[str] | None, expected: list[int]
) -> None:
    rows = [{**row, "label": label} for row, label in zip(ROWS, labels, strict=True)]
    path = _write(tmp_path / "x.jsonl", rows)
    assert read_examples(path, label_names=names)["label"].to_pylist() == expected


def test_names_that_look_like_numbers_are_read_alike_in_all_files(tmp_path: Path) -> None:
    stars = ["1", "2", "3", "4", "5"]

    def file(name: str, labels: list[Any]) -> Path:
        rows = [{**ROWS[0], "id": str(i), "label": label} for i, label in enumerate(labels)]
        return _write(tmp_path / name, rows)

    def labels_of(*paths: Path) -> list[list[int]]:
        return [table["label"].to_pylist() for table in read_model_files(paths, stars)]

    part = file("part.tsv", ["3", "4"])
    assert labels_of(file("names.tsv", ["1", "5"]), part) == [[0, 4], [2, 3]]
    assert labels_of(file("numbers.tsv", ["0", "4"]), part) == [[0, 4], [3, 4]]
    assert labels_of(file("typed.parquet", [3, 4])) == [[3, 4]]
    with pytest.raises(ValueError, match=r"labels 3, 4 are names .* could also be their numbers"):
        labels_of(part)


@pytest.mark.parametrize("label", ["3", "maybe", "-1"])
def test_an_unknown_label_is_named(tmp_path: Path, label: str) -> None:
    rows = [{**ROWS[0], "label": "1"}, {**ROWS[1], "label": label}]
    path = _write(tmp_path / "x.tsv", rows)
    with pytest.raises(ValueError, match=r"x\.tsv:[23]: unknown label .*expected one of a, b, c"):
        read_model_examples(path, ["a", "b", "c"])


def _nli_file(path: Path, languages: tuple[str, ...], premises: int) -> None:
    """Like a parallel corpus with three hypotheses to a premise."""
    rows = [
        {"row": row, "premise": row // 3, "text_a": f"{language} p{row // 3}",
         "text_b": f"h{row}", "label": "abc"[row % 3], "language": language}
        for language in languages
        for row in range(3 * premises)
    ]  # fmt: skip
    if "{language}" not in path.name:
        rows = [{**row, "row": f"{row['language']}{row['row']}", "n": row["row"]} for row in rows]
        _write(path, rows)
        return
    for language in languages:
        own_rows = [row for row in rows if row["language"] == language]
        _write(Path(str(path).replace("{language}", language)), own_rows)


def _config(**values: Any) -> TaskConfig:
    sizes = {"train_per_language": 50, "dev_per_language": 10, "test_per_language": 11}
    return TaskConfig(**{"name": "files", "languages": ["en", "de"], **sizes, **values})


def test_items_are_parallel_and_premises_stay_together(tmp_path: Path) -> None:
    _nli_file(tmp_path / "{language}.tsv.gz", ("en", "de"), premises=26)
    task = load_task(
        _config(
            train_file=str(tmp_path / "{language}.tsv.gz"),
            columns={"id": "row", "group": "row", "split_group": "premise"},
            parallel=True,
        )
    )
    assert task.label_names == ["a", "b", "c"]
    premises: list[set[str]] = []
    for table, count in ((task.train, 50), (task.dev, 10), (task.test, 11)):
        rows = table.to_pylist()
        english, german = rows[:count], rows[count:]
        assert [row["group"] for row in english] == [row["group"] for row in german]
        assert {row["language"] for row in english} == {"en"}
        assert german[0]["id"] == f"de-{german[0]['group']}"
        premises.append({row["text_a"] for row in english})
    assert not premises[0] & premises[1] | premises[1] & premises[2] | premises[0] & premises[2]


def test_a_group_of_several_items_is_refused_with_advice(tmp_path: Path) -> None:
    _nli_file(tmp_path / "{language}.tsv", ("en", "de"), premises=30)
    columns = {"id": "row", "group": "premise"}
    template = str(tmp_path / "{language}.tsv")
    with pytest.raises(ValueError, match=r"3 rows of group '0' in language 'en'; .*split_group"):
        load_task(_config(train_file=template, columns=columns, parallel=True))
    # Not parallel, the same file is divided by premise.
    task = load_task(_config(train_file=template, columns=columns))
    assert not set(task.train["group"].to_pylist()) & set(task.test["group"].to_pylist())


def test_one_file_of_all_languages_and_a_separate_test_file(tmp_path: Path) -> None:
    _nli_file(tmp_path / "train.csv", ("en", "de", "fr"), premises=22)
    _nli_file(tmp_path / "test.csv", ("en", "de"), premises=5)
    test = (tmp_path / "test.csv").read_text("utf-8-sig").replace(" p", " other p")
    (tmp_path / "test.csv").write_text(test)
    config = _config(
        train_file=str(tmp_path / "train.csv"),
        test_file=str(tmp_path / "test.csv"),
        columns={"id": "row", "group": "n", "split_group": "premise"},
        parallel=True,
    )
    task = load_task(config)
    assert {table.num_rows for table in (task.train, task.dev, task.test)} == {100, 20, 22}
    groups = [set(table["group"].to_pylist()) for table in (task.train, task.dev, task.test)]
    assert not groups[0] & groups[1]
    # Both files number their items from 0: those are different items.
    assert not groups[0] & groups[2]
    assert load_task(config).train.equals(task.train)


def test_a_language_that_is_not_trained_on_needs_no_training_file(tmp_path: Path) -> None:
    _nli_file(tmp_path / "{language}.tsv", ("en", "de"), premises=26)
    for language in ("en", "de"):
        (tmp_path / f"{language}.tsv").rename(tmp_path / f"test.{language}.tsv")
    _nli_file(tmp_path / "{language}.tsv", ("en",), premises=27)
    text = (tmp_path / "en.tsv").read_text("utf-8-sig").replace("en p", "en train p")
    (tmp_path / "en.tsv").write_text(text)
    test_file = str(tmp_path / "test.{language}.tsv")
    files = {"train_file": str(tmp_path / "{language}.tsv"), "dev_file": test_file}
    options = {**files, "test_file": test_file, "columns": {"id": "row", "group": "row"}}
    with pytest.raises(ValueError, match=r"de\.tsv: no such file"):
        load_task(_config(**options, parallel=True))
    task = load_task(_config(**options, parallel=True, train_languages=["en"]))
    assert task.train["language"].to_pylist() == ["en"] * 50
    assert task.dev["language"].to_pylist() == ["en"] * 10 + ["de"] * 10


def test_an_example_in_two_files_is_refused(tmp_path: Path) -> None:
    _nli_file(tmp_path / "train.csv", ("en", "de"), premises=40)
    (tmp_path / "test.csv").write_bytes((tmp_path / "train.csv").read_bytes())
    with pytest.raises(ValueError, match=r"'en0': .* for train, dev and .* for test"):
        load_task(
            _config(
                train_file=str(tmp_path / "train.csv"),
                test_file=str(tmp_path / "test.csv"),
                columns={"id": "row"},
            )
        )


def test_a_single_label_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.tsv", [{**row, "label": "z"} for row in ROWS])
    with pytest.raises(ValueError, match="expected two labels or more, got only z"):
        load_task(_config(train_file=str(path)))
