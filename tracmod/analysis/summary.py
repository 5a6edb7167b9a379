"""Analysis of a whole run: analysis/summary.json and the tables that the report draws.

`analyze` computes each part with the module of its subject, and writes all of them at the end, so
that an error in one part leaves the files of the last analysis untouched.

Shape suffixes: Q all test examples of the run, G training languages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracmod.analysis.blocks import block_shares, block_table
from tracmod.analysis.changes import (
    change_table,
    in_language_changes,
    present_comparisons,
    with_names,
)
from tracmod.analysis.dynamics import in_language_course
from tracmod.analysis.language_pairs import distance_influence, read_distances, similarity_influence
from tracmod.analysis.reliance import in_language, interval_table, own_share_by_k
from tracmod.analysis.results import MODELS, UNTRAINED, RunResults, ViewResults, counts_under
from tracmod.analysis.same_group import same_group_summary
from tracmod.analysis.similarity import (
    seed_baseline,
    seed_similarity_table,
    seed_test,
    similarity_table,
    usage_summary,
)
from tracmod.analysis.statistics import Resampling, bootstrap_f1, wilson_interval
from tracmod.analysis.strongest import strongest_summary
from tracmod.files.durable import write_json, write_parquet
from tracmod.tasks.tag_scores import UNTAGGED, are_entities, score_name


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

    summary.json holds the numbers that the report states. The tables are, each with intervals:

        matrices.parquet          mean per model, view, test language and training language
        changes.parquet           difference of the pairs in `COMPARISONS`, paired per test
                                  example and tested
        shares_by_k.parquet       in-language share among the k strongest, for every k
        course.parquet            in-language reliance per epoch
        similarity.parquet        pairs of subnetworks
        similarity_seeds.parquet  pairs of masks from single seeds
        pairs.parquet             similarity beside influence, by pair of languages
        blocks.parquet            influence by head and layer, in runs with `influence.blocks`

    Tables whose data the folder lacks are not written. The result depends only on the folder and
    the arguments.

    Args:
        run_dir: a run folder with `examples.parquet` of at least one view.
        bootstrap: resamples of the test examples (whole parallel items).
        permutations: draws of a permutation test that cannot be enumerated.
        confidence: coverage of the intervals.
        seed: seed of all resampling.
        distances, distance_names: a table of distances between languages to compare with
            influence; see `read_distances`.

    Returns:
        The content of summary.json.

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
        "asked_k": run.configured_ks[0] if run.ks else None,
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
        "seed_baseline": _seed_baseline(run, seeds, resampling),
        "accuracy": _scores(run, views, resampling, confidence),
        "subnetworks": _subnetworks(run),
        "heads": usage_summary(run.masks) if run.masks else None,
        "blocks": block_shares(blocks) if blocks else [],
    }
    tables = {
        "matrices": pa.concat_tables([_view_matrix(run, view, resampling) for view in views]),
        "changes": change_table(run, comparisons, resampling),
        "shares_by_k": pa.Table.from_pylist(by_k) if by_k else None,
        "course": _course(run),
        "similarity": similarity if similarity.num_rows else None,
        "similarity_seeds": seeds,
        "pairs": pairs,
        "blocks": blocks,
    }
    folder, summary = run.path / "analysis", _as_json(summary)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        if table is None:  # it may be there from an analysis of other results
            path.unlink(missing_ok=True)
        else:
            write_parquet(path, table)
    write_json(folder / "summary.json", summary)
    return summary


def _as_json(value: Any) -> Any:
    """Return a tree with JSON's own types only; NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _in_language(
    run: RunResults, views: Sequence[ViewResults], resampling: Resampling
) -> list[dict[str, Any]]:
    """Return the in-language means of every view that has a test language with training data."""
    entries = [
        {"model": view.model, "view": view.name, "draws": view.draws}
        | in_language(run, view.measures, resampling)
        for view in views
    ]
    return [entry for entry in entries if "num_test" in entry]


def _seed_baseline(
    run: RunResults, seeds: pa.Table | None, resampling: Resampling
) -> dict[str, Any] | None:
    if seeds is None:
        return None
    test = seed_test(run.seed_masks, resampling.permutations, resampling.seed)
    return {**seed_baseline(seeds), "test": test}


def _strongest(run: RunResults) -> list[dict[str, Any]]:
    """Return `strongest_summary` of every view folder, for the main k of the run."""
    train, test = run.examples("train"), run.examples("test")
    entries = []
    for model in MODELS:
        for view in run.view_folders(model):
            path = run.path / "influence" / model / view / "top.parquet"
            if path.is_file():
                top = pq.read_table(path)
                if run.ks:  # it lists as many ranks as the largest k
                    top = top.filter(pc.less_equal(top["rank"], run.ks[0]))
                sides = strongest_summary(top, train, test)
                entries += [{"model": model, "view": view, **side} for side in sides]
    return entries


def _distances(
    run: RunResults,
    views: Sequence[ViewResults],
    path: str | Path | None,
    names: Mapping[str, str] | None,
    resampling: Resampling,
) -> list[dict[str, Any]]:
    """Return the tests of a table of distances, for languages with training and test data."""
    if path is None:
        return []
    languages = [name for name in run.num_train if name in run.num_test]
    return distance_influence(run, views, read_distances(path, languages, names), resampling)


def _view_matrix(run: RunResults, view: ViewResults, resampling: Resampling) -> pa.Table:
    """Return the rows of matrices.parquet for one view."""
    table = interval_table(run, view.measures, resampling)
    table = with_names(table, {"model": view.model, "view": view.name})
    shares = [run.null_shares[language] for language in table["train_language"].to_pylist()]
    return table.append_column("null_share", pa.array(shares, pa.float64()))


