"""Collection of features against the plain floor, and exact influence at size: random weights.

The floor is written without tracmod (`plain.floor_pass`) and gets its batches ready-made; ours
starts from lists of token ids. Everything is checked against one-example autograd in float64
before it is timed.
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
# A row's error over its norm: a pass rounds in every layer, in bfloat16 to 8 bits.
ROW_ERROR = {None: 1e-3, torch.bfloat16: 0.1}
QUERIES = 2500  # of the scoring beside naive TracIn


class WrongResult(RuntimeError):
    """A result that is not what it should be: nothing of it is timed."""


def require(right: bool, sentence: str) -> None:
    if not right:
        raise WrongResult(sentence)


# --- the truth ------------------------------------------------------------------------------


def whole_gradients(model: Any, examples: plain.Examples, mask: Any = None) -> Iterator[Any]:
    """Each example's gradients by parameter name: float64, one example at a time, on the CPU."""
    model = copy.deepcopy(model).cpu().double()
    names = plain.encoder_names(model)
    with plain.parameters_need(model, names) as parameters, without_heads(model, mask):
        for batch in plain.one_by_one(model, examples, torch.device("cpu")):
            logits = model(**batch.inputs).logits
            loss = nn.functional.cross_entropy(logits, batch.labels)
            yield dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@contextmanager
def without_heads(model: Any, mask: Any) -> Iterator[None]:
    """Zeroes the masked heads' slices of what goes into the attention's output projection."""
    handles = []
    for kept, layer in zip([] if mask is None else mask.array, model.base_model.encoder.layer,
                           strict=mask is not None):  # fmt: skip
        output = layer.attention.output.dense
        scale = torch.tensor(kept).repeat_interleave(output.in_features // len(kept))

        def zero(_: Any, args: tuple[Tensor, ...], scale: Tensor = scale) -> tuple[Tensor, ...]:
            return (args[0] * scale.to(args[0].dtype), *args[1:])

        handles.append(output.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def expected_features(
    model: Any, examples: plain.Examples, projection: tm.Projection, mask: Any = None
) -> Tensor:
    """What `collect_features` must give: whole gradients, projected by the specification."""
    layers = select_layers(model)
    slots = projection.slots(layers)
    features = torch.zeros(len(examples), projection.dim, dtype=torch.float64)
    for row, gradients in zip(features, whole_gradients(model, examples, mask), strict=True):
        for layer in layers:
            slot = slots[layer.name]
            size = slot.k_out * slot.k_in
            parts = [gradients[name] for name in layer.parameter_names]
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
    total = torch.zeros(slot.k_out, slot.k_in, dtype=torch.float64)
    for draw in range(slot.draws):
        input_key, output_key = projection_keys(layer, draw)
        r_out, r_in = (
            reference.projection_matrix(slot.kind, k, size, seed, key)
            for k, size, key in zip(
                (slot.k_out, slot.k_in), gradient.shape, (output_key, input_key), strict=True
            )
        )
        total += r_out @ gradient @ r_in.T
    return total.flatten() / slot.draws**0.5


def check_features(
    model: Any, examples: plain.Examples, projection: tm.Projection,
    dtype: torch.dtype | None = None, mask: Any = None,
) -> float:  # fmt: skip
    """The largest error of a row over its norm, for a few examples.

    Raises:
        WrongResult: it is more than rounding.
    """
    some = [examples[row] for row in spaced(len(examples), 3)]
    truth = expected_features(model, some, projection, mask)
    found = tm.collect_features(model, some, projection, head_mask=mask, dtype=dtype)
    errors = (found.double().cpu() - truth).norm(dim=1) / truth.norm(dim=1)
    error = float(errors.max())
    require(
        error <= ROW_ERROR[dtype],
        f"{projection.kind} features, {dtype or torch.float32}, "
        f"{'all heads' if mask is None else f'{mask.size} heads'}: off by {error:.1e} of their "
        f"norm, allowed {ROW_ERROR[dtype]:.0e}; not timed",
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
) -> dict[str, Any]:
    """Seconds of the floor and of ours on the same examples, and shares of the floor.

    Args:
        shape: of `models.SHAPES`.
        device: where it runs; on a GPU the masked passes are in bfloat16, else in float32.
        count: examples.
        naive: also time naive TracIn's gradient on so many examples, one at a time.
        batch_tokens: bound of a batch.
        seconds, rounds: of the measurement, as in `take_turns`.

    Raises:
        WrongResult: features or scores are not what they should be.
    """
    model, examples = to_device(random_model(shape), device), random_examples(count)
    projections = {kind: tm.Projection(DIM, kind) for kind in ("rademacher", "sjlt")}
    masks = {f"heads {kept:.0%}": _random_mask(model, kept) for kept in KEPT_HEADS}
    mask_dtype = torch.bfloat16 if device.type == "cuda" else None
    errors = {
        f"{kind} {name}": check_features(model, examples, projection, dtype)
        for kind, projection in projections.items()
        for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16))
    }
    for name, mask in masks.items():
        errors[name] = check_features(model, examples, projections["rademacher"], mask_dtype, mask)
    fidelity = bfloat16_fidelity(model, examples, projections["rademacher"])

    def ours(kind: str, dtype: torch.dtype | None, mask: Any = None) -> Callable[[], Tensor]:
        return lambda: tm.collect_features(
            model, examples, projections[kind], head_mask=mask, dtype=dtype,
            batch_tokens=batch_tokens,
        )  # fmt: skip

    functions: dict[str, Callable[[], Any]] = floors(model, examples, batch_tokens, device)
    for kind in projections:
        functions[f"{kind} float32"] = ours(kind, None)
        functions[f"{kind} bfloat16"] = ours(kind, torch.bfloat16)
    functions |= {name: ours("rademacher", mask_dtype, mask) for name, mask in masks.items()}
    timed = take_turns(functions, device, seconds=seconds, rounds=rounds)
    full = timed["rademacher bfloat16" if mask_dtype else "rademacher float32"]
    result = {
        "part": "collect", "environment": environment(device), "shape": shape, "examples": count,
        "tokens": sum(len(e["input_ids"]) for e in examples), "batch_tokens": batch_tokens,
        "dim": DIM, "errors": errors, "bfloat16_agreement": fidelity, "seconds": timed,
        **_shares(timed), "heads_share_of_full": {name: timed[name] / full for name in masks},
    }  # fmt: skip
    if naive:
        result["naive"] = naive_beside(model, examples[:naive], timed, count, device)
    return result


