"""Analyses a whole run folder: analysis/summary.json and the tables that the report draws.

Shape legend: Q all test examples of the run, G training languages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import false_discovery_control

from tracmod.analysis.blocks import block_shares, block_table
from tracmod.analysis.dynamics import in_language_course
from tracmod.analysis.languages import MEASURES, interval_columns
from tracmod.analysis.results import MODELS, RunResults, View
from tracmod.analysis.similarity import similarity_matrix, similarity_table, usage_summary
from tracmod.analysis.statistics import bootstrap_mean, mantel, wilson_interval
from tracmod.analysis.strongest import strongest_summary
from tracmod.durable import write_json, write_parquet

# (model, view) against (base model, base view): what each question of the study compares.
COMPARISONS = (
    ("full", "subnetwork", "full", "full"),
    ("full", "subnetwork", "full", "random"),
    ("full", "subnetwork", "full", "other"),
    ("sparse", "subnetwork", "sparse", "full"),
    ("sparse", "subnetwork", "sparse", "random"),
    ("sparse", "subnetwork", "sparse", "other"),
    ("sparse", "full", "full", "full"),
    ("sparse", "subnetwork", "full", "subnetwork"),
    ("sparse", "random", "full", "random"),
    ("sparse", "other", "full", "other"),
    ("sparse", "subnetwork", "full", "full"),
)
MANTEL_VIEWS = ("full", "subnetwork", "random")
MANTEL_MEASURES = ("share_positive", "mean_influence")


@dataclass(frozen=True)
class _Settings:
    bootstrap: int
    permutations: int
    confidence: float
    seed: int


def analyze(
    run_dir: str | Path,
    *,
    bootstrap: int = 1000,
    permutations: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Write `analysis/` of a run folder from its influence, subnetworks and metrics.

    Files: summary.json; matrices.parquet (mean and interval per model, view, test and training
    language); changes.parquet (the same for each difference of `COMPARISONS`, paired per test
    example); course.parquet (in-language reliance per epoch); similarity.parquet (pairs of
    subnetworks); pairs.parquet (similarity beside influence); blocks.parquet (by head and layer, of
    runs with `influence.blocks`). Models, views and subnetworks that are not there are left out.
    The result depends on the folder and the arguments alone.

    Args:
        run_dir: a run folder with at least one view's `examples.parquet`.
        bootstrap: resamples of the test examples (whole parallel items).
        permutations: draws of the Mantel test where not every order can be tried.
        confidence: coverage of the intervals.
        seed: of all resampling.

    Returns:
        What summary.json holds.

    Raises:
        ValueError: not a run folder, or no influence results in it.
    """
    run = RunResults(run_dir)
    views = run.views()
    if not views:
        raise ValueError(f"{run.path}: no influence/<model>/<view>/examples.parquet to analyse")
    settings = _Settings(bootstrap, permutations, confidence, seed)
    similarity = similarity_table(run.masks)
    matrices = [_view_rows(run, view, settings) for view in views]
    comparisons = _present_comparisons(views)
    changes = [_change_rows(run, a, b, settings) for a, b in comparisons]
    blocks = block_table(run)
    correlations, pairs = _similarity_influence(run, views, similarity, settings)
    summary = {
        "settings": settings.__dict__,
        "k": run.section("influence").get("k"),
        "languages": {"test": list(run.num_test), "train": list(run.num_train)},
        "num_test": run.num_test,
        "num_train": run.num_train,
        "null_share": _null_shares(run),
        "in_language": _known([_in_language(run, v, v.measures, settings) for v in views]),
        "changes": _known([_change(run, a, b, settings) for a, b in comparisons]),
        "strongest": _strongest(run),
        "similarity_influence": correlations,
        "accuracy": _accuracy(run, views, confidence),
        "subnetworks": _subnetworks(run),
        "heads": usage_summary(run.masks) if run.masks else None,
        "blocks": block_shares(blocks) if blocks else [],
    }
    tables = {
        "matrices": pa.concat_tables(matrices),
        "changes": pa.concat_tables(changes) if changes else None,
        "course": _course(run),
        "similarity": similarity if similarity.num_rows else None,
        "pairs": pairs,
        "blocks": blocks,
    }
    return _write(run.path / "analysis", _plain(summary), tables)


