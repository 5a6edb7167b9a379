"""Projected gradients by bergson: a two-sided 16 x 16 grid for every linear layer."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from bergson import GradientProcessor, IndexConfig, InMemoryCollector
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from tracmod.bench.peers.shared import Examples, batches


def features(model: Any, examples: Examples, size: int, grid: int = 16) -> Tensor:
    """Return the features of the examples, (N, K).

    bergson's own loop computes the loss of language models only, so this is a loop over its
    collector. The collector's hooks expect inputs of shape (batch, tokens, width), so the
    classifier gets a tokens dimension of one.
    """
    head = model.classifier
    head.forward = lambda states: head.out_proj(torch.tanh(head.dense(states[:, :1])))
    # As bergson's own loop does: no gradient of a weight but the embeddings'.
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        collector = InMemoryCollector(
            model=model,
            data=Dataset.from_dict({"input_ids": [example["input_ids"] for example in examples]}),
            cfg=IndexConfig(run_path=folder, projection_dim=grid, include_bias=True),
            processor=GradientProcessor(projection_dim=grid, include_bias=True),
        )
        for batch in batches(examples, size):
            with collector.with_batch(batch.attention_mask.bool()):
                logits = model(batch.input_ids, batch.attention_mask).logits[:, 0]
                losses = F.cross_entropy(logits, batch.labels, reduction="none")
                losses.sum().backward()
            model.zero_grad()
            collector.process_batch(batch.rows, losses=losses)
        collector.teardown()
    return torch.cat(list(collector.gradients.values()), dim=1)
