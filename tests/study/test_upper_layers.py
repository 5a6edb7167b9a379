"""A study that trains the highest layer only has the influence of what its training moved."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_study import assert_sound_with_own_metagradient, tiny_config

import tracmod as tm
from tracmod.features.store import FeatureStore
from tracmod.models.checkpoints import recorded_frozen
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder

UPPER = ["*.layer.1.*", "classifier.*"]  # of two layers


pytestmark = pytest.mark.filterwarnings("error::tracmod.gradients.capture.FrozenParametersWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    config = tiny_config(
        finetune={"train_layers": 1},
        collect={"untrained": True},
        metagradient={"checks": [0.1]},
    )
    run = RunFolder(tmp_path_factory.mktemp("upper") / "run", config)
    with run.locked():
        run_stages(run)
    return run


@pytest.mark.parametrize("checkpoint", ["full/checkpoint-1", "sparse/checkpoint-2"])
def test_layers_below_are_those_of_the_model_before_training(run, checkpoint):
    first, _ = load_model(run.path / "models/untrained/checkpoint-0")
    last, _ = load_model(run.path / "models" / checkpoint)
    weights, later = first.state_dict(), last.state_dict()
    same = {name for name in weights if torch.equal(weights[name], later[name])}
    # Heads of the upper layer that are in no subnetwork stay, too.
    others = {name for name in same if ".attention." in name and ".layer.1." in name}
    assert not others or checkpoint.startswith("sparse")
    below = {name for name in weights if ".embeddings." in name or ".layer.0." in name}
    assert same - others == below


@pytest.mark.parametrize("model_name", ["full", "sparse", "untrained"])
def test_features_are_those_of_the_parameters_that_training_moves(run, model_name):
    epoch = 0 if model_name == "untrained" else 2
    checkpoint = run.path / f"models/{model_name}/checkpoint-{epoch}"
    assert all(".embeddings." in n or ".layer.0." in n for n in recorded_frozen(checkpoint))
    model, tokenizer = load_model(checkpoint)
    table = pq.read_table(run.path / "data/train.parquet")
    examples = encode(tokenizer, table, 48)
    model.requires_grad_(True)
    expected = tm.collect_features(model, examples, tm.Projection(256), UPPER)
    (folder,) = run.path.glob(f"features/{model_name}/full/checkpoint-{epoch}/train")
    np.testing.assert_allclose(FeatureStore.open(folder).read(), expected, rtol=1e-5, atol=1e-7)


def test_the_run_is_sound_and_its_metagradient_is_of_its_own_training(run):
    assert_sound_with_own_metagradient(run.path)
