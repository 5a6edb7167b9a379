"""The stage `retrain`: its trainings, scores, report, plan and errors, and resuming it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from tiny_study import files_of, tiny_config

import tracmod as tm
from tracmod.choices import Method
from tracmod.cli import main
from tracmod.engine.local import LocalEngine
from tracmod.models.digests import model_digest
from tracmod.models.inputs import encode
from tracmod.models.loading import load_classifier, load_model
from tracmod.models.loss import per_example_loss
from tracmod.models.plain_pass import predict
from tracmod.report.wording.retraining import METHOD_NAMES, sentences
from tracmod.study.context import RunContext
from tracmod.study.pipeline import run_stages
from tracmod.study.plan import plan_run
from tracmod.study.retrain_scores import METHODS, method_scores, methods_of
from tracmod.study.run_folder import RunFolder
from tracmod.study.run_training import fine_tune_on
from tracmod.study.stage_table import STAGE_NAMES
from tracmod.study.stages.retrain import count_trainings
from tracmod.study.status import run_status
from tracmod.validation.integrity import verify
from tracmod.validation.retraining import ALL, HALF_OF_SEEDS, language_set, subset_set

BARE = {
    "views": {"subnetwork": False, "random": 0, "other": []},
    "prune": {"step": 1.0},
    "finetune": {"save_seconds": 0.01},  # so that a training can be killed in its middle
}
SMALL = {"subsets": 2, "seeds": 1, "methods": ["tracin"], "random_removals": 1}
# Everything that must not depend on interruptions or on the number of workers.
RESULTS = ("retraining/**/*",)


def config(**overrides):
    return tiny_config(**{**BARE, "retrain": SMALL, **overrides})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run with few retrainings."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("retraining") / "run"
    run_stages(RunFolder(folder, config()))
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """The finished run, to change."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


def table(folder, name):
    return pq.read_table(folder / "retraining" / f"{name}.parquet")


def losses_of(folder, name, seed=0):
    rows = [r for r in table(folder, "losses").to_pylist() if (r["set"], r["seed"]) == (name, seed)]
    return np.array([row["loss"] for row in rows]), np.array([row["correct"] for row in rows])


def losses_after(checkpoint, folder):
    model, tokenizer = load_model(checkpoint)
    test = pq.read_table(folder / "data/test.parquet")
    logits = predict(model, encode(tokenizer, test, 48))
    labels = torch.tensor(test["label"].to_pylist())
    return per_example_loss(logits, labels).numpy(), (logits.argmax(1) == labels).numpy()


def distinct(folder):
    """The number of different sets of examples that are left out; two removals may agree."""
    left_out = {}
    for row in table(folder, "left_out").to_pylist():
        left_out.setdefault(row["set"], set()).add(row["train_id"])
    return len({frozenset(names) for names in left_out.values()}) + 1  # and the empty set


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


# --- trainings -------------------------------------------------------------------------------


def test_training_on_all_examples_with_the_seed_of_the_run_gives_its_model(done):
    retrained = losses_of(done, ALL)
    expected = losses_after(done / "models/full/checkpoint-2", done)
    for values, expected_values in zip(retrained, expected, strict=True):
        assert np.array_equal(values, expected_values)


def test_retraining_fine_tunes_on_the_remaining_examples_from_the_same_start(done, tmp_path):
    study = RunContext(RunFolder(done))
    train = study.table("train")
    left_out = table(done, "left_out").to_pylist()
    for name, remaining in ((subset_set(1), 18), (language_set("de"), 24)):
        out = {row["train_id"] for row in left_out if row["set"] == name}
        rows = [row for row, train_id in enumerate(train["id"].to_pylist()) if train_id not in out]
        assert len(rows) == remaining
        fine_tune_on(study, train.take(rows), 0, tmp_path / name, name)
        expected = losses_after(tmp_path / name / "checkpoint-2", done)
        assert np.array_equal(losses_of(done, name)[0], expected[0])
        assert not np.array_equal(losses_of(done, name)[0], losses_of(done, ALL)[0])
    assert {row["train_id"] for row in left_out if row["set"] == language_set("de")} == {
        row["id"] for row in train.to_pylist() if row["language"] == "de"
    }


