"""Sweeps: what points share is done once, and each point is the run that it would be alone."""

from __future__ import annotations

import json
import os
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
    tree = {"name": "tiny", "base": base_tree(), **content}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished sweep: its file and folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sweep")
    file = write_sweep_file(folder / "tiny.yaml", points=POINTS)
    sweep = load_sweep(file)
    plan = sweep_plan(sweep, folder / "out")
    assert not (folder / "out").exists()
    assert run_sweep(sweep, folder / "out", lambda line: None) == {}
    return sweep, folder / "out", plan


def stages(run):
    return json.loads((run / "run.json").read_text())["stages"]


def test_points_share_what_is_the_same_and_the_plan_said_so(done):
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


def test_features_are_shared_where_their_stage_is_not(done):
    _, out, _ = done
    full = "features/full/full/checkpoint-1/train/shard-00000.safetensors"
    drawn = "features/sparse/random-0/de/checkpoint-1/test/shard-00000.safetensors"
    assert (out / "threshold" / full).samefile(out / "base" / full)
    assert (out / "views" / full).samefile(out / "base" / full)
    assert (out / "views" / drawn).samefile(out / "base" / drawn)
    assert not (out / "without-es" / full).samefile(out / "base" / full)
    assert (
        not (out / "views" / full)
        .with_name("writer.lock")
        .samefile((out / "base" / full).with_name("writer.lock"))
    )


def test_a_point_is_the_run_that_it_would_be_alone(done, tmp_path):
    sweep, out, _ = done
    alone = RunFolder(tmp_path / "threshold", sweep.points["threshold"])
    with alone.locked():
        run_stages(alone)
    expected = files_of(alone.path, *RESULTS)
    assert len(expected) > 40
    assert files_of(out / "threshold", *RESULTS) == expected


def test_doing_it_again_does_nothing(done, monkeypatch):
    sweep, out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/**/*.*")}
    assert set(sweep_plan(sweep, out)["views"].values()) == {"done"}
    monkeypatch.setattr(
        tracmod.study.pipeline, "Study", lambda *arguments: None
    )  # has no stages to do
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
    found = next(
        entry
        for entry in summary["in_language"]
        if (entry["model"], entry["view"]) == ("sparse", "random")
    )
    assert row["in_language_share"].item() == found["share_positive"]["value"]
    assert row["in_language_share_high"].item() == found["share_positive"]["high"]
    change = next(
        entry
        for entry in summary["changes"]
        if (entry["model"], entry["view"], entry["base_model"]) == ("sparse", "random", "full")
    )
    assert row["sparse_change"].item() == change["share_positive"]["value"]
    assert row["prune.threshold"].item() == 0.5
    kept = [entry["kept"] for entry in summary["subnetworks"].values()]
    assert row["heads_kept"].item() == pytest.approx(sum(kept) / len(kept))
    assert table[table.point == "base"]["null_share"].to_numpy() == pytest.approx(1 / 3)


def test_a_language_without_training_data_goes_through_the_whole_study(done):
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
    known = table[table.point == "without-es"]["accuracy_zero_shot"]
    assert known.between(0, 1).all()
    assert table[table.point == "base"]["accuracy_zero_shot"].isna().all()


def test_the_page_holds_its_figures_and_loads_nothing(done):
    _, out, _ = done
    page = (out / "sweep.html").read_text(encoding="utf-8")
    assert "src=" not in page.partition("<script>")[0]
    assert "default-src 'none'" in page
    figures = Page(page).json("figure-data")
    assert page.count('class="plot"') == len(figures) >= 6
    first = figures[0]
    assert first["data"][0]["x"] == list(POINTS)  # several settings: the points are the x axis
    assert first["data"][0]["error_y"]["array"][0] > 0
    assert all(point in page for point in POINTS)


def test_a_single_number_that_varies_is_the_x_axis(done, tmp_path):
    _, out, _ = done
    table = pq.read_table(out / "sweep.parquet")
    own = table.filter(pc.is_in(table["point"], pa.array(["base", "threshold"])))
    write_sweep_page(tmp_path / "sweep.html", "thresholds", ["prune.threshold"], own)
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    figures = Page(page).json("figure-data")
    assert figures[0]["data"][0]["x"] == [0.5, 0.95]


def test_what_one_run_does_later_does_not_reach_the_other(done, tmp_path):
    _, out, _ = done
    one, other = tmp_path / "one", tmp_path / "other"
    link_folder(out / "base", one)
    link_folder(one, other)
    before = files_of(other, "**/*")
    config = override_config(RunFolder(one).config, ("views.random=0", "influence.k=3", "name=new"))
    changed = RunFolder(one, config)
    shard = one / "features/full/full/checkpoint-1/train/shard-00000.safetensors"
    shard.unlink()
    with changed.locked():
        run_stages(changed)
        for stage in ("data", "finetune", "prune", "sparse-finetune", "collect"):
            run_stages(changed, [stage], again=stage)
    assert shard.is_file()
    assert verify(one) == []
    assert files_of(other, "**/*") == before
    assert verify(other) == []


def stopped_at_threshold(stage):
    """The stage, stopped at the point `threshold`."""
    real = getattr(tracmod.study.pipeline.Study, stage)

    def stopped(self):
        if self.run.path.name == "threshold":
            raise KeyboardInterrupt
        real(self)

    return stopped


