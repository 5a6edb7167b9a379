"""Example files as people have them, made at random, with the rows that are meant by each.

`make_case(seed, folder)` writes a training and a query file and says with which options they are
read, whether they must be accepted or refused, and what is in them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LABELS = ("no", "maybe", "yes")
TEXTS = (
    "the cat sleeps", "a dog runs home", "der Hund schläft", "die Katze, die rennt", "猫が寝る",
    'she said "hi"', '"quoted"', '"a" and "b"', "semi; colon", "pipe | bar", " leads", "trails ",
    "NaN", "null", "None", "NA", "true", "0", "1.5", "=SUM(A1)", "back\\slash", "\ufeffmark",
    "line\u2028separator", "next\u0085line", "e\u0301", "👩‍👩‍👧", "שלום", "𝒳", "it's", "{}", "[1]",
    "long " * 60, "x", "a, \"b\", c", "tab\there", "new\nline", "windows\r\nline", "bare\rreturn",
    'he: ""so""', '"',
)  # fmt: skip
LANGUAGES = ("en", "de", "no", "nan", "NA", "null", "None", "zh-Hans", "true", "1", "日本語")
# Names that are mapped, and names that public data sets have.
OWN_NAMES = ("premise", "Spalte 1", "текст", "a=b", "x,y", "it's", "UPPER", "col.1")
COMMON = {
    "text_a": ("text", "sentence", "sentence1", "premise", "review", "content", "Text"),
    "label": ("labels", "gold_label", "LABEL", "target"),
    "language": ("lang", "locale", "Language"),
    "id": ("idx", "guid", "ID"),
}
SECOND = {"sentence1": "sentence2", "premise": "hypothesis"}


@dataclass
class MadeFile:
    """One file: its rows as they are written, and as they are meant.

    Attributes:
        path: the file.
        rows: written values by column name, in the order of the columns.
        meant: id, language, text_a, text_b and label (a number) of each row.
    """

    path: Path
    rows: list[dict[str, Any]]
    meant: list[dict[str, Any]]


@dataclass
class Case:
    """Two files, the options that they are read with, and the expectation.

    Attributes:
        train, query: the files.
        options: arguments of `tracmod attribute` beside the files and the model.
        outcome: "accept", "refuse" or "either".
        names: texts that the message of a refusal must have.
        story: what is special about the case, for the message of a failing test.
        label_column: the column of labels in the files.
        kind: the format of both.
    """

    train: MadeFile
    query: MadeFile
    options: list[str] = field(default_factory=list)
    outcome: str = "accept"
    names: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    label_column: str = "label"
    kind: str = "tsv"

    def expect(self, outcome: str, *names: str) -> None:
        """Narrow what may happen: a refusal stays one, and of two reasons either may be named."""
        if self.outcome == "any":
            return
        if self.outcome == "refuse":
            self.names = []
        else:
            self.outcome, self.names = outcome, list(names)


def make_case(seed: int, folder: Path) -> Case:
    """Write the two files of a case."""
    draw = random.Random(seed)
    kind = draw.choice(("csv", "csv", "tsv", "jsonl", "json", "parquet"))
    ending = draw.choice(
        {"csv": ("csv",), "tsv": ("tsv",), "parquet": ("parquet",), "json": ("json", "jsonl"),
         "jsonl": ("jsonl", "json", "ndjson")}[kind]
    )  # fmt: skip
    if draw.random() < 0.1:
        ending = ending.upper()
    zipped = ".gz" if draw.random() < 0.2 else ""
    has = {
        name: draw.random() < share
        for name, share in (("id", 0.6), ("language", 0.6), ("text_b", 0.3))
    }
    columns = {name: name for name in ("id", "language", "text_a", "text_b", "label")}
    style = draw.choice(("own", "own", "mapped", "common"))
    options: list[str] = []
    if style == "mapped":
        names = draw.sample(OWN_NAMES, len(OWN_NAMES))
        for name in columns:
            if draw.random() < 0.6 and (has.get(name, True)):
                columns[name] = names.pop()
    elif style == "common":
        for name, likely in COMMON.items():
            if draw.random() < 0.7:
                columns[name] = draw.choice(likely)
        columns["text_b"] = SECOND.get(columns["text_a"], "text_b")
        if len(set(columns.values())) < len(columns):
            columns |= {"label": "gold"}
    renamed = {
        name: column for name, column in columns.items() if column != name and has.get(name, True)
    }
    files = [
        _make_rows(draw, folder / f"{name}.{ending}{zipped}", kind, columns, has)
        for name in ("train", "query")
    ]
    case = Case(files[0], files[1], options, kind=kind, story=[f"seed {seed}", kind, style])
    _map_columns(draw, case, renamed)
    if not has["language"]:
        _name_language(draw, case)
    damage = draw.choice(DAMAGES) if draw.random() < 0.45 else None
    if damage is not None:
        case.story.append(damage.__name__.strip("_"))
        damage(draw, case, columns)
    layout = _layout(draw, kind)
    case.story.append(str(layout))
    case.label_column = columns["label"]
    for file in files:
        content = _content(kind, file.rows, layout, case)
        if draw.random() < 0.04:
            content = _mutated(draw, content, case)
        file.path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    if zipped and draw.random() < 0.1:
        case.story.append("cut gzip")
        case.train.path.write_bytes(case.train.path.read_bytes()[:-9])
        case.expect("refuse", "train")
    if draw.random() < 0.15:
        _odd_option(draw, case)
    return case


# --- rows ---------------------------------------------------------------------------------------


def _make_rows(
    draw: random.Random, path: Path, kind: str, columns: dict[str, str], has: dict[str, bool]
) -> MadeFile:
    """Make a few rows with labels of one kind."""
    typed = kind in ("jsonl", "json", "parquet")
    label_kind = draw.choice(("names", "numbers", "floats") if typed else ("names", "numbers"))
    id_kind = draw.choice(("numbers", "names", "zeros", "mixed" if kind != "parquet" else "names"))
    texts = TEXTS
    if kind == "tsv":  # has no field with a line end, and unquotes what a CSV writer quoted
        texts = [
            text for text in TEXTS if not set(text) & set("\t\n\r") and not _looks_quoted(text)
        ]
    rows, meant = [], []
    order = list(columns)
    draw.shuffle(order)
    extra = draw.random() < 0.3
    for number in range(draw.randint(1, 5)):
        label = draw.randrange(len(LABELS))
        written_id = {
            "numbers": number + 5,
            "names": f"row-{number}",
            "zeros": f"00{number}",
            "mixed": number if number % 2 else f"{number}",
        }[id_kind]
        language = draw.choice(LANGUAGES)
        truth = {
            "id": str(written_id) if has["id"] else str(number),
            "language": language if has["language"] else "und",
            "text_a": draw.choice(texts),
            "text_b": draw.choice(texts) if has["text_b"] else None,
            "label": label,
        }
        written_label = {"names": LABELS[label], "numbers": label, "floats": float(label)}
        values = {
            "id": written_id,
            "language": f" {language}" if draw.random() < 0.1 else language,
            "text_a": truth["text_a"],
            "text_b": truth["text_b"],
            "label": written_label[label_kind],
        }
        row = {columns[name]: values[name] for name in order if has.get(name, True)}
        rows.append(row | ({"extra": draw.choice((None, 1.5, "x"))} if extra else {}))
        meant.append(truth)
    if extra:  # one type per column, as Parquet wants it
        for row in rows:
            row["extra"] = "x"
    return MadeFile(path, rows, meant)


def _map_columns(draw: random.Random, case: Case, renamed: dict[str, str]) -> None:
    """Map the renamed columns, or leave that out: a refusal that suggests it."""
    if not renamed:
        return
    suggested = {"text_a": ("text", "sentence", "sentence1", "premise", "review", "content")}
    mapped = draw.random() < 0.75
    if mapped:
        pairs = [f"{name}={column}" for name, column in renamed.items()]
        if draw.random() < 0.3:
            for pair in pairs:
                case.options += ["--columns", pair]
        else:
            case.options += ["--columns", ",".join(pairs)]
        return
    case.story.append("not mapped")
    if {"text_a", "label"} & set(renamed):
        case.expect("refuse", "train", "--columns")
        if renamed.get("text_a", "").casefold() in suggested["text_a"]:
            case.names.append("text_a=")
    elif renamed.get("language") in COMMON["language"]:
        case.expect("refuse", "train", f"language={renamed['language']}")
    else:  # a column that nobody could know is left out: ids, languages or second texts
        for file in (case.train, case.query):
            for number, row in enumerate(file.meant):
                row |= {"id": str(number)} if "id" in renamed else {}
                row |= {"language": "und"} if "language" in renamed else {}
                row |= {"text_b": None} if "text_b" in renamed else {}


def _name_language(draw: random.Random, case: Case) -> None:
    """Name the language of files without such a column."""
    if draw.random() < 0.5:
        name = draw.choice(("sw", "no", "nan", "NA", "zh Hant"))
        case.options += ["--language", name]
        for file in (case.train, case.query):
            for row in file.meant:
                row["language"] = name


# --- what goes wrong in rows --------------------------------------------------------------------


def _damage_row(value: Callable[[random.Random], Any], column: str, only: str = "") -> Any:
    """Return a function that puts a value into a column of the last row of one file.

    Args:
        value: draws the value.
        column: our name of the column.
        only: the formats that can have such a value; all by default.
    """

    def damage(draw: random.Random, case: Case, columns: dict[str, str]) -> None:
        file = draw.choice((case.train, case.query))
        name = columns[column]
        fits = case.kind in only.split() or not only
        if fits and name in file.rows[0] and "not mapped" not in case.story:
            file.rows[-1][name] = value(draw)
            line = f":{len(file.rows)}:" if case.kind == "jsonl" else ":"
            case.expect("refuse", f"{file.path.name}{line}")

    damage.__name__ = f"bad_{column}"
    return damage


def _late_id(draw: random.Random, case: Case, columns: dict[str, str]) -> None:
    """Give only the last row of JSON an id, or a language."""
    name = draw.choice(("id", "language"))
    if case.kind in ("json", "jsonl") and len(case.train.rows) > 1:
        for row in case.train.rows:
            row.pop(columns[name], None)
        case.train.rows[-1] |= {columns[name]: "late"}
        # An id under another name that is not mapped is left out, as in other files.
        mapped = any(f"id={columns['id']}" in option for option in case.options)
        known = name == "language" or columns[name] == name or mapped
        case.expect("refuse" if known and columns[name] not in OWN_NAMES else "any")


def _same_ids(draw: random.Random, case: Case, columns: dict[str, str]) -> None:
    file = case.train
    if (
        columns["id"] in file.rows[0]
        and len(file.rows) > 1
        and not (columns["id"] != "id" and "not mapped" in case.story)
    ):
        number = file.rows[0][columns["id"]]
        file.rows[1][columns["id"]] = number
        case.expect("refuse", "train", "twice")


def _no_rows(draw: random.Random, case: Case, columns: dict[str, str]) -> None:
    case.query.rows.clear()
    case.expect("refuse", "query")


def _no_texts(draw: random.Random, case: Case, columns: dict[str, str]) -> None:
    for file in (case.train, case.query):
        for row in file.rows:
            row.pop(columns["text_a"])
    case.expect("refuse", "train")


def _model_input(draw: random.Random, case: Case, columns: dict[str, str]) -> None:
    name = draw.choice(("position_ids", "inputs_embeds"))
    for row in case.train.rows:
        row[name] = "[0, 1]"
    case.expect("refuse", "train", name)


DAMAGES: list[Any] = [
    _damage_row(lambda draw: draw.choice(("", " ", "\u00a0", None)), "text_a"),
    _damage_row(lambda draw: draw.choice(("", None, "perhaps", "-1", "-100", "3", "1e9")), "label"),
    _damage_row(lambda draw: draw.choice(("9" * 30, "²", "0.5", "NaN")), "label"),
    _damage_row(lambda draw: draw.choice(("", None)), "language"),
    _damage_row(lambda draw: draw.choice(("", None, "  ")), "id"),
    _damage_row(
        lambda draw: draw.choice((True, False, [0], {"a": 1}, 0.5, 7, -1, 10**40)),
        "label",
        "json jsonl",
    ),
    _damage_row(lambda draw: float("nan"), "label", "json jsonl"),
    _damage_row(
        lambda draw: draw.choice((True, False, ["en"], float("inf"))), "language", "json jsonl"
    ),
    _damage_row(
        lambda draw: draw.choice((5, True, ["a"], {"en": "a"}, float("nan"))),
        "text_a",
        "json jsonl",
    ),
    _damage_row(lambda draw: "half \ud83d pair", "text_a", "jsonl json"),
    _damage_row(lambda draw: draw.choice(([1], {}, float("nan"))), "id", "json jsonl"),
    _late_id,
    _same_ids,
    _no_rows,
    _no_texts,
    _model_input,
]


# --- files --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How rows are written, beside their format."""

    encoding: str = "utf-8"
    newline: str = "\n"
    delimiter: str = ","
    quote_all: bool = False
    blank_lines: bool = False
    index: str | None = None  # the name of a column with row numbers, as pandas writes it
    header: str = "plain"  # or missing, twice, trailing
    ascii: bool = False
    indent: int | None = None
    parquet: str = "plain"  # or dictionary, stated


