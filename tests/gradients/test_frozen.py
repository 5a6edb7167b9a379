"""Parameters that training does not move: left out by default, in every pass, and said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from encoders import ragged_examples, tiny_encoder

import tracmod as tm
from tracmod.gradients.capture import FrozenParametersWarning, select_layers
from tracmod.models.modes import frozen
from tracmod.validation.gradients import autograd_gradients, check_gradients

EXAMPLES = ragged_examples(7)
LAYER_0 = "encoder.layer.0."


def not_embeddings(name):
    return "embeddings" not in name


# What is trained: a rule from the full name of a parameter.
TRAINED = {
    "upper layer and classifier": lambda name: not_embeddings(name) and LAYER_0 not in name,
    "classifier": lambda name: name.startswith("classifier"),
    "biases (BitFit)": lambda name: name.endswith("bias"),
    "LayerNorm": lambda name: "LayerNorm" in name,
    "all but the biases": lambda name: not name.endswith("bias"),
    "queries without, keys with bias": lambda name: name.endswith(
        ("query.weight", "key.weight", "key.bias", "value.bias")
    ),
    "embeddings alone": lambda name: "embeddings" in name,
}


def partly_frozen(rule, family="bert", seed=0):
    model = tiny_encoder(family, seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[rule](name))
    return model


def reference(model, names):
    """Return (N, P) gradients of float64 autograd, of these parameters only."""
    double = copy.deepcopy(model).double()
    return torch.stack(
        [
            torch.cat([g.flatten() for g in autograd_gradients(double, example, names).values()])
            for example in EXAMPLES
        ]
    )


def trained_gradients(model, parameters):
    keep = not_embeddings if parameters == "encoder" else lambda _: True
    names = [name for name, p in model.named_parameters() if p.requires_grad and keep(name)]
    return reference(model, names)


@pytest.mark.parametrize("family", ["bert", "xlmr"])
@pytest.mark.parametrize("rule", TRAINED)
def test_gradients_are_those_of_the_trained_parameters(rule, family):
    model = partly_frozen(rule, family)
    parameters = "all" if rule == "embeddings alone" else "encoder"
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    gradients_NP = trained_gradients(model, parameters)
    products_NN = gradients_NP @ gradients_NP.T
    scale = products_NN.abs().max()
    with pytest.warns(FrozenParametersWarning, match=r"\d+ frozen parameters .*include_frozen"):
        exact = tm.exact_influence(model, EXAMPLES, EXAMPLES, parameters)
    assert (exact - products_NN).abs().max() < 1e-5 * scale
    with pytest.warns(FrozenParametersWarning):
        features = tm.collect_features(model, EXAMPLES, tm.Projection(20_000), parameters)
    # With a slot for every layer there is a number for every parameter, and no projection error.
    if rule != "embeddings alone":
        scores = tm.influence_scores(features, features)
        assert (scores - products_NN).abs().max() < 0.1 * scale
        concatenated = tm.Projection(40_000, layers="concatenate")
        with pytest.warns(FrozenParametersWarning):
            features = tm.collect_features(model, EXAMPLES, concatenated, parameters)
        scores = tm.influence_scores(features, features)
        assert (scores - products_NN).abs().max() < 1e-5 * scale
        assert torch.allclose(tm.self_influence(features), products_NN.diag(), rtol=1e-5)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("rule", ["biases (BitFit)", "queries without, keys with bias"])
def test_checks_blocks_and_metrics_leave_out_the_same(rule):
    model = partly_frozen(rule)
    with pytest.warns(FrozenParametersWarning):
        errors = check_gradients(model, EXAMPLES, "encoder")
    assert all(error.passed for error in errors)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and not_embeddings(n)]
    assert sum(error.num_parameters for error in errors) == len(trained)
    gradients_NP = trained_gradients(model, "encoder")
    with pytest.warns(FrozenParametersWarning):
        table = tm.block_influence(model, {"en": EXAMPLES}, {"en": EXAMPLES})
    total = sum(table["influence"].to_pylist())
    assert total == pytest.approx(float(gradients_NP.mean(dim=0).square().sum()), rel=1e-4)
    moments = {name: torch.rand(p.shape) + 0.1 for name, p in model.named_parameters()}
    with pytest.warns(FrozenParametersWarning):
        adam = tm.adam_preconditioner(model, moments)
    with pytest.warns(FrozenParametersWarning):
        scores = tm.exact_influence(model, EXAMPLES, EXAMPLES, preconditioner=adam)
    metric_P = torch.cat([1 / (moments[name].double().sqrt() + 1e-8).flatten() for name in trained])
    expected_NN = (gradients_NP * metric_P) @ gradients_NP.T
    assert (scores - expected_NN).abs().max() < 1e-4 * expected_NN.abs().max()
    concatenated = tm.Projection(40_000, layers="concatenate")
    with pytest.warns(FrozenParametersWarning):
        fitted = tm.fit_ekfac(model, EXAMPLES, labels="given")
    with pytest.warns(FrozenParametersWarning):
        exact = tm.exact_influence(model, EXAMPLES, EXAMPLES, preconditioner=fitted)
    with pytest.warns(FrozenParametersWarning):
        features = tm.collect_features(model, EXAMPLES, concatenated, preconditioner=fitted)
    projected = tm.influence_scores(features, features)
    assert (exact - projected).abs().max() < 1e-4 * exact.abs().max()
    assert torch.linalg.matrix_rank(exact.double()) == len(EXAMPLES)


def test_frozen_parameters_count_if_asked_for_and_without_a_warning():
    model = partly_frozen("classifier")
    everything = tiny_encoder("bert")
    projection = tm.Projection(500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        included = tm.collect_features(model, EXAMPLES, projection, include_frozen=True)
        expected = tm.collect_features(everything, EXAMPLES, projection)
        scores = tm.exact_influence(model, EXAMPLES, EXAMPLES, include_frozen=True)
    assert torch.equal(included, expected)
    assert torch.equal(scores, tm.exact_influence(everything, EXAMPLES, EXAMPLES))
    assert all(e.passed for e in check_gradients(model, EXAMPLES, "all", include_frozen=True))


def test_a_model_whose_selected_parameters_are_all_frozen_is_refused():
    model = partly_frozen("embeddings alone")
    for run in (
        lambda: tm.collect_features(model, EXAMPLES, tm.Projection(64)),
        lambda: tm.exact_influence(model, EXAMPLES, EXAMPLES),
        lambda: tm.fit_ekfac(model, EXAMPLES),
        lambda: tm.block_influence(model, {"en": EXAMPLES}, {"en": EXAMPLES}),
        lambda: check_gradients(model, EXAMPLES, "classifier"),
    ):
        with (
            pytest.warns(FrozenParametersWarning),
            pytest.raises(ValueError, match=r"parameters '\w+'.*requires_grad=False"),
        ):
            run()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_decide_what_is_frozen(mode):
    model = partly_frozen("upper layer and classifier")
    expected = [name for layer in select_layers(model) for name in layer.parameter_names]
    with mode(), frozen(model), frozen(model):
        inside = [name for layer in select_layers(model) for name in layer.parameter_names]
    assert inside == expected
    assert not any(LAYER_0 in name for name in expected)
    with mode(), pytest.warns(FrozenParametersWarning):
        scores = tm.exact_influence(model, EXAMPLES, EXAMPLES)
    gradients_NP = trained_gradients(model, "encoder")
    products_NN = gradients_NP @ gradients_NP.T
    assert (scores - products_NN).abs().max() < 1e-5 * products_NN.abs().max()
