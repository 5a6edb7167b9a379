"""Projected gradients by dattri: LoGra or FactGraSS, 256 numbers for every linear layer."""

from __future__ import annotations

import os
import tempfile
from typing import Any

# Compiling the compressors takes longer than they run: batches have many shapes.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from dattri.algorithm.factgrass import FactGraSSAttributor
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.utils.data import DataLoader

from tracmod.bench.peers.shared import Examples, by_length, collate


def features(
    model: Any, examples: Examples, size: int, method: str = "logra", numbers: int = 256
) -> Tensor:
    """Return the features of the examples, (N, K)."""

    def loss(model: Any, batch: dict[str, Tensor], device: str) -> Tensor:
        return model(**batch).loss

    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    order = by_length(examples)
    ordered: Any = [examples[row] for row in order]
    loader: Any = DataLoader(ordered, batch_size=size, collate_fn=collate)
    kind = {"logra": LoGraAttributor, "factgrass": FactGraSSAttributor}[method]
    task = AttributionTask(loss, model, model.state_dict())
    with tempfile.TemporaryDirectory() as folder:  # for its metadata; the features stay in memory
        attributor = kind(task, hessian="Identity", proj_dim=numbers, cache_dir=folder)
        attributor.cache(loader)
        stored = attributor.offload_manager.create_gradient_dataloader("gradients", batch_size=1)
        rows_NK = torch.cat([block for block, _ in stored])
    return rows_NK[torch.tensor(order).argsort()]
