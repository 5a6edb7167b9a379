"""Time collection against the plain floor, and exact influence of many examples; random weights.

The floor is written without tracmod (`plain.floor_pass`) and gets its batches ready-made, while
tracmod starts from lists of token ids. Everything is checked against one-example autograd in
float64, computed once on the same device, before it is timed; a wrong result is timed as well and
named under `wrong`. What is known so far is handed to `save` after every measurement.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import tracmod as tm
from tracmod.bench import plain
from tracmod.bench.measure import agreement, clock, environment, take_turns
from tracmod.bench.models import random_examples, random_model, spaced
from tracmod.features.projection import Slot, projection_keys
from tracmod.gradients.capture import Layer, select_layers
from tracmod.kernels import reference
from tracmod.models.modes import to_device

DIM = 4096
BATCH_TOKENS = 8192
KEPT_HEADS = (0.25, 0.50, 0.75)
# Allowed error of a row over its norm: a pass rounds in every layer, in bfloat16 to 8 bits.
ROW_ERROR = {None: 1e-3, torch.bfloat16: 0.1}
SPEARMAN = 0.99  # least correlation of scores from a bfloat16 pass with those from a float32 pass
EXACT_ERROR = 1e-4  # allowed error of an exact cosine
QUERIES = 2500  # number of queries in the comparison with naive TracIn


Save = Callable[[dict[str, Any]], None]


def ignore(result: dict[str, Any]) -> None:
    """Keep nothing of a result so far."""


class WrongResult(RuntimeError):
    """An incorrect result."""


def require(correct: bool, message: str) -> None:
    """Raise WrongResult with the message unless `correct`."""
    if not correct:
        raise WrongResult(message)


# --- reference results ----------------------------------------------------------------------


def whole_gradients(model: Any, examples: plain.Examples, mask: Any = None) -> Iterator[Any]:
    """Yield each example's gradients by parameter name: float64, one at a time, on its device."""
    model = copy.deepcopy(model).double()
    names = plain.encoder_names(model)
    with plain.requiring_grad(model, names) as parameters, without_heads(model, mask):
        for batch in plain.one_by_one(model, examples, model.device):
            logits = model(**batch.inputs).logits
            loss = nn.functional.cross_entropy(logits, batch.labels)
            yield dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@contextmanager
