"""The planted task: the planted examples are there, and right influence is told from chance."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny_study import tiny_config

from tracmod.analysis import example_table
from tracmod.analysis.statistics import Resampling
from tracmod.analysis.sweeps import sweep_rows
from tracmod.cli import main
from tracmod.config import TaskConfig, load_config
from tracmod.models.tokenizer import train_tokenizer
from tracmod.report.wording.labels import QUESTIONS
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.tasks import load_task
from tracmod.tasks.planted import LEXICON, LOANS, WORD_CLASSES, planted_languages, relatedness_table
from tracmod.validation.planted import auc, planted_answers, spearman

NAMES = ["base", "near", "far", "mirror", "cipher", "isolated"]
SHARED = {"near": 0.75, "far": 0.4}
SETTINGS = Resampling(bootstrap=100, permutations=10, confidence=0.95, seed=0)


def config(**changes):
    sizes = {"train_per_language": 60, "dev_per_language": 10, "test_per_language": 30}
    return TaskConfig(**{"name": "planted", "languages": NAMES, **sizes, **changes})


@pytest.fixture(scope="module")
def data():
    return load_task(config())


def rows_of(table):
    return {row["id"]: row for row in table.to_pylist()}


def related(languages, a, b):
    rows = relatedness_table(languages).to_pylist()
    return next(row for row in rows if {row["language_a"], row["language_b"]} == {a, b})


# --- languages ------------------------------------------------------------------------------


def test_the_cipher_is_base_letter_by_letter_and_can_be_undone():
    languages = planted_languages(SHARED, seed=3)
    base, cipher = languages["base"], languages["cipher"]
    text = "i bought this lamp the quality is very good but the price is terrible"
    written = cipher.translate(text)
    back = str.maketrans(cipher.script, base.script)
    assert len(set(cipher.script)) == len(base.script)
    assert written.translate(back) == base.translate(text) == text
    assert not set(written) & set(text) - {" "}


@pytest.mark.parametrize(("near", "far"), [(0.75, 0.4), (0.9, 0.1), (1.0, 0.0), (0.5, 0.5)])
def test_near_and_far_share_the_configured_words_with_base_and_few_with_each_other(near, far):
    for seed in range(3):
        languages = planted_languages({"near": near, "far": far}, seed)
        word = 1 / len(LEXICON)
        shared = {
            pair: related(languages, *pair)["shared_words"]
            for pair in (("base", "near"), ("base", "far"), ("near", "far"))
        }
        assert abs(shared["base", "near"] - near) <= word / 2 + 1e-9
        assert abs(shared["base", "far"] - far) <= word / 2 + 1e-9
        assert abs(shared["near", "far"] - max(0.0, near + far - 1)) <= word + 1e-9


def test_every_word_class_is_shared_in_the_same_proportion():
    """A language does not share all verdicts and no products, for example."""
    for seed in range(5):
        near = planted_languages(SHARED, seed)["near"]
        for words in WORD_CLASSES:
            shared = sum(near.forms[word] == word for word in words)
            assert abs(shared - 0.75 * len(words)) <= 1.5, words


def test_isolated_shares_no_word_no_letter_and_hardly_any_order(data):
    text = dict.fromkeys(NAMES, "")
    for split in (data.train, data.dev, data.test):
        for row in split.to_pylist():
            text[row["language"]] += f" {row['text_a']}"
    for name in NAMES[:5]:
        assert not set(text["isolated"].split()) & set(text[name].split())
        assert set(text["isolated"]) & set(text[name]) == {" "}
        row = related(planted_languages(SHARED), name, "isolated")
        assert (row["shared_words"], row["same_script"]) == (0, False)
        assert abs(row["order"]) < 0.1


def test_word_orders_differ_and_lose_no_word():
    languages = planted_languages(SHARED)
    text = "i bought this lamp the quality is very good but the price is terrible"
    words = text.split()
    assert languages["mirror"].translate(text).split() == words[::-1]
    forms = languages["isolated"].forms
    order = [word for pair in zip(words, words[::-1], strict=True) for word in pair][: len(words)]
    assert languages["isolated"].translate(text).split() == [forms[word] for word in order]
    odd = languages["isolated"].translate("i bought this").split()
    assert odd == [forms["i"], forms["this"], forms["bought"]]


def test_in_every_language_different_words_stay_different():
    for name, language in planted_languages(SHARED, seed=1).items():
        assert len(set(language.forms.values())) == len(language.forms), name


def test_relatedness_follows_its_formula():
    languages = planted_languages(SHARED)
    relatedness = {
        other: related(languages, "base", other)["relatedness"]
        for other in NAMES
        if other != "base"
    }
    near, far = (round(share * len(LEXICON)) / len(LEXICON) for share in (0.75, 0.4))
    assert relatedness == pytest.approx(
        {
            "near": 0.75 * near + 0.25,
            "far": 0.75 * far + 0.25,
            "mirror": 0.75 - 0.25,
            "cipher": 0.25,
            "isolated": 0.25 * 7 / 91,  # 49 of 91 pairs of positions have the same order
        }
    )


# --- the examples ---------------------------------------------------------------------------


def test_the_task_has_the_configured_number_of_examples(data):
    for split, count in (("train", 60), ("dev", 10), ("test", 30)):
        table = getattr(data, split)
        languages = table["language"].to_pylist()
        assert {name: languages.count(name) for name in NAMES} == dict.fromkeys(NAMES, count)
        assert len(set(table["id"].to_pylist())) == len(table)
        labels = table["label"].to_numpy()
        assert 0.35 < labels.mean() < 0.65
    loaded = load_task(config(train_counts={"near": 20}))
    assert loaded.train["language"].to_pylist().count("near") == 20


def test_no_text_occurs_twice_except_the_duplicates(data):
    train, test = rows_of(data.train), rows_of(data.test)
    duplicates = {
        (row["test_id"], row["train_id"])
        for row in data.known["planted"].to_pylist()
        if row["kind"] == "duplicate"
    }
    assert len(duplicates) == 6 * len(NAMES)
    for test_id, train_id in duplicates:
        same = ("language", "text_a", "label")
        assert [test[test_id][key] for key in same] == [train[train_id][key] for key in same]
    seen = [(row["text_a"], name) for name, row in (train | test).items()]
    seen += [(row["text_a"], name) for name, row in rows_of(data.dev).items()]
    copies = {train_id for _, train_id in duplicates}
    texts = [text for text, name in seen if name not in copies]
    assert len(set(texts)) == len(texts)


def test_flipped_labels_are_wrong_and_all_others_are_right(data):
    """Compare every label with the sign of the verdicts, read back from the text word by word."""
    languages = planted_languages(SHARED)
    flipped = {
        row["train_id"] for row in data.known["planted"].to_pylist() if row["kind"] == "flipped"
    }
    assert len(flipped) == len(NAMES) * 2 * round(0.1 * 27)
    grades = {"terrible": -2, "bad": -1, "disappointing": -1, "good": 1, "nice": 1, "excellent": 2}
    grades |= {"acceptable": 0, "normal": 0, "horrible": -2, "perfect": 2}
    for split in (data.train, data.dev, data.test):
        for row in split.to_pylist():
            of_form = {form: word for word, form in languages[row["language"]].forms.items()}
            words = [of_form[form] for form in row["text_a"].split()]
            if row["language"] == "mirror":
                words = words[::-1]
            if row["language"] == "isolated":
                words = words[::2] + words[1::2][::-1]
            total = sum(
                grades[word] * (2 if words[position - 1] == "very" else 1)
                for position, word in enumerate(words)
                if word in grades
            )
            is_flipped = row["id"] in flipped
            assert (total > 0) == (row["label"] == 1 - is_flipped), row
            assert total != 0
    assert not flipped & {
        row["train_id"] for row in data.known["planted"].to_pylist() if row["kind"] == "duplicate"
    }


def test_loans_are_in_the_training_data_of_the_teacher_and_the_test_data_of_the_learner(data):
    loans = [row for row in data.known["planted"].to_pylist() if row["kind"] == "loan"]
    assert len(loans) == 10
    test = rows_of(data.test)
    with_loan = {row["id"] for row in test.values() if set(row["text_a"].split()) & set(LOANS)}
    of_learner = {name for name in with_loan if test[name]["language"] == "base"}
    assert of_learner == {row["test_id"] for row in loans}
    for split in (data.train, data.dev, data.test):
        using = {
            row["language"]
            for row in split.to_pylist()
            if set(row["text_a"].split()) & set(LOANS) and row["id"] not in of_learner
        }
        assert using == {"far"}
    for row in loans:
        loan, native = test[row["test_id"]], test[row["native_id"]]
        words = [LOANS.get(word, word) for word in loan["text_a"].split()]
        assert native["text_a"].split() == words
        assert loan["label"] == native["label"]
    assert (
        not load_task(config(languages=["base", "near"]))
        .known["planted"]
        .filter(pc.field("kind") == "loan")
    )


def test_the_seed_determines_the_examples(data):
    again, other = load_task(config()), load_task(config(seed=1))
    for split in ("train", "dev", "test"):
        assert getattr(again, split) == getattr(data, split)
        assert getattr(other, split) != getattr(data, split)
    assert again.known == data.known
    forms = [planted_languages(SHARED, seed)["isolated"].forms for seed in (0, 0, 1)]
    assert forms[0] == forms[1] != forms[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.languages": "[base, klingon]"}, r"klingon"),
        ({"task.shared_words": "{near: 1.5, far: 0.2}"}, "shared_words.near: .*1"),
        ({"task.shared_words": "{near: 0.5}"}, "shared_words: .*got near"),
        ({"task.duplicates": 40}, "duplicates: .*got 40"),
        ({"task.flipped": 0.6}, "flipped: .*got 0.6"),
        ({"task.train_languages": "[base]"}, "train_languages"),
    ],
)
def test_a_bad_config_is_refused_in_one_sentence(tmp_path, changes, message):
    arguments = ["run", "planted", "--quiet", "--out", str(tmp_path / "run")]
    for key, value in changes.items():
        arguments += ["--set", f"{key}={value}"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert re.search(message, result.output)
    assert len(result.output.strip().splitlines()) == 1


# --- the measurement ------------------------------------------------------------------------


def write_run(path: Path, data, scores_QN: np.ndarray, own_N: np.ndarray, k: int = 40) -> Path:
    """Write a run folder with the data and one view whose influence scores are `scores_QN`."""
    (path / "data").mkdir(parents=True)
    for split in ("train", "test"):
        pq.write_table(getattr(data, split), path / "data" / f"{split}.parquet")
    for name, table in data.known.items():
        pq.write_table(table, path / "data" / f"{name}.parquet")
    record = {"config": {"task": {"languages": data.languages}, "influence": {"k": k}}}
    (path / "run.json").write_text(json.dumps(record))
    train, test, folder = data.train, data.test, path / "influence" / "full" / "full"
    folder.mkdir(parents=True)
    order_QN = np.argsort(-scores_QN, axis=1, kind="stable")
    sides = {1: order_QN[:, :k], -1: order_QN[:, ::-1][:, :k]}
    names_N = np.array(train["language"].to_pylist())
    sums_QG = np.stack([scores_QN[:, names_N == g].sum(axis=1) for g in data.languages], axis=1)
    examples = example_table(
        *sides.values(),
        sums_QG,
        languages=data.languages,
        train_languages=names_N.tolist(),
        test_ids=test["id"].to_pylist(),
        test_languages=test["language"].to_pylist(),
        test_labels=test["label"].to_pylist(),
    )
    pq.write_table(examples, folder / "examples.parquet")
    ids, tests = train["id"].to_pylist(), test["id"].to_pylist()
    top = [
        {
            "test_id": tests[query],
            "sign": sign,
            "rank": rank,
            "train_id": ids[row],
            "score": float(scores_QN[query, row]),
        }
        for query in range(len(tests))
        for sign, order_Qk in sides.items()
        for rank, row in enumerate(order_Qk[query].tolist(), start=1)
    ]
    pq.write_table(pa.Table.from_pylist(top), folder / "top.parquet")
    own = {"train_id": ids, "train_language": names_N.tolist()}
    own |= {"mask_language": pa.nulls(len(ids), pa.string()), "self_influence": own_N}
    pq.write_table(pa.table(own), folder / "self_influence.parquet")
    return path


def perfect_influence(data, rng):
    """Return scores that follow labels, relatedness and everything that is planted."""
    train, test = data.train.to_pylist(), data.test.to_pylist()
    near = {(r["language_a"], r["language_b"]): r for r in data.known["relatedness"].to_pylist()}
    near |= {(b, a): row for (a, b), row in near.items()}
    planted = data.known["planted"].to_pylist()
    of = {kind: [row for row in planted if row["kind"] == kind] for kind in ("duplicate", "loan")}
    flipped = {row["train_id"] for row in planted if row["kind"] == "flipped"}
    duplicate_of = {row["test_id"]: row["train_id"] for row in of["duplicate"]}
    needing = {row["test_id"] for row in of["loan"]}
    scores_QN = rng.normal(0, 0.7, (len(test), len(train)))
    for q, query in enumerate(test):
        for n, example in enumerate(train):
            pair = (query["language"], example["language"])
            kinship = 1.2 if pair[0] == pair[1] else near[pair]["relatedness"]
            teaches = query["id"] in needing and example["language"] == "far"
            agrees = (query["label"] == example["label"]) == (example["id"] not in flipped)
            sign = 1 if agrees and example["id"] not in flipped else -1
            scores_QN[q, n] += sign * (1 + kinship + 2 * teaches)
            scores_QN[q, n] += 100 * (duplicate_of.get(query["id"]) == example["id"])
    own_N = np.array([1.0 + 5 * (example["id"] in flipped) for example in train])
    return scores_QN, own_N


def test_influence_that_follows_what_is_planted_is_right_in_every_answer(tmp_path, data):
    scores_QN, own_N = perfect_influence(data, np.random.default_rng(0))
    run = write_run(tmp_path / "run", data, scores_QN, own_N)
    answers = {row["question"]: row for row in planted_answers(run, SETTINGS).to_pylist()}
    assert set(answers) == set(QUESTIONS)
    assert [name for name, row in answers.items() if not row["right"]] == []
    for name in ("duplicates", "flipped_by_self_influence", "flipped_by_opponents"):
        assert answers[name]["value"] == 1, name
    assert answers["relatedness"]["value"] > 0.9
    for row in answers.values():
        assert row["low"] <= row["high"]


def test_random_influence_answers_by_chance_and_is_wrong(tmp_path, data):
    rng = np.random.default_rng(1)
    shape = (len(data.test), len(data.train))
    answers = []
    for draw in range(4):
        run = write_run(
            tmp_path / str(draw), data, rng.normal(size=shape), rng.random(len(data.train))
        )
        answers += planted_answers(run, SETTINGS).to_pylist()
    for name in ("duplicates", "flipped_by_self_influence", "flipped_by_opponents", "relatedness"):
        rows = [row for row in answers if row["question"] == name]
        assert not any(row["right"] for row in rows), name
        spread = {"duplicates": 0.05, "relatedness": 0.4}.get(name, 0.08)
        assert np.mean([row["value"] for row in rows]) == pytest.approx(
            rows[0]["chance"], abs=spread
        )
    for name in ("loan", "isolated", "cipher"):
        rows = [row for row in answers if row["question"] == name]
        chance = {"loan": 0, "isolated": 1 / 6, "cipher": 1 / 6}[name]
        assert rows[0]["chance"] == pytest.approx(chance)
        assert np.mean([row["value"] for row in rows]) == pytest.approx(chance, abs=0.04)
    assert sum(row["right"] for row in answers if row["question"] == "loan") <= 1


def test_each_answer_is_wrong_if_influence_ignores_what_is_planted_for_it(tmp_path, data):
    right, own_N = perfect_influence(data, np.random.default_rng(0))
    train, test = data.train.to_pylist(), data.test.to_pylist()
    languages_Q = np.array([row["language"] for row in test])
    languages_N = np.array([row["language"] for row in train])
    columns = {name: np.flatnonzero(languages_N == name) for name in NAMES}
    exchanged = right.copy()  # near and isolated mistaken for each other
    exchanged[:, columns["near"]] = right[:, columns["isolated"]]
    exchanged[:, columns["isolated"]] = right[:, columns["near"]]
    credited = right.copy()
    credited[np.ix_(languages_Q == "cipher", languages_N == "base")] += 5
    wrong = {
        "isolated": (exchanged, own_N),
        "relatedness": (exchanged, own_N),
        "cipher": (credited, own_N),
        "flipped_by_self_influence": (right, -own_N),
        "flipped_by_opponents": (-right, own_N),
        "duplicates": (-right, own_N),
    }
    for question, (scores_QN, own) in wrong.items():
        run = write_run(tmp_path / question, data, scores_QN, own)
        answers = {row["question"]: row for row in planted_answers(run, SETTINGS).to_pylist()}
        assert not answers[question]["right"], question


def test_questions_without_planted_examples_are_left_out(tmp_path):
    bare = load_task(config(languages=["base", "near"], duplicates=0, flipped=0))
    assert len(bare.known["planted"]) == 0
    shape = (len(bare.test), len(bare.train))
    scores_QN = np.random.default_rng(0).normal(size=shape)
    run = write_run(tmp_path / "bare", bare, scores_QN, np.ones(shape[1]))
    assert len(planted_answers(run, SETTINGS)) == 0
    few = load_task(config(languages=["near", "isolated"], flipped=0))
    scores_QN = np.random.default_rng(0).normal(size=(len(few.test), len(few.train)))
    run = write_run(tmp_path / "few", few, scores_QN, np.ones(len(few.train)))
    questions = planted_answers(run, SETTINGS)["question"].to_pylist()
    assert questions == ["duplicates", "isolated"]


def test_auc_and_spearman_on_hand_computed_values():
    assert auc(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True])) == 0.75
    assert auc(np.ones(4), np.array([False, True, False, True])) == 0.5
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 15.0])) == pytest.approx(0.5)
    assert spearman(np.ones(3), np.arange(3.0)) == 0


def test_a_folder_without_anything_planted_is_refused(tmp_path, data):
    scores_QN = np.zeros((len(data.test), len(data.train)))
    run = write_run(tmp_path / "run", data, scores_QN, np.zeros(len(data.train)))
    (run / "data" / "planted.parquet").unlink()
    with pytest.raises(ValueError, match="expected a run of the task planted"):
        planted_answers(run, SETTINGS)


# --- the run --------------------------------------------------------------------------------


def test_a_run_writes_the_planted_tables_the_answers_and_their_section(tmp_path):
    task = {"name": "planted", "languages": NAMES, "test_per_language": 9, "duplicates": 3}
    task["flipped"] = 0.3
    tiny = tiny_config(task=task, finetune={"epochs": 1}, views={"other": ["near"]})
    run = RunFolder(tmp_path / "run", tiny)
    run_stages(run)
    assert len(pq.read_table(run.path / "data" / "relatedness.parquet")) == 15
    answers = pq.read_table(run.path / "analysis" / "planted.parquet")
    answered = {(row["model"], row["view"]) for row in answers.to_pylist()}
    views = ("full", "subnetwork", "random", "other")
    assert answered == {(model, view) for model in ("full", "sparse") for view in views}
    of_full = answers.filter(pc.field("view") == "full")
    assert set(of_full["question"].to_pylist()) == set(QUESTIONS)
    assert pyarrow.csv.read_csv(run.path / "analysis" / "planted.csv").num_rows == len(answers)
    page = (run.path / "report" / "index.html").read_text(encoding="utf-8")
    right = sum(answers["right"].to_pylist())
    assert '<section id="planted">' in page
    assert f"{right} of {len(answers)} answers are right." in page
    assert page.count("<small>expected: ") == len(QUESTIONS)
    counted = {(row["model"], row["view"]): row for row in sweep_rows(run.path)}
    assert counted.keys() == answered
    assert sum(row["known_answers"] for row in counted.values()) == right
    assert sum(row["known_answers_asked"] for row in counted.values()) == len(answers)


def test_the_built_in_configuration_plants_everything_and_has_a_token_for_every_word():
    """Tokens are whole words, so that languages share tokens only where they share words."""
    embedded = load_config("planted")
    task = load_task(embedded.task)
    texts = task.train["text_a"].to_pylist()
    tokenizer = train_tokenizer(texts, embedded.model.vocabulary, embedded.model.max_length)
    words = {word for text in texts for word in text.split()}
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    known = task.known
    kinds = set(known["planted"]["kind"].to_pylist())
    assert kinds == {"duplicate", "flipped", "loan"}
    assert len(known["relatedness"]) == 15