def floors(
    model: Any, examples: plain.Examples, batch_tokens: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    """The plain pass in float32, and in bfloat16 by autocast and as a bfloat16 model."""
    batches = plain.ready_batches(model, examples, batch_tokens, device)
    halved = copy.deepcopy(model).bfloat16()
    return {
        "floor float32": lambda: plain.floor_pass(model, batches),
        "floor bfloat16 autocast": lambda: plain.floor_pass(model, batches, torch.bfloat16),
        "floor bfloat16 model": lambda: plain.floor_pass(halved, batches),
    }


def _shares(timed: dict[str, float]) -> dict[str, Any]:
    """Of the float32 floor, and for bfloat16 also of the better bfloat16 one."""
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
    """Cosine scores from features of a bfloat16 pass against those of a float32 pass.

    Raises:
        WrongResult: Spearman per query below 0.99.
    """
    some = [examples[row] for row in spaced(len(examples), 512)]
    queries = spaced(len(some), 64)
    single, half = (
        tm.influence_scores(features[queries], features, normalize="cosine")
        for features in (
            tm.collect_features(model, some, projection, dtype=dtype)
            for dtype in (None, torch.bfloat16)
        )
    )
    found = agreement(half.cpu(), single.cpu())
    require(
        found["spearman"] >= 0.99,
        f"bfloat16 features: Spearman {found['spearman']:.4f} with float32's scores, expected 0.99",
    )
    return found


def naive_beside(
    model: Any, examples: plain.Examples, timed: dict[str, float], count: int, device: torch.device
) -> dict[str, Any]:
    """Seconds per training example: naive TracIn's gradient alone, ours with its scores.

    Naive TracIn's products with the query gradients, for which a base model has no room (P numbers
    each), are left out, in its favour. Ours: the fastest collection, and the scores, rankings and
    all, of `QUERIES` queries.
    """
    batches = list(plain.one_by_one(model, examples, device))

    def gradients(dtype: torch.dtype | None) -> None:
        with plain.parameters_need(model, plain.encoder_names(model)) as parameters:
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
    ours, best = (collecting + scoring) / count, min(naive.values()) / len(batches)
    return {
        "examples": len(batches), "queries": QUERIES,
        "naive_seconds_per_example": {name: one / len(batches) for name, one in naive.items()},
        "ours_seconds_per_example": ours, "scoring_seconds": scoring, "times_naive": best / ours,
    }  # fmt: skip


# --- exact influence at size ----------------------------------------------------------------


def run_exact(
    shape: str, device: torch.device, train: int, query: int, *, bound: float = 60.0
) -> dict[str, Any]:
    """Exact cosine influence of one checkpoint, stopped where it would take too long.

    A tenth by a tenth comes first; a hundred times its time is what the whole may take. If that is
    over 1.5 times the bound, the figure is this extrapolation, and said to be.
    """
    model = to_device(random_model(shape), device)
    trains, queries = random_examples(train, 2), random_examples(query, 3)
    error = check_exact(model, trains, queries)

    def influence(trains: Any, queries: Any) -> Tensor:
        return tm.exact_influence(model, trains, queries, normalize="cosine")

    influence(trains[:32], queries[:32])  # what is loaded on first use
    part = clock(lambda: influence(trains[: train // 10], queries[: query // 10]), device)
    whole = 100 * part <= 1.5 * bound
    elapsed = clock(lambda: influence(trains, queries), device) if whole else 100 * part
    return {
        "part": "exact", "environment": environment(device), "shape": shape, "train": train,
        "query": query, "error": error, "tenth_by_tenth_seconds": part, "seconds": elapsed,
        "extrapolated": not whole, "bound_seconds": bound,
    }  # fmt: skip


def check_exact(model: Any, trains: plain.Examples, queries: plain.Examples) -> float:
    """The largest error of a cosine against float64, for a few examples.

    Raises:
        WrongResult: more than 1e-4.
    """
    some = [[rows[row] for row in spaced(len(rows), 3)] for rows in (trains, queries)]
    found = tm.exact_influence(model, some[0], some[1], normalize="cosine")
    units = [list(map(_unit_row, whole_gradients(model, rows))) for rows in some]
    truth = torch.tensor([[float(q_P @ t_P) for t_P in units[0]] for q_P in units[1]])
    error = float((found.double().cpu() - truth).abs().max())
    require(error <= 1e-4, f"exact influence: a cosine is off by {error:.1e}, allowed 1e-4")
    return error


def _unit_row(gradients: dict[str, Tensor]) -> Tensor:
    row_P = torch.cat([gradient.flatten() for gradient in gradients.values()])
    return row_P.div_(row_P.norm())
