"""`tracmod attribute`: weights of checkpoints and frozen parameters, said and recorded."""

from __future__ import annotations

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from own_model import own_model, own_tokenizer, save_model, write_examples

import tracmod as tm
from tracmod.cli import main

LOWER = "roberta.encoder.layer.0."


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert len(result.output.strip().splitlines()) == 1
    return result.output


@pytest.fixture
def files(tmp_path):
    """The options --train and --query."""
    train = write_examples(tmp_path / "train.tsv", 20)
    return "--train", train, "--query", write_examples(tmp_path / "query.tsv", 4)


def checkpoints(folder, logged, steps=(6, 12), seeds=(0, 1), record=None):
    """Save checkpoints, with a Trainer's log of rates by step, or with tracmod.json."""
    options = []
    for step, seed in zip(steps, seeds, strict=True):
        path = save_model(folder / f"checkpoint-{step}", seed=seed)
        log = [{"step": at, "learning_rate": rate} for at, rate in logged if at <= step]
        state = {"epoch": step / 6, "global_step": step, "log_history": log}
        (path / "trainer_state.json").write_text(json.dumps(state))
        if record is not None:
            tree = {"epoch": step // 6, "step": step, "learning_rate": 0.1} | record
            (path / "tracmod.json").write_text(json.dumps(tree))
        options += ["--checkpoint", path]
    return options


def record_of(out):
    return json.loads((out / "run.json").read_text())


def scores_of(out):
    rows = pq.read_table(out / "top.parquet").to_pylist()
    return {(row["test_id"], row["train_id"]): row["score"] for row in rows if row["sign"] == 1}


def attribute(given, files, out, *more, code=0):
    dim = () if "--exact" in more else ("--projection-dim", 256)
    return invoke("attribute", *given, *files, "--out", out, "-k", 20, *dim, *more, code=code)


def test_what_is_guessed_is_said_and_recorded(files, tmp_path):
    given, out = checkpoints(tmp_path, [(1, 0.4), (2, 0.2)]), tmp_path / "out"
    output = attribute(given, files, out)
    note = "weights of 2 of 2 checkpoints are guesses (checkpoint-6: rates of 2 of 6 steps"
    assert output.count(note) == 2  # before the long part, and at the end
    record = record_of(out)
    assert record["weights"] == pytest.approx([0.3, 0.2])
    sources = [checkpoint["weight_source"] for checkpoint in record["checkpoints"]]
    assert "2 of 6 steps are logged" in sources[0]
    assert "0 of 6 steps are logged; that of step 2 is used" in sources[1]
    assert any(note in sentence for sentence in record["notes"])


def test_rates_of_all_steps_are_no_guess(files, tmp_path):
    given = checkpoints(tmp_path, [(step, 0.1) for step in range(1, 13)])
    assert "logged" not in attribute(given, files, tmp_path / "out")
    assert record_of(tmp_path / "out")["notes"] == []


def test_weights_by_hand_are_used_recorded_and_queried(files, tmp_path):
    given, out = checkpoints(tmp_path, [(1, 0.0)]), tmp_path / "out"
    assert "above 0" in attribute(given, files, out, code=2)
    assert not out.exists()
    output = attribute(given, files, out, "--weights", "0.3,0", "--exact", "--normalize", "none")
    assert "checkpoint-12 has weight 0 and does not count" in output
    assert "guess" not in output
    record = record_of(out)
    assert record["weights"] == record["arguments"]["weights"] == [0.3, 0.0]
    assert [checkpoint["weight_source"] for checkpoint in record["checkpoints"]] == ["given"] * 2
    first = tmp_path / "first"
    alone = ("--exact", "--normalize", "none", "--weights", "1")
    attribute(given[:2], files, first, *alone)
    one = scores_of(first)
    for pair, score in scores_of(out).items():
        assert score == pytest.approx(0.3 * one[pair], rel=1e-4)


def test_queries_use_the_weights_of_the_attribution(files, tmp_path):
    given = checkpoints(tmp_path, [])
    outs = [tmp_path / name for name in ("hand", "uniform", "unknown")]
    attribute(given, files, outs[0], "--weights", "2,1")
    attribute(given, files, outs[1], "--weights", "uniform")
    assert "each has weight 1" in attribute(given, files, outs[2])
    answers = [
        {
            row["id"]: row["score"]
            for row in tm.Attributor(out).query("the cat sleeps", label="no", k=20)["proponents"]
        }
        for out in outs
    ]
    assert answers[1] == answers[2]
    assert max(answers[0].values()) > 2 > max(answers[1].values())
    assert [record_of(out)["weights"] for out in outs] == [[2, 1], [1, 1], [1, 1]]


@pytest.mark.parametrize("weights", ["0.1", "0.1,0.2,0.3"])
def test_another_number_of_weights_than_checkpoints_is_refused(files, tmp_path, weights):
    given = checkpoints(tmp_path, [])
    output = attribute(given, files, tmp_path / "out", "--weights", weights, code=2)
    assert re.search(r"weights: expected 2, .*got [13]", output)


def test_checkpoints_that_do_not_fit_together(files, tmp_path):
    given, out = checkpoints(tmp_path, [], seeds=(0, 0)), tmp_path / "out"
    output = attribute([*given[2:], *given[:2]], files, out, "--weights", "uniform")
    assert "checkpoint-12 and checkpoint-6 have the same tensors" in output
    assert "checkpoint-6 (step 6) is given after checkpoint-12 (step 12)" in output
    assert "twice" in attribute([*given, *given[:2]], files, tmp_path / "other", code=2)


def test_a_checkpoint_with_other_tensors_is_refused_before_the_work(files, tmp_path):
    from safetensors.torch import load_file, save_file

    given = checkpoints(tmp_path, [])
    file = tmp_path / "checkpoint-12" / "model.safetensors"
    tensors = load_file(file) | {"roberta.encoder.layer.0.adapter.down.weight": torch.ones(2, 2)}
    save_file(tensors, file, metadata={"format": "pt"})
    output = attribute(given[:4], files, tmp_path / "out", code=2)
    assert "adapter.down" in output
    assert not (tmp_path / "out").exists()


def gradients_left_out(given, files, tmp_path, names):
    """Return whether exact scores are those of the model without these parameters."""
    out = tmp_path / "exact"
    output = attribute(given, files, out, "--exact", "--normalize", "none", "--weights", "uniform")
    record = record_of(out)
    assert all(set(names) == set(entry["left_out"]) for entry in record["checkpoints"])
    assert f"{len(names)} frozen parameters (not trained) are left out" in output
    assert "--include-frozen" in output
    included = tmp_path / "included"
    more = ("--exact", "--normalize", "none", "--weights", "uniform", "--include-frozen")
    assert "frozen" not in attribute(given, files, included, *more)
    return scores_of(out), scores_of(included)


def expected_scores(folders, files, names):
    from tracmod.models.inputs import encode
    from tracmod.models.loading import load_classifier
    from tracmod.tasks.files import read_model_files

    tables = read_model_files([files[1], files[3]], ["no", "maybe", "yes"])
    train, query = (encode(own_tokenizer(), table, 40) for table in tables)
    total = 0
    for folder in folders:
        model = load_classifier(folder)
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        total = total + tm.exact_influence(model, train, query, include_frozen=not names)
    return total


@pytest.mark.parametrize("known_from", ["record", "equal tensors"])
@pytest.mark.filterwarnings("ignore::tracmod.gradients.capture.FrozenParametersWarning")
def test_parameters_that_training_did_not_move_are_left_out(files, tmp_path, known_from):
    names = [name for name, _ in own_model().named_parameters() if name.startswith(LOWER)]
    record = {"frozen_parameters": names} if known_from == "record" else None
    given = checkpoints(tmp_path, [], record=record)
    if known_from == "equal tensors":
        lower = own_model(seed=5).roberta.encoder.layer[0].state_dict()
        for seed, folder in enumerate(given[1::2]):
            model = own_model(seed=seed)
            model.roberta.encoder.layer[0].load_state_dict(lower)
            model.save_pretrained(folder)
    left_out, included = gradients_left_out(given, files, tmp_path, names)
    for got, chosen in ((left_out, names), (included, [])):
        expected_QN = expected_scores(given[1::2], files, chosen)
        for (query, train), score in got.items():
            row, column = (int(name.split("-")[1]) for name in (query, train))
            assert score == pytest.approx(float(expected_QN[row, column]), rel=1e-3, abs=1e-3)


def test_features_with_and_without_frozen_parameters_do_not_mix(files, tmp_path):
    names = ["roberta.encoder.layer.0.output.dense.weight"]
    given, out = checkpoints(tmp_path, [], record={"frozen_parameters": names}), tmp_path / "out"
    attribute(given, files, out)
    assert "frozen" in attribute(given, files, out, "--include-frozen", code=2)
    for folder in given[1::2]:
        (folder / "tracmod.json").unlink()
    assert "frozen" in attribute(given, files, out, "--weights", "uniform", code=2)


def test_a_model_alone_and_check_use_the_record(files, tmp_path):
    names = [name for name, _ in own_model().named_parameters() if name.startswith(LOWER)]
    model = checkpoints(tmp_path, [], record={"frozen_parameters": names})[1]
    assert "frozen" in attribute(["--model", model], files, tmp_path / "out")
    assert record_of(tmp_path / "out")["checkpoints"][0]["left_out"] == names
    check = ["check", "--model", model, "--data", files[1], "--parameters", "encoder"]
    with pytest.warns(UserWarning, match="frozen parameters"):
        fewer = invoke(*check)
    assert fewer != invoke(*check, "--include-frozen")
    answer = tm.Attributor(tmp_path / "out").query("the cat sleeps", k=2)
    assert len(answer["proponents"]) == 2


def test_a_training_of_other_parameters_than_the_selected_is_refused(files, tmp_path):
    names = [name for name, _ in own_model().named_parameters() if "classifier" in name]
    given = checkpoints(tmp_path, [], record={"frozen_parameters": names})
    more = ("--parameters", "classifier")
    output = attribute(given, files, tmp_path / "out", *more, code=2)
    assert re.search(r"checkpoint-6: parameters 'classifier'.*frozen", output)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "checkpoint-6")
