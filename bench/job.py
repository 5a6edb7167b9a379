"""Time the whole job on a trained model: naive TracIn, batched plain torch, and tracmod.

Every method scores all training examples for all query examples over all checkpoints (cosines,
weighted by learning rate), ranks the 100 strongest of each sign and sums by language. Each runs in
a process of its own, so that its peak memory is not that of another.
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
from tracmod.bench.measure import agreement, environment, peak_memory, synchronize
from tracmod.bench.models import Trained, load_trained, spaced
from tracmod.features.collector import Collector, collect_to_store
from tracmod.features.store import FeatureStore
from tracmod.influence.scores import top_of_scores
from tracmod.models.inputs import as_examples
from tracmod.models.loading import load_classifier
from tracmod.models.modes import frozen, to_device

K = 100


class Outcome(NamedTuple):
    """The result of a method.

    Attributes:
        seconds: seconds of `gradients` (if computed apart), `scoring` and the `whole`.
        indices: (Q, k) positions of the best training examples.
        scores: returns the score matrix; called after time and memory have been read.
        columns: training examples that were scored; None for all.
        extrapolated: whether the seconds for all examples are extrapolated from those of some.
    """

    seconds: dict[str, float]
    indices: Tensor
    scores: Callable[[], Tensor]
    columns: list[int] | None = None
    extrapolated: bool = False


def load_checkpoint(job: Trained, number: int, device: torch.device) -> Any:
    return to_device(load_classifier(job.checkpoints[number]), device)


def take_subset(job: Trained, subset: int | None) -> tuple[list[int] | None, list[Any], float]:
    """Return positions and examples of a training subset, and how many times more there are."""
    if subset is None:
        return None, job.train, 1.0
    columns = spaced(len(job.train), subset)
    return columns, [job.train[column] for column in columns], len(job.train) / len(columns)


def groups_of(job: Trained, device: torch.device, columns: list[int] | None = None) -> Tensor:
    names = sorted(set(job.languages))
    languages = job.languages if columns is None else [job.languages[c] for c in columns]
    return torch.tensor([names.index(language) for language in languages], device=device)


def naive(job: Trained, device: torch.device, subset: int | None) -> Outcome:
    """Run naive TracIn, one example at a time.

    With `subset`, the time of the training part is extrapolated to all examples.
    """
    columns, train, factor = take_subset(job, subset)
    total_QN = torch.zeros(len(job.query), len(train), device=device)
    gradients = scoring = 0.0
    for number, weight in enumerate(job.weights):
        model = load_checkpoint(job, number, device)
        result = plain.naive_scores(model, train, job.query, device)
        total_QN += weight * result.scores_QN
        gradients += result.query_seconds + factor * result.gradient_seconds
        scoring += factor * result.product_seconds
    start = time.perf_counter()
    groups_N = groups_of(job, device, columns)
    indices = plain.ranking(total_QN, groups_N, len(set(job.languages)), K).cpu()
    scoring += factor * (time.perf_counter() - start)
    seconds = {"gradients": gradients, "scoring": scoring, "whole": gradients + scoring}
    return Outcome(seconds, indices, lambda: total_QN, columns, factor > 1)


def hooks(job: Trained, device: torch.device, subset: int | None) -> Outcome:
    """Run batched plain torch: hooks, ready-made matrices, one summed grid, product and topk."""
    pairs, gradients = [], 0.0
    for number in range(len(job.weights)):
        model = load_checkpoint(job, number, device)
        start = time.perf_counter()
        hooked = plain.HookedFeatures(model, dim=DIM)
        pairs.append([
            hooked.features(plain.ready_batches(model, examples, BATCH_TOKENS, device))
            for examples in (job.query, job.train)
        ])  # fmt: skip
        synchronize(device)
        gradients += time.perf_counter() - start
    start = time.perf_counter()
    total_QN = torch.zeros(len(job.query), len(job.train), device=device)
    for weight, pair in zip(job.weights, pairs, strict=True):
        query_QK, train_NK = (torch.nn.functional.normalize(rows, dim=1) for rows in pair)
        total_QN.addmm_(query_QK, train_NK.T, alpha=weight)
    groups_N = groups_of(job, device)
    indices = plain.ranking(total_QN, groups_N, len(set(job.languages)), K).cpu()
    scoring = time.perf_counter() - start
    seconds = {"gradients": gradients, "scoring": scoring, "whole": gradients + scoring}
    return Outcome(seconds, indices, lambda: total_QN)


def exact(job: Trained, device: torch.device, subset: int | None) -> Outcome:
    """Run tracmod without a projection; with `subset`, all of its time is extrapolated."""
    columns, train, factor = take_subset(job, subset)
    languages = job.languages if columns is None else [job.languages[c] for c in columns]
    total_QN = torch.zeros(len(job.query), len(train), device=device)
    elapsed = 0.0
    for number, weight in enumerate(job.weights):
        model = load_checkpoint(job, number, device)
        start = time.perf_counter()
        total_QN += weight * tm.exact_influence(model, train, job.query, normalize="cosine")
        synchronize(device)
        elapsed += time.perf_counter() - start
    start = time.perf_counter()
    indices = top_of_scores(total_QN, K, languages).indices.cpu()
    elapsed += time.perf_counter() - start
    return Outcome({"whole": factor * elapsed}, indices, lambda: total_QN, columns, factor > 1)


def projected(kind: Any, dtype: torch.dtype | None = None) -> Callable[..., Outcome]:
    """Return tracmod with features of K = 4096, collected into stores on disk and read back."""

    def run(job: Trained, device: torch.device, subset: int | None) -> Outcome:
        folder, stores, gradients = Path(tempfile.mkdtemp()), [], 0.0
        atexit.register(shutil.rmtree, folder)
        for number in range(len(job.weights)):
            model = load_checkpoint(job, number, device)
            start = time.perf_counter()
            with frozen(model):
                collector = Collector(model, tm.Projection(DIM, kind), dtype=dtype)
                stores.append([
                    _store(collector, examples, folder / f"{number}-{split}")
                    for split, examples in (("query", job.query), ("train", job.train))
                ])  # fmt: skip
            synchronize(device)
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


# --- a method in its own process ------------------------------------------------------------


def run_method(name: str, options: dict[str, Any], folder: Path) -> None:
    """Run one method, or `check`, in this process; write figures and scores into the folder."""
    base = peak_memory()
    device = torch.device(options["device"])
    job = load_trained(Path(options["run"]), options["train"], options["query"])
    if name == "check":
        (folder / "check.json").write_text(json.dumps(_check(job, device)), encoding="utf-8")
        return
    outcome = METHODS[name](job, device, options["subsets"].get(name))
    figures = {
        "seconds": outcome.seconds, "extrapolated": outcome.extrapolated,
        "columns": outcome.columns,
        "peak_bytes": peak_memory(), "base_bytes": base,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }  # fmt: skip
    scores_QN = outcome.scores().float().cpu().contiguous()
    ranking = {"scores": scores_QN, "indices": outcome.indices.contiguous()}
    save_file(ranking, str(folder / f"{name}.safetensors"))
    (folder / f"{name}.json").write_text(json.dumps(figures), encoding="utf-8")


def _check(job: Trained, device: torch.device) -> dict[str, Any]:
    """Compare the last checkpoint's results with float64 autograd; return errors and sizes."""
    model = load_checkpoint(job, len(job.checkpoints) - 1, device)
    errors = {"exact": check_exact(model, job.train, job.query)}
    for kind in ("rademacher", "sjlt"):
        errors[kind] = check_features(model, job.train, tm.Projection(DIM, kind))
    tokens = sum(len(example["input_ids"]) for example in job.train)
    return {
        "train": len(job.train), "query": len(job.query), "checkpoints": len(job.checkpoints),
        "tokens_per_example": tokens / len(job.train), "errors": errors,
    }  # fmt: skip


