"""Every supported family against transformers' own: gradients, masks, pruning, training, export.

docs/models.md is made from these tests: `python tests/support/models_page.py` writes it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from autograd_truth import flat_gradients, influence_error
from families import FAST, FORMS, PAD, mixed_examples, small_model
from models_page import page
from tiny_models import SENTENCES
from transformers import AutoConfig, AutoModelForSequenceClassification

import tracmod as tm
from tracmod.features.projection import projection_keys
from tracmod.gradients.capture import select_layers
from tracmod.gradients.lean_pass import _last_block, lean
from tracmod.gradients.verified_pass import verified_pass
from tracmod.kernels import reference
from tracmod.models.architecture import attention_layers
from tracmod.models.loading import create_from_config, load_model
from tracmod.models.modes import frozen
from tracmod.models.plain_pass import given_batch, model_logits
from tracmod.models.tokenizer import train_tokenizer
from tracmod.subnetworks.head_mask import HeadMask, head_slices
from tracmod.training.fine_tune import TrainingSettings, fine_tune
from tracmod.training.optimizer import HeadwiseAdamW

TOLERANCE = 1e-6
ALL = [
    pytest.param(form, marks=[] if form in FAST else pytest.mark.slow, id=form) for form in FORMS
]
NO_SDPA = ("deberta-v3", "deberta-v2", "mpnet")
EMPTY_ROWS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "modernbert", "modernbert-mean")


def own_gradients(model, examples, parameters="all"):
    """Return the gradients (N, P) of transformers' own loss by autograd, one example at a time."""

    def loss_of(model, example):
        return model(**given_batch(model, example)).loss

    gradients = flat_gradients(model, examples, loss_of, parameters)
    model.config.problem_type = None  # which transformers sets
    return gradients


@pytest.mark.parametrize("form", ALL)
def test_exact_influence_is_that_of_one_example_autograd(form):
    model = small_model(form)
    trains, queries = mixed_examples(32, seed=1), mixed_examples(4, seed=2)
    train, query = own_gradients(model, trains), own_gradients(model, queries)
    for count in (1, 7, 32):
        actual = tm.exact_influence(model, trains[:count], queries, "all")
        assert influence_error(actual, train[:count], query) <= TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("form", ALL)
def test_padding_of_the_dataset_is_read_as_the_model_reads_it(form, padding):
    model = small_model(form)
    trains, queries = mixed_examples(9, 1, padding), mixed_examples(4, 2, padding)
    actual = tm.exact_influence(model, trains, queries)
    train, query = (own_gradients(model, part, "encoder") for part in (trains, queries))
    assert influence_error(actual, train, query) <= TOLERANCE


@pytest.mark.parametrize("form", [form for form in ALL if form.values[0] not in NO_SDPA])
def test_eager_attention_gives_the_same(form):
    # In float64, eager attention of these families has rows without a key that are NaN: they mask
    # by the smallest float64 and take the softmax in float32.
    dtype = torch.float32 if form in EMPTY_ROWS else torch.float64
    model = small_model(form, dtype=dtype, attn_implementation="eager")
    examples = mixed_examples(7, seed=1)
    actual = tm.exact_influence(model, examples, examples[:3])
    truth = own_gradients(small_model(form, attn_implementation="sdpa"), examples, "encoder")
    assert influence_error(actual, truth, truth[:3]) <= (
        TOLERANCE if dtype is torch.float64 else 1e-5
    )


@pytest.mark.parametrize("form", ALL)
def test_features_are_the_projection_of_the_formed_gradients(form):
    """Every layer is projected by the specification in float64, calls and examples apart."""
    model, examples = small_model(form), mixed_examples(5, seed=1)
    projection = tm.Projection(dim=len(select_layers(model)) * 9, layers="concatenate", seed=3)
    actual = tm.collect_features(model, examples, projection)
    expected = torch.zeros(actual.shape, dtype=torch.float64)
    gradients, first = own_gradients(model, examples, "encoder"), 0
    for layer in select_layers(model):
        slot = projection.slots(select_layers(model))[layer.name]
        parts = []
        for name in layer.parameter_names:
            shape = model.get_parameter(name).shape
            parts.append(gradients[:, first : first + shape.numel()].unflatten(1, shape))
            first += shape.numel()
        columns = slice(slot.offset, slot.offset + slot.k_out * slot.k_in)
        expected[:, columns] += projected(layer, parts, projection, slot)
    torch.testing.assert_close(
        actual.double(), expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max())
    )


