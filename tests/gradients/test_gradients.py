"""Captured gradients and exact influence against autograd for single examples."""

from __future__ import annotations

import copy
import weakref
from typing import get_args

import pytest
import torch
from encoders import FAMILIES, ragged_examples, tiny_encoder

import tracmod as tm
from tracmod.choices import ParameterSet
from tracmod.gradients.capture import capture, select_layers
from tracmod.models.architecture import embeddings_module
from tracmod.models.inputs import collate, pad_token_id, plan_batches
from tracmod.models.modes import frozen
from tracmod.validation.gradients import autograd_gradients, check_gradients, engine_gradients

# The sets of parameters that a model without adapters has.
WITHOUT_ADAPTERS = [name for name in get_args(ParameterSet) if name != "adapter"]

KINDS = ("weight", "bias")


def autograd_matrix(model, examples, parameters):
    """Return per-example gradients by plain autograd, flattened, (N, P)."""
    names = [name for layer in select_layers(model, parameters) for name in layer.parameter_names]
    rows = [autograd_gradients(model, example, names) for example in examples]
    return torch.stack([torch.cat([row[name].flatten() for name in names]) for row in rows])


@pytest.mark.parametrize("family", [*FAMILIES, "distilbert"])
@pytest.mark.parametrize("batch", [1, 7, 32])
def test_every_kind_of_parameter_is_within_twice_the_error_of_plain_autograd(family, batch):
    errors = check_gradients(tiny_encoder(family), ragged_examples(batch), "all")
    assert {error.kind for error in errors} == {
        "logits",
        "embeddings embedding weight",
        *(f"{part} layernorm {name}" for part in ("embeddings", "encoder") for name in KINDS),
        *(f"{part} linear {name}" for part in ("encoder", "classifier") for name in KINDS),
    }
    assert sum(error.num_parameters for error in errors) == len(
        list(tiny_encoder(family).parameters())
    )
    for error in errors:
        assert error.engine <= 2 * error.autograd, error


def test_the_check_detects_a_wrong_gradient(monkeypatch):
    import tracmod.validation.gradients as gradients

    right = gradients.engine_gradients

    def wrong(*args, **named):
        name = "classifier.out_proj.bias"
        return (actual | {name: actual[name] * 1.001} for actual in right(*args))

    monkeypatch.setattr(gradients, "engine_gradients", wrong)
    failed = [e.kind for e in check_gradients(tiny_encoder(), ragged_examples(4)) if not e.passed]
    assert failed == ["classifier linear bias"]


def test_the_check_detects_a_layer_that_is_not_captured(monkeypatch):
    import tracmod.validation.gradients as gradients

    def without_output(model, layers, *others, **named):
        without = [la for la in layers if la.name != "classifier.out_proj"]
        capture(model, without, *others, **named)

    monkeypatch.setattr(gradients, "capture", without_output)
    errors = check_gradients(tiny_encoder(), ragged_examples(4))
    failed = {e.kind: (e.num_parameters, e.engine) for e in errors if not e.passed}
    assert set(failed) == {"classifier linear weight", "classifier linear bias"}
    assert all(count == 2 and error > 0.1 for count, error in failed.values())


def test_a_parameter_that_no_text_reaches_passes_the_check():
    model = tiny_encoder()
    model.classifier.unused = torch.nn.Linear(3, 3)
    errors = check_gradients(model, ragged_examples(4))
    assert sum(error.num_parameters for error in errors) == len(list(model.parameters()))
    assert all(error.passed for error in errors)


def test_the_check_holds_one_examples_gradients_at_a_time(monkeypatch):
    import tracmod.validation.gradients as gradients

    class Gradients(dict):
        """A dict that can be in a weak set."""

        __hash__ = object.__hash__

    alive, most = weakref.WeakSet(), []

    def watched(*args, **options):
        actual = Gradients(autograd_gradients(*args, **options))
        alive.add(actual)
        most.append(len(alive))
        return actual

    monkeypatch.setattr(gradients, "autograd_gradients", watched)
    check_gradients(tiny_encoder(), ragged_examples(6))
    assert max(most) == 2  # the same example's in float64 and in float32


def test_nan_does_not_pass_the_check():
    model = tiny_encoder()
    with torch.no_grad():
        model.classifier.dense.weight[0, 0] = float("nan")
    assert not any(error.passed for error in check_gradients(model, ragged_examples(3)))