def _in_process(name: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a method in a new process and return its figures."""
    script = str(Path(__file__).resolve().parent / "bench_tracin.py")
    command = [sys.executable, script, "method", name, json.dumps(options), str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    require(done.returncode == 0, f"{name}: {(done.stderr or '').strip()[-400:]}")
    figures: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return figures


# --- all methods ----------------------------------------------------------------------------


def run_job(
    run: Path,
    device_name: str,
    methods: list[str],
    *,
    train: int | None = None,
    query: int | None = None,
    subsets: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """Measure time, peak memory and, if `exact` is among the methods, agreement with it.

    Args:
        run: run folder from `make_trained`.
        device_name: device to run on.
        methods: names from `METHODS`.
        train, query: numbers of examples; None for all.
        subsets: number of training examples by method (naive, exact) from which its time is
            extrapolated; None for all.

    Raises:
        WrongResult: a method fails, is incorrect, or its ranking contradicts its scores.
    """
    options = {"run": str(run.resolve()), "device": device_name, "train": train, "query": query,
             "subsets": dict(subsets or {})}  # fmt: skip
    rows, results = {}, {}
    with tempfile.TemporaryDirectory() as name:
        checked = _in_process("check", options, Path(name))
        for method in methods:
            rows[method] = _in_process(method, options, Path(name))
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
    """Compare a method with exact scores, on the training examples that both have scored."""
    positions = []  # of training example -> column of the score matrix, for either method
    for name in (method, "exact"):
        columns = rows[name]["columns"] or range(results[name]["scores"].shape[1])
        positions.append({example: column for column, example in enumerate(columns)})
    shared = sorted(positions[0].keys() & positions[1].keys())
    own_QN, exact_QN = (
        results[name]["scores"][:, [position[example] for example in shared]]
        for name, position in zip((method, "exact"), positions, strict=True)
    )
    return agreement(own_QN, exact_QN)


def _check_ranking(method: str, scores_QN: Tensor, indices_QK: Tensor) -> None:
    """Check that a method ranks those training examples first that it scores highest.

    Raises:
        WrongResult: it does not.
    """
    best = scores_QN.topk(indices_QK.shape[1]).values
    error = float((scores_QN.gather(1, indices_QK) - best).abs().max())
    require(error <= 1e-4, f"{method}: its ranking is off its own scores by {error:.1e}")
