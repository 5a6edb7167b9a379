"""Where the learning rate of a checkpoint comes from, and checkpoints that do not fit together."""

from __future__ import annotations

import json

import pytest
import torch
from encoders import tiny_encoder
from safetensors.torch import load_file, save_file

from tracmod.models.checkpoints import (
    freeze,
    load_checkpoints,
    recorded_frozen,
    training_conflicts,
)
from tracmod.models.weight_files import equal_pairs, tensor_digests, unmoved


def trainer_folder(path, step, logged, epoch=None, version="5.0.0"):
    """Write the state of a Trainer that logged these rates by step."""
    path.mkdir(parents=True)
    log = [{"step": at, "loss": 0.5, "learning_rate": rate} for at, rate in logged if at <= step]
    state = {"epoch": step / 6 if epoch is None else epoch, "global_step": step, "log_history": log}
    (path / "trainer_state.json").write_text(json.dumps(state))
    (path / "config.json").write_text(json.dumps({"transformers_version": version}))
    return path


def recorded_folder(path, **record):
    path.mkdir(parents=True)
    (path / "tracmod.json").write_text(json.dumps({"epoch": 1, "step": 6} | record))
    return path


def training(tmp_path, logged, steps=(6, 12, 18), **settings):
    return [trainer_folder(tmp_path / f"checkpoint-{at}", at, logged, **settings) for at in steps]


def test_a_rate_is_a_guess_unless_every_step_is_logged(tmp_path):
    logged = [(step, step / 10) for step in (1, 2, 3, 4, 5, 6, 7, 9)]
    whole, some, none = load_checkpoints(training(tmp_path, logged))
    assert (whole.learning_rate, whole.is_guess) == (pytest.approx(0.35), False)
    assert "rates of 6 of 6 steps are logged" in whole.rate_source
    assert (some.learning_rate, some.is_guess) == (pytest.approx(0.8), True)
    assert "rates of 2 of 6 steps are logged" in some.rate_source
    assert (none.learning_rate, none.is_guess) == (pytest.approx(0.9), True)
    assert "rates of 0 of 6 steps are logged; that of step 9 is used" in none.rate_source


def test_nothing_known_is_a_guess(tmp_path):
    for checkpoint in load_checkpoints(training(tmp_path, [])):
        assert (checkpoint.learning_rate, checkpoint.is_guess) == (None, True)


@pytest.mark.parametrize(("version", "late"), [("4.50.3", True), ("4.51.0", False), ("5.1", False)])
def test_old_trainers_logged_the_rate_of_the_step_after(tmp_path, version, late):
    """transformers#36973; the version of a checkpoint is in its config."""
    logged = [(step, 0.1) for step in range(1, 19)]
    for checkpoint in load_checkpoints(training(tmp_path, logged, version=version)):
        assert checkpoint.is_guess == late
        assert ("the rate of the step after" in checkpoint.rate_source) == late


def test_a_recorded_rate_is_exact_for_the_steps_that_it_is_of(tmp_path):
    first = recorded_folder(tmp_path / "a", learning_rate=0.2, steps=6)
    far = recorded_folder(tmp_path / "b", learning_rate=0.1, steps=6, step=18)
    exact, guess = load_checkpoints([first, far])
    assert (exact.is_guess, guess.is_guess) == (False, True)
    assert "6 steps is recorded for 12 steps" in guess.rate_source


def test_a_checkpoint_given_twice_is_refused(tmp_path):
    folder = trainer_folder(tmp_path / "checkpoint-6", 6, [])
    (tmp_path / "link").symlink_to(folder)
    for again in (folder, tmp_path / "link", tmp_path / "." / "x" / ".." / "checkpoint-6"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"checkpoint.* twice"):
            load_checkpoints([folder, again])


