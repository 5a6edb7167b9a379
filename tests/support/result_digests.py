"""Compare everything that tracmod writes before and after a refactoring.

A refactoring must not change results. This command runs a fixed set of small studies and
attributions through the command line and records a digest of every file that they leave behind:

    python tests/support/result_digests.py make --out /tmp/before     # on the code before
    python tests/support/result_digests.py make --out /tmp/after      # on the code after
    python tests/support/result_digests.py compare /tmp/before/digests.json /tmp/after/digests.json

`compare` prints every file that is missing, new or different, and exits with 1 if there is one.
`digest FOLDER` writes the digests of a folder that `make` filled again, for example after a change
of the rules below.

The code under test is the `tracmod` that the running interpreter imports; set PYTHONPATH to test
another checkout. Only the command line of tracmod is used, so the same version of this file works
on both sides. Results are reproducible on one machine with the same package versions: every process
runs with one thread on the CPU.

What is compared, by kind of file:

- JSON: the parsed tree. Durations and package versions are dropped, and the absolute path of the
  output folder is replaced, because these differ between two runs of the same code.
- checksums.json: for every file that is compared itself, whether the recorded SHA-256 is that of
  the file.
- Parquet: column names, types and values, but not the encoding.
- LaTeX and Markdown tables: the numbers in the rows, so that headings can be reworded.
- PDF, PNG and SVG: only that the file exists.
- All others (safetensors, FAISS, CSV, tokenizer files): the bytes.

Files that match EXCLUDED are not compared. A file of an unknown kind is an error, so that no new
kind of result stays unchecked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

DIGESTS = "digests.json"
# Patterns of names relative to the folder, in which `*` also matches `/`.
EXCLUDED = (
    DIGESTS,  # written by this command
    "*.lock",  # empty files that processes lock
    "*/logs/*",  # progress of workers, with times
    # The wording and arrangement of a page may change, and its tables mix results with durations
    # and versions. What it shows is compared in analysis/, retraining/ and the exported tables.
    "*/report/*.html",
    "*/sweep.html",
)
# Keys of run.json and of the configurations of transformers: durations and versions of packages.
DROPPED_KEYS = {"seconds", "versions", "tracmod", "transformers_version"}
NAME_ONLY = {".pdf", ".png", ".svg"}
BYTES = {".csv", ".tsv", ".txt", ".yaml", ".safetensors", ".faiss"}
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}

# Small studies whose models still learn, so that subnetworks are not trivial; keys as for `--set`.
SMALL = {
    "task.shape": "reviews",
    "task.languages": ["en", "de", "es"],
    "task.train_per_language": 150,
    "task.dev_per_language": 50,
    "task.test_per_language": 9,
    "model.layers": 3,
    "model.hidden": 64,
    "model.heads": 4,
    "model.vocabulary": 900,
    "finetune.epochs": 8,
    "finetune.batch_size": 16,
    "finetune.learning_rate": 2e-3,
    "prune.step": 0.08,
    "collect.every": 4,
    "collect.projection_dim": 256,
    "collect.shard_rows": 128,
    "collect.batch_tokens": 1024,
    "analyze.bootstrap": 100,
    "analyze.permutations": 100,
}
EVERY_OPTION = SMALL | {
    "prune.seeds": 2,
    "sparse_finetune.reestimate_every": 3,
    "views.random": 2,
    "views.other": ["en", "de"],
    "views.union": [["en", "de"]],
    "views.intersection": [["en", "de"]],
    "influence.k": [20, 5, 10, 40],
}
PLANTED = SMALL | {
    "task.languages": ["base", "near", "far"],
    "task.train_per_language": 60,
    "task.duplicates": 2,
    "model.layers": 2,
    "finetune.epochs": 4,
    "collect.every": 2,
    "influence.k": [10, 20],
}
RETRAIN = {
    "retrain.subsets": 3,
    "retrain.seeds": 1,
    "retrain.removed": 0.1,
    "retrain.random_removals": 1,
    "retrain.leave_one_out": True,
    "retrain.methods": [
        *("tracin", "tracin-dot", "tracin-cosine", "adam", "ekfac", "ekfac-last"),
        *("bm25", "embedding", "random"),
    ],
}
# Settings that neither the demo nor `every-option` has.
SWEEP = {
    "name": "options",
    "base": "demo",
    "set": SMALL | {"task.train_per_language": 100, "finetune.epochs": 6, "collect.every": 3},
    "points": {
        "plain": {},
        "adam": {
            "finetune.sampling": "uniform",
            "collect.preconditioner": "adam",
            "collect.store_dtype": "bfloat16",
        },
        "ekfac": {"collect.preconditioner": "ekfac", "collect.parameters": "attention"},
        "int8": {
            "collect.store_dtype": "int8",
            "collect.projection_kind": "sjlt",
            "collect.projection_layers": "concatenate",
            "collect.parameters": "all",
            "influence.normalize": "none",
            "influence.weights": "uniform",
        },
        "monolingual": {"prune.model": "monolingual", "prune.seeds": 2, "prune.combine": "union"},
        "zero-shot": {
            "task.train_languages": ["en", "de"],
            "sparse_finetune.shared": "classifier",
            "collect.dtype": "bfloat16",
        },
    },
}


# --- running ------------------------------------------------------------------------------------


def make(out: Path) -> None:
    """Run everything in the empty folder `out` and write `out/digests.json`."""
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out}: expected an empty folder or a new one")
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found = find_spec("tracmod")
    print(f"code under test: {found.origin if found else 'none'}", flush=True)
    _tracmod(out, "run", "demo", "--out", "demo")
    _tracmod(out, "run", "every-option", "--out", "every-option", *_overrides(EVERY_OPTION))
    _attributions(out)
    _tracmod(out, "run", "planted", "--out", "retrain", *_overrides(PLANTED))
    _tracmod(out, "retrain", "retrain", *_overrides(RETRAIN))
    (out / "sweep.yaml").write_text(json.dumps(SWEEP), encoding="utf-8")  # JSON is YAML
    _tracmod(out, "sweep", "sweep.yaml", "--out", "sweep")
    _after_the_runs(out)
    write_digests(out)
    print(f"{time.perf_counter() - started:6.0f} s  all of it: {out / DIGESTS}")


def _attributions(out: Path) -> None:
    """Attribute, index and query with a model and example files of our own."""
    _write_model(out / "own")
    given = ("--checkpoints", "own/training", "--query", "own/query.tsv", "-k", "20")
    train = ("--train", "own/train.tsv")
    small = ("--projection-dim", "256")
    for name, options in {
        "projected": small,
        "exact": ("--exact",),
        "ekfac": (*small, "--preconditioner", "ekfac"),
        "masked": (*small, "--head-mask", "own/mask.json", "--parameters", "all"),
        "auto": ("--projection-dim", "auto", "--share-error", "0.2", "--normalize", "none",
                 "--parameters", "attention", "--store-dtype", "int8"),
    }.items():  # fmt: skip
        _tracmod(out, "attribute", *given, *train, "--out", f"attribute/{name}", *options)
    # The same file with more examples at its end: only their features are collected.
    more = ("--train", "own/train-more.tsv")
    _tracmod(out, "attribute", *given, *train, "--out", "attribute/grown", *small)
    _tracmod(out, "attribute", *given, *more, "--out", "attribute/grown", *small)
    stores = [f"attribute/projected/features/checkpoint-1/{split}" for split in ("train", "query")]
    _tracmod(out, "merge", *stores, "--out", "attribute/merged")
    query = ("the old cat sleeps home", "-k", "7", "--json")
    for name, kind in (("projected", "hnsw"), ("ekfac", "flat"), ("masked", "ivf")):
        folder = f"attribute/{name}"
        _tracmod(out, "query", folder, *query, output=f"answers/{name}.json")
        _tracmod(out, "index", folder, "--kind", kind)
        _tracmod(out, "query", folder, *query, output=f"answers/{name}-{kind}.json")
    german = ("die alte Katze singt", "--label", "yes", "--language", "de", "--json")
    _tracmod(out, "query", "attribute/grown", *german, output="answers/grown-de.json")


def _after_the_runs(out: Path) -> None:
    """Query, export, draw and print finished runs, and check that folders are sound."""
    pair = ("The king is waiting.", "--text-b", "The king is not waiting.", "--json")
    masked = ("--model", "sparse", "--view", "subnetwork", "--mask", "de")
    _tracmod(out, "query", "demo", *pair, output="answers/demo.json")
    _tracmod(out, "index", "demo", "--kind", "sq8", *masked)
    _tracmod(out, "query", "demo", *pair, *masked, output="answers/demo-subnetwork.json")
    for form in ("masked", "pruned"):
        where = ("--out", f"exported/{form}")
        _tracmod(out, "export", "demo", "--language", "de", "--form", form, *where)
    own = ("--mask", "demo/subnetworks/es.json", "--model", "sparse", "--form", "pruned")
    _tracmod(out, "export", "demo", *own, "--out", "exported/sparse")
    for run in ("demo", "every-option", "retrain"):
        _tracmod(out, "figures", run, "--out", f"figures/{run}")
        _tracmod(out, "tables", run, "--format", "latex", "--out", f"tables/{run}/latex")
    for form in ("csv", "markdown"):
        _tracmod(out, "tables", "demo", "--format", form, "--out", f"tables/demo/{form}")
    for folder in ("demo", "retrain", "sweep/int8", "attribute/grown", "attribute/ekfac"):
        _tracmod(out, "verify", folder)


def _tracmod(out: Path, *arguments: str, output: str | None = None) -> None:
    """Run a command of tracmod in `out`; its standard output goes to the file `output`."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(part).absolute()) for part in path if part)
    started, before = time.perf_counter(), sum(os.times()[2:4])  # of child processes
    done = subprocess.run(
        [sys.executable, "-m", "tracmod.cli", *arguments],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    words = " ".join(arguments)
    if done.returncode:
        said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        raise SystemExit(f"tracmod {words}: exit code {done.returncode}\n{said}")
    if output is not None:
        (out / output).parent.mkdir(parents=True, exist_ok=True)
        (out / output).write_text(done.stdout, encoding="utf-8")
    used = sum(os.times()[2:4]) - before
    seconds = f"{time.perf_counter() - started:6.1f} s, {used:6.1f} s of CPU"
    print(f"{seconds}  tracmod {words[:70]}", flush=True)


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={_json(value)}")]


WORDS = {
    "en": ["the", "cat", "dog", "sleeps", "runs", "home", "sings", "old", "small"],
    "de": ["die", "Katze", "Hund", "schläft", "rennt", "heim", "singt", "alte", "klein"],
    "es": ["el", "gato", "perro", "duerme", "corre", "casa", "canta", "viejo"],
}
LABELS = ["no", "maybe", "yes"]


def _write_model(folder: Path) -> None:
    """Write a training with two checkpoints of a tiny BERT, a head mask and example files."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, logging

    logging.disable_progress_bar()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *(word for words in WORDS.values() for word in words)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False, model_max_length=32)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    for number, rate in ((1, 0.5), (2, 0.25)):
        torch.manual_seed(number)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        checkpoint = folder / "training" / f"checkpoint-{number}"
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        log = [{"step": number, "learning_rate": rate}]
        state = {"global_step": number, "epoch": number, "log_history": log}
        (checkpoint / "trainer_state.json").write_text(_json(state), encoding="utf-8")
    mask = {"num_layers": 2, "num_heads": 4, "mask": [[1, 0, 1, 1], [0, 1, 1, 0]]}
    (folder / "mask.json").write_text(_json(mask), encoding="utf-8")
    draw = random.Random(0)
    train = ["\t".join(("id", "language", "text_a", "label"))]
    query = list(train)
    for lines, split, count in ((query, "query", 12), (train, "train", 150)):
        for row in range(count):
            language = list(WORDS)[row % len(WORDS)]
            text = " ".join(draw.choice(WORDS[language]) for _ in range(draw.randint(3, 9)))
            lines.append("\t".join((f"{split}-{row}", language, text, draw.choice(LABELS))))
    for name, lines in (("query", query), ("train", train[:121]), ("train-more", train)):
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- digests ------------------------------------------------------------------------------------


def write_digests(folder: Path) -> None:
    """Write `digests.json`: the SHA-256 of the canonical content of every compared file."""
    digests = {}
    for name in _compared(folder):
        content = canonical(folder, name)
        blob = content if isinstance(content, bytes) else _json(content).encode()
        digests[name] = hashlib.sha256(blob).hexdigest()
    text = json.dumps(digests, indent=1, ensure_ascii=False)
    (folder / DIGESTS).write_text(text + "\n", encoding="utf-8")


def _compared(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if not _is_excluded(name))


def _is_excluded(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in EXCLUDED)


def canonical(folder: Path, name: str) -> Any:
    """Return what is compared of a file: a tree of plain values, or bytes."""
    path = folder / name
    match path.suffix:
        case ".json" if path.name == "checksums.json":
            return _checksums(folder, path)
        case ".json":
            return _without_variable_parts(json.loads(path.read_bytes()), str(folder.resolve()))
        case ".parquet":
            table = pq.read_table(path)
            schema = {field.name: str(field.type) for field in table.schema}
            return {"schema": schema, "values": table.to_pydict()}
        case ".tex" | ".md":
            rows = path.read_text(encoding="utf-8").splitlines()
            number = r"[-−]?\d+(?:\.\d+)?"
            return [re.findall(number, row) for row in rows if "&" in row or "|" in row]
        case suffix if suffix in NAME_ONLY:
            return "exists"
        case suffix if suffix in BYTES:
            return path.read_bytes()
    raise SystemExit(f"{path}: a file of an unknown kind; say in {__file__} how to compare it")


def _checksums(folder: Path, path: Path) -> dict[str, bool]:
    """Return for each recorded file that is compared whether its checksum is right."""
    base = path.parent.relative_to(folder)
    recorded = {
        name: digest
        for name, digest in json.loads(path.read_bytes()).items()
        if not _is_excluded((base / name).as_posix())
    }
    files = {name: path.parent / name for name in recorded}
    return {
        name: file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == recorded[name]
        for name, file in files.items()
    }


def _without_variable_parts(tree: Any, folder: str) -> Any:
    if isinstance(tree, dict):
        return {
            key: _without_variable_parts(value, folder)
            for key, value in tree.items()
            if key not in DROPPED_KEYS
        }
    if isinstance(tree, list):
        return [_without_variable_parts(value, folder) for value in tree]
    return tree.replace(folder, "FOLDER") if isinstance(tree, str) else tree


def _json(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


# --- comparison ---------------------------------------------------------------------------------


def compare(before: Path, after: Path) -> int:
    """Print every difference of two digests.json; return how many there are."""
    digests = [json.loads(path.read_bytes()) for path in (before, after)]
    differences = 0
    for name in sorted(digests[0].keys() | digests[1].keys()):
        first, second = (digest.get(name) for digest in digests)
        if first == second:
            continue
        differences += 1
        if first is None or second is None:
            print(f"{'added' if first is None else 'missing'}: {name}")
        else:
            print(f"changed: {name}{_where(name, before.parent, after.parent)}")
    if differences:
        print(f"{differences} of {len(digests[0].keys() | digests[1].keys())} files differ")
    return differences


def _where(name: str, before: Path, after: Path) -> str:
    """Say where a file first differs, if both folders still have it."""
    if not all((folder / name).is_file() for folder in (before, after)):
        return ""
    first, second = (canonical(folder, name) for folder in (before, after))
    if isinstance(first, bytes):
        return f" ({len(first):,} and {len(second):,} bytes)"
    return next((f" at {where}" for where in _differences(first, second, "")), "")


def _differences(first: Any, second: Any, where: str) -> Iterator[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            if key in first and key in second:
                yield from _differences(first[key], second[key], f"{where}.{key}".lstrip("."))
            else:
                yield f"{where}.{key}: only {'before' if key in first else 'after'}".lstrip(".")
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, items in enumerate(zip(first, second, strict=True)):
            yield from _differences(*items, f"{where}[{index}]")
    elif isinstance(first, list) and isinstance(second, list):
        yield f"{where}: {len(first)} and {len(second)} entries"
    elif _json(first) != _json(second):  # as text, because NaN is not equal to itself
        yield f"{where}: {str(first)[:80]} and {str(second)[:80]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make", help="run everything in a new folder, write digests.json")
    made.add_argument("--out", type=Path, required=True)
    again = commands.add_parser("digest", help="write digests.json of a folder that `make` filled")
    again.add_argument("folder", type=Path)
    compared = commands.add_parser("compare", help="print what differs; exit code 1 if anything")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.out)
    elif arguments.command == "digest":
        write_digests(arguments.folder)
    else:
        return 1 if compare(arguments.before, arguments.after) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
