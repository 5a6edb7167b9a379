"""Preconditioned influence against gradients by autograd that are multiplied by the metric."""

from __future__ import annotations

import pytest
import torch
from encoders import ragged_examples, tiny_encoder
from safetensors.torch import save_file

import tracmod as tm
from tracmod.gradients.capture import select_layers
from tracmod.gradients.ekfac import checkpoint_preconditioner
from tracmod.gradients.preconditioner import Metric, Preconditioner, gradient_shape
from tracmod.models.checkpoints import save_second_moment
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.validation.gradients import autograd_gradients


def drawn_moments(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) ** 4
        for name, parameter in model.named_parameters()
    }


def gradient_matrix(layer, gradients):
    weight, *bias = [gradients[name].double() for name in layer.parameter_names]
    if layer.kind == "linear":
        return torch.cat([weight, *(column[:, None] for column in bias)], dim=1)
    return torch.stack([weight, *bias]) if layer.kind == "elementwise" else weight


def by_autograd(model, examples, parameters, metrics):
    """Return gradients in the metric by autograd, (N, P) float64."""
    layers = select_layers(model, parameters)
    names = [name for layer in layers for name in layer.parameter_names]
    rows = []
    for example in examples:
        gradients = autograd_gradients(model, example, names)
        parts = []
        for layer in layers:
            metric, whole = metrics[layer.name], gradient_matrix(layer, gradients)
            if metric.rotate_out is not None:
                whole = metric.rotate_out.double().T @ whole @ metric.rotate_in.double()
            parts.append((whole * metric.scale.double()).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def output_layer(model):
    layers = select_layers(model, "all")
    return next(layer for layer in layers if layer.name == "classifier.out_proj")


def made(kind, model, parameters):
    if kind == "adam":
        return tm.adam_preconditioner(model, drawn_moments(model), parameters)
    return tm.fit_ekfac(model, ragged_examples(20, seed=5), parameters)


def assert_close(actual, truth, tolerance=1e-5):
    assert (actual.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("kind", ["adam", "ekfac"])
@pytest.mark.parametrize("parameters", ["encoder", "all", "attention", "classifier"])
def test_exact_influence_is_that_of_autograds_gradients_in_the_metric(kind, parameters):
    model, train, query = tiny_encoder(), ragged_examples(5), ragged_examples(4, seed=3)
    metric = made(kind, model, parameters)
    rows = [by_autograd(model, examples, parameters, metric.metrics) for examples in (query, train)]
    actual = tm.exact_influence(model, train, query, parameters, preconditioner=metric)
    assert_close(actual, rows[0] @ rows[1].T)
    unit = [matrix / matrix.norm(dim=1, keepdim=True) for matrix in rows]
    actual = tm.exact_influence(
        model, train, query, parameters, normalize="cosine", preconditioner=metric
    )
    assert_close(actual, unit[0] @ unit[1].T)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_every_family(family):
    model, examples = tiny_encoder(family), ragged_examples(4)
    metric = made("ekfac", model, "encoder")
    rows = by_autograd(model, examples, "encoder", metric.metrics)
    actual = tm.exact_influence(model, examples, examples, preconditioner=metric)
    assert_close(actual, rows @ rows.T)


def test_under_a_head_mask_the_gradients_are_those_of_the_masked_pass():
    model, examples = tiny_encoder(), ragged_examples(4)
    mask, metric = HeadMask([[1, 0, 1], [0, 1, 0]]), made("ekfac", model, "encoder")
    with mask.apply(model):
        rows = by_autograd(model, examples, "encoder", metric.metrics)
    actual = tm.exact_influence(model, examples, examples, head_mask=mask, preconditioner=metric)
    assert_close(actual, rows @ rows.T)


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("parameters", ["encoder", "all"])
def test_inner_products_of_features_are_right_in_expectation(kind, parameters):
    model, examples = tiny_encoder(), ragged_examples(4)
    metric = made("ekfac", model, parameters)
    exact = tm.exact_influence(model, examples, examples, parameters, preconditioner=metric)
    draws = []
    for seed in range(60):
        features = tm.collect_features(
            model, examples, tm.Projection(400, kind, seed), parameters, preconditioner=metric
        )
        draws.append(features @ features.T)
    draws = torch.stack(draws)
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - exact).abs() <= 4.5 * standard_error + 1e-5 * exact.max()).all()


def test_a_row_wide_enough_to_hold_every_layer_is_exact():
    model, examples = tiny_encoder(), ragged_examples(4)
    metric = made("ekfac", model, "classifier")
    exact = tm.exact_influence(model, examples, examples, "classifier", preconditioner=metric)
    shapes = map(gradient_shape, select_layers(model, "classifier"))
    size = sum(rows * columns for rows, columns in shapes)
    projection = tm.Projection(2 * size, layers="concatenate")
    features = tm.collect_features(model, examples, projection, "classifier", preconditioner=metric)
    assert_close(features @ features.T, exact.double())