def _layout(draw: random.Random, kind: str) -> Layout:
    encoding = draw.choice(("utf-8",) * 20 + ("utf-8-sig",) * 5 + ("utf-16", "utf-16-le", "utf-32"))
    newline = draw.choice(("\n",) * 5 + ("\r\n",) * 3)
    blank_lines = draw.random() < 0.2
    if kind in ("jsonl", "json"):
        indent = draw.choice((None, 0, 2))
        return Layout(encoding, newline, blank_lines=blank_lines, ascii=draw.random() < 0.5,
                      indent=indent)  # fmt: skip
    if kind == "parquet":
        return Layout(parquet=draw.choice(("plain", "dictionary", "stated")))
    header = draw.choice(("plain",) * 8 + ("missing", "twice", "trailing", "trailing"))
    index = draw.choice((None, None, None, "", "Unnamed: 0"))
    delimiter = "\t" if kind == "tsv" else draw.choice((",",) * 5 + (";", "\t", "|"))
    quote_all = draw.random() < (0.3 if kind == "csv" else 0.05)
    return Layout(encoding, newline, delimiter, quote_all, blank_lines, index, header)


def _content(kind: str, rows: list[dict[str, Any]], layout: Layout, case: Case) -> bytes:
    """Return the bytes of a file."""
    if kind == "parquet":
        return _parquet(rows, layout, case)
    if layout.encoding not in ("utf-8", "utf-8-sig"):
        case.expect("refuse", "UTF-")
    if kind == "csv" or kind == "tsv":
        text = _separated(kind, rows, layout, case)
    else:
        as_ascii = layout.ascii or any(
            "\ud83d" in str(cell) for row in rows for cell in row.values()
        )
        objects = [json.dumps(row, ensure_ascii=as_ascii) for row in rows]
        if kind == "json":
            text = json.dumps(rows, ensure_ascii=as_ascii, indent=layout.indent) + "\n"
        else:
            text = "".join(line + "\n" for line in objects)
        if layout.blank_lines and kind == "json":
            text = "\n \n" + text + "\n\n"
        elif layout.blank_lines:
            text += "\n \n"
        text = text.replace("\n", layout.newline)
    return text.encode(layout.encoding)


