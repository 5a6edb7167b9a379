"""Numbers out of range are refused by every public function, found by its annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from tiny_models import tiny_model

import tracmod as tm
from tracmod.attribution.options import AttributionOptions
from tracmod.config import load_config
from tracmod.influence.index import InfluenceIndex

ROWS = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 0}]
FEATURES = torch.eye(4)
NUMBERS = {"int", "int | None", "float", "float | None"}
WRONG_KIND = [True, "3", None, [1], float("nan"), float("inf"), -float("inf")]


def _store(folder: Path, **numbers: Any) -> None:
    with tm.FeatureStore.create(
        folder / "store", ids=["a", "b"], identity={}, **{"dim": 4} | numbers
    ):
        pass


def _blocks(folder: Path, rows: Any) -> None:
    with tm.FeatureStore.create(folder / "store", ids=["a", "b"], identity={}, dim=4) as store:
        store.write_shard(0, torch.ones(2, 4))
    list(tm.FeatureStore.open(folder / "store").blocks(rows))


def _query(folder: Path, **numbers: Any) -> None:
    object.__new__(tm.Attributor).query("a text", **numbers)


def _build_index(folder: Path, **numbers: Any) -> None:
    InfluenceIndex.build([FEATURES], kind="flat", **numbers)


MODEL = tiny_model(layers=1, dtype=torch.float32)
MOMENT = {name: torch.ones_like(value) for name, value in MODEL.named_parameters()}
# The public functions, and a call that is right but for one number.
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Projection": (tm.Projection, lambda folder, **numbers: tm.Projection(**{"dim": 64} | numbers)),
    "HeadMask.full": (
        tm.HeadMask.full,
        lambda folder, **numbers: tm.HeadMask.full(**{"num_layers": 1, "num_heads": 4} | numbers),
    ),
    "HeadMask.random": (
        tm.HeadMask.random,
        lambda folder, **numbers: tm.HeadMask.random(
            **{"num_layers": 1, "num_heads": 4, "size": 2, "seed": 0} | numbers
        ),
    ),
    "ExampleLoss": (tm.ExampleLoss, lambda folder, **numbers: tm.ExampleLoss(**numbers)),
    "metagradient": (
        tm.metagradient,
        lambda folder, **numbers: tm.metagradient(folder / "no run", **numbers),
    ),
    "collect_features": (
        tm.collect_features,
        lambda folder, **numbers: tm.collect_features(MODEL, ROWS, tm.Projection(64), **numbers),
    ),
    "exact_influence": (
        tm.exact_influence,
        lambda folder, **numbers: tm.exact_influence(MODEL, ROWS, ROWS, **numbers),
    ),
    "block_influence": (
        tm.block_influence,
        lambda folder, **numbers: tm.block_influence(MODEL, {"en": ROWS}, {"en": ROWS}, **numbers),
    ),
    "fit_ekfac": (tm.fit_ekfac, lambda folder, **numbers: tm.fit_ekfac(MODEL, ROWS, **numbers)),
    "adam_preconditioner": (
        tm.adam_preconditioner,
        lambda folder, **numbers: tm.adam_preconditioner(MODEL, MOMENT, **numbers),
    ),
    "influence_scores": (
        tm.influence_scores,
        lambda folder, **numbers: tm.influence_scores(FEATURES, FEATURES, **numbers),
    ),
    "self_influence": (
        tm.self_influence,
        lambda folder, **numbers: tm.self_influence(FEATURES, **numbers),
    ),
    "top_influences": (
        tm.top_influences,
        lambda folder, **numbers: tm.top_influences(FEATURES, FEATURES, **numbers),
    ),
    "top_of_scores": (
        tm.top_of_scores,
        lambda folder, **numbers: tm.top_of_scores(FEATURES, **numbers),
    ),
    "Attributor.query": (tm.Attributor.query, _query),
    "Attributor.build_index": (tm.Attributor.build_index, _build_index),
    "FeatureStore.create": (tm.FeatureStore.create, _store),
    "FeatureStore.blocks": (tm.FeatureStore.blocks, _blocks),
}
ARGUMENTS = [
    pytest.param(name, parameter, id=f"{name} {parameter.name}")
    for name, (function, _) in CALLS.items()
    for parameter in inspect.signature(function).parameters.values()
    if str(parameter.annotation) in NUMBERS
]
ZERO_IS_RIGHT = {"seed", "part", "size", "label_smoothing", "disk"}


def _wrong_values(parameter: inspect.Parameter) -> list[Any]:
    annotation, name = str(parameter.annotation), parameter.name
    values = [value for value in WRONG_KIND if not ("None" in annotation and value is None)]
    values += [-1, *([] if name in ZERO_IS_RIGHT else [0])]
    return values + ([0.5, 1.0, 2**70, -(2**70)] if annotation.startswith("int") else [])


@pytest.mark.parametrize(("name", "parameter"), ARGUMENTS)
def test_numbers_out_of_range_are_refused_by_name(tmp_path, name, parameter):
    call = CALLS[name][1]
    for number, value in enumerate(_wrong_values(parameter)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError, match=parameter.name):
            call(folder, **{parameter.name: value})


# Kinds of optional arguments, by annotation, and values of another kind. "no" would count as true.
OTHER_KINDS: dict[str, list[Any]] = {
    "bool": ["no", 0, None],
    "HeadMask | None": ["mask.json", np.ones((1, 4))],
    "Preconditioner | None": ["adam", 3],
    "torch.device | str | None": ["cud", ["cpu"], 2**70],
    "PreTrainedTokenizerBase | None": ["xlm-roberta-base"],
}
CALLED_WITH_OTHERS = [
    pytest.param(call, parameter, id=f"{name} {parameter.name}")
    for name, (function, call) in {
        **CALLS,
        "TracInCallback": (tm.TracInCallback, lambda folder, **given: tm.TracInCallback(**given)),
    }.items()
    for parameter in inspect.signature(function).parameters.values()
    if str(parameter.annotation) in OTHER_KINDS
]


@pytest.mark.parametrize(("call", "parameter"), CALLED_WITH_OTHERS)
def test_arguments_of_another_kind_are_refused_by_name(tmp_path, call, parameter):
    for value in OTHER_KINDS[str(parameter.annotation)]:
        with pytest.raises(ValueError, match=parameter.name):
            call(tmp_path, **{parameter.name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tm.collect_features(MODEL, None, tm.Projection(64)), "dataset.*NoneType"),
        (lambda: tm.collect_features(MODEL, ROWS, 4096), "projection.*4096"),
        (lambda: tm.exact_influence(MODEL, ROWS, 5), "query.*int"),
        (lambda: tm.block_influence(MODEL, ROWS, ROWS), "train.*list"),
        (lambda: tm.adam_preconditioner(MODEL, None), "second_moment.*None"),
        (lambda: tm.HeadMask([[1, 0], [1]]), "head mask"),
        (lambda: tm.save_masked(MODEL, "mask.json", "nowhere"), "mask.*mask.json"),
        (lambda: tm.ExampleLoss(class_weights=[True, False]), "class_weights.*True"),
    ],
)
def test_needed_arguments_of_another_kind_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("k", [*WRONG_KIND, 0, -1, 0.5, 2**70]),
        ("projection_dim", [value for value in WRONG_KIND if value is not None] + [0, -1, 1.0]),
        ("share_error", [*WRONG_KIND, 0, -0.5]),
        ("seed", [*WRONG_KIND, -1, 2**70]),
        ("max_length", [True, "3", [1], float("nan"), 1.0, 0, -1, 2**70]),
        ("batch_tokens", [*WRONG_KIND, 0, -1]),
        ("memory", [*WRONG_KIND, 0, -1]),
        ("parameters", ["most", None, 1, [], [""], [1], b"all"]),
        ("preconditioner", ["sgd", None]),
        ("normalize", ["none", "l2", True]),
        ("dtype", ["float64", torch.float32, None]),
        ("store_dtype", ["int4", None]),
        ("columns", ["text_a=premise", {"body": "x"}, {"text_a": ""}, {"text_a": None}]),
        ("language", ["", " ", 3]),
    ],
)  # fmt: skip
def test_options_of_an_attribution_are_checked_when_they_are_made(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            AttributionOptions(
                "model", Path("train.tsv"), Path("query.tsv"), Path("out"), **{name: value}
            )


def _numbers(section: pydantic.BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and value of every setting that is a number, sections within it included."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, pydantic.BaseModel):
            yield from _numbers(value, f"{prefix}{name}.")
        elif type(value) in (int, float):
            yield prefix + name, value


@pytest.mark.parametrize("name", [name for name, _ in _numbers(load_config("demo", []))])
def test_numbers_of_a_configuration_are_numbers_within_bounds(name):
    for value in ("true", "'3'", ".nan", ".inf", str(-(2**70)), str(2**70), "[[1]]", "-1.5"):
        if value == str(2**70) and isinstance(dict(_numbers(load_config("demo", [])))[name], float):
            continue
        with pytest.raises(ValueError, match=name):
            load_config("demo", [f"{name}={value}"])


def test_every_public_function_is_tried():
    tried = {name.partition(".")[0] for name in CALLS}
    for name in set(tm.__all__) - tried:
        function = getattr(tm, name)
        if not callable(function):
            continue
        parameters = inspect.signature(function).parameters.values()
        assert not [p.name for p in parameters if str(p.annotation) in NUMBERS], name


def test_numbers_of_numpy_are_numbers():
    top = tm.top_influences(FEATURES, FEATURES, np.int64(2))
    assert top.indices.shape == (4, 2)
    assert tm.Projection(np.int32(64)) == tm.Projection(64)
