"""Analyses a whole run folder: analysis/summary.json and the tables that the report draws.

Shape legend: Q all test examples of the run, G training languages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracmod.analysis.blocks import block_shares, block_table
from tracmod.analysis.changes import change_table, in_language_changes, named, present_comparisons
from tracmod.analysis.dynamics import in_language_course
from tracmod.analysis.language_pairs import distance_influence, read_distances, similarity_influence
from tracmod.analysis.reliance import in_language, interval_table, own_share_by_k
from tracmod.analysis.results import MODELS, RunResults, View, counts_under
from tracmod.analysis.same_group import same_group_summary
from tracmod.analysis.similarity import (
    seed_baseline,
    seed_similarity_table,
    similarity_table,
    usage_summary,
)
from tracmod.analysis.statistics import Resampling, wilson_interval
from tracmod.analysis.strongest import strongest_summary
from tracmod.files.durable import write_json, write_parquet


def analyze(
    run_dir: str | Path,
    *,
    bootstrap: int = 1000,
    permutations: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    distances: str | Path | None = None,
    distance_names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write `analysis/` of a run folder from its influence, subnetworks and metrics.

    Files: summary.json; matrices.parquet (mean and interval per model, view, test and training
    language); changes.parquet (the same for each difference of `COMPARISONS`, paired per test
    example, tested); shares_by_k.parquet (in-language share among the k strongest, for every k);
    course.parquet (in-language reliance per epoch); similarity.parquet (pairs of subnetworks);
    similarity_seeds.parquet (of masks from single seeds); pairs.parquet (similarity beside
    influence); blocks.parquet (by head and layer, of runs with `influence.blocks`). What the folder
    lacks is left out. The result depends on the folder and the arguments alone.

    Args:
        run_dir: a run folder with at least one view's `examples.parquet`.
        bootstrap: resamples of the test examples (whole parallel items).
        permutations: draws of a permutation test where not everything can be tried.
        confidence: coverage of the intervals.
        seed: of all resampling.
        distances, distance_names: a table of distances between languages to set beside influence;
            see `read_distances`.

    Returns:
        What summary.json holds.

    Raises:
        ValueError: not a run folder, no influence results in it, or no usable distances.
    """
    run = RunResults(run_dir)
    views = run.views()
    if not views:
        raise ValueError(f"{run.path}: no influence/<model>/<view>/examples.parquet to analyse")
    resampling = Resampling(bootstrap, permutations, confidence, seed)
    similarity, seeds = similarity_table(run.masks), seed_similarity_table(run.seed_masks)
    comparisons = present_comparisons(views)
    correlations, partial, pairs = similarity_influence(run, views, similarity, seeds, resampling)
    by_k = own_share_by_k(run, views, resampling)
    blocks = block_table(run)
    summary = {
        "settings": resampling.__dict__,
        "k": run.ks[0] if run.ks else None,
        "asked_k": run.asked_ks[0] if run.ks else None,
        "languages": {"test": list(run.num_test), "train": list(run.num_train)},
        "num_test": run.num_test,
        "num_train": run.num_train,
        "null_share": run.null_shares,
        "in_language": _in_language(run, views, resampling),
        "changes": in_language_changes(run, comparisons, resampling),
        "same_group": same_group_summary(run, views, resampling),
        "strongest": _strongest(run),
        "similarity_influence": correlations,
        "partial_similarity_influence": partial,
        "distance_influence": _distances(run, views, distances, distance_names, resampling),
        "seed_baseline": seed_baseline(seeds) if seeds is not None else None,
        "accuracy": _accuracy(run, views, confidence),
        "subnetworks": _subnetworks(run),
        "heads": usage_summary(run.masks) if run.masks else None,
        "blocks": block_shares(blocks) if blocks else [],
    }
    tables = {
        "matrices": pa.concat_tables([_view_rows(run, view, resampling) for view in views]),
        "changes": change_table(run, comparisons, resampling),
        "shares_by_k": pa.Table.from_pylist(by_k) if by_k else None,
        "course": _course(run),
        "similarity": similarity if similarity.num_rows else None,
        "similarity_seeds": seeds,
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
                sides = strongest_summary(_main_k(run, pq.read_table(path)), train, test)
                found += [{"model": model, "view": view, **side} for side in sides]
    return found


def _main_k(run: RunResults, top: pa.Table) -> pa.Table:
    """The ranks that every table but shares_by_k is of."""
    return top.filter(pc.less_equal(top["rank"], run.ks[0])) if run.ks else top


def _in_language(
    run: RunResults, views: Sequence[View], resampling: Resampling
) -> list[dict[str, Any]]:
    """Without views in which no test language has training data of its own."""
    entries = [
        {"model": view.model, "view": view.name, "draws": view.draws}
        | in_language(run, view.measures, resampling)
        for view in views
    ]
    return [entry for entry in entries if "num_test" in entry]


def _distances(
    run: RunResults,
    views: Sequence[View],
    path: str | Path | None,
    names: Mapping[str, str] | None,
    resampling: Resampling,
) -> list[dict[str, Any]]:
    if path is None:
        return []
    languages = [name for name in run.num_train if name in run.num_test]
    return distance_influence(run, views, read_distances(path, languages, names), resampling)


def _view_rows(run: RunResults, view: View, resampling: Resampling) -> pa.Table:
    table = interval_table(run, view.measures, resampling)
    table = named(table, {"model": view.model, "view": view.name})
    null = run.null_shares
    shares = [null[language] for language in table["train_language"].to_pylist()]
    return table.append_column("null_share", pa.array(shares, pa.float64()))


def _course(run: RunResults) -> pa.Table | None:
    """In-language course of every model and view; draws stay apart, under their own names."""
    tables = []
    for model in MODELS:
        for view in run.view_folders(model):
            path = run.path / "influence" / model / view / "epochs.parquet"
            if path.is_file():
                table = in_language_course(pq.read_table(path))
                counted = [counts_under(view, name) for name in table["test_language"].to_pylist()]
                table = table.filter(pa.array(counted, pa.bool_()))
                nulls = [run.null_shares.get(name) for name in table["test_language"].to_pylist()]
                table = table.append_column("null_share", pa.array(nulls, pa.float64()))
                tables.append(named(table, {"model": model, "view": view}))
    return pa.concat_tables(tables) if tables else None


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
