"""Time the collection of plain features, and of features preconditioned by Adam and by EK-FAC.

    python bench/bench_preconditioner.py [--shape mini] [--examples 256]

Random weights and examples of 16 to 128 tokens. Before anything is timed, exact scores with each
preconditioner are compared with whole gradients of one-example autograd in float64, multiplied by
the preconditioner, and scores from features with these exact scores.
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
CHECKED = 4  # number of examples whose whole gradients are formed
EXACT_ERROR = 1e-3  # allowed error of an exact score, relative to the largest


def expected_scores(model: Any, examples: Any, preconditioner: Preconditioner) -> Tensor:
    """Compute the (N, N) preconditioned inner products of autograd's gradients in float64."""
    rows = []
    for gradients in whole_gradients(model, examples):
        parts = []
        for layer in select_layers(model):
            metric = preconditioner.metrics[layer.name]
            own = [gradients[name] for name in layer.parameter_names]
            if layer.kind == "linear":
                whole = torch.cat([own[0], *(bias[:, None] for bias in own[1:])], dim=1)
            else:
                whole = torch.stack(own)
            if metric.rotate_in is not None and metric.rotate_out is not None:
                whole = metric.rotate_out.double().T @ whole @ metric.rotate_in.double()
            parts.append((whole * metric.scale.double()).flatten())
        rows.append(torch.cat(parts))
    rows_NP = torch.stack(rows)
    return rows_NP @ rows_NP.T


def check(name: str, model: Any, examples: Any, preconditioner: Preconditioner) -> dict[str, float]:
    """Compare exact scores with autograd and features with exact scores; return the errors.

    Raises:
        WrongResult: an error is more than rounding or projection explains.
    """
    some = [examples[row] for row in spaced(len(examples), CHECKED)]
    truth = expected_scores(model, some, preconditioner)
    exact = tm.exact_influence(model, some, some, preconditioner=preconditioner).double()
    error = float((exact - truth).abs().max() / truth.abs().max())
    require(error <= EXACT_ERROR, f"{name}: exact scores off by {error:.1e}; not timed")
    many = examples[:64]
    features = tm.collect_features(model, many, tm.Projection(DIM), preconditioner=preconditioner)
    scores = tm.influence_scores(features, features, normalize="cosine")
    exact = tm.exact_influence(model, many, many, normalize="cosine", preconditioner=preconditioner)
    close = agreement(scores, exact)
    require(close["rmse"] <= 0.05, f"{name}: features off by {close['rmse']:.2f}; not timed")
    return {"exact_error": error, "rmse": close["rmse"], "spearman": close["spearman"]}


def measure(shape: str, count: int, seconds: float) -> dict[str, Any]:
    """Time a pass over the examples with each preconditioner, and fitting EK-FAC."""
    model, examples = random_model(shape), random_examples(count)
    generator = torch.Generator().manual_seed(0)
    moments = {
        name: 1e-6 * torch.rand(parameter.shape, generator=generator) ** 2
        for name, parameter in model.named_parameters()
    }
    fitted: dict[str, Any] = {}
    fit_seconds = clock(lambda: fitted.update(ekfac=tm.fit_ekfac(model, examples)), CPU)
    preconditioners = {"adam": tm.adam_preconditioner(model, moments), "ekfac": fitted["ekfac"]}
    checked = {name: check(name, model, examples, p) for name, p in preconditioners.items()}
    collect = partial(
        tm.collect_features, model, examples, tm.Projection(DIM), batch_tokens=BATCH_TOKENS
    )
    passes = {"plain": collect} | {
        name: partial(collect, preconditioner=p) for name, p in preconditioners.items()
    }
    return {"shape": shape, "examples": count, "dim": DIM,
            "seconds": take_turns(passes, CPU, seconds=seconds), "fit_seconds": fit_seconds,
            "checked": checked}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for all passes")
    parser.add_argument("--out", type=Path, default=here / "results")
    options = parser.parse_args()
    result = {
        "part": "preconditioner",
        **measure(options.shape, options.examples, options.seconds),
        "environment": environment(CPU),
    }
    write_json(options.out / f"preconditioner-{options.shape}-cpu.json", result)


if __name__ == "__main__":
    main()
