"""The lean pass computes the same loss and gradients with less work, and restores the model."""

from __future__ import annotations

import pytest
import torch
from encoders import ragged_examples, tiny_encoder
from tiny_models import tiny_examples, tiny_model

import tracmod as tm
from tracmod.gradients.capture import ModelPass, capture, select_layers
from tracmod.gradients.lean_pass import lean
from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import collate, pad_token_id
from tracmod.models.modes import frozen
from tracmod.validation.gradients import autograd_gradients, check_gradients

FAMILIES = ("bert", "roberta", "xlmr", "distilbert")
MASK = tm.HeadMask.from_array([[0, 1, 1], [1, 0, 0]])
EMPTY_LAYER = tm.HeadMask.from_array([[0, 0, 0], [1, 1, 0]])


def batch_of(model, examples):
    return collate(examples, pad_token_id(model))


def shapes(model, mask=None):
    """Return tokens of x and of g, and their widths, for every linear layer in a lean pass."""
    layer_shapes = {}

    def note(captured):
        for layer, g in zip(captured.layers, captured.g, strict=True):
            layer_shapes[layer.name] = (
                captured.x.shape[1],
                g.shape[1],
                captured.x.shape[2],
                g.shape[2],
            )

    examples = ragged_examples(5)
    with frozen(model), lean(model, mask) as lean_columns:
        layers = [layer for layer in select_layers(model) if layer.kind == "linear"]
        capture(model, layers, batch_of(model, examples), note, None, ModelPass(lean_columns))
    return layer_shapes


def reads_mean(model):
    """Replace the classifier of a model by one that reads every position."""
    head = model.classifier
    plain = head.forward
    head.forward = lambda features, **_: plain(features.mean(dim=1, keepdim=True))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [None, MASK, EMPTY_LAYER], ids=["whole", "masked", "empty layer"])
def test_gradients_are_those_of_the_full_pass(family, mask):
    errors = check_gradients(tiny_encoder(family), ragged_examples(7), head_mask=mask)
    assert all(error.passed for error in errors), errors


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_is_computed_where_the_classifier_reads_it(family):
    model = tiny_encoder(family)
    tokens = {name: part[:2] for name, part in shapes(model).items()}
    last = attention_layers(model)[-1]
    names = {module: name for name, module in model.named_modules()}
    longest = max(len(example["input_ids"]) for example in ragged_examples(5))
    assert tokens.pop(names[last.query]) == (1, 1)
    assert tokens.pop(names[last.output]) == (1, 1)
    assert tokens.pop(names[last.key]) == tokens.pop(names[last.value]) == (longest, longest)
    # All layers before the last one are read at every position, all after it at the first only.
    counts = list(tokens.values())[::-1]  # they were captured from the last to the first
    everywhere = counts.index((1, 1))
    assert everywhere == 6
    assert set(counts[:everywhere]) == {(longest, longest)}
    assert set(counts[everywhere:]) == {(1, 1)}


def test_electra_is_lean():
    model = tiny_model("electra", dtype=torch.float32)
    seen = []
    with frozen(model), lean(model) as lean_columns:
        layers = [la for la in select_layers(model) if la.name.endswith("layer.1.output.dense")]
        batch = batch_of(model, tiny_examples(4))
        model_pass = ModelPass(lean_columns)
        capture(model, layers, batch, lambda c: seen.append(c.x.shape[1]), None, model_pass)
    assert seen == [1]


def test_classifier_that_reads_every_position_is_left_alone():
    model = reads_mean(tiny_encoder())
    assert all(part[0] > 1 for name, part in shapes(model).items() if "classifier" not in name)
    examples = ragged_examples(3)
    # One example per batch, since this mean includes padding.
    actual = tm.exact_influence(model, examples, examples, batch_tokens=1)
    names = [name for layer in select_layers(model) for name in layer.parameter_names]
    rows = [autograd_gradients(model, example, names) for example in examples]
    expected = torch.stack([torch.cat([row[name].flatten() for name in names]) for row in rows])
    torch.testing.assert_close(actual, expected @ expected.T, rtol=1e-4, atol=1e-5)


def test_last_layer_that_computes_something_else_is_left_alone():
    model = tiny_encoder()
    block = model.roberta.encoder.layer[-1]
    plain = block.feed_forward_chunk
    block.forward = lambda x, *_, **__: plain(x)  # no attention at all
    with pytest.raises(KeyError):
        shapes(model)["roberta.encoder.layer.1.attention.self.query"]
    assert shapes(model)["roberta.encoder.layer.1.output.dense"][0] > 1


