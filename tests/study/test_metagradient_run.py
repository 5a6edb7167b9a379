"""The stage `metagradient`: tables, checks, and the function for groups of test examples."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from tiny_study import files_of, tiny_config

import tracmod as tm
from tracmod.config import RunConfig
from tracmod.study.context import RunContext
from tracmod.study.pipeline import run_stages
from tracmod.study.plan import plan_run
from tracmod.study.run_folder import RunFolder
from tracmod.study.run_metagradient import open_run_replay, quantities_of
from tracmod.study.stages import metagradient as stage
from tracmod.training.batch_mean import WeightedMean
from tracmod.training.metagradient import evaluate
from tracmod.validation.integrity import verify

LANGUAGES = ["en", "de", "es"]
OPTIONS = {"examples": ["en-test-0"], "checks": [0.05, 0.5], "path_points": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with both models trained and differentiated."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("metagradient") / "run"
    run = RunFolder(folder, tiny_config())
    run_stages(run, ["data", "finetune", "prune", "sparse-finetune"])
    for name in run.stages[4:]:  # nothing of these is read
        with run.stage(name):
            pass
    test_id = pq.read_table(run.data("test"))["id"][0].as_py()
    config = tiny_config(metagradient=OPTIONS | {"examples": [test_id]})
    run = RunFolder(folder, config)
    with run.locked():
        run_stages(run, ["metagradient"])
    return run


@pytest.mark.parametrize("model", ["full", "sparse"])
def test_the_matrix_has_all_quantities_and_its_sums_by_language(model, run):
    train, test = (pq.read_table(run.data(split)).to_pandas() for split in ("train", "test"))
    matrix = pq.read_table(run.metagradient / f"{model}.parquet").to_pandas()
    assert list(matrix.columns) == ["train_id", "train_language", *LANGUAGES, test.id[0]]
    assert list(matrix.train_id) == list(train.id)
    sums = pq.read_table(run.metagradient / "languages.parquet").to_pandas()
    sums = sums[sums.model == model].set_index(["quantity", "train_language"])
    for quantity in LANGUAGES:
        for language in LANGUAGES:
            own = matrix[quantity][matrix.train_language == language]
            row = sums.loc[quantity, language]
            assert row.influence == pytest.approx(own.sum())
            assert row.mean_influence == pytest.approx(own.mean())
            assert row.num_train == len(own)
    strongest = pq.read_table(run.metagradient / "strongest.parquet").to_pandas()
    for sign, ascending in (("positive", False), ("negative", True)):
        rows = strongest[(strongest.model == model) & (strongest.sign == sign)]
        rows = rows[rows.quantity == "de"]
        values = matrix.de.sort_values(ascending=ascending, kind="stable")
        assert list(rows.influence) == pytest.approx(list(values[:5]))
        assert list(rows["rank"]) == [1, 2, 3, 4, 5]
        assert list(rows.train_id) == list(matrix.train_id[values.index[:5]])


@pytest.mark.parametrize("model", ["full", "sparse"])
def test_the_matrix_agrees_with_trainings_of_slightly_other_weights(model, run):
    """In float32, so the step is large and the agreement not that of the float64 tests."""
    context = RunContext(run)
    matrix = pq.read_table(run.metagradient / f"{model}.parquet").to_pandas()
    quantities = quantities_of(context, model, None)
    direction_N = torch.randn(len(matrix), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in (0.02, -0.02):
        mean = WeightedMean(step * direction_N, "fixed")
        with open_run_replay(context, model, mean) as replay:
            for number in range(replay.total_steps):
                replay.advance(number)
            losses.append(evaluate(replay, quantities))
    actual_K = ((losses[0] - losses[1]) / 0.04).numpy()
    predicted_K = -matrix[LANGUAGES].to_numpy().T @ direction_N.numpy()
    assert np.abs(actual_K - predicted_K).max() < 0.1 * np.abs(actual_K).max()


@pytest.mark.parametrize("model", ["full", "sparse"])
def test_paths_foretell_trainings_without_a_language(model, run):
    context = RunContext(run)
    quantities = quantities_of(context, model, None)
    languages_N = np.array(context.example_languages("train"))
    left_out = pq.read_table(run.metagradient / "left_out.parquet").to_pandas()
    left_out = left_out[left_out.model == model].set_index(["train_language", "quantity"]).change
    slopes = pq.read_table(run.metagradient / "path.parquet").to_pandas()
    slopes = slopes[(slopes.model == model) & (slopes.train_language == "de")]
    assert slopes.weight.round(3).unique().tolist() == [0.789, 0.211]
    losses = []
    for removed in (1.0, 0.0):
        mean = WeightedMean(torch.from_numpy(-removed * (languages_N == "de")), "fixed")
        with open_run_replay(context, model, mean) as replay:
            for number in range(replay.total_steps):
                replay.advance(number)
            losses.append(evaluate(replay, quantities))
    actual_K = (losses[0] - losses[1]).numpy()
    assert np.abs(left_out["de"][LANGUAGES] - actual_K).max() < 0.1 * np.abs(actual_K).max()


def test_a_path_of_ones_own_has_the_slopes_of_the_stage(run):
    train = pq.read_table(run.data("train")).to_pandas()
    slopes = pq.read_table(run.metagradient / "path.parquet").to_pandas()
    row = slopes[(slopes.model == "full") & (slopes.train_language == "es")].iloc[0]
    spanish = train.id[train.language == "es"]
    influence = tm.metagradient(run.path, weights=dict.fromkeys(spanish, row.weight)).to_pandas()
    own = influence[influence.train_language == "es"]
    assert own[row.quantity].sum() == pytest.approx(row.slope, rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "argument"),
    [({"no id": 0.5}, "weights.*no id"), (None, "weights.*-0.5"), ([0.5], "weights.*0.5")],
)
def test_wrong_weights_are_refused(weights, argument, run):
    first = pq.read_table(run.data("train"))["id"][0].as_py()
    with pytest.raises(ValueError, match=argument):
        tm.metagradient(run.path, weights={first: -0.5} if weights is None else weights)


def test_the_summary_has_the_measured_properties(run):
    summary = json.loads((run.metagradient / "summary.json").read_text())
    checks = pq.read_table(run.metagradient / "checks.parquet").to_pandas()
    metrics = json.loads((run.model("full") / "metrics.json").read_text())
    assert len(checks) == 2 * 3 * 4
    for model in ("full", "sparse"):
        measured = summary["models"][model]
        assert measured["steps"] == (metrics[-1]["step"] if model == "full" else 12)
        assert measured["gradient_difference"] < 1e-3
        assert set(measured["relative_error"]) == {"0.05", "0.5"}
        assert measured["verdict"]
        of_share = checks[(checks.model == model) & (checks.share == 0.05)]
        removed, small = (of_share[of_share.removed == removed] for removed in (1.0, 0.1))
        for rows, expected in (
            (removed, measured["relative_error"]["0.05"]),
            (small, measured["relative_error_of_small_change"]),
        ):
            error = np.linalg.norm(rows.actual - rows.predicted)
            assert expected == pytest.approx(error / np.linalg.norm(rows.actual))
        assert small.predicted.to_numpy() == pytest.approx(0.1 * removed.predicted.to_numpy())
        # Of the change of the weights of two examples by a tenth, derivatives foretell most.
        assert measured["relative_error_of_small_change"] < 0.2
        norms = pq.read_table(run.metagradient / "adjoint.parquet").to_pandas()
        norms = norms[(norms.model == model) & (norms.quantity == "es")]
        growth = norms.norm.iloc[0] / norms.norm.iloc[-1]
        assert measured["adjoint_growth"]["es"] == pytest.approx(growth)
        assert list(norms.steps_taken) == list(range(measured["steps"] + 1))
        assert 1 < measured["trainings"] < 100
    assert verify(run.path) == []


def test_only_what_is_missing_is_computed_again(run, monkeypatch):
    before = files_of(run.path, "metagradient/*")

    def fail(*_):
        raise AssertionError("it is there already")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "differentiate", fail)
        patch.setattr(stage, "open_run_replay", fail)
        run_stages(run, ["metagradient"], again="metagradient")
    assert files_of(run.path, "metagradient/*") == before


def test_retraining_judges_the_metagradient_with_the_same_batches(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    retrain = {"batches": "same", "fraction": 0.9, "subsets": 3, "other_fractions": {0.5: 2},
               "seeds": 1, "removed": 0, "methods": ["metagradient", "random"]}  # fmt: skip
    config = run.config.model_dump(mode="json") | {"retrain": retrain}
    copy = RunFolder(tmp_path / "run", RunConfig.model_validate(config))
    with copy.locked():
        run_stages(copy, ["retrain"])
    losses = pq.read_table(copy.retraining / "losses.parquet").to_pandas()
    after = losses.groupby(["set", "test_language"]).loss.mean()
    summary = json.loads((run.metagradient / "summary.json").read_text())["models"]["full"]
    assert list(after["all"][LANGUAGES]) == pytest.approx(summary["loss"][:3], rel=1e-6)

    context = RunContext(copy)
    weights_N = torch.tensor([-float(name == "de") for name in context.example_languages("train")])
    with open_run_replay(context, "full", WeightedMean(weights_N, "fixed")) as replay:
        for number in range(replay.total_steps):
            replay.advance(number)
        expected = evaluate(replay, quantities_of(context, "full", None)).tolist()
    assert list(after["without language de"][LANGUAGES]) == pytest.approx(expected, rel=1e-6)
    assert list(after["all"][LANGUAGES]) != pytest.approx(expected, rel=1e-5)

    cells = pq.read_table(copy.retraining / "leave_one_out.parquet").to_pandas()
    cells = cells[cells.method == "metagradient"].set_index(["test_language", "train_language"])
    sums = pq.read_table(run.metagradient / "languages.parquet").to_pandas()
    sums = sums[sums.model == "full"].set_index(["quantity", "train_language"]).influence
    for pair, predicted in cells.predicted.items():
        assert predicted == pytest.approx(sums[pair], rel=1e-4, abs=1e-7)

    lds, fractions = (
        pq.read_table(copy.retraining / f"{name}.parquet").to_pandas()
        for name in ("lds", "fractions")
    )
    assert list(fractions.fraction.unique()) == [0.9, 0.5]
    own = fractions[fractions.fraction == 0.9].drop(columns="fraction").reset_index(drop=True)
    pd.testing.assert_frame_equal(own, lds)
    left_out = pq.read_table(copy.retraining / "left_out.parquet").to_pandas()
    assert (left_out["set"] == "subset 4").sum() == 18


def test_groups_of_test_examples_are_means_of_their_influence(run):
    test = pq.read_table(run.data("test"))
    first, second = test["id"].to_pylist()[0], test["id"].to_pylist()[-1]
    table = tm.metagradient(run.path, {"a": [first], "both": [first, second], "b": [second]})
    a, both, b = (table[name].to_numpy() for name in ("a", "both", "b"))
    np.testing.assert_allclose(both, (a + b) / 2, rtol=1e-3, atol=1e-6)
    matrix = pq.read_table(run.metagradient / "full.parquet")
    np.testing.assert_allclose(a, matrix[first].to_numpy(), rtol=1e-3, atol=1e-6)
    for group, got in (([], "none"), ([first, "no-such-id"], "no-such-id")):
        with pytest.raises(ValueError, match=rf"group x.*{got}"):
            tm.metagradient(run.path, {"x": group})


def test_a_run_without_models_is_refused(tmp_path):
    run = RunFolder(tmp_path, tiny_config())
    run_stages(run, ["data"])
    with pytest.raises(ValueError, match=r"full.*finetune"):
        tm.metagradient(tmp_path)


def test_the_plan_counts_quantities_and_trainings(tmp_path):
    config = tiny_config(metagradient={"models": ["full"], "checks": [0.1]})
    plan = plan_run(RunFolder(tmp_path / "run", config))
    work = next(stage.work for stage in plan.stages if stage.stage == "metagradient")
    assert "3 quantities" in work
    assert f"{2 * 3 + 3 + 2} trainings" in work
