"""Faults while `tracmod attribute` or a stage runs: results are correct or refused, never lost.

The faults are kills, full disks, changed inputs, damaged files, and numbers that are not finite.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from own_model import own_model, own_tokenizer, save_model, write_examples
from safetensors.torch import load_file, save_file
from tiny_study import files_of, tiny_config

from tracmod.cli import main
from tracmod.features.store import FeatureStore, verify_store
from tracmod.features.store_format import VERSION
from tracmod.files.durable import seal
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.validation.integrity import verify

# All results of an attribution; run.json also has the time that it took.
WRITTEN = ("features/**/*.safetensors", "features/**/*.json", "*.parquet", "checksums.json")
DIM = 256


def invoke(*arguments: object, code: int = 0) -> str:
    """Run a command in this process and return its output; an error must be one line.

    A slow command writes lines with its progress before, which begin with the time.
    """
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        lines = result.output.strip().splitlines()
        assert len([line for line in lines if not re.match(r"\d{4}-\d\d-\d\d ", line)]) == 1
        assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four rows: 8 for 30 training examples, 2 for 7 queries."""
    monkeypatch.setattr(FeatureStore, "grow", partial(FeatureStore.grow, shard_rows=4))


def command_of(folder: Path, model: Path, train: int = 30, query: int = 7) -> list[object]:
    """Write the input files into a folder; return the command that writes `folder`/out."""
    folder.mkdir(exist_ok=True)
    return [
        "attribute", "--model", model, "--out", folder / "out", "--projection-dim", DIM, "-k", 5,
        "--train", write_examples(folder / "train.tsv", train),
        "--query", write_examples(folder / "query.tsv", query),
    ]  # fmt: skip


def written(folder: Path) -> dict[str, bytes]:
    """Return the results in `folder`/out."""
    files = files_of(folder / "out", *WRITTEN)
    assert any(name.endswith(".parquet") for name in files)
    return files


def in_process(*arguments: object) -> tuple[int, str]:
    """Return exit code and stderr of Python in another process.

    It has one thread, because bits of results depend on the number of threads.
    """
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return process.returncode, process.stderr


# Kills

# Runs the command in forks of a process that has imported everything: a start takes 0.1 s.
KILLER = """
import os, random, signal, sys, time
from functools import partial
from pathlib import Path
import tracmod.attribution.attribute
from tracmod.cli import main
from tracmod.features.store import FeatureStore

FeatureStore.grow = partial(FeatureStore.grow, shard_rows=2)
out, kills, *command = sys.argv[1:]
draw = random.Random(0)

def start():
    child = os.fork()
    if child == 0:
        main(command)
    return child

def shards():
    return len(list(Path(out).glob("features/*/*/shard-*")))

def ended(child):
    return os.waitpid(child, os.WNOHANG)[0] == child

def kill(child):
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

for number in range(int(kills)):
    child, new = start(), shards() + draw.randint(1, 6)
    # Every fourth process is killed soon after its start, the others once they wrote shards.
    longest = draw.uniform(0, 0.4) if number % 4 == 0 else 100
    end = time.monotonic() + longest
    while shards() < new and time.monotonic() < end:
        assert not ended(child), "the command ended before it was killed"
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.01) if longest == 100 else 0)
    assert kill(child), "the command ended before it was killed"
tables = ("examples.parquet", "top.parquet", "languages.parquet", "run.json")
for name in tables if int(kills) else ():
    Path(out, name).unlink(missing_ok=True)
    child = start()
    while not Path(out, name).exists():
        assert not ended(child), "the command ended without " + name
    kill(child)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]))
"""


@pytest.mark.slow
def test_a_command_killed_twenty_times_writes_the_same_files(
    tmp_path: Path, model_dir: Path
) -> None:
    second = save_model(tmp_path / "second", seed=1)
    for name, kills in (("undisturbed", 0), ("killed", 20)):
        command = command_of(tmp_path / name, model_dir, 240, 9)
        command += ["--checkpoint", model_dir, "--checkpoint", second]
        code, error = in_process("-c", KILLER, tmp_path / name / "out", kills, *command)
        assert code == 0, error
    assert written(tmp_path / "killed") == written(tmp_path / "undisturbed")
    invoke("verify", tmp_path / "killed/out")