@pytest.mark.parametrize("parameters", WITHOUT_ADAPTERS)
@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_exact_influence_is_the_inner_product_of_autograds_gradients(parameters, normalize):
    model = tiny_encoder()
    train, query = ragged_examples(9, seed=1), ragged_examples(5, seed=2)
    double = copy.deepcopy(model).double()
    g_train, g_query = (autograd_matrix(double, e, parameters) for e in (train, query))
    if normalize:
        g_train, g_query = (torch.nn.functional.normalize(g, dim=1) for g in (g_train, g_query))
    expected = g_query @ g_train.T
    actual = tm.exact_influence(model, train, query, parameters, normalize=normalize)
    assert actual.shape == (5, 9)
    scale = expected.abs().max()
    assert (actual.double() - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_exact_influence_makes_one_native_call_per_pair_of_batches_and_input(
    monkeypatch, normalize
):
    calls = []
    right = tm.kernels.gradient_dot

    def counted(*args, **named):
        calls.append(args)
        right(*args, **named)

    monkeypatch.setattr(tm.kernels, "gradient_dot", counted)
    model, examples = tiny_encoder(), ragged_examples(8)
    tm.exact_influence(model, examples, examples, "all", normalize=normalize)
    batches = plan_batches([len(example["input_ids"]) for example in examples], 8192)
    # Query, key and value share a call; in the last layer, the query has an input of its own.
    assert len(calls) == len(batches) ** 2 * (len(select_layers(model, "all")) - 2 - 1)


@pytest.mark.parametrize("batch_tokens", [1, 33, 4096])
def test_exact_influence_does_not_depend_on_the_batches(batch_tokens):
    model, train, query = tiny_encoder(), ragged_examples(12), ragged_examples(4, seed=3)
    whole = tm.exact_influence(model, train, query, batch_tokens=100_000)
    actual = tm.exact_influence(model, train, query, batch_tokens=batch_tokens)
    torch.testing.assert_close(actual, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_exact_influence_in_several_blocks_of_queries(monkeypatch):
    import tracmod.influence.exact

    model, train, query = tiny_encoder(), ragged_examples(6), ragged_examples(10, seed=3)
    whole = tm.exact_influence(model, train, query, normalize="cosine")
    monkeypatch.setattr(tracmod.influence.exact, "QUERY_BLOCK_BYTES", 1)
    blocks = tm.exact_influence(model, train, query, normalize="cosine", batch_tokens=40)
    torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-6)


def test_exact_influence_under_a_head_mask():
    model, examples = tiny_encoder(), ragged_examples(6)
    mask = tm.HeadMask.from_array([[1, 0, 1], [0, 0, 1]])
    double = copy.deepcopy(model).double()
    with mask.apply(double):
        gradients = autograd_matrix(double, examples, "encoder")
    expected = gradients @ gradients.T
    actual = tm.exact_influence(model, examples, examples, head_mask=mask)
    assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_masked_heads_have_no_gradient_at_all():
    model, examples = tiny_encoder(), ragged_examples(6)
    with frozen(model), tm.HeadMask.from_array([[0, 1, 1], [1, 1, 0]]).apply(model):
        engine = list(engine_gradients(model, examples))
    gradients = {
        name: torch.stack([of_example[name] for of_example in engine]) for name in engine[0]
    }
    first = "roberta.encoder.layer.0.attention"
    for name in ("query", "key", "value"):
        assert gradients[f"{first}.self.{name}.weight"][:, :8].abs().max() == 0
        assert gradients[f"{first}.self.{name}.bias"][:, :8].abs().max() == 0
    assert gradients[f"{first}.output.dense.weight"][:, :, :8].abs().max() == 0
    assert gradients[f"{first}.output.dense.weight"][:, :, 8:].abs().max() > 0


def test_padding_left_or_right_changes_nothing():
    model = tiny_encoder("roberta")  # counts positions from the first token that is no padding
    examples = ragged_examples(5)
    left = [
        {
            "input_ids": [1] * 4 + example["input_ids"],
            "attention_mask": [0] * 4 + example["attention_mask"],
            "labels": example["labels"],
        }
        for example in examples
    ]
    right = [
        {
            "input_ids": example["input_ids"] + [1] * 9,
            "attention_mask": example["attention_mask"] + [0] * 9,
            "labels": example["labels"],
        }
        for example in examples
    ]
    plain = tm.exact_influence(model, examples, examples)
    torch.testing.assert_close(tm.exact_influence(model, right, right), plain)
    with frozen(model):
        engine = list(engine_gradients(model, left))
    for actual, example in zip(engine, left, strict=True):
        for name, truth in autograd_gradients(model, example, list(actual)).items():
            torch.testing.assert_close(actual[name], truth, rtol=1e-4, atol=1e-5)


def test_padding_tokens_inside_a_text_get_no_embedding_gradient():
    model = tiny_encoder("bert")
    examples = [{"input_ids": [5, 0, 7], "attention_mask": [1, 1, 1], "labels": 1}]
    with frozen(model):
        (engine,) = engine_gradients(model, examples)
    name = "bert.embeddings.word_embeddings.weight"
    truth = autograd_gradients(model, examples[0], [name])[name]
    assert truth[0].abs().max() == 0
    torch.testing.assert_close(engine[name], truth)


def test_token_types_are_passed_on():
    model = tiny_encoder("bert")
    examples = [
        example | {"token_type_ids": [0] * (len(example["input_ids"]) - 1) + [1]}
        for example in ragged_examples(5)
    ]
    assert all(error.passed for error in check_gradients(model, examples))
    without = [{k: v for k, v in e.items() if k != "token_type_ids"} for e in examples]
    with_types = tm.exact_influence(model, examples, examples)
    assert not torch.allclose(with_types, tm.exact_influence(model, without, without))


def test_selections_name_every_parameter_once():
    model = tiny_encoder("bert")
    names = {
        which: [n for layer in select_layers(model, which) for n in layer.parameter_names]
        for which in WITHOUT_ADAPTERS
    }
    everything = [name for name, _ in model.named_parameters()]
    assert sorted(names["all"]) == sorted(everything)
    embeddings = {f"bert.embeddings.{n}" for n, _ in embeddings_module(model).named_parameters()}
    assert set(names["encoder"]) == set(everything) - embeddings
    assert names["classifier"] == ["classifier.weight", "classifier.bias"]
    assert len(names["attention"]) == 2 * 7
    assert not any(name.endswith("output.dense.bias") for name in names["attention"])


def test_unknown_selection_and_parameters_that_would_be_left_out_are_refused():
    model = tiny_encoder()
    with pytest.raises(ValueError, match="parameters: expected one of encoder, all"):
        select_layers(model, "body")
    model.classifier.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"got classifier\.scale"):
        select_layers(model, "encoder")


