"""The control `collect.untrained`: influence of the model before fine-tuning, beside the others."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_study import files_of, tiny_config

import tracmod as tm
from tracmod.config import parse_config
from tracmod.models.digests import model_digest
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.study.context import RunContext
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.run_training import initial_model
from tracmod.validation.integrity import verify

SPLITS = ("train", "test")
VIEWS = {"random": 1, "other": [], "subnetwork_own": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run without the control, and of the same run with it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("untrained")
    without, control = folder / "without", folder / "with"
    for out, untrained in ((without, False), (control, True)):
        run = RunFolder(out, tiny_config(views=VIEWS, collect={"untrained": untrained}))
        with run.locked():
            run_stages(run)
    return without, control


def test_the_control_changes_nothing_of_the_other_models(runs):
    patterns = [f"{kind}/{model}/**/*" for kind in ("features", "influence", "models")
                for model in ("full", "sparse")]  # fmt: skip
    without, control = (files_of(out, *patterns) for out in runs)
    assert len(without) > 50
    assert without == control
    assert verify(runs[1]) == []


def test_the_control_is_the_model_that_fine_tuning_begins_with(runs):
    context = RunContext(RunFolder(runs[1]))
    (checkpoint,) = context.checkpoints("untrained")
    assert (checkpoint.epoch, context.weights([checkpoint])) == (0, [1.0])
    assert model_digest(load_model(checkpoint.path)[0]) == model_digest(initial_model(context)[0])


def test_its_scores_are_those_of_its_gradients(runs):
    out = runs[1]
    model, tokenizer = load_model(out / "models/untrained/checkpoint-0")
    train_table, test_table = (pq.read_table(out / f"data/{name}.parquet") for name in SPLITS)
    train, test = (
        tm.collect_features(model, encode(tokenizer, table, 48), tm.Projection(256))
        for table in (train_table, test_table)
    )
    scores = tm.influence_scores(test, train, normalize="cosine")
    top = pq.read_table(out / "influence/untrained/full/top.parquet").to_pandas()
    for row, test_id in enumerate(test_table.column("id").to_pylist()):
        mine = top[(top.test_id == test_id) & (top.sign == 1)].sort_values("rank")
        np.testing.assert_allclose(mine.score, scores[row].topk(5).values, rtol=1e-4, atol=1e-8)


def test_courses_of_both_fine_tunings_begin_with_it(runs):
    courses = {}
    for out in runs:
        table = pq.read_table(out / "analysis/course.parquet").to_pandas()
        courses[out.name] = table.groupby(["model", "view"])["epoch"].agg(lambda e: sorted(set(e)))
    assert set(map(tuple, courses["without"])) == {(1, 2)}
    assert set(map(tuple, courses["with"])) == {(0, 1, 2)}
    assert set(courses["with"].index) == set(courses["without"].index)
    untrained = pq.read_table(runs[1] / "influence/untrained/full/epochs.parquet").to_pandas()
    table = pq.read_table(runs[1] / "analysis/course.parquet").to_pandas()
    start = table[(table.model == "sparse") & (table["view"] == "full") & (table.epoch == 0)]
    own = untrained[untrained.train_language == untrained.test_language]
    assert dict(zip(start.test_language, start.share_positive, strict=True)) == dict(
        zip(own.test_language, own.share_positive, strict=True)
    )


def test_changes_are_tested_against_it_and_reported(runs):
    summary = json.loads((runs[1] / "analysis/summary.json").read_text())
    pairs = {(entry["model"], entry["view"], entry["base_model"], entry["base_view"]): entry
             for entry in summary["changes"]}  # fmt: skip
    change = pairs["full", "full", "untrained", "full"]["share_positive"]
    assert 0 < change["p_value"] <= 1
    shares = {(entry["model"], entry["view"]): entry["share_positive"]["value"]
              for entry in summary["in_language"]}  # fmt: skip
    difference = shares["full", "full"] - shares["untrained", "full"]
    assert change["value"] == pytest.approx(difference)
    page = (runs[1] / "report/index.html").read_text(encoding="utf-8")
    assert page.count("Before fine-tuning") > page.count("Before fine-tuning,")
    assert "Before fine-tuning" not in (runs[0] / "report/index.html").read_text(encoding="utf-8")


def test_a_metric_that_needs_steps_is_refused():
    tree = {"task": {"name": "grammar", "languages": ["en"], "train_per_language": 4,
                     "dev_per_language": 4, "test_per_language": 4},
            "collect": {"untrained": True, "preconditioner": "adam"}}  # fmt: skip
    with pytest.raises(ValueError, match=r"collect\.untrained.*adam.*true"):
        parse_config(tree, "tree")
