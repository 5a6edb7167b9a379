"""Makes a small run whose report has nearly every section, for the tests in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from make_run import make_run

from tracmod.analysis import analyze
from tracmod.report import write_report


def report_with_everything(path: Path) -> Path:
    """Write the run and its report: five languages, one from right to left, one without spaces.

    Returns:
        The page.
    """
    run = make_run(path, num_train=16, num_test=9, k=10, mask_seeds=2)
    rng = np.random.default_rng(1)
    _add_pruning(run, rng)
    analyze(run, bootstrap=20, permutations=20)
    _add_blocks(run, rng)
    interval = {"value": 0.97, "low": 0.96, "high": 0.98}
    names = ("spearman", "pearson", "top_k_overlap", "rmse")
    names += ("share_error_mean", "share_error_largest")
    certificate = {"queries": 9, "train": 16, "k": 3, "passed": True, "least_spearman": 0.95}
    certificates = {"full": certificate | dict.fromkeys(names, interval)}
    (run / "analysis" / "fidelity.json").write_text(json.dumps(certificates))
    return write_report(run)


def _add_pruning(run: Path, rng: np.random.Generator) -> None:
    for file in (run / "subnetworks").glob("*.json"):
        entry = json.loads(file.read_text(encoding="utf-8"))
        scores = np.sort(rng.uniform(0.6, 0.74, 7))[::-1].tolist()
        entry["course"] = [
            {"heads": 48 - 6 * step, "score": score, "importance": rng.random((6, 8)).tolist()}
            for step, score in enumerate(scores)
        ]
        file.write_text(json.dumps(entry), encoding="utf-8")


def _add_blocks(run: Path, rng: np.random.Generator) -> None:
    heads: list[int | None] = [*range(8), None]
    places = [(layer, head) for layer in range(6) for head in heads] + [(None, None)]
    rows = [
        {
            "model": model,
            "view": "full",
            "layer": layer,
            "head": head,
            "in_language": float(rng.normal(2e-5, 1e-5)),
            "cross_language": float(rng.normal(1e-5, 1e-5)),
        }
        for model in ("full", "sparse")
        for layer, head in places
    ]
    pq.write_table(pa.Table.from_pylist(rows), run / "analysis" / "blocks.parquet")