def _separated(kind: str, rows: list[dict[str, Any]], layout: Layout, case: Case) -> str:
    names = list(rows[0]) if rows else ["id", "language", "text_a", "label"]
    table = [["" if row[name] is None else str(row[name]) for name in names] for row in rows]
    header = list(names)
    if layout.index is not None:
        header = [layout.index, *header]
        table = [[str(number), *fields] for number, fields in enumerate(table)]
    if layout.header == "trailing":
        header, table = [*header, ""], [[*fields, ""] for fields in table]
    if layout.header == "twice":
        header, table = [*header, names[0]], [[*fields, "x"] for fields in table]
        case.expect("refuse", "twice" if layout.encoding.startswith("utf-8") else "UTF-")
    lines = table if layout.header == "missing" else [header, *table]
    if layout.header == "missing":
        case.expect("refuse")
    if kind == "tsv" and layout.quote_all:  # by a writer that quotes, which TSV is not
        case.expect("refuse", "quoted" if layout.encoding.startswith("utf-8") else "UTF-")
        return _quoted(lines, layout)
    if kind == "tsv":
        text = "".join("\t".join(fields) + "\n" for fields in lines)
    else:
        if layout.delimiter != "," and any("," in name for name in header):
            case.expect("refuse")  # the comma of a name is taken for the delimiter
        elif layout.delimiter in "\t|" and any(";" in name for name in header):
            case.expect("refuse")
        if not layout.quote_all and any("\r" in field for fields in table for field in fields):
            case.expect("either")  # Python's writer leaves it without quotation marks
        return _quoted(lines, layout)
    if layout.blank_lines:
        text = "\n" + text.replace("\n", "\n\n")
    return text.replace("\n", layout.newline)