def _write(folder: Path, summary: Any, tables: dict[str, pa.Table | None]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        if table is None:
            path.unlink(missing_ok=True)
        else:
            write_parquet(path, table)
    write_json(folder / "summary.json", summary)
    return summary


def _plain(value: Any) -> Any:
    """JSON's own types; NaN becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _strongest(run: RunResults) -> list[dict[str, Any]]:
    train, test = run.examples("train"), run.examples("test")
    found = []
    for model in MODELS:
        for view in run.view_folders(model):
            path = run.path / "influence" / model / view / "top.parquet"
            if path.is_file():
                sides = strongest_summary(pq.read_table(path), train, test)
                found += [{"model": model, "view": view, **side} for side in sides]
    return found


def _null_shares(run: RunResults) -> dict[str, float]:
    total = sum(run.num_train.values())
    return {language: size / total for language, size in run.num_train.items()}


def _present_comparisons(views: Sequence[View]) -> list[tuple[View, View]]:
    found = {(view.model, view.name): view for view in views}
    return [
        (found[a, b], found[c, d]) for a, b, c, d in COMPARISONS if {(a, b), (c, d)} <= set(found)
    ]


def _interval_table(
    run: RunResults, measures: dict[str, np.ndarray], settings: _Settings
) -> pa.Table:
    known_Q = np.all([np.isfinite(values).all(axis=1) for values in measures.values()], axis=0)
    languages = np.array(run.test["language"].to_pylist())[known_Q]
    columns = interval_columns(
        {name: values[known_Q] for name, values in measures.items()},
        languages.tolist(),
        list(run.num_train),
        run.clusters[known_Q].tolist(),
        bootstrap=settings.bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    return pa.table(columns)


def _named(table: pa.Table, names: dict[str, str]) -> pa.Table:
    for position, (name, value) in enumerate(names.items()):
        column = pa.array([value] * table.num_rows, pa.string())
        table = table.add_column(position, name, column)
    return table


def _view_rows(run: RunResults, view: View, settings: _Settings) -> pa.Table:
    table = _named(
        _interval_table(run, view.measures, settings), {"model": view.model, "view": view.name}
    )
    null = _null_shares(run)
    shares = [null[language] for language in table["train_language"].to_pylist()]
    return table.append_column("null_share", pa.array(shares, pa.float64()))


def _difference(view: View, base: View) -> dict[str, np.ndarray]:
    return {name: view.measures[name] - base.measures[name] for name in MEASURES}


def _change_rows(run: RunResults, view: View, base: View, settings: _Settings) -> pa.Table:
    names = {
        "model": view.model,
        "view": view.name,
        "base_model": base.model,
        "base_view": base.name,
    }
    return _named(_interval_table(run, _difference(view, base), settings), names)


def _change(run: RunResults, view: View, base: View, settings: _Settings) -> dict[str, Any]:
    entry = _in_language(run, view, _difference(view, base), settings)
    del entry["draws"]
    return {**entry, "base_model": base.model, "base_view": base.name}


def _in_language(
    run: RunResults, view: View, measures: dict[str, np.ndarray], settings: _Settings
) -> dict[str, Any]:
    """Mean over test examples of each measure's value for the example's own language."""
    column_of = {language: column for column, language in enumerate(run.num_train)}
    columns = np.array([column_of.get(name, -1) for name in run.test["language"].to_pylist()])
    entry: dict[str, Any] = {"model": view.model, "view": view.name, "draws": view.draws}
    for name, values in measures.items():
        own = np.where(columns >= 0, values[np.arange(len(columns)), columns], np.nan)
        known = np.isfinite(own)
        if not known.any():
            continue
        interval = bootstrap_mean(
            own[known],
            run.clusters[known],
            resamples=settings.bootstrap,
            confidence=settings.confidence,
            seed=settings.seed,
        )
        entry[name] = {"value": interval.value, "low": interval.low, "high": interval.high}
        entry["num_test"] = int(known.sum())
        nulls = np.array(list(_null_shares(run).values()))
        entry["null_share"] = float(nulls[columns[known]].mean())
    return entry


def _known(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without views in which no test language has training data of its own."""
    return [entry for entry in entries if "num_test" in entry]


def _course(run: RunResults) -> pa.Table | None:
    """In-language course of every model and view; draws stay apart, under their own names."""
    tables = []
    for model in MODELS:
        for view in run.view_folders(model):
            path = run.path / "influence" / model / view / "epochs.parquet"
            if path.is_file():
                table = in_language_course(pq.read_table(path))
                tables.append(_named(table, {"model": model, "view": view}))
    return pa.concat_tables(tables) if tables else None


def _similarity_influence(
    run: RunResults, views: Sequence[View], similarity: pa.Table, settings: _Settings
) -> tuple[list[dict[str, Any]], pa.Table | None]:
    """Mantel tests of subnetwork similarity (Jaccard) against influence between two languages.

    Influence of m on l is not that of l on m: the mean of both is set against the symmetric
    similarity, and the diagonal is left out. `p_adjusted` bounds the false discovery rate over
    all tests of the run (Benjamini and Hochberg 1995).
    """
    languages = [name for name in run.masks if name in run.num_train and name in run.num_test]
    if len(languages) < 3:
        return [], None
    jaccard = similarity_matrix(similarity, languages, "jaccard")
    corrected = similarity_matrix(similarity, languages, "corrected_jaccard")
    upper = np.triu_indices(len(languages), k=1)
    results, pairs = [], []
    for view in views:
        if view.name not in MANTEL_VIEWS:
            continue
        names = {"model": view.model, "view": view.name}
        columns: dict[str, Any] = {
            "language_a": [languages[i] for i in upper[0]],
            "language_b": [languages[i] for i in upper[1]],
            "jaccard": jaccard[upper],
            "corrected_jaccard": corrected[upper],
        }
        for measure in MANTEL_MEASURES:
            matrix = _mean_matrix(run, view, measure, languages)
            symmetric = (matrix + matrix.T) / 2
            columns[measure] = symmetric[upper]
            results.append({**names, "measure": measure, **_mantel(jaccard, symmetric, settings)})
        pairs.append(_named(pa.table(columns), names))
    tested = [entry for entry in results if entry["p_value"] is not None]
    if tested:
        adjusted = false_discovery_control([entry["p_value"] for entry in tested])
        for entry, p_value in zip(tested, adjusted, strict=True):
            entry["p_adjusted"] = float(p_value)
    return results, pa.concat_tables(pairs) if pairs else None


def _mantel(a: np.ndarray, b: np.ndarray, settings: _Settings) -> dict[str, Any]:
    try:
        result = mantel(a, b, permutations=settings.permutations, seed=settings.seed)
    except ValueError as error:
        return {"correlation": None, "p_value": None, "reason": str(error)}
    return dict(result.__dict__)


def _mean_matrix(run: RunResults, view: View, measure: str, languages: list[str]) -> np.ndarray:
    """(n, n) mean over each test language's examples; columns = training languages."""
    column_of = {language: column for column, language in enumerate(run.num_train)}
    test_languages = np.array(run.test["language"].to_pylist())
    values = view.measures[measure][:, [column_of[language] for language in languages]]
    known = np.isfinite(values).all(axis=1)
    rows = [values[known & (test_languages == name)] for name in languages]
    return np.stack([row.mean(axis=0) if len(row) else row.sum(axis=0) * np.nan for row in rows])


def _accuracy(run: RunResults, views: Sequence[View], confidence: float) -> dict[str, Any]:
    """Per language: after each epoch, and under each view's masks; chance beside it."""
    labels = np.array(run.test["label"].to_pylist())
    languages = np.array(run.test["language"].to_pylist())
    majority = {
        name: float(np.bincount(labels[languages == name]).max() / np.sum(languages == name))
        for name in run.num_test
    }
    under_views = []
    for view in views:
        known = np.isfinite(view.correct)
        per_language = {
            name: _share(view.correct[known & (languages == name)], confidence)
            for name in run.num_test
            if (known & (languages == name)).any()
        }
        if per_language:
            under_views.append({"model": view.model, "view": view.name, "languages": per_language})
    return {
        "chance": 1 / len(run.label_names),
        "majority": majority,
        "epochs": {model: run.metrics(model) for model in MODELS if run.metrics(model)},
        "views": under_views,
    }


def _share(correct: np.ndarray, confidence: float) -> dict[str, float]:
    value = float(correct.mean())
    low, high = wilson_interval(value, len(correct), confidence)
    return {"value": value, "low": low, "high": high}


def _subnetworks(run: RunResults) -> dict[str, dict[str, Any]]:
    kept_keys = ("score", "full_score", "threshold")
    return {
        language: {
            "kept": int(run.masks[language].sum()),
            "heads": int(run.masks[language].size),
            **{key: entry.get(key) for key in kept_keys},
        }
        for language, entry in run.subnetworks.items()
    }
