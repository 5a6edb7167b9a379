"""The study of a task whose questions are answered: from files of XQuAD's form to the report."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_checkpoints import WORDS
from tiny_study import tiny_config

from tracmod.analysis.statistics import Resampling, bootstrap_f1
from tracmod.attribution.query import Attributor
from tracmod.config import parse_config
from tracmod.models.inputs import encode
from tracmod.models.plain_pass import predict_tokens
from tracmod.models.questions import LONGEST_ANSWER, span_f1
from tracmod.study.context import RunContext
from tracmod.study.pipeline import run_stages
from tracmod.study.plan import plan_run
from tracmod.study.run_folder import RunFolder
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import masked_accuracy
from tracmod.tasks import load_task
from tracmod.validation.integrity import verify

LANGUAGES = ["en", "de"]
ASKED = 3  # questions of a context


def write_xquad(folder, contexts=40, seed=0):
    """Write parallel questions: the answer is the word after the one that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(8, (6,), generator=generator).tolist() for _ in range(contexts)]
    for language in LANGUAGES:
        paragraphs = []
        for number, picks in enumerate(drawn):
            words = [WORDS[language][pick] for pick in picks]
            asked = []
            for place in range(ASKED):
                start = len(" ".join(words[: place + 1])) + 1
                answer = {"text": words[place + 1], "answer_start": start}
                name = f"{number}-{place}"
                asked.append({"id": name, "question": words[place], "answers": [answer]})
            paragraphs.append({"context": " ".join(words), "qas": asked})
        tree = {"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"xquad.{language}.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder


def config_of(folder, **overrides):
    task = {
        "name": "xquad", "path": str(folder), "languages": LANGUAGES, "shape": "nli",
        "train_per_language": 60, "dev_per_language": 12, "test_per_language": 9,
    }  # fmt: skip
    return tiny_config(
        **{
            "task": task,
            "model": {"vocabulary": 300},
            "finetune": {"epochs": 4, "learning_rate": 6e-3},
            "prune": {"threshold": 0.5},
            "collect": {"every": 4, "untrained": True},
            "influence": {"k": 5},
            "views": {"random": 1, "other": []},
        }
        | overrides
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("questions")
    run_stages(RunFolder(folder / "run", config_of(write_xquad(folder))))
    return RunContext(RunFolder(folder / "run"))


def test_questions_are_parallel_and_those_of_a_context_stay_together(run):
    tables = {split: run.table(split) for split in ("train", "dev", "test")}
    assert {len(table) for table in tables.values()} == {120, 24, 18}
    contexts = {
        split: {group.partition("-")[0] for group in table["group"].to_pylist()}
        for split, table in tables.items()
    }
    assert not contexts["train"] & (contexts["dev"] | contexts["test"])
    assert not contexts["dev"] & contexts["test"]
    for table in tables.values():
        by_language = [
            table.filter(np.array(table["language"].to_pylist()) == name)["group"].to_pylist()
            for name in LANGUAGES
        ]
        assert by_language[0] == by_language[1]


def own_span(logits_2S):
    """Return the best span by a loop over all of them."""
    first, last = logits_2S.tolist()
    spans = [
        (first[a] + last[b], -a, -b)
        for a in range(len(first))
        for b in range(a, min(len(first), a + LONGEST_ANSWER))
    ]
    _, a, b = max(spans)
    return -a, -b


def own_f1(predicted, true):
    a, b = (set(range(first, last + 1)) for first, last in (predicted, true))
    return 2 * len(a & b) / (len(a) + len(b))


@pytest.mark.slow
def test_scores_are_the_f1_of_the_models_own_answers(run):
    summary = json.loads((run.run.path / "analysis" / "summary.json").read_text())
    assert summary["accuracy"]["score"] == "F1"
    views = {(v["model"], v["view"]): v["languages"] for v in summary["accuracy"]["views"]}
    model, tokenizer = run.load(run.checkpoints("full")[-1])
    for language in run.languages:
        mask = HeadMask.load(run.run.subnetwork(language))
        examples = encode(tokenizer, run.table_of("test", language), 48)
        for view, own_mask in (("full", HeadMask.full(*mask.array.shape)), ("subnetwork", mask)):
            with own_mask.apply(model):
                logits = predict_tokens(model, examples)
            scores = [
                own_f1(own_span(own), example["labels"])
                for own, example in zip(logits, examples, strict=True)
            ]
            entry = views["full", view][language]
            assert entry["value"] == pytest.approx(np.mean(scores))
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert masked_accuracy(model, examples, own_mask) == pytest.approx(np.mean(scores))


@pytest.mark.slow
def test_the_whole_study_runs_and_is_sound(run):
    assert verify(run.run.path) == []
    page = (run.run.path / "report" / "index.html").read_text()
    assert "F1 on the test examples" in page
    assert "Mean F1 of the tokens of the answers" in page
    assert "Wilson" not in page
    answers = pq.read_table(run.run.influence("full", "full") / "answers.parquet").to_pylist()
    contexts = run.table("test")["text_b"].to_pylist()
    assert all(row["answer"] in context for row, context in zip(answers, contexts, strict=True))
    for entry in json.loads((run.run.model("full") / "metrics.json").read_text()):
        assert set(entry["accuracy"]) == set(LANGUAGES)


@pytest.mark.slow
def test_queries_of_a_run(run):
    attributor = Attributor(run.run.path)
    top = pq.read_table(run.run.influence("full", "full") / "top.parquet").to_pylist()
    for row in run.table("test").to_pylist():
        if row["text_b"].index(row["answer"]) != row["answer_start"]:
            continue  # `query` takes the first place of an answer
        label = attributor.label_of(row)
        assert label == row["answer"]
        answer = attributor.query(row["text_a"], row["text_b"], label, k=3)
        listed = [r["train_id"] for r in top if r["test_id"] == row["id"] and r["sign"] == 1]
        assert [r["id"] for r in answer["proponents"]] == listed[:3]
        return
    pytest.fail("expected a question whose answer occurs once")


@pytest.mark.slow
def test_the_forecast_of_a_study(tmp_path):
    plan = plan_run(RunFolder(tmp_path / "run", config_of(write_xquad(tmp_path))))
    assert plan.seconds > 0


def test_files_of_ones_own_give_the_same_questions(tmp_path):
    write_xquad(tmp_path)
    task = {"name": "question-files", "languages": LANGUAGES, "shape": "nli",
            "train_file": str(tmp_path / "xquad.{language}.json"),
            "train_per_language": 30, "dev_per_language": 12, "test_per_language": 9}  # fmt: skip
    data = load_task(tiny_config(task=task).task)
    contexts = [
        set(zip(table["language"].to_pylist(), table["text_b"].to_pylist(), strict=True))
        for table in (data.train, data.dev, data.test)
    ]
    assert not contexts[0] & contexts[1]
    assert not contexts[0] & contexts[2]
    assert data.train["id"].to_pylist()[0].startswith("en-")
    assert "answer" in data.train.column_names


def test_xquad_comes_from_the_hub_by_its_name(tmp_path, monkeypatch):
    """The rows of the Hub are read as the published files are; the Hub itself is not asked."""
    write_xquad(tmp_path)
    asked = []

    def given(repository, language, split, columns, files):
        asked.append((repository, language, split))
        tree = json.loads((tmp_path / f"{language}.json").read_text())
        for paragraph in tree["data"][0]["paragraphs"]:
            for row in paragraph["qas"]:
                answers = {name: [answer[name] for answer in row["answers"]]
                           for name in ("text", "answer_start")}  # fmt: skip
                own = row | {"context": paragraph["context"], "answers": answers}
                yield "row", {ours: own[theirs] for ours, theirs in columns.items()}

    monkeypatch.setattr("tracmod.tasks.questions.read_hub", given)
    config = config_of(tmp_path).task
    from_files, from_hub = load_task(config), load_task(config.model_copy(update={"path": None}))
    assert asked == [("google/xquad", f"xquad.{name}", "dev") for name in LANGUAGES]
    for split in ("train", "dev", "test"):
        assert getattr(from_hub, split).equals(getattr(from_files, split))


@pytest.mark.parametrize("section", ["retrain", "metagradient"])
def test_what_needs_classes_is_refused(tmp_path, section):
    tree = json.loads(config_of(tmp_path).model_dump_json())
    with pytest.raises(ValueError, match=rf"{section}: .*xquad"):
        parse_config(tree | {section: {}}, "test")


@pytest.mark.parametrize("name", ["xquad", "entities"])
def test_pooling_is_for_classifiers_of_texts(tmp_path, name):
    tree = json.loads(config_of(tmp_path).model_dump_json())
    tree["task"]["name"], tree["model"]["pooling"] = name, "mean"
    with pytest.raises(ValueError, match=rf"model.pooling: .*{name}.*mean"):
        parse_config(tree, "test")


def test_the_f1_of_spans():
    for a in range(4):
        for b in range(a, 4):
            for c in range(4):
                for d in range(c, 4):
                    assert span_f1((a, b), (c, d)) == pytest.approx(own_f1((a, b), (c, d)))


def test_the_mean_of_scores_has_an_interval_of_questions():
    scores = np.array([0.0, 1.0, 0.5, 1.0])
    counts = np.stack([scores, np.ones(4), np.ones(4)], axis=1)
    resampling = Resampling(permutations=1, bootstrap=400, confidence=0.9, seed=0)
    value, low, high = bootstrap_f1(counts, np.arange(4), resampling)
    assert value == pytest.approx(0.625)
    assert low < value < high
