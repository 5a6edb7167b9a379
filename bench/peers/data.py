"""Models and examples of the comparison with other libraries.

- `trained`: a mini model (4 layers, 256 wide), trained on reviews of the grammar task; 3
  checkpoints. Reviews with the same stars are joined, so that they have up to 128 tokens.
- `untrained`: the same shape and examples, with random weights.
- `base`: XLM-R base's shape with random weights, and fewer examples, of random tokens.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tracmod.bench.models import TRAINED, load_trained, make_trained, random_examples, random_model

MODELS = ("trained", "untrained", "base")
# Training and query examples of each model.
COUNTS = {"trained": (512, 64), "untrained": (512, 64), "base": (40, 8)}
MOST_JOINED = 5
PER_LANGUAGE = {"train": 600, "dev": 25, "test": 25}
# Reviews of the grammar task, which a mini model learns in a few epochs.
REVIEWS = {**TRAINED["task"], "shape": "reviews", "train_per_language": 2000}


def prepare(folder: Path, name: str, counts: tuple[int, int] | None = None) -> Path:
    """Make a model and its examples, unless they are there; return their folder.

    The folder has `examples.json` and one folder of the model for each checkpoint, `checkpoint-1`
    and so on; that of the trained model also has the texts, `train.parquet` and `query.parquet`.
    """
    target = folder / name
    if (target / "examples.json").exists():
        return target
    train, query = counts or COUNTS[name]
    if name == "base":
        examples = {"train": random_examples(train, 2), "query": random_examples(query, 3)}
        random_model("base").save_pretrained(target / "checkpoint-1")
    else:
        run = folder / "run"
        make_trained(run, joined_config(folder))
        trained = load_trained(run, train, query)
        examples = {"train": trained.train, "query": trained.query}
        (_save_trained if name == "trained" else _save_untrained)(run, target, train, query)
    rows = {
        split: [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in part]
        for split, part in examples.items()
    }
    (target / "examples.json").write_text(json.dumps(rows), encoding="utf-8")
    return target


def joined_config(folder: Path) -> dict[str, Any]:
    """Write the joined examples of the grammar task; return the config of a training on them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tracmod.config import parse_config
    from tracmod.study.pipeline import run_stages
    from tracmod.study.run_folder import RunFolder

    run = RunFolder(folder / "grammar", parse_config({**TRAINED, "task": REVIEWS}, "grammar"))
    if not run.is_done("data"):
        with run.locked():
            run_stages(run, ["data"])
    for split in PER_LANGUAGE:
        rows = pq.read_table(folder / "grammar" / "data" / f"{split}.parquet").to_pylist()
        pq.write_table(pa.Table.from_pylist(list(joined(rows))), folder / f"{split}.parquet")
    task = {
        "name": "files", "languages": TRAINED["task"]["languages"],
        **{f"{split}_file": str((folder / f"{split}.parquet").resolve()) for split in PER_LANGUAGE},
        **{f"{split}_per_language": count for split, count in PER_LANGUAGE.items()},
    }  # fmt: skip
    finetune = {**TRAINED["finetune"], "batch_size": 16}
    return {**TRAINED, "name": "peers", "task": task, "finetune": finetune}


def joined(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Join 1 to `MOST_JOINED` examples of the same language and label into one, in turns."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["language"], row["label"]].append(row)
    for (language, label), members in groups.items():
        start, size = 0, 1
        while start + size <= len(members):
            part = members[start : start + size]
            yield {
                "id": part[0]["id"], "language": language, "label": label,
                "text_a": " ".join(row["text_a"] for row in part),
            }  # fmt: skip
            start, size = start + size, size % MOST_JOINED + 1


def _save_trained(run: Path, target: Path, train: int, query: int) -> None:
    import shutil

    import pyarrow.parquet as pq

    from tracmod.bench.models import spaced

    for checkpoint in sorted((run / "models" / "full").glob("checkpoint-*")):
        shutil.copytree(checkpoint, target / checkpoint.name, dirs_exist_ok=True)
    for split, name, count in (("train", "train", train), ("test", "query", query)):
        table = pq.read_table(run / "data" / f"{split}.parquet")
        pq.write_table(table.take(spaced(len(table), count)), target / f"{name}.parquet")


def _save_untrained(run: Path, target: Path, train: int, query: int) -> None:
    """Save a model of the trained model's shape with new random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(run / "models" / "full" / "checkpoint-1")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(target / "checkpoint-1")
