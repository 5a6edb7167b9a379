"""Reads the tables of results in a run folder, for figures and tables."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from tracmod.analysis import RunResults
from tracmod.files.durable import read_json
from tracmod.report.wording import labels as words


class AnalysisTables:
    """The results that figures and tables are built from; each table is read when it is needed."""

    def __init__(self, run_dir: str | Path) -> None:
        """Open a run folder.

        Raises:
            ValueError: `run_dir` is not a run folder, or has not been analyzed.
        """
        self.run = RunResults(run_dir)
        self.folder = self.run.path / "analysis"
        if not (self.folder / "summary.json").is_file():
            raise ValueError(
                f"{self.run.path}: no analysis/summary.json; run `tracmod analyze` first"
            )

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of analysis/summary.json."""
        return read_json(self.folder / "summary.json")

    @cached_property
    def unit(self) -> str:
        """Unit of influence."""
        return words.influence_unit(self.run.section("influence"))

    @cached_property
    def retraining_summary(self) -> dict[str, Any] | None:
        """The content of retraining/summary.json; None if the run's config has no `retrain`."""
        folder = self._retraining
        return read_json(folder / "summary.json") if folder else None

    @cached_property
    def certificates(self) -> dict[str, dict[str, Any]]:
        """Fidelity certificates by model, from analysis/fidelity.json; {} if there are none."""
        path = self.folder / "fidelity.json"
        return read_json(path) if path.is_file() else {}

    def table(self, name: str) -> pd.DataFrame:
        """Return `analysis/<name>.parquet`; an empty table if there is no such file."""
        return _read(self.folder / f"{name}.parquet")

    def retraining_table(self, name: str) -> pd.DataFrame:
        """Return `retraining/<name>.parquet`; empty if missing or no longer configured."""
        folder = self._retraining
        return _read(folder / f"{name}.parquet") if folder else pd.DataFrame()

    def scaling(self, values: pd.Series) -> tuple[float, str]:
        """Return a factor that makes influences readable, and their unit after it."""
        exponent = words.power_of_ten(float(values.abs().max()) if len(values) else 0.0)
        return 10.0**-exponent, f"10{words.superscript(exponent)} {self.unit}"

    @cached_property
    def metagradient_summary(self) -> dict[str, Any] | None:
        """The content of metagradient/summary.json; None if it is not configured."""
        folder = self._metagradient
        return read_json(folder / "summary.json") if folder else None

    def metagradient_table(self, name: str) -> pd.DataFrame:
        """Return `metagradient/<name>.parquet`; empty if missing or no longer configured."""
        folder = self._metagradient
        return _read(folder / f"{name}.parquet") if folder else pd.DataFrame()

    @cached_property
    def metagradient_languages(self) -> pd.DataFrame:
        """The sums of the metagradient by test and training language; empty without them."""
        return self._of_test_languages("languages").rename(columns={"influence": "foretold"})

    @cached_property
    def metagradient_paths(self) -> pd.DataFrame:
        """The changes without a language by paths of weights; empty without `path_points`."""
        return self._of_test_languages("left_out").rename(columns={"change": "foretold"})

    def _of_test_languages(self, name: str) -> pd.DataFrame:
        """Return a table of the metagradient without the quantities that are single examples."""
        rows = self.metagradient_table(name)
        if not len(rows):
            return rows
        rows = rows[rows["quantity"].isin(self.run.section("task").get("languages", []))]
        return rows.rename(columns={"quantity": "test_language"})

    @property
    def _metagradient(self) -> Path | None:
        return self.run.path / "metagradient" if self.run.section("metagradient") else None

    @property
    def _retraining(self) -> Path | None:
        # A config without `retrain` leaves the files of an earlier retraining where they are.
        return self.run.path / "retraining" if self.run.section("retrain") else None


def _read(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame()
