"""The command line: help, exit codes, one-sentence errors, and what each command writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys

import click
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from encoders import tiny_encoder
from own_model import TEXTS, save_model, write_examples
from tiny_study import tiny_config

import tracmod as tm
from tracmod.cli import main
from tracmod.features.collector import Collector
from tracmod.kernels import build_info
from tracmod.models.loading import load_model

COMMANDS = {
    "run", "sweep", "finetune", "prune", "sparse-finetune", "collect", "influence", "analyze",
    "retrain", "metagradient", "report", "attribute", "index", "query", "status", "verify", "merge",
    "check", "export", "doctor", "bench", "figures", "tables", "explore",
}  # fmt: skip


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A transformers folder with its tokenizer."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path):
    return write_examples(tmp_path / "train.tsv", 13), write_examples(tmp_path / "query.tsv", 5)


def test_every_command_is_there_and_has_help_with_an_example():
    assert set(main.commands) == COMMANDS
    for name in COMMANDS:
        text = invoke(name, "--help")
        assert f"tracmod {name}" in text.partition("Options:")[0].partition("\n")[2], name
        for parameter in main.commands[name].params:
            is_option = isinstance(parameter, click.Option)
            assert not is_option or parameter.help, (name, parameter.name)


def test_attribute_writes_the_contracts_files(model_dir, files, tmp_path):
    train, query = files
    out = tmp_path / "out"
    invoke("attribute", "--model", model_dir, "--train", train, "--query", query, "--out", out,
           "-k", 4, "--projection-dim", 512, "--parameters", "all")  # fmt: skip
    top = pq.read_table(out / "top.parquet").to_pandas()
    assert list(top.columns) == [
        "test_id", "test_language", "sign", "rank", "train_id", "train_language", "score",
    ]  # fmt: skip
    assert len(top) == 5 * 2 * 4
    languages = pq.read_table(out / "languages.parquet").to_pandas()
    assert set(languages.test_language) == set(languages.train_language) == {"de", "en"}
    record = json.loads((out / "run.json").read_text())
    assert record["weights"] == [1.0]
    assert record["arguments"]["projection_dim"] == 512
    stores = [tm.FeatureStore.open(path.parent) for path in out.glob("features/**/manifest.json")]
    assert sorted(len(store) for store in stores) == [5, 13]
    assert "sound" in invoke("verify", out)


def test_attribute_with_little_memory_gives_the_same_result(model_dir, files, tmp_path):
    for name, memory in (("much", "4GB"), ("little", "33MiB")):
        invoke(*attribute_command(model_dir, files, tmp_path / name, "--memory", memory))
    for table in ("top.parquet", "languages.parquet", "self_influence.parquet"):
        assert (tmp_path / "much" / table).read_bytes() == (
            tmp_path / "little" / table
        ).read_bytes()
    assert not (tmp_path / "much/progress").exists()
    for size, shown in (("1MB", "1,000,000"), ("lots", "'lots'")):
        command = attribute_command(model_dir, files, tmp_path / "none", "--memory", size)
        output = invoke(*command, code=2)
        assert "memory: expected" in output
        assert shown in output


def test_the_number_of_cut_texts_is_printed_and_recorded(model_dir, tmp_path):
    train, query = write_examples(tmp_path / "t.tsv", 13), write_examples(tmp_path / "q.tsv", 5)
    tokenizer = load_model(model_dir)[1]
    texts = [line.split("\t")[2] for line in train.read_text().splitlines()[1:]]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    limit = max(lengths) - 1  # an example of exactly this length is not cut
    out = tmp_path / "out"
    output = invoke(*attribute_command(model_dir, (train, query), out, "--max-length", limit))
    count = sum(length > limit for length in lengths)
    assert 0 < count < 13
    assert f"{count} of 13 train examples are longer than {limit} tokens" in output
    assert json.loads((out / "run.json").read_text())["cut_texts"]["train"] == count
    assert f"longer than {limit} tokens" in invoke("query", out, " ".join(TEXTS))
    assert "longer than" not in invoke("query", out, "the cat")
    whole = tmp_path / "whole"
    assert "longer than" not in invoke(*attribute_command(model_dir, (train, query), whole))
    assert json.loads((whole / "run.json").read_text())["cut_texts"] == {"train": 0, "query": 0}


def test_self_influence_is_that_of_the_features(model_dir, files, tmp_path):
    out = tmp_path / "out"
    invoke(*attribute_command(model_dir, files, out))
    table = pq.read_table(out / "self_influence.parquet")
    assert table.column_names == ["train_id", "train_language", "mask_language", "self_influence"]
    train = tm.FeatureStore.open(out / "features/checkpoint-1/train")
    assert table.column("train_id").to_pylist() == train.ids
    values = torch.tensor(table.column("self_influence").to_numpy())
    torch.testing.assert_close(values, train.read().double().square().sum(dim=1), rtol=1e-5, atol=0)


def test_attribute_exactly_is_exact_influence(model_dir, files, tmp_path):
    train, query = files
    out = tmp_path / "out"
    invoke("attribute", "--model", model_dir, "--train", train, "--query", query, "--out", out,
           "-k", 13, "--exact", "--normalize", "none")  # fmt: skip
    assert not (out / "features").exists()
    model, tokenizer = load_model(model_dir)
    names = ["no", "maybe", "yes"]

    def examples(path):
        rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        return [{**tokenizer(text), "labels": names.index(label)} for _, _, text, label in rows]

    expected = tm.exact_influence(model, examples(train), examples(query))
    top = pq.read_table(out / "top.parquet").to_pandas()
    best = top[top.sign == 1].sort_values(["test_id", "rank"])
    for row, (_, own_rows) in enumerate(best.groupby("test_id")):
        columns = [int(train_id.split("-")[1]) for train_id in own_rows.train_id]
        torch.testing.assert_close(
            torch.tensor(own_rows.score.to_numpy()), expected[row, columns], rtol=1e-4, atol=1e-4
        )
        assert sorted(columns) == list(range(13))


@pytest.mark.parametrize(
    "options", [["--projection-dim", 256], ["--exact"]], ids=["features", "exact"]
)
def test_attribute_in_bfloat16_gives_a_slightly_different_result(
    model_dir, files, tmp_path, options
):
    train, query = files
    scores = {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        invoke("attribute", "--model", model_dir, "--train", train, "--query", query, "--out", out,
               "--dtype", dtype, *options)  # fmt: skip
        assert json.loads((out / "run.json").read_text())["arguments"]["dtype"] == dtype
        top = pq.read_table(out / "top.parquet").to_pandas()
        scores[dtype] = top[top.sign == 1].set_index(["test_id", "train_id"]).score
    difference = (scores["float32"] - scores["bfloat16"]).abs()
    assert 0 < difference.max() < 0.05  # cosines
    command = attribute_command(model_dir, files, tmp_path / "bfloat16", *options)
    assert "pass_dtype" in invoke(*command, code=2)


def test_attribute_weights_checkpoints_by_their_learning_rates(model_dir, files, tmp_path):
    train, query = files
    for step, rate in ((5, 0.5), (9, 0.25)):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(model_dir, folder)
        for name in folder.glob("tokenizer*"):
            name.unlink()  # checkpoints of the Trainer may have no tokenizer
        state = {"global_step": step, "epoch": step / 5,
                 "log_history": [{"step": step, "learning_rate": rate}]}  # fmt: skip
        (folder / "trainer_state.json").write_text(json.dumps(state))
    out = tmp_path / "out"
    invoke("attribute", "--model", model_dir, "--train", train, "--query", query, "--out", out,
           "--checkpoint", tmp_path / "checkpoint-5", "--checkpoint", tmp_path / "checkpoint-9",
           "--projection-dim", 256)  # fmt: skip
    assert json.loads((out / "run.json").read_text())["weights"] == [0.5, 0.25]
    scores = pq.read_table(out / "top.parquet").column("score").to_pylist()
    assert max(scores) <= 0.75 + 1e-6


def test_attribute_under_a_mask_and_again_with_another_is_refused(model_dir, files, tmp_path):
    train, query = files
    for number, mask in enumerate(([[1, 0, 1], [1, 1, 1]], [[0, 1, 1], [1, 1, 1]])):
        tm.HeadMask.from_array(mask).save(tmp_path / f"mask-{number}.json")
    command = ["attribute", "--model", model_dir, "--train", train, "--query", query,
               "--out", tmp_path / "out", "--projection-dim", 256, "--head-mask"]  # fmt: skip
    invoke(*command, tmp_path / "mask-0.json")
    first = (tmp_path / "out/top.parquet").read_bytes()
    invoke(*command, tmp_path / "mask-0.json")
    assert (tmp_path / "out/top.parquet").read_bytes() == first
    output = invoke(*command, tmp_path / "mask-1.json", code=2)
    assert "head_mask: expected" in output
    assert (tmp_path / "out/top.parquet").read_bytes() == first


def test_bad_files_and_arguments_are_one_sentence_and_code_2(model_dir, files, tmp_path):
    train, query = files
    bad = write_examples(tmp_path / "bad.tsv", 4, labels=("no", "never", "yes"))
    command = ["attribute", "--model", model_dir, "--query", query, "--out", tmp_path / "out"]
    output = invoke(*command, "--train", bad, code=2)
    assert "bad.tsv" in output
    assert "never" in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    tm.HeadMask.full(5, 5).save(tmp_path / "mask.json")
    assert "head mask: expected 2 layers of 3 heads" in invoke(
        *command, "--train", train, "--head-mask", tmp_path / "mask.json", code=2
    )
    for option, value in (("-k", "0"), ("--projection-dim", "0"), ("--seed", "-1")):
        output = invoke(*command, "--train", train, option, value, code=2)
        assert f"'{option}'" in output
        assert f"{value}" in output
    assert "no tokenizer" in invoke(
        "attribute", "--model", bare_model(model_dir, tmp_path), "--train", train,
        "--query", query, "--out", tmp_path / "out", code=2,
    )  # fmt: skip


def attribute_command(model_dir, files, out, *more):
    return ["attribute", "--model", model_dir, "--train", files[0], "--query", files[1],
            "--out", out, "--projection-dim", 256, *more]  # fmt: skip


def trainer_checkpoint(model_dir, path, step, epoch):
    shutil.copytree(model_dir, path)
    state = {"global_step": step, "epoch": epoch,
             "log_history": [{"step": step, "learning_rate": 0.1}]}  # fmt: skip
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def test_checkpoints_saved_by_steps_are_taken_in_their_order(model_dir, files, tmp_path):
    given = []
    for step, epoch in ((5, 0.5), (10, 1.0), (15, 1.5)):
        path = trainer_checkpoint(model_dir, tmp_path / f"checkpoint-{step}", step, epoch)
        given += ["--checkpoint", path]
    out = tmp_path / "out"
    invoke(*attribute_command(model_dir, files, out, *given))
    assert {path.name for path in (out / "features").iterdir()} == {
        "checkpoint-1", "checkpoint-2", "checkpoint-3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "message"),
    [((0.0,), "above 0.*got 0"), ((0.0, 0.0), "above 0.*got 0"), ((0.1, -0.2), r"got -0\.2")],
)
def test_learning_rates_that_make_no_weights_are_refused(
    model_dir, files, tmp_path, rates, message
):
    given = []
    for step, rate in enumerate(rates, 1):
        path = trainer_checkpoint(model_dir, tmp_path / f"checkpoint-{step}", step, step)
        state = json.loads((path / "trainer_state.json").read_text())
        state["log_history"][0]["learning_rate"] = rate
        (path / "trainer_state.json").write_text(json.dumps(state))
        given += ["--checkpoint", path]
    error = invoke(*attribute_command(model_dir, files, tmp_path / "out", *given), code=2)
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_long_texts_are_cut_where_the_tokenizer_states_no_limit(model_dir, files, tmp_path):
    folder = tmp_path / "unlimited"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("model_max_length")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = " ".join(TEXTS * 30)
    row = f"a\ten\t{text}\tyes"
    files[0].write_text(f"id\tlanguage\ttext_a\tlabel\n{row}\n")
    invoke(*attribute_command(folder, files, tmp_path / "out"))
    command = attribute_command(folder, files, tmp_path / "other", "--max-length", 200)
    assert re.search(r"max_length: .*\b70\b.*\b200\b", invoke(*command, code=2))
    assert "WRONG" not in invoke("check", "--model", folder, "--data", files[0])


def test_lengths_and_counts_that_leave_nothing_are_refused(model_dir, files, tmp_path):
    for length, named in ((0, "'--max-length': 0"), (1, "special tokens")):
        assert named in invoke(
            *attribute_command(model_dir, files, tmp_path / "out", "--max-length", length), code=2
        )
    check = ["check", "--model", model_dir, "--data", files[0]]
    assert "special tokens" in invoke(*check, "--max-length", 0, code=2)
    assert "--examples" in invoke(*check, "--examples", 0, code=2)
    output = invoke(
        *attribute_command(model_dir, files, tmp_path / "out", "--batch-tokens", 0), code=2
    )
    assert "'--batch-tokens': 0" in output
    assert not (tmp_path / "out").exists()


def test_a_missing_device_is_refused_before_any_work(model_dir, files, tmp_path):
    out = tmp_path / "out"
    for device in ("foo", "cuda:99"):
        command = attribute_command(model_dir, files, out, "--device", device)
        assert f"got {device}" in invoke(*command, code=2)
        run = ["run", "demo", "--out", out, "--set", f"device={device}"]
        assert f"got {device}" in invoke(*run, code=2)
        assert f"got {device}" in invoke("bench", "--device", device, code=2)
    assert not out.exists()


def test_checkpoints_are_checked_before_the_long_part(model_dir, files, tmp_path):
    def refused(**changes):
        path = tmp_path / "checkpoint"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(model_dir, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        if not changes:
            (path / "model.safetensors").unlink()
        given = ("--checkpoint", model_dir, "--checkpoint", path)
        out = tmp_path / "out"
        output = invoke(*attribute_command(model_dir, files, out, *given), code=2)
        assert not out.exists()
        return output

    assert "checkpoint: no weights in the folder" in refused()
    assert "expected the model's classes, no, maybe, yes, got" in refused(
        id2label={"0": "yes", "1": "maybe", "2": "no"}
    )
    assert "expected the model's num_hidden_layers, 2, got 3" in refused(num_hidden_layers=3)
    assert "expected the model's num_attention_heads, 3, got 4" in refused(num_attention_heads=4)


def test_out_that_is_a_file_or_not_writable_is_refused(model_dir, files, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below/it"):
        assert "file" in invoke(*attribute_command(model_dir, files, out), code=2)
    read_only = lambda _, mode: not mode & os.W_OK  # noqa: E731
    monkeypatch.setattr(
        "tracmod.attribution.attribute.os.access", read_only
    )  # root may write anywhere
    out = tmp_path / "out"
    assert "cannot be written" in invoke(*attribute_command(model_dir, files, out), code=1)


def test_exact_and_projected_do_not_share_a_folder(model_dir, files, tmp_path):
    projected, exact = tmp_path / "projected", tmp_path / "exact"
    invoke(*attribute_command(model_dir, files, projected))
    output = invoke(*attribute_command(model_dir, files, projected, "--exact"), code=2)
    assert "holds features/ of an attribution without --exact" in output
    invoke(*attribute_command(model_dir, files, exact, "--exact"))
    output = invoke(*attribute_command(model_dir, files, exact), code=2)
    assert "holds exact/ of an attribution with --exact" in output
    assert "sound" in invoke("verify", projected)
    assert "sound" in invoke("verify", exact)


def test_exact_keeps_finished_checkpoints_when_stopped(model_dir, files, tmp_path, monkeypatch):
    import tracmod.attribution.tasks as module

    given = []
    for step in (5, 10):
        path = trainer_checkpoint(model_dir, tmp_path / f"checkpoint-{step}", step, step / 10)
        given += ["--checkpoint", path]
    out, whole = tmp_path / "out", tmp_path / "whole"
    invoke(*attribute_command(model_dir, files, whole, "--exact", *given))
    real, calls = module.exact_influence, []

    def stopped_at_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, "exact_influence", stopped_at_the_second)
    command = attribute_command(model_dir, files, out, "--exact", *given)
    invoke(*command, code=130)
    invoke(*command)
    assert len(calls) == 3
    invoke(*command)
    assert len(calls) == 3
    for name in ("top.parquet", "languages.parquet", "exact/checkpoint-2.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    output = invoke(*command, "--normalize", "none", code=2)
    assert 'normalize: expected null, got "cosine"' in output
    path = out / "exact/checkpoint-1.safetensors"
    right = path.read_bytes()
    path.write_bytes(right[:-3] + bytes([right[-3] ^ 1]) + right[-2:])
    assert "checkpoint-1.safetensors is damaged" in invoke(*command, code=2)


def test_predictions_of_a_model_with_one_output_are_its_rounded_output(model_dir, files, tmp_path):
    _, tokenizer = load_model(model_dir)
    model = tiny_encoder("xlmr", vocab_size=len(tokenizer), num_labels=1)
    with torch.no_grad():
        model.classifier.out_proj.bias.fill_(3.0)
        model.classifier.out_proj.weight.mul_(0.01)
    folder = tmp_path / "one-output"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = [write_examples(path, 6, labels=("1", "5", "3")) for path in files]
    invoke(*attribute_command(folder, files, tmp_path / "out"))
    examples = pq.read_table(tmp_path / "out/examples.parquet")
    assert set(examples.column("test_prediction").to_pylist()) == {3}


def test_examples_added_to_the_files_are_collected_alone(model_dir, tmp_path, monkeypatch):
    collected = []
    collect = Collector.collect_verified

    def counted(self, examples, *arguments):
        collected.append(len(examples))
        return collect(self, examples, *arguments)

    monkeypatch.setattr(Collector, "collect_verified", counted)
    files = tmp_path / "train.tsv", tmp_path / "query.tsv"
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = attribute_command(model_dir, files, out, "--parameters", "all")

    def write(train, query):
        for file, count in zip(files, (train, query), strict=True):
            write_examples(file, count)

    write(13, 5)
    invoke(*command)
    shards = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.rglob("shard-*")}
    assert collected == [13, 5]
    write(18, 7)
    invoke(*command)
    assert collected == [13, 5, 5, 2]
    assert len(shards) == 2
    for file, before in shards.items():
        assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    assert "sound" in invoke("verify", out)
    invoke(*attribute_command(model_dir, files, whole, "--parameters", "all"))
    keys = {
        "top": ["test_id", "sign", "train_id"],
        "languages": ["test_language", "train_language"],
    }
    for name, key in keys.items():
        grown, expected = (
            pq.read_table(folder / f"{name}.parquet").to_pandas().set_index(key).sort_index()
            for folder in (out, whole)
        )
        numbers = grown.select_dtypes("float").columns
        assert len(numbers)
        assert grown.index.equals(expected.index)
        for column in numbers:  # other batches, other rounding
            assert grown[column].to_numpy() == pytest.approx(expected[column], rel=1e-3, abs=1e-5)
    invoke(*command)
    assert collected[4:] == [18, 7]  # nothing again
    write(13, 7)
    assert "num_rows: expected 13, got 18" in invoke(*command, code=2)


def test_an_interrupted_addition_of_examples_leaves_nothing_damaged(
    model_dir, files, tmp_path, monkeypatch
):
    import tracmod.attribution.tasks as module

    def stopped(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    command = attribute_command(model_dir, files, out)
    invoke(*command)
    write_examples(files[0], 18)
    with monkeypatch.context() as patch:
        patch.setattr(module, "collect_to_store", stopped)
        invoke(*command, code=130)
    problems = invoke("verify", out, code=1)
    assert "train/shard-00001.safetensors is missing" in problems
    assert "damaged" not in problems
    invoke(*command)
    assert "sound" in invoke("verify", out)


@pytest.mark.parametrize("column", range(4))
def test_examples_that_changed_are_refused(model_dir, files, tmp_path, column):
    command = attribute_command(model_dir, files, tmp_path / "out")
    invoke(*command)
    lines = files[0].read_text().splitlines()
    changed = [*lines, "new\ten\tthe cat sleeps\tno"]
    row = lines[3].split("\t")
    row[column] = {0: "other", 1: "fr", 2: "the cat runs", 3: "maybe"}[column]
    assert "\t".join(row) != lines[3]
    changed[3] = "\t".join(row)
    files[0].write_text("\n".join(changed) + "\n")
    assert "identity.data: expected" in invoke(*command, code=2)


def test_the_same_examples_in_another_file_are_the_same(model_dir, files, tmp_path):
    command = attribute_command(model_dir, files, tmp_path / "out")
    invoke(*command)
    keys, *rows = (line.split("\t") for line in files[0].read_text().splitlines())
    lines = tmp_path / "train.jsonl"
    lines.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    invoke(*command, "--train", lines)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_features_stored_in_fewer_bytes_give_similar_scores(model_dir, files, tmp_path, dtype):
    scores = {}
    for stored in ("float32", dtype):
        out = tmp_path / stored
        command = attribute_command(model_dir, files, out, "--store-dtype", stored)
        invoke(*command)
        for manifest in out.glob("features/**/manifest.json"):
            assert str(tm.FeatureStore.open(manifest.parent).dtype) == f"torch.{stored}"
        top = pq.read_table(out / "top.parquet").to_pandas()
        scores[stored] = top[top.sign == 1].set_index(["test_id", "train_id"]).score
    difference = (scores["float32"] - scores[dtype]).abs()
    assert 0 < difference.max() < 0.02  # cosines
    refused = invoke(*attribute_command(model_dir, files, tmp_path / dtype), code=2)
    assert f'dtype: expected "float32", got "{dtype}"' in refused


def test_merge_puts_stores_together(model_dir, tmp_path):
    stores = []
    for name in ("a", "b"):
        files = write_examples(tmp_path / f"{name}.tsv", 13), write_examples(tmp_path / "q.tsv", 5)
        invoke(*attribute_command(model_dir, files, tmp_path / name, "--store-dtype", "int8"))
        stores.append(tmp_path / name / "features/checkpoint-1/train")
    both = tmp_path / "both"
    for _ in range(2):  # the second time there is nothing to do
        assert "26 examples of 2 stores" in invoke("merge", *stores, "--out", both)
    assert "sound" in invoke("verify", both)
    opened = [tm.FeatureStore.open(store) for store in stores]
    assert torch.equal(tm.FeatureStore.open(both)[:], torch.cat([store[:] for store in opened]))
    assert str(stores[0]) in invoke("merge", stores[0], stores[0], "--out", both, code=2)
    assert "no feature store at" in invoke("merge", tmp_path, "--out", both, code=2)


def test_ray_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tracmod.engine.ray", raising=False)
    output = invoke("run", "demo", "--out", tmp_path / "run", "--engine", "ray", code=2)
    assert "pip install 'tracmod[ray]'" in output
    output = invoke("run", "demo", "--out", tmp_path / "run", "--worker-cpus", 2, code=2)
    assert "--worker-cpus" in output


def test_a_head_mask_that_is_a_bare_list_is_named(model_dir, files, tmp_path):
    path = tmp_path / "mask.json"
    path.write_text("[[1, 1, 1], [1, 1, 1]]")
    assert "expected num_layers, num_heads and mask: got a bare list" in invoke(
        *attribute_command(model_dir, files, tmp_path / "out", "--head-mask", path), code=2
    )


def bare_model(model_dir, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(model_dir, folder)
    for name in folder.glob("tokenizer*"):
        name.unlink()
    return folder


def test_check_compares_with_autograd(model_dir, files):
    output = invoke("check", "--model", model_dir, "--data", files[0])
    assert "embeddings embedding weight" in output
    assert "encoder layernorm bias" in output
    assert "logits" in output
    assert "WRONG" not in output
    assert "0 of 8 texts were cut" in output
    cut = invoke("check", "--model", model_dir, "--data", files[0], "--max-length", 6)
    assert re.search(r"[1-8] of 8 texts were cut at 6 tokens", cut)


def test_verify_names_a_flipped_bit(model_dir, files, tmp_path):
    train, query = files
    out = tmp_path / "out"
    invoke("attribute", "--model", model_dir, "--train", train, "--query", query, "--out", out,
           "--projection-dim", 256)  # fmt: skip
    for name in ("top.parquet", "features/checkpoint-1/train/shard-00000.safetensors"):
        path = out / name
        right = path.read_bytes()
        path.write_bytes(right[:100] + bytes([right[100] ^ 4]) + right[101:])
        assert name in invoke("verify", out, code=1)
        path.write_bytes(right)
    assert "sound" in invoke("verify", out)
    assert "neither" in invoke("verify", tmp_path, code=2)


def test_doctor_prints_the_build():
    assert "native" in invoke("doctor")
    assert json.loads(invoke("doctor", "--json"))["torch"].startswith("2.")
    assert build_info()["version"] == tm.__version__


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("task: {languages: [en], train_per_language: 0, dev_per_language: 1, "
         "test_per_language: 1}", "task.train_per_language: Input should be greater"),
        ("nonsense: 1", "nonsense: Extra inputs are not permitted"),
        ("[1, 2", "not valid YAML"),
        ("3", "expected sections"),
    ],
)  # fmt: skip
def test_a_bad_config_says_where(tmp_path, config, message):
    path = tmp_path / "c.yaml"
    path.write_text(config)
    assert message in invoke("run", path, "--out", tmp_path / "run", code=2)
    assert not (tmp_path / "run").exists()


def test_unknown_config_and_override():
    assert "nowhere: expected" in invoke("run", "nowhere", "--out", "x", code=2)
    assert "expected key=value" in invoke("run", "demo", "--out", "x", "--set", "k", code=2)
    bad = ["run", "demo", "--out", "x", "--set", "task.languages=[en"]
    assert "--set task.languages=[en: [en is not valid YAML" in invoke(*bad, code=2)


def test_stages_queries_and_verify_on_a_run_folder(tmp_path):
    import yaml

    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tiny_config().model_dump(mode="json")))
    assert "no run.json" in invoke("finetune", run, code=2)
    invoke("finetune", run, "--config", config, "--set", "finetune.epochs=1")
    assert "collect needs prune" in invoke("collect", run, code=2)
    for stage in ("prune", "sparse-finetune", "collect", "influence", "analyze", "report"):
        invoke(stage, run)
    assert "report" in invoke("run", config, "--out", run, "--set", "finetune.epochs=1")
    assert "begun with finetune.epochs=1" in invoke("run", config, "--out", run, code=2)
    assert "sound" in invoke("verify", run)
    record = json.loads((run / "run.json").read_text())
    record["config"]["device"] = "cuda:7"  # of another machine
    (run / "run.json").write_text(json.dumps(record))
    invoke("report", run)
    assert "cuda:7" in invoke("influence", run, code=2)
    record["config"]["device"] = "cpu"
    (run / "run.json").write_text(json.dumps(record))
    output = invoke("status", run)
    assert "not running" in output
    assert output.count(" done ") == 8
    assert all(
        state == "done" for _, state, _ in json.loads(invoke("status", run, "--json"))["stages"]
    )
    query = ["query", run, "The dog sleeps.", "--text-b", "An animal sleeps.", "-k", 3]
    text = invoke(*query)
    assert text.count("entailment") + text.count("neutral") + text.count("contradiction") >= 6
    streamed = json.loads(invoke(*query, "--json"))
    assert "18 queries: 1.000 of proponents, 1.000 of opponents" in invoke("index", run)
    indexed = json.loads(invoke(*query, "--json"))
    for side in ("proponents", "opponents"):
        scores = [[row["score"] for row in answer[side]] for answer in (streamed, indexed)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert "mask per language" in invoke(*query, "--view", "subnetwork", code=2)
    invoke(*query, "--view", "subnetwork", "--mask", "de", "--label", "neutral")
    assert "label: expected one of" in invoke(*query, "--label", "maybe", code=2)
