"""Makes small run folders with planted influence, as the pipeline would write them.

`python tests/support/make_run.py DIR [per_language_train per_language_test k]` writes a run folder
and its report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracmod.analysis import epoch_table, example_table, language_table
from tracmod.validation.lds import LDS_SCHEMA
from tracmod.validation.retraining import LEAVE_ONE_OUT_SCHEMA, RANDOM, REMOVAL_SCHEMA, SIDES

LANGUAGES = ("en", "de", "ru", "zh", "ar")
EPOCHS = (1, 2, 3)
SENTENCES = {
    "en": "the small teacher reads an old letter in the garden and the child listens",
    "de": "die junge Ärztin öffnet heute das große Fenster und der Nachbar grüßt",
    "ru": "старый учитель читает письмо под деревом пока ребёнок слушает тихо",
    "zh": "老师 在 花园 里 读 一 封 旧 信 孩子 听着",
    "ar": "المعلم يقرأ رسالة قديمة في الحديقة والطفل يستمع",
}
# How strongly a model relies on the test example's own language under a view (planted).
OWN = {
    ("full", "full"): 0.8,
    ("full", "subnetwork"): 1.1,
    ("full", "random"): 0.85,
    ("full", "other"): 0.6,
    ("sparse", "full"): 0.9,
    ("sparse", "subnetwork"): 1.5,
    ("sparse", "random"): 1.0,
    ("sparse", "other"): 0.7,
    ("full", "union"): 0.95,
    ("full", "intersection"): 1.2,
    ("sparse", "union"): 1.1,
    ("sparse", "intersection"): 1.6,
}
HOSTILE = "<script>alert('x')</script> & \"quoted\" </script><!--"


def make_run(
    path: Path,
    *,
    languages: tuple[str, ...] = LANGUAGES,
    num_train: int = 40,
    num_test: int = 12,
    k: int = 20,
    models: tuple[str, ...] = ("full", "sparse"),
    views: tuple[str, ...] = ("full", "subnetwork", "random-0"),
    seed: int = 0,
    mask_seeds: int = 0,
) -> Path:
    """Write a run folder: data, metrics, subnetworks and influence, without analysis or report."""
    rng = np.random.default_rng(seed)
    train = _examples(rng, "train", languages, num_train)
    test = _examples(rng, "test", languages, num_test)
    (path / "data").mkdir(parents=True)
    pq.write_table(train, path / "data" / "train.parquet")
    pq.write_table(test, path / "data" / "test.parquet")
    masks = _write_subnetworks(path, rng, languages)
    _write_seeds(path, masks, mask_seeds)
    affinity = _affinity(languages, masks)
    for model in models:
        _write_metrics(path, rng, model, languages)
        for view in views:
            _write_view(path, rng, model, view, train, test, affinity, k)
    _write_run_json(path, languages, num_train, num_test, k, views, seed)
    return path


def _examples(rng: np.random.Generator, split: str, languages: Any, number: int) -> pa.Table:
    rows = []
    labels = rng.integers(3, size=number).tolist()
    for language in languages:
        words = SENTENCES.get(language, SENTENCES["en"]).split()
        for item in range(number):
            text_a, text_b = (" ".join(rng.choice(words, size)) for size in (9, 5))
            if item == 0:
                text_a = f"{text_a} {HOSTILE}"
            rows.append(
                {
                    "id": f"{split}-{language}-{item}",
                    "language": language,
                    "text_a": text_a,
                    "text_b": text_b,
                    "label": labels[item],
                    "group": f"{split}-{item}",
                }
            )
    names = ("id", "language", "text_a", "text_b", "label", "group")
    types = {name: pa.int64() if name == "label" else pa.string() for name in names}
    return pa.Table.from_pylist(rows, schema=pa.schema(list(types.items())))


def _write_subnetworks(path: Path, rng: Any, languages: Any) -> dict[str, np.ndarray]:
    (path / "subnetworks").mkdir()
    masks = {}
    shared = rng.random((6, 8)) < 0.35
    for language in languages:
        mask = (shared | (rng.random((6, 8)) < 0.3)).astype(int)
        mask[5, 7] = 0
        masks[language] = mask
        entry = {
            "language": language,
            "num_layers": 6,
            "num_heads": 8,
            "mask": mask.tolist(),
            "score": 0.71,
            "full_score": 0.74,
            "threshold": 0.95,
            "seed": 0,
        }
        _write_json(path / "subnetworks" / f"{language}.json", entry)
    return masks


def _write_seeds(path: Path, masks: dict[str, np.ndarray], number: int) -> None:
    """Write masks of single seeds: the language's mask with every twelfth head flipped."""
    for seed in range(number):
        (path / "subnetworks" / "seeds" / str(seed)).mkdir(parents=True)
        for position, (language, mask) in enumerate(masks.items()):
            flip = (np.arange(48).reshape(6, 8) + 5 * seed + position) % 12 == 0
            entry = {"language": language, "num_layers": 6, "num_heads": 8, "seed": seed}
            entry |= {"mask": np.where(flip, 1 - mask, mask).tolist()}
            _write_json(path / "subnetworks" / "seeds" / str(seed) / f"{language}.json", entry)