def test_the_folder_holds_only_results_and_passes_verification(done):
    folder = done / "retraining"
    names = {path.name for path in folder.iterdir()}
    tables = {f"{t}.{suffix}" for t in ("lds", "removal", "leave_one_out")
              for suffix in ("csv", "parquet")}  # fmt: skip
    assert names == {"results", "losses.parquet", "left_out.parquet", "summary.json"} | tables
    # 2 subsets, all, 3 languages, 1 at random, 3 languages x 2 sides.
    assert len(table(done, "losses")) == (2 + 1 + 3 + 1 + 6) * 18
    assert 2 + 1 + 3 + 1 < len(list((folder / "results").iterdir())) == distinct(done)
    assert verify(done) == []
    damaged = next((folder / "results").iterdir())
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    assert [str(damaged) in problem for problem in verify(done)] == [True]
    damaged.write_bytes(content)
    assert [(name, state) for name, state, _ in run_status(done).stages] == [
        (stage, "done") for stage in STAGE_NAMES if stage != "metagradient"
    ]


def test_the_plan_counts_the_trainings(done, tmp_path):
    run = RunFolder(tmp_path / "run", config())
    plan = {stage.stage: stage for stage in plan_run(run).stages}["retrain"]
    assert plan.work == (
        "at most 13 trainings: 2 on subsets, 7 of removals, 3 without a language, 1 on all examples"
    )
    assert plan.seconds > 0
    train = pq.read_table(done / "data/train.parquet")
    left_out = sum(number for _, _, number in count_trainings(config(), train))
    assert left_out == len(table(done, "left_out"))


def test_more_subsets_train_only_the_missing_ones(copy):
    results = copy / "retraining" / "results"
    before = {file.name: file.stat().st_mtime_ns for file in results.iterdir()}
    more = {**SMALL, "subsets": 3, "seeds": 2, "removed": 0, "leave_one_out": False}
    run = RunFolder(copy, config(retrain=more))
    assert [stage for stage in run.stages if not run.is_done(stage)] == ["retrain", "report"]
    run_stages(run)
    after = {file.name: file.stat().st_mtime_ns for file in results.iterdir()}
    assert before.items() <= after.items()
    assert len(after) - len(before) == 4  # subset 2 with two seeds, the others with a second
    assert not (copy / "retraining" / "removal.parquet").exists()
    assert not (copy / "retraining" / "leave_one_out.csv").exists()
    page = (copy / "report" / "index.html").read_text()
    assert "Linear datamodeling score: over 3 random subsets" in page
    assert "Change in mean loss without the strongest" not in page
    assert "Language left out, Spearman" not in page
    assert {row["set"] for row in table(copy, "losses").to_pylist()} == {
        subset_set(place) for place in range(3)
    }
    assert verify(copy) == []


def test_sets_that_leave_out_the_same_are_trained_once(done, copy):
    """Two names of TracIn have the same strongest examples."""
    trained = len(list((done / "retraining" / "results").iterdir()))
    both = {**SMALL, "methods": ["tracin", "tracin-cosine"]}
    run_stages(RunFolder(copy, config(retrain=both)))
    assert len(list((copy / "retraining" / "results").iterdir())) == trained
    rows = table(copy, "removal").to_pylist()
    changes = {
        method: [row["loss_change"] for row in rows if row["method"] == method]
        for method in both["methods"]
    }
    assert changes["tracin"] == changes["tracin-cosine"]
    assert len(changes["tracin"]) == 2 * (1 + 3)
    assert json.loads((copy / "retraining/summary.json").read_text())["trainings"] == trained


# --- scores ---------------------------------------------------------------------------------


def test_every_method_scores_every_pair_and_tracin_as_the_run_does(copy):
    study = RunContext(RunFolder(copy))
    methods = [name for name in METHODS if name != "metagradient"]  # needs its own stage
    scores = {method: method_scores(study, method) for method in methods}
    for method, scores_QN in scores.items():
        assert scores_QN.shape == (18, 36), method
        assert scores_QN.dtype == np.float32, method
        assert np.isfinite(scores_QN).all()
        assert scores_QN.std() > 0, method
    assert np.array_equal(scores["tracin"], scores["tracin-cosine"])
    assert not np.allclose(scores["tracin"], scores["tracin-dot"], rtol=0.1, atol=0)
    ids = {split: study.table(split)["id"].to_pylist() for split in ("train", "test")}
    for row in pq.read_table(copy / "influence/full/full/top.parquet").to_pylist():
        pair = ids["test"].index(row["test_id"]), ids["train"].index(row["train_id"])
        assert row["score"] == pytest.approx(scores["tracin"][pair], rel=1e-4, abs=1e-9)


