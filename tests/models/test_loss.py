"""ExampleLoss: against transformers' own losses, and what it refuses."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from encoders import ragged_examples, tiny_encoder
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

import tracmod as tm
from tracmod.models.inputs import collate, pad_token_id
from tracmod.models.loss import as_loss, own_loss, stated_loss
from tracmod.validation.gradients import check_gradients, reference_loss

LOGITS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 2, 2, 0, 1, 2])
SEVERAL = torch.tensor(
    [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 1]]
)
TARGETS = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses_of_one(module, labels):
    """Return a batch loss of torch or transformers for batches of one example."""
    return torch.stack(
        [module(LOGITS[row : row + 1], labels[row : row + 1]) for row in range(len(LOGITS))]
    )


@pytest.mark.parametrize("smoothing", [0.1, 0.5, 1.0])
def test_label_smoothing_is_the_trainers(smoothing):
    def smoother(logits, labels):
        return LabelSmoother(smoothing)({"logits": logits}, labels)

    losses = tm.ExampleLoss(label_smoothing=smoothing)(LOGITS, CLASSES)
    torch.testing.assert_close(losses, losses_of_one(smoother, CLASSES))


def test_class_weights_multiply_the_loss_of_their_class():
    weights = [0.5, 2.0, 0.0]
    losses = tm.ExampleLoss(class_weights=weights)(LOGITS, CLASSES)
    plain = losses_of_one(nn.CrossEntropyLoss(), CLASSES)
    torch.testing.assert_close(losses, plain * torch.tensor(weights, dtype=torch.float64)[CLASSES])
    smoothed = tm.ExampleLoss(class_weights=torch.tensor(weights), label_smoothing=0.2)
    expected = nn.CrossEntropyLoss(LOGITS.new_tensor(weights), reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(smoothed(LOGITS, CLASSES), losses_of_one(expected, CLASSES))


def test_several_labels_and_targets_are_means_over_the_outputs():
    losses = tm.ExampleLoss("binary_cross_entropy")(LOGITS, SEVERAL)
    expected = losses_of_one(nn.BCEWithLogitsLoss(), SEVERAL.double())
    torch.testing.assert_close(losses, expected)
    weights = [1.0, 3.0, 0.5]
    weighted = tm.ExampleLoss("binary_cross_entropy", pos_weight=weights)(LOGITS, SEVERAL)
    module = nn.BCEWithLogitsLoss(pos_weight=LOGITS.new_tensor(weights))
    torch.testing.assert_close(weighted, losses_of_one(module, SEVERAL.double()))
    losses = tm.ExampleLoss("squared_error")(LOGITS, TARGETS)
    torch.testing.assert_close(losses, losses_of_one(nn.MSELoss(), TARGETS))


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"num_labels": 3}, [0, 2, 1]),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, [0, 2, 1]),
        ({"num_labels": 1}, [0.25, -2.75, 3.0]),
        ({"num_labels": 3, "problem_type": "regression"}, [[0.5, 1.0, -2.0]] * 3),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [[0, 1, 1], [0, 0, 0], [1, 0, 0]],
        ),
        ({"num_labels": 3}, [[0.0, 1.0, 1.0], [0.0, 0.5, 0.0], [1.0, 0.0, 0.0]]),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, [[1], [0], [1]]),
    ],
)
def test_gradients_are_those_of_the_loss_that_transformers_returns(config, labels):
    """Features with an exact projection, and the check, against `model(labels=...).loss`."""
    model = tiny_encoder("bert", **config)
    examples = [
        row | {"labels": label} for row, label in zip(ragged_examples(3), labels, strict=True)
    ]
    scores = tm.exact_influence(model, examples, examples)
    double = tiny_encoder("bert", **config).double()
    double.load_state_dict(model.state_dict())
    selected = [p for name, p in double.named_parameters() if ".embeddings." not in name]
    rows = []
    for example in examples:
        batch = collate([example], pad_token_id(double))
        if torch.tensor(example["labels"]).dim() or config["num_labels"] == 1:
            batch["labels"] = batch["labels"].double()
        gradients = torch.autograd.grad(double(**batch).loss, selected)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)
    before = model.config.problem_type
    assert all(error.passed for error in check_gradients(model, examples))
    assert model.config.problem_type == before


@pytest.mark.parametrize(
    "loss",
    [
        tm.ExampleLoss(label_smoothing=0.3),
        tm.ExampleLoss(class_weights=[0.1, 1, 4]),
        tm.ExampleLoss(class_weights=[0.1, 1, 4], label_smoothing=0.3),
        functools.partial(nn.functional.cross_entropy, reduction="none", label_smoothing=0.2),
    ],
)
def test_the_engine_follows_a_stated_loss(loss):
    model, examples = tiny_encoder("bert"), ragged_examples(5)
    assert all(error.passed for error in check_gradients(model, examples, loss=loss))
    plain = tm.exact_influence(model, examples, examples)
    stated = tm.exact_influence(model, examples, examples, loss=loss)
    assert (plain - stated).abs().max() > 0.01 * plain.abs().max()
    plain_rows, stated_rows = (
        tm.collect_features(model, examples, tm.Projection(50_000), loss=chosen)
        for chosen in (None, loss)
    )
    measured = tm.exact_influence(model, examples, examples, loss=loss, query_loss=tm.ExampleLoss())
    products, size = plain_rows @ stated_rows.T, float(measured.abs().max())
    torch.testing.assert_close(products, measured, rtol=0.1, atol=0.1 * size)


def test_a_wrong_loss_of_the_engine_fails_the_check(monkeypatch):
    monkeypatch.setattr(tm.ExampleLoss, "__call__", lambda _, logits, labels: logits.sum(dim=1))
    model = tiny_encoder("bert")
    assert not all(error.passed for error in check_gradients(model, ragged_examples(2)))


def test_the_yardstick_is_not_our_function(monkeypatch):
    monkeypatch.setattr(tm.ExampleLoss, "__call__", lambda *_: pytest.fail("our function"))
    model, (example,) = tiny_encoder("bert"), ragged_examples(1)
    batch = collate([example], pad_token_id(model))
    for loss in (
        tm.ExampleLoss(),
        tm.ExampleLoss(label_smoothing=0.1),
        tm.ExampleLoss(class_weights=[1, 2, 3]),
        tm.ExampleLoss("squared_error"),
        tm.ExampleLoss("binary_cross_entropy", pos_weight=[1, 2, 3]),
    ):
        labels = batch["labels"] if loss.kind == "cross_entropy" else torch.ones(1, 3)
        assert reference_loss(model, {**batch, "labels": labels}, loss).isfinite()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (nn.functional.cross_entropy, r"\(3,\), got \(\)"),
        (lambda z, y: nn.functional.cross_entropy(z, y, reduction="none") / len(y), "own row"),
        (lambda z, y: z.detach().sum(dim=1), "no gradient"),
        (lambda z, y: (z - y).square().mean(dim=1).view(7), "fails with"),
        (3, "got 3"),
    ],
)
def test_functions_that_are_no_loss_per_example_are_refused(function, message):
    with pytest.raises(ValueError, match=f"loss.*{message}"):
        tm.collect_features(
            tiny_encoder("bert"), ragged_examples(4), tm.Projection(64), loss=function
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hinge"}, "hinge"),
        ({"label_smoothing": 1.5}, "label_smoothing.*1.5"),
        ({"label_smoothing": float("nan")}, "label_smoothing.*nan"),
        ({"class_weights": [1, -1]}, "class_weights.*-1"),
        ({"class_weights": [0, 0]}, "class_weights.*0"),
        ({"class_weights": 3}, "class_weights.*3"),
        ({"kind": "squared_error", "label_smoothing": 0.1}, "label_smoothing.*squared_error"),
        ({"kind": "cross_entropy", "pos_weight": [1, 2]}, "pos_weight.*cross_entropy"),
        ({"kind": "function"}, "function.*None"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tm.ExampleLoss(**settings)


@pytest.mark.parametrize(
    ("config", "loss", "label", "message"),
    [
        ({}, {"class_weights": [1, 2]}, 0, "class_weights: expected 3 .*got 2"),
        ({"num_labels": 1}, {}, 0, "cross_entropy.*got 1"),
        ({}, {"kind": "binary_cross_entropy"}, [0, 1], r"3 numbers.*\[0, 1\]"),
        ({}, {"kind": "binary_cross_entropy"}, [0, 1, 2], r"0 to 1, got \[0, 1, 2\]"),
        ({}, {"kind": "squared_error"}, [0.5, float("inf"), 1], "list of 3 numbers.*inf"),
        ({}, None, [1, 0, 1], r"integer label.*\[1, 0, 1\]"),
        ({"problem_type": "ranking"}, None, 0, "problem_type.*'ranking'"),
    ],
)
def test_labels_and_models_that_a_loss_does_not_fit_are_refused(config, loss, label, message):
    model = tiny_encoder("bert", **{key: v for key, v in config.items() if key != "problem_type"})
    if "problem_type" in config:
        model.config.__dict__["problem_type"] = config["problem_type"]
    rows = [{"input_ids": [5, 6], "labels": label}]
    given = None if loss is None else tm.ExampleLoss(**loss)
    with pytest.raises(ValueError, match=message):
        tm.collect_features(model, rows, tm.Projection(64), loss=given)


def test_plain_losses_leave_identities_as_they_were():
    assert tm.ExampleLoss().identity is None
    assert tm.ExampleLoss("squared_error").identity is None
    smoothed = tm.ExampleLoss(label_smoothing=0.1)
    assert smoothed.identity == {"kind": "cross_entropy", "label_smoothing": 0.1}
    assert smoothed.measured == tm.ExampleLoss()
    assert tm.ExampleLoss("binary_cross_entropy").identity is not None


@pytest.mark.parametrize(
    "loss",
    [
        tm.ExampleLoss(),
        tm.ExampleLoss(label_smoothing=0.1, class_weights=[1, 2.5]),
        tm.ExampleLoss("binary_cross_entropy", pos_weight=[1, 2]),
    ],
)
def test_a_loss_is_the_same_after_json(loss):
    assert tm.ExampleLoss.from_json(json.loads(json.dumps(loss.to_json()))) == loss


def test_functions_have_an_identity_of_their_own():
    def scaled(factor):
        return lambda logits, labels: factor * logits.sum(dim=1)

    one, two, again = (as_loss(scaled(factor)).identity for factor in (1, 2, 1))
    assert one == again
    assert one != two
    with pytest.raises(ValueError, match="function"):
        tm.ExampleLoss.from_json(one)


def test_options_state_a_loss():
    names = ["neg", "a=b"]
    assert stated_loss(None, None, None, names) is None
    assert stated_loss(None, 0.0, None, names) == tm.ExampleLoss()
    weighted = tm.ExampleLoss(class_weights=[1, 3])
    assert stated_loss(None, None, "a=b=3, neg=1", names) == weighted
    assert stated_loss("cross_entropy", None, "1,3", names) == weighted
    for text in ("1", "neg=1", "neg=1,neg=2", "1,x", "neg=1,a=b=nan", ""):
        with pytest.raises(ValueError, match=r"class.weights"):
            stated_loss(None, None, text, names)


# --- curvature ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (tm.ExampleLoss(label_smoothing=0.3), CLASSES),
        (tm.ExampleLoss(class_weights=[0.2, 1, 5], label_smoothing=0.1), CLASSES),
        (tm.ExampleLoss("squared_error"), TARGETS),
        (tm.ExampleLoss("binary_cross_entropy", pos_weight=[0.5, 1, 4]), SEVERAL.double()),
    ],
)
def test_sampled_gradients_have_the_hessian_of_the_loss(loss, labels, monkeypatch):
    """The mean of g g^T at the logits over many draws, against torch's Hessian."""
    from tracmod.gradients import ekfac

    draws = 4000
    monkeypatch.setattr(ekfac, "predict", lambda *_, **__: LOGITS.repeat_interleave(draws, dim=0))
    examples = [{"labels": label.tolist()} for label in labels for _ in range(draws)]
    sampled, sampled_loss = ekfac._with_sampled_labels(None, examples, loss, 100, seed=0)
    logits = LOGITS.repeat_interleave(draws, dim=0).requires_grad_()
    chosen = torch.tensor([example["labels"] for example in sampled])
    (gradient,) = torch.autograd.grad(sampled_loss(logits, chosen).sum(), logits)
    outer = (gradient[:, :, None] * gradient[:, None]).unflatten(0, (-1, draws)).mean(dim=1)
    for row in range(len(LOGITS)):
        hessian = torch.autograd.functional.hessian(
            lambda z, row=row: loss(z[None], labels[row : row + 1]).sum(), LOGITS[row]
        )
        torch.testing.assert_close(outer[row], hessian, rtol=0.15, atol=0.03)


def test_labels_of_a_function_are_not_sampled():
    function = functools.partial(nn.functional.cross_entropy, reduction="none")
    model, examples = tiny_encoder("bert"), ragged_examples(3)
    with pytest.raises(ValueError, match=r"labels: expected given.*cross_entropy"):
        tm.fit_ekfac(model, examples, loss=function)
    fitted = tm.fit_ekfac(model, examples, loss=function, labels="given")
    assert fitted.digest == tm.fit_ekfac(model, examples, labels="given").digest


def test_the_models_own_loss():
    model = tiny_encoder("bert")
    assert own_loss(model) == tm.ExampleLoss()
    assert own_loss(model, float_vectors=True) == tm.ExampleLoss("binary_cross_entropy")
