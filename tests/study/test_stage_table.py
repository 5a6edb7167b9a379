"""The table of stages: a module and a record are all that a new stage takes."""

from __future__ import annotations

import inspect
import json
import sys
from itertools import permutations
from pathlib import Path
from types import ModuleType

import pytest
from tiny_study import tiny_config

from tracmod.config import RunConfig
from tracmod.files.durable import file_sha256, read_checksums
from tracmod.study import run_folder, stage_table
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.pipeline import run_stages
from tracmod.study.plan import plan_run
from tracmod.study.run_folder import RunFolder
from tracmod.study.stage_table import STAGES, Stage
from tracmod.study.stages import stage_module
from tracmod.study.status import run_status
from tracmod.validation.integrity import verify

# Sections of the config that no stage reads: where a run computes changes no result.
NOT_READ = {"device"}

NEW_STAGE = Stage(
    "count-words",
    folder="words",
    reads=("analyze",),
    redone=("analyze",),
    records=("num_words",),
    uses_model=False,
    summary="Count the words of the training examples.",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adds NEW_STAGE after `data`: its module and its record. Returns the languages it counted."""
    languages: list[str] = []

    def run(context: RunContext) -> None:
        counts = {}
        for language in context.languages:
            texts = context.table_of("train", language)["text_a"].to_pylist()
            counts[language] = sum(len(text.split()) for text in texts)
            languages.append(language)
        folder = context.run.path / NEW_STAGE.folder
        folder.mkdir(exist_ok=True)
        (folder / "counts.json").write_text(json.dumps(counts))
        context.run.record["num_words"] = sum(counts.values())

    def estimate(forecast: Forecast) -> Estimate:
        return Estimate(f"{forecast.count('train')} texts", num_bytes=100)

    module = ModuleType(NEW_STAGE.module)
    module.run, module.estimate = run, estimate  # type: ignore[attr-defined]
    stages = (STAGES[0], NEW_STAGE, *STAGES[1:])
    monkeypatch.setitem(sys.modules, NEW_STAGE.module, module)
    monkeypatch.setattr(stage_table, "STAGES", stages)
    monkeypatch.setattr(stage_table, "_BY_NAME", {stage.name: stage for stage in stages})
    monkeypatch.setattr(run_folder, "STAGES", stages)
    return languages


def test_a_new_stage_is_planned_run_recorded_and_verified(calls: list[str], tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", tiny_config())
    plan = plan_run(run)
    assert [stage.stage for stage in plan.stages] == list(run.stages)
    planned = plan.stages[1]
    assert (planned.stage, planned.done) == ("count-words", False)
    assert (planned.work, planned.seconds, planned.bytes) == ("36 texts", None, 100)

    with pytest.raises(ValueError, match=r"count-words.*data"):
        run_stages(run, ["count-words"])
    assert calls == []
    run_stages(run, ["data", "count-words"])
    assert calls == ["en", "de", "es"]
    file = run.path / "words/counts.json"
    counts = json.loads(file.read_text())

    record = json.loads(run.record_file.read_text())
    assert record["stages"]["count-words"]["state"] == "done"
    assert record["num_words"] == sum(counts.values())
    assert read_checksums(run.path)["words/counts.json"] == file_sha256(file)
    assert plan_run(run).stages[1].done
    states = {name: state for name, state, _ in run_status(run.path).stages}
    assert (states["count-words"], states["finetune"]) == ("done", "to do")

    assert verify(run.path) == []
    file.write_text("{}")
    (problem,) = verify(run.path)
    assert "words/counts.json" in problem


def test_a_new_stage_is_done_again_when_its_section_changes(
    calls: list[str], tmp_path: Path
) -> None:
    run_stages(RunFolder(tmp_path, tiny_config()), ["data", "count-words"])
    unchanged = RunFolder(tmp_path, tiny_config())
    assert unchanged.is_done("count-words")
    run_stages(unchanged, ["count-words"])
    assert len(calls) == 3
    changed = RunFolder(tmp_path, tiny_config(analyze={"bootstrap": 60}))
    assert changed.is_done("data")
    assert not changed.is_done("count-words")
    run_stages(changed, ["count-words"])
    assert len(calls) == 6
    assert changed.is_done("count-words")
    other_section = RunFolder(tmp_path, tiny_config(analyze={"bootstrap": 60}, influence={"k": 3}))
    assert other_section.is_done("count-words")


def test_a_new_stage_is_done_again_on_request_and_refuses_a_change_of_what_it_keeps(
    calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path, tiny_config())
    run_stages(run, ["data", "count-words"])
    run_stages(run, ["count-words"], again="count-words")
    assert len(calls) == 6
    # The same stage, but with a section that may not change once the stage has begun.
    fixed = Stage("count-words", folder="words", reads=("analyze",))
    monkeypatch.setattr(run_folder, "STAGES", (STAGES[0], fixed))
    with pytest.raises(ValueError, match=r"analyze\.bootstrap=50.*analyze\.bootstrap=60"):
        RunFolder(tmp_path, tiny_config(analyze={"bootstrap": 60}))


def test_a_new_stage_is_taken_over_from_a_run_with_the_same_settings(
    calls: list[str], tmp_path: Path
) -> None:
    donor = RunFolder(tmp_path / "donor", tiny_config())
    run_stages(donor, ["data", "count-words"])
    run = RunFolder(tmp_path / "run", tiny_config(influence={"k": 3}))
    run_stages(run, ["data", "count-words"], donors=[donor])
    assert len(calls) == 3
    assert run.record["stages"]["count-words"]["taken_from"] == "donor"
    assert run.record["num_words"] == donor.record["num_words"]
    assert (run.path / "words/counts.json").samefile(donor.path / "words/counts.json")
    other = RunFolder(tmp_path / "other", tiny_config(analyze={"bootstrap": 60}))
    run_stages(other, ["data", "count-words"], donors=[donor])
    assert "taken_from" in other.record["stages"]["data"]
    assert "taken_from" not in other.record["stages"]["count-words"]
    assert len(calls) == 6


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_has_a_module_with_run_and_estimate(stage: Stage) -> None:
    module = stage_module(stage)
    assert list(inspect.signature(module.run).parameters) == ["context"]
    assert list(inspect.signature(module.estimate).parameters) == ["forecast"]
    assert stage.summary


def test_every_stage_has_a_name_and_a_folder_of_its_own() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage, other in permutations(STAGES, 2):
        assert not Path(stage.folder).is_relative_to(other.folder)


def test_every_section_of_the_config_is_read_by_exactly_one_stage() -> None:
    sections = [section for stage in STAGES for section in stage.reads]
    assert sorted(sections) == sorted(RunConfig.model_fields.keys() - NOT_READ)
    for stage in STAGES:
        assert set(stage.redone) <= set(stage.reads)
        assert stage.requires is None or stage.requires in stage.reads


def test_a_section_that_no_stage_reads_undoes_no_stage(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, tiny_config())
    for stage in run.stages:
        with run.stage(stage):
            pass
    moved = RunFolder(tmp_path, tiny_config(device="auto"))
    assert moved.config.device != run.config.device
    assert all(moved.is_done(stage) for stage in moved.stages)
