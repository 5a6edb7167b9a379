"""`tracmod run --check`: the plan has the counts of the run, and nothing is written."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_study import tiny_config

from tracmod.cli import main
from tracmod.config import load_config
from tracmod.features.collector import Collector
from tracmod.study.context import RunContext
from tracmod.study.pipeline import run_stages
from tracmod.study.plan import plan_run
from tracmod.study.probes import Cost, Stopwatch
from tracmod.study.run_folder import RunFolder
from tracmod.study.stage_table import STAGE_NAMES

OPTIONS = {
    "prune": {"seeds": 2, "model": "monolingual", "step": 0.2},
    "views": {"other": ["de"], "subnetwork_own": True, "union": [["en", "de"]]},
}


def numbers(work: str) -> list[int]:
    """Return the numbers in the words of a plan, in order."""
    return [int(number) for number in re.findall(r"\d+", work)]


def planned(folder, **overrides):
    """Return the plan of each stage of a run with some settings."""
    plan = plan_run(RunFolder(folder, tiny_config(**overrides)))
    return {stage.stage: stage for stage in plan.stages}


def test_the_planned_counts_are_those_of_the_run(tmp_path):
    run = RunFolder(tmp_path / "run", tiny_config(**OPTIONS))
    plan = plan_run(run)
    assert not run.path.exists()
    assert [stage.stage for stage in plan.stages] == list(run.stages)
    assert not any(stage.done for stage in plan.stages)
    works = {stage.stage: stage.work for stage in plan.stages}
    assert numbers(works["finetune"]) == [10, 8, 2]  # steps, batch size, checkpoints
    assert numbers(works["sparse-finetune"]) == [12, 8, 2]  # each language has its own batches
    assert numbers(works["prune"]) == [6, 5, 6]  # courses, rounds, models
    run_stages(run, STAGE_NAMES[:6])
    counted = 4 * RunContext(run).examples_per_checkpoint()
    # Passes: full 1, subnetwork 3, random 3, other 1, union 1; subnetwork-own needs none.
    assert numbers(works["collect"]) == [9, 4, counted]
    shards = [path.stat().st_size for path in (run.path / "features").rglob("shard*")]
    collect = next(stage for stage in plan.stages if stage.stage == "collect")
    assert collect.bytes == counted * 256 * 4
    assert sum(shards) == pytest.approx(collect.bytes, rel=0.1)
    models = [path.stat().st_size for path in (run.path / "models").rglob("*.safetensors")]
    assert sum(models) < sum(s.bytes for s in plan.stages if "finetune" in s.stage)


def test_planned_bytes_of_features_are_those_of_their_stored_dtype(tmp_path):
    sizes = {
        dtype: planned(tmp_path / dtype, collect={"store_dtype": dtype})["collect"].bytes
        for dtype in ("float32", "bfloat16", "int8")
    }
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * sizes["int8"] > 0


def bytes_of(files):
    """Return the bytes of the tensors in safetensors files, without the files' headers."""
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.fixture
def rates(monkeypatch):
    """A measured feature takes 1 second if plain, 10 with Adam's and 100 with EK-FAC's metric."""
    seconds = {None: 1.0, "adam": 10.0, "ekfac": 100.0}

    def cost_per_example(stopwatch, work, examples, most=None):
        collector = getattr(work, "__self__", None)
        if not isinstance(collector, Collector):
            return Cost(0.0, 0.0, 0.0, 0.0)
        collector.collect(examples[:2])  # the collector must be able to collect
        measured = seconds[collector.preconditioner and collector.preconditioner.kind]
        return Cost(measured, 0.5 * measured, 2 * measured, 20 * measured)

    monkeypatch.setattr("tracmod.study.forecast.cost_per_example", cost_per_example)


def test_the_plan_counts_time_fits_and_bytes_of_ekfac(tmp_path, rates):
    plain = planned(tmp_path / "plain")
    run = RunFolder(tmp_path / "run", tiny_config(collect={"preconditioner": "ekfac"}))
    plan = planned(run.path, collect={"preconditioner": "ekfac"})
    passes = numbers(plain["collect"].work)[-1]
    # 4 checkpoints, fitted on 36 training examples
    assert numbers(plan["collect"].work) == [*numbers(plain["collect"].work), 4, 36]
    assert ["EK-FAC" in stages["collect"].work for stages in (plain, plan)] == [False, True]
    assert plain["collect"].seconds == passes
    assert plan["collect"].seconds == 100 * (passes + 4 * 2 * 36)
    run_stages(run, STAGE_NAMES[:5])
    files = list((run.path / "preconditioners").rglob("*.safetensors"))
    assert len(files) == 4
    assert plan["collect"].bytes - plain["collect"].bytes == bytes_of(files) > 0
    assert plan["finetune"].bytes == plain["finetune"].bytes