def test_scores_in_a_metric_are_those_of_its_preconditioned_gradients(copy):
    """Adam's second moment comes from repeating the training; scores are then read from disk."""
    study = RunContext(RunFolder(copy))
    scores = {kind: method_scores(study, kind) for kind in ("adam", "ekfac", "ekfac-last")}
    again, checkpoints = copy / "retraining" / "with-second-moment", study.checkpoints("full")
    exact = dict.fromkeys(scores, 0.0)
    for checkpoint in checkpoints:
        model, tokenizer = study.load(checkpoint)
        folder = again / checkpoint.path.name
        assert model_digest(load_classifier(folder)) == model_digest(model)
        train, test = (
            study.encode(tokenizer, study.table(split), model) for split in ("train", "test")
        )
        adam = tm.adam_preconditioner(model, folder)
        exact["adam"] += checkpoint.learning_rate * tm.exact_influence(
            model, train, test, preconditioner=adam
        )
        ekfac = tm.fit_ekfac(model, train, batch_tokens=study.config.collect.batch_tokens)
        exact["ekfac-last"] = tm.exact_influence(model, train, test, preconditioner=ekfac)
        exact["ekfac"] += checkpoint.learning_rate * exact["ekfac-last"]
    shutil.rmtree(again)
    for kind, scores_QN in scores.items():
        correlation = np.corrcoef(scores_QN.ravel(), exact[kind].numpy().ravel())[0, 1]
        assert correlation > 0.95, kind
        assert np.array_equal(method_scores(study, kind), scores_QN)
    assert not again.exists()  # saved scores are read before anything is trained


def test_in_a_run_with_a_metric_plain_tracin_stays_plain(copy, tmp_path):
    """The run's own influence is the one in the metric."""
    with_metric = config(collect={"preconditioner": "ekfac"})
    run_stages(
        RunFolder(tmp_path / "run", with_metric),
        ["data", "finetune", "prune", "sparse-finetune", "collect"],
    )
    plain, other = RunContext(RunFolder(copy)), RunContext(RunFolder(tmp_path / "run"))
    for method in ("tracin-dot", "tracin-cosine", "ekfac"):
        scores = [method_scores(study, method) for study in (plain, other)]
        np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-4 * np.abs(scores[0]).max())
    uniform = {"k": 5, "weights": "uniform"}
    study = RunContext(RunFolder(copy, config(influence=uniform)))
    assert not np.allclose(method_scores(study, "ekfac"), scores[0])  # saved with other weights
    own = method_scores(other, "tracin")
    assert np.corrcoef(own.ravel(), method_scores(plain, "tracin").ravel())[0, 1] < 0.95


def test_the_default_methods_are_all_without_a_second_name_of_tracin():
    for normalize, twin in (("cosine", "tracin-cosine"), ("none", "tracin-dot")):
        chosen = config(retrain={}, influence={"normalize": normalize, "k": 5})
        left_out = (twin, "metagradient")
        assert methods_of(chosen) == [name for name in METHODS if name not in left_out]
    for normalize, twins in (("cosine", set()), ("none", {"ekfac"})):
        chosen = config(
            retrain={},
            influence={"normalize": normalize, "k": 5},
            collect={"preconditioner": "ekfac"},
        )
        assert set(METHODS) - set(methods_of(chosen)) == {*twins, "metagradient"}
    chosen = config(retrain={}, metagradient={"models": ["full"]})
    assert "metagradient" in methods_of(chosen)
    assert set(METHODS) == set(Method.__args__)
    assert set(METHOD_NAMES) == {*METHODS, HALF_OF_SEEDS}


# --- the report and the commands ------------------------------------------------------------


def test_the_report_has_the_numbers_if_and_only_if_the_stage_is_configured(done, copy):
    page = (done / "report" / "index.html").read_text()
    assert 'href="#retraining"' in page
    assert '<section id="retraining">' in page
    assert f"The full model was trained again {distinct(done)} times" in page
    assert "Linear datamodeling score: over 2 random subsets of 50%" in page
    row = next(row for row in table(done, "lds").to_pylist() if row["level"] == "example")
    assert f"{row['value']:.2f}".replace("-", "\N{MINUS SIGN}") in page
    assert "Change in mean loss without the strongest" in page
    assert "Language left out, Spearman" in page
    assert "One seed allows no verdict." in page
    assert "from one seed and therefore have no intervals" in page
    assert "None" not in page[page.index('<section id="retraining">') :].split("</table>")[0]
    run_stages(RunFolder(copy, config(retrain=None)))
    page = (copy / "report" / "index.html").read_text()
    assert 'href="#retraining"' not in page
    assert 'id="retraining"' not in page


