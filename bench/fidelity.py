"""Fidelity per byte: scores from features against exact cosine scores, on the trained model.

In the same table the rivals' form, one two-sided 16x16 grid for each linear layer, concatenated,
and one summed grid, both in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracmod as tm
from tracmod.bench import plain
from tracmod.bench.collect import BATCH_TOKENS, check_exact, check_features, require
from tracmod.bench.measure import agreement, environment
from tracmod.bench.models import load_trained
from tracmod.models.loading import load_classifier
from tracmod.models.modes import to_device

Pair = tuple[Tensor, Tensor]
# (kind, layers, K)
OURS: list[tuple[Any, Any, int]] = [
    ("rademacher", "accumulate", 1024),
    ("rademacher", "accumulate", 4096),
    ("rademacher", "accumulate", 16384),
    ("sjlt", "accumulate", 4096),
    ("sjlt", "accumulate", 16384),
    ("rademacher", "concatenate", 4096),
]


def run_fidelity(
    run: Path, device: torch.device, train: int, query: int, seeds: int = 3
) -> dict[str, Any]:
    """Root mean square error, Spearman and top-10 overlap of each kind of row, last checkpoint.

    Raises:
        WrongResult: the exact scores, or features, are wrong.
    """
    job = load_trained(run, train, query)
    model = to_device(load_classifier(job.checkpoints[-1]), device)
    error = check_exact(model, job.train, job.query)
    exact_QN = tm.exact_influence(model, job.train, job.query, normalize="cosine").cpu()
    batches = [
        plain.ready_batches(model, one, BATCH_TOKENS, device) for one in (job.query, job.train)
    ]

    def ours(kind: Any, layers: Any, dim: int, seed: int) -> Pair:
        projection = tm.Projection(dim, kind, seed, layers)
        if seed == 0:
            check_features(model, job.query, projection)
        query_QK, train_NK = (
            tm.collect_features(model, one, projection) for one in (job.query, job.train)
        )
        return query_QK, train_NK

    def hooks(seed: int, **form: int) -> Pair:
        made = plain.HookedFeatures(model, seed=seed, **form)
        return made.features(batches[0]), made.features(batches[1])

    table = [
        _row(f"ours, {layers}", kind, partial(ours, kind, layers, dim), exact_QN, seeds)
        for kind, layers, dim in OURS
    ]
    for name, form in (
        ("plain torch, 16x16 per layer", {"grid": 16}),
        ("plain torch, one summed grid", {"dim": 4096}),
    ):
        table.append(_row(name, "rademacher", partial(hooks, **form), exact_QN, seeds))
    return {
        "part": "fidelity", "environment": environment(device), "train": len(job.train),
        "query": len(job.query), "seeds": seeds, "exact_error": error, "table": table,
    }  # fmt: skip


def _row(
    form: str, kind: str, features: Callable[..., Pair], exact_QN: Tensor, seeds: int
) -> dict[str, Any]:
    """The mean over the projection's seeds, and the largest error among them."""
    found = []
    for seed in range(seeds):
        query_QK, train_NK = features(seed=seed)
        scores_QN = tm.influence_scores(query_QK, train_NK, normalize="cosine").cpu()
        require(bool(scores_QN.isfinite().all()), f"{form}: scores are not finite")
        found.append(agreement(scores_QN, exact_QN))
    dim = query_QK.shape[1]
    means = {name: sum(one[name] for one in found) / seeds for name in found[0]}
    worst = max(one["rmse"] for one in found)
    return {
        "form": form, "kind": kind, "dim": dim, "bytes_per_row": 4 * dim, **means,
        "rmse_worst": worst,
    }  # fmt: skip