def test_the_examples_of_a_fit_are_limited(tmp_path, rates, monkeypatch):
    monkeypatch.setattr("tracmod.study.forecast.FIT_EXAMPLES", 10)
    work = planned(tmp_path / "run", collect={"preconditioner": "ekfac"})["collect"].work
    assert numbers(work)[-1] == 10


def test_the_plan_counts_the_bytes_of_adams_second_moment(tmp_path, rates):
    plain = planned(tmp_path / "plain")
    run = RunFolder(tmp_path / "run", tiny_config(collect={"preconditioner": "adam"}))
    plan = planned(run.path, collect={"preconditioner": "adam"})
    assert re.fullmatch(re.escape(plain["collect"].work) + ".*Adam.*", plan["collect"].work)
    assert plan["collect"].seconds == 10 * plain["collect"].seconds
    assert plan["collect"].bytes == plain["collect"].bytes
    run_stages(run, STAGE_NAMES[:4])
    for stage, model in (("finetune", "full"), ("sparse-finetune", "sparse")):
        assert re.fullmatch(re.escape(plain[stage].work) + ".*Adam.*", plan[stage].work)
        files = list(run.model(model).rglob("second_moment.safetensors"))
        assert plan[stage].bytes - plain[stage].bytes == bytes_of(files) > 0