def projected(layer, parts, projection, slot):
    """Project formed gradients of one layer: as tokens, one for each row of the gradient."""
    keys = projection_keys(layer)
    count = len(parts[0])
    out = torch.zeros(count, slot.k_out * slot.k_in, dtype=torch.float64)
    if layer.kind == "linear":
        x = torch.eye(layer.in_features, dtype=torch.float64).expand(count, -1, -1)
        g = parts[0].mT
        if layer.bias:  # a token that only the bias reads
            x = torch.cat([x, x.new_zeros(count, 1, layer.in_features)], dim=1)
            g = torch.cat([g, (parts[1] - g.sum(dim=1))[:, None]], dim=1)
    elif layer.kind == "elementwise":
        x = torch.ones(count, 1, layer.in_features, dtype=torch.float64)
        g = parts[0][:, None]
        if layer.bias:
            x = torch.cat([x, x.new_zeros(x.shape)], dim=1)
            g = torch.cat([g, (parts[1] - parts[0])[:, None]], dim=1)
    else:
        x = torch.arange(layer.in_features).expand(count, -1)
        g = parts[0]
    reference.project_gradients(
        x, g, out, layer=layer.kind, kind=slot.kind, k_out=slot.k_out, k_in=slot.k_in,
        rows=slot.rows, seed=projection.seed, input_key=keys.input, output_key=keys.output,
        bias=layer.bias and layer.kind != "embedding",
    )  # fmt: skip
    return out


def zeroed_heads(layer, masked_heads):
    """Return a hook that sets the outputs of heads to zero in front of the output projection."""

    def zero(_, inputs):
        heads = inputs[0].unflatten(-1, (layer.num_heads, layer.head_dim)).clone()
        heads[..., masked_heads, :] = 0
        return (heads.flatten(-2), *inputs[1:])

    return layer.output.register_forward_pre_hook(zero)


def some_mask(model):
    """Return a mask with a head masked in the first layer, and all but one in the last."""
    layers = attention_layers(model)
    array = torch.ones(len(layers), layers[0].num_heads, dtype=torch.int64)
    array[0, 1] = 0
    array[-1, 1:] = 0
    return HeadMask(array.numpy())


def own_logits(model, examples):
    with torch.no_grad():
        return torch.cat([model_logits(model, given_batch(model, one)) for one in examples])


@pytest.mark.parametrize("form", ALL)
def test_a_masked_head_has_no_output_and_no_gradient(form):
    model, examples = small_model(form), mixed_examples(5, seed=1)
    mask = some_mask(model)
    plain, actual = own_logits(model, examples), None
    with mask.apply(model):
        actual = own_logits(model, examples)
    hooks = [
        zeroed_heads(layer, (1 - torch.from_numpy(mask.array[n].copy())).nonzero().flatten())
        for n, layer in enumerate(attention_layers(model))
    ]
    expected = own_logits(model, examples)
    truth = own_gradients(model, examples, "encoder")
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(actual, plain, rtol=1e-3)
    influence = tm.exact_influence(model, examples, examples[:2], head_mask=mask)
    assert influence_error(influence, truth, truth[:2]) <= TOLERANCE
    with mask.apply(model):
        batch = given_batch(model, examples[3])
        model(**batch).loss.backward()
    model.config.problem_type = None
    for part in head_slices(model, mask):
        assert not part.parameter.grad[part.index].any(), part.name


@pytest.mark.parametrize("form", ALL)
def test_every_number_of_a_divided_parameter_belongs_to_one_head(form):
    model = small_model(form)
    owned = {}
    for part in head_slices(model):
        owned.setdefault(part.name, torch.zeros(part.parameter.shape))[part.index] += 1
    assert all((count == 1).all() for count in owned.values())
    assert len(owned) >= 2 * len(attention_layers(model))


@pytest.mark.parametrize("form", ALL)
def test_smaller_models_have_the_logits_of_the_masked_model(form, tmp_path):
    model, examples = small_model(form, dtype=torch.float32), mixed_examples(5, seed=1)
    mask = some_mask(model)
    with mask.apply(model):
        expected = own_logits(model, examples)
    tm.save_masked(model, mask, tmp_path / "zeros")
    zeros = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "zeros", trust_remote_code=True
    )
    torch.testing.assert_close(own_logits(zeros.eval(), examples), expected, rtol=1e-5, atol=1e-5)
    if not FORMS[form].pruned:
        with pytest.raises(ValueError, match=r"form with zeros"):
            tm.save_pruned(model, mask, tmp_path / "pruned")
        return
    tm.save_pruned(model, mask, tmp_path / "pruned")
    pruned = tm.load_pruned(tmp_path / "pruned")
    assert pruned.num_parameters() < model.num_parameters()
    torch.testing.assert_close(own_logits(pruned, examples), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ALL)
