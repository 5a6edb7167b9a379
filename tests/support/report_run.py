"""Makes a small run whose report has nearly every section, for the tests in a browser."""

from __future__ import annotations

import json
from pathlib import Path

from make_run import add_blocks, add_courses, add_retraining, make_run

from tracmod.analysis import analyze
from tracmod.report import write_report


def report_with_everything(path: Path) -> Path:
    """Write a run and its report, and return the path of the page.

    The run has five languages, one of them written from right to left and one without spaces.
    """
    run = make_run(path, num_train=16, num_test=9, k=10, mask_seeds=2)
    add_courses(run)
    add_blocks(run)
    add_retraining(run)
    analyze(run, bootstrap=20, permutations=20)
    interval = {"value": 0.97, "low": 0.96, "high": 0.98}
    names = ("spearman", "pearson", "top_k_overlap", "rmse")
    names += ("share_error_mean", "share_error_largest")
    certificate = {"queries": 9, "train": 16, "k": 3, "passed": True, "least_spearman": 0.95}
    certificates = {"full": certificate | dict.fromkeys(names, interval)}
    (run / "analysis" / "fidelity.json").write_text(json.dumps(certificates))
    return write_report(run)