def _course(run: RunResults) -> pa.Table | None:
    """Return the in-language course of every model and view folder, draws under their own names.

    Both fine-tunings begin with the control, so its epoch 0 is the first of their courses.
    """
    tables = []
    for model in MODELS:
        for view in run.view_folders(model) if model != UNTRAINED else []:
            for source in (UNTRAINED, model):
                path = run.path / "influence" / source / view / "epochs.parquet"
                if not path.is_file():
                    continue
                table = in_language_course(pq.read_table(path))
                counted = [counts_under(view, name) for name in table["test_language"].to_pylist()]
                table = table.filter(pa.array(counted, pa.bool_()))
                nulls = [run.null_shares.get(name) for name in table["test_language"].to_pylist()]
                table = table.append_column("null_share", pa.array(nulls, pa.float64()))
                tables.append(with_names(table, {"model": model, "view": view}))
    return pa.concat_tables(tables) if tables else None


def _accuracy(run: RunResults, views: Sequence[ViewResults], confidence: float) -> dict[str, Any]:
    """Return accuracy per language: after each epoch and under the masks of each view.

    `chance` and `majority`, the share of a language's most frequent label, are there to compare.
    """
    labels = np.array(run.test["label"].to_pylist())
    languages = np.array(run.test["language"].to_pylist())
    majority = {
        name: float(np.bincount(labels[languages == name]).max() / np.sum(languages == name))
        for name in run.num_test
    }
    of_views = []
    for view in views:
        known = np.isfinite(view.correct)
        per_language = {}
        for name in run.num_test:
            correct = view.correct[known & (languages == name)]
            if len(correct):
                share = float(correct.mean())
                low, high = wilson_interval(share, len(correct), confidence)
                per_language[name] = {"value": share, "low": low, "high": high}
        if per_language:
            of_views.append({"model": view.model, "view": view.name, "languages": per_language})
    return {
        "chance": 1 / len(run.label_names),
        "majority": majority,
        "epochs": {model: run.metrics(model) for model in MODELS if run.metrics(model)},
        "views": of_views,
    }


def _scores(
    run: RunResults, views: Sequence[ViewResults], resampling: Resampling, confidence: float
) -> dict[str, Any]:
    """Return the score of the predictions per language: accuracy, or F1."""
    if run.of_questions:
        no_answer = dict.fromkeys(run.num_test, 0.0)
        own = _counted_scores(run, views, run.answer_scores, resampling)
        return {"score": "F1", "of": "answers", "chance": 0.0, "majority": no_answer} | own
    if run.tag_names is None:
        return _accuracy(run, views, confidence)
    return _tag_scores(run, views, run.tag_names, resampling)


def _tag_scores(
    run: RunResults, views: Sequence[ViewResults], names: Sequence[str], resampling: Resampling
) -> dict[str, Any]:
    """Return what `_accuracy` does for a task of tokens: the F1 of entities, or tags' accuracy.

    Intervals are of resampled test sentences (whole parallel items). Without entities, `chance` and
    `majority` are those of words; for F1 they are 0, the score of a model that finds no entity.
    """
    test = run.examples("test")
    majority = dict.fromkeys(run.num_test, 0.0)
    if not are_entities(names):
        for name in run.num_test:
            own = test.filter(pc.equal(test["language"], name))["tags"].to_pylist()
            tags = [tag for sentence in own for tag in sentence if tag != UNTAGGED]
            majority[name] = float(np.bincount(tags).max() / len(tags))
    return {
        "score": score_name(names),
        "of": "entities" if are_entities(names) else "words",
        "chance": 0.0 if are_entities(names) else 1 / len(names),
        "majority": majority,
        **_counted_scores(run, views, lambda view: run.tag_counts(view, names), resampling),
    }


def _counted_scores(
    run: RunResults,
    views: Sequence[ViewResults],
    counts_of: Callable[[ViewResults], np.ndarray],
    resampling: Resampling,
) -> dict[str, Any]:
    """Return F1 per language, after each epoch and under the masks of each view.

    Args:
        run: the results.
        views: the views.
        counts_of: returns the (Q, 3) counts of a view (`bootstrap_f1`).
        resampling: intervals are of resampled test examples (whole parallel items).
    """
    languages, of_views = np.array(run.test["language"].to_pylist()), []
    for view in views:
        counts_Q3 = counts_of(view)
        known = np.array([any(counts_under(folder, name) for folder in view.folders)
                          for name in languages])  # fmt: skip
        per_language = {}
        for name in run.num_test:
            rows = known & (languages == name)
            if rows.any():
                value, low, high = bootstrap_f1(counts_Q3[rows], run.clusters[rows], resampling)
                per_language[name] = {"value": value, "low": low, "high": high}
        if per_language:
            of_views.append({"model": view.model, "view": view.name, "languages": per_language})
    return {
        "epochs": {model: run.metrics(model) for model in MODELS if run.metrics(model)},
        "views": of_views,
    }


def _subnetworks(run: RunResults) -> dict[str, dict[str, Any]]:
    """Return size and score of each language's subnetwork."""
    return {
        language: {
            "kept": int(run.masks[language].sum()),
            "heads": int(run.masks[language].size),
            **{key: entry.get(key) for key in ("score", "full_score", "threshold")},
        }
        for language, entry in run.subnetworks.items()
    }