@pytest.mark.parametrize("rate", ["1e-4", None, True, float("nan"), float("inf"), 10**400])
def test_rates_that_are_no_numbers_are_refused_with_their_file(tmp_path, rate):
    (folder,) = training(tmp_path, [(3, rate)], steps=(6,))
    with pytest.raises(ValueError, match=r"trainer_state\.json.*learning_rate.*number"):
        load_checkpoints([folder])


def test_checkpoints_of_one_training_have_no_conflicts(tmp_path):
    logged = [(step, 0.1) for step in (1, 5, 6, 12, 13)]
    assert training_conflicts(training(tmp_path, logged)) == []
    # Saved in the middle of epochs, which are rounded.
    steps = (2, 3, 5, 8, 11, 14, 18, 21)
    assert training_conflicts(training(tmp_path / "fractions", logged, steps)) == []


def test_checkpoints_that_are_not_of_one_training_are_named(tmp_path):
    first, second, third = training(tmp_path / "a", [(1, 0.1)])
    (other,) = training(tmp_path / "b", [(1, 0.2)], steps=(12,))
    assert "logs" in training_conflicts([first, other])[0]
    assert "both are of step 12" in training_conflicts([first, second, other])[0]
    assert "is given after checkpoint-18" in training_conflicts([first, third, second])[0]
    one = recorded_folder(tmp_path / "one", step=10, learning_rate=0.1)
    fast = recorded_folder(tmp_path / "fast", step=11, epoch=3, learning_rate=0.1)
    assert "epochs are 1 at step 10, 3 at step 11" in training_conflicts([one, fast])[0]


def test_tensors_that_no_training_moved_are_the_same_at_all_checkpoints(tmp_path):
    folders = []
    for number in range(3):
        model = tiny_encoder("bert", number)
        model.bert.encoder.layer[0].load_state_dict(
            tiny_encoder("bert", 9).bert.encoder.layer[0].state_dict()
        )
        torch.nn.init.zeros_(model.classifier.bias)  # as at the start of every training
        model.save_pretrained(tmp_path / str(number), max_shard_size="40KB" if number else "1GB")
        folders.append(tmp_path / str(number))
    assert not (folders[1] / "model.safetensors").exists()
    digests = [tensor_digests(folder) for folder in folders]
    expected = {f"bert.encoder.layer.0.{n}" for n in model.bert.encoder.layer[0].state_dict()}
    assert set(unmoved(digests)) == expected
    assert equal_pairs(digests) == []
    assert unmoved([digests[0]] * 2) == unmoved(digests[:1]) == []
    assert equal_pairs([digests[0], digests[1], digests[0]]) == [(0, 2)]


def test_a_changed_dtype_is_another_tensor(tmp_path):
    for name, dtype in (("a", torch.float32), ("b", torch.int32)):
        (tmp_path / name).mkdir()
        tensors = {"x": torch.arange(3).to(dtype), "y": torch.zeros(0), "z": torch.tensor(1.0)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    first, second = (tensor_digests(tmp_path / name) for name in "ab")
    assert first["x"] != second["x"]
    assert load_file(tmp_path / "a" / "model.safetensors")["x"].dtype == torch.float32


def test_frozen_names_are_read_and_applied(tmp_path):
    folder = recorded_folder(
        tmp_path / "a", learning_rate=0.1, frozen_parameters=["classifier.bias"]
    )
    (checkpoint,) = load_checkpoints([folder])
    assert checkpoint.frozen == recorded_frozen(folder) == ("classifier.bias",)
    assert recorded_frozen(tmp_path) == ()
    model = tiny_encoder("bert")
    freeze(model, checkpoint.frozen, folder)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["classifier.bias"]
    with pytest.raises(ValueError, match=r"frozen_parameters.*nonsense"):
        freeze(model, ["nonsense"], folder)
    bad = recorded_folder(tmp_path / "b", learning_rate=0.1, frozen_parameters="classifier")
    with pytest.raises(ValueError, match=r"tracmod\.json.*frozen_parameters"):
        load_checkpoints([bad])
