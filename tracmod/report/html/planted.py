"""The report's table of known answers, from `analysis/planted.parquet`."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
QUESTIONS = {
    "duplicates": "Share of duplicated test examples whose duplicate is the strongest proponent",
    "flipped_by_self_influence": "Mislabelled training examples told by self-influence (AUC)",
    "flipped_by_opponents": "Mislabelled training examples told as opponents (AUC)",
    "relatedness": "Shares between languages against their relatedness (Spearman)",
    "loan": "Rise of the share of the one language that teaches a word, where it is needed",
    "isolated": "Share of its own language among the proponents of the isolated one",
    "cipher": "Share of base among the proponents of cipher, which is base in other letters",
}


def planted_section(rows: list[Row]) -> Row:
    """What the page shows: `columns` (model, view), `rows` of the table, and a `sentence`."""
    cells = {(row["question"], row["model"], row["view"]): row for row in rows}
    columns = list(dict.fromkeys((row["model"], row["view"]) for row in rows))
    asked = [question for question in QUESTIONS if any(question == key[0] for key in cells)]
    right = sum(row["right"] for row in rows)
    return {
        "columns": [{"model": model, "view": view} for model, view in columns],
        "rows": [
            {
                "text": QUESTIONS[question],
                "expected": next(r["expected"] for r in rows if r["question"] == question),
                "cells": [cells.get((question, *column)) for column in columns],
            }
            for question in asked
        ],
        "sentence": f"Of {len(rows)} answers {right} are right.",
    }