def without_heads(model: Any, mask: Any) -> Iterator[None]:
    """Zero the masked heads' slices of the input of the attention output projections.

    Written without tracmod's masks, to check them.
    """
    handles = []
    for kept, layer in zip([] if mask is None else mask.array, model.base_model.encoder.layer,
                           strict=mask is not None):  # fmt: skip
        output = layer.attention.output.dense
        scale = torch.tensor(kept).repeat_interleave(output.in_features // len(kept))

        def zero(_: Any, args: tuple[Tensor, ...], scale: Tensor = scale) -> tuple[Tensor, ...]:
            return (args[0] * scale.to(args[0]), *args[1:])

        handles.append(output.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expected_features(
    model: Any, examples: plain.Examples, projection: tm.Projection, mask: Any = None
) -> Tensor:
    """Compute what `collect_features` must return: whole gradients, projected as specified.

    Only the projection is computed on the CPU.
    """
    layers = select_layers(model)
    slots = projection.slots(layers)
    features = torch.zeros(len(examples), projection.dim, dtype=torch.float64)
    for row, gradients in zip(features, whole_gradients(model, examples, mask), strict=True):
        for layer in layers:
            slot = slots[layer.name]
            size = slot.k_out * slot.k_in
            parts = [gradients[name].cpu() for name in layer.parameter_names]
            row[slot.offset : slot.offset + size] += _projected(layer, slot, parts, projection.seed)
    return features


def _projected(layer: Layer, slot: Slot, parts: list[Tensor], seed: int) -> Tensor:
    if layer.kind == "elementwise":
        gradient = torch.stack(parts)
    else:
        gradient = torch.cat([parts[0], *(bias[:, None] for bias in parts[1:])], dim=1)
    if slot.kind == "identity":
        return gradient.flatten()
    if layer.kind == "elementwise":
        rows = torch.arange(len(gradient))
        key = 2 * layer.position + 1
        return reference.count_sketch(gradient, rows, slot.k_out * slot.k_in, seed, key)
    input_key, output_key = projection_keys(layer)
    if slot.kind == "sketch":
        if slot.rows > 0:
            r_out = reference.projection_matrix(
                "rademacher", slot.rows, len(gradient), seed, output_key
            )
            gradient, output_key = r_out @ gradient, ~input_key
        return reference.formed_sketch(gradient, slot.k_in, seed, input_key, output_key)
    r_out, r_in = (
        reference.projection_matrix(slot.kind, k, size, seed, key)
        for k, size, key in zip(
            (slot.k_out, slot.k_in), gradient.shape, (output_key, input_key), strict=True
        )
    )
    return (r_out @ gradient @ r_in.T).flatten()


def checked_examples(examples: plain.Examples) -> list[Any]:
    """Return the few examples whose features are checked."""
    return [examples[row] for row in spaced(len(examples), 3)]


def features_error(
    model: Any, examples: plain.Examples, projection: tm.Projection, truth: Tensor,
    dtype: torch.dtype | None = None, mask: Any = None,
) -> float:  # fmt: skip
    """Return the largest error of a row over its norm; `truth` is of `expected_features`."""
    features = tm.collect_features(model, examples, projection, head_mask=mask, dtype=dtype)
    errors = (features.double().cpu() - truth).norm(dim=1) / truth.norm(dim=1)
    return float(errors.max())


def check_features(model: Any, examples: plain.Examples, projection: tm.Projection) -> float:
    """Return the largest error of a row over its norm, for a few examples in float32.

    Raises:
        WrongResult: the error is more than rounding.
    """
    some = checked_examples(examples)
    truth = expected_features(model, some, projection)
    error = features_error(model, some, projection, truth)
    require(
        error <= ROW_ERROR[None],
        f"{projection.kind} features: off by {error:.1e} of their norm, "
        f"allowed {ROW_ERROR[None]:.0e}; not timed",
    )
    return error


# --- collection -----------------------------------------------------------------------------


def run_collect(
    shape: str,
    device: torch.device,
    count: int,
    *,
    naive: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    seconds: float = 20.0,
    rounds: int = 5,
    save: Save = ignore,
) -> dict[str, Any]:
    """Time the floor and tracmod's collection on the same examples.

    Args:
        shape: shape of the model, of `models.SHAPES`.
        device: device to run on. Masked passes are in bfloat16 on a GPU and in float32 on a CPU.
        count: number of examples.
        naive: if not 0, also time naive TracIn's gradient on this many examples, one at a time.
        batch_tokens: largest batch, in tokens.
        seconds, rounds: as in `take_turns`.
        save: called with the result so far.
    """
    model, examples = to_device(random_model(shape), device), random_examples(count)
    projections = {kind: tm.Projection(DIM, kind) for kind in ("rademacher", "sjlt")}
    masks = {f"heads {kept:.0%}": _random_mask(model, kept) for kept in KEPT_HEADS}
    mask_dtype = torch.bfloat16 if device.type == "cuda" else None
    result: dict[str, Any] = {
        "part": "collect", "environment": environment(device), "shape": shape, "examples": count,
        "tokens": sum(len(e["input_ids"]) for e in examples), "batch_tokens": batch_tokens,
        "dim": DIM, "errors": {}, "wrong": [],
    }  # fmt: skip
    some = checked_examples(examples)

    def check(name: str, kind: str, truth: Tensor, dtype: Any, mask: Any = None) -> None:
        error = features_error(model, some, projections[kind], truth, dtype, mask)
        result["errors"][name] = error
        if not error <= ROW_ERROR[dtype]:
            result["wrong"].append(
                f"{name}: features off by {error:.1e} of their norm, allowed {ROW_ERROR[dtype]:.0e}"
            )

    for kind, projection in projections.items():
        truth = expected_features(model, some, projection)
        check(f"{kind} float32", kind, truth, None)
        check(f"{kind} bfloat16", kind, truth, torch.bfloat16)
    for name, mask in masks.items():
        truth = expected_features(model, some, projections["rademacher"], mask)
        check(name, "rademacher", truth, mask_dtype, mask)
    save(result)

    def collect(kind: str, dtype: torch.dtype | None, mask: Any = None) -> Callable[[], Tensor]:
        return lambda: tm.collect_features(
            model, examples, projections[kind], head_mask=mask, dtype=dtype,
            batch_tokens=batch_tokens,
        )  # fmt: skip

    functions: dict[str, Callable[[], Any]] = floors(model, examples, batch_tokens, device)
    for dtype_name, dtype in (("bfloat16", torch.bfloat16), ("float32", None)):
        for kind in projections:
            functions[f"{kind} {dtype_name}"] = collect(kind, dtype)
    functions |= {name: collect("rademacher", mask_dtype, mask) for name, mask in masks.items()}
    full = "rademacher bfloat16" if mask_dtype else "rademacher float32"

    def keep(timed: dict[str, float]) -> None:
        result["seconds"] = timed
        if full in timed:
            result.update(_shares(timed))
            result["heads_share_of_full"] = {
                name: timed[name] / timed[full] for name in masks if name in timed
            }
        save(result)

    keep(take_turns(functions, device, seconds=seconds, rounds=rounds, after=keep))
    result["bfloat16_agreement"] = fidelity = bfloat16_fidelity(
        model, examples, projections["rademacher"]
    )
    if not fidelity["spearman"] >= SPEARMAN:
        result["wrong"].append(
            f"bfloat16 features: Spearman correlation {fidelity['spearman']:.4f} with float32's "
            f"scores, expected at least {SPEARMAN}"
        )
    if naive:
        timed = result["seconds"]
        result["naive"] = compare_naive(model, examples[:naive], timed, count, device)
    save(result)
    return result


def floors(
    model: Any, examples: plain.Examples, batch_tokens: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """Return the plain pass in float32, in bfloat16 by autocast, and of a bfloat16 model."""
    batches = plain.ready_batches(model, examples, batch_tokens, device)
    halved = copy.deepcopy(model).bfloat16()
    return {
        "floor float32": lambda: plain.floor_pass(model, batches),
        "floor bfloat16 autocast": lambda: plain.floor_pass(model, batches, torch.bfloat16),
        "floor bfloat16 model": lambda: plain.floor_pass(halved, batches),
    }


def _shares(timed: dict[str, float]) -> dict[str, Any]:
    """Compute times relative to the float32 floor and, for bfloat16, to the lower bfloat16 one."""
    lowest = min(timed["floor bfloat16 autocast"], timed["floor bfloat16 model"])
    names = [name for name in timed if name.startswith(("rademacher", "sjlt", "floor bfloat16"))]
    return {
        "share_of_float32_floor": {name: timed[name] / timed["floor float32"] for name in names},
        "share_of_bfloat16_floor": {
            name: timed[name] / lowest for name in names if not name.endswith("float32")
        },
    }


def _random_mask(model: Any, kept: float) -> tm.HeadMask:
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    return tm.HeadMask.random(layers, heads, size=round(kept * layers * heads), seed=0)


def bfloat16_fidelity(
    model: Any, examples: plain.Examples, projection: tm.Projection
) -> dict[str, float]:
    """Compare cosine scores from features of a bfloat16 pass with those of a float32 pass."""
    some = [examples[row] for row in spaced(len(examples), 512)]
    queries = spaced(len(some), 64)
    single, half = (
        tm.influence_scores(features[queries], features, normalize="cosine")
        for features in (
            tm.collect_features(model, some, projection, dtype=dtype)
            for dtype in (None, torch.bfloat16)
        )
    )
    return agreement(half.cpu(), single.cpu())


def compare_naive(
    model: Any, examples: plain.Examples, timed: dict[str, float], count: int, device: torch.device
) -> dict[str, Any]:
    """Compare the seconds per training example of naive TracIn and of tracmod.

    Of naive TracIn only the gradient is timed. Its products with the query gradients are left out,
    in its favour: those of a base model (P numbers each) do not fit into memory. For tracmod the
    fastest collection is counted, with scores and rankings of `QUERIES` queries.
    """
    batches = list(plain.one_by_one(model, examples, device))

    def gradients(dtype: torch.dtype | None) -> None:
        with plain.requiring_grad(model, plain.encoder_names(model)) as parameters:
            size = sum(p.numel() for p in parameters)
            row = torch.empty(size, device=device)
            for batch in batches:
                plain.naive_gradient(model, parameters, batch, row, dtype)

    naive = take_turns(
        {"float32": lambda: gradients(None), "bfloat16": lambda: gradients(torch.bfloat16)},
        device, rounds=3,
    )  # fmt: skip
    queries, trains = (torch.randn(rows, DIM, device=device) for rows in (QUERIES, count))
    scoring = take_turns(
        {"top": lambda: tm.top_influences(queries, trains, 100, normalize="cosine")},
        device, rounds=3,
    )["top"]  # fmt: skip
    collecting = min(timed[name] for name in timed if name.startswith(("rademacher", "sjlt")))
    ours = (collecting + scoring) / count
    best = min(naive.values()) / len(batches)
    return {
        "examples": len(batches), "queries": QUERIES,
        "naive_seconds_per_example": {name: s / len(batches) for name, s in naive.items()},
        "ours_seconds_per_example": ours, "scoring_seconds": scoring, "times_naive": best / ours,
    }  # fmt: skip


# --- exact influence ------------------------------------------------------------------------


def run_exact(
    shape: str,
    device: torch.device,
    train: int,
    query: int,
    *,
    bound: float = 60.0,
    save: Save = ignore,
) -> dict[str, Any]:
    """Time exact cosine influence of one checkpoint, or extrapolate if it would take too long.

    A tenth of the training by a tenth of the query examples is timed first. If a hundred times that
    is more than 1.5 times `bound` seconds, this extrapolation is the result, and marked as such.

    Args:
        shape: shape of the model, of `models.SHAPES`.
        device: device to run on.
        train, query: numbers of examples.
        bound: seconds that the measurement may take.
        save: called with the result so far.
    """
    model = to_device(random_model(shape), device)
    trains, queries = random_examples(train, 2), random_examples(query, 3)
    error = exact_error(model, trains, queries)
    result: dict[str, Any] = {
        "part": "exact", "environment": environment(device), "shape": shape, "train": train,
        "query": query, "error": error, "wrong": [], "bound_seconds": bound,
    }  # fmt: skip
    if not error <= EXACT_ERROR:
        result["wrong"].append(f"a cosine is off by {error:.1e}, allowed {EXACT_ERROR:.0e}")

    def influence(trains: Any, queries: Any) -> Tensor:
        return tm.exact_influence(model, trains, queries, normalize="cosine")

    influence(trains[:32], queries[:32])  # the first call also loads kernels
    part = clock(lambda: influence(trains[: train // 10], queries[: query // 10]), device)
    result |= {"tenth_by_tenth_seconds": part, "seconds": 100 * part, "extrapolated": True}
    save(result)
    if 100 * part <= 1.5 * bound:
        result["seconds"] = clock(lambda: influence(trains, queries), device)
        result["extrapolated"] = False
        save(result)
    return result


def exact_error(model: Any, trains: plain.Examples, queries: plain.Examples) -> float:
    """Return the largest error of a cosine against float64, for a few examples."""
    some = [[rows[row] for row in spaced(len(rows), 3)] for rows in (trains, queries)]
    scores = tm.exact_influence(model, some[0], some[1], normalize="cosine")
    units = [list(map(_unit_row, whole_gradients(model, rows))) for rows in some]
    truth = torch.tensor([[float(q_P @ t_P) for t_P in units[0]] for q_P in units[1]])
    return float((scores.double().cpu() - truth).abs().max())


def check_exact(model: Any, trains: plain.Examples, queries: plain.Examples) -> float:
    """Return `exact_error`.

    Raises:
        WrongResult: the error is more than rounding.
    """
    error = exact_error(model, trains, queries)
    require(
        error <= EXACT_ERROR,
        f"exact influence: a cosine is off by {error:.1e}, allowed {EXACT_ERROR:.0e}",
    )
    return error


def _unit_row(gradients: dict[str, Tensor]) -> Tensor:
    row_P = torch.cat([gradient.flatten() for gradient in gradients.values()])
    return row_P.div_(row_P.norm())
