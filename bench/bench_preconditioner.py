"""What a metric costs: features of plain gradients, in Adam's metric and in EK-FAC's, side by side.

    python bench/bench_preconditioner.py [--shape mini] [--examples 256]

Random weights and examples of 16 to 128 tokens. Before anything is timed, exact scores in each
metric are compared with whole gradients of one-example autograd in float64, multiplied by the
metric, and features must rank as these scores do.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracmod as tm
from tracmod.bench.collect import BATCH_TOKENS, DIM, require, whole_gradients
from tracmod.bench.measure import agreement, clock, environment, take_turns, write_json
from tracmod.bench.models import SHAPES, random_examples, random_model, spaced
from tracmod.gradients.capture import select_layers
from tracmod.gradients.preconditioner import Preconditioner

CPU = torch.device("cpu")
CHECKED = 4  # examples whose whole gradients are formed
EXACT_ERROR = 1e-3  # of the largest score


def expected_scores(model: Any, examples: Any, metric: Preconditioner) -> Tensor:
    """(N, N) inner products in the metric, of autograd's gradients, float64."""
    rows = []
    for gradients in whole_gradients(model, examples):
        parts = []
        for layer in select_layers(model):
            own, of = metric.metrics[layer.name], [gradients[n] for n in layer.parameter_names]
            if layer.kind == "linear":
                whole = torch.cat([of[0], *(bias[:, None] for bias in of[1:])], dim=1)
            else:
                whole = torch.stack(of)
            if own.rotate_in is not None and own.rotate_out is not None:
                whole = own.rotate_out.double().T @ whole @ own.rotate_in.double()
            parts.append((whole * own.scale.double()).flatten())
        rows.append(torch.cat(parts))
    rows_NP = torch.stack(rows)
    return rows_NP @ rows_NP.T


def check(name: str, model: Any, examples: Any, metric: Preconditioner) -> dict[str, float]:
    """Errors of exact scores and of features, or WrongResult."""
    some = [examples[row] for row in spaced(len(examples), CHECKED)]
    truth = expected_scores(model, some, metric)
    exact = tm.exact_influence(model, some, some, preconditioner=metric).double()
    error = float((exact - truth).abs().max() / truth.abs().max())
    require(error <= EXACT_ERROR, f"{name}: exact scores off by {error:.1e}; not timed")
    many = examples[:64]
    features = tm.collect_features(model, many, tm.Projection(DIM), preconditioner=metric)
    found = tm.influence_scores(features, features, normalize="cosine")
    exact = tm.exact_influence(model, many, many, normalize="cosine", preconditioner=metric)
    close = agreement(found, exact)
    require(close["rmse"] <= 0.05, f"{name}: features off by {close['rmse']:.2f}; not timed")
    return {"exact_error": error, "rmse": close["rmse"], "spearman": close["spearman"]}


def measure(shape: str, count: int, seconds: float) -> dict[str, Any]:
    """Seconds of a pass over the examples in each metric, and of fitting EK-FAC."""
    model, examples = random_model(shape), random_examples(count)
    generator = torch.Generator().manual_seed(0)
    moments = {
        name: 1e-6 * torch.rand(one.shape, generator=generator) ** 2
        for name, one in model.named_parameters()
    }
    fitted: dict[str, Any] = {}
    fit = clock(lambda: fitted.update(ekfac=tm.fit_ekfac(model, examples)), CPU)
    metrics = {"adam": tm.adam_preconditioner(model, moments), "ekfac": fitted["ekfac"]}
    checked = {name: check(name, model, examples, metric) for name, metric in metrics.items()}
    collect = partial(
        tm.collect_features, model, examples, tm.Projection(DIM), batch_tokens=BATCH_TOKENS
    )
    passes = {"plain": collect} | {
        name: partial(collect, preconditioner=metric) for name, metric in metrics.items()
    }
    found = take_turns(passes, CPU, seconds=seconds)
    return {"shape": shape, "examples": count, "dim": DIM, "seconds": found, "fit_seconds": fit,
            "checked": checked}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the passes together")
    parser.add_argument("--out", type=Path, default=here / "results")
    given = parser.parse_args()
    result = {"part": "preconditioner", **measure(given.shape, given.examples, given.seconds)}
    write_json(
        given.out / f"preconditioner-{given.shape}-cpu.json",
        {**result, "environment": environment(CPU)},
    )


if __name__ == "__main__":
    main()
