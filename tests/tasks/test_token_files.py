"""Files of sentences whose words have tags: read alike from every format, or refused by line."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_checkpoints import WORDS

from tracmod.models.inputs import encode, num_cut, tags_of_words
from tracmod.models.tokenizer import train_tokenizer
from tracmod.tasks.columns import parse_columns
from tracmod.tasks.readers import read_rows
from tracmod.tasks.token_files import (
    TOKEN_SCHEMA,
    TokenFile,
    distinct_tags,
    read_token_files,
    tagged_text,
)

TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
SENTENCES = [
    (["Ada", "King", "lives", "in", "Paris"], ["B-PER", "I-PER", "O", "O", "B-LOC"]),
    (["Paris", "!"], ["B-LOC", "O"]),
]
CONLLU = """# sent_id = a-1
# text = Du pain , 10 000 fois
1-2\tDu\t_\t_\t_\t_\t_\t_\t_\t_
1\tDe\tde\tADP\t_\t_\t3\tcase\t_\t_
2\tle\tle\tDET\t_\t_\t3\tdet\t_\t_
3\tpain\tpain\tNOUN\tNN\t_\t0\troot\t_\t_
3.1\tmangé\t_\tVERB\t_\t_\t_\t_\t_\t_
4\t10 000\t_\tNUM\tCD\t_\t3\tdep\t_\t_