def test_stopped_anywhere_it_goes_on_and_ends_the_same(done, tmp_path, monkeypatch):
    sweep, out, _ = done
    points = {name: sweep.points[name] for name in ("base", "threshold")}
    small = type(sweep)(sweep.name, sweep.settings, points)
    link_folder(out / "base", tmp_path / "out" / "base")
    with monkeypatch.context() as patched:
        for stage in ("prune", "collect", "influence"):
            patched.setattr(tracmod.study.pipeline.Study, stage, stopped_at_threshold(stage))
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
    right = (tmp_path / "base" / name).read_bytes()
    (tmp_path / "base" / name).unlink()
    (tmp_path / "base" / name).write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    points = {"base": sweep.points["base"], "threshold": sweep.points["threshold"]}
    small = type(sweep)(sweep.name, sweep.settings, points)
    assert run_sweep(small, tmp_path, lambda line: None) == {}
    assert (tmp_path / "threshold" / name).read_bytes() == right
    assert verify(tmp_path / "threshold") == []
    assert len(verify(tmp_path / "base")) == 1


def test_where_the_file_system_has_no_links_files_are_copied(done, tmp_path, monkeypatch):
    _, out, _ = done

    def refuse(*arguments):
        raise OSError("no links here")

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
    assert "1 of 2 points failed: fails" in result.output
    assert "SentencePiece file nowhere.model: no such file" in result.output
    assert "Traceback" not in result.output
    table = pq.read_table(tmp_path / "out/sweep.parquet").to_pandas()
    assert set(table.point) == {"base"}


def test_check_says_what_is_shared_and_does_nothing(tmp_path):
    file = write_sweep_file(tmp_path / "tiny.yaml", grid={"prune.threshold": [0.9, 0.8]})
    result = CliRunner().invoke(main, ["sweep", str(file), "--out", str(tmp_path / "o"), "--check"])
    assert result.exit_code == 0
    first, second = result.output.split("threshold-0.8\n")
    assert "finetune: to do" in first
    assert "finetune: threshold-0.9, prune: to do" in second
    assert not (tmp_path / "o").exists()


def test_grids_are_multiplied_and_named(tmp_path):
    grid = {"prune.threshold": [0.9, 0.8], "task.languages": [["en", "de"], ["en", "de", "es"]]}
    points = {"small": {"seed": 1}, "large": {"seed": 2, "model.hidden": 48}}
    sweep = load_sweep(write_sweep_file(tmp_path / "s.yaml", points=points, grid=grid))
    assert list(sweep.points)[:2] == [
        "small_threshold-0.9_languages-en,de", "small_threshold-0.9_languages-en,de,es",
    ]  # fmt: skip
    assert len(sweep.points) == 8
    one = sweep.points["large_threshold-0.8_languages-en,de"]
    assert (one.seed, one.model.hidden, one.prune.threshold) == (2, 48, 0.8)
    assert one.name == "tiny large_threshold-0.8_languages-en,de"
    assert sweep.values("small_threshold-0.9_languages-en,de")["model.hidden"] == 24


def test_a_base_is_a_file_beside_an_embedded_name_or_sections(tmp_path):
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
        ({}, "expected points or grid, found neither"),
        ({"points": {"a/b": {}}}, r"letters, digits .* got 'a/b'"),
        ({"points": {"..": {}}}, r"got '\.\.'"),
        ({"grid": {"seed": [1, 1]}}, "distinct names .* got 'seed-1'"),
        ({"points": {"a": {"seed": 1}}, "grid": {"seed": [2]}}, "seed is both in point a"),
        ({"points": {"a": {"prune.threshold": 2}}}, r"point a: prune\.threshold: .* got 2"),
        ({"points": {"a": {"prune.treshold": 0.9}}}, r"point a: prune\.treshold: Extra"),
        ({"points": {"a": {"seed.x": 1}}}, "seed.x=1: seed is a value"),
        ({"points": ["a"]}, "points: Input should be a valid dictionary"),
        ({"pionts": {}}, "pionts: Extra inputs"),
        ({"points": {"a": {}}, "base": "nowhere"}, "nowhere: expected .* neither"),
    ],
)
def test_a_bad_sweep_file_says_where(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_sweep(write_sweep_file(tmp_path / "s.yaml", **content))


def test_what_the_sweep_varies_cannot_be_set_and_begun_points_cannot_be_changed(done, tmp_path):
    _, out, _ = done
    file = write_sweep_file(tmp_path / "s.yaml", points=POINTS)
    with pytest.raises(ValueError, match=r"--set prune\.threshold: the sweep itself varies it"):
        load_sweep(file, ("prune.threshold=0.9",))
    with pytest.raises(ValueError, match=r"was begun with finetune\.epochs=1"):
        sweep_plan(load_sweep(file, ("finetune.epochs=2",)), out)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid(path):
    assert load_config(path) == load_config(path.stem)  # the embedded one is the file's


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweeps/*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_expands_to_points_whose_examples_there_are(path):
    sweep = load_sweep(path.stem)
    assert sweep == load_sweep(path)
    assert sweep.name == path.stem
    assert len(sweep.points) >= 2
    tasks = {config.task.model_dump_json(): config.task for config in sweep.points.values()}
    for task in tasks.values():
        assert task.name in ("grammar", "planted")  # anyone can try it
        data = load_task(task)
        assert len(data.test) == len(task.languages) * task.test_per_language