def _quoted(lines: list[list[str]], layout: Layout) -> str:
    """Return CSV; line ends within quoted fields stay as they are."""
    stream = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if layout.quote_all else csv.QUOTE_MINIMAL
    writer = csv.writer(
        stream, delimiter=layout.delimiter, quoting=quoting, lineterminator=layout.newline
    )
    for fields in lines:
        writer.writerow(fields)
        if layout.blank_lines:
            stream.write(layout.newline)
    return stream.getvalue()


def _looks_quoted(text: str) -> bool:
    """Return whether a reader of quoted fields would change a text, and a writer made it so."""
    text = text.strip()
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return False
    return '""' in text[1:-1] and '"' not in text[1:-1].replace('""', "")


def _parquet(rows: list[dict[str, Any]], layout: Layout, case: Case) -> bytes:
    names = list(rows[0]) if rows else ["id", "language", "text_a", "label"]
    columns = {}
    for name in names:
        values = [row[name] for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, TypeError):  # types that differ become text
            columns[name] = pa.array([None if value is None else str(value) for value in values])
        if layout.parquet == "dictionary" and pa.types.is_string(columns[name].type):
            columns[name] = columns[name].dictionary_encode()
    table = pa.table(columns)
    label = case.label_column
    if layout.parquet == "stated" and label in names and pa.types.is_integer(table[label].type):
        table = _with_stated_names(table, label)
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def _with_stated_names(table: pa.Table, label: str) -> pa.Table:
    """Number the classes in another order, which the schema states as `datasets` does."""
    names = [LABELS[2], LABELS[0], LABELS[1]]
    numbers = [
        names.index(LABELS[number]) if number in range(len(LABELS)) else number
        for number in table[label].to_pylist()
    ]
    position = table.column_names.index(label)
    table = table.set_column(position, label, pa.array(numbers, pa.int64()))
    features = {label: {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata)


def _mutated(draw: random.Random, content: bytes, case: Case) -> bytes:
    """Change, insert or remove bytes anywhere: what is meant is then unknown."""
    case.story.append("mutated")
    case.outcome, case.names = "any", []
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        position = draw.randrange(len(data) + 1)
        how = draw.randrange(3)
        if how == 0:
            data[position:position] = draw.randbytes(draw.randint(1, 3))
        elif how == 1:
            del data[position : position + draw.randint(1, 20)]
        else:
            data[position : position + 1] = draw.choice(string.punctuation).encode()
    return bytes(data)


# --- options ------------------------------------------------------------------------------------

ACCEPTED_OPTIONS = [
    ["-k", "1"], ["-k", "999999999999"], ["--projection-dim", "64"], ["--seed", "0"],
    ["--batch-tokens", "1"], ["--batch-tokens", str(2**63 - 1)], ["--max-length", "8"],
    ["--memory", "1GB"], ["--normalize", "none"], ["--parameters", "all"], ["--share-error", "9"],
]  # fmt: skip
REFUSED_OPTIONS = [
    ["-k", "0"], ["-k", "-1"], ["-k", "1.5"], ["-k", "nan"], ["-k", str(2**63)],
    ["--projection-dim", "0"], ["--projection-dim", "many"], ["--seed", "-1"], ["--seed", "1e3"],
    ["--batch-tokens", "0"], ["--max-length", "0"], ["--max-length", "-5"], ["--max-length", "3"],
    ["--max-length", "513"], ["--memory", "0"], ["--memory", "nan"], ["--memory", "-1GB"],
    ["--share-error", "0"], ["--share-error", "inf"], ["--normalize", "l2"], ["--dtype", "int8"],
    ["--parameters", "most"], ["--device", "cuda:99"], ["--device", "tpu"], ["--device", ""],
    ["--head-mask", "absent.json"], ["--columns", ""], ["--columns", "text_a"],
    ["--columns", "text_a="], ["--columns", "body=x"], ["--columns", "text_a=no such"],
    ["--columns", "group=no such"], ["--language", ""], ["--language", "  "], ["--out", ""],
    ["--train", "absent.csv"], ["--query", "."], ["--model", ""], ["--nonsense", "1"],
]  # fmt: skip


def _odd_option(draw: random.Random, case: Case) -> None:
    """Add an option at one of its bounds, or beyond it."""
    if draw.random() < 0.3:
        option = draw.choice(ACCEPTED_OPTIONS)
    else:
        option = draw.choice(REFUSED_OPTIONS)
        case.outcome, case.names = "refuse", []
    case.options += option
    case.story.append(" ".join(option))