def _affinity(languages: Any, masks: dict[str, np.ndarray]) -> np.ndarray:
    """Return the planted relation: influence between languages grows as their masks overlap."""
    n = len(languages)
    affinity = np.zeros((n, n))
    for i, a in enumerate(languages):
        for j, b in enumerate(languages):
            both, either = (masks[a] & masks[b]).sum(), (masks[a] | masks[b]).sum()
            affinity[i, j] = both / either
    np.fill_diagonal(affinity, affinity.min())
    return 0.6 * (affinity - affinity.min()) / max(1e-9, np.ptp(affinity))


def _write_metrics(path: Path, rng: Any, model: str, languages: Any) -> None:
    entries = []
    for epoch in EPOCHS:
        scores = {name: float(0.45 + 0.1 * epoch - 0.05 * rng.random()) for name in languages}
        entries.append(
            {
                "epoch": epoch,
                "step": 30 * epoch,
                "learning_rate": 2e-4 / epoch,
                "train_loss": 1.1 - 0.2 * epoch,
                "accuracy": scores,
            }
        )
    (path / "models" / model).mkdir(parents=True)
    _write_json(path / "models" / model / "metrics.json", entries)


def _write_view(
    path: Path,
    rng: np.random.Generator,
    model: str,
    view: str,
    train: pa.Table,
    test: pa.Table,
    affinity: np.ndarray,
    k: int,
) -> None:
    languages = list(dict.fromkeys(train["language"].to_pylist()))
    index_of = {language: index for index, language in enumerate(languages)}
    train_N = np.array([index_of[name] for name in train["language"].to_pylist()])
    test_Q = np.array([index_of[name] for name in test["language"].to_pylist()])
    own = OWN[model, view.split("-")[0]]
    labels_N, labels_Q = (np.array(table["label"].to_pylist()) for table in (train, test))
    planted_QN = affinity[np.ix_(test_Q, train_N)] + own * (test_Q[:, None] == train_N)
    planted_QN = planted_QN * np.where(labels_Q[:, None] == labels_N, 1.0, -0.3)
    folder = path / "influence" / model / view
    folder.mkdir(parents=True)
    of_epoch, total_QN = {}, np.zeros_like(planted_QN)
    right = rng.random(len(labels_Q)) < 0.7
    guesses = np.where(right, labels_Q, (labels_Q + 1) % 3).tolist()
    for epoch in EPOCHS:
        scores_QN = 1e-4 * (planted_QN * epoch / 3 + rng.normal(0, 0.7, planted_QN.shape))
        total_QN += scores_QN
        of_epoch[epoch] = _table(scores_QN, train, test, languages, train_N, guesses, k)
    examples = _table(total_QN, train, test, languages, train_N, guesses, k)
    pq.write_table(examples, folder / "examples.parquet")
    pq.write_table(epoch_table(of_epoch), folder / "epochs.parquet")
    sizes = {name: int(np.sum(train_N == index)) for name, index in index_of.items()}
    pq.write_table(language_table(examples, sizes, bootstrap=50), folder / "languages.parquet")
    pq.write_table(_top_table(total_QN, train, test, k), folder / "top.parquet")