# sent_id = a-2
1\tOui\toui\tINTJ\tUH\t_\t0\troot\t_\t_
"""


def write_json(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_lists(table):
    return list(zip(table["tokens"].to_pylist(), table["tags"].to_pylist(), strict=True))


def test_all_formats_hold_the_same(tmp_path):
    rows = [{"tokens": tokens, "tags": tags} for tokens, tags in SENTENCES]
    json_lines = write_json(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = "\n\n".join(
        "\n".join(f"{token}\tx\t{tag}" for token, tag in zip(tokens, tags, strict=True))
        for tokens, tags in SENTENCES
    )
    (tmp_path / "a.conll").write_text(f"-DOCSTART-\tx\tO\n\n# id = 7\n{lines}\n\n\n")
    (tmp_path / "a.iob2.gz").write_bytes(gzip.compress(lines.replace("\tx\t", " ").encode()))
    files = [json_lines, tmp_path / "a.parquet", tmp_path / "a.conll", tmp_path / "a.iob2.gz"]
    expected = [(tokens, [TAGS.index(tag) for tag in tags]) for tokens, tags in SENTENCES]
    for table in read_token_files(files, TAGS):
        assert table.schema == TOKEN_SCHEMA
        assert as_lists(table) == expected
        assert table["id"].to_pylist() == ["0", "1"]
        assert table["language"].to_pylist() == ["und", "und"]
        assert table["text_a"].to_pylist() == ["Ada King lives in Paris", "Paris !"]


def test_conllu_has_the_syntactic_words(tmp_path):
    file = tmp_path / "a.conllu"
    file.write_text(CONLLU, encoding="utf-8")
    tags = ["ADP", "DET", "INTJ", "NOUN", "NUM"]
    (table,) = read_token_files([file], tags, language="fr")
    assert as_lists(table) == [(["De", "le", "pain", "10 000"], [0, 1, 3, 4]), (["Oui"], [2])]
    assert table["id"].to_pylist() == ["a-1", "a-2"]
    assert set(table["language"].to_pylist()) == {"fr"}
    (relations,) = read_token_files(
        [file], ["case", "det", "root", "dep"], {"tags": "deprel"}, language="fr"
    )
    assert relations["tags"].to_pylist() == [[0, 1, 2, 3], [2]]


def test_numbers_of_tags(tmp_path):
    numbered = write_json(tmp_path / "a.jsonl", [{"tokens": ["a", "b"], "tags": [3, -100]}])
    (table,) = read_token_files([numbered], TAGS)
    assert table["tags"].to_pylist() == [[3, -100]]
    feature = {"_type": "ClassLabel", "names": ["O", "B-LOC"]}
    for listed in ({"feature": feature, "_type": "List"}, {"feature": feature}):
        metadata = {"info": {"features": {"tags": listed}}}
        table = pa.table({"tokens": [["a", "b"]], "tags": [[1, 0]]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
        pq.write_table(table, tmp_path / "a.parquet")
        (named,) = read_token_files([tmp_path / "a.parquet"], TAGS)
        assert named["tags"].to_pylist() == [[3, 0]]
        (unnamed,) = read_token_files([tmp_path / "a.parquet"], ["LABEL_0", "LABEL_1"])
        assert unnamed["tags"].to_pylist() == [[1, 0]]
        assert distinct_tags([TokenFile.read(tmp_path / "a.parquet", {}, None)]) == ["O", "B-LOC"]


GOOD = {"tokens": ["a", "b"], "tags": ["O", "B-PER"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "1 words, got 2"),
        ({"tokens": [], "tags": []}, "one word or more"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "' ' as word 1"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, "3 as word 1"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "list in column tokens"),
        ({"tokens": ["a", "b"], "tags": "O O"}, "list in column tags"),
        ({"tokens": ["a", "b"], "tags": ["O", None]}, "None of word 1"),
        ({"tokens": ["a", "b"], "tags": ["O", True]}, "True of word 1"),
        ({"tokens": ["a", "b"], "tags": ["O", "B-ORG"]}, "unknown tag 'B-ORG' of word 1.*B-PER"),
        ({"tokens": ["a", "b"], "tags": [0, 4]}, "unknown tag 4 of word 1"),
        ({"tokens": ["a", "b"], "tags": [0, -1]}, "unknown tag -1 of word 1"),
        ({"tokens": ["a"], "tags": [-100]}, "word with a tag"),
        ({"tokens": ["a\ud800"], "tags": ["O"]}, "word 0.*surrogate"),
    ],
)
def test_malformed_sentences_are_refused_by_line(tmp_path, row, message):
    file = write_json(tmp_path / "a.jsonl", [GOOD, row])
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
        read_token_files([file], TAGS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.conll", "a O\nb\n", r":2: expected 2 fields.*1: 'b'"),
        ("a.conll", "a\n", r":1: expected two or more.*got 1"),
        ("a.conll", "a b O\n\nc O\n", r":3: expected 3 fields.*got 2"),
        ("a.conll", "\n\n", "expected sentences"),
        ("a.conllu", "1\ta\n", r":1: expected the 10 fields.*got 2"),
        ("a.conllu", "x" + "\t_" * 9 + "\n", r":1: .*number of a word.*'x'"),
        ("a.tsv", "text_a\tlabel\nx\ty\n", r"column tokens, tags.*tags=label"),
        ("a.jsonl", '{"tokens": ["a"], "ner_tags": ["O"]}\n', "column tags.*tags=ner_tags"),
        ("a.jsonl", '{"id": 1, "tokens": ["a"], "tags": ["O"]}\n' * 2, ":2: id '1' occurs twice"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_token_files([tmp_path / name], TAGS)


def test_columns_and_languages(tmp_path):
    file = write_json(
        tmp_path / "a.jsonl",
        [{"words": ["a"], "ner": ["O"], "lang": "de", "group": 1}, {"words": ["b"], "ner": ["O"]}],
    )
    columns = parse_columns("tokens=words,tags=ner")
    notes = []
    with pytest.raises(ValueError, match=r"language, or --language NAME.*language=lang"):
        read_token_files([file], TAGS, columns)
    (tmp_path / "a.bio").write_text("c B-PER\n")  # its own names
    table, other = read_token_files([file, tmp_path / "a.bio"], TAGS, columns, "de", notes=notes)
    assert as_lists(other) == [(["c"], [1])]
    notes = notes[:1]
    assert len(notes) == 1
    assert "no column id" in notes[0]
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no language"):
        read_token_files([file], TAGS, columns | {"language": "lang"})
    assert table["group"].to_pylist() == ["1", None]
    with pytest.raises(ValueError, match=r"columns.*text_a"):
        read_token_files([file], TAGS, columns | {"text_a": "x"})
    with pytest.raises(ValueError, match=r"langs.*none of the inputs"):
        read_token_files([write_json(tmp_path / "b.jsonl", [GOOD | {"langs": [1]}])], TAGS,
                         model_inputs=["langs"])  # fmt: skip


def test_other_formats_have_no_sentences_for_text_classifiers(tmp_path):
    (tmp_path / "a.bio").write_text("a O\n")
    assert [row for _, row in read_rows(tmp_path / "a.bio")] == [{"tokens": ["a"], "tags": ["O"]}]


# --- subwords -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(words) for words in WORDS.values()] * 9, 70, 40)


def table_of(sentences):
    rows = [{"tokens": tokens, "tags": tags} for tokens, tags in sentences]
    return pa.table(
        {
            "id": [f"s{row}" for row in range(len(rows))],
            "tags": pa.array([row["tags"] for row in rows], pa.list_(pa.int64())),
            "tokens": [row["tokens"] for row in rows],
        }
    )


def test_the_first_token_of_a_word_has_its_tag(tokenizer):
    words = ["Katze", "viejo", "home"]
    lengths = [len(tokenizer.tokenize(word)) for word in words]
    assert max(lengths) > 1
    (example,) = encode(tokenizer, table_of([(words, [2, -100, 1])]), 40)
    expected = [-100]
    for length, tag in zip(lengths, [2, -100, 1], strict=True):
        expected += [tag] + [-100] * (length - 1)
    assert example["labels"] == [*expected, -100]
    assert example["input_ids"] == tokenizer(" ".join(words))["input_ids"]


def test_words_that_are_cut_off_are_counted_and_have_no_label(tokenizer):
    words = ["Katze", "viejo", "home", "Katze"]
    table = table_of([(words, [2, 0, 1, 2]), (["home"], [1])])
    whole = encode(tokenizer, table, 40)
    for max_length in range(5, len(whole[0]["input_ids"]) + 1):
        examples = encode(tokenizer, table, max_length)
        tags = [label for label in examples[0]["labels"] if label != -100]
        assert tags == [2, 0, 1, 2][: len(tags)]
        assert num_cut(tokenizer, table, max_length) == len(words) - len(tags)
        assert len(examples[0]["input_ids"]) <= max_length
    assert num_cut(tokenizer, table, 5) > 0
    with pytest.raises(ValueError, match=r"example s0.*word with a tag within 5"):
        encode(tokenizer, table_of([([*words, "home"], [-100] * 4 + [1])]), 5)


def test_predictions_are_put_back_to_their_words(tokenizer):
    import torch

    table = table_of([(["Katze", "viejo", "home"], [2, -100, 1]), (["home"], [1])])
    logits = [torch.eye(3)[[1, 2]], torch.eye(3)[[0]]]
    assert tags_of_words(tokenizer, table, 40, logits) == [[1, -100, 2], [0]]
    cut = len(tokenizer("Katze")["input_ids"])
    assert tags_of_words(tokenizer, table, cut, [logits[0][:1], logits[1]])[0] == [1, -100, -100]


def test_a_slow_tokenizer_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="expected a fast one"):
        encode(tokenizer, table_of([(["home"], [1])]), 9)


def test_a_sentence_as_it_is_shown():
    words, tags = SENTENCES[0]
    assert tagged_text(words, tags) == "Ada/B-PER King/I-PER lives in Paris/B-LOC"
