"""Features and exact scores in plain torch, as a user without a library writes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracmod.bench import plain
from tracmod.bench.peers.shared import Batch, Examples, batches, linear_names


def loss_of(model: Any, batch: Batch) -> Tensor:
    logits = model(batch.input_ids, batch.attention_mask).logits
    return F.cross_entropy(logits, batch.labels, reduction="sum")


def logra(model: Any, examples: Examples, size: int, grid: int = 16) -> Tensor:
    """Return a two-sided grid for every linear layer, with ready-made matrices of signs."""
    ready = [
        plain.Batch(
            b.rows, {"input_ids": b.input_ids, "attention_mask": b.attention_mask}, b.labels
        )
        for b in batches(examples, size)
    ]
    return plain.HookedFeatures(model, grid=grid).features(ready)


def countsketch(model: Any, examples: Examples, size: int, numbers: int = 8192) -> Tensor:
    """Form the gradient of every linear layer, and add it with random signs into K sums."""
    generator = torch.Generator().manual_seed(0)
    tables = {}
    for name in linear_names(model):
        layer = model.get_submodule(name)
        count = layer.out_features * (layer.in_features + 1)
        positions = torch.randint(0, numbers, (count,), generator=generator)
        tables[name] = positions, torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    features_NK = torch.zeros(len(examples), numbers)

    def add(name: str, module: nn.Module, x: Tensor, g: Tensor) -> None:
        if isinstance(module, nn.Linear):
            if x.dim() == 2:
                x, g = x[:, None], g[:, None]
            gradient_BOI = torch.cat([g.mT @ x, g.sum(1)[..., None]], dim=2)
            positions, signs = tables[name]
            out_BK.index_add_(1, positions, gradient_BOI.flatten(1).mul_(signs))

    with plain.requiring_grad(model, []):
        for batch in batches(examples, size):
            out_BK = torch.zeros(len(batch.rows), numbers)
            with plain.hooked(model, add):
                loss_of(model, batch).backward()
            features_NK[batch.rows] = out_BK
    return features_NK


def product(query_QP: Tensor, train_BP: Tensor) -> Tensor:
    """Multiply part by part: float32 sums of all numbers of a large model lose three digits."""
    parts = zip(query_QP.split(2**20, dim=1), train_BP.split(2**20, dim=1), strict=True)
    return torch.stack([query_QI @ train_BI.T for query_QI, train_BI in parts]).sum(0)


def naive(model: Any, query: Examples, train: Examples, size: int) -> Tensor:
    """Compute whole gradients one example at a time, and their products in blocks."""
    names = [f"{name}.{part}" for name in linear_names(model) for part in ("weight", "bias")]
    with plain.requiring_grad(model, names) as parameters:
        count = sum(parameter.numel() for parameter in parameters)

        def gradients(examples: Examples) -> Tensor:
            rows_BP = torch.empty(len(examples), count)
            for batch in batches(examples, 1):
                parts = torch.autograd.grad(loss_of(model, batch), parameters)
                torch.cat([part.flatten() for part in parts], out=rows_BP[batch.rows[0]])
            return rows_BP

        query_QP = gradients(query)
        block = max(1, min(32, 2**28 // count))
        blocks = [train[start : start + block] for start in range(0, len(train), block)]
        return torch.cat([product(query_QP, gradients(block)) for block in blocks], dim=1)