def _table(
    scores_QN: np.ndarray,
    train: pa.Table,
    test: pa.Table,
    languages: list[str],
    train_N: np.ndarray,
    guesses: list[int],
    k: int,
) -> pa.Table:
    order_QN = np.argsort(-scores_QN, axis=1, kind="stable")
    sums_QG = np.stack([scores_QN[:, train_N == g].sum(1) for g in range(len(languages))], axis=1)
    return example_table(
        order_QN[:, :k],
        order_QN[:, ::-1][:, :k],
        sums_QG,
        languages=languages,
        train_languages=train["language"].to_pylist(),
        test_ids=test["id"].to_pylist(),
        test_languages=test["language"].to_pylist(),
        test_labels=test["label"].to_pylist(),
        test_predictions=guesses,
    )


def _top_table(scores_QN: np.ndarray, train: pa.Table, test: pa.Table, k: int) -> pa.Table:
    train_ids, train_languages = train["id"].to_pylist(), train["language"].to_pylist()
    rows = []
    order_QN = np.argsort(-scores_QN, axis=1, kind="stable")
    test_rows = zip(test["id"].to_pylist(), test["language"].to_pylist(), strict=True)
    for q, (test_id, language) in enumerate(test_rows):
        for sign, order in ((1, order_QN[q]), (-1, order_QN[q, ::-1])):
            for rank, n in enumerate(order[:k].tolist(), start=1):
                rows.append(
                    {
                        "test_id": test_id,
                        "test_language": language,
                        "sign": sign,
                        "rank": rank,
                        "train_id": train_ids[n],
                        "train_language": train_languages[n],
                        "score": float(scores_QN[q, n]),
                    }
                )
    return pa.Table.from_pylist(rows)


def add_blocks(path: Path, languages: tuple[str, ...] = LANGUAGES) -> None:
    """Add influence by head and layer for two views of both models."""
    rng = np.random.default_rng(0)
    blocks = [(layer, h) for layer in range(6) for h in (*range(8), None)] + [(None, None)]
    rows = [
        {"layer": layer, "head": head, "test_language": a, "train_language": b,
         "influence": float(rng.normal(1e-5 * (a == b), 2e-6))}
        for a in languages for b in languages for layer, head in blocks
    ]  # fmt: skip
    for model in ("full", "sparse"):
        for view in ("full", "subnetwork"):
            file = path / "influence" / model / view / "blocks.parquet"
            pq.write_table(pa.Table.from_pylist(rows), file)


def add_courses(path: Path) -> None:
    """Add the course of pruning to every subnetwork."""
    rng = np.random.default_rng(1)
    for file in (path / "subnetworks").glob("*.json"):
        entry = json.loads(file.read_text(encoding="utf-8"))
        entry["course"] = [
            {"heads": heads, "score": 0.74 - 0.002 * (48 - heads),
             "importance": rng.random((6, 8)).tolist()}
            for heads in (48, 40, 30, 20)
        ]  # fmt: skip
        _write_json(file, entry)


def add_retraining(path: Path, languages: tuple[str, ...] = LANGUAGES) -> None:
    """Add a retraining and its section of the config: three methods, each in its own unit."""
    rng = np.random.default_rng(2)
    units = {"tracin": 1e-5, "bm25": 1e3, "random": 1.0}
    rows: dict[str, list[dict[str, Any]]] = {"lds": [], "removal": [], "leave_one_out": []}

    def numbers(*names: str) -> dict[str, float]:
        return {f"{name}{end}": float(middle + shift) for name in names
                for middle in rng.normal(0, 0.2, 1)
                for end, shift in (("", 0), ("_low", -0.1), ("_high", 0.1))}  # fmt: skip

    for method in units:
        for level in ("example", "language"):
            for language in (None, *languages):
                score = {key.removeprefix("value_"): x for key, x in numbers("value").items()}
                over = {} if method == "tracin" else numbers("over_first")
                named = {"method": method, "level": level, "test_language": language}
                rows["lds"].append(named | score | over)
        for side in (RANDOM,) if method == RANDOM else SIDES:
            rows["removal"] += [
                {"method": method, "side": side, "test_language": language, "removed": 4,
                 "trainings": 3, "loss_before": 0.7, "accuracy_before": 0.6,
                 **numbers("loss_change", "accuracy_change")}
                for language in (None, *languages)
            ]  # fmt: skip
    actual = {(a, b): numbers("actual") for a in languages for b in languages}
    rows["leave_one_out"] = [
        {"method": method, "test_language": a, "train_language": b,
         "predicted": float(unit * rng.normal()), **actual[a, b]}
        for method, unit in units.items() for a in languages for b in languages
    ]  # fmt: skip
    (path / "retraining").mkdir()
    schemas = (LDS_SCHEMA, REMOVAL_SCHEMA, LEAVE_ONE_OUT_SCHEMA)
    for (name, of_table), schema in zip(rows.items(), schemas, strict=True):
        table = pa.Table.from_pylist(of_table, schema)
        pq.write_table(table, path / "retraining" / f"{name}.parquet")
    settings = {"subsets": 4, "fraction": 0.5, "seeds": 2, "leave_one_out": True}
    tests = [{"method": method, "between_only": between, "correlation": 0.25, "p_value": 0.125,
              "permutations": 120, "exact": True, "cells": 20 if between else 25}
             for method in units for between in (False, True)]  # fmt: skip
    summary = {"settings": settings, "methods": list(units), "trainings": 33, "num_train": 80,
               "removed": 4, "confidence": 0.95, "leave_one_out": tests}  # fmt: skip
    _write_json(path / "retraining" / "summary.json", summary)
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    record["config"]["retrain"] = settings
    _write_json(path / "run.json", record)


