"""One measurement in the process of one library: check, time and memory of a method, or a job.

    python -m tracmod.bench.peers.worker PART OPTIONS FOLDER

OPTIONS is JSON: `method`, `examples` (path), `checkpoints`, `weights`, `size` (examples of a batch)
and `exact` (path of the exact scores). Results are written into FOLDER.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXACT_TOLERANCE = 1e-4  # largest error of a score over the largest score
LOWEST_CORRELATION = 0.3  # of projected with exact scores; scores of other rows have about 0
CHECKED = (8, 32)  # query and training examples of the check
BATCH_SIZES = (2, 4, 8, 16, 32)  # of the floors


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s*(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` of `count` positions, evenly spaced."""
    wanted = min(count, wanted)
    return [position * count // wanted for position in range(wanted)]


def run_scores(method: Any, size: int) -> Callable[[Any, Any, Any], Any]:
    """Return a function of model, query and training examples that computes the scores."""
    from tracmod.bench.peers.methods import load_function

    function = load_function(method)
    if method.kind == "exact":
        return lambda model, query, train: function(model, query, train, size, **method.options)

    def scores(model: Any, query: Any, train: Any) -> Any:
        parts = [function(model, rows, size, **method.options) for rows in (query, train)]
        return parts[0] @ parts[1].T

    return scores


def check(method: Any, options: dict[str, Any], query: Any, train: Any) -> str | None:
    """Compare scores of a few examples with the exact ones; return what is wrong, or None."""
    import torch
    from safetensors.torch import load_file

    from tracmod.bench.peers.shared import load

    rows, columns = spaced(len(query), CHECKED[0]), spaced(len(train), CHECKED[1])
    suffix = "_encoder" if method.parameters == "encoder" else ""
    exact = load_file(options["exact"])[f"dot{suffix}"][rows][:, columns]
    some = [query[row] for row in rows], [train[column] for column in columns]
    scores = run_scores(method, min(4, options["size"]))(load(options["checkpoints"][-1]), *some)
    if not bool(scores.isfinite().all()):
        return "scores are not finite"
    if method.kind == "exact":
        error = float((scores.double() - exact).abs().max() / exact.abs().max())
        wrong = error > EXACT_TOLERANCE
        return f"a score is off by {error:.1e} of the largest" if wrong else None
    pair = torch.stack([scores.double().flatten(), exact.flatten()])
    correlation = float(torch.corrcoef(pair)[0, 1])
    wrong = not correlation >= LOWEST_CORRELATION
    return f"correlation with exact scores {correlation:.2f}" if wrong else None


def measure(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Check a method, then time it on all examples; save what it computed."""
    from safetensors.torch import save_file

    from tracmod.bench.peers.methods import METHODS, load_function
    from tracmod.bench.peers.shared import load, load_examples

    method = METHODS[options["method"]]
    train, query = load_examples(options["examples"])
    result: dict[str, Any] = {"version": importlib.metadata.version(method.package)}
    if method.kind == "floor":
        return result | measure_floor(method.function, options, [*query, *train])
    if options["check"]:
        problem = check(method, options, query, train)
        if problem:
            return result | {"failed": problem}
    function, model = load_function(method), load(options["checkpoints"][-1])
    result["base_bytes"] = peak_memory()
    start, wall = time.process_time(), time.perf_counter()
    if method.kind == "exact":
        tensors = {"scores": function(model, query, train, options["size"], **method.options)}
    else:
        tensors = {
            name: function(model, rows, options["size"], **method.options)
            for name, rows in (("query", query), ("train", train))
        }
        result["numbers"] = tensors["train"].shape[1]
    result["cpu_seconds"] = time.process_time() - start
    result["wall_seconds"] = time.perf_counter() - wall
    result["peak_bytes"] = peak_memory()
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, str(folder / f"{options['method']}.safetensors"))
    return result


def measure_floor(form: str, options: dict[str, Any], examples: Any) -> dict[str, Any]:
    """Time a floor with the batch size that is fastest on a quarter of the examples.

    Batches are of examples of similar lengths, so that the smallest have next to no padding.
    """
    from tracmod.bench.peers.shared import batches, load
    from tracmod.bench.peers.use_floor import floor_pass, largest_difference

    model = load(options["checkpoints"][-1])
    error = largest_difference(model, list(batches(examples[:8], 4)))
    if error > 1e-3:
        return {"failed": f"the floors' gradients differ by {error:.1e} of the largest"}

    def seconds(ready: list[Any]) -> float:
        start = time.process_time()
        floor_pass(model, ready, form)
        return time.process_time() - start

    quarter = [examples[row] for row in spaced(len(examples), max(8, len(examples) // 4))]
    seconds(list(batches(quarter[:8], 4)))  # the first pass also starts the libraries
    size = min(BATCH_SIZES, key=lambda size: seconds(list(batches(quarter, size))))
    ready = list(batches(examples, size))
    result: dict[str, Any] = {"batch_size": size, "base_bytes": peak_memory()}
    wall = time.perf_counter()
    result["cpu_seconds"] = seconds(ready)
    result["wall_seconds"] = time.perf_counter() - wall
    result["peak_bytes"] = peak_memory()
    return result


def job(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the whole job of a user's script: all checkpoints, up to the file of rankings."""
    from tracmod.bench.peers.methods import METHODS
    from tracmod.bench.peers.shared import run_job

    run_job(options, folder, run_scores(METHODS[options["method"]], options["size"]))
    return {"peak_bytes": peak_memory()}


def command(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a command of tracmod: `arguments` of the options, with its results in the folder."""
    from tracmod.cli import main

    main([*options["arguments"], "--out", str(folder / "out")], standalone_mode=False)
    return {"peak_bytes": peak_memory()}


def exact(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compute the exact scores of the last checkpoint and save them."""
    from safetensors.torch import save_file

    from tracmod.bench.peers.exact import exact_scores
    from tracmod.bench.peers.shared import load, load_examples

    train, query = load_examples(options["examples"])
    scores = exact_scores(load(options["checkpoints"][-1]), query, train)
    save_file({name: part.contiguous() for name, part in scores.items()}, options["exact"])
    return {}


PARTS = {"measure": measure, "job": job, "command": command, "exact": exact}


def main() -> None:
    part, options, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    result = PARTS[part](options, folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
