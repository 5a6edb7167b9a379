"""`tracmod attribute`, `query` and `check` with losses other than plain cross entropy."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from own_model import LABELS, TEXTS, own_tokenizer, save_model, write_examples
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

import tracmod as tm
from tracmod.cli import main
from tracmod.models.inputs import encode
from tracmod.tasks.files import read_model_files

TRAIN, QUERY = 9, 3


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def attribute(out, files, *options, code=0):
    size = ("-k", TRAIN, "--normalize", "none")
    return invoke("attribute", *files, "--out", out, *size, *options, code=code)


def scores_of(out):
    """Read the (Q, N) scores from a top.parquet that has all training examples."""
    rows = [row for row in pq.read_table(out / "top.parquet").to_pylist() if row["sign"] == 1]
    scores_QN = torch.full((QUERY, TRAIN), torch.nan)
    for row in rows:
        query, train = (int(row[name].split("-")[1]) for name in ("test_id", "train_id"))
        scores_QN[query, train] = row["score"]
    return scores_QN


def gradients(model_dir, files, loss, kind="cross_entropy"):
    """Compute gradients of one example at a time in float64, of the train and the query file."""
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).double().eval()
    names = list(LABELS)
    sides = []
    for table, function in zip(
        read_model_files(files[1::2], names, loss_kind=kind), loss, strict=True
    ):
        rows = []
        for example in encode(own_tokenizer(), table, 40):
            labels = torch.tensor([example.pop("labels")])
            labels = labels.double() if labels.is_floating_point() else labels
            logits = model(**{name: torch.tensor([ids]) for name, ids in example.items()}).logits
            selected = [p for name, p in model.named_parameters() if ".embeddings." not in name]
            row = torch.autograd.grad(function(logits, labels), selected)
            rows.append(torch.cat([gradient.flatten() for gradient in row]))
        sides.append(torch.stack(rows))
    return sides


def assert_scores(out, model_dir, files, train_loss, query_loss, kind="cross_entropy"):
    train_NP, query_QP = gradients(model_dir, files, (train_loss, query_loss), kind)
    expected = query_QP @ train_NP.T
    size = float(expected.abs().max())
    torch.testing.assert_close(scores_of(out).double(), expected, rtol=1e-4, atol=1e-5 * size)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    train = write_examples(folder / "train.tsv", TRAIN)
    return "--train", train, "--query", write_examples(folder / "query.tsv", QUERY)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A model with several labels per text, and files of names and of vectors."""
    folder = tmp_path_factory.mktemp("several")
    model = save_model(folder / "model", problem_type="multi_label_classification")
    sets = [[], ["no"], ["maybe", "yes"], ["no", "maybe", "yes"]]
    for name, count in (("train", TRAIN), ("query", QUERY)):
        rows = [
            {"id": f"{name}-{row}", "language": "en", "text_a": TEXTS[row % 4],
             "label": sets[row % 4]}
            for row in range(count)
        ]  # fmt: skip
        vectors = [
            row | {"label": [int(label in row["label"]) for label in LABELS]} for row in rows
        ]
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        pq.write_table(pa.Table.from_pylist(vectors), folder / f"{name}.parquet")
    return model, folder


