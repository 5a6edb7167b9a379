"""Shared by the scripts of all libraries: examples, checkpoints, batches, and files of results.

Only torch and transformers are imported, so that a script pays for its own library alone.

Shape suffixes: B examples of a batch, S tokens, N training examples, Q query examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

Examples = Sequence[dict[str, Any]]
PADDING = 1  # id of XLM-R's padding token
TOP = 100


class Batch(NamedTuple):
    """Padded examples, with their positions in the data set."""

    rows: list[int]
    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64
    labels: Tensor  # (B,) int64


def by_length(examples: Examples) -> list[int]:
    """Return the positions of the examples, longest first."""
    return sorted(range(len(examples)), key=lambda row: -len(examples[row]["input_ids"]))


def batches(examples: Examples, size: int) -> Iterator[Batch]:
    """Yield batches of `size` examples of similar lengths."""
    order = by_length(examples)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield Batch(rows, *columns([examples[row] for row in rows]))


def columns(examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
    """Pad examples on the right; return ids, mask and labels."""
    longest = max(len(example["input_ids"]) for example in examples)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    ids = [e["input_ids"] + [PADDING] * (longest - len(e["input_ids"])) for e in examples]
    mask_BS = (torch.arange(longest) < lengths[:, None]).long()
    return torch.tensor(ids), mask_BS, torch.tensor([e["labels"] for e in examples])


def collate(examples: Examples) -> dict[str, Tensor]:
    """Return a batch as the keyword arguments of a model."""
    ids, mask, labels = columns(examples)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all linear layers: the parameters that every library attributes."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def load(checkpoint: str | Path) -> Any:
    """Load a classifier in float32 and evaluation mode."""
    return AutoModelForSequenceClassification.from_pretrained(str(checkpoint)).eval()


def load_examples(path: str | Path) -> tuple[Examples, Examples]:
    """Read training and query examples, lists of `input_ids` and `labels`."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    return data["train"], data["query"]


def run_job(
    options: dict[str, Any], out: Path, scores: Callable[[Any, Examples, Examples], Tensor]
) -> None:
    """Compute TracIn over checkpoints; write the strongest training examples of every query.

    `score[q, n] = sum over checkpoints of weight * gradient(q) . gradient(n)`
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    train, query = load_examples(options["examples"])
    total_QN = torch.zeros(len(query), len(train))
    for checkpoint, weight in zip(options["checkpoints"], options["weights"], strict=True):
        total_QN += weight * scores(load(checkpoint), query, train)
    top = total_QN.topk(min(TOP, len(train)))
    count = top.indices.shape[1]
    table = {
        "query": torch.arange(len(query)).repeat_interleave(count).numpy(),
        "rank": torch.arange(count).repeat(len(query)).numpy(),
        "train": top.indices.flatten().numpy(),
        "score": top.values.flatten().numpy(),
    }
    pq.write_table(pa.table(table), out / "top.parquet")
