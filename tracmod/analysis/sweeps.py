"""One run's main numbers as rows of a sweep's table, from its analysis/summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tracmod.files.durable import read_json

_ANSWERS = ("known_answers", "known_answers_asked")


def sweep_rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """A row per model and view of a run that has been analysed; what is not known is None.

    Columns:
        model, view: as in summary.json.
        accuracy: mean over the test languages of the accuracy under the view's masks, 0 to 1.
        accuracy_zero_shot: the same over the test languages without training data.
        heads_kept, heads: heads under the test example's mask, mean over languages; of how many.
        in_language_share, _low, _high: share of the test example's own language among its strongest
            proponents, with interval, over the test examples whose language has training data.
        null_share: what that share is if language plays no part.
        view_change, _low, _high, _p: in-language share minus that of the view `full`, same model.
        sparse_change, _low, _high, _p: in-language share minus that of the model `full`, same view.
        known_answers: of the task `planted`, how many of the answers that are known come out right;
            known_answers_asked: of how many.
    """
    summary = read_json(Path(run_dir) / "analysis" / "summary.json")
    shares = {(one["model"], one["view"]): one for one in summary["in_language"]}
    changes = {
        (one["model"], one["view"], one["base_model"], one["base_view"]): one
        for one in summary["changes"]
    }
    answers = _known_answers(Path(run_dir) / "analysis" / "planted.parquet")
    rows = []
    for entry in summary["accuracy"]["views"]:
        model, view = entry["model"], entry["view"]
        to_full = changes.get((model, view, model, "full")) if view != "full" else None
        to_full_model = changes.get((model, view, "full", view)) if model != "full" else None
        own = shares.get((model, view), {})
        rows.append(
            {
                "model": model,
                "view": view,
                **_accuracies(entry["languages"], summary["num_train"]),
                **_heads(summary["subnetworks"], view),
                **_interval("in_language_share", own.get("share_positive")),
                "null_share": own.get("null_share"),
                **_interval("view_change", _share_change(to_full), with_p=True),
                **_interval("sparse_change", _share_change(to_full_model), with_p=True),
                **answers.get((model, view), dict.fromkeys(_ANSWERS)),
            }
        )
    return rows


def _known_answers(file: Path) -> dict[tuple[str, str], dict[str, int]]:
    """By model and view."""
    right: dict[tuple[str, str], list[bool]] = {}
    for row in pq.read_table(file).to_pylist() if file.is_file() else []:
        right.setdefault((row["model"], row["view"]), []).append(row["right"])
    return {of: dict(zip(_ANSWERS, (sum(one), len(one)), strict=True)) for of, one in right.items()}


def _accuracies(languages: dict[str, Any], num_train: dict[str, int]) -> dict[str, Any]:
    scores = {name: share["value"] for name, share in languages.items()}
    untrained = [score for name, score in scores.items() if not num_train.get(name)]
    return {
        "accuracy": float(np.mean(list(scores.values()))),
        "accuracy_zero_shot": float(np.mean(untrained)) if untrained else None,
    }


def _heads(subnetworks: dict[str, Any], view: str) -> dict[str, Any]:
    """Heads of the model, and how many a view keeps, where each language has its own mask."""
    if not subnetworks:
        return {"heads_kept": None, "heads": None}
    heads = next(iter(subnetworks.values()))["heads"]
    kept = {
        "full": float(heads),
        "subnetwork": float(np.mean([entry["kept"] for entry in subnetworks.values()])),
    }
    masked = ("random", "random-own", "subnetwork-own", "subnetwork-test")
    kept |= dict.fromkeys(masked, kept["subnetwork"])
    return {"heads_kept": kept.get(view), "heads": heads}


def _share_change(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if entry is None else entry.get("share_positive")


def _interval(
    name: str, entry: dict[str, Any] | None, *, with_p: bool = False
) -> dict[str, float | None]:
    found = entry or {}
    columns = {name: found.get("value")}
    columns |= {f"{name}_{end}": found.get(end) for end in ("low", "high")}
    if with_p:
        columns[f"{name}_p"] = found.get("p_value")
    return columns