def test_the_last_layer_is_lean_where_the_classifier_reads_one_token(form):
    model = small_model(form)
    examples = mixed_examples(4, seed=1)
    with lean(model):
        block = _last_block(model)
        assert (block is not None and "forward" in vars(block[0])) == FORMS[form].lean
    with frozen(model), verified_pass(model, examples, select_layers(model)) as chosen:
        block = _last_block(model)
        assert (block is not None and "forward" in vars(block[0])) == FORMS[form].lean
        assert not chosen.alone


@pytest.mark.parametrize("form", ALL)
def test_a_step_with_a_mask_leaves_masked_heads_as_they_are(form):
    model, mask = small_model(form, dtype=torch.float32), None
    mask = some_mask(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = HeadwiseAdamW(model, weight_decay=0.1, split_heads=True)
    for step in range(2):
        with mask.apply(model) if step else torch.enable_grad():
            model.zero_grad()
            model(**given_batch(model, mixed_examples(4, seed=1)[step + 2])).loss.backward()
        first = {part.name: part.parameter.detach().clone() for part in head_slices(model)}
        optimizer.step(0.01, mask if step else None)
    moved = [
        name for name, old in before.items() if not torch.equal(old, model.get_parameter(name))
    ]
    assert {part.name for part in head_slices(model)} <= set(moved)
    for part in head_slices(model, mask):
        assert torch.equal(part.parameter[part.index], first[part.name][part.index]), part.name
    state = optimizer.state()
    again = HeadwiseAdamW(model, weight_decay=0.1, split_heads=True)
    again.load_state(state)
    assert state.keys() == again.state().keys()
    assert all(torch.equal(state[key], value) for key, value in again.state().items())


@pytest.mark.parametrize("form", ALL)
def test_a_model_made_from_a_config_trains_and_loads(form, tmp_path):
    tokenizer = train_tokenizer(SENTENCES * 5, 300, 32)
    small_model(form).config.save_pretrained(tmp_path / "shape")
    model = create_from_config(tmp_path / "shape", tokenizer, ["no", "maybe", "yes"], seed=1)
    examples = [dict(tokenizer(text), labels=row % 3) for row, text in enumerate(SENTENCES)]
    folder = tmp_path / "trained"
    settings = TrainingSettings(epochs=1, batch_size=4, learning_rate=1e-3, seed=0)
    checkpoints = fine_tune(model, tokenizer, examples, ["en"] * 7, folder, settings)
    loaded, own_tokenizer = load_model(folder / "checkpoint-1")
    assert len(own_tokenizer) == loaded.config.vocab_size
    torch.testing.assert_close(own_logits(loaded, examples), own_logits(model.eval(), examples))
    assert checkpoints


def test_padding_of_a_batch_is_not_a_token_of_a_table():
    """The rows of DeBERTa's table outnumber the tokens of short texts, and none is padding."""
    model = small_model("deberta-v2", position_buckets=32)
    examples = [one for one in mixed_examples(40, seed=1) if len(one["input_ids"]) < 4]
    truth = own_gradients(model, examples, "encoder")
    assert influence_error(tm.exact_influence(model, examples, examples), truth, truth) <= TOLERANCE


def test_a_longer_text_than_any_window_or_bucket():
    """Distances beyond the buckets, and the table's last rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (70,), generator=generator).tolist()
    examples = [{"input_ids": ids, "labels": 1}, {"input_ids": ids[:9], "labels": 2}]
    for form in ("deberta-v3", "modernbert"):
        model = small_model(form)
        truth = own_gradients(
            model,
            [one | {"attention_mask": [1] * len(one["input_ids"])} for one in examples],
            "all",
        )
        assert (
            influence_error(tm.exact_influence(model, examples, examples, "all"), truth, truth)
            <= TOLERANCE
        )


def test_a_convolution_is_refused_by_its_name():
    model = small_model("deberta-v3", conv_kernel_size=3)
    with pytest.raises(ValueError, match=r"got .*conv\.conv\.weight"):
        tm.exact_influence(model, mixed_examples(2), mixed_examples(2))
    tm.exact_influence(model, mixed_examples(2), mixed_examples(2), "attention")


def test_a_family_that_is_not_supported_is_named():
    config = AutoConfig.for_model("gpt2", n_embd=24, n_layer=1, n_head=2, vocab_size=61)
    config.pad_token_id, config.num_labels = PAD, 3
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match=r"ModernBERT.*got model_type 'gpt2'"):
        tm.exact_influence(model, mixed_examples(2), mixed_examples(2))


def test_the_page_of_models_is_up_to_date():
    written = Path(__file__).parents[2] / "docs" / "models.md"
    assert written.read_text(encoding="utf-8") == page()
