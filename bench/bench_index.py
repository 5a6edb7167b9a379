"""Measure the recall, size and speed of indexes and compressed rows on real gradients.

    python bench/bench_index.py --run runs/bench       (the model of `bench_tracin.py train`)

Recall is the share of the 100 strongest training examples of each sign, by float32 rows, that a
method finds. Compressed rows are all scored. An index is searched, and its candidates are also
rescored from float32 rows, as `tracmod query` does. Some queries tune how many lists are probed;
recall is measured on the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracmod as tm
from tracmod.attribution.query import CANDIDATES
from tracmod.bench.collect import WrongResult, require
from tracmod.bench.measure import environment, take_turns, write_json
from tracmod.bench.models import Trained, load_trained
from tracmod.bench.report import section
from tracmod.influence.index import KINDS, InfluenceIndex
from tracmod.models.loading import load_classifier

K = 100
Rows = list[Tensor]  # one (N, K) per checkpoint


def run_index(
    run: Path,
    dims: Sequence[int],
    kinds: Sequence[str] = KINDS,
    *,
    train: int | None = None,
    query: int | None = None,
    tuning: int = 100,
    recall: float = 0.95,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Measure every kind of index and of compressed rows, for every projection dimension.

    Args:
        run: run folder from `make_trained`.
        dims: numbers per example and checkpoint.
        kinds: kinds of index.
        train, query: numbers of examples; None for all.
        tuning: number of queries that tune how many lists are probed. They are left out of the
            recall.
        recall: recall that the indexes are tuned for.
        seconds: time for timing the searches of a kind.

    Raises:
        WrongResult: the flat index does not find the strongest examples by exact scores.
    """
    load = os.getloadavg()[0]  # that of other programs: this one has only just started
    job = load_trained(run, train, query)
    table = []
    for dim in dims:
        trains, queries = (_features(job, examples, dim) for examples in (job.train, job.query))
        tuning_queries, test_queries = [q[:tuning] for q in queries], [q[tuning:] for q in queries]
        exact = _Exact(trains, test_queries, job.weights)
        table += [{"dim": dim, **row} for row in _rows(exact, seconds)]
        for kind in kinds:
            index = InfluenceIndex.build(
                trains,
                kind=kind,
                weights=job.weights,
                normalize="cosine",
                queries=tuning_queries,
                recall=recall,
            )
            table.append({"dim": dim, **_index_row(index, exact, seconds)})
    return {
        "part": "index", "environment": environment(torch.device("cpu")), "train": len(job.train),
        "query": len(job.query) - tuning, "checkpoints": len(job.checkpoints), "k": exact.k,
        "recall_asked": recall, "candidates": CANDIDATES, "load_before": load, "table": table,
    }  # fmt: skip


def _features(job: Trained, examples: Any, dim: int) -> Rows:
    models = [load_classifier(path) for path in job.checkpoints]
    return [tm.collect_features(model, examples, tm.Projection(dim)) for model in models]


class _Exact:
    """The strongest training examples by float32 rows, and the recall of other methods."""

    def __init__(self, trains: Rows, queries: Rows, weights: list[float]) -> None:
        self.trains, self.queries, self.weights = trains, queries, weights
        self.k = min(K, len(trains[0]))
        top = self.top(trains, queries)
        self.proponents, self.opponents = top.indices, top.opponent_indices

    def top(self, trains: Rows, queries: Rows) -> tm.kernels.TopK:
        """Rank the rows given by their float32 scores."""
        return tm.kernels.top_k_dot(
            queries, trains, k=self.k, weights=self.weights, normalize="cosine"
        )

    def recall(self, proponents: Tensor, opponents: Tensor) -> dict[str, float]:
        """Compute the recall of candidate positions (Q, any number); -1 is no candidate."""
        return {
            "proponents": _share(proponents, self.proponents),
            "opponents": _share(opponents, self.opponents),
        }


def _share(candidates_QC: Tensor, exact_QK: Tensor) -> float:
    hits = [
        torch.isin(exact, candidates).double().mean()
        for candidates, exact in zip(candidates_QC, exact_QK, strict=True)
    ]
    return float(torch.stack(hits).mean())


def _rows(exact: _Exact, seconds: float) -> list[dict[str, Any]]:
    """Measure rows compressed to fewer bits, each checkpoint's row by itself."""
    formats: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
        "float32 rows": (lambda rows: rows, 4, 0),
        "bfloat16 rows": (lambda rows: rows.bfloat16().float(), 2, 0),
        "int8 rows": (_int8, 1, 4),
    }
    table = []
    for name, (compress, number_bytes, row_bytes) in formats.items():
        top = exact.top([compress(rows) for rows in exact.trains], exact.queries)
        size = sum(number_bytes * rows.shape[1] + row_bytes for rows in exact.trains)
        recall = exact.recall(top.indices, top.opponent_indices)
        table.append({"name": name, "bytes": size, "recall": recall})
    first_query = [query[:1] for query in exact.queries]
    timed = _milliseconds(lambda: exact.top(exact.trains, first_query), seconds)
    table[0]["milliseconds"] = timed
    return table


def _int8(rows_NK: Tensor) -> Tensor:
    """Round every row to 255 steps of its largest number."""
    scales_N1 = rows_NK.abs().amax(dim=1, keepdim=True) / 127
    return (rows_NK / scales_N1.clamp_min(1e-38)).round() * scales_N1


def _index_row(index: InfluenceIndex, exact: _Exact, seconds: float) -> dict[str, Any]:
    count = min(CANDIDATES * exact.k, len(index.ids))
    sides = [index.search(exact.queries, count, opponents=side).indices for side in (False, True)]
    recall = exact.recall(*(indices[:, : exact.k] for indices in sides))
    both = torch.cat(sides, dim=1)
    if index.kind == "flat":  # less than 1 only because of equal scores at the end of the ranking
        require(min(recall.values()) > 0.97, f"the flat index finds only {recall} of the exact")
    first_query = [query[:1] for query in exact.queries]
    return {
        "name": index.kind,
        "bytes": index.bytes_per_example,
        "fixed_bytes": index.fixed_bytes,
        "recall": recall,
        "rescored": exact.recall(both, both),
        "effort": index.effort,
        "lists": index.index.nlist if index.kind.startswith("ivf") else None,
        "build_seconds": index.seconds["train"] + index.seconds["add"],
        "milliseconds": _milliseconds(
            lambda: [index.search(first_query, exact.k, opponents=side) for side in (False, True)],
            seconds,
        ),
    }


def _milliseconds(search: Callable[[], Any], seconds: float) -> float:
    """Return the milliseconds that a search for one query and both signs takes."""
    best = take_turns({"search": search}, torch.device("cpu"), seconds=seconds, rounds=50)
    return best["search"] * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure indexes and compressed rows.")
    parser.add_argument("--run", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--dim", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--train", type=int, help="default: all, 5,000")
    parser.add_argument("--query", type=int, help="default: all, 500")
    options = parser.parse_args()
    try:
        result = run_index(
            options.run, options.dim, options.kind, train=options.train, query=options.query
        )
    except WrongResult as error:
        sys.exit(f"wrong result: {error}")
    write_json(options.out / "index-cpu.json", result)
    print("\n".join(section(result)))


if __name__ == "__main__":
    main()