def told(lds, ceiling=None, removal=(0, 0, 0), p=0.01, spread=0.01):
    """The sentences of the report about an LDS (value, low, high) and mean changes of removals."""

    def row(method, values, **names):
        return {
            "method": method,
            **names,
            **dict(zip(("value", "low", "high"), values, strict=True)),
        }

    summary = {
        "settings": SMALL | {"fraction": 0.5},
        "methods": ["tracin"],
        "trainings": 13,
        "num_train": 36,
        "leave_one_out": [
            {"method": "tracin", "between_only": between, "correlation": 0.5, "p_value": p,
             "permutations": 6, "exact": True} for between in (False, True)
        ],
    }  # fmt: skip
    rows = [
        row("tracin", lds, level=level, test_language=None) for level in ("example", "language")
    ]
    if ceiling is not None:
        rows.append(row(HALF_OF_SEEDS, [ceiling] * 3, level="example", test_language=None))
    removals = [
        {"method": method, "side": side, "test_language": None, "removed": 4, "loss_change": change,
         "loss_change_low": None if spread is None else change - spread,
         "loss_change_high": None if spread is None else change + spread}
        for (method, side), change in zip(
            [("tracin", "proponents"), ("tracin", "opponents"), ("random", "random")],
            removal, strict=True)
    ]  # fmt: skip
    return " ".join(sentences(summary, rows, removals))


def test_the_words_follow_the_numbers():
    low = "First-order scores have been low wherever they were measured"
    assert low in told((0.1, 0.02, 0.2))
    assert "cannot be distinguished from 0" not in told((0.1, 0.02, 0.2))
    assert "cannot be distinguished from 0" in told((0.1, -0.02, 0.2))
    assert low not in told((0.6, 0.5, 0.7))
    assert "a perfect prediction would reach about 0.82" in told((0.6, 0.5, 0.7), ceiling=0.5)
    assert "no score can be judged" in told((0.6, 0.5, 0.7), ceiling=-0.1)
    harm, less = "does more harm than removing random", "does less harm than removing random"
    unclear, falls = "is not clearly different from removing random", "Removing opponents lowers"
    for removal, expected in (
        ((0.3, -0.2, 0.1), {harm, falls}),
        ((0.3, 0.05, 0.1), {harm}),
        ((0.1, 0.1, 0.1), {unclear}),
        ((-0.1, 0.1, 0.1), {less}),
    ):
        text = told((0.6, 0.5, 0.7), removal=removal)
        assert {words for words in (harm, less, unclear, falls) if words in text} == expected
    assert "its mean loss changes by +0.300 (+0.290 to +0.310)" in told(
        (0.6, 0.5, 0.7), removal=(0.3, -0.2, 0.1)
    )
    text = told((0.6, 0.5, 0.7), removal=(0.3, -0.2, 0.1), spread=None)
    assert "its mean loss changes by +0.300; without as many" in text
    assert text.count("One seed allows no verdict.") == 1
    assert not [words for words in (harm, less, unclear, falls) if words in text]
    assert "of 0.50 (p = 0.010)" in told((0.6, 0.5, 0.7))
    assert "from all 6 orders of the languages" in told((0.6, 0.5, 0.7))


def test_a_run_without_the_section_has_no_such_stage(copy):
    run = RunFolder(copy, config(retrain=None))
    assert run.stages == tuple(
        stage for stage in STAGE_NAMES if stage not in ("retrain", "metagradient")
    )
    assert [stage for stage in run.stages if not run.is_done(stage)] == ["report"]
    with pytest.raises(ValueError, match=r"retrain.*section"):
        run_stages(run, ["retrain"])


def test_the_command_adds_the_stage_to_a_finished_run(copy):
    run = RunFolder(copy, config(retrain=None))
    shutil.rmtree(copy / "retraining")
    del run.record["stages"]["retrain"]
    run.record["config"]["retrain"] = None
    run.save()
    invoke("report", copy)
    values = [f"retrain.{key}={json.dumps(value)}" for key, value in SMALL.items()]
    arguments = [part for value in values for part in ("--set", value)]
    invoke("retrain", copy, *arguments, "--set", "retrain.removed=0")
    assert len(list((copy / "retraining" / "results").iterdir())) == 2 + 1 + 3
    assert RunFolder(copy).config.retrain.removed == 0
    assert not RunFolder(copy).is_done("report")
    invoke("report", copy)
    assert "trained again 6 times" in (copy / "report" / "index.html").read_text()


