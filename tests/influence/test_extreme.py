"""Rows and gradients whose squares float32 cannot represent: right, or refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from encoders import ragged_examples, tiny_encoder

import tracmod as tm
from tracmod.features.store import FeatureStore
from tracmod.influence.index import InfluenceIndex
from tracmod.influence.scores import without_examples
from tracmod.validation.gradients import autograd_gradients

SCALES = [1e-42, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37]
Q, N, K = 3, 20, 40


def features(count, seed, scale, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, K, generator=generator, dtype=torch.float64) * scale).to(dtype)


def cosines(query_QK, train_NK):
    query_QK, train_NK = (
        rows.double() / rows.double().norm(dim=1, keepdim=True) for rows in (query_QK, train_NK)
    )
    return query_QK @ train_NK.T


def dense(top, count=N):
    return torch.empty(len(top.scores), count).scatter_(1, top.indices, top.scores)


def stores(folder, *sides, dtype="float32"):
    opened = []
    for number, rows in enumerate(sides):
        ids = [str(row) for row in range(len(rows))]
        path = folder / f"{dtype}-{number}"
        with FeatureStore.create(path, ids=ids, dim=K, identity={}, dtype=dtype) as store:
            store.write_shard(0, rows)
        opened.append(store)
    return opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", SCALES[1:])
def test_cosines_do_not_depend_on_the_magnitude(scale, dtype, tmp_path):
    query_QK, train_NK = features(Q, 0, scale, dtype), features(N, 1, scale, dtype)
    train_NK[::3] = features(N, 2, 1, dtype)[::3]  # ordinary rows between them
    expected_QN = cosines(query_QK, train_NK)
    on_disk = stores(tmp_path, query_QK, train_NK, dtype=str(dtype).removeprefix("torch."))
    index = InfluenceIndex.build([train_NK], normalize="cosine").search([query_QK], N)
    for scores_QN in (
        tm.influence_scores(query_QK, train_NK, normalize="cosine"),
        dense(tm.top_influences(query_QK, train_NK, N, normalize="cosine")),
        dense(tm.top_influences(*on_disk, N, normalize="cosine")),
        dense(index),
    ):
        assert (scores_QN - expected_QN).abs().max() < 1e-5


def test_denormal_float32_rows_are_right():
    query_QK, train_NK = features(Q, 0, SCALES[0]), features(N, 1, SCALES[0])
    scores_QN = dense(tm.top_influences(query_QK, train_NK, N, normalize="cosine"))
    assert (scores_QN - cosines(query_QK, train_NK)).abs().max() < 1e-5


@pytest.mark.parametrize("scale", SCALES)
def test_inner_products_that_float32_cannot_represent_are_refused(scale, tmp_path):
    query_QK, train_NK = features(Q, 0, scale), features(N, 1, scale)
    query_QK[0] = 0  # not to blame
    for run in (
        lambda: tm.influence_scores(query_QK, train_NK),
        lambda: tm.top_influences(query_QK, train_NK, 5),
        lambda: tm.top_influences(query_QK, train_NK, 5, opponents=False),
        lambda: tm.top_influences(*stores(tmp_path, query_QK, train_NK), 5),
    ):
        with pytest.raises(ValueError, match=r"query_features: row 1: .*float32"):
            run()
    with pytest.raises(ValueError, match=r"index.*largest number"):
        InfluenceIndex.build([train_NK])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_rows_among_ordinary_ones_are_right(scale):
    query_QK, train_NK = features(Q, 0, 1), features(N, 1, 1)
    query_QK[1] *= scale
    expected_QN = query_QK.double() @ train_NK.double().T
    groups = [row % 2 for row in range(N)]
    top = tm.top_influences(query_QK, train_NK, N, groups=groups)
    for scores_QN in (dense(top), tm.influence_scores(query_QK, train_NK)):
        error_QN = (scores_QN - expected_QN).abs() / expected_QN.abs().amax(dim=1, keepdim=True)
        assert error_QN.max() < 1e-5
    sums_QG = torch.stack([expected_QN[:, ::2].sum(dim=1), expected_QN[:, 1::2].sum(dim=1)], dim=1)
    assert ((top.group_sums - sums_QG).abs() < 1e-4 * sums_QG.abs().amax(dim=1)[:, None]).all()
    without = without_examples(top, [[], [0], []], query_QK, train_NK, 5, groups)
    expected_sum = sums_QG[1, 0] - expected_QN[1, 0]
    assert float(without.group_sums[1, 0]) == pytest.approx(float(expected_sum), rel=1e-3)
    assert torch.allclose(tm.self_influence(query_QK), query_QK.double().square().sum(dim=1))


def test_rows_of_zeros_and_orthogonal_rows_are_scored_zero():
    query_QK, train_NK = torch.zeros(2, K), torch.zeros(N, K)
    query_QK[1, 0], train_NK[:, 1] = 1.0, 1.0
    for normalize in (None, "cosine"):
        assert not tm.influence_scores(query_QK, train_NK, normalize=normalize).any()
        assert not tm.top_influences(query_QK, train_NK, 5, normalize=normalize).scores.any()


@pytest.mark.parametrize(("dtype", "scale"), [("int8", 1e-41), ("float16", 1e-8), ("float16", 1e9)])
def test_a_store_refuses_rows_that_its_dtype_cannot_hold(dtype, scale, tmp_path):
    rows = features(4, 0, 1)
    rows[2] *= scale
    with pytest.raises(ValueError, match=rf"'2'.*{dtype}"):
        stores(tmp_path, rows, dtype=dtype)
    rows[2] = 0
    stores(tmp_path, rows, dtype=f"{dtype}")


@pytest.mark.parametrize("probability", [1e-20, 1e-25, 1e-32])
def test_exact_cosines_of_gradients_that_are_almost_zero(probability):
    """An example of whose label the model is certain has a gradient of about this norm."""
    model, examples = tiny_encoder("bert"), ragged_examples(7)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, *[math.log(probability)] * 2]))
    for row, example in enumerate(examples):
        example["labels"] = row % 2
    double = copy.deepcopy(model).double()
    names = [name for name, _ in model.named_parameters() if "embeddings" not in name]
    gradients_NP = torch.stack(
        [
            torch.cat([g.flatten() for g in autograd_gradients(double, example, names).values()])
            for example in examples
        ]
    )
    norms_N = gradients_NP.norm(dim=1)
    assert norms_N[0] < 1e-18
    assert norms_N[1] > 1e-3
    exact = tm.exact_influence(model, examples, examples, normalize="cosine")
    assert (exact - cosines(gradients_NP, gradients_NP)).abs().max() < 1e-4
    table = tm.block_influence(
        model, {"en": examples[:1]}, {"en": examples[2:3]}, normalize="cosine"
    )
    expected = cosines(gradients_NP[:1], gradients_NP[2:3])
    assert sum(table["influence"].to_pylist()) == pytest.approx(float(expected), abs=1e-4)
    products = tm.exact_influence(model, examples, examples[1:2])[0]
    expected_N = gradients_NP @ gradients_NP[1]
    assert torch.allclose(products.double(), expected_N, rtol=1e-3)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0], r"weights.*\[0.0, 0.0\]"),
        ([1e-50, 0.0], r"weights.*1e-50"),
        ([0.1, -0.2], r"weights.*got -0.2"),
        ([0.1, float("nan")], r"weights.*got nan"),
        ([0.1, float("inf")], r"weights.*got inf"),
        ([0.1, 1e300], r"weights.*got 1e\+300"),
        ([0.1], r"weights: expected 2.*got 1"),
        (0.5, r"weights.*list of numbers, got 0.5"),
        ("12", r"weights.*list of numbers, got '12'"),
        (["a", "b"], r"weights.*list of numbers"),
        (["0.5", "1"], r"weights.*list of numbers.*'0.5'"),
        ([True, False], r"weights.*list of numbers.*True"),
        ({500: 0.1, 1000: 0.2}, r"weights.*list of numbers.*500"),
        ({0.1, 0.2}, r"weights.*list of numbers"),
        ([], r"weights"),
    ],
)
def test_weights_that_make_no_scores_are_refused(weights, message):
    two = [features(3, 0, 1), features(3, 1, 1)]
    for run in (
        lambda: tm.influence_scores(two, two, weights),
        lambda: tm.top_influences(two, two, 2, weights=weights),
        lambda: tm.self_influence(two, weights),
        lambda: InfluenceIndex.build(two, weights=weights),
    ):
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e39, 1e300])
@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_rows_of_float64_that_float32_cannot_hold_are_refused(scale, normalize):
    rows, good = features(N, 0, 1, torch.float64), features(N, 1, 1, torch.float64)
    rows[7] *= scale
    for call, name in (
        (lambda: tm.influence_scores(rows, good, normalize=normalize), "query_features"),
        (lambda: tm.top_influences(good, rows.numpy(), normalize=normalize), "train_features"),
        (lambda: tm.self_influence([good, rows]), "features: checkpoint 1"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*row 7.*float32"):
            call()
    rows[7] = 0  # a zero gradient is none of them
    assert tm.influence_scores(rows, good, normalize=normalize)[7].eq(0).all()


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "int64"),
        (torch.ones(2, 3, dtype=torch.bool), "bool"),
        (torch.ones(2, 3, dtype=torch.complex64), "complex64"),
        (np.array([[1.0, None]]), "object"),
        ([[[1.0, 2.0]]], "list"),
        (torch.ones(2, 0), r"\(2, 0\)"),
        ("features", "str"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_features_is_refused(rows, got):
    for call, name in (
        (lambda: tm.influence_scores(rows, rows), "query_features"),
        (lambda: tm.top_influences(torch.ones(2, 3), rows), "train_features"),
        (lambda: tm.self_influence(rows), "features"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{got}"):
            call()


def test_an_array_that_is_read_backwards_is_right():
    rows = features(N, 0, 1).numpy()
    expected_NN = tm.influence_scores(rows[:, ::-1].copy(), rows)
    assert torch.equal(tm.influence_scores(rows[:, ::-1], rows), expected_NN)