@pytest.mark.parametrize("batch_tokens", [1, 17, 100])
def test_preconditioned_features_do_not_depend_on_the_batches(batch_tokens):
    model, examples, projection = tiny_encoder(), ragged_examples(10), tm.Projection(300)
    metric = made("adam", model, "all")
    whole, actual = (
        tm.collect_features(
            model, examples, projection, "all", batch_tokens=tokens, preconditioner=metric
        )
        for tokens in (8192, batch_tokens)
    )
    assert_close(actual, whole.double())


@pytest.mark.parametrize("batch_tokens", [1, 64])
def test_the_fit_does_not_depend_on_the_batches(batch_tokens):
    model, examples = tiny_encoder(), ragged_examples(12)
    fitted = [tm.fit_ekfac(model, examples, "all", batch_tokens=n) for n in (8192, batch_tokens)]
    scores = [
        tm.exact_influence(model, examples, examples, "all", preconditioner=metric)
        for metric in fitted
    ]
    assert_close(scores[1], scores[0].double(), 1e-3)


def test_with_the_identity_for_a_metric_influence_is_the_plain_one():
    model, examples = tiny_encoder(), ragged_examples(5)
    layers = select_layers(model, "encoder")
    ones = {layer.name: Metric(torch.ones(gradient_shape(layer))) for layer in layers}
    actual = tm.exact_influence(
        model, examples, examples, preconditioner=Preconditioner("adam", ones)
    )
    assert_close(actual, tm.exact_influence(model, examples, examples).double())


def test_the_curvature_of_layers_without_a_rotation_is_the_mean_square():
    model, examples = tiny_encoder(), ragged_examples(6)
    fitted = tm.fit_ekfac(model, examples, "all", labels="given", damping=0.5)
    for layer in select_layers(model, "all"):
        if layer.kind == "linear":
            continue
        squares = [
            gradient_matrix(
                layer, autograd_gradients(model, example, layer.parameter_names)
            ).square()
            for example in examples
        ]
        mean = torch.stack(squares).mean(dim=0)
        assert_close(fitted.metrics[layer.name].scale, (mean + 0.5 * mean.mean()).rsqrt(), 1e-4)


def test_sampled_labels_are_the_models_own():
    """With many draws, the curvature is that of all labels, weighted by the model's predictions."""
    model, (example,) = tiny_encoder(), ragged_examples(1)
    fitted = tm.fit_ekfac(model, [example] * 4000, "all", damping=1e-6)
    with torch.no_grad():
        inputs = {k: torch.tensor([v]) for k, v in example.items() if k != "labels"}
        shares = model(**inputs).logits.softmax(dim=1)[0].tolist()
    layer = output_layer(model)
    gradients = [
        autograd_gradients(model, {**example, "labels": label}, layer.parameter_names)
        for label in range(len(shares))
    ]
    squares = [float(gradient_matrix(layer, by_name).square().sum()) for by_name in gradients]
    expected = sum(share * square for share, square in zip(shares, squares, strict=True))
    # The curvature's trace is the same in every basis.
    trace = float((fitted.metrics[layer.name].scale.double() ** -2).sum())
    assert trace == pytest.approx(expected, rel=0.03)


def test_sampled_targets_of_a_regression_are_normal_of_variance_one_half():
    """The Fisher matrix of the loss (f - y)^2: the mean square of its gradient is 2 |grad f|^2."""
    model = tiny_encoder(num_labels=1)
    example = {**ragged_examples(1)[0], "labels": 0.0}
    fitted = tm.fit_ekfac(model, [example] * 4000, "classifier", damping=1e-6)
    with torch.no_grad():
        inputs = {k: torch.tensor([v]) for k, v in example.items() if k != "labels"}
        output = float(model(**inputs).logits)
    layer = output_layer(model)
    # At the target f - 1/2 the gradient of the loss is that of f.
    of_output = autograd_gradients(
        model, {**example, "labels": output - 0.5}, layer.parameter_names
    )
    expected = 2 * float(gradient_matrix(layer, of_output).square().sum())
    trace = float((fitted.metrics[layer.name].scale.double() ** -2).sum())
    assert trace == pytest.approx(expected, rel=0.06)


def test_regression_has_its_curvature_too():
    model = tiny_encoder(num_labels=1)
    examples = [{**example, "labels": float(example["labels"])} for example in ragged_examples(6)]
    metric = tm.fit_ekfac(model, examples)
    rows = by_autograd(model, examples, "encoder", metric.metrics)
    actual = tm.exact_influence(model, examples, examples, preconditioner=metric)
    assert_close(actual, rows @ rows.T)


