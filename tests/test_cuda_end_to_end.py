"""Whole calculations on a GPU against the same ones on the CPU: order, streams and copies of ops.

The ops themselves are compared with their references in tests/kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tracmod as tm
from tracmod.bench.models import random_examples, random_model

pytestmark = pytest.mark.cuda
TRAIN, QUERY = random_examples(40), random_examples(9, seed=2)


@pytest.fixture
def devices() -> list[str]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if tm.kernels.build_info()["cuda"] is None:
        pytest.skip("built without CUDA")
    return ["cpu", "cuda"]


def features(device: str, examples: Any = TRAIN, **named: Any) -> Tensor:
    """Collect features of a small model, several batches of several lengths."""
    projection = tm.Projection(512)
    return tm.collect_features(
        random_model("tiny"), examples, projection, device=device, batch_tokens=512, **named
    ).cpu()


def assert_rows_close(actual: Tensor, expected: Tensor, allowed: float) -> None:
    errors = (actual.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert errors.max() <= allowed


def test_collection(devices: list[str]) -> None:
    expected, actual = map(features, devices)
    assert_rows_close(actual, expected, 1e-3)
    half = features(devices[1], dtype=torch.bfloat16)
    assert_rows_close(half, expected, 0.1)
    # On another stream than the default one, the hooks of autograd must see the same order.
    if devices[1] == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            assert_rows_close(features(devices[1]), expected, 1e-3)


def test_exact_influence(devices: list[str]) -> None:
    expected, actual = (
        tm.exact_influence(
            random_model("tiny"), TRAIN, QUERY, normalize="cosine", device=device, batch_tokens=512
        ).cpu()
        for device in devices
    )
    assert (actual - expected).abs().max() <= 1e-4


def test_rankings_and_sums_by_group(devices: list[str]) -> None:
    train, query = features("cpu"), features("cpu", QUERY)
    groups = ["de", "en", "es", "ru"] * 10
    expected, actual = (
        tm.top_influences(
            query.to(device), train.to(device), 5, groups=groups, normalize="cosine"
        )
        for device in devices
    )  # fmt: skip
    scores = tm.influence_scores(query, train, normalize="cosine")
    for largest, result in ((True, actual.indices), (False, actual.opponent_indices)):
        best = scores.topk(5, largest=largest).values
        assert (scores.gather(1, result.cpu()) - best).abs().max() <= 1e-5
    assert actual.group_sums is not None
    assert expected.group_sums is not None
    assert (actual.group_sums.cpu() - expected.group_sums.cpu()).abs().max() <= 1e-4


def test_a_masked_view(devices: list[str]) -> None:
    mask = tm.HeadMask.random(2, 4, size=5, seed=1)
    expected, actual = (features(device, head_mask=mask) for device in devices)
    assert_rows_close(actual, expected, 1e-3)
    assert (expected - features("cpu")).norm() > 0.01 * expected.norm()


def test_features_in_the_metric_of_ekfac(devices: list[str]) -> None:
    expected, actual = (
        features(
            device,
            preconditioner=tm.fit_ekfac(
                random_model("tiny"), TRAIN, labels="given", device=device, batch_tokens=512
            ),
        )
        for device in devices
    )
    assert_rows_close(actual, expected, 2e-2)