def record_loss(model_dir, folder, loss):
    """Copy a model as a checkpoint whose tracmod.json records a loss."""
    shutil.copytree(model_dir, folder)
    state = {"epoch": 1, "step": 1, "learning_rate": 1.0, "loss": loss}
    (folder / "tracmod.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize("recorded", [True, False])
def test_scores_follow_label_smoothing(tmp_path, files, recorded):
    model = save_model(tmp_path / "model")
    loss = {"kind": "cross_entropy", "label_smoothing": 0.3}
    checkpoint = record_loss(model, tmp_path / "checkpoint-1", loss if recorded else None)
    options = () if recorded else ("--label-smoothing", 0.3)
    output = attribute(tmp_path / "out", files, "--checkpoint", checkpoint, "--exact", *options)
    assert "label smoothing 0.3" in output

    def smoothed(logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.3)

    assert_scores(tmp_path / "out", model, files, smoothed, F.cross_entropy)
    record = json.loads((tmp_path / "out/run.json").read_text())["loss"]
    assert record["train"] == loss
    assert record["query"] == {"kind": "cross_entropy"}
    assert record["origin"] == ("recorded in tracmod.json" if recorded else "stated")


def test_scores_follow_class_weights_and_features_agree(tmp_path, files):
    model = save_model(tmp_path / "model")
    weights = ("--class-weights", "yes=5,no=1,maybe=0.5")
    attribute(tmp_path / "exact", files, "--model", model, "--exact", *weights)

    def weighted(logits, labels):
        weight = logits.new_tensor([1, 0.5, 5])
        return F.cross_entropy(logits, labels, weight=weight, reduction="sum")

    assert_scores(tmp_path / "exact", model, files, weighted, F.cross_entropy)
    attribute(tmp_path / "out", files, "--model", model, "--projection-dim", 20000, *weights)
    expected = scores_of(tmp_path / "exact")
    size = float(expected.abs().max())
    torch.testing.assert_close(scores_of(tmp_path / "out"), expected, rtol=0.1, atol=0.1 * size)


@pytest.mark.parametrize("kind", ["exact", "features"])
def test_what_was_made_with_another_loss_is_not_taken_over(tmp_path, files, kind):
    model = ("--model", save_model(tmp_path / "model"))
    options = ("--exact",) if kind == "exact" else ("--projection-dim", 256)
    attribute(tmp_path / "out", files, *model, *options)
    output = attribute(tmp_path / "out", files, *model, *options, "--label-smoothing", 0.1, code=2)
    assert "loss" in output
    attribute(tmp_path / "out", files, *model, *options, "--loss", "cross_entropy")


def test_records_and_statements_that_contradict_are_refused(tmp_path, files):
    model = save_model(tmp_path / "model")
    one = record_loss(model, tmp_path / "one", {"kind": "cross_entropy", "label_smoothing": 0.1})
    two = record_loss(model, tmp_path / "two", {"kind": "cross_entropy"})
    own = record_loss(model, tmp_path / "own", {"kind": "function", "name": "my.focal"})
    for options, message in (
        (("--checkpoint", one, "--checkpoint", two), "label smoothing 0.1"),
        (("--checkpoint", one, "--label-smoothing", 0.2), "label smoothing 0.2"),
        (("--checkpoint", own), "my.focal"),
        (("--model", model, "--class-weights", "no=1,yes=2"), "maybe"),
        (("--model", model, "--label-smoothing", 2), "label-smoothing"),
        (("--model", model, "--loss", "squared_error", "--label-smoothing", 0.1), "squared_error"),
    ):
        output = attribute(tmp_path / "out", files, *options, code=2)
        assert message in output
        assert not (tmp_path / "out").exists()
    assert "my.focal" in invoke("check", "--model", own, "--data", files[1], code=2)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_several_labels_per_text(tmp_path, several, form):
    model, folder = several
    files = ("--train", folder / f"train.{form}", "--query", folder / f"query.{form}")
    attribute(tmp_path / "out", files, "--model", model, "--exact")

    def own(logits, labels):
        return F.binary_cross_entropy_with_logits(logits, labels)

    assert_scores(tmp_path / "out", model, files, own, own, "binary_cross_entropy")
    examples = pq.read_table(tmp_path / "out/examples.parquet").to_pylist()
    label_of = {row["test_id"]: row["test_label"] for row in examples}
    assert label_of == {"query-0": [0, 0, 0], "query-1": [1, 0, 0], "query-2": [0, 1, 1]}
    assert all(set(row["test_prediction"]) <= {0, 1} for row in examples)
    assert "ok" in invoke("check", "--model", model, "--data", files[1])


def test_queries_with_several_labels(tmp_path, several):
    model, folder = several
    files = ("--train", folder / "train.jsonl", "--query", folder / "query.parquet")
    out = tmp_path / "out"
    attribute(out, files, "--model", model, "--projection-dim", 512)
    answer = tm.Attributor(out).query(TEXTS[0], label="maybe, yes")
    assert answer["label"] == "maybe, yes"
    assert set(answer["probabilities"]) == set(LABELS)
    predicted = tm.Attributor(out).query(TEXTS[0])
    assert predicted["label"] == predicted["prediction"]
    assert "unknown" in invoke("query", out, TEXTS[0], "--label", "unknown", code=2)


def test_labels_that_are_no_lists_are_refused_with_their_line(tmp_path, several, files):
    model, folder = several
    good = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    for label in ("no", 1, ["no", "never"], ["no", "no"], [0, 1], [0, 1, 2], [0, 1, None], [[1]]):
        lines = [json.dumps(good | {"id": str(row), "label": value})
                 for row, value in enumerate(([], label))]  # fmt: skip
        (tmp_path / "bad.jsonl").write_text("\n".join(lines))
        output = invoke("check", "--model", model, "--data", tmp_path / "bad.jsonl", code=2)
        assert "bad.jsonl:2" in output
        assert "multi_label_classification" in output
    assert "multi_label" in attribute(tmp_path / "out", files, "--model", model, code=2)


def test_lists_of_class_numbers_have_the_names_of_the_schema(tmp_path):
    features = {"label": {"feature": {"names": ["yes", "no", "maybe"], "_type": "ClassLabel"},
                          "_type": "List"}}  # fmt: skip
    rows = [{"id": "0", "language": "en", "text_a": "a", "label": [0, 1]}]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "named.parquet")
    (read,) = read_model_files(
        [tmp_path / "named.parquet"], LABELS, loss_kind="binary_cross_entropy"
    )
    assert read["label"].to_pylist() == [[1, 0, 1]]