def test_the_plan_of_retrain_counts_features_and_fits_of_preconditioned_methods(tmp_path, rates):
    retrain = {"subsets": 2, "seeds": 1, "removed": 0, "leave_one_out": False}
    plans = {
        name: planned(tmp_path / str(name), retrain={**retrain, "methods": list(methods)})[
            "retrain"
        ]
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
    bytes_per_fit = plans["last"].bytes - plans["bm25"].bytes
    assert bytes_per_fit > 0
    for name, (seconds, fits) in expected.items():
        added = plans[name].seconds - plans["bm25"].seconds
        assert added == pytest.approx(seconds, abs=5), name  # trainings are measured too
        assert plans[name].bytes - plans["bm25"].bytes == fits * bytes_per_fit
        _, ekfac, fitted = plans[name].work.partition("EK-FAC")
        assert bool(ekfac) == (fits > 0)
        assert numbers(fitted)[:1] == ([fits] if fits else [])
    stored = planned(
        tmp_path / "stored",
        collect={"preconditioner": "ekfac"},
        retrain={**retrain, "methods": ["bm25", "ekfac"]},
    )["retrain"]
    assert "EK-FAC" not in stored.work  # the fits of the stage collect are used


def test_planned_counts_without_training_data_of_a_language(tmp_path):
    config = tiny_config(
        task={"train_languages": ["en", "de"]},
        sparse_finetune={"sampling": "uniform"},
        influence={"blocks": True},
    )
    run = RunFolder(tmp_path / "run", config)
    plan = plan_run(run)
    works = {stage.stage: stage.work for stage in plan.stages}
    assert numbers(works["finetune"]) == [6, 8, 2]  # 24 examples
    assert numbers(works["sparse-finetune"]) == [8, 8, 2]
    # 24 training and 18 test examples in the view full; 24 and 6 under each of the three masks
    assert numbers(works["influence"])[-1] == 4 * (42 + 3 * 30)
    run_stages(run)
    for model, stage in (("full", "finetune"), ("sparse", "sparse-finetune")):
        rows = json.loads((run.model(model) / "metrics.json").read_text())
        assert numbers(works[stage])[0] == rows[-1]["step"]
    with pytest.raises(ValueError, match=r"prune\.model: .*\bes\b"):
        tiny_config(task={"train_languages": ["en", "de"]}, prune={"model": "monolingual"})


def test_finished_stages_are_planned_at_no_cost(tmp_path):
    run = RunFolder(tmp_path / "run", tiny_config())
    before = plan_run(run)
    assert before.seconds > 0
    run_stages(run, ["data", "finetune"])
    after = plan_run(run)
    assert [stage.stage for stage in after.stages if stage.done] == ["data", "finetune"]
    assert after.bytes < before.bytes


@pytest.mark.parametrize(("k", "values"), [(100, [[100, 36]]), (20, [[20, 36]]), (5, [])])
def test_a_k_too_large_for_the_data_is_noted(tmp_path, k, values):
    notes = plan_run(RunFolder(tmp_path / "run", tiny_config(influence={"k": k}))).notes
    assert [numbers(note) for note in notes] == values
    assert all(note.startswith("influence.k ") for note in notes)


def test_the_plan_has_the_range_and_the_time_under_the_present_load(tmp_path, rates):
    stage = planned(tmp_path / "run")["collect"]
    assert stage.range == (0.5 * stage.seconds, 2 * stage.seconds)
    assert stage.seconds_now == 20 * stage.seconds > 0


class Machine:
    """Two clocks of a machine whose work takes two threads, of which others leave a share.

    Every call costs 10 parts whatever its size; a part takes 0.02 s of CPU time.
    """

    def __init__(self, share, noise=(1.0,)):
        self.wall = self.cpu = 0.0
        self.share, self.noise = share, list(noise)

    def work(self, size):
        cpu = 0.02 * (10 + size)
        self.cpu += cpu * (self.noise[0] if size > 1 else 1)
        self.wall += cpu / (1.75 * self.share)
        self.noise.append(self.noise.pop(0))

    def stopwatch(self):
        stopwatch = Stopwatch("cpu", 1, lambda: self.wall, lambda: self.cpu)
        stopwatch.threads, stopwatch.cores = 2, 2 * self.share
        return stopwatch


@pytest.mark.parametrize("share", [1.0, 0.5, 0.06])
def test_estimates_do_not_depend_on_the_load_of_the_machine(share):
    machine = Machine(share)
    stopwatch = machine.stopwatch()
    cost = stopwatch.probe(machine.work)
    assert stopwatch.is_busy == (share < 1)
    assert cost.free == pytest.approx(0.02 / 1.75)
    assert cost.now == pytest.approx(0.02 / 1.75 / share)


def test_a_busy_machine_is_said_to_be_busy(tmp_path, monkeypatch, rates):
    monkeypatch.setattr(Stopwatch, "_available_cores", lambda stopwatch: 0.25 * stopwatch.threads)
    arguments = ["run", "demo", "--out", str(tmp_path / "run"), "--check"]
    arguments += ["--set", "task.train_per_language=12", "--set", "task.dev_per_language=9"]
    output = CliRunner().invoke(main, arguments, catch_exceptions=False).stdout
    [total] = re.findall(r"^to do: about .*", output, re.MULTILINE)
    assert "between" in total
    assert re.search(r"^this machine is busy: .* under the present load", output, re.MULTILINE)


def test_the_noise_of_probes_is_in_their_range_and_not_in_the_median():
    machine = Machine(0.5, noise=(1.0, 1.0, 1.0, 30.0, 1.0))
    cost = machine.stopwatch().probe(machine.work, sizes=(1, 1, 64))
    assert cost.free == pytest.approx(cost.low) == pytest.approx(0.02 / 1.75)
    assert cost.high > cost.free


def test_probes_of_slow_work_are_few_and_small():
    sizes = []
    machine = Machine(0.05)

    def work(size):
        sizes.append(size)
        for _ in range(20):
            machine.work(size)

    machine.stopwatch().probe(work)
    assert sizes == [1, 1, 8, 8, 8]


def test_a_memory_that_the_run_refuses_is_refused_by_its_check(tmp_path):
    config = tiny_config(influence={"k": 5, "memory": "1kB"})
    with pytest.raises(ValueError, match=r"memory.* got 1,000\b"):
        plan_run(RunFolder(tmp_path / "run", config))


def test_the_command_prints_the_plan_and_writes_nothing(tmp_path):
    arguments = ["run", "demo", "--out", str(tmp_path / "run"), "--check"]
    arguments += ["--set", "task.train_per_language=12", "--set", "task.dev_per_language=9"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    stages = RunFolder(tmp_path / "run", load_config("demo")).stages
    assert [line.split()[0] for line in lines[1:9]] == list(stages)
    assert re.search(r"^to do: .*\d", result.output, re.MULTILINE)
    assert re.search(r"note: influence\.k .*\b100\b.*\b60\b", result.output)
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_an_error_of_the_plan(tmp_path):
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
