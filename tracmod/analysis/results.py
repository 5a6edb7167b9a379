"""Reader of a run folder: its record, examples, subnetworks, metrics and views.

Shape suffixes: Q all test examples of the run, G training languages.
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
from tracmod.tasks.tag_scores import count_tags

# The run's models, and the model before fine-tuning, a control that some runs have.
UNTRAINED = "untrained"
MODELS = (*get_args(ModelName), UNTRAINED)
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
# Subfolder of a view with the same tables, computed without the training examples of the test
# example's own parallel group.
WITHOUT_GROUP = "without-group"
# In the folder of a view, for a task of tokens: the predicted tags of the test sentences.
PREDICTED_TAGS = "tags.parquet"
# The same for a task of questions: the predicted answers, and the F1 of their tokens.
PREDICTED_ANSWERS = "answers.parquet"


@dataclass(frozen=True)
class ViewResults:
    """Influence under one kind of head mask, in the order of `data/test.parquet`.

    Attributes:
        model: one of `MODELS`.
        name: one of `VIEWS`.
        folders: names of the view folders that were averaged, one per draw.
        measures: name -> (Q, G) float64; NaN for test examples that the view does not have.
        correct: (Q,) float64, 1 for a correct prediction (mean over draws); NaN where unknown.
    """

    model: str
    name: str
    folders: list[str]
    measures: dict[str, np.ndarray]
    correct: np.ndarray

    @property
    def draws(self) -> int:
        """Number of masks that were averaged (several for `random`, `other`, `union`, ...)."""
        return len(self.folders)


class RunResults:
    """The content of a run folder; each part is read at its first use.

    Attributes:
        path: the folder.
        settings: content of run.json (configuration, stages, names of labels); {} without it.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a run folder.

        Raises:
            ValueError: data/train.parquet or data/test.parquet is missing.
        """
        self.path = Path(path)
        for name in ("train", "test"):
            if not (self.path / "data" / f"{name}.parquet").is_file():
                raise ValueError(f"{self.path}: not a run folder: data/{name}.parquet is missing")
        self.settings: dict[str, Any] = _read_if_there(self.path / "run.json", {})

    def examples(self, split: str) -> pa.Table:
        """Read `data/<split>.parquet` with id, language, text_a, text_b, label and group."""
        return pq.read_table(self.path / "data" / f"{split}.parquet")

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the resolved configuration; {} if it is not recorded."""
        return self.settings.get("config", {}).get(name) or {}

    @property
    def configured_ks(self) -> list[int]:
        """`influence.k` of the configuration as a list, main number first; [] if not recorded."""
        k = self.section("influence").get("k") or []
        return k if isinstance(k, list) else [k]

    @property
    def ks(self) -> list[int]:
        """Numbers of strongest training examples that shares are counted over, main number first.

        Numbers above the number of training examples are lowered to it.
        """
        total = sum(self.num_train.values())
        return list(dict.fromkeys(min(k, total) for k in self.configured_ks))

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
        """Share of each training language among the training examples."""
        total = sum(self.num_train.values())
        return {language: size / total for language, size in self.num_train.items()}

    @cached_property
    def own_columns(self) -> np.ndarray:
        """(Q,) column of each test example's language among the G training languages, or -1."""
        column_of = {language: column for column, language in enumerate(self.num_train)}
        return np.array([column_of.get(name, -1) for name in self.test["language"].to_pylist()])

    @cached_property
    def clusters(self) -> np.ndarray:
        """(Q,) parallel item of each test example; its own id if it has none."""
        pairs = zip(self.test["group"].to_pylist(), self.test["id"].to_pylist(), strict=True)
        return np.array([group or f"example {test_id}" for group, test_id in pairs])

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the labels 0, 1, ...; their numbers if run.json has no names."""
        highest = max(self.test["label"].to_pylist(), default=0)
        return self.settings.get("label_names") or [str(label) for label in range(highest + 1)]

    @property
    def tag_names(self) -> list[str] | None:
        """Names of the tags of words, for a task of tokens; None for other tasks."""
        names: list[str] | None = self.settings.get("tag_names")
        return names

    @property
    def of_questions(self) -> bool:
        """Whether questions are answered."""
        return "answer" in self.examples("test").column_names

    def answer_scores(self, view: ViewResults) -> np.ndarray:
        """Return the F1 of each test question's answer under a view, as counts (Q, 3).

        They are those of `bootstrap_f1` for a mean over questions: F1, 1 and 1, summed over the
        draws of the view under which a question counts.
        """
        total = np.zeros((len(self.test), 3))
        languages = self.test["language"].to_pylist()
        for folder in view.folders:
            path = self.path / "influence" / view.model / folder / PREDICTED_ANSWERS
            scores = pq.read_table(path, columns=["f1"])[0].to_numpy()
            for row, language in enumerate(languages):
                if counts_under(folder, language):
                    total[row] += (scores[row], 1, 1)
        return total

    def tag_counts(self, view: ViewResults, names: Sequence[str]) -> np.ndarray:
        """Return what is right, predicted and true in each test sentence under a view, (Q, 3).

        They are the sums over the draws of the view under which a sentence counts.

        Args:
            view: the view.
            names: the names of the tags.
        """
        test = self.examples("test")
        total = np.zeros((len(test), 3), dtype=np.int64)
        true, languages = test["tags"].to_pylist(), test["language"].to_pylist()
        for folder in view.folders:
            path = self.path / "influence" / view.model / folder / PREDICTED_TAGS
            predicted = pq.read_table(path, columns=["tags"])[0].to_pylist()
            for row, language in enumerate(languages):
                if counts_under(folder, language):
                    total[row] += count_tags(predicted[row], true[row], names)
        return total

    def metrics(self, model: str) -> list[dict[str, Any]]:
        """Read `models/<model>/metrics.json`, one entry per epoch; [] without the model."""
        entries = _read_if_there(self.path / "models" / model / "metrics.json", [])
        return sorted(entries, key=lambda entry: entry["epoch"])

    @cached_property
    def subnetworks(self) -> dict[str, dict[str, Any]]:
        """Content of `subnetworks/<language>.json` by language."""
        by_language = self._masks_in(self.path / "subnetworks")
        return {name: by_language[name] for name in self._ordered(dict.fromkeys(by_language, 0))}

    @cached_property
    def masks(self) -> dict[str, np.ndarray]:
        """Head mask of each language, (L, H) int."""
        return {name: np.array(entry["mask"]) for name, entry in self.subnetworks.items()}

    @cached_property
    def seed_masks(self) -> dict[str, list[np.ndarray]]:
        """Masks of each language in `subnetworks/seeds/<seed>/<language>.json`, by seed."""
        folders = (self.path / "subnetworks" / "seeds").glob("*/")
        seeds = [self._masks_in(path) for path in sorted(folders, key=lambda p: _natural(p.name))]
        names = self._ordered(dict.fromkeys([name for masks in seeds for name in masks], 0))
        return {
            name: [np.array(masks[name]["mask"]) for masks in seeds if name in masks]
            for name in names
        }

    def _masks_in(self, folder: Path) -> dict[str, dict[str, Any]]:
        entries = [read_json(path) for path in folder.glob("*.json")]
        return {entry["language"]: entry for entry in entries if "language" in entry}

    def view_folders(self, model: str) -> list[str]:
        """Return the names of the model's view folders that hold results."""
        tables = (self.path / "influence" / model).glob("*/examples.parquet")
        return sorted((path.parent.name for path in tables), key=_natural)

    def views(self, without_group: bool = False) -> list[ViewResults]:
        """Read the views of both models, averaging the draws of one kind per test example.

        `random` is the mean over all `random-<i>`; `other` is the mean over the
        `other-<language>` whose language is not that of the test example; `union` and
        `intersection` are the means over the `<kind>-<a>+<b>` that include its language.

        Args:
            without_group: whether to read the influence without training examples of the test
                example's own group, for the views that have it.
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
                    measures = {
                        measure: mean_of_known([part[measure] for part in parts])
                        for measure in MEASURES
                    }
                    correct = mean_of_known([part["correct"] for part in parts])
                    if all(np.isfinite(values).any() for values in measures.values()):
                        views.append(ViewResults(model, name, draws, measures, correct))
        return views

    def _examples_path(self, model: str, folder: str, without_group: bool) -> Path:
        path = self.path / "influence" / model / folder
        return (path / WITHOUT_GROUP if without_group else path) / "examples.parquet"

    def _aligned(self, path: Path, folder: str) -> dict[str, np.ndarray]:
        """Read an examples.parquet into the run's order of test examples and languages.

        Test examples that do not count in this view folder are NaN; see `counts_under`.

        Raises:
            ValueError: a test example or training language is not in the run's data.
        """
        pivot = pivot_examples(pq.read_table(path))
        row_of = {test_id: row for row, test_id in enumerate(self.test["id"].to_pylist())}
        column_of = {language: column for column, language in enumerate(self.num_train)}
        unknown = [i for i in pivot.test_ids if i not in row_of]
        unknown += [name for name in pivot.train_languages if name not in column_of]
        if unknown:
            raise ValueError(f"{path}: {unknown[0]!r} is not in the run's data")
        rows = np.array([row_of[test_id] for test_id in pivot.test_ids], dtype=np.int64)
        columns = [column_of[language] for language in pivot.train_languages]
        counted = np.array([counts_under(folder, language) for language in pivot.test_languages])
        aligned: dict[str, np.ndarray] = {}
        for measure in MEASURES:
            values = np.full((len(row_of), len(column_of)), np.nan)
            values[np.ix_(rows[counted], columns)] = pivot.measures[measure][counted]
            aligned[measure] = values
        aligned["correct"] = np.full(len(row_of), np.nan)
        correct = [
            np.nan if prediction is None else float(label == prediction)
            for label, prediction in zip(pivot.labels, pivot.predictions, strict=True)
        ]
        aligned["correct"][rows[counted]] = np.array(correct)[counted]
        return aligned

    def _ordered(self, counts: dict[str, int]) -> dict[str, int]:
        """Order languages as in the configuration, others behind them by name."""
        configured: Sequence[str] = self.section("task").get("languages", [])
        order = [language for language in configured if language in counts]
        order += sorted(language for language in counts if language not in configured)
        return {language: counts[language] for language in order}


def view_kind(folder: str) -> str:
    """Return the kind of view that a view folder is a draw of: `random` for `random-0`."""
    longest_first = sorted(VIEWS, key=len, reverse=True)
    return next(
        (kind for kind in longest_first if folder == kind or folder.startswith(f"{kind}-")), folder
    )


def counts_under(folder: str, test_language: str) -> bool:
    """Return whether test examples of a language count in a view folder.

    Under another language's subnetwork, examples of all other languages count; under the union or
    intersection of two languages' subnetworks, examples of these two.
    """
    kind, masked = view_kind(folder), folder.partition("-")[2]
    if kind == "other":
        return test_language != masked
    if kind in ("union", "intersection"):
        return test_language in masked.split("+")
    return True


def _natural(name: str) -> list[Any]:
    """Return a sort key that puts `random-10` behind `random-9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def mean_of_known(parts: list[np.ndarray]) -> np.ndarray:
    """Compute the mean over the parts that are finite; NaN where none is."""
    stacked = np.stack(parts)
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    number = known.sum(axis=0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _read_if_there(path: Path, default: Any) -> Any:
    return read_json(path) if path.is_file() else default
