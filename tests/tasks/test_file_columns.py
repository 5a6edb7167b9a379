"""Plain files: other column names, no ids, no languages, other layouts; suggested mappings."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracmod.tasks import read_examples, read_model_files
from tracmod.tasks.columns import choose_columns, parse_columns

LABELS = ["neg", "pos"]


def _file(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def _read(*paths: Path, **options: Any) -> list[list[dict[str, Any]]]:
    tables = read_model_files(paths, LABELS, **options)
    return [table.drop_columns("group").to_pylist() for table in tables]


def _texts(path: Path, **options: Any) -> list[str]:
    return [row["text_a"] for row in _read(path, **options)[0]]


# Columns, ids and languages


def test_a_file_without_ids_and_languages_has_row_numbers_and_one_language(tmp_path: Path) -> None:
    path = _file(tmp_path / "x.csv", "text_a,label\na cat,pos\n\n\na dog,neg\n")
    notes: list[str] = []
    ((first, second),) = _read(path, notes=notes)
    assert first == {"id": "0", "language": "und", "text_a": "a cat", "text_b": None, "label": 1}
    assert (second["id"], second["language"]) == ("1", "und")
    assert len(notes) == 2
    assert all(str(path) in note for note in notes)
    assert "id" in notes[0]
    assert "language und (--language NAME)" in notes[1]
    notes.clear()
    ((first, _),) = _read(path, language="no", notes=notes)
    assert first["language"] == "no"
    assert len(notes) == 1


def test_ids_stay_when_rows_are_appended(tmp_path: Path) -> None:
    path = _file(tmp_path / "x.csv", "text_a,label\na cat,pos\n")
    (before,) = _read(path)
    with path.open("a") as file:
        file.write("a dog,neg\n")
    assert _read(path)[0][:1] == before


def test_one_mapping_reads_both_files_and_a_file_with_our_own_names(tmp_path: Path) -> None:
    train = _file(tmp_path / "t.csv", "premise,hypothesis,gold\na cat,a pet,pos\n")
    query = _file(tmp_path / "q.tsv", "text_a\ttext_b\tlabel\na dog\ta bird\tneg\n")
    columns = {"text_a": "premise", "text_b": "hypothesis", "label": "gold"}
    ((first,), (second,)) = _read(train, query, columns=columns)
    assert (first["text_a"], first["text_b"], first["label"]) == ("a cat", "a pet", 1)
    assert (second["text_a"], second["text_b"], second["label"]) == ("a dog", "a bird", 0)
    with pytest.raises(ValueError, match=r"t\.csv: expected a column premis, got premise"):
        _read(train, query, columns=columns | {"text_a": "premis"})
    own = [_file(tmp_path / f"{n}.tsv", "text_a\tlabel\na\tpos\n") for n in "ab"]
    with pytest.raises(ValueError, match="expected a column premise"):  # in neither file
        _read(*own, columns={"text_a": "premise"})


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("sentence,label", "text_a=sentence"),
        ("idx,sentence1,sentence2,gold_label,lang",
         "id=idx,language=lang,text_a=sentence1,text_b=sentence2,label=gold_label"),
        ("guid,premise,hypothesis,labels", "id=guid,text_a=premise,text_b=hypothesis,label=labels"),
        ("Review,Label,locale", "language=locale,text_a=Review,label=Label"),
        ("question,passage,label", "text_a=question,text_b=passage"),
        ("text,labels,language", "text_a=text,label=labels"),
        ("text,category_name, gold label ", "text_a=text,label=gold label"),
        ("text_a,label,lang", "language=lang"),
        ("content,stars", "text_a=content,label=stars"),
    ],
)  # fmt: skip
def test_the_mapping_that_a_refusal_suggests_is_accepted(
    tmp_path: Path, header: str, columns: str
) -> None:
    row = ",".join("pos" for _ in header.split(","))
    path = _file(tmp_path / "x.csv", f"{header}\n{row}\n")
    with pytest.raises(ValueError, match=r"x\.csv: expected .*, got ") as caught:
        _read(path)
    suggested = shlex.split(str(caught.value).partition("--columns ")[2])[-1]
    if "NAME" in str(caught.value):  # --language NAME comes first
        suggested = shlex.split(str(caught.value).rpartition("--columns ")[2])[0]
    assert suggested == columns
    assert _texts(path, columns=parse_columns(suggested)) == ["pos"]


def test_a_column_that_matters_is_not_left_out_in_silence(tmp_path: Path) -> None:
    path = _file(tmp_path / "x.csv", "premise,hypothesis,label,lang\na cat,a pet,pos,de\n")
    columns = {"text_a": "premise", "language": "lang"}
    with pytest.raises(ValueError, match=r"expected text_b .*text_b=hypothesis"):
        _read(path, columns=columns)
    assert _read(path, columns=columns | {"text_b": ""})[0][0]["text_b"] is None
    pair = {"text_a": "premise", "text_b": "hypothesis"}
    with pytest.raises(ValueError, match=r"expected a column language.*language=lang"):
        _read(path, columns=pair)
    assert _read(path, columns=pair | {"language": ""})[0][0]["language"] == "und"
    assert _read(path, columns=pair, language="de")[0][0]["language"] == "de"


def test_a_language_is_for_files_without_a_column_of_languages(tmp_path: Path) -> None:
    with_column = _file(tmp_path / "a.csv", "text_a,label,language\na cat,pos,sw\n")
    without = _file(tmp_path / "b.csv", "text_a,label\na dog,neg\n")
    tables = _read(with_column, without, language="en")
    assert [rows[0]["language"] for rows in tables] == ["sw", "en"]
    with pytest.raises(ValueError, match=r"language: expected none, .*'en'"):
        _read(with_column, language="en")


@pytest.mark.parametrize("code", ["no", "nan", "NA", "null", "None", "true", "on"])
def test_codes_of_languages_are_text(tmp_path: Path, code: str) -> None:
    files = [
        _file(tmp_path / "x.csv", f"text_a,label,language\na,pos,{code}\n"),
        _file(tmp_path / "x.tsv", f"text_a\tlabel\tlanguage\na\tpos\t{code}\n"),
        _file(tmp_path / "x.jsonl", json.dumps({"text_a": "a", "label": "pos", "language": code})),
    ]
    assert [rows[0]["language"] for rows in _read(*files)] == [code] * 3


@pytest.mark.parametrize("value", [False, True, ["en"], float("nan")])
def test_languages_of_another_kind_are_refused(tmp_path: Path, value: Any) -> None:
    rows = [{"text_a": "a", "label": "pos", "language": name} for name in ("en", value)]
    path = _file(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"x\.jsonl:2: language is "):
        _read(path)


def test_languages_that_a_schema_numbers_have_their_names(tmp_path: Path) -> None:
    features = {"language": {"_type": "ClassLabel", "names": ["de", "no"]}}
    table = pa.table({"text_a": ["a"], "label": ["pos"], "language": [1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    assert _read(tmp_path / "x.parquet")[0][0]["language"] == "no"


@pytest.mark.parametrize("text", ["null", "NaN", "None", "NA", "", "\u00a0"])
def test_words_for_missing_values_are_texts_and_blanks_are_not(tmp_path: Path, text: str) -> None:
    path = _file(tmp_path / "x.csv", f"text_a,label\nfirst,pos\n{text},neg\n")
    if text.strip():
        assert _texts(path) == ["first", text]
    else:
        with pytest.raises(ValueError, match=r"x\.csv:3: empty text_a"):
            _read(path)


def test_late_columns_of_json_lines(tmp_path: Path) -> None:
    row = {"text_a": "a", "label": "pos"}

    def read(**late: Any) -> list[dict[str, Any]]:
        path = _file(tmp_path / "x.jsonl", "\n".join(map(json.dumps, [row, row | late])))
        return _read(path)[0]

    for name in ("id", "language"):
        with pytest.raises(ValueError, match=rf"x\.jsonl:2: column {name}, which the first row"):
            read(**{name: "x"})
    with pytest.raises(ValueError, match=r"x\.jsonl:1: empty text_b"):
        read(text_b="b")
    with pytest.raises(ValueError, match=r"x\.jsonl: .*language=lang"):
        read(lang="de")
    assert [row["id"] for row in read(notes="anything")] == ["0", "1"]


def test_inputs_of_the_model_in_a_file_are_refused(tmp_path: Path) -> None:
    path = _file(tmp_path / "x.csv", 'text_a,label,position_ids\na,pos,"[0]"\n')
    with pytest.raises(ValueError, match=r"x\.csv: column position_ids: expected none"):
        _read(path, model_inputs={"position_ids", "langs"})
    assert _texts(path, model_inputs={"langs"}) == ["a"]


def test_ids_that_are_alike_as_text_are_refused(tmp_path: Path) -> None:
    rows = [{"text_a": "a", "label": "pos", "id": number} for number in (1, "1")]
    path = _file(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"x\.jsonl:2: id '1' occurs twice"):
        _read(path)
    huge = [row | {"id": 10**30 + number} for number, row in enumerate(rows)]
    path = _file(tmp_path / "y.jsonl", "\n".join(map(json.dumps, huge)))
    assert [row["id"] for row in _read(path)[0]] == [str(10**30), str(10**30 + 1)]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("text_a=premise,text_b=hypothesis", {"text_a": "premise", "text_b": "hypothesis"}),
        ("text_a=a=b, label = gold ", {"text_a": "a=b", "label": "gold"}),
        ("text_a=text, cleaned,id=", {"text_a": "text, cleaned", "id": ""}),
    ],
)
def test_columns_are_parsed(text: str, columns: dict[str, str]) -> None:
    assert parse_columns(text) == columns


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("premise", "'premise'"), ("", "''"), ("text_a=x,text_c=y", "text_c"), ("label=", "label"),
        ("text_a=x,text_a=y", "text_a once"), ("text_a=x,text_b=x", "x for both"),
        ("text_b=text_a", "text_a for both"), ("split_group=x", "split_group"),
    ],
)  # fmt: skip
def test_columns_that_no_file_satisfies_are_refused(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"columns: expected .*{re.escape(named)}"):
        parse_columns(text)


def test_many_columns_are_not_all_listed() -> None:
    with pytest.raises(ValueError, match="and 970 more") as caught:
        choose_columns("x.csv", [f"column {'x' * 500} {n}" for n in range(1000)], {})
    assert len(str(caught.value)) < 3000


# Layouts


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_of_csv_shows_its_delimiter(tmp_path: Path, delimiter: str) -> None:
    rows = ["text_a,label", '"a, b; c | d",pos', "e,neg"]
    lines = "\r\n".join(row.replace(",", delimiter) for row in rows)
    path = _file(tmp_path / "x.csv", "\ufeff" + lines)
    assert _texts(path) == [f"a{delimiter} b; c | d", "e"]


def test_texts_of_tsv_that_are_quoted_as_in_csv_are_unquoted_with_a_word(tmp_path):
    texts = ['"say ""a"""', '"""a"" twice, ""b"""', '"a" only', '"plain"', 'in "" the middle']
    rows = [f"{row}\t{text}\tpos\ten" for row, text in enumerate(texts)]
    path = _file(tmp_path / "x.tsv", "\n".join(["id\ttext_a\tlabel\tlanguage", *rows]) + "\n")
    expected = ['say "a"', '"a" twice, "b"', '"a" only', '"plain"', 'in "" the middle']
    with pytest.warns(UserWarning, match=r"x\.tsv: 2 rows .*line 2"):
        assert read_examples(path)["text_a"].to_pylist() == expected
    notes: list[str] = []
    (table,) = read_model_files([path], ["pos", "neg"], notes=notes)
    assert table["text_a"].to_pylist() == expected
    assert any("line 2" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "text_a,label\na,pos\n", r"x\.tsv:1: expected columns separated by '\\t'"),
        ("x.csv", "text_a:label\na:pos\n", r"x\.csv:1: expected columns separated by ','"),
        ("x.tsv", '"text_a"\t"label"\n"a"\t"pos"\n', r"x\.tsv:1: the columns are quoted"),
        ("x.csv", 'text_a,label\nb,pos\n "a, b" ,pos\n', r"x\.csv:3: "),
        ("x.csv", 'label,text_a\npos, "a"\n', r"x\.csv:2: .*spaces before a quotation mark"),
        ("x.csv", "a cat,pos\na dog,neg\n", r"x\.csv: expected a column text_a, label, got 'a cat"),
        ("x.csv", "text_a,label\na,pos,\n", r"x\.csv:2: expected 2 fields .*, got 3"),
        ("x.csv", "text_a,label,label\na,pos,neg\n", r"x\.csv:1: .*label twice"),
        ("x.csv", "text_a,label\ra,pos\r", r"x\.csv:1: .*carriage return"),
        ("x.csv", "", r"x\.csv: expected examples, got none"),
        ("x.json", '[{"text_a": "a", "label": "pos"},\n\n 5]', r"x\.json:3: .*object, got int"),
        ("x.json", '\n[{"text_a": "a", "label": "pos"}', r"x\.json:2: not valid JSON"),
        ("x.json", '[{"text_a": "a", "label": "pos"},]', r"x\.json:1: not valid JSON"),
        ("x.json", '[{"text_a": "a", "label": "pos"}]\n[]', r"x\.json:2: .*text after the array"),
        ("x.json", "[]", r"x\.json: expected examples, got none"),
        ("x.json", '{\n"text_a": "a"\n}', r"x\.json:1: not valid JSON"),
        ("x.jsonl", '{"text_a": "a", "label": null}', r"x\.jsonl:1: no label"),
        ("x.jsonl", '{"text_a": "a", "label": -1}', r"x\.jsonl:1: .*'-1'.*; -1 is the usual mark"),
        ("x.jsonl", '{"text_a": "a", "label": 1, "id": NaN}', r"x\.jsonl:1: id is not finite"),
    ],
)  # fmt: skip
def test_layouts_that_would_be_misread_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _read(_file(tmp_path / name, content))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.csv.gz"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str, name: str) -> None:
    content = "text_a,label\na,pos\n".encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}:1: expected UTF-8, got"):
        _read(tmp_path / name)


def test_latin_1_is_refused_at_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("text_a,label\na,pos\nüber,neg\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.csv:3: not valid UTF-8"):
        _read(tmp_path / "x.csv")


def test_the_index_of_pandas_and_trailing_commas_are_left_out(tmp_path: Path) -> None:
    path = _file(tmp_path / "x.csv", ",text_a,label,,\n0,a,pos,,\n1,b,neg,x,y\n")
    assert _texts(path) == ["a", "b"]


def test_an_array_of_json_is_read_with_its_lines(tmp_path: Path) -> None:
    rows = [{"text_a": text, "label": "pos"} for text in ("a", "[b]", "c\n,")]
    for name, indent in (("x.json", None), ("y.jsonl", 2), ("z.ndjson", None)):
        path = _file(tmp_path / name, "\ufeff\n" + json.dumps(rows, indent=indent))
        assert _texts(path) == ["a", "[b]", "c\n,"]
    rows[2]["label"] = "maybe"
    path = _file(tmp_path / "x.json", json.dumps(rows, indent=0))
    with pytest.raises(ValueError, match=r"x\.json:10: unknown label 'maybe'"):
        _read(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(ValueError, match=r"x\.csv: expected a file, got a folder"):
        _read(tmp_path / "x.csv")
