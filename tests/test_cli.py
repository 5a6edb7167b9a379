"""The command line: help, exit codes, one-sentence errors, and what each command writes."""

from __future__ import annotations

import json
import shutil

import click
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from encoders import tiny_encoder
from study import tiny_config

import tracmod as tm
from tracmod.cli import main
from tracmod.kernels import build_info
from tracmod.model import load_model
from tracmod.tokenizer import train_tokenizer

COMMANDS = {
    "run", "finetune", "prune", "sparse-finetune", "collect", "influence", "analyze", "report",
    "attribute", "index", "query", "verify", "check", "doctor", "bench",
}  # fmt: skip
TEXTS = ["the cat sleeps", "a dog runs home", "der Hund schläft", "die Katze rennt heim"]


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A transformers folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS * 5, 120, 40)
    model = tiny_encoder("xlmr", vocab_size=len(tokenizer))
    model.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    model.config.label2id = {"no": 0, "maybe": 1, "yes": 2}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_examples(path, count, labels=("no", "maybe", "yes")):
    lines = ["id\tlanguage\ttext_a\tlabel"]
    for row in range(count):
        text = f"{TEXTS[row % 4]} {TEXTS[(row * 3 + row // 4) % 4]}"
        lines.append(
            f"{path.stem}-{row}\t{'de' if row % 4 > 1 else 'en'}\t{text}\t{labels[row % 3]}"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


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
    for row, (_, mine) in enumerate(best.groupby("test_id")):
        found = [int(one.split("-")[1]) for one in mine.train_id]
        torch.testing.assert_close(
            torch.tensor(mine.score.to_numpy()), expected[row, found], rtol=1e-4, atol=1e-4
        )
        assert sorted(found) == list(range(13))


def test_attribute_weights_checkpoints_by_their_learning_rates(model_dir, files, tmp_path):
    train, query = files
    for step, rate in ((5, 0.5), (9, 0.25)):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(model_dir, folder)
        for name in folder.glob("tokenizer*"):
            name.unlink()  # what the Trainer of transformers saves may lack it
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
    assert "k: expected at least 1" in invoke(*command, "--train", train, "-k", 0, code=2)
    assert "no tokenizer" in invoke(
        "attribute", "--model", bare_model(model_dir, tmp_path), "--train", train,
        "--query", query, "--out", tmp_path / "out", code=2,
    )  # fmt: skip


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
    assert "WRONG" not in output


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


def test_doctor_says_what_was_built():
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
    assert "no embedded configuration" in invoke("run", "nowhere", "--out", "x", code=2)
    assert "expected key=value" in invoke("run", "demo", "--out", "x", "--set", "k", code=2)


def test_stages_queries_and_verify_on_a_run_folder(tmp_path):
    import yaml

    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tiny_config().model_dump(mode="json")))
    assert "no run.json there" in invoke("finetune", run, code=2)
    invoke("finetune", run, "--config", config, "--set", "finetune.epochs=1")
    assert "collect needs prune" in invoke("collect", run, code=2)
    for stage in ("prune", "sparse-finetune", "collect", "influence", "analyze", "report"):
        invoke(stage, run)
    assert "report" in invoke("run", config, "--out", run, "--set", "finetune.epochs=1")
    assert "begun with finetune.epochs=1" in invoke("run", config, "--out", run, code=2)
    assert "sound" in invoke("verify", run)
    query = ["query", run, "The dog sleeps.", "--text-b", "An animal sleeps.", "-k", 3]
    text = invoke(*query)
    assert text.count("entailment") + text.count("neutral") + text.count("contradiction") >= 6
    streamed = json.loads(invoke(*query, "--json"))
    assert "recall@36 of 1.000" in invoke("index", run)
    indexed = json.loads(invoke(*query, "--json"))
    for side in ("proponents", "opponents"):
        scores = [[row["score"] for row in answer[side]] for answer in (streamed, indexed)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert "mask per language" in invoke(*query, "--view", "subnetwork", code=2)
    invoke(*query, "--view", "subnetwork", "--mask", "de", "--label", "neutral")
    assert "label: expected one of" in invoke(*query, "--label", "maybe", code=2)
