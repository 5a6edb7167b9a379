"""The main numbers of a run as rows of a sweep's table, from its analysis/summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tracmod.files.durable import read_json

_ANSWERS = ("known_answers", "known_answers_asked")


def sweep_rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return one row per model and view of a run that has been analysed; unknown values are None.

    The columns are:

        model, view: as in summary.json.
        accuracy: mean over test languages of the accuracy under the masks of the view, 0 to 1.
        accuracy_zero_shot: the same over test languages without training data.
        heads_kept, heads: mean over languages of the heads under the mask, and all heads.
        in_language_share, _low, _high: share of the test example's own language among its
            strongest proponents, with interval, where the language has training data.
        null_share: that share if language plays no role.
        view_change, _low, _high, _p: in-language share minus that of the view `full`, same model.
        sparse_change, _low, _high, _p: in-language share minus that of the model `full`, same view.
        known_answers, known_answers_asked: for the task `planted`, number of known answers that
            influence gives, and of all that it was asked for.

    Args:
        run_dir: the run folder.
    """
    summary = read_json(Path(run_dir) / "analysis" / "summary.json")
    shares = {(entry["model"], entry["view"]): entry for entry in summary["in_language"]}
    changes = {
        (entry["model"], entry["view"], entry["base_model"], entry["base_view"]): entry
        for entry in summary["changes"]
    }
    answers = _known_answers(Path(run_dir) / "analysis" / "planted.parquet")
    rows = []
    for entry in summary["accuracy"]["views"]:
        model, view = entry["model"], entry["view"]
        to_full = changes.get((model, view, model, "full"), {}) if view != "full" else {}
        to_full_model = changes.get((model, view, "full", view), {}) if model != "full" else {}
        own = shares.get((model, view), {})
        rows.append(
            {
                "model": model,
                "view": view,
                **_accuracies(entry["languages"], summary["num_train"]),
                **_heads(summary["subnetworks"], view),
                **_interval("in_language_share", own.get("share_positive")),
                "null_share": own.get("null_share"),
                **_interval("view_change", to_full.get("share_positive"), with_p=True),
                **_interval("sparse_change", to_full_model.get("share_positive"), with_p=True),
                **answers.get((model, view), dict.fromkeys(_ANSWERS)),
            }
        )
    return rows


def _known_answers(file: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Return how many answers of each model and view are right, and how many there are."""
    right: dict[tuple[str, str], list[bool]] = {}
    for row in pq.read_table(file).to_pylist() if file.is_file() else []:
        right.setdefault((row["model"], row["view"]), []).append(row["right"])
    return {
        view: dict(zip(_ANSWERS, (sum(answers), len(answers)), strict=True))
        for view, answers in right.items()
    }


def _accuracies(languages: dict[str, Any], num_train: dict[str, int]) -> dict[str, Any]:
    scores = {name: share["value"] for name, share in languages.items()}
    untrained = [score for name, score in scores.items() if not num_train.get(name)]
    return {
        "accuracy": float(np.mean(list(scores.values()))),
        "accuracy_zero_shot": float(np.mean(untrained)) if untrained else None,
    }


def _heads(subnetworks: dict[str, Any], view: str) -> dict[str, Any]:
    """Return the mean number of heads that a view keeps, if it is known, and of all heads."""
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


def _interval(
    name: str, entry: dict[str, Any] | None, *, with_p: bool = False
) -> dict[str, float | None]:
    """Return an interval, and the p-value of its test, as columns."""
    entry = entry or {}
    columns = {name: entry.get("value")}
    columns |= {f"{name}_{end}": entry.get(end) for end in ("low", "high")}
    if with_p:
        columns[f"{name}_p"] = entry.get("p_value")
    return columns
