"""The whole job on a trained model: naive TracIn, batched plain torch, ours exact, ours projected.

Every method scores all training examples for all query examples over all checkpoints (cosines,
weighted by learning rate), ranks the 100 best and worst and sums by language. Each runs in a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import atexit
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tracmod as tm
from tracmod.bench import plain
from tracmod.bench.collect import BATCH_TOKENS, DIM, check_exact, check_features, require
from tracmod.bench.measure import agreement, environment, peak_memory
from tracmod.bench.models import Trained, load_trained, spaced
from tracmod.features.collector import Collector, collect_to_store
from tracmod.features.store import FeatureStore
from tracmod.influence.scores import top_of_scores
from tracmod.models.inputs import as_examples
from tracmod.models.loading import load_classifier
from tracmod.models.modes import frozen, to_device

K = 100


class Outcome(NamedTuple):
    """What a method did.

    Attributes:
        seconds: of `gradients` (absent where they are not made apart), `scoring`, `whole`.
        indices: (Q, k) of the best training examples.
        scores: the score matrix, made only after time and memory have been read.
        columns: training examples that were scored, None for all.
        extrapolated: the seconds are those of all examples, from the time of some.
    """

    seconds: dict[str, float]
    indices: Tensor
    scores: Callable[[], Tensor]
    columns: list[int] | None = None
    extrapolated: bool = False


def checkpoint(job: Trained, place: int, device: torch.device) -> Any:
    return to_device(load_classifier(job.checkpoints[place]), device)


def some_of(job: Trained, subset: int | None) -> tuple[list[int] | None, list[Any], float]:
    """So many training examples, their places, and how many times more there are."""
    if subset is None:
        return None, job.train, 1.0
    columns = spaced(len(job.train), subset)
    return columns, [job.train[column] for column in columns], len(job.train) / len(columns)


def groups_of(job: Trained, device: torch.device, columns: list[int] | None = None) -> Tensor:
    names = sorted(set(job.languages))
    languages = job.languages if columns is None else [job.languages[c] for c in columns]
    return torch.tensor([names.index(language) for language in languages], device=device)


def naive(job: Trained, device: torch.device, subset: int | None) -> Outcome:
    """One example at a time; with `subset` the training part is extrapolated to all examples."""
    columns, train, factor = some_of(job, subset)
    total_QN = torch.zeros(len(job.query), len(train), device=device)
    gradients = scoring = 0.0
    for place, weight in enumerate(job.weights):
        one = plain.naive_scores(checkpoint(job, place, device), train, job.query, device)
        total_QN += weight * one.scores_QN
        gradients += one.query_seconds + factor * one.gradient_seconds
        scoring += factor * one.product_seconds
    start = time.perf_counter()
    groups_N = groups_of(job, device, columns)
    indices = plain.ranking(total_QN, groups_N, len(set(job.languages)), K).cpu()
    scoring += factor * (time.perf_counter() - start)
    seconds = {"gradients": gradients, "scoring": scoring, "whole": gradients + scoring}
    return Outcome(seconds, indices, lambda: total_QN, columns, factor > 1)


def hooks(job: Trained, device: torch.device, subset: int | None) -> Outcome:
    """Batched plain torch: hooks, ready-made matrices, one summed grid, matrix product, topk."""
    pairs, gradients = [], 0.0
    for place in range(len(job.weights)):
        model = checkpoint(job, place, device)
        start = time.perf_counter()
        made = plain.HookedFeatures(model, dim=DIM)
        pairs.append([
            made.features(plain.ready_batches(model, examples, BATCH_TOKENS, device))
            for examples in (job.query, job.train)
        ])  # fmt: skip
        _wait(device)
        gradients += time.perf_counter() - start
    start = time.perf_counter()
    total_QN = torch.zeros(len(job.query), len(job.train), device=device)
    for weight, pair in zip(job.weights, pairs, strict=True):
        query_QK, train_NK = (torch.nn.functional.normalize(one, dim=1) for one in pair)
        total_QN.addmm_(query_QK, train_NK.T, alpha=weight)
    groups_N = groups_of(job, device)
    indices = plain.ranking(total_QN, groups_N, len(set(job.languages)), K).cpu()
    scoring = time.perf_counter() - start
    seconds = {"gradients": gradients, "scoring": scoring, "whole": gradients + scoring}
    return Outcome(seconds, indices, lambda: total_QN)


def exact(job: Trained, device: torch.device, subset: int | None) -> Outcome:
    """Ours without a projection; with `subset` all of its time is extrapolated."""
    columns, train, factor = some_of(job, subset)
    languages = job.languages if columns is None else [job.languages[c] for c in columns]
    total_QN = torch.zeros(len(job.query), len(train), device=device)
    elapsed = 0.0
    for place, weight in enumerate(job.weights):
        model = checkpoint(job, place, device)
        start = time.perf_counter()
        total_QN += weight * tm.exact_influence(model, train, job.query, normalize="cosine")
        _wait(device)
        elapsed += time.perf_counter() - start
    start = time.perf_counter()
    indices = top_of_scores(total_QN, K, languages).indices.cpu()
    elapsed += time.perf_counter() - start
    return Outcome({"whole": factor * elapsed}, indices, lambda: total_QN, columns, factor > 1)


def projected(kind: Any, dtype: torch.dtype | None = None) -> Callable[..., Outcome]:
    """Ours with features of K = 4096, collected into stores on disk and searched from there."""

    def run(job: Trained, device: torch.device, subset: int | None) -> Outcome:
        folder, stores, gradients = Path(tempfile.mkdtemp()), [], 0.0
        atexit.register(shutil.rmtree, folder)
        for place in range(len(job.weights)):
            model = checkpoint(job, place, device)
            start = time.perf_counter()
            with frozen(model):
                collector = Collector(model, tm.Projection(DIM, kind), dtype=dtype)
                stores.append([
                    _store(collector, examples, folder / f"{place}-{split}")
                    for split, examples in (("query", job.query), ("train", job.train))
                ])  # fmt: skip
            _wait(device)
            gradients += time.perf_counter() - start
        queries, trains = zip(*stores, strict=True)
        start = time.perf_counter()
        top = tm.top_influences(
            queries, trains, K, job.languages, job.weights, "cosine", device=device
        )
        indices = top.indices.cpu()
        scoring = time.perf_counter() - start
        seconds = {"gradients": gradients, "scoring": scoring, "whole": gradients + scoring}
        return Outcome(
            seconds,
            indices,
            lambda: tm.influence_scores(queries, trains, job.weights, "cosine"),
        )

    return run


def _store(collector: Collector, examples: list[Any], path: Path) -> FeatureStore:
    ids = [str(row) for row in range(len(examples))]
    identity = {"projection": collector.projection.seed}
    with FeatureStore.create(path, ids=ids, dim=DIM, identity=identity) as store:
        collect_to_store(collector, as_examples(examples), store)
    return store


METHODS: dict[str, Callable[[Trained, torch.device, int | None], Outcome]] = {
    "naive": naive,
    "hooks": hooks,
    "exact": exact,
    "rademacher": projected("rademacher"),
    "sjlt": projected("sjlt"),
    "rademacher-bfloat16": projected("rademacher", torch.bfloat16),
}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- a method in its own process ------------------------------------------------------------


def run_method(name: str, asked: dict[str, Any], to: Path) -> None:
    """Do one method; figures and scores into the folder `to`."""
    base = peak_memory()
    device = torch.device(asked["device"])
    job = load_trained(Path(asked["run"]), asked["train"], asked["query"])
    if name == "check":
        (to / "check.json").write_text(json.dumps(_check(job, device)), encoding="utf-8")
        return
    done = METHODS[name](job, device, asked["subsets"].get(name))
    figures = {
        "seconds": done.seconds, "extrapolated": done.extrapolated, "columns": done.columns,
        "peak_bytes": peak_memory(), "base_bytes": base,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }  # fmt: skip
    scores_QN = done.scores().float().cpu().contiguous()
    ranked = {"scores": scores_QN, "indices": done.indices.contiguous()}
    save_file(ranked, str(to / f"{name}.safetensors"))
    (to / f"{name}.json").write_text(json.dumps(figures), encoding="utf-8")


def _check(job: Trained, device: torch.device) -> dict[str, Any]:
    """Errors against float64 autograd at the last checkpoint, before anything is timed; sizes."""
    model = checkpoint(job, len(job.checkpoints) - 1, device)
    errors = {"exact": check_exact(model, job.train, job.query)}
    for kind in ("rademacher", "sjlt"):
        errors[kind] = check_features(model, job.train, tm.Projection(DIM, kind))
    tokens = sum(len(example["input_ids"]) for example in job.train)
    return {
        "train": len(job.train), "query": len(job.query), "checkpoints": len(job.checkpoints),
        "tokens_per_example": tokens / len(job.train), "errors": errors,
    }  # fmt: skip


def _in_process(name: str, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    script = str(Path(__file__).resolve().parent / "bench_tracin.py")
    command = [sys.executable, script, "method", name, json.dumps(asked), str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    require(done.returncode == 0, f"{name}: {(done.stderr or '').strip()[-400:]}")
    figures: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return figures


# --- all of them ----------------------------------------------------------------------------


def run_job(
    run: Path,
    device_name: str,
    methods: list[str],
    *,
    train: int | None = None,
    query: int | None = None,
    subsets: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Times, peak memory and agreement of the methods; exact, if among them, is the measure.

    Args:
        run: folder of `make_trained`.
        device_name: where all of it runs.
        methods: of `METHODS`.
        train, query: so many examples; None for all.
        subsets: naive and exact on so many training examples, their times extrapolated.

    Raises:
        WrongResult: a method fails, or ranks what it has not scored so.
    """
    asked = {"run": str(run.resolve()), "device": device_name, "train": train, "query": query,
             "subsets": dict(subsets or {})}  # fmt: skip
    rows, results = {}, {}
    with tempfile.TemporaryDirectory() as name:
        checked = _in_process("check", asked, Path(name))
        for method in methods:
            rows[method] = _in_process(method, asked, Path(name))
            results[method] = load_file(Path(name) / f"{method}.safetensors")
            print(f"{method}: {rows[method]['seconds']['whole']:.1f} s", file=sys.stderr)
    examples = (checked["train"] + checked["query"]) * checked["checkpoints"]
    for method, row in rows.items():
        _check_ranking(method, results[method]["scores"], results[method]["indices"])
        seconds, columns = row["seconds"], row["columns"]
        if "gradients" in seconds:
            row["gradients_per_second"] = examples / seconds["gradients"]
        row["examples_per_second"] = examples / seconds["whole"]
        if "exact" in results and method != "exact":
            row["agreement"] = _agreement(results, rows, method)
        if columns is not None:
            row["measured_train"] = len(columns)
        if "naive" in rows:
            row["times_naive"] = rows["naive"]["seconds"]["whole"] / seconds["whole"]
            row["share_of_naive_memory"] = row["peak_bytes"] / rows["naive"]["peak_bytes"]
    for row in rows.values():
        del row["columns"]
    return {
        "part": "job", "environment": environment(torch.device(device_name)), "k": K, "dim": DIM,
        **checked, "methods": rows,
    }  # fmt: skip


def _agreement(results: Any, rows: dict[str, dict[str, Any]], method: str) -> dict[str, float]:
    """With exact scores, on the training examples that both have scored."""
    places = []
    for name in (method, "exact"):
        columns = rows[name]["columns"]
        count = results[name]["scores"].shape[1]
        places.append({c: p for p, c in enumerate(range(count) if columns is None else columns)})
    shared = sorted(places[0].keys() & places[1].keys())
    own, exact_QN = (
        results[name]["scores"][:, [place[column] for column in shared]]
        for name, place in zip((method, "exact"), places, strict=True)
    )
    return agreement(own, exact_QN)


def _check_ranking(method: str, scores_QN: Tensor, indices_QK: Tensor) -> None:
    """The rows that a method ranks first are those that it scores highest.

    Raises:
        WrongResult: they are not.
    """
    best = scores_QN.topk(indices_QK.shape[1]).values
    error = float((scores_QN.gather(1, indices_QK) - best).abs().max())
    require(error <= 1e-4, f"{method}: its ranking is off its own scores by {error:.1e}")