# --- errors before the work ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"subsets": 1}, r"retrain.subsets.*2.*got 1"),
        ({"fraction": 1}, r"retrain.fraction.*less than 1"),
        ({"fraction": 0.01}, r"retrain.fraction.*\b36\b"),
        ({"removed": 0.999}, r"retrain.removed.*\b36\b.*got 0.999"),
        ({"methods": ["tracin", "bm25", "tracin"]}, r"retrain.methods.*tracin"),
        ({"methods": ["lucene"]}, "retrain.methods"),
        ({"methods": ["metagradient"]}, r"retrain.methods.*section metagradient"),
        ({"other_fractions": {1.0: 2}}, r"retrain.other_fractions.*less than 1"),
        ({"other_fractions": {0.001: 2}}, r"retrain.other_fractions.*\b36\b.*got 0.001"),
        ({"batches": "old"}, r"retrain.batches"),
    ],
)
def test_an_invalid_value_is_named(values, what):
    with pytest.raises(ValueError, match=what):
        config(retrain={**SMALL, **values})


def test_one_language_cannot_be_left_out():
    task = {"train_languages": ["en"]}
    with pytest.raises(ValueError, match=r"leave_one_out.*\ben\b|\ben\b.*leave_one_out"):
        config(task=task)
    config(task=task, retrain={**SMALL, "leave_one_out": False})


def test_a_subset_without_a_language_is_refused_once_the_data_are_known(tmp_path):
    rare = config(task={"train_counts": {"es": 1}}, retrain={**SMALL, "subsets": 20})
    run = RunFolder(tmp_path / "run", rare)
    with pytest.raises(ValueError, match=r"retrain.fraction.*none of es \(1 in all\)"):
        run_stages(run)
    assert not run.is_done("data")
    with pytest.raises(ValueError, match=r"retrain.fraction.*none of es"):
        plan_run(RunFolder(tmp_path / "other", rare))


def test_scores_that_do_not_fit_are_refused_before_any_training(copy):
    memory = config(influence={"k": 5, "memory": "2KB"}, retrain={**SMALL, "subsets": 4})
    with pytest.raises(ValueError, match=r"influence.memory.*\b18\b.*\b36\b"):
        run_stages(RunFolder(copy, memory), ["retrain"])
    with pytest.raises(ValueError, match=r"influence.memory.*\b18\b.*\b36\b"):
        plan_run(RunFolder(copy, memory))


# --- interrupted, and on several workers -----------------------------------------------------


@pytest.fixture
def begun(done, tmp_path):
    """The run without any retraining."""
    shutil.copytree(done, tmp_path / "begun")
    shutil.rmtree(tmp_path / "begun" / "retraining")
    run = RunFolder(tmp_path / "begun")
    del run.record["stages"]["retrain"]
    run.save()
    return tmp_path / "begun"


def assert_same_results(folder, done):
    files, expected = files_of(folder, *RESULTS), files_of(done, *RESULTS)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []


@pytest.mark.slow
def test_two_workers_give_the_same_bits(done, begun):
    with closing(LocalEngine(2)) as engine:
        run_stages(RunFolder(begun), ["retrain"], engine=engine)
    assert_same_results(begun, done)
    logs = "".join(file.read_text() for file in (begun / "logs").glob("worker-*.log"))
    assert logs.count("task RetrainWithout") == distinct(done)
    assert all(f"worker-{n}.log" in os.listdir(begun / "logs") for n in (0, 1))


@pytest.mark.slow
def test_killed_in_a_training_it_resumes_and_trains_nothing_twice(done, begun):
    command = [sys.executable, "-m", "tracmod.cli", "retrain", str(begun)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    results, written = begun / "retraining" / "results", {}
    for least in (1, 5, 9):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while not (
            results.is_dir()
            and len(list(results.glob("*.parquet"))) >= least
            and list((begun / "retraining" / "models").glob("*/resume"))
        ):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        now = {file.name: file.stat().st_mtime_ns for file in results.glob("*.parquet")}
        assert written.items() <= now.items()
        assert least <= len(now) < distinct(done)
        written = now
    subprocess.run(command, env=environment, check=True)
    now = {file.name: file.stat().st_mtime_ns for file in results.glob("*.parquet")}
    assert written.items() <= now.items()
    assert_same_results(begun, done)
