"""`tracmod verify` reports every missing file and flipped bit, whatever is run afterwards."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_study import tiny_config

from tracmod.attribution.query import Attributor
from tracmod.files.durable import write_checksums
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.validation.integrity import verify


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of one language, with an index."""
    torch.set_num_threads(1)
    config = tiny_config(
        task={"languages": ["en"]}, finetune={"epochs": 1}, views={"random": 0, "other": []}
    )
    folder = tmp_path_factory.mktemp("integrity") / "run"
    run_stages(RunFolder(folder, config))
    Attributor(folder).build_index("flat")
    assert verify(folder) == []
    return folder


@pytest.fixture
def run(done, tmp_path):
    """A copy to damage."""
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def flip(path, byte=100):
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "lost",
    [
        "features/full/full/checkpoint-1/train/manifest.json",
        "features/full/full/checkpoint-1/train",
        "features/sparse",
        "features",
        "index/full/full/index.json",
        "index/full/full/index.faiss",
        "models/sparse",
        "data/dev.parquet",
        "checksums.json",
    ],
)
def test_missing_files_are_reported(run, lost):
    path = run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    problems = verify(run)
    assert problems
    assert all(str(path) in problem and "missing" in problem for problem in problems)


@pytest.mark.parametrize(
    "damaged",
    [
        "features/full/full/checkpoint-1/train/manifest.json",
        "features/full/full/checkpoint-1/train/ids.json",
        "features/full/full/checkpoint-1/train/shard-00000.safetensors",
        "index/full/full/index.json",
        "index/full/full/index.faiss",
        "models/full/checkpoint-1/model.safetensors",
        "subnetworks/en.json",
        "influence/full/full/top.parquet",
        "analysis/summary.json",
        "report/index.html",
    ],
)
def test_a_flipped_bit_is_found(run, damaged):
    flip(run / damaged)
    problems = verify(run)
    assert problems
    assert all(damaged in problem and "damaged" in problem for problem in problems)


@pytest.mark.parametrize("stage", ["report", "analyze", "influence"])
def test_damage_is_still_reported_after_a_later_stage(run, stage):
    subnetwork, dev = run / "subnetworks/en.json", run / "data/dev.parquet"
    subnetwork.write_text(subnetwork.read_text().replace("}", " }", 1))
    dev.unlink()
    run_stages(RunFolder(run), [stage], again=stage)
    problems = verify(run)
    assert len(problems) == 2
    assert f"{dev} is missing" in problems
    assert any(str(subnetwork) in problem and "damaged" in problem for problem in problems)


def test_a_stage_records_the_checksums_of_files_it_writes_again(run):
    flip(run / "report/index.html")
    run_stages(RunFolder(run), ["report"], again="report")
    assert verify(run) == []


def test_checksums_of_a_whole_folder_forget_removed_files(tmp_path):
    for name in ("a.txt", "b/c.txt", "features/x/manifest.json", "features/x/ids.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "run.json").write_text("{}")
    write_checksums(tmp_path)
    (tmp_path / "a.txt").unlink()
    assert verify(tmp_path)[0] == f"{tmp_path / 'a.txt'} is missing"
    write_checksums(tmp_path, "b")
    assert verify(tmp_path)[0] == f"{tmp_path / 'a.txt'} is missing"
    write_checksums(tmp_path)
    assert not any("a.txt" in problem for problem in verify(tmp_path))


def test_an_invalid_run_json_is_an_error(run):
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json"):
        verify(run)
    (run / "run.json").write_text("[1]")
    assert verify(run) == []


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_invalid_checksums_are_a_problem(run, text):
    (run / "checksums.json").write_text(text)
    assert f"{run / 'checksums.json'} is damaged" in verify(run)[0]
    with pytest.raises(ValueError, match=r"checksums\.json"):
        run_stages(RunFolder(run), ["report"], again="report")
