"""Scores, top-k and group sums against brute force in float64."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

import tracmod as tm
from tracmod.influence.scores import without_examples


def features(count, seed, checkpoints=3, dim=33):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, dim, generator=generator) for _ in range(checkpoints)]


def brute_force(query, train, weights, normalize):
    total = torch.zeros(len(query[0]), len(train[0]), dtype=torch.float64)
    for q, t, weight in zip(query, train, weights, strict=True):
        q, t = q.double(), t.double()
        if normalize:
            q, t = (torch.nn.functional.normalize(rows, dim=1) for rows in (q, t))
        total += weight * q @ t.T
    return total


@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1e-3]])
def test_scores_are_the_weighted_sum_over_checkpoints(normalize, weights):
    query, train = features(7, 1), features(31, 2)
    expected = brute_force(query, train, weights or [1, 1, 1], normalize)
    scores = tm.influence_scores(query, train, weights, normalize)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    top = tm.top_influences(query, train, k=5, weights=weights, normalize=normalize)
    torch.testing.assert_close(top.scores.double(), expected.topk(5).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        top.opponent_scores.double(), -(-expected).topk(5).values, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(top.indices.cpu(), expected.topk(5).indices)
    assert top.group_sums is None


@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_without_opponents_the_proponents_are_the_same(normalize):
    query, train = features(11, 1), features(64, 2)
    groups = [row % 3 for row in range(64)]
    arguments = {"k": 6, "groups": groups, "weights": [1, 0.5, 2], "normalize": normalize}
    both = tm.top_influences(query, train, **arguments)
    some = tm.top_influences(query, train, **arguments, opponents=False)
    for name in ("indices", "scores", "group_sums", "group_shares"):
        assert torch.equal(getattr(some, name), getattr(both, name)), name
    assert some.opponent_indices.shape == some.opponent_scores.shape == (11, 0)
    assert both.opponent_group_shares is not None
    assert some.opponent_group_shares is None
    left_out = [[int(row)] for row in both.indices[:, 0]]
    rest = without_examples(some, left_out, query, train, 5, groups, [1, 0.5, 2], normalize)
    assert torch.equal(rest.indices, both.indices[:, 1:])
    assert rest.opponent_indices.shape == (11, 0)


def test_rankings_of_dense_scores_are_those_of_the_search():
    query, train = features(11, 1), features(64, 2)
    scores = tm.influence_scores(query, train)
    searched = tm.top_influences(query, train, 6)
    for opponents in (True, False):
        top = tm.top_of_scores(scores, 6, opponents=opponents)
        assert torch.equal(top.indices, searched.indices)
        assert torch.equal(top.scores, scores.gather(1, top.indices))
        assert torch.equal(top.opponent_indices, searched.opponent_indices[:, : 6 * opponents])


def test_one_tensor_is_one_checkpoint():
    query, train = features(3, 1, 1)[0], features(9, 2, 1)[0]
    torch.testing.assert_close(tm.influence_scores(query, train), query @ train.T)


@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize(
    ("convert_query", "convert_train"),
    [
        (torch.Tensor.double, torch.Tensor.double),
        (torch.Tensor.half, torch.Tensor.half),
        (torch.Tensor.bfloat16, torch.Tensor.bfloat16),
        (torch.Tensor.bfloat16, torch.Tensor.float),
        (torch.Tensor.float, torch.Tensor.half),
        (lambda rows: rows.repeat(1, 2)[:, ::2], lambda rows: rows.T.contiguous().T),
        (torch.Tensor.numpy, lambda rows: rows.double().numpy()),
    ],
)
def test_features_of_any_kind_are_accepted(convert_query, convert_train, normalize):
    query = [convert_query(rows) for rows in features(4, 1, dim=32)]
    train = [convert_train(rows) for rows in features(9, 2, dim=32)]
    tensors = [[torch.as_tensor(rows) for rows in side] for side in (query, train)]
    expected = brute_force(*tensors, [1, 1, 1], normalize)
    scores = tm.influence_scores(query, train, normalize=normalize)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    top = tm.top_influences(query, train, 9, normalize=normalize)
    torch.testing.assert_close(top.scores, scores.gather(1, top.indices), rtol=1e-5, atol=1e-5)
    top = tm.top_influences(query[0], train[0], 9, normalize=normalize)
    scores = tm.influence_scores(query[0], train[0], normalize=normalize)
    torch.testing.assert_close(top.scores, scores.gather(1, top.indices), rtol=1e-5, atol=1e-5)


def test_positive_scores_lower_the_loss():
    """A small step of gradient descent on a proponent lowers the query's loss."""
    from encoders import ragged_examples, tiny_encoder

    from tracmod.models.inputs import collate
    from tracmod.models.loss import per_example_loss

    examples = ragged_examples(12)
    model = tiny_encoder()

    def loss(model, example):
        batch = collate([example], 1)
        return per_example_loss(model(**{**batch, "labels": None}).logits, batch["labels"]).sum()

    scores = tm.exact_influence(model, examples, examples[:1], "all")[0]
    for row in (int(scores[1:].argmax()) + 1, int(scores[1:].argmin()) + 1):
        model = tiny_encoder()
        before = loss(model, examples[0])
        loss(model, examples[row]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-4 * parameter.grad
        change = float(loss(model, examples[0]).detach() - before.detach())
        assert change * float(scores[row]) < 0
        assert change == pytest.approx(-1e-4 * float(scores[row]), rel=0.2)


def test_groups_have_names_sums_and_shares():
    query, train = features(4, 1), features(40, 2)
    groups = [["de", "en", "zh"][row % 3] for row in range(40)]
    top = tm.top_influences(query, train, k=10, groups=groups)
    scores = brute_force(query, train, [1, 1, 1], None)
    assert top.group_names == ["de", "en", "zh"]
    for column, name in enumerate(top.group_names):
        rows = [row for row, group in enumerate(groups) if group == name]
        torch.testing.assert_close(
            top.group_sums[:, column], scores[:, rows].sum(1), rtol=1e-5, atol=1e-4
        )
        for shares, indices in (
            (top.group_shares, top.indices),
            (top.opponent_group_shares, top.opponent_indices),
        ):
            expected = [sum(groups[i] == name for i in row) / 10 for row in indices.tolist()]
            assert shares[:, column].tolist() == pytest.approx(expected)
    torch.testing.assert_close(top.group_shares.sum(1), torch.ones(4).double())


def test_integer_groups_may_be_a_tensor():
    top = tm.top_influences(features(2, 1), features(8, 2), 3, torch.tensor([7, 7, 2, 2] * 2))
    assert top.group_names == [2, 7]


def test_top_of_scores_is_top_influences():
    query, train = features(5, 1, 1), features(30, 2, 1)
    groups = [row % 4 for row in range(30)]
    top = tm.top_influences(query, train, 6, groups)
    ranked = tm.top_of_scores(tm.influence_scores(query, train), 6, groups)
    for name in ("indices", "opponent_indices"):
        assert torch.equal(getattr(top, name), getattr(ranked, name))
    for name in ("scores", "opponent_scores", "group_sums", "group_shares"):
        torch.testing.assert_close(getattr(top, name), getattr(ranked, name), rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lower_index():
    train = torch.ones(9, 4)
    top = tm.top_influences(torch.ones(2, 4), train, 3)
    assert top.indices.tolist() == [[0, 1, 2]] * 2
    assert top.opponent_indices.tolist() == [[0, 1, 2]] * 2
    assert tm.top_of_scores(torch.ones(2, 9), 3).indices.tolist() == [[0, 1, 2]] * 2


def test_k_is_lowered_to_the_number_of_training_examples():
    top = tm.top_influences(features(2, 1), features(3, 2), k=100)
    assert top.indices.shape == (2, 3)
    assert sorted(top.indices[0].tolist()) == [0, 1, 2]


def test_a_zero_gradient_has_cosine_zero():
    query, train = torch.zeros(1, 4), torch.randn(3, 4)
    assert tm.influence_scores(query, train, normalize="cosine").tolist() == [[0, 0, 0]]
    assert tm.top_influences(query, train, 1, normalize="cosine").scores.tolist() == [[0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_features": features(5, 2, 2)}, "query_features.*train_features.*got 3 and 2"),
        ({"weights": [1.0]}, r"weights.*\b3\b.*got 1"),
        ({"normalize": "l2"}, "normalize.*'l2'"),
        ({"train_features": features(5, 2, 3, dim=8)}, r"train_features.*\(5, 33\).*got \(5, 8\)"),
        ({"k": 0}, r"k.*\b1\b.*got 0"),
        ({"groups": ["a"]}, r"groups.*\b5\b.*got 1"),
        ({"train_features": features(0, 2)}, r"train_features.*\b1\b.*none"),
    ],
)
def test_invalid_arguments_are_named(arguments, message):
    good = {"query_features": features(2, 1), "train_features": features(5, 2)}
    with pytest.raises(ValueError, match=message):
        tm.top_influences(**(good | arguments))


@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_without_examples_equals_a_search_in_the_remaining_examples(normalize):
    query, train = features(5, 1), features(20, 2)
    groups = [["de", "en", "zh"][row % 3] for row in range(20)]
    weights = [0.5, 2.0, 1e-3]
    left_out = [[], [3], [0, 19, 7], [3], [5, 6]]
    top = tm.top_influences(query, train, 4 + 3, groups, weights, normalize)
    rest = without_examples(top, left_out, query, train, 4, groups, weights, normalize)
    for row, rows in enumerate(left_out):
        remaining = [n for n in range(20) if n not in rows]
        expected = tm.top_influences(
            [checkpoint[row : row + 1] for checkpoint in query],
            [checkpoint[remaining] for checkpoint in train],
            4,
            [groups[n] for n in remaining],
            weights,
            normalize,
        )
        for name in ("indices", "opponent_indices"):
            original = [remaining[n] for n in getattr(expected, name)[0].tolist()]
            assert getattr(rest, name)[row].tolist() == original
        for name in ("scores", "opponent_scores", "group_sums", "group_shares"):
            torch.testing.assert_close(
                getattr(rest, name)[row], getattr(expected, name)[0], rtol=1e-5, atol=1e-5
            )


def test_without_examples_lowers_k_to_what_is_left_and_refuses_short_rankings():
    query, train = features(2, 1), features(5, 2)
    top = tm.top_influences(query, train, 100)
    rest = without_examples(top, [[0, 1], []], query, train, 100)
    assert sorted(rest.indices[0].tolist()) == [2, 3, 4]
    assert rest.indices.shape == (2, 3)
    assert rest.group_sums is None
    with pytest.raises(ValueError, match=r"top.*\b4\b.*got 3"):
        without_examples(tm.top_influences(query, train, 3), [[0], []], query, train, 3)
    with pytest.raises(ValueError, match=r"left_out.*\b2\b.*got 1"):
        without_examples(top, [[0]], query, train, 3)
    with pytest.raises(ValueError, match=r"train_features.*none"):
        without_examples(top, [list(range(5)), []], query, train, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["query_features", "train_features"])
def test_rows_that_are_not_finite_are_refused_by_number(side, dtype, value):
    features = {name: [torch.ones(9, 5, dtype=dtype)] * 2 for name in (
        "query_features", "train_features")}  # fmt: skip
    wrong = torch.ones(9, 5, dtype=dtype)
    wrong[7, 2] = value
    features[side] = [features[side][0], wrong]
    for function in (tm.influence_scores, tm.top_influences):
        for normalize in (None, "cosine"):
            with pytest.raises(ValueError, match=f"{side}: checkpoint 1: row 7"):
                function(**features, normalize=normalize)
    with pytest.raises(ValueError, match="checkpoint 1: row 7"):
        tm.self_influence(features[side])
    with pytest.raises(ValueError, match="row 7"):
        tm.influence_scores(wrong.float().numpy(), wrong.float().numpy())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["de", None, "en"], r"row 1.*None"),
        (["de", float("nan"), "en"], r"row 1.*nan"),
        (["de", ["en"], "en"], r"row 1.*\['en'\]"),
        (["de", 1, "en"], r"int and str"),
        ({"de", "en", "es"}, r"list"),
        ({"de": 0, "en": 1, "es": 2}, r"list"),
        ("abc", r"list.*'abc'"),
        (3, r"list.*3"),
        (torch.zeros(3, 2), r"row 0"),
    ],
)
def test_groups_that_are_no_names_are_refused(groups, message):
    with pytest.raises(ValueError, match=f"groups.*{message}"):
        tm.top_influences(torch.eye(3), torch.eye(3), groups=groups)


def test_groups_may_be_a_column_of_arrow_or_of_numpy():
    names = ["de", "en", "de"]
    for groups in (pa.chunked_array([names]), np.array(names)):
        top = tm.top_influences(torch.eye(3), torch.eye(3), groups=groups)
        assert top.group_names == ["de", "en"]
        assert top.group_sums.tolist() == [[1, 0], [0, 1], [1, 0]]
