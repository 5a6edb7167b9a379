"""Fidelity per byte: compare scores from features with exact cosine scores, on the trained model.

The same table has two kinds of features in plain torch: the form that other libraries use, one
two-sided 16x16 grid for each linear layer, concatenated; and one grid that all layers are summed
into.
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
# (kind, layers, K) of tracmod's features
TRACMOD: list[tuple[Any, Any, int]] = [
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
    """Compute RMSE, Spearman correlation and top-10 overlap of each kind of features.

    Args:
        run: run folder from `make_trained`; its last checkpoint is used.
        device: device to compute on.
        train, query: numbers of examples.
        seeds: number of seeds of the projection to average over.

    Raises:
        WrongResult: the exact scores or the features are incorrect.
    """
    job = load_trained(run, train, query)
    model = to_device(load_classifier(job.checkpoints[-1]), device)
    error = check_exact(model, job.train, job.query)
    exact_QN = tm.exact_influence(model, job.train, job.query, normalize="cosine").cpu()
    batches = [
        plain.ready_batches(model, examples, BATCH_TOKENS, device)
        for examples in (job.query, job.train)
    ]

    def tracmod_features(kind: Any, layers: Any, dim: int, seed: int) -> Pair:
        projection = tm.Projection(dim, kind, seed, layers)
        if seed == 0:
            check_features(model, job.query, projection)
        query_QK, train_NK = (
            tm.collect_features(model, examples, projection) for examples in (job.query, job.train)
        )
        return query_QK, train_NK

    def hooked_features(seed: int, **form: int) -> Pair:
        hooked = plain.HookedFeatures(model, seed=seed, **form)
        return hooked.features(batches[0]), hooked.features(batches[1])

    table = [
        _row(f"ours, {layers}", kind, partial(tracmod_features, kind, layers, dim), exact_QN, seeds)
        for kind, layers, dim in TRACMOD
    ]
    for name, form in (
        ("plain torch, 16x16 per layer", {"grid": 16}),
        ("plain torch, one summed grid", {"dim": 4096}),
    ):
        table.append(_row(name, "rademacher", partial(hooked_features, **form), exact_QN, seeds))
    return {
        "part": "fidelity", "environment": environment(device), "train": len(job.train),
        "query": len(job.query), "seeds": seeds, "exact_error": error, "table": table,
    }  # fmt: skip


def _row(
    form: str, kind: str, features: Callable[..., Pair], exact_QN: Tensor, seeds: int
) -> dict[str, Any]:
    """Return the mean over the projection's seeds, and the largest error of a seed."""
    results = []
    for seed in range(seeds):
        query_QK, train_NK = features(seed=seed)
        scores_QN = tm.influence_scores(query_QK, train_NK, normalize="cosine").cpu()
        require(bool(scores_QN.isfinite().all()), f"{form}: scores are not finite")
        results.append(agreement(scores_QN, exact_QN))
    dim = query_QK.shape[1]
    means = {name: sum(result[name] for result in results) / seeds for name in results[0]}
    worst = max(result["rmse"] for result in results)
    return {
        "form": form, "kind": kind, "dim": dim, "bytes_per_row": 4 * dim, **means,
        "rmse_worst": worst,
    }  # fmt: skip
