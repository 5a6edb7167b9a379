"""Exact scores by captum: TracInCP with its trick for linear layers."""

from __future__ import annotations

from typing import Any

import torch
from captum.influence import TracInCP
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tracmod.bench.peers.shared import Examples, by_length, columns, linear_names


class Logits(nn.Module):
    """Wraps a classifier as captum calls models: inputs one by one, and logits as output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def scores(model: Any, query: Examples, train: Examples, size: int) -> Tensor:
    """Return the scores of one checkpoint, (Q, N)."""

    def loader(examples: Examples) -> Any:
        rows: Any = [examples[row] for row in by_length(examples)]
        return DataLoader(rows, batch_size=size, collate_fn=columns)

    wrapped = Logits(model)
    tracin = TracInCP(
        wrapped,
        loader(train),
        checkpoints=["loaded already"],
        checkpoints_load_func=lambda model, path: 1.0,
        layers=linear_names(wrapped),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        sample_wise_grads_per_batch=True,
    )
    ordered_QN = tracin.influence(loader(query))
    positions = (torch.tensor(by_length(examples)).argsort() for examples in (query, train))
    rows, columns_ = positions
    return ordered_QN[rows][:, columns_]
