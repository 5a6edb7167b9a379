"""The study of a task whose words have tags: from files to the report."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_study import tiny_config

from tracmod.analysis.statistics import Resampling, bootstrap_f1
from tracmod.attribution.query import Attributor
from tracmod.config import parse_config
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.models.plain_pass import predict_tokens
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.result_tables import accuracy
from tracmod.study.context import RunContext
from tracmod.study.pipeline import run_stages
from tracmod.study.plan import plan_run
from tracmod.study.run_folder import RunFolder
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.tasks import load_task
from tracmod.tasks.tag_scores import count_tags, total_counts

TASK = {
    "name": "entities",
    "shape": "nli",
    "languages": ["en", "de"],
    "train_per_language": 60,
    "dev_per_language": 12,
    "test_per_language": 8,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    config = tiny_config(
        task=TASK,
        model={"vocabulary": 300},
        finetune={"epochs": 8, "learning_rate": 6e-3},
        influence={"k": 5, "blocks": True},
        collect={"every": 8},
        views={"random": 1, "other": []},
    )
    run_stages(RunFolder(folder, config))
    return RunContext(RunFolder(folder))


@pytest.mark.slow
def test_the_forecast_of_a_study(tmp_path):
    config = tiny_config(task=TASK, prune={"seeds": 2})
    plan = plan_run(RunFolder(tmp_path / "run", config))
    assert plan.seconds > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_whole_study_runs(run):
    summary = json.loads((run.run.path / "analysis" / "summary.json").read_text())
    assert summary["accuracy"]["score"] == "F1"
    page = (run.run.path / "report" / "index.html").read_text()
    assert "F1 on the test examples" in page
    table = accuracy(AnalysisTables(run.run.path))
    assert any(column.header.startswith("F1") for column in table.columns)
    assert "Wilson" not in page


@pytest.mark.slow
def test_scores_are_f1_of_the_models_own_predictions(run):
    """Recomputed from the last checkpoint under each mask, by a loop over words."""
    summary = json.loads((run.run.path / "analysis" / "summary.json").read_text())
    views = {(v["model"], v["view"]): v["languages"] for v in summary["accuracy"]["views"]}
    checkpoint = run.checkpoints("full")[-1]
    model, tokenizer = load_model(checkpoint.path)
    for language in run.languages:
        table = run.table_of("test", language)
        for view, mask in (
            ("full", None),
            ("subnetwork", HeadMask.load(run.run.subnetwork(language))),
        ):
            examples = encode(tokenizer, table, run.config.model.max_length)
            if mask is None:
                logits = predict_tokens(model, examples)
            else:
                with mask.apply(model):
                    logits = predict_tokens(model, examples)
            counts = total_counts(
                count_tags(own.argmax(dim=1).tolist(), tags, run.tag_names)
                for own, tags in zip(logits, table["tags"].to_pylist(), strict=True)
            )
            entry = views["full", view][language]
            assert entry["value"] == pytest.approx(counts.f1)
            assert view == "subnetwork" or counts.f1 > 0.3  # the model has learned something
            assert entry["low"] <= entry["value"] <= entry["high"]


@pytest.mark.slow
def test_pruning_and_metrics_are_by_f1(run):
    entry = json.loads(run.run.subnetwork("de").read_text())
    model, tokenizer = run.load(run.checkpoints("full")[-1])
    table = run.table_of("dev", "de")
    examples = encode(tokenizer, table, run.config.model.max_length)
    counts = total_counts(
        count_tags(own.argmax(dim=1).tolist(), tags, run.tag_names)
        for own, tags in zip(
            predict_tokens(model, examples), table["tags"].to_pylist(), strict=True
        )
    )
    assert entry["full_score"] == pytest.approx(counts.f1)
    metrics = json.loads((run.run.model("full") / "metrics.json").read_text())
    summary = json.loads((run.run.path / "analysis" / "summary.json").read_text())
    (full,) = [
        v for v in summary["accuracy"]["views"] if (v["model"], v["view"]) == ("full", "full")
    ]
    assert metrics[-1]["accuracy"]["de"] == pytest.approx(full["languages"]["de"]["value"])


@pytest.mark.slow
def test_queries_of_a_run(run):
    attributor = Attributor(run.run.path)
    row = run.table("test").slice(0, 1).to_pylist()[0]
    answer = attributor.query(row["text_a"], label=attributor.label_of(row), k=3)
    top = pq.read_table(run.run.influence("full", "full") / "top.parquet").to_pylist()
    listed = [r["train_id"] for r in top if r["test_id"] == row["id"] and r["sign"] == 1][:3]
    assert [r["id"] for r in answer["proponents"]] == listed


@pytest.mark.slow
def test_the_report_has_the_words_with_their_tags(run):
    from tracmod.analysis import RunResults
    from tracmod.report.html.explorer import explorer_data

    data = explorer_data(RunResults(run.run.path), 5, 8)
    assert any("/B-LOC" in text for text in data["train"]["text_a"])
    assert data["labels"] == ["O", "LOC", "ORG", "PER"]


def test_a_section_that_needs_texts_is_refused():
    for section in ({"retrain": {}}, {"metagradient": {}}):
        with pytest.raises(ValueError, match=f"{next(iter(section))}.*entities"):
            tiny_config(task=TASK, **section)


def test_f1_and_its_interval():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 4, (60, 3))
    counts[:, 0] = np.minimum(counts[:, 0], counts[:, 1:].min(axis=1))
    clusters = np.repeat(np.arange(20), 3)
    value, low, high = bootstrap_f1(counts, clusters, Resampling(4000, 10, 0.9, 0))
    right, predicted, true = counts.sum(axis=0)
    assert value == pytest.approx(2 * right / (predicted + true))
    draws = []
    for _ in range(2000):
        chosen = generator.integers(0, 20, 20)
        rows = np.concatenate([counts[clusters == cluster] for cluster in chosen])
        right, predicted, true = rows.sum(axis=0)
        draws.append(2 * right / (predicted + true))
    assert low == pytest.approx(np.quantile(draws, 0.05), abs=0.02)
    assert high == pytest.approx(np.quantile(draws, 0.95), abs=0.02)


# --- data -----------------------------------------------------------------------------------


def task_of(**settings):
    tree = {"train_per_language": 4, "dev_per_language": 2, "test_per_language": 2}
    return load_task(parse_config({"name": "x", "task": tree | settings}, "x").task)


def bio(count, words=("Rome", "sleeps")):
    tags = ["B-LOC", "O"]
    return "\n\n".join(
        "\n".join(f"{word}{row} {tag}" for word, tag in zip(words, tags, strict=True))
        for row in range(count)
    )


def test_files_of_a_users_own(tmp_path):
    for language in ("de", "en"):
        (tmp_path / f"{language}.bio").write_text(bio(9))
    data = task_of(
        name="tagged-files", languages=["de", "en"], train_file=str(tmp_path / "{language}.bio")
    )
    assert data.tag_names == ["O", "B-LOC"]
    assert len(data.train) == 8
    ids = [row for split in (data.train, data.dev, data.test) for row in split["id"].to_pylist()]
    assert len(set(ids)) == 16
    assert set(data.train["language"].to_pylist()) == {"de", "en"}
    with pytest.raises(ValueError, match=r"expected in one file only"):
        task_of(name="tagged-files", languages=["und"], test_file=str(tmp_path / "en.bio"),
                train_file=str(tmp_path / "de.bio"))  # fmt: skip
    with pytest.raises(ValueError, match=r"columns.*text_a"):
        task_of(name="tagged-files", languages=["de"], columns={"text_a": "x"},
                train_file=str(tmp_path / "{language}.bio"))  # fmt: skip
    (tmp_path / "de.bio").write_text("a O\n\n" * 9)
    (tmp_path / "en.bio").write_text("a O\n\n" * 9)
    with pytest.raises(ValueError, match=r"de\.bio.*two tags"):
        task_of(name="tagged-files", languages=["de", "en"],
                train_file=str(tmp_path / "{language}.bio"))  # fmt: skip


def test_treebanks_from_a_folder(tmp_path):
    for treebank in ("en_ewt", "de_gsd"):
        for split in ("train", "dev", "test"):
            lines = [
                f"# sent_id = {row}\n1-2\tzum\t_\t_\t_\t_\t_\t_\t_\t_\n"
                f"1\tzu{row}\t_\tADP\t_\t_\t0\t_\t_\t_\n2\tdem\t_\tDET\t_\t_\t1\t_\t_\t_\n"
                for row in range(5)
            ]
            (tmp_path / f"{treebank}-ud-{split}.conllu").write_text("\n".join(lines))
    data = task_of(name="ud", languages=["en_ewt", "de_gsd"], path=str(tmp_path))
    assert data.tag_names == ["ADP", "DET"]
    assert len(data.train) == 8
    assert data.label_names == ["sentence"]
    with pytest.raises(ValueError, match="expected a file fr_gsd-ud-train"):
        task_of(name="ud", languages=["fr_gsd"], path=str(tmp_path))


def test_corpora_of_the_hub(monkeypatch):
    """Columns as WikiANN and Universal Dependencies have them, numbers named by the features."""
    import datasets

    asked = []

    def load_dataset(repository, name, split):
        asked.append((repository, name, split))
        names = ["O", "B-PER", "I-PER", "_"]
        column = "upos" if "depend" in repository else "ner_tags"
        tags = [[1, 2, 0], [0, 1, 0], [1, 0, 3], [0, 0, 0], [1, 1, 0], [0, 2, 0]]
        tokens = [[f"Ada{row}", "King", "came"] for row in range(len(tags))]
        tokens[3] = ["", " ", "\u200b "]
        feature = datasets.List(datasets.ClassLabel(names=names))
        return datasets.Dataset.from_dict(
            {"tokens": tokens, column: tags, "langs": [["en"] * 3] * len(tags)},
            features=datasets.Features(
                {"tokens": datasets.List(datasets.Value("string")), column: feature,
                 "langs": datasets.List(datasets.Value("string"))}
            ),
        )  # fmt: skip

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("wikiann", "ud"):
        with pytest.warns(UserWarning, match=r"blank words"):
            data = task_of(name=name, languages=["en"])
        assert data.tag_names == ["O", "B-PER", "I-PER"]
        tokens = [words for words in data.train["tokens"].to_pylist() if len(words) == 2]
        assert len(data.train) == 4
        assert all(words[0].startswith("Ada") for words in tokens)
    assert asked[0] == ("unimelb-nlp/wikiann", "en", "train")
    assert ("universal-dependencies/universal_dependencies", "en", "validation") in asked


def test_the_built_in_sentences():
    first, again = (task_of(name="entities", languages=["en", "fr"]) for _ in range(2))
    assert first.train.equals(again.train)
    assert first.tag_names[0] == "O"
    other = task_of(name="entities", languages=["en", "fr"], seed=1)
    assert not first.train.equals(other.train)
    with pytest.raises(ValueError, match=r"languages.*xx"):
        task_of(name="entities", languages=["xx"])
    assert isinstance(first.train, pa.Table)
