"""What the benchmarks run on: random models and examples, and a small model that tracmod trains."""

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

# The trained model: the mini shape on the embedded task, 5,000 training and 500 test examples.
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
    """An XLM-R classifier with random weights, float32, evaluation mode."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 132, "num_labels": LABELS,
        "pad_token_id": 1, "type_vocab_size": 1, **SHAPES[shape],
    }  # fmt: skip
    torch.manual_seed(seed)
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(**settings)).eval()


def random_examples(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """16 to 128 random tokens each, uniformly."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in torch.randint(16, 129, (count,), generator=generator).tolist():
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        label = int(torch.randint(LABELS, (1,), generator=generator))
        examples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": label})
    return examples


def make_trained(folder: Path, config: dict[str, Any] | None = None) -> None:
    """Sample the data and fine-tune, unless the folder holds it already."""
    from tracmod.config import parse_config  # not on every machine, and not needed where it is done
    from tracmod.study.pipeline import run_stages
    from tracmod.study.run_folder import RunFolder

    run = RunFolder(folder, parse_config(config or TRAINED, "bench"))
    if not run.is_done("finetune"):
        with run.locked(), quiet_transformers():
            run_stages(run, ["data", "finetune"])


class Trained(NamedTuple):
    """A run's checkpoints and examples.

    Attributes:
        checkpoints: folders, in order.
        weights: learning rates, scaled to sum to 1, so that scores are cosines.
        train, query: encoded examples.
        languages: of the training examples.
    """

    checkpoints: list[Path]
    weights: list[float]
    train: list[dict[str, Any]]
    query: list[dict[str, Any]]
    languages: list[str]


def load_trained(folder: Path, train: int | None = None, query: int | None = None) -> Trained:
    """A run of `make_trained`; counts take evenly spaced examples."""
    import pyarrow.parquet as pq

    paths = sorted(
        (folder / "models" / "full").glob("checkpoint-*"), key=lambda p: int(p.name[11:])
    )
    if not paths:
        raise SystemExit(f"{folder}: no trained model there; `bench_tracin.py train` makes it")
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
    """So many of `count` rows, evenly spaced."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]
