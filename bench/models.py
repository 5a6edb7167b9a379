"""Models and examples of the benchmarks: random ones, and a small model that tracmod trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from tracmod.models.checkpoints import load_checkpoints
from tracmod.models.inputs import encode
from tracmod.models.loading import load_model, quiet_transformers

VOCABULARY, LABELS = 4000, 3
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
             "intermediate_size": 64},
    "mini": {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4,
             "intermediate_size": 1024},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
             "intermediate_size": 3072},
}  # fmt: skip

# Config of the trained model: the mini shape on the embedded task, with 5,000 training and 500 test
# examples.
TRAINED: dict[str, Any] = {
    "name": "bench",
    "task": {
        "name": "grammar", "shape": "nli", "languages": ["en", "de", "es", "ru", "zh"],
        "train_per_language": 1000, "dev_per_language": 100, "test_per_language": 100,
    },
    "model": {"layers": 4, "hidden": 256, "heads": 4, "vocabulary": 4000, "max_length": 128},
    "finetune": {"epochs": 3, "batch_size": 32, "learning_rate": 3e-4},
}  # fmt: skip


def random_model(shape: str, seed: int = 0) -> Any:
    """Build an XLM-R classifier with random weights in float32 and evaluation mode."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 132, "num_labels": LABELS,
        "pad_token_id": 1, "type_vocab_size": 1, **SHAPES[shape],
    }  # fmt: skip
    torch.manual_seed(seed)
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(**settings)).eval()


def random_examples(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Build examples of 16 to 128 random tokens, uniformly distributed."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in torch.randint(16, 129, (count,), generator=generator).tolist():
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        label = int(torch.randint(LABELS, (1,), generator=generator))
        examples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": label})
    return examples


def make_trained(folder: Path, config: dict[str, Any] | None = None) -> None:
    """Sample the data and fine-tune the model, unless the run folder has both already."""
    # Imported here: these need pydantic, which a GPU machine may lack and other parts do not need.
    from tracmod.config import parse_config
    from tracmod.study.pipeline import run_stages
    from tracmod.study.run_folder import RunFolder

    run = RunFolder(folder, parse_config(config or TRAINED, "bench"))
    if not run.is_done("finetune"):
        with run.locked(), quiet_transformers():
            run_stages(run, ["data", "finetune"])


class Trained(NamedTuple):
    """A run's checkpoints and examples.

    Attributes:
        checkpoints: checkpoint folders, in order.
        weights: learning rates scaled to a sum of 1, so that weighted cosines stay within -1 and 1.
        train, query: encoded examples.
        languages: languages of the training examples.
    """

    checkpoints: list[Path]
    weights: list[float]
    train: list[dict[str, Any]]
    query: list[dict[str, Any]]
    languages: list[str]


def load_trained(folder: Path, train: int | None = None, query: int | None = None) -> Trained:
    """Load a run of `make_trained`, all examples or the given numbers of evenly spaced ones."""
    import pyarrow.parquet as pq

    paths = sorted(
        (folder / "models" / "full").glob("checkpoint-*"), key=lambda p: int(p.name[11:])
    )
    if not paths:
        raise SystemExit(f"{folder}: no trained model there; `bench_tracin.py train` creates it")
    checkpoints = load_checkpoints(paths)
    rates = [float(checkpoint.learning_rate or 1.0) for checkpoint in checkpoints]
    _, tokenizer = load_model(paths[-1])
    encoded, languages = [], []
    for split, count in (("train", train), ("test", query)):
        table = pq.read_table(folder / "data" / f"{split}.parquet")
        if count is not None:
            table = table.take(spaced(len(table), count))
        encoded.append(encode(tokenizer, table, int(tokenizer.model_max_length)))
        languages.append(table.column("language").to_pylist())
    weights = [rate / sum(rates) for rate in rates]
    return Trained(paths, weights, encoded[0], encoded[1], languages[0])


def spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` of `count` row numbers, evenly spaced."""
    wanted = min(count, wanted)
    return [position * count // wanted for position in range(wanted)]
