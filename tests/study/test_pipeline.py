"""A whole small study: its run folder, resuming, running twice, and changes that are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_study import LANGUAGES, RESULTS, files_of, run_killing, tiny_config

import tracmod as tm
from tracmod import kernels
from tracmod.analysis.results import RunResults
from tracmod.analysis.summary import analyze
from tracmod.attribution.query import Attributor
from tracmod.config import CollectConfig, RunConfig
from tracmod.features import shards
from tracmod.features.store import FeatureStore, verify_store
from tracmod.influence.scores import top_influences
from tracmod.models.checkpoints import load_checkpoints
from tracmod.models.digests import tokenizer_digest
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model
from tracmod.study.context import RunContext
from tracmod.study.pipeline import run_stages
from tracmod.study.run_features import load_checkpoint
from tracmod.study.run_folder import RunFolder
from tracmod.study.stages.influence import _write_view
from tracmod.subnetworks.importance import head_importance
from tracmod.training.fine_tune import accuracy_by_language
from tracmod.training.folder import epoch_masks
from tracmod.validation.integrity import verify


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study") / "run"
    run = RunFolder(folder, tiny_config())
    with run.locked():
        run_stages(run)
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the finished run, for tests that change it."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adam", "ekfac"])
def test_scores_of_a_preconditioned_run_are_those_of_preconditioned_gradients(tmp_path, kind):
    run = RunFolder(tmp_path / "run", tiny_config(collect={"preconditioner": kind}))
    with run.locked():
        run_stages(run)
    out = run.path
    (checkpoint, *_) = RunContext(run).checkpoints("sparse")
    model, tokenizer = load_model(checkpoint.path)
    train, test = (
        encode(tokenizer, pq.read_table(run.data(split)), 48) for split in ("train", "test")
    )
    if kind == "adam":
        metric = tm.adam_preconditioner(model, checkpoint.path)
    else:
        file = out / "preconditioners" / "sparse" / f"checkpoint-{checkpoint.epoch}.safetensors"
        assert file.is_file()
        assert verify(out) == []
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert [str(file) in problem for problem in verify(out)] == [True]
        file.write_bytes(content)
        metric = tm.fit_ekfac(model, train, batch_tokens=8192)
    stored = [
        FeatureStore.open(run.features("sparse", "full", None, 1, split)).read()
        for split in ("test", "train")
    ]
    scores = tm.influence_scores(*stored, normalize="cosine")
    exact = tm.exact_influence(model, train, test, normalize="cosine", preconditioner=metric)
    assert (scores - exact).square().mean().sqrt() < 0.1
    assert torch.corrcoef(torch.stack([scores.flatten(), exact.flatten()]))[0, 1] > 0.95
    answer = tm.Attributor(out).query("The king sleeps.", "The king is asleep.", k=3)
    assert len(answer["proponents"]) == 3
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert f"TracIn, {'EK-FAC' if kind == 'ekfac' else 'Adam'} preconditioner" in page


def test_the_run_folder_has_the_documented_files(done):
    record = json.loads((done / "run.json").read_text())
    assert record["config"]["task"]["languages"] == LANGUAGES
    assert {"torch", "transformers", "python"} <= record["versions"].keys()
    assert record["device"] == "cpu"
    assert record["seeds"] == {"run": 0, "task": 0, "projection": 0}
    assert list(record["stages"]) == list(RunFolder(done).stages)
    assert all(stage["state"] == "done" for stage in record["stages"].values())
    for split, count in (("train", 12), ("dev", 9), ("test", 6)):
        table = pq.read_table(done / "data" / f"{split}.parquet")
        assert table.column_names == ["id", "language", "text_a", "text_b", "label", "group"]
        languages = table.column("language").to_pylist()
        assert {name: languages.count(name) for name in LANGUAGES} == dict.fromkeys(
            LANGUAGES, count
        )
    for model in ("full", "sparse"):
        for epoch in (1, 2):
            folder = done / "models" / model / f"checkpoint-{epoch}"
            state = json.loads((folder / "tracmod.json").read_text())
            assert state["epoch"] == epoch
            assert state["learning_rate"] > 0
            load_model(folder)
    for language in LANGUAGES:
        tree = json.loads((done / "subnetworks" / f"{language}.json").read_text())
        assert tree["language"] == language
        assert tree["score"] >= 0.95 * tree["full_score"] - 1e-9
        assert np.array(tree["mask"]).shape == (tree["num_layers"], tree["num_heads"]) == (2, 3)
    assert (done / "report" / "index.html").is_file()
    assert (done / "analysis" / "summary.json").is_file()


def test_feature_stores_have_the_documented_paths_and_are_valid(done):
    stores = {str(path.parent.relative_to(done)) for path in done.glob("features/**/manifest.json")}
    expected = {f"features/{m}/{v}/checkpoint-{e}/{s}"
                for m in ("full", "sparse") for v in ("full", "other-de")
                for e in (1, 2) for s in ("train", "test")}  # fmt: skip
    expected |= {f"features/{m}/{v}/{language}/checkpoint-{e}/{s}"
                 for m in ("full", "sparse") for v in ("subnetwork", "random-0")
                 for language in LANGUAGES for e in (1, 2) for s in ("train", "test")}  # fmt: skip
    assert stores == expected
    assert [problem for store in stores for problem in verify_store(done / store)] == []
    store = tm.FeatureStore.open(done / "features/full/subnetwork/de/checkpoint-1/test")
    test = pq.read_table(done / "data/test.parquet")
    rows = [row for row in test.to_pylist() if row["language"] == "de"]
    assert store.ids == [row["id"] for row in rows]


@pytest.mark.parametrize("model", ["full", "sparse"])
@pytest.mark.parametrize("view", ["full", "subnetwork", "random-0", "other-de"])
def test_tables_have_the_documented_columns_and_shares_sum_to_one(done, model, view):
    folder = done / "influence" / model / view
    top = pq.read_table(folder / "top.parquet").to_pandas()
    assert list(top.columns) == [
        "test_id", "test_language", "sign", "rank", "train_id", "train_language", "score",
    ]  # fmt: skip
    assert len(top) == 18 * 2 * 5
    for sign in (1, -1):
        rows = top[top.sign == sign]
        scores = rows.pivot(index="test_id", columns="rank", values="score").to_numpy()
        assert (sign * np.diff(scores) <= 0).all()
    for name in ("languages", "epochs"):
        table = pq.read_table(folder / f"{name}.parquet").to_pandas()
        key = ["test_language"] + (["epoch"] if name == "epochs" else [])
        for share in ("share_positive", "share_negative"):
            assert np.allclose(table.groupby(key)[share].sum(), 1)
            if name == "languages":
                assert (table[f"{share}_low"] <= table[share] + 1e-9).all()
                assert (table[share] <= table[f"{share}_high"] + 1e-9).all()
        assert len(table) == 9 * (2 if name == "epochs" else 1)


def test_influence_of_the_full_model_is_that_of_the_python_functions(done):
    """The scores are computed again from the checkpoints and the data alone."""
    config = tiny_config()
    checkpoints = load_checkpoints(done / "models/full" / f"checkpoint-{e}" for e in (1, 2))
    projection = tm.Projection(256)
    features = {"train": [], "test": []}
    tables = {split: pq.read_table(done / "data" / f"{split}.parquet") for split in features}
    for checkpoint in checkpoints:
        model, tokenizer = load_model(checkpoint.path)
        for split, table in tables.items():
            examples = encode(tokenizer, table, config.model.max_length)
            features[split].append(tm.collect_features(model, examples, projection))
    weights = [checkpoint.learning_rate for checkpoint in checkpoints]
    scores = tm.influence_scores(features["test"], features["train"], weights, "cosine")
    written = pq.read_table(done / "influence/full/full/top.parquet").to_pandas()
    train_ids = tables["train"].column("id").to_pylist()
    for row, test_id in enumerate(tables["test"].column("id").to_pylist()):
        top = written[(written.test_id == test_id) & (written.sign == 1)].sort_values("rank")
        expected = scores[row, [train_ids.index(train_id) for train_id in top.train_id]]
        np.testing.assert_allclose(top.score, expected, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(top.score, scores[row].topk(5).values, rtol=1e-4, atol=1e-8)


def test_features_of_the_view_subnetwork_are_under_the_mask_of_the_language(done):
    checkpoint = load_checkpoints([done / "models/full/checkpoint-2"])[0]
    model, tokenizer = load_model(checkpoint.path)
    mask = tm.HeadMask.load(done / "subnetworks/es.json")
    table = pq.read_table(done / "data/train.parquet")
    expected = tm.collect_features(
        model, encode(tokenizer, table, 48), tm.Projection(256), head_mask=mask
    )
    store = tm.FeatureStore.open(done / "features/full/subnetwork/es/checkpoint-2/train")
    torch.testing.assert_close(store.read(), expected, rtol=1e-4, atol=1e-4)


def test_a_finished_run_run_again_changes_no_file(done):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    run = RunFolder(done, tiny_config())
    with run.locked():
        run_stages(run)
    after = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed <= {".lock"}


def test_a_second_run_writes_the_same_files(done, tmp_path):
    run = RunFolder(tmp_path / "again", tiny_config())
    run_stages(run)
    assert files_of(tmp_path / "again", *RESULTS) == files_of(done, *RESULTS)


@pytest.mark.slow
def test_a_run_killed_at_many_moments_and_resumed_writes_the_same_files(done, tmp_path):
    out = tmp_path / "run"
    assert run_killing(tiny_config(), out) >= 1
    assert files_of(out, *RESULTS) == files_of(done, *RESULTS)


def test_a_stage_needs_the_stages_before_it(tmp_path):
    run = RunFolder(tmp_path / "run", tiny_config())
    with pytest.raises(ValueError, match=r"prune\b.*\bdata\b"):
        run_stages(run, ["prune"])
    run_stages(run, ["data"])
    with pytest.raises(ValueError, match=r"collect\b.*\bfinetune\b"):
        run_stages(run, ["collect"])


def test_a_changed_config_is_refused_where_work_would_be_lost(done):
    with pytest.raises(ValueError, match=r"finetune\.epochs=2.*finetune\.epochs=3"):
        RunFolder(done, tiny_config(finetune={"epochs": 3}))
    with pytest.raises(ValueError, match=r"task\.seed=0.*task\.seed=1"):
        RunFolder(done, tiny_config(task={"seed": 1}))


def test_a_changed_memory_undoes_no_stage_and_changes_no_result(copy):
    config = tiny_config(influence={"memory": "34MB"})
    run = RunFolder(copy, config)
    assert all(run.is_done(stage) for stage in run.stages)
    before = files_of(copy, "influence/**/*.parquet")
    run_stages(run, ["influence"], again="influence")
    assert files_of(copy, "influence/**/*") == before
    with pytest.raises(ValueError, match=r"memory: .*\b1,000,000\b"):
        run_stages(RunFolder(copy, tiny_config(influence={"memory": "1MB"})), again="influence")


def test_influence_verifies_each_shard_at_most_twice(copy, monkeypatch):
    """It is verified once for the rankings and once for the tables, not for every ranking."""
    verified, shard_problem = Counter(), shards.shard_problem

    def count(file, *rest):
        verified[file] += 1
        return shard_problem(file, *rest)

    monkeypatch.setattr(shards, "shard_problem", count)
    run_stages(RunFolder(copy), ["influence"], again="influence")
    assert len(verified) == len(list(copy.glob("features/**/shard-*")))
    assert max(verified.values()) <= 2


def test_a_changed_k_undoes_influence_and_the_stages_after_it_only(done, copy):
    run = RunFolder(copy, tiny_config(influence={"k": 3}))
    stages = [stage for stage in run.stages if not run.is_done(stage)]
    assert stages == ["influence", "analyze", "report"]
    run_stages(run)
    assert len(pq.read_table(copy / "influence/full/full/top.parquet")) == 18 * 2 * 3
    assert files_of(copy, "models/**/*") == files_of(done, "models/**/*")


def test_a_view_removed_from_the_config_is_removed_from_the_results(copy):
    run = RunFolder(copy, tiny_config(views={"random": 0}))
    run_stages(run)
    assert not (copy / "influence/full/random-0").exists()
    assert "random" not in (copy / "analysis/summary.json").read_text()
    assert verify(copy) == []


def test_two_processes_cannot_work_in_one_folder(done):
    run = RunFolder(done)
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import fcntl,sys,time; f=open(sys.argv[1],'w'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print('held', flush=True); time.sleep(60)", str(done / ".lock")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another .*process"), run.locked():
            pass
    finally:
        holder.kill()
        holder.wait()
    time.sleep(0.05)
    with run.locked():
        pass


def test_a_changed_projection_is_refused_before_anything_is_written(copy):
    before = (copy / "run.json").read_bytes()
    for key, old, new in (("projection_dim", 256, 128), ("every", 1, 2)):
        with pytest.raises(ValueError, match=rf"collect\.{key}={old}\b.*collect\.{key}={new}\b"):
            RunFolder(copy, tiny_config(collect={key: new}))
    assert (copy / "run.json").read_bytes() == before
    run = RunFolder(copy)
    assert all(run.is_done(stage) for stage in run.stages)


def test_the_section_collect_can_be_changed_until_the_stage_has_begun(tmp_path):
    run_stages(RunFolder(tmp_path / "run", tiny_config()), ["data"])
    RunFolder(tmp_path / "run", tiny_config(collect={"projection_dim": 128}))


def test_a_setting_added_with_a_default_undoes_no_stage(done):
    class NewerCollect(CollectConfig):
        new_setting: int = 7

    class NewerConfig(RunConfig):
        collect: NewerCollect = NewerCollect()
        new_setting: int = 7

    run = RunFolder(done)
    run.config = NewerConfig.model_validate(run.config.model_dump())
    assert all(run.is_done(stage) for stage in run.stages)
    run.config = run.config.model_copy(update={"collect": NewerCollect(new_setting=8)})
    assert not run.is_done("collect")


def test_locking_reads_what_another_process_has_done(tmp_path):
    waiting = RunFolder(tmp_path / "run", tiny_config())
    other = RunFolder(tmp_path / "run", tiny_config(task={"seed": 3}))
    same = RunFolder(tmp_path / "run", tiny_config(task={"seed": 3}))
    with other.locked():
        run_stages(other, ["data"])
    with pytest.raises(ValueError, match=r"task\.seed=3.*task\.seed=0"), (
        waiting.locked()
    ):  # fmt: skip
        pass
    with same.locked():
        assert same.is_done("data")
        assert same.record["label_names"] == other.record["label_names"]


def test_a_run_can_store_its_features_as_int8(done, tmp_path):
    run = RunFolder(tmp_path / "run", tiny_config(collect={"store_dtype": "int8"}))
    run_stages(run)
    name = "features/full/subnetwork/de/checkpoint-2/train"
    int8, float32 = (tm.FeatureStore.open(folder / name) for folder in (run.path, done))
    assert (int8.dtype, float32.dtype) == (torch.int8, torch.float32)
    step = float32.read().abs().amax(dim=1, keepdim=True) / 127
    assert torch.all((int8.read() - float32.read()).abs() <= 0.51 * step)
    with pytest.raises(
        ValueError, match=r"collect\.store_dtype=int8.*collect\.store_dtype=float32"
    ):
        RunFolder(run.path, tiny_config())


def test_features_of_another_model_are_refused(copy):
    path = copy / "models/full/checkpoint-2/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("output.dense.weight"))
    weights[name] = -weights[name]
    save_file(weights, path, {"format": "pt"})
    message = r"features/full/full/checkpoint-2/\w+ .*\bmodel: expected"
    with pytest.raises(ValueError, match=message):
        run_stages(RunFolder(copy), ["influence"], again="influence")
    with pytest.raises(ValueError, match=message):
        Attributor(copy).query("The dog sleeps.", "An animal sleeps.")


def test_features_under_another_mask_are_refused(copy):
    tree = json.loads((copy / "subnetworks/de.json").read_text())
    tree["mask"][0] = [1 - head for head in tree["mask"][0]]
    (copy / "subnetworks/de.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"subnetwork/de/.*\bhead_mask: expected"):
        run_stages(RunFolder(copy), ["influence"], again="influence")


def test_features_are_scored_on_the_device_of_the_run(copy, monkeypatch):
    """The device "meta", whose tensors have no data, stands for a GPU."""
    devices = set()

    def record(queries, trains, k, groups=None, *rest, **named):
        if "device" in named:
            devices.add(named["device"])
        else:
            devices.update(features.device.type for features in [*queries, *trains])
        sides = [side if isinstance(side, list) else [side] for side in (queries, trains)]
        on_cpu = [[torch.ones(features.shape) for features in side] for side in sides]
        return top_influences(*on_cpu, k, groups)

    monkeypatch.setattr("tracmod.study.stages.influence.top_influences", record)
    context = RunContext(RunFolder(copy))
    checkpoints = context.checkpoints("full")
    digests = [load_checkpoint(context, "full", checkpoint).digests for checkpoint in checkpoints]
    context.device = "meta"
    _write_view(context, "full", context.views[0], digests, [0] * 18)
    assert devices == {"meta"}


def test_checkpoints_share_a_tokenizer_whose_files_are_the_same(copy):
    context = RunContext(RunFolder(copy))
    first, second = context.checkpoints("full")
    tokenizer = context.load(first)[1]
    assert context.load(second)[1] is tokenizer
    assert context.tokenizer_digest(tokenizer) == tokenizer_digest(tokenizer)
    file = second.path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content))
    other = context.load(second)[1]
    assert other is not tokenizer
    assert context.tokenizer_digest(other) == tokenizer_digest(other) != tokenizer_digest(tokenizer)


@pytest.mark.cuda
def test_a_run_on_a_gpu_can_be_queried(tmp_path):
    if not torch.cuda.is_available() or kernels.build_info()["cuda"] is None:
        pytest.skip("no GPU, or built without CUDA")
    config = tiny_config(device="cuda", task={"languages": ["en"]}, views={"other": []})
    run_stages(RunFolder(tmp_path / "run", config))
    answer = Attributor(tmp_path / "run").query("The dog sleeps.", "An animal sleeps.", k=2)
    assert len(answer["proponents"]) == 2


def test_a_broken_subnetwork_file_is_written_again(copy):
    path = copy / "subnetworks/de.json"
    content = path.read_bytes()
    path.write_bytes(content[:40])
    run_stages(RunFolder(copy), ["prune"], again="prune")
    assert path.read_bytes() == content


def test_a_full_disk_leaves_the_results_unchanged(copy, monkeypatch):
    before = files_of(copy, "analysis/*")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        analyze(copy, bootstrap=60, permutations=60)
    assert files_of(copy, "analysis/*.parquet", "analysis/*.json") == before


def test_a_broken_file_of_results_is_named_in_the_error(copy):
    (copy / "models/full/metrics.json").write_text("[{")
    with pytest.raises(ValueError, match=r"models/full/metrics\.json"):
        RunResults(copy).metrics("full")


def test_a_checkpoint_without_learning_rate_is_refused_unless_weights_are_uniform(copy):
    folder = copy / "models/full/checkpoint-1"
    (folder / "tracmod.json").unlink()
    (folder / "trainer_state.json").write_text('{"epoch": 1, "global_step": 5, "log_history": []}')
    with pytest.raises(ValueError, match=r"checkpoint-1: .*learning rate"):
        RunContext(RunFolder(copy)).checkpoints("full")
    uniform = RunContext(RunFolder(copy, tiny_config(influence={"weights": "uniform"})))
    assert uniform.weights(uniform.checkpoints("full")) is None


@pytest.mark.parametrize("shape", ["paraphrase", "reviews"])
def test_the_other_shapes_of_the_embedded_task_can_be_run(tmp_path, shape):
    config = tiny_config(
        task={"shape": shape, "languages": ["en", "fr"], "train_per_language": 10},
        finetune={"epochs": 1},
        views={"random": 0, "other": []},
        influence={"normalize": "none", "weights": "uniform"},
    )
    run = RunFolder(tmp_path / "run", config)
    run_stages(run)
    assert (tmp_path / "run/report/index.html").is_file()


def test_sparse_fine_tuning_with_dynamic_masks(tmp_path):
    """The stage takes its settings from the config, and writes and applies its masks."""
    config = tiny_config(
        sparse_finetune={"masks": "dynamic", "shared": "classifier", "sampling": "uniform"}
    )
    run = RunFolder(tmp_path / "run", config)
    run_stages(run, ["data", "finetune", "prune", "sparse-finetune"])
    folder, context = run.model("sparse"), RunContext(run)
    identity = json.loads((folder / "training.json").read_text())
    assert (identity["shared"], identity["sampling"]) == ("classifier", "uniform")
    (first, tokenizer), (last, _) = (load_model(folder / f"checkpoint-{e}") for e in (1, 2))
    embeddings = [model.get_input_embeddings().weight for model in (first, last)]
    assert torch.equal(*embeddings)
    assert not torch.equal(first.classifier.dense.weight, last.classifier.dense.weight)

    static = context.subnetworks
    assert epoch_masks(folder, 1, static) == static
    masks = epoch_masks(folder, 2, static)
    dev, test = (encode(tokenizer, context.table(split), 48) for split in ("dev", "test"))
    for language, mask in masks.items():
        dev_languages = context.table("dev").column("language").to_pylist()
        examples = [
            example
            for example, dev_language in zip(dev, dev_languages, strict=True)
            if dev_language == language
        ]
        importance = head_importance(first, examples)
        assert mask.size == static[language].size
        assert importance[mask.array == 0].max(initial=0) <= importance[mask.array == 1].min()
    languages = context.table("test").column("language").to_pylist()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics[1]["accuracy"] == accuracy_by_language(last, test, languages, masks)

    assert verify(run.path) == []
    (folder / "masks/epoch-2/de.json").write_text("{}")
    assert any("epoch-2/de.json" in problem for problem in verify(run.path))


def test_a_checkpoint_that_counts_has_the_mean_learning_rate_since_the_previous(tmp_path):
    config = tiny_config(
        task={"languages": ["en"]},
        finetune={"epochs": 3},
        collect={"every": 2},
        views={"other": []},
    )
    run = RunFolder(tmp_path / "run", config)
    run_stages(run, ["data", "finetune"])
    folders = (run.model("full") / f"checkpoint-{epoch}" for epoch in (1, 2, 3))
    rates = [checkpoint.learning_rate for checkpoint in load_checkpoints(folders)]
    counted = RunContext(run).checkpoints("full")
    assert [checkpoint.epoch for checkpoint in counted] == [2, 3]
    counted_rates = [checkpoint.learning_rate for checkpoint in counted]
    assert counted_rates == pytest.approx([sum(rates[:2]) / 2, rates[2]])


@pytest.mark.parametrize("k", [0, [], [5, 5], [5, 0], "many"])
def test_k_is_one_or_more_distinct_positive_numbers(k):
    with pytest.raises(ValueError, match=r"tiny: influence\.k"):
        tiny_config(influence={"k": k})
    assert tiny_config(influence={"k": [5, 2, 9]}).influence.ks == [5, 2, 9]
    assert tiny_config().influence.ks == [5]


def test_distances_that_cannot_be_used_are_refused_before_the_first_stage(tmp_path):
    table = tmp_path / "distances.tsv"
    for text, named in ((None, ""), ("a\tb\tkm\nxx\tyy\t1\n", ".*de, en, es")):
        if text is not None:
            table.write_text(text)
        run = RunFolder(tmp_path / "run", tiny_config(analyze={"distances": str(table)}))
        with pytest.raises(ValueError, match=re.escape(str(table)) + named):
            run_stages(run)
    assert not (tmp_path / "run" / "data").exists()


def test_patterns_that_match_no_parameter_are_refused_before_the_training(tmp_path):
    run = RunFolder(tmp_path, tiny_config(collect={"parameters": ["*.qury"]}))
    with run.locked(), pytest.raises(ValueError, match=r"parameters: .*'\*\.qury'.*\.query"):
        run_stages(run, ["data", "finetune"])
    assert not list(tmp_path.glob("models/*/*"))


def test_a_run_whose_parameters_are_patterns(tmp_path):
    run = RunFolder(tmp_path, tiny_config(collect={"parameters": ["*.value", "*.query"]}))
    with run.locked():
        run_stages(run, ["data", "finetune", "prune", "sparse-finetune", "collect", "influence"])
    store = FeatureStore.open(run.features("full", "full", None, 1, "train"))
    assert store.identity["parameters"] == ["*.query", "*.value"]
    assert (tmp_path / "influence/full/full/top.parquet").is_file()