def add_metagradient(path: Path, languages: tuple[str, ...] = LANGUAGES) -> None:
    """Add the metagradient of the full model, of the languages and one test example."""
    rng = np.random.default_rng(3)
    folder = path / "metagradient"
    folder.mkdir()
    rows = [
        {"model": "full", "quantity": quantity, "train_language": b,
         "influence": float(rng.normal(0.1 * (quantity == b), 0.02)), "mean_influence": 0.0,
         "num_train": 16}
        for quantity in (*languages, "test-0") for b in languages
    ]  # fmt: skip
    checks = [{"model": "full", "share": 0.05, "check": 0, "quantity": name, "predicted": 0.01,
               "actual": 0.012} for name in languages]  # fmt: skip
    left_out = [{"model": "full", "quantity": row["quantity"],
                 "train_language": row["train_language"], "change": 2 * row["influence"]}
                for row in rows]  # fmt: skip
    tables = {"languages": rows, "checks": checks, "left_out": left_out}
    for name, of_table in tables.items():
        pq.write_table(pa.Table.from_pylist(of_table), folder / f"{name}.parquet")
    verdict = "Foretells changes of up to about 5% of the examples."
    _write_json(folder / "summary.json", {"models": {"full": {"verdict": verdict}}})
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    record["config"]["metagradient"] = {"models": ["full"]}
    _write_json(path / "run.json", record)


def _write_run_json(
    path: Path, languages: Any, num_train: int, num_test: int, k: int, views: Any, seed: int
) -> None:
    stages = ("data", "finetune", "prune", "sparse-finetune", "collect", "influence", "analyze")
    config = {
        "name": "synthetic",
        "seed": seed,
        "task": {
            "name": "grammar",
            "shape": "nli",
            "languages": list(languages),
            "train_per_language": num_train,
            "test_per_language": num_test,
            "parallel": True,
        },
        "model": {"name": None, "layers": 6, "hidden": 128, "heads": 8},
        "finetune": {"epochs": len(EPOCHS), "learning_rate": 2e-4},
        "prune": {"threshold": 0.95, "step": 0.1},
        "views": {"subnetwork": True, "random": sum("random" in view for view in views)},
        "influence": {"k": k, "normalize": "cosine", "weights": "learning_rate"},
        "analyze": {"bootstrap": 1000, "permutations": 1000, "confidence": 0.95},
    }
    record = {
        "tracmod": "0.1.0",
        "config": config,
        "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.23"},
        "device": "cpu",
        "seeds": {"run": seed},
        "label_names": ["entailment", "neutral", "contradiction"],
        "stages": {
            name: {"state": "done", "seconds": 3.5 * number}
            for number, name in enumerate(stages, start=1)
        },
    }
    _write_json(path / "run.json", record)


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    from tracmod.analysis import analyze
    from tracmod.report import write_report

    num_train, num_test, k = map(int, sys.argv[2:5] or (200, 50, 100))
    run = make_run(Path(sys.argv[1]), num_train=num_train, num_test=num_test, k=k)
    analyze(run)
    print(write_report(run))