def test_parameters_that_never_had_a_gradient_have_no_influence():
    model = tiny_encoder()
    moments = drawn_moments(model)
    for name in moments:
        moments[name].zero_()
    name = "classifier.out_proj.weight"
    moments[name].fill_(1e-4)
    examples = ragged_examples(3)
    metric = tm.adam_preconditioner(model, moments)
    actual = tm.exact_influence(model, examples, examples, preconditioner=metric)
    weights = [autograd_gradients(model, example, [name])[name] for example in examples]
    rows = torch.stack([weight.flatten() for weight in weights]).double()
    assert_close(actual, rows @ rows.T / (1e-2 + 1e-8))


def test_epsilon_is_that_of_the_training(tmp_path):
    model = tiny_encoder()
    moments, examples = drawn_moments(model), ragged_examples(3)

    def scores(second_moment, **options):
        metric = tm.adam_preconditioner(model, second_moment, **options)
        return tm.exact_influence(model, examples, examples, preconditioner=metric)

    save_second_moment(moments, 1e-2, tmp_path)
    torch.testing.assert_close(scores(tmp_path), scores(moments, eps=1e-2), rtol=0, atol=0)
    torch.testing.assert_close(scores(tmp_path, eps=1e-8), scores(moments), rtol=0, atol=0)
    assert not torch.allclose(scores(tmp_path), scores(moments))
    # A file that was saved by an earlier version.
    save_file(moments, tmp_path / "second_moment.safetensors")
    torch.testing.assert_close(scores(tmp_path), scores(moments), rtol=0, atol=0)


def test_a_saved_preconditioner_is_loaded_unchanged(tmp_path):
    model = tiny_encoder()
    fitted = made("ekfac", model, "encoder")
    fitted.save(tmp_path / "first.safetensors", {"model": "this"})
    read = Preconditioner.load(tmp_path / "first.safetensors", "ekfac", {"model": "this"})
    assert read.digest == fitted.digest
    assert made("adam", model, "encoder").digest != fitted.digest
    with pytest.raises(ValueError, match='model: expected "that", got "this"'):
        Preconditioner.load(tmp_path / "first.safetensors", "ekfac", {"model": "that"})
    assert Preconditioner.load(tmp_path / "second.safetensors", "ekfac") is None


def test_a_saved_fit_is_not_used_with_other_settings(tmp_path):
    model, examples = tiny_encoder(), ragged_examples(6)
    options = {"parameters": "encoder", "batch_tokens": 512, "keep_in": tmp_path / "ekfac"}

    def made_with(train, **changes):
        return checkpoint_preconditioner(
            "ekfac", model, tmp_path, train, **{**options, "identity": {"model": "this"}, **changes}
        )

    fitted = made_with(lambda: examples)
    assert made_with(None).digest == fitted.digest  # read, not fitted again
    for changes, differing in (
        ({"damping": 0.2}, "damping"),
        ({"parameters": "attention"}, "parameters"),
        ({"identity": {"model": "that"}}, "model"),
    ):
        with pytest.raises(ValueError, match=f"{differing}: expected"):
            made_with(None, **changes)


def test_errors_name_what_is_invalid(tmp_path):
    model, examples = tiny_encoder(), ragged_examples(3)
    metric = made("adam", model, "attention")
    with pytest.raises(ValueError, match=r"expected a metric of shape \(.*, got none"):
        tm.exact_influence(model, examples, examples, preconditioner=metric)
    with pytest.raises(ValueError, match=r"query: expected a metric of shape \(.*, got shape \("):
        tm.collect_features(
            tiny_encoder(hidden_size=12), examples, tm.Projection(50), "attention",
            preconditioner=metric,
        )  # fmt: skip
    with pytest.raises(ValueError, match="found none; train with"):
        tm.adam_preconditioner(model, tmp_path)
    save_file({"other.weight": torch.ones(2)}, tmp_path / "second_moment.safetensors")
    with pytest.raises(ValueError, match=r"classifier\.dense\.weight: .*got none"):
        tm.adam_preconditioner(model, tmp_path)
    bad = drawn_moments(model)
    bad["classifier.dense.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"second moment of classifier\.dense\.weight: .*finite"):
        tm.adam_preconditioner(model, bad)
    (tmp_path / "second_moment.safetensors").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"second_moment.safetensors: expected .* it is damaged"):
        tm.adam_preconditioner(model, tmp_path)
    broken = tiny_encoder()
    with torch.no_grad():
        broken.classifier.out_proj.bias[0] = float("inf")
    with pytest.raises(ValueError, match="row 0: expected finite logits"):
        tm.fit_ekfac(broken, examples)
    with pytest.raises(ValueError, match=r"finite inputs and gradients.*NaN"):
        tm.fit_ekfac(broken, examples, labels="given")
    with pytest.raises(ValueError, match=r"damping: .*got 0\.0"):
        tm.fit_ekfac(model, examples, damping=0.0)
    with pytest.raises(ValueError, match=r"dataset: .*got none"):
        tm.fit_ekfac(model, [])
    with pytest.raises(ValueError, match=r"labels: .*sampled.*given.*'true'"):
        tm.fit_ekfac(model, examples, labels="true")
