"""Reads a run folder: settings, examples, subnetworks, metrics, and the views side by side.

Shape legend: Q all test examples of the run, G training languages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracmod.analysis.languages import MEASURES, pivot_examples
from tracmod.durable import read_json

MODELS = ("full", "sparse")
VIEWS = ("full", "subnetwork", "random", "other")


@dataclass(frozen=True)
class View:
    """Influence under one kind of head mask, in the order of `data/test.parquet`.

    Attributes:
        model, name: `full` or `sparse`; one of `VIEWS`.
        draws: how many masks were averaged (several for `random` and `other`).
        measures: name -> (Q, G) float64; NaN where the view has no such test example.
        correct: (Q,) float64, 1 = predicted right (mean over draws); NaN where unknown.
    """

    model: str
    name: str
    draws: int
    measures: dict[str, np.ndarray]
    correct: np.ndarray


class RunResults:
    """What a run folder holds; each part is read when first asked for.

    Attributes:
        path: the folder.
        settings: run.json, or {} where there is none.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a folder; raises ValueError if it has no data/train.parquet and test.parquet."""
        self.path = Path(path)
        for name in ("train", "test"):
            if not (self.path / "data" / f"{name}.parquet").is_file():
                raise ValueError(f"{self.path}: not a run folder: data/{name}.parquet is missing")
        self.settings: dict[str, Any] = _read_if_there(self.path / "run.json", {})

    def examples(self, split: str) -> pa.Table:
        """`data/<split>.parquet`: id language text_a text_b label group."""
        return pq.read_table(self.path / "data" / f"{split}.parquet")

    def section(self, name: str) -> dict[str, Any]:
        """One section of the resolved configuration; {} if it is not recorded."""
        return self.settings.get("config", {}).get(name) or {}

    @cached_property
    def test(self) -> pa.Table:
        """The test examples, without their texts."""
        path = self.path / "data" / "test.parquet"
        return pq.read_table(path, columns=["id", "language", "label", "group"])

    @cached_property
    def num_train(self) -> dict[str, int]:
        """Training examples per language, in the order of the configuration."""
        path = self.path / "data" / "train.parquet"
        return self._ordered(Counter(pq.read_table(path, columns=["language"])[0].to_pylist()))

    @cached_property
    def num_test(self) -> dict[str, int]:
        """Test examples per language, in the order of the configuration."""
        return self._ordered(Counter(self.test["language"].to_pylist()))

    @cached_property
    def clusters(self) -> np.ndarray:
        """(Q,) the parallel item of each test example; its own id where it has none."""
        pairs = zip(self.test["group"].to_pylist(), self.test["id"].to_pylist(), strict=True)
        return np.array([group or f"example {test_id}" for group, test_id in pairs])

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the labels 0, 1, ...; numbers where run.json names none."""
        highest = max(self.test["label"].to_pylist(), default=0)
        return self.settings.get("label_names") or [str(label) for label in range(highest + 1)]

    def metrics(self, model: str) -> list[dict[str, Any]]:
        """`models/<model>/metrics.json`: one entry per epoch; [] if the model is not there."""
        entries = _read_if_there(self.path / "models" / model / "metrics.json", [])
        return sorted(entries, key=lambda entry: entry["epoch"])

    @cached_property
    def subnetworks(self) -> dict[str, dict[str, Any]]:
        """`subnetworks/<language>.json` by language."""
        found = [_read_if_there(path, {}) for path in (self.path / "subnetworks").glob("*.json")]
        by_language = {entry["language"]: entry for entry in found}
        return {name: by_language[name] for name in self._ordered(dict.fromkeys(by_language, 0))}

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """Each language's head mask, (L, H) int."""
        return {name: np.array(entry["mask"]) for name, entry in self.subnetworks.items()}

    def view_folders(self, model: str) -> list[str]:
        """Names of the model's views that hold results."""
        found = (self.path / "influence" / model).glob("*/examples.parquet")
        return sorted((path.parent.name for path in found), key=_natural)

    def views(self) -> list[View]:
        """Every model's views, several draws of one kind averaged per test example.

        `random` is the mean over the `random-<i>`; `other` the mean over the `other-<language>`
        whose language is not the test example's own.
        """
        views = []
        for model in MODELS:
            folders = self.view_folders(model)
            for name in VIEWS:
                draws = [folder for folder in folders if _kind(folder) == name]
                if draws:
                    parts = [self._aligned(model, folder) for folder in draws]
                    measures = {m: _mean([part[m] for part in parts]) for m in MEASURES}
                    correct = _mean([part["correct"] for part in parts])
                    views.append(View(model, name, len(draws), measures, correct))
        return views

    def _aligned(self, model: str, folder: str) -> dict[str, np.ndarray]:
        """One view's examples.parquet in the run's own order of test examples and languages."""
        path = self.path / "influence" / model / folder / "examples.parquet"
        pivot = pivot_examples(pq.read_table(path))
        row_of = {test_id: row for row, test_id in enumerate(self.test["id"].to_pylist())}
        column_of = {language: column for column, language in enumerate(self.num_train)}
        unknown = [i for i in pivot.test_ids if i not in row_of]
        unknown += [name for name in pivot.train_languages if name not in column_of]
        if unknown:
            raise ValueError(f"{path}: {unknown[0]!r} is not in the run's data")
        rows = np.array([row_of[test_id] for test_id in pivot.test_ids], dtype=np.int64)
        columns = [column_of[language] for language in pivot.train_languages]
        if folder.startswith("other-"):
            masked = folder.removeprefix("other-")
            kept = np.array([language != masked for language in pivot.test_languages])
        else:
            kept = np.ones(len(rows), dtype=bool)
        aligned: dict[str, np.ndarray] = {}
        for measure in MEASURES:
            values = np.full((len(row_of), len(column_of)), np.nan)
            values[np.ix_(rows[kept], columns)] = pivot.measures[measure][kept]
            aligned[measure] = values
        aligned["correct"] = np.full(len(row_of), np.nan)
        pairs = zip(pivot.labels, pivot.predictions, strict=True)
        right = [np.nan if guess is None else float(label == guess) for label, guess in pairs]
        aligned["correct"][rows[kept]] = np.array(right)[kept]
        return aligned

    def _ordered(self, counts: dict[str, int]) -> dict[str, int]:
        configured: Sequence[str] = self.section("task").get("languages", [])
        order = [language for language in configured if language in counts]
        order += sorted(language for language in counts if language not in configured)
        return {language: counts[language] for language in order}


def _kind(folder: str) -> str:
    return folder.split("-", 1)[0]


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _mean(parts: list[np.ndarray]) -> np.ndarray:
    """Mean over the parts that have a value; NaN where none has."""
    stacked = np.stack(parts)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    number = known.sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _read_if_there(path: Path, default: Any) -> Any:
    return read_json(path) if path.is_file() else default
