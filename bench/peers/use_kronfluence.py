"""Exact scores by kronfluence: pairwise scores without a preconditioner (strategy identity)."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor
from torch.nn import functional as F

from tracmod.bench.peers.shared import Examples, by_length, collate


class Classification(Task):
    """The loss and its measurement, which are the same."""

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="sum")

    def compute_measurement(self, batch: Any, model: Any) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch: Any) -> Tensor:
        return batch["attention_mask"]


def scores(model: Any, query: Examples, train: Examples, size: int) -> Tensor:
    """Return the scores of one checkpoint, (Q, N)."""
    task = Classification()
    orders = [by_length(examples) for examples in (query, train)]
    ordered: Any = [
        [examples[row] for row in order]
        for examples, order in zip((query, train), orders, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "bench", prepare_model(model, task), task, cpu=True, output_dir=folder,
            disable_tqdm=True,
        )  # fmt: skip
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
        analyzer.fit_all_factors(
            "none", ordered[1], per_device_batch_size=size,
            factor_args=FactorArguments(strategy="identity"),
        )  # fmt: skip
        analyzer.compute_pairwise_scores(
            "scores", "none", ordered[0], ordered[1], per_device_query_batch_size=len(query),
            per_device_train_batch_size=size, score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        ordered_QN = analyzer.load_pairwise_scores("scores")["all_modules"]
    rows, columns = (torch.tensor(order).argsort() for order in orders)
    return ordered_QN[rows][:, columns]
