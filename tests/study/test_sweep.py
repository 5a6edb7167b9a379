"""Sweeps: points share equal stages, and each point has the results of a run of its own."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner
from html_page import Page
from tiny_study import RESULTS, files_of, tiny_config

import tracmod.study.pipeline
from tracmod.cli import main
from tracmod.config import load_config, override_config
from tracmod.files.durable import link_folder
from tracmod.report.html.sweeps import write_sweep_page
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.stages import collect, influence, prune
from tracmod.study.sweep import load_sweep, run_sweep, sweep_plan
from tracmod.tasks import load_task
from tracmod.validation.integrity import verify

CONFIGS = Path(__file__).parents[2] / "configs"
POINTS = {
    "base": {},
    "views": {"views.random": 2, "influence.k": 7},
    "threshold": {"prune.threshold": 0.5},
    "without-es": {"task.train_languages": ["en", "de"]},
}


def base_tree():
    return tiny_config(
        finetune={"epochs": 1}, views={"random": 1, "other": []}
    ).model_dump(mode="json")  # fmt: skip


def write_sweep_file(path, **content):
    """Write a sweep file with a tiny base; return its path."""
    tree = {"name": "tiny", "base": base_tree(), **content}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished sweep, its folder, and its plan from before."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sweep")
    file = write_sweep_file(folder / "tiny.yaml", points=POINTS)
    sweep = load_sweep(file)
    plan = sweep_plan(sweep, folder / "out")
    assert not (folder / "out").exists()
    assert run_sweep(sweep, folder / "out", lambda line: None) == {}
    return sweep, folder / "out", plan


def stages(run):
    """Return what run.json records of the stages."""
    return json.loads((run / "run.json").read_text())["stages"]


def test_points_share_equal_stages_as_planned(done):
    _, out, plan = done
    expected = {
        "base": (),
        "views": ("data", "finetune", "prune", "sparse-finetune"),
        "threshold": ("data", "finetune"),
        "without-es": (),
    }
    for point, shared in expected.items():
        taken = {s: e["taken_from"] for s, e in stages(out / point).items() if "taken_from" in e}
        assert taken == dict.fromkeys(shared, "base"), point
        assert taken == {s: how for s, how in plan[point].items() if how != "to do"}
        assert list(stages(out / point)) == list(RunFolder(out / point).stages)
        assert verify(out / point) == []
    weights = "models/full/checkpoint-1/model.safetensors"
    assert (out / "views" / weights).samefile(out / "base" / weights)
    assert not (out / "without-es" / weights).samefile(out / "base" / weights)


def test_equal_features_are_shared_even_if_their_stage_is_not(done):
    _, out, _ = done
    full = "features/full/full/checkpoint-1/train/shard-00000.safetensors"
    random = "features/sparse/random-0/de/checkpoint-1/test/shard-00000.safetensors"
    assert (out / "threshold" / full).samefile(out / "base" / full)
    assert (out / "views" / full).samefile(out / "base" / full)
    assert (out / "views" / random).samefile(out / "base" / random)
    assert not (out / "without-es" / full).samefile(out / "base" / full)
    locks = [(out / point / full).with_name("writer.lock") for point in ("views", "base")]
    assert not locks[0].samefile(locks[1])


def test_a_point_has_the_results_of_a_run_of_its_own(done, tmp_path):
    sweep, out, _ = done
    alone = RunFolder(tmp_path / "threshold", sweep.points["threshold"])
    with alone.locked():
        run_stages(alone)
    expected = files_of(alone.path, *RESULTS)
    assert len(expected) > 40
    assert files_of(out / "threshold", *RESULTS) == expected


def test_a_finished_sweep_run_again_changes_no_file(done, monkeypatch):
    sweep, out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*.*")}
    assert set(sweep_plan(sweep, out)["views"].values()) == {"done"}
    monkeypatch.setattr(tracmod.study.pipeline, "stage_module", lambda stage: None)  # fails
    assert run_sweep(sweep, out, lambda line: None) == {}
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert all(path.name == ".lock" for path in changed)


def test_the_table_has_a_row_per_point_model_and_view(done):
    sweep, out, _ = done
    table = pq.read_table(out / "sweep.parquet").to_pandas()
    assert len(table) == len(POINTS) * 2 * 3
    assert pyarrow.csv.read_csv(out / "sweep.csv").num_rows == len(table)
    assert sweep.settings == [
        "views.random", "influence.k", "prune.threshold", "task.train_languages",
    ]  # fmt: skip
    row = table[(table.point == "threshold") & (table.model == "sparse") & (table.view == "random")]
    summary = json.loads((out / "threshold/analysis/summary.json").read_text())
    in_language = next(
        entry
        for entry in summary["in_language"]
        if (entry["model"], entry["view"]) == ("sparse", "random")
    )
    assert row["in_language_share"].item() == in_language["share_positive"]["value"]
    assert row["in_language_share_high"].item() == in_language["share_positive"]["high"]
    change = next(
        entry
        for entry in summary["changes"]
        if (entry["model"], entry["view"], entry["base_model"]) == ("sparse", "random", "full")
    )
    assert row["sparse_change"].item() == change["share_positive"]["value"]
    assert row["prune.threshold"].item() == 0.5
    heads = [entry["kept"] for entry in summary["subnetworks"].values()]
    assert row["heads_kept"].item() == pytest.approx(sum(heads) / len(heads))
    assert table[table.point == "base"]["null_share"].to_numpy() == pytest.approx(1 / 3)


def test_a_language_without_training_data_is_in_every_result(done):
    _, out, _ = done
    run = out / "without-es"
    train = pq.read_table(run / "data/train.parquet").column("language").to_pylist()
    assert sorted(set(train)) == ["de", "en"]
    assert (run / "subnetworks/es.json").is_file()
    shares = pq.read_table(run / "influence/sparse/subnetwork/languages.parquet").to_pandas()
    assert set(shares.test_language) == {"en", "de", "es"}
    assert set(shares.train_language) == {"en", "de"}
    assert set(shares.null_share) == {0.5}
    summary = json.loads((run / "analysis/summary.json").read_text())
    assert summary["in_language"][0]["num_test"] == 12  # of en and de, not of es
    table = pq.read_table(out / "sweep.parquet").to_pandas()
    zero_shot = table[table.point == "without-es"]["accuracy_zero_shot"]
    assert zero_shot.between(0, 1).all()
    assert table[table.point == "base"]["accuracy_zero_shot"].isna().all()


def test_the_page_contains_its_figures_and_loads_nothing(done):
    _, out, _ = done
    page = (out / "sweep.html").read_text(encoding="utf-8")
    assert "src=" not in page.partition("<script>")[0]
    assert "default-src 'none'" in page
    figures = Page(page).json("figure-data")
    assert page.count('class="plot"') == len(figures) >= 6
    first = figures[0]
    assert first["data"][0]["x"] == list(POINTS)  # several settings vary: x is the point
    assert first["data"][0]["error_y"]["array"][0] > 0
    assert all(point in page for point in POINTS)


def test_a_single_number_that_varies_is_on_the_x_axis(done, tmp_path):
    _, out, _ = done
    table = pq.read_table(out / "sweep.parquet")
    points = table.filter(pc.is_in(table["point"], pa.array(["base", "threshold"])))
    write_sweep_page(tmp_path / "sweep.html", "thresholds", ["prune.threshold"], points)
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    figures = Page(page).json("figure-data")
    assert figures[0]["data"][0]["x"] == [0.5, 0.95]


def test_a_later_change_of_a_run_does_not_change_the_files_of_another(done, tmp_path):
    _, out, _ = done
    first, second = tmp_path / "first", tmp_path / "second"
    link_folder(out / "base", first)
    link_folder(first, second)
    before = files_of(second, "**/*")
    overrides = ("views.random=0", "influence.k=3", "name=new")
    changed = RunFolder(first, override_config(RunFolder(first).config, overrides))
    shard = first / "features/full/full/checkpoint-1/train/shard-00000.safetensors"
    shard.unlink()
    with changed.locked():
        run_stages(changed)
        for stage in ("data", "finetune", "prune", "sparse-finetune", "collect"):
            run_stages(changed, [stage], again=stage)
    assert shard.is_file()
    assert verify(first) == []
    assert files_of(second, "**/*") == before
    assert verify(second) == []


def interrupted_at_threshold(stage):
    """Return a function `run` of a stage that is interrupted at the point `threshold`."""
    run = stage.run

    def interrupted(context):
        if context.run.path.name == "threshold":
            raise KeyboardInterrupt
        run(context)

    return interrupted


def test_an_interrupted_sweep_resumes_and_has_the_same_results(done, tmp_path, monkeypatch):
    sweep, out, _ = done
    points = {name: sweep.points[name] for name in ("base", "threshold")}
    small = type(sweep)(sweep.name, sweep.settings, points)
    link_folder(out / "base", tmp_path / "out" / "base")
    with monkeypatch.context() as patched:
        for stage in (prune, collect, influence):
            patched.setattr(stage, "run", interrupted_at_threshold(stage))
            with pytest.raises(KeyboardInterrupt):
                run_sweep(small, tmp_path / "out", lambda line: None)
            patched.undo()
    assert not (tmp_path / "out/sweep.csv").exists()
    assert run_sweep(small, tmp_path / "out", lambda line: None) == {}
    for point in points:
        assert files_of(tmp_path / "out" / point, *RESULTS) == files_of(out / point, *RESULTS)


def test_a_damaged_shard_is_not_shared(done, tmp_path):
    sweep, out, _ = done
    link_folder(out / "base", tmp_path / "base")
    name = "features/full/full/checkpoint-1/train/shard-00000.safetensors"
    content = (tmp_path / "base" / name).read_bytes()
    (tmp_path / "base" / name).unlink()
    (tmp_path / "base" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    points = {"base": sweep.points["base"], "threshold": sweep.points["threshold"]}
    small = type(sweep)(sweep.name, sweep.settings, points)
    assert run_sweep(small, tmp_path, lambda line: None) == {}
    assert (tmp_path / "threshold" / name).read_bytes() == content
    assert verify(tmp_path / "threshold") == []
    assert len(verify(tmp_path / "base")) == 1


def test_files_are_copied_if_the_file_system_has_no_hard_links(done, tmp_path, monkeypatch):
    _, out, _ = done

    def refuse(*arguments):
        raise OSError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    link_folder(out / "base" / "data", tmp_path / "data")
    assert files_of(tmp_path / "data", "*") == files_of(out / "base/data", "*")
    assert not (tmp_path / "data/train.parquet").samefile(out / "base/data/train.parquet")


def test_a_point_that_fails_does_not_stop_the_others(done, tmp_path):
    _, out, _ = done
    points = {"fails": {"model.sentencepiece": "nowhere.model"}, "base": {}}
    file = write_sweep_file(tmp_path / "tiny.yaml", points=points)
    link_folder(out / "base", tmp_path / "out" / "base")
    result = CliRunner().invoke(main, ["sweep", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert re.search(r"\b1 of 2 points .*: fails$", result.output, re.MULTILINE)
    assert "nowhere.model" in result.output
    assert "Traceback" not in result.output
    table = pq.read_table(tmp_path / "out/sweep.parquet").to_pandas()
    assert set(table.point) == {"base"}


def test_check_lists_what_is_shared_and_writes_nothing(tmp_path):
    file = write_sweep_file(tmp_path / "tiny.yaml", grid={"prune.threshold": [0.9, 0.8]})
    result = CliRunner().invoke(main, ["sweep", str(file), "--out", str(tmp_path / "o"), "--check"])
    assert result.exit_code == 0
    first, second = result.output.split("threshold-0.8\n")
    assert "finetune: to do" in first
    assert "finetune: threshold-0.9, prune: to do" in second
    assert not (tmp_path / "o").exists()


def test_a_grid_has_a_named_point_for_every_combination(tmp_path):
    grid = {"prune.threshold": [0.9, 0.8], "task.languages": [["en", "de"], ["en", "de", "es"]]}
    points = {"small": {"seed": 1}, "large": {"seed": 2, "model.hidden": 48}}
    sweep = load_sweep(write_sweep_file(tmp_path / "s.yaml", points=points, grid=grid))
    assert list(sweep.points)[:2] == [
        "small_threshold-0.9_languages-en,de", "small_threshold-0.9_languages-en,de,es",
    ]  # fmt: skip
    assert len(sweep.points) == 8
    point = sweep.points["large_threshold-0.8_languages-en,de"]
    assert (point.seed, point.model.hidden, point.prune.threshold) == (2, 48, 0.8)
    assert point.name == "tiny large_threshold-0.8_languages-en,de"
    assert sweep.values("small_threshold-0.9_languages-en,de")["model.hidden"] == 24


def test_a_base_is_a_file_name_or_an_embedded_name_or_sections(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(base_tree()))
    points = {"a": {}}
    beside = load_sweep(write_sweep_file(tmp_path / "s.yaml", base="mine.yaml", points=points))
    assert beside.points["a"].model.hidden == 24
    embedded = write_sweep_file(
        tmp_path / "t.yaml", base="demo", points=points, set={"model.hidden": 64}
    )
    assert load_sweep(embedded).points["a"].model.hidden == 64
    assert load_sweep(embedded, ("model.hidden=32",)).points["a"].model.hidden == 32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "points.*grid"),
        ({"points": {"a/b": {}}}, "got 'a/b'"),
        ({"points": {"..": {}}}, r"got '\.\.'"),
        ({"grid": {"seed": [1, 1]}}, "got 'seed-1'"),
        ({"points": {"a": {"seed": 1}}, "grid": {"seed": [2]}}, r"\bseed\b.*point a\b"),
        ({"points": {"a": {"prune.threshold": 2}}}, r"point a: prune\.threshold: .* got 2"),
        ({"points": {"a": {"prune.treshold": 0.9}}}, r"point a: prune\.treshold: .* got 0\.9"),
        ({"points": {"a": {"seed.x": 1}}}, r"seed\.x=1: "),
        ({"points": ["a"]}, r"points: .*"),
        ({"pionts": {}}, "pionts: "),
        ({"points": {"a": {}}, "base": "nowhere"}, "nowhere: "),
    ],
)
def test_an_invalid_sweep_file_is_refused_by_key_and_value(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_sweep(write_sweep_file(tmp_path / "s.yaml", **content))


def test_settings_that_vary_cannot_be_overridden_and_begun_points_cannot_be_changed(done, tmp_path):
    _, out, _ = done
    file = write_sweep_file(tmp_path / "s.yaml", points=POINTS)
    with pytest.raises(ValueError, match=r"--set prune\.threshold: "):
        load_sweep(file, ("prune.threshold=0.9",))
    with pytest.raises(ValueError, match=r"finetune\.epochs=1.*finetune\.epochs=2"):
        sweep_plan(load_sweep(file, ("finetune.epochs=2",)), out)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_embedded(path):
    assert load_config(path) == load_config(path.stem)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweeps/*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_has_valid_points_with_enough_examples(path):
    sweep = load_sweep(path.stem)
    assert sweep == load_sweep(path)
    assert sweep.name == path.stem
    assert len(sweep.points) >= 2
    tasks = {config.task.model_dump_json(): config.task for config in sweep.points.values()}
    for task in tasks.values():
        assert task.name in ("grammar", "planted")  # tasks that need no download
        data = load_task(task)
        assert len(data.test) == len(task.languages) * task.test_per_language