# Full disks


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a file system of `size` bytes at `path`; yield a function that resizes it."""
    path.mkdir()

    def mount(*options: str) -> bool:
        call = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path)]
        try:
            return subprocess.run(call, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    if not mount(f"size={size}"):
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield lambda size: None if mount("remount", f"size={size}") else pytest.fail("no remount")
    finally:
        subprocess.run(["umount", str(path)], check=True)


def assert_store_is_valid(store: Path) -> None:
    """Shards may be missing, but none is damaged, and no temporary file is left."""
    problems = verify_store(store)
    for file in store.iterdir():
        assert not [problem for problem in problems if f"/{file.name}" in problem]
    assert not list(store.glob(".*.tmp"))


def test_a_full_disk_is_an_error_of_one_line_and_the_command_resumes_when_it_has_space(
    tmp_path: Path, model_dir: Path
) -> None:
    """The command runs in another process, on a small file system."""
    run = ("-m", "tracmod.cli")
    assert in_process(*run, *command_of(tmp_path / "undisturbed", model_dir, 90)) == (0, "")
    with small_disk(tmp_path / "small", "64k") as enlarge:
        command = command_of(tmp_path / "small", model_dir, 90)
        code, error = in_process(*run, *command)
        store = tmp_path / "small/out/features/checkpoint-1/train"
        assert code == 1
        assert re.search(re.escape(f"{store}/shard-00000.safetensors") + r" \(92,\d{3} ", error)
        assert "No space left on device" in error
        assert "Traceback" not in error
        assert len(error.strip().splitlines()) == 1
        assert_store_is_valid(store)
        enlarge("8m")
        assert in_process(*run, *command) == (0, "")
        assert written(tmp_path / "small") == written(tmp_path / "undisturbed")
        invoke("verify", tmp_path / "small/out")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files (RLIMIT_FSIZE), as a full disk does; needs no mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Largest file size allowed -> the first file that is larger. A shard of 4 rows has 4.4 kB.
TOO_LARGE = {
    300: "features/checkpoint-1/train/ids.json",
    600: "features/checkpoint-1/train/manifest.json",
    2000: "features/checkpoint-1/train/shard-00000.safetensors",
}


@pytest.mark.parametrize("size", TOO_LARGE)
def test_a_file_that_cannot_be_written_is_named_and_written_later(
    tmp_path: Path, model_dir: Path, small_shards: None, size: int
) -> None:
    invoke(*command_of(tmp_path / "undisturbed", model_dir))
    command = command_of(tmp_path / "limited", model_dir)
    with file_size_limit(size):
        error = invoke(*command, code=1)
    out = tmp_path / "limited/out"
    assert str(out / TOO_LARGE[size]) in error
    for manifest in out.glob("features/*/*/manifest.json"):
        assert_store_is_valid(manifest.parent)
    assert not list(out.glob(".*.tmp"))
    invoke(*command)
    assert written(tmp_path / "limited") == written(tmp_path / "undisturbed")


# Changed inputs and files


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A finished attribution with shards of four rows, and its inputs: model, train and query."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(model_dir, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "grow", partial(FeatureStore.grow, shard_rows=4))
        invoke(*command_of(folder, folder / "model"))
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path, small_shards: None) -> Path:
    """A copy of the finished attribution, for tests that change it."""
    return shutil.copytree(done, tmp_path / "copy")


def again(folder: Path, *changes: object, code: int = 0) -> str:
    """Run the same command again, with options added."""
    return invoke(
        "attribute", "--model", folder / "model", "--out", folder / "out",
        "--projection-dim", DIM, "-k", 5,
        "--train", folder / "train.tsv", "--query", folder / "query.tsv", *changes, code=code,
    )  # fmt: skip


def another_weight(folder: Path) -> list[object]:
    """Flip the last bit of one weight."""
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    number = weights["roberta.encoder.layer.0.output.dense.weight"].view(torch.int32)
    number[3, 4] ^= 1
    save_file(weights, file, {"format": "pt"})
    return []


def another_tokenizer(folder: Path) -> list[object]:
    """Exchange the ids of two pieces."""
    file = folder / "model/tokenizer.json"
    tree = json.loads(file.read_text())
    ids = tree["model"]["vocab"]
    ids["s"], ids["t"] = ids["t"], ids["s"]
    file.write_text(json.dumps(tree))
    return []


def another_text(split: str, folder: Path) -> list[object]:
    """Change one text of a file."""
    file = folder / f"{split}.tsv"
    file.write_text(file.read_text().replace("the cat", "the car", 1))
    return []


def one_example_less(folder: Path) -> list[object]:
    """Remove the last training example; adding examples would be allowed."""
    write_examples(folder / "train.tsv", 29)
    return []


def newer_store(folder: Path) -> list[object]:
    """Raise the format version of a store."""
    file = folder / "out/features/checkpoint-1/train/manifest.json"
    content = json.loads(file.read_text()) | {"version": VERSION + 1}
    del content["sha256"]
    file.write_bytes(seal(content))
    return []


def foreign_folder(folder: Path) -> list[object]:
    """Replace a store with a folder that holds another file."""
    store = folder / "out/features/checkpoint-1/query"
    shutil.rmtree(store)
    store.mkdir()
    (store / "thesis.txt").write_text("years of work")
    return []


def damaged_manifest(folder: Path) -> list[object]:
    """Change a value in a manifest but not its checksum."""
    file = folder / "out/features/checkpoint-1/query/manifest.json"
    file.write_text(file.read_text().replace('"dim": 256', '"dim": 255'))
    return []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_weight, r"/train .*identity\.model: expected"),
        (another_tokenizer, r"/train .*identity\.tokenizer: expected"),
        (lambda _: ["--seed", 1], r"identity\.projection\.seed: expected 1, got 0\b"),
        (
            lambda _: ["--projection-dim", 128],
            r"dim: expected 128, got 256\b.*identity\.projection\.dim: expected 128, got 256\b",
        ),
        (lambda _: ["--parameters", "all"], r'identity\.parameters: expected "all", got "encoder"'),
        (lambda _: ["--max-length", 9], r'identity\.max_length: expected "9", got "'),
        (lambda _: ["--dtype", "bfloat16"], r"identity\.pass_dtype: expected"),
        (partial(another_text, "train"), r"/train .*identity\.data: expected"),
        (partial(another_text, "query"), r"/query .*identity\.data: expected"),
        (one_example_less, r"/train .*num_rows: expected 29, got 30"),
        (newer_store, rf"version {VERSION} .*version {VERSION + 1}"),
        (foreign_folder, r"/query .*thesis\.txt"),
        (damaged_manifest, r"query/manifest\.json .*checksum"),
    ],
)  # fmt: skip
def test_a_changed_input_is_named_and_nothing_is_overwritten(
    copy: Path, change: Callable[[Path], list[object]], message: str
) -> None:
    options = change(copy)
    before = files_of(copy, "out/**/*")
    error = again(copy, *options, code=2)
    assert re.search(message, error), error
    assert files_of(copy, "out/**/*") == before


def test_checkpoints_in_another_order_are_refused(copy: Path) -> None:
    before = files_of(copy, "out/**/*")
    other = save_model(copy / "other", seed=5)
    checkpoints = ["--checkpoint", other, "--checkpoint", copy / "model"]
    error = again(copy, *checkpoints, code=2)
    assert re.search(r"checkpoint-1/train .*identity\.model: expected", error)
    assert files_of(copy, "out/**/*") == before


def test_a_table_that_cannot_be_written_is_named_and_written_later(copy: Path) -> None:
    expected, table = written(copy), copy / "out/examples.parquet"
    table.unlink()
    with file_size_limit(2000):
        assert str(table) in again(copy, code=1)
    assert not list((copy / "out").glob("*examples.parquet*"))
    again(copy)
    assert written(copy) == expected


# Damage

TRAIN_SHARD = "features/checkpoint-1/train/shard-00003.safetensors"


def flip(file: Path, byte: int, bit: int = 2) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


def flip_anywhere(number: int, out: Path) -> None:
    """Flip a random bit of a shard: in its header, digest, features or norms."""
    draw = random.Random(number)
    file = out / draw.choice([TRAIN_SHARD, TRAIN_SHARD.replace("train", "query").replace("3", "1")])
    flip(file, draw.randrange(file.stat().st_size), draw.randrange(8))


def cut(size: int, out: Path) -> None:
    os.truncate(out / TRAIN_SHARD, size)


def exchange(out: Path) -> None:
    """Replace a shard with another valid one."""
    shutil.copy((out / TRAIN_SHARD).with_name("shard-00002.safetensors"), out / TRAIN_SHARD)


def foreign(out: Path) -> None:
    """Replace a shard with a valid safetensors file of the right shape and other numbers."""
    tensors = {"features": torch.ones(4, DIM), "norms": torch.full((4,), DIM**0.5)}
    save_file(tensors, out / TRAIN_SHARD)


@pytest.mark.parametrize(
    "damage",
    [
        *(partial(flip_anywhere, number) for number in range(6)),
        *(partial(cut, size) for size in (0, 7, 100, 4000)),
        exchange,
        foreign,
    ],
)
def test_a_damaged_shard_is_computed_again_and_the_results_are_the_same(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    expected = written(copy)
    damage(copy / "out")
    assert written(copy) != expected
    assert len(verify(copy / "out")) == 1
    problems_of(copy / "out")
    (copy / "out/top.parquet").unlink()
    again(copy)
    assert written(copy) == expected


def problems_of(path: Path) -> str:
    """Return the output of `tracmod verify` for a folder with problems."""
    result = CliRunner().invoke(main, ["verify", str(path)])
    assert result.exit_code == 1
    return result.output


def test_foreign_files_in_a_store_are_not_changed_and_named_by_verify(copy: Path) -> None:
    store = copy / "out/features/checkpoint-1/train"
    (store / "notes.txt").write_text("mine")
    (store / "shard-00099.safetensors").write_text("mine too")
    expected = written(copy)
    again(copy)
    assert written(copy) == expected
    assert (store / "notes.txt").read_text() == "mine"
    output = problems_of(copy / "out")
    assert "notes.txt" in output
    assert "shard-00099.safetensors" in output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to the stage influence."""
    config = tiny_config(
        task={"languages": ["en", "de"]}, finetune={"epochs": 1}, views={"random": 0, "other": []}
    )
    folder = tmp_path_factory.mktemp("faults") / "run"
    stages = ["data", "finetune", "prune", "sparse-finetune", "collect", "influence"]
    run_stages(RunFolder(folder, config), stages)
    return folder


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_run_refuses_a_damaged_shard_until_it_is_collected_again(
    run: Path, tmp_path: Path, split: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    expected = files_of(run, "features/**/shard*", "influence/**/*.parquet")
    shard = tmp_path / f"run/features/full/full/checkpoint-1/{split}/shard-00000.safetensors"
    flip(shard, shard.stat().st_size - 900)
    error = invoke("influence", tmp_path / "run", "--quiet", code=2)
    assert re.search(re.escape(str(shard)) + ".*checksum", error)
    influence = files_of(tmp_path / "run", "influence/**/*.parquet")
    assert influence.items() <= expected.items()
    invoke("collect", tmp_path / "run")
    invoke("influence", tmp_path / "run")
    assert files_of(tmp_path / "run", "features/**/shard*", "influence/**/*.parquet") == expected


# Numbers that are not finite


@pytest.mark.parametrize("options", [[], ["--exact"]], ids=["projected", "exact"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_non_finite_weight_fails_at_the_first_example(
    tmp_path: Path, options: list[object], value: float
) -> None:
    model = own_model()
    with torch.no_grad():
        model.roberta.encoder.layer[0].output.dense.weight[3, 4] = value
    model.save_pretrained(tmp_path / "model")
    own_tokenizer().save_pretrained(tmp_path / "model")
    error = invoke(*command_of(tmp_path, tmp_path / "model"), *options, code=2)
    assert "'train-0'" in error or "'query-0'" in error
    assert not list(tmp_path.glob("out/**/*.safetensors"))
    assert not (tmp_path / "out/top.parquet").exists()


@pytest.mark.parametrize("options", [[], ["--exact"]], ids=["projected", "exact"])
@pytest.mark.parametrize("split", ["train", "query"])
def test_an_example_whose_gradient_is_not_finite_is_named(
    tmp_path: Path, options: list[object], split: str
) -> None:
    """The embedding of a piece that occurs in this example only is NaN."""
    tokenizer, model = own_tokenizer(), own_model()
    piece = tokenizer.convert_tokens_to_ids("z")  # in "Katze" it is part of a longer piece
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[piece] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = command_of(tmp_path, tmp_path / "model")
    file = tmp_path / f"{split}.tsv"
    lines = file.read_text().splitlines()
    lines[6] = "the bad one\tde\tz\tyes"
    file.write_text("\n".join(lines) + "\n")
    assert "'the bad one'" in invoke(*command, *options, code=2)
    assert not (tmp_path / "out/top.parquet").exists()
