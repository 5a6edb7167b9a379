"""A study whose classifier reads the mean of all tokens, from training to an exported model."""

from __future__ import annotations

import pytest
import torch
from tiny_study import assert_sound_with_own_metagradient, tiny_config
from transformers import AutoModelForSequenceClassification

from tracmod.models.architecture import MEAN_POOLING
from tracmod.models.loading import load_model
from tracmod.study.export import export_subnetwork
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.subnetworks.head_mask import HeadMask


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    config = tiny_config(
        model={"layers": 2, "hidden": 16, "heads": 4, "max_length": 32, "pooling": "mean"},
        metagradient={"checks": [0.1]},
    )
    run = RunFolder(tmp_path_factory.mktemp("mean") / "run", config)
    with run.locked():
        run_stages(run)
    return run


def test_the_run_is_sound_and_its_metagradient_is_of_its_own_training(run):
    assert_sound_with_own_metagradient(run.path)


def test_an_exported_model_is_the_masked_one_for_transformers(run, tmp_path):
    language = run.config.task.languages[0]
    export_subnetwork(run.path, tmp_path / "out", language=language)
    model, tokenizer = load_model(run.path / "models/full/checkpoint-2")
    assert type(model).__name__ == MEAN_POOLING
    exported = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).eval()
    batch = tokenizer(["ein Hund", "der"], padding=True, return_tensors="pt")
    with HeadMask.load(run.path / f"subnetworks/{language}.json").apply(model):
        assert torch.equal(exported(**batch).logits, model(**batch).logits)
