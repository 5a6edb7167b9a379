"""What `tracmod run --check` says: true counts, whatever the options, and nothing written."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_study import tiny_config

from tracmod.cli import main
from tracmod.config import load_config
from tracmod.features.collector import Collector
from tracmod.study.pipeline import Study, run_stages
from tracmod.study.plan import plan_run
from tracmod.study.run_folder import STAGES, RunFolder

OPTIONS = {
    "prune": {"seeds": 2, "model": "monolingual", "step": 0.2},
    "views": {"other": ["de"], "subnetwork_own": True, "union": [["en", "de"]]},
}


def test_counts_are_those_of_the_run(tmp_path):
    run = RunFolder(tmp_path / "run", tiny_config(**OPTIONS))
    plan = plan_run(run)
    assert not run.path.exists()
    assert [stage.stage for stage in plan.stages] == list(run.stages)
    assert not any(stage.done for stage in plan.stages)
    works = {stage.stage: stage.work for stage in plan.stages}
    assert works["finetune"] == "10 steps of 8, 2 checkpoints"  # 36 examples
    assert works["sparse-finetune"] == "12 steps of 8, 2 checkpoints"  # 12 of each language
    assert works["prune"] == "6 courses of at most 5 rounds, 6 more models fine-tuned"
    # full 1, subnetwork 3, random 3, other 1, union 1; the own view costs no pass.
    assert works["collect"].startswith("9 passes (view, mask) x 4 checkpoints = ")
    run_stages(run, STAGES[:6])
    counted = Study(run)._count_passes()
    assert works["collect"].endswith(f"= {counted} forward and backward passes of an example")
    shards = [path.stat().st_size for path in (run.path / "features").rglob("shard*")]
    collect = next(stage for stage in plan.stages if stage.stage == "collect")
    assert collect.bytes == counted * 256 * 4
    assert sum(shards) == pytest.approx(collect.bytes, rel=0.1)
    models = [path.stat().st_size for path in (run.path / "models").rglob("*.safetensors")]
    assert sum(models) < sum(s.bytes for s in plan.stages if "finetune" in s.stage)


def test_features_take_the_bytes_of_the_dtype_they_are_stored_in(tmp_path):
    sizes = {}
    for dtype in ("float32", "bfloat16", "int8"):
        plan = plan_run(RunFolder(tmp_path / dtype, tiny_config(collect={"store_dtype": dtype})))
        sizes[dtype] = next(one.bytes for one in plan.stages if one.stage == "collect")
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * sizes["int8"] > 0


def planned(folder, **overrides):
    return {
        stage.stage: stage for stage in plan_run(RunFolder(folder, tiny_config(**overrides))).stages
    }


def bytes_of(files):
    """Of the tensors in them, without the header of each file."""
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.fixture
def rates(monkeypatch):
    """The probe takes one second for plain features, 10 in Adam's and 100 in EK-FAC's metric."""
    seconds = {None: 1.0, "adam": 10.0, "ekfac": 100.0}

    def each(device, work, examples):
        collector = getattr(work, "__self__", None)
        if not isinstance(collector, Collector):
            return 0.0
        collector.collect(examples[:2])  # the stand-in does for the real one
        return seconds[collector.preconditioner and collector.preconditioner.kind]

    monkeypatch.setattr("tracmod.study.plan._seconds_each", each)


def test_features_in_a_metric_cost_its_rate_its_fit_and_its_bytes(tmp_path, rates):
    plain = planned(tmp_path / "plain")
    run = RunFolder(tmp_path / "run", tiny_config(collect={"preconditioner": "ekfac"}))
    plan = planned(run.path, collect={"preconditioner": "ekfac"})
    assert plan["collect"].work.endswith(
        "forward and backward passes of an example, preconditioned; EK-FAC fitted at 4 "
        "checkpoints, two passes over 36 examples"
    )
    passes = int(plain["collect"].work.split(" = ")[1].split()[0])
    assert plain["collect"].seconds == passes
    assert plan["collect"].seconds == 100 * (passes + 4 * 2 * 36)
    run_stages(run, STAGES[:5])
    files = list((run.path / "preconditioners").rglob("*.safetensors"))
    assert len(files) == 4
    assert plan["collect"].bytes - plain["collect"].bytes == bytes_of(files) > 0
    assert plan["finetune"].bytes == plain["finetune"].bytes


def test_a_fit_is_of_so_many_examples_at_most(tmp_path, rates, monkeypatch):
    monkeypatch.setattr("tracmod.study.plan.FIT_EXAMPLES", 10)
    work = planned(tmp_path / "run", collect={"preconditioner": "ekfac"})["collect"].work
    assert work.endswith("two passes over 10 examples")


def test_checkpoints_with_adams_second_moment_are_larger_by_it(tmp_path, rates):
    plain = planned(tmp_path / "plain")
    run = RunFolder(tmp_path / "run", tiny_config(collect={"preconditioner": "adam"}))
    plan = planned(run.path, collect={"preconditioner": "adam"})
    assert (
        plan["collect"].work == plain["collect"].work + ", preconditioned by Adam's second moment"
    )
    assert plan["collect"].seconds == 10 * plain["collect"].seconds
    assert plan["collect"].bytes == plain["collect"].bytes
    run_stages(run, STAGES[:4])
    for stage, model in (("finetune", "full"), ("sparse-finetune", "sparse")):
        assert plan[stage].work == plain[stage].work + " with Adam's second moment"
        files = list(run.model(model).rglob("second_moment.safetensors"))
        assert plan[stage].bytes - plain[stage].bytes == bytes_of(files) > 0


def test_methods_of_retrain_in_a_metric_cost_features_and_fits_of_their_own(tmp_path, rates):
    asked = {"subsets": 2, "seeds": 1, "removed": 0, "leave_one_out": False}
    plans = {
        name: planned(tmp_path / str(name), retrain={**asked, "methods": list(methods)})["retrain"]
        for name, methods in {
            "bm25": ["bm25"],
            "adam": ["bm25", "adam"],
            "last": ["bm25", "ekfac-last"],
            "ekfac": ["bm25", "ekfac", "ekfac-last"],
        }.items()
    }
    examples, fit = 36 + 18, 2 * 36
    expected = {
        "bm25": (0, 0),
        "adam": (2 * 10 * examples, 0),  # 2 checkpoints
        "last": (100 * (examples + fit), 1),
        "ekfac": (100 * (3 * examples + 2 * fit), 2),
    }
    each = plans["last"].bytes - plans["bm25"].bytes
    assert each > 0
    for name, (seconds, fits) in expected.items():
        added = plans[name].seconds - plans["bm25"].seconds
        assert added == pytest.approx(seconds, abs=5), name  # and the trainings, timed
        assert plans[name].bytes - plans["bm25"].bytes == fits * each
        words = ["", "EK-FAC fitted at 1 checkpoint,", "EK-FAC fitted at 2 checkpoints,"][fits]
        assert words in plans[name].work
        assert ("EK-FAC" in plans[name].work) == (fits > 0)
    kept = planned(
        tmp_path / "kept",
        collect={"preconditioner": "ekfac"},
        retrain={**asked, "methods": ["bm25", "ekfac"]},
    )["retrain"]
    assert "EK-FAC" not in kept.work  # those of the features serve


def test_counts_without_training_data_of_a_language(tmp_path):
    config = tiny_config(
        task={"train_languages": ["en", "de"]},
        sparse_finetune={"sampling": "uniform"},
        influence={"blocks": True},
    )
    run = RunFolder(tmp_path / "run", config)
    plan = plan_run(run)
    works = {stage.stage: stage.work for stage in plan.stages}
    assert works["finetune"] == "6 steps of 8, 2 checkpoints"  # 24 examples
    assert works["sparse-finetune"] == "8 steps of 8, 2 checkpoints"
    # Of 24 training and 18 test examples: full once, subnetwork under three masks of 6 tests.
    assert works["influence"].endswith(
        f"by head and layer {4 * (42 + 3 * 30)} passes of an example"
    )
    run_stages(run)
    for model, stage in (("full", "finetune"), ("sparse", "sparse-finetune")):
        rows = json.loads((run.model(model) / "metrics.json").read_text())
        assert works[stage].startswith(f"{rows[-1]['step']} steps")
    with pytest.raises(ValueError, match=r"prune\.model: .*\(es\), got monolingual"):
        tiny_config(task={"train_languages": ["en", "de"]}, prune={"model": "monolingual"})


def test_what_is_done_costs_nothing(tmp_path):
    run = RunFolder(tmp_path / "run", tiny_config())
    before = plan_run(run)
    assert before.seconds > 0
    run_stages(run, ["data", "finetune"])
    after = plan_run(run)
    assert [stage.stage for stage in after.stages if stage.done] == ["data", "finetune"]
    assert after.bytes < before.bytes


@pytest.mark.parametrize(
    ("k", "note"), [(100, "only 36 training examples"), (20, "20 of 36 training"), (5, None)]
)
def test_a_k_that_tells_nothing_is_noted(tmp_path, k, note):
    notes = plan_run(RunFolder(tmp_path / "run", tiny_config(influence={"k": k}))).notes
    assert [note in one for one in notes] == [True] if note else notes == []


def test_the_command_prints_it_and_writes_nothing(tmp_path):
    arguments = ["run", "demo", "--out", str(tmp_path / "run"), "--check"]
    arguments += ["--set", "task.train_per_language=12", "--set", "task.dev_per_language=9"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    stages = RunFolder(tmp_path / "run", load_config("demo")).stages
    assert [line.split()[0] for line in lines[1:9]] == list(stages)
    assert "to do: about" in result.output
    assert "note: influence.k is 100, but there are only 60 training examples" in result.output
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_found_before_the_work(tmp_path):
    rows = ["id\tlanguage\ttext_a\tlabel"]
    for i in range(12):
        rows += [f"en{i}\ten\ttext {i}\t{'good' if i % 2 else 'bad'}", f"de{i}\tde\tTexte\tgood"]
    (tmp_path / "one_class.tsv").write_text("\n".join(rows))
    task = {"name": "files", "shape": "nli", "train_file": str(tmp_path / "one_class.tsv")}
    task |= {"languages": ["en", "de"], "train_per_language": 3, "dev_per_language": 2}
    task |= {"test_per_language": 2}
    config = tiny_config(task=task, views={"other": []})
    with pytest.raises(ValueError, match=r"dev, language de: .* got 2, all good"):
        plan_run(RunFolder(tmp_path / "run", config))
    task["languages"] = ["en", "fr"]
    with pytest.raises(ValueError, match="fr"):
        plan_run(RunFolder(tmp_path / "run", tiny_config(task=task, views={"other": []})))
