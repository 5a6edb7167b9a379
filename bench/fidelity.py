"""Fidelity per byte: scores from features against exact cosine scores, on the trained model.

In the same table the rivals' form, one two-sided 16x16 grid for each linear layer, concatenated,
and one summed grid, both in plain torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracmod as tm
from tracmod.bench import plain
from tracmod.bench.collect import BATCH_TOKENS, check_exact, check_features, require
from tracmod.bench.measure import agreement, environment
from tracmod.bench.models import load_trained
from tracmod.model import load_classifier, to_device

# (kind, layers, K)
OURS: list[tuple[Any, Any, int]] = [
    ("rademacher", "accumulate", 1024),
    ("rademacher", "accumulate", 4096),
    ("rademacher", "accumulate", 16384),
    ("sjlt", "accumulate", 4096),
    ("sjlt", "accumulate", 16384),
    ("rademacher", "concatenate", 4096),
]


def run_fidelity(run: Path, device: torch.device, train: int, query: int) -> dict[str, Any]:
    """Root mean square error, Spearman and top-10 overlap of each kind of row, last checkpoint.

    Raises:
        WrongResult: the exact scores, or features, are wrong.
    """
    job = load_trained(run, train, query)
    model = to_device(load_classifier(job.checkpoints[-1]), device)
    error = check_exact(model, job.train, job.query)
    exact_QN = tm.exact_influence(model, job.train, job.query, normalize="cosine").cpu()
    table = []
    for kind, layers, dim in OURS:
        projection = tm.Projection(dim, kind, layers=layers)
        check_features(model, job.query, projection)
        pair = [tm.collect_features(model, one, projection) for one in (job.query, job.train)]
        table.append(_row(f"ours, {layers}", kind, pair, exact_QN))
    for name, hooks in (
        ("plain torch, 16x16 per layer", plain.HookedFeatures(model, grid=16)),
        ("plain torch, one summed grid", plain.HookedFeatures(model, dim=4096)),
    ):
        pair = [
            hooks.features(plain.ready_batches(model, one, BATCH_TOKENS, device))
            for one in (job.query, job.train)
        ]
        table.append(_row(name, "rademacher", pair, exact_QN))
    return {
        "part": "fidelity", "environment": environment(device), "train": len(job.train),
        "query": len(job.query), "exact_error": error, "table": table,
    }  # fmt: skip


def _row(form: str, kind: str, pair: list[Tensor], exact_QN: Tensor) -> dict[str, Any]:
    scores_QN = tm.influence_scores(pair[0], pair[1], normalize="cosine").cpu()
    require(bool(scores_QN.isfinite().all()), f"{form}: scores are not finite")
    dim = pair[0].shape[1]
    found = agreement(scores_QN, exact_QN)
    return {"form": form, "kind": kind, "dim": dim, "bytes_per_row": 4 * dim, **found}
