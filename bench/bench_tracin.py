"""Ours against naive TracIn on a trained model: check, then time, then fidelity per byte.

    python bench/bench_tracin.py --run runs/demo [--train 300] [--query 40] [--json FILE]

Naive TracIn takes one example at a time, forms every weight gradient in evaluation mode and
multiplies whole gradients. The floor is the forward and the activation-gradient backward pass that
any method needs, on the same length-sorted batches. All of it in one process, one run after the
other; times are the best of `--repeat` rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from scipy.stats import spearmanr
from torch import Tensor

import tracmod as tm
from tracmod.capture import capture, frozen, select_layers
from tracmod.model import (
    collate,
    encode,
    load_checkpoints,
    load_model,
    pad_token_id,
    per_example_loss,
    plan_batches,
)

BATCH_TOKENS = 8192


def naive_gradients(model: Any, examples: list[dict[str, Any]]) -> Tensor:
    """(N, P) whole gradients of the encoder's parameters, one example at a time."""
    names = {name for layer in select_layers(model) for name in layer.parameter_names}
    parameters = [p for name, p in model.named_parameters() if name in names]
    rows = []
    for example in examples:
        batch = collate([example], pad_token_id(model))
        labels = batch.pop("labels")
        loss = per_example_loss(model(**batch).logits, labels).sum()
        gradients = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def naive_scores(model: Any, train: list[dict[str, Any]], query: list[dict[str, Any]]) -> Tensor:
    """(Q, N) cosines; training gradients are not kept, there is no room for them in general."""
    query_QP = torch.nn.functional.normalize(naive_gradients(model, query), dim=1)
    columns = []
    for example in train:
        gradient_1P = torch.nn.functional.normalize(naive_gradients(model, [example]), dim=1)
        columns.append(query_QP @ gradient_1P[0])
    return torch.stack(columns, dim=1)


def floor_pass(model: Any, examples: list[dict[str, Any]]) -> None:
    """Forward and activation-gradient backward, with nothing done with what it shows."""
    layers = select_layers(model)
    with frozen(model):
        for rows in plan_batches([len(e["input_ids"]) for e in examples], BATCH_TOKENS):
            batch = collate([examples[row] for row in rows], pad_token_id(model))
            capture(model, layers, batch, lambda captured: None)


def seconds(function: Callable[[], Any], repeat: int) -> float:
    """The best of several rounds."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def fidelity(scores_QN: Tensor, exact_QN: Tensor) -> dict[str, float]:
    """Agreement with exact cosine scores: per query Spearman and top-10 overlap, and RMSE."""
    pairs = list(zip(scores_QN, exact_QN, strict=True))
    overlaps = [len({*s.topk(10).indices.tolist()} & {*e.topk(10).indices.tolist()}) / 10
                for s, e in pairs]  # fmt: skip
    return {
        "rmse": float((scores_QN - exact_QN).square().mean().sqrt()),
        "spearman": sum(float(spearmanr(s, e).statistic) for s, e in pairs) / len(pairs),
        "top10": sum(overlaps) / len(overlaps),
    }


def load_run(run: Path, counts: dict[str, int]) -> tuple[Any, dict[str, list[dict[str, Any]]]]:
    """The last checkpoint of full fine-tuning, and evenly spaced examples of each split."""
    if not (run / "run.json").is_file():
        raise SystemExit(f"{run}: no finished run there; `make demo` makes runs/demo")
    config = json.loads((run / "run.json").read_text())["config"]
    folder = run / "models" / "full" / f"checkpoint-{config['finetune']['epochs']}"
    model, tokenizer = load_model(load_checkpoints([folder])[0].path)
    examples = {}
    for split, count in counts.items():
        table = pq.read_table(run / "data" / f"{split}.parquet")
        every = max(1, len(table) // count)
        table = table.take(list(range(0, len(table), every))[:count])
        examples[split] = encode(tokenizer, table, config["model"]["max_length"])
    return model, examples


def main() -> None:
    parser = argparse.ArgumentParser(description="Ours against naive TracIn.")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--query", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model, examples = load_run(arguments.run, {"train": arguments.train, "test": arguments.query})
    train, query = examples["train"], examples["test"]

    exact_QN = tm.exact_influence(model, train, query, normalize="cosine")
    true_QN = naive_scores(copy.deepcopy(model).double(), train, query)
    ours, naive = (
        float((scores_QN - true_QN).abs().max())
        for scores_QN in (exact_QN, naive_scores(model, train, query))
    )
    print(f"largest error of a cosine against float64: ours {ours:.1e}, naive {naive:.1e}")
    if ours > max(2 * naive, 1e-5):
        raise SystemExit("ours is less exact than twice naive TracIn's own rounding: not timed")

    projection = tm.Projection(4096)
    query_QK = tm.collect_features(model, query, projection)

    def projected() -> Tensor:
        train_NK = tm.collect_features(model, train, projection)
        return tm.influence_scores(query_QK, train_NK, normalize="cosine")

    timed = {
        "naive TracIn": seconds(lambda: naive_scores(model, train, query), 1),
        "floor (pass alone)": seconds(lambda: floor_pass(model, train), arguments.repeat),
        "ours, exact": seconds(
            lambda: tm.exact_influence(model, train, query, normalize="cosine"), arguments.repeat
        ),
        "ours, projected 4096": seconds(projected, arguments.repeat),
    }
    for name, elapsed in timed.items():
        rate, ratio = len(train) / elapsed, timed["naive TracIn"] / elapsed
        print(f"{name:22} {rate:9.1f} training examples/s  {ratio:7.1f} x naive")

    table = []
    for kind, layers, dim in [
        ("rademacher", "accumulate", 1024), ("rademacher", "accumulate", 4096),
        ("rademacher", "accumulate", 16384), ("sjlt", "accumulate", 4096),
        ("rademacher", "concatenate", 4096),
    ]:  # fmt: skip
        chosen = tm.Projection(dim, kind, layers=layers)  # type: ignore[arg-type]
        pair = [tm.collect_features(model, one, chosen) for one in (query, train)]
        row = fidelity(tm.influence_scores(pair[0], pair[1], normalize="cosine"), exact_QN)
        table.append({"kind": kind, "layers": layers, "dim": dim, **row})
        print(
            f"K = {dim:5} {kind:10} {layers:11} against exact: rmse {row['rmse']:.4f}  "
            f"spearman {row['spearman']:.4f}  top-10 overlap {row['top10']:.3f}"
        )
    if arguments.json is not None:
        result = {
            "train": len(train), "query": len(query), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "build": tm.kernels.build_info(),
            "seconds": timed, "fidelity": table,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