def test_the_calls_of_a_layer_that_runs_twice_add_up():
    model = tiny_encoder()
    layers = model.roberta.encoder.layer
    layers[1] = layers[0]
    assert all(error.passed for error in check_gradients(model, ragged_examples(5)))


def test_the_model_is_left_as_it_was():
    model = tiny_encoder()
    model.train()
    model.classifier.dense.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    tm.exact_influence(model, ragged_examples(3), ragged_examples(2))
    assert all(module.training for module in model.modules())
    assert required == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_backward_pass_stops_at_the_lowest_selected_layer():
    model, examples = tiny_encoder(), ragged_examples(3)
    batch = collate(examples, pad_token_id(model))
    reached = []
    for layer in model.roberta.encoder.layer:
        layer.output.dense.register_full_backward_hook(lambda module, *_: reached.append(module))
    with frozen(model):
        capture(model, select_layers(model, "classifier"), batch, lambda captured: None)
    assert reached == []


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, autocast])
def test_gradients_are_computed_where_autograd_is_switched_off(mode):
    model, examples, projection = tiny_encoder(), ragged_examples(4), tm.Projection(200)
    features = tm.collect_features(model, examples, projection)
    exact = tm.exact_influence(model, examples, examples, normalize="cosine")
    with mode():
        assert torch.equal(tm.collect_features(model, examples, projection), features)
        again = tm.exact_influence(model, examples, examples, normalize="cosine")
    assert torch.equal(again, exact)
    assert exact.diagonal().min() > 0.999


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = tiny_encoder()
    with pytest.raises(ValueError, match=r"weight: expected.*inference_mode"):
        tm.collect_features(model, ragged_examples(2), tm.Projection(200))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_precision_of_a_model_in_half_precision_is_said(dtype):
    model, examples = tiny_encoder().to(dtype), ragged_examples(2)
    with pytest.warns(UserWarning, match=rf"{dtype}.*digits.*model\.float\(\)"):
        tm.collect_features(model, examples, tm.Projection(200))


def test_a_loss_without_gradient_is_refused():
    model = tiny_encoder()
    batch = collate(ragged_examples(2), pad_token_id(model))
    layers = select_layers(model, "encoder")
    with (
        frozen(model),
        torch.no_grad(),
        pytest.raises(ValueError, match="expected a loss that depends on the selected layers"),
    ):
        capture(model, layers, batch, lambda captured: None)


def test_nan_weights_stop_with_the_row():
    model = tiny_encoder()
    with torch.no_grad():
        embeddings_module(model).word_embeddings.weight[17] = float("nan")
    examples = ragged_examples(6)
    for example in examples:
        example["input_ids"] = [18 if i == 17 else i for i in example["input_ids"]]
    examples[3]["input_ids"][0] = 17
    clean = [e for e in ragged_examples(9, seed=5) if 17 not in e["input_ids"]]
    for normalize in (None, "cosine"):
        with pytest.raises(ValueError, match="query: row 3: expected a finite gradient"):
            tm.exact_influence(model, clean, examples, normalize=normalize)
        with pytest.raises(ValueError, match="train: row 3: expected a finite gradient"):
            tm.exact_influence(model, examples, clean, normalize=normalize)
        assert tm.exact_influence(model, clean, clean, normalize=normalize).isfinite().all()
    with pytest.raises(ValueError, match="dataset: row 3: expected a finite gradient"):
        tm.collect_features(model, examples, tm.Projection(512))