def test_several_targets(tmp_path):
    model = save_model(tmp_path / "model", problem_type="regression")
    paths = []
    for name, count in (("train", TRAIN), ("query", QUERY)):
        lines = [
            json.dumps({"id": f"{name}-{row}", "language": "en", "text_a": TEXTS[row % 4],
                        "label": [row / 7, -1, 2.5]})
            for row in range(count)
        ]  # fmt: skip
        paths += [f"--{name}", tmp_path / f"{name}.jsonl"]
        paths[-1].write_text("\n".join(lines))
    attribute(tmp_path / "out", paths, "--model", model, "--exact")
    assert_scores(tmp_path / "out", model, paths, F.mse_loss, F.mse_loss, "squared_error")
    attribute(tmp_path / "features", paths, "--model", model, "--projection-dim", 256)
    answer = tm.Attributor(tmp_path / "features").query(TEXTS[1], label="0.5,1,-2")
    assert answer["label"] == "0.5, 1, -2"
    assert "3 finite numbers" in invoke(
        "query", tmp_path / "features", TEXTS[1], "--label", "0.5", code=2
    )
    assert "ok" in invoke("check", "--model", model, "--data", paths[1])


def test_a_query_of_a_regression_says_what_it_explains(tmp_path):
    model = save_model(tmp_path / "model", num_labels=1)
    names = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config = json.loads((model / "config.json").read_text()) | names
    (model / "config.json").write_text(json.dumps(config))
    train = write_examples(tmp_path / "train.tsv", TRAIN, ("0.25", "-2.75", "1"))
    out = tmp_path / "out"
    attribute(out, ("--train", train, "--query", train), "--model", model, "--projection-dim", 256)
    output = invoke("query", out, TEXTS[0])
    answer = tm.Attributor(out).query(TEXTS[0])
    assert float(answer["label"]) == round(answer["output"])
    assert f"the target {answer['label']}, the output {answer['output']} rounded" in output
    assert "rounded" not in invoke("query", out, TEXTS[0], "--label", "0.25")
    examples = pq.read_table(out / "examples.parquet")
    assert {examples.schema.field(name).type for name in ("test_label", "test_prediction")} == {
        pa.float64()
    }