def test_masked_heads_are_out_of_the_matrix_products():
    masked = shapes(tiny_encoder(), MASK)
    width = 8
    assert masked["roberta.encoder.layer.0.attention.self.value"][3] == 2 * width
    assert masked["roberta.encoder.layer.0.attention.output.dense"][2] == 2 * width
    assert masked["roberta.encoder.layer.1.attention.self.query"][3] == 1 * width
    assert masked["roberta.encoder.layer.1.attention.output.dense"][2:] == (width, 24)


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("layers", ["accumulate", "concatenate"])
@pytest.mark.parametrize("mask", [MASK, EMPTY_LAYER], ids=["masked", "empty layer"])
@pytest.mark.parametrize("dim", [900, 8000])  # 8000: attention layers are small enough to be exact
@pytest.mark.parametrize("parameters", ["encoder", "attention"])  # without and with bias
def test_features_of_a_subnetwork_are_those_of_the_masked_pass(kind, layers, mask, dim, parameters):
    model, examples = tiny_encoder(), ragged_examples(9)
    projection = tm.Projection(dim, kind, layers=layers)
    actual = tm.collect_features(model, examples, projection, parameters, head_mask=mask)
    with mask.apply(model):  # heads multiplied by zero, and nothing left out
        expected = tm.collect_features(model, examples, projection, parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_attention_that_counts_its_heads_is_only_masked():
    model, examples = tiny_encoder(), ragged_examples(6)
    expected = tm.collect_features(model, examples, tm.Projection(600), head_mask=MASK)
    for layer in attention_layers(model):

        def counts(module, inputs, output):
            if output.shape[-1] != 24:
                raise RuntimeError("shape '[6, 3, 8]' is invalid")

        layer.query.register_forward_hook(counts)
    actual = tm.collect_features(model, examples, tm.Projection(600), head_mask=MASK)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_model_is_put_back_if_the_probe_fails():
    model = tiny_encoder()
    before = dict(model.named_parameters())

    def fails(module, inputs, output):
        if output.shape[-1] != 24:
            raise TypeError("expected 3 heads")

    hook = attention_layers(model)[0].query.register_forward_hook(fails)
    with pytest.raises(TypeError, match="3 heads"), lean(model, MASK):
        pass
    hook.remove()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mask", [None, MASK])
def test_weights_are_cast_once_and_products_stay_the_same(monkeypatch, mask):
    """The products are those of autocast bit for bit, though no pass casts a weight."""
    model = tiny_encoder().requires_grad_(False)
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    given = []
    own = torch.nn.functional.linear

    def noted(x, weight, bias=None):
        given.append(weight.dtype)
        return own(x, weight, bias)

    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with lean(model, mask, torch.bfloat16):
        monkeypatch.setattr(torch.nn.functional, "linear", noted)
        for linear in linears:
            part = x[..., : linear.weight.shape[1]]
            with torch.autocast("cpu", torch.bfloat16):
                actual, expected = linear(part), own(part, linear.weight, linear.bias)
            assert torch.equal(actual, expected)
            assert torch.equal(linear(part), own(part, linear.weight, linear.bias))
    assert set(given[::2]) == {torch.bfloat16}
    assert set(given[1::2]) == {torch.float32}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_model_is_put_back(dtype):
    model = tiny_encoder()
    before = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    logits = model(**_inputs(model)).logits

    def stopped():
        with lean(model, EMPTY_LAYER, dtype):
            assert any(now is not before[name] for name, now in model.named_parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**_inputs(model)).logits, logits)
    assert not any("forward" in vars(module) for module in model.modules())


def test_mask_of_another_shape_is_refused():
    with (
        pytest.raises(ValueError, match="head mask: expected 2 layers of 3 heads"),
        lean(tiny_encoder(), tm.HeadMask.full(2, 4)),
    ):
        pass


def test_nan_is_not_hidden():
    model = tiny_encoder()
    with torch.no_grad():
        model.roberta.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="row 0: expected a finite gradient"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(600), head_mask=MASK)


def _inputs(model):
    batch = batch_of(model, ragged_examples(3))
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_gradients_with_native_products(family, mask, monkeypatch):
    monkeypatch.setattr("tracmod.gradients.lean_pass.FEWEST_ROWS", 1)
    errors = check_gradients(tiny_encoder(family), ragged_examples(7), head_mask=mask)
    assert all(error.passed for error in errors), errors


def test_native_products_take_inputs_that_are_not_contiguous(monkeypatch):
    monkeypatch.setattr("tracmod.gradients.lean_pass.FEWEST_ROWS", 1)
    examples = ragged_examples(3)
    actual = tm.exact_influence(reads_mean(tiny_encoder()), examples, examples, batch_tokens=1)
    monkeypatch.setattr("tracmod.gradients.lean_pass.FEWEST_ROWS", 10**9)
    expected = tm.exact_influence(reads_mean(tiny_encoder()), examples, examples, batch_tokens=1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
