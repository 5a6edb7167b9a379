"""XNLI, PAWS-X and MARC: from files as published, and from the Hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tracmod.config import TaskConfig
from tracmod.tasks import load_task

NLI = ["entailment", "neutral", "contradiction"]
XNLI_HEADER = (
    "language\tgold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tpromptID\tpairID\tgenre\tlabel1\tlabel2\tlabel3\t"
    "label4\tlabel5\tsentence1_tokenized\tsentence2_tokenized\tmatch\n"
)


def _config(name: str, **values: Any) -> TaskConfig:
    sizes = {"train_per_language": 6, "dev_per_language": 3, "test_per_language": 3}
    return TaskConfig(**{"name": name, "languages": ["en", "de"], **sizes, **values})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_xnli(folder: Path) -> None:
    for split in ("dev", "test"):
        rows = [
            "\t".join([language, NLI[n % 3], "", "", "", "", f'{language} "{split} {n // 3}',
                       f"hypothesis {n}", str(n // 3), str(n), "face", *[NLI[n % 3]] * 5,
                       "tok", "tok", "True"])
            for language in ("ar", "en", "de")
            for n in range(1, 10)
        ]  # fmt: skip
        _write(folder / f"XNLI-1.0/xnli.{split}.tsv", XNLI_HEADER + "\n".join(rows) + "\n")
    for language in ("en", "de"):
        lines = ["premise\thypo\tlabel"]
        for n in range(12):
            label = ["entailment", "neutral", "contradictory"][n % 3]
            hypothesis = "" if (language, n) == ("de", 3) else f"hypothesis {n}"
            lines.append(f"{language} premise {n}\t{hypothesis}\t{label}")
        path = folder / f"XNLI-MT-1.0/multinli/multinli.train.{language}.tsv"
        _write(path, "\n".join(lines) + "\n")


def test_xnli_from_files(tmp_path: Path) -> None:
    _write_xnli(tmp_path)
    task = load_task(_config("xnli", path=tmp_path, train_per_language=11))
    assert (task.name, task.label_names, task.parallel) == ("xnli", NLI, True)
    rows = task.train.to_pylist()
    # The row without a German hypothesis is in neither language.
    assert {row["id"] for row in rows[:11]} == {f"en-{n}" for n in range(12) if n != 3}
    assert {row["group"] for row in rows} == {f"train-{n}" for n in range(12) if n != 3}
    assert all(row["label"] == int(row["group"].split("-")[1]) % 3 for row in rows)
    row = task.dev.to_pylist()[0]
    number = int(row["group"].removeprefix("dev-"))
    assert row == {
        "id": f"en-{number}", "language": "en", "text_a": f'en "dev {number // 3}',
        "text_b": f"hypothesis {number}", "label": number % 3, "group": f"dev-{number}",
    }  # fmt: skip


def test_xnli_names_a_bad_row_and_a_missing_file(tmp_path: Path) -> None:
    _write_xnli(tmp_path)
    train = tmp_path / "XNLI-MT-1.0/multinli/multinli.train.de.tsv"
    train.write_text(train.read_text().replace("contradictory", "no", 1))
    with pytest.raises(ValueError, match=r"multinli\.train\.de\.tsv:4: unknown label 'no'"):
        load_task(_config("xnli", path=tmp_path))
    train.unlink()
    with pytest.raises(ValueError, match=r"expected the published file XNLI-MT-1\.0/multinli/"):
        load_task(_config("xnli", path=tmp_path))
    with pytest.raises(ValueError, match=r"task xnli: .* ar, bg.*got nl"):
        load_task(_config("xnli", path=tmp_path, languages=["nl"]))


def test_xnli_has_languages_that_are_not_trained_on_and_need_no_training_file(
    tmp_path: Path,
) -> None:
    _write_xnli(tmp_path)
    task = load_task(_config("xnli", path=tmp_path, languages=["en", "ar"], train_languages=["en"]))
    assert task.train["language"].to_pylist() == ["en"] * 6
    assert task.test["language"].to_pylist() == ["en"] * 3 + ["ar"] * 3


def test_pawsx_from_files(tmp_path: Path) -> None:
    header = "id\tsentence1\tsentence2\tlabel\n"
    for language in ("en", "de"):
        train = "train" if language == "en" else "translated_train"
        for name, count in ((train, 12), ("dev_2k", 6), ("test_2k", 6)):
            lines = [f"{n}\t{language} {name} {n}\tother {n}\t{n % 2}\n" for n in range(1, count)]
            if language == "de":
                lines[1] = "2\tNS\tNS\t0\n"
            _write(tmp_path / f"x-final/{language}/{name}.tsv", header + "".join(lines))
    task = load_task(_config("pawsx", path=tmp_path))
    assert (task.label_names, task.parallel) == (["different", "paraphrase"], True)
    assert task.train.num_rows == 12
    groups = {table["group"].to_pylist()[0].split("-")[0] for table in (task.train, task.test)}
    assert groups == {"train", "test"}
    for table in (task.train, task.dev, task.test):
        assert "NS" not in table["text_a"].to_pylist()
        assert not any(group.endswith("-2") for group in table["group"].to_pylist())


def test_marc_from_files(tmp_path: Path) -> None:
    for language in ("en", "de"):
        for split in ("train", "dev", "test"):
            rows = [
                {"review_id": f"{language}_{n:07}", "product_id": "p", "reviewer_id": "r",
                 "stars": str(n % 5 + 1), "review_body": f"body {n}", "review_title": f"title {n}",
                 "language": language, "product_category": "book"}
                for n in range(10)
            ]  # fmt: skip
            path = tmp_path / f"json/{split}/dataset_{language}_{split}.json.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    task = load_task(_config("marc", path=tmp_path, train_per_language=10))
    assert (task.label_names, task.parallel) == (["1", "2", "3", "4", "5"], False)
    row = next(row for row in task.train.to_pylist() if row["id"] == "de_0000003")
    assert row == {
        "id": "de_0000003", "language": "de", "text_a": "title 3\n\nbody 3", "text_b": None,
        "label": 3, "group": None,
    }  # fmt: skip


def _hub(monkeypatch: pytest.MonkeyPatch, rows: dict[str, list[Any]], features: Any) -> list[Any]:
    calls: list[Any] = []

    def load_dataset(path: str, name: str, split: str) -> datasets.Dataset:
        calls.append((path, name, split))
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_xnli_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=NLI),
        }
    )
    rows = {
        "premise": [f"p {n}" for n in range(9)],
        "hypothesis": [f"h {n}" for n in range(9)],
        "label": [n % 3 for n in range(9)],
    }
    calls = _hub(monkeypatch, rows, features)
    task = load_task(_config("xnli"))
    assert set(calls) == {
        ("facebook/xnli", language, split)
        for language in ("en", "de")
        for split in ("train", "validation", "test")
    }
    row = task.test.to_pylist()[-1]
    number = int(row["id"].removeprefix("de-"))
    assert row["text_b"] == f"h {number}"
    assert row["label"] == number % 3
    assert row["group"] == f"test-{number}"


def test_pawsx_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["0", "1"]),
        }
    )
    rows = {
        "id": list(range(1, 11)),
        "sentence1": [f"a {n}" for n in range(1, 11)],
        "sentence2": ["NS", *[f"b {n}" for n in range(2, 11)]],
        "label": [n % 2 for n in range(1, 11)],
    }
    calls = _hub(monkeypatch, rows, features)
    task = load_task(_config("pawsx", hub_name="someone/paws-copy"))
    assert calls[0] == ("someone/paws-copy", "en", "train")
    assert "train-1" not in task.train["group"].to_pylist()
    assert task.train.num_rows == 12


def test_marc_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[Any]] = {
        "id": [f"de_{n}" for n in range(10)],
        "text": [f"title\n\nbody {n}" for n in range(10)],
        "label": [n % 5 for n in range(10)],
        "label_text": [str(n % 5) for n in range(10)],
    }
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "label": datasets.Value("int32"),
            "label_text": datasets.Value("string"),
        }
    )
    calls = _hub(monkeypatch, rows, features)
    task = load_task(_config("marc", languages=["de"]))
    assert calls[0] == ("mteb/amazon_reviews_multi", "de", "train")
    assert all(row["id"] == f"de_{row['text_a'][-1]}" for row in task.train.to_pylist())
    assert sorted(task.train["label"].to_pylist())[::5] == [0, 4]


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str, split: str) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"^facebook/xnli \(en, train\) could not be loaded .*"
    ) as e:
        load_task(_config("xnli"))
    assert "set task.path to the folder of XNLI-1.0/xnli.{dev,test}.tsv" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_hub_copy_of_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, {"text": ["a"], "label": [0]}, None)
    with pytest.raises(ValueError, match="expected columns premise, hypothesis, got text, label"):
        load_task(_config("xnli", hub_name="someone/else"))
