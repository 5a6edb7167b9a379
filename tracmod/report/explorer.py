"""Test examples with their strongest proponents and opponents, as JSON for the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracmod.analysis import RunResults
from tracmod.report.words import view_title

# Sizes that keep the page's data near 1 MB: texts are the bulk of it.
EXAMPLES_PER_LANGUAGE = 12
SHOWN_PER_SIGN = 6
MOST_LISTED = 24_000
LONGEST_TEXT = 600


def explorer_data(run: RunResults) -> dict[str, Any]:
    """The examples that the page lets one choose from.

    Returns:
        labels: names. k: how many were counted for the shares.
        languages: training languages, the order of every `shares`.
        views: [{title}]. train: [language, text_a, text_b, label] of each listed example.
        tests: {language, text_a, text_b, label, views: [{prediction, shares, opponent_shares,
        proponents, opponents: [[place in train, score]]} or null]}.
    """
    folders = [
        (model, view)
        for model in ("full", "sparse")
        for view in _shown_views(run.view_folders(model))
        if (run.path / "influence" / model / view / "top.parquet").is_file()
    ]
    chosen = _choose(run, folders)
    train_place: dict[str, int] = {}
    per_view = [_view_entries(run, *folder, chosen, train_place) for folder in folders]
    texts = _texts(run.examples("test"), list(chosen))
    tests = [
        {**texts[test_id], "views": [entries.get(test_id) for entries in per_view]}
        for test_id in chosen
    ]
    train = _texts(run.examples("train"), list(train_place))
    return {
        "labels": run.label_names,
        "k": run.ks[0] if run.ks else None,
        "languages": list(run.num_train),
        "views": [{"title": view_title(*folder)} for folder in folders],
        "train": [list(train[train_id].values()) for train_id in train_place],
        "tests": tests,
    }


def _shown_views(folders: list[str]) -> list[str]:
    """All heads, the own subnetwork, and the first of the random draws."""
    random = [view for view in folders if view.startswith("random-")][:1]
    return [view for view in ("full", "subnetwork") if view in folders] + random


def _choose(run: RunResults, folders: list[tuple[str, str]]) -> dict[str, None]:
    """Ids of up to `EXAMPLES_PER_LANGUAGE` test examples a language, right and wrong in turn."""
    if not folders:
        return {}
    path = run.path / "influence" / folders[0][0] / folders[0][1] / "examples.parquet"
    table = pq.read_table(
        path, columns=["test_id", "test_language", "test_label", "test_prediction"]
    )
    right = {
        row["test_id"]: row["test_label"] == row["test_prediction"] for row in table.to_pylist()
    }
    languages = dict(zip(run.test["id"].to_pylist(), run.test["language"].to_pylist(), strict=True))
    per_example = len(folders) * 2 * SHOWN_PER_SIGN
    allowed = MOST_LISTED // per_example // max(1, len(run.num_test))
    number = max(1, min(EXAMPLES_PER_LANGUAGE, allowed))
    chosen: dict[str, None] = {}
    for language in run.num_test:
        ids = [test_id for test_id in right if languages[test_id] == language]
        wrong_ids = [test_id for test_id in ids if not right[test_id]][: number // 2]
        right_ids = [test_id for test_id in ids if right[test_id]][: number - len(wrong_ids)]
        chosen |= dict.fromkeys(right_ids + wrong_ids)
    return chosen


def _view_entries(
    run: RunResults, model: str, view: str, chosen: dict[str, None], train_place: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Entries of one view by test id; training examples get their place when first listed."""
    folder = run.path / "influence" / model / view
    entries: dict[str, dict[str, Any]] = {}
    languages = {language: place for place, language in enumerate(run.num_train)}
    for row in _chosen_rows(folder / "examples.parquet", "test_id", chosen):
        entry = entries.setdefault(
            row["test_id"],
            {
                "prediction": row["test_prediction"],
                "shares": [0.0] * len(languages),
                "opponent_shares": [0.0] * len(languages),
                "proponents": [],
                "opponents": [],
            },
        )
        place = languages[row["train_language"]]
        entry["shares"][place] = round(row["share_positive"], 4)
        entry["opponent_shares"][place] = round(row["share_negative"], 4)
    for row in sorted(_chosen_rows(folder / "top.parquet", "test_id", chosen), key=_by_rank):
        listed = entries[row["test_id"]]["proponents" if row["sign"] > 0 else "opponents"]
        if len(listed) < SHOWN_PER_SIGN:
            place = train_place.setdefault(row["train_id"], len(train_place))
            listed.append([place, float(f"{row['score']:.4g}")])
    return entries


def _by_rank(row: dict[str, Any]) -> int:
    return row["rank"]


def _chosen_rows(path: Path, column: str, chosen: dict[str, None]) -> list[dict[str, Any]]:
    table = pq.read_table(path)
    wanted = pc.is_in(table[column], pa.array(list(chosen), table.schema.field(column).type))
    return table.filter(wanted).to_pylist()


def _texts(examples: pa.Table, ids: list[str]) -> dict[str, dict[str, Any]]:
    wanted = pc.is_in(examples["id"], pa.array(ids, pa.string()))
    return {
        row["id"]: {
            "language": row["language"],
            "text_a": _shortened(row["text_a"]),
            "text_b": _shortened(row["text_b"]),
            "label": row["label"],
        }
        for row in examples.filter(wanted).to_pylist()
    }


def _shortened(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
