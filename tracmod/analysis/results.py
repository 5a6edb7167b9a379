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
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracmod.analysis.languages import MEASURES, pivot_examples
from tracmod.choices import ModelName
from tracmod.files.durable import read_json

MODELS = get_args(ModelName)
VIEWS = (
    "full",
    "subnetwork",
    "subnetwork-own",
    "subnetwork-test",
    "random",
    "random-own",
    "other",
    "union",
    "intersection",
)
# Within a view's folder: the same tables, made without training examples of the test example's
# own parallel group.
WITHOUT_GROUP = "without-group"


@dataclass(frozen=True)
class View:
    """Influence under one kind of head mask, in the order of `data/test.parquet`.

    Attributes:
        model, name: `full` or `sparse`; one of `VIEWS`.
        folders: names of the views in the run folder that were averaged, one per draw.
        measures: name -> (Q, G) float64; NaN where the view has no such test example.
        correct: (Q,) float64, 1 = predicted right (mean over draws); NaN where unknown.
    """

    model: str
    name: str
    folders: list[str]
    measures: dict[str, np.ndarray]
    correct: np.ndarray

    @property
    def draws(self) -> int:
        """How many masks were averaged (several for `random`, `other`, `union`, ...)."""
        return len(self.folders)


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

    @property
    def asked_ks(self) -> list[int]:
        """`influence.k` as a list, the main number first; [] where it is not recorded."""
        k = self.section("influence").get("k") or []
        return k if isinstance(k, list) else [k]

    @property
    def ks(self) -> list[int]:
        """Over how many strongest training examples shares are counted, the main number first.

        One above the number of training examples counts as that.
        """
        total = sum(self.num_train.values())
        return list(dict.fromkeys(min(k, total) for k in self.asked_ks))

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
    def null_shares(self) -> dict[str, float]:
        """Each training language's part of the training examples."""
        total = sum(self.num_train.values())
        return {language: size / total for language, size in self.num_train.items()}

    @cached_property
    def own_columns(self) -> np.ndarray:
        """(Q,) the place of each test example's language among the G training languages, or -1."""
        column_of = {language: column for column, language in enumerate(self.num_train)}
        return np.array([column_of.get(name, -1) for name in self.test["language"].to_pylist()])

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
        by_language = self._masks_in(self.path / "subnetworks")
        return {name: by_language[name] for name in self._ordered(dict.fromkeys(by_language, 0))}

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """Each language's head mask, (L, H) int."""
        return {name: np.array(entry["mask"]) for name, entry in self.subnetworks.items()}

    @cached_property
    def seed_masks(self) -> dict[str, list[np.ndarray]]:
        """`subnetworks/seeds/<seed>/<language>.json`: each language's masks, in order of seed."""
        folders = sorted((self.path / "subnetworks" / "seeds").glob("*/"), key=_by_name)
        of_seed = [self._masks_in(folder) for folder in folders]
        names = self._ordered(dict.fromkeys([name for masks in of_seed for name in masks], 0))
        return {
            name: [np.array(masks[name]["mask"]) for masks in of_seed if name in masks]
            for name in names
        }

    def _masks_in(self, folder: Path) -> dict[str, dict[str, Any]]:
        found = [_read_if_there(path, {}) for path in folder.glob("*.json")]
        return {entry["language"]: entry for entry in found if "language" in entry}

    def view_folders(self, model: str) -> list[str]:
        """Names of the model's views that hold results."""
        found = (self.path / "influence" / model).glob("*/examples.parquet")
        return sorted((path.parent.name for path in found), key=_natural)

    def views(self, without_group: bool = False) -> list[View]:
        """Every model's views, several draws of one kind averaged per test example.

        `random` is the mean over the `random-<i>`; `other` the mean over the `other-<language>`
        whose language is not the test example's own; `union` and `intersection` the mean over the
        `<kind>-<a>+<b>` of whose two languages the test example's own is one.

        Args:
            without_group: influence without training examples of the test example's own group,
                of the views that have it.
        """
        views = []
        for model in MODELS:
            folders = self.view_folders(model)
            for name in VIEWS:
                paths = {
                    folder: self._examples_path(model, folder, without_group)
                    for folder in folders
                    if view_kind(folder) == name
                }
                draws = [folder for folder, path in paths.items() if path.is_file()]
                if draws:
                    parts = [self._aligned(paths[folder], folder) for folder in draws]
                    measures = {m: mean_of_known([part[m] for part in parts]) for m in MEASURES}
                    correct = mean_of_known([part["correct"] for part in parts])
                    if all(np.isfinite(values).any() for values in measures.values()):
                        views.append(View(model, name, draws, measures, correct))
        return views

    def _examples_path(self, model: str, folder: str, without_group: bool) -> Path:
        path = self.path / "influence" / model / folder
        return (path / WITHOUT_GROUP if without_group else path) / "examples.parquet"

    def _aligned(self, path: Path, folder: str) -> dict[str, np.ndarray]:
        """One view's examples.parquet in the run's own order of test examples and languages."""
        pivot = pivot_examples(pq.read_table(path))
        row_of = {test_id: row for row, test_id in enumerate(self.test["id"].to_pylist())}
        column_of = {language: column for column, language in enumerate(self.num_train)}
        unknown = [i for i in pivot.test_ids if i not in row_of]
        unknown += [name for name in pivot.train_languages if name not in column_of]
        if unknown:
            raise ValueError(f"{path}: {unknown[0]!r} is not in the run's data")
        rows = np.array([row_of[test_id] for test_id in pivot.test_ids], dtype=np.int64)
        columns = [column_of[language] for language in pivot.train_languages]
        kept = np.array([counts_under(folder, language) for language in pivot.test_languages])
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


def view_kind(folder: str) -> str:
    """The one of `VIEWS` that a view is a draw of: `random` of `random-0`."""
    longest_first = sorted(VIEWS, key=len, reverse=True)
    return next(
        (kind for kind in longest_first if folder == kind or folder.startswith(f"{kind}-")), folder
    )


def counts_under(folder: str, test_language: str) -> bool:
    """Whether test examples of a language are averaged in this view of its kind.

    Under another language's subnetwork: those of all other languages. Under the union or the
    intersection of two languages' subnetworks: those of the two.
    """
    kind, masked = view_kind(folder), folder.partition("-")[2]
    if kind == "other":
        return test_language != masked
    if kind in ("union", "intersection"):
        return test_language in masked.split("+")
    return True


def _by_name(path: Path) -> list[Any]:
    return _natural(path.name)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def mean_of_known(parts: list[np.ndarray]) -> np.ndarray:
    """Mean over the parts that have a value; NaN where none has."""
    stacked = np.stack(parts)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    number = known.sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _read_if_there(path: Path, default: Any) -> Any:
    return read_json(path) if path.is_file() else default
