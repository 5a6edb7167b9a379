"""Projected gradients by LogIX: LoGra with random 16 x 16 bottlenecks, without biases."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import torch
from logix import LogIX
from logix.config import LoRAConfig
from torch import Tensor, nn
from torch.nn import functional as F

from tracmod.bench.peers.shared import Examples, batches


def features(model: Any, examples: Examples, size: int, rank: int = 16) -> Tensor:
    """Return the features of the examples, (N, K)."""
    rows: list[Tensor] = [torch.empty(0)] * len(examples)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run = LogIX("bench")
        run.watch(model, type_filter=[nn.Linear])
        if not any("logix_lora" in name for name, _ in model.named_modules()):
            torch.manual_seed(0)
            run.add_lora(lora_config=LoRAConfig(init="random", rank=rank))
        run.setup({"grad": ["log"]})
        for batch in batches(examples, size):
            with run(data_id=batch.rows, mask=batch.attention_mask):
                logits = model(batch.input_ids, batch.attention_mask).logits
                F.cross_entropy(logits, batch.labels, reduction="sum").backward()
            model.zero_grad()
            log = run.get_log()[1]
            block_BK = torch.cat([parts["grad"].flatten(1) for parts in log.values()], dim=1)
            for row, values in zip(batch.rows, block_BK, strict=True):
                rows[row] = values
        run.clear()
    return torch.stack(rows)
