"""Every shortcut of the engine is tried on the model first, and the model is left as it was.

The truth is float64 autograd of a fresh copy of the model for each example, as it was given.
"""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
import transformers as hf
from encoders import ragged_examples, tiny_encoder
from torch import nn

import tracmod as tm
from tracmod.gradients.capture import select_layers
from tracmod.gradients.verified_pass import verified_pass
from tracmod.models.architecture import attention_layers
from tracmod.models.loss import per_example_loss
from tracmod.models.modes import frozen
from tracmod.models.plain_pass import logits_of
from tracmod.validation.gradients import check_gradients

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 72,
    "num_labels": 3,
    "pad_token_id": 0,
}


def moved(model):
    """Make all parameters random, biases too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def bigbird():
    config = hf.BigBirdConfig(
        **SIZES, attention_type="block_sparse", block_size=4, num_random_blocks=1
    )
    torch.manual_seed(0)
    return moved(hf.BigBirdForSequenceClassification(config))


def yoso():
    config = hf.YosoConfig(**SIZES, num_hash=4, hash_code_length=3)
    torch.manual_seed(0)
    return moved(hf.YosoForSequenceClassification(config))


def long_examples(count, lengths=(60, 64, 61)):
    rows = ragged_examples(count, seed=3)
    generator = torch.Generator().manual_seed(1)
    for number, row in enumerate(rows):
        length = lengths[number % len(lengths)]
        row["input_ids"] = torch.randint(3, 61, (length,), generator=generator).tolist()
        row["attention_mask"] = [1] * length
    return rows


def truth(model, examples, parameters="all"):
    names = [n for layer in select_layers(model, parameters) for n in layer.parameter_names]
    rows = []
    for example in examples:
        double = copy.deepcopy(model).double().requires_grad_(True)
        inputs = {name: torch.tensor([value]) for name, value in example.items()}
        labels = inputs.pop("labels")
        output = double(**inputs)
        logits = logits_of(double, output, inputs["attention_mask"])
        loss = per_example_loss(logits, labels).sum()
        weights = [double.get_parameter(name) for name in names]
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        pairs = zip(weights, gradients, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in pairs])
        )
    gradients_NP = torch.stack(rows)
    return gradients_NP @ gradients_NP.T


def error_of(model, examples, parameters="all", **options):
    expected = truth(model, examples, parameters)
    actual = tm.exact_influence(model, examples, examples, parameters, **options).double()
    return float((actual - expected).norm() / expected.norm())


def everything(model):
    """Return all that a model consists of, to be compared by identity and by bits."""
    attributes = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not isinstance(value, dict)
    }
    hooks = {name: list(module._forward_hooks) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {name: (p, p.grad, p.requires_grad) for name, p in model.named_parameters()}
    config = dict(vars(model.config))
    return attributes, hooks, state, grads, config


def same(first, second):
    *others, state, grads, config = first
    *others2, state2, grads2, config2 = second
    assert others == others2
    assert grads.keys() == grads2.keys()
    assert all(a is b for n in grads for a, b in zip(grads[n], grads2[n], strict=True))
    assert state.keys() == state2.keys()
    assert all(torch.equal(state[name], state2[name]) for name in state)
    assert config == config2


def chosen(model, examples, parameters="all"):
    with (
        frozen(model),
        verified_pass(model, examples, select_layers(model, parameters)) as model_pass,
    ):
        return model_pass


# --- forms of a pass ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "xlmr", "distilbert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_supported_families_take_every_shortcut(family, dtype):
    model_pass = chosen(tiny_encoder(family).to(dtype), ragged_examples(9))
    assert model_pass.ready_mask
    assert not model_pass.alone


@pytest.mark.parametrize("family", ["bert", "roberta", "xlmr", "distilbert"])
@pytest.mark.parametrize("kept", ["all but one head", "no head of a layer"])
def test_masked_heads_are_taken_out_of_the_pass(family, kept):
    model = tiny_encoder(family)
    heads = torch.ones(len(attention_layers(model)), attention_layers(model)[0].num_heads).long()
    heads[0, 0 if kept == "all but one head" else slice(None)] = 0
    mask = tm.HeadMask(heads.tolist())
    layers = select_layers(model, "all")
    with frozen(model), verified_pass(model, ragged_examples(6), layers, mask) as model_pass:
        assert {attention_layers(model)[0].query, attention_layers(model)[0].output} <= set(
            model_pass.lean_columns
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_decoder_makes_its_own_causal_mask(family, attention):
    model = tiny_encoder(family, is_decoder=True, attn_implementation=attention)
    assert error_of(model, ragged_examples(6)) < 1e-5
    assert not chosen(model, ragged_examples(6)).alone


def test_sparse_attention_is_that_of_the_model_as_given():
    model, examples = bigbird(), long_examples(5)
    before = everything(model)
    assert error_of(model, examples) < 1e-5
    same(everything(model), before)
    assert model.bert.attention_type == "block_sparse"


def test_a_model_that_an_example_changes_for_the_next_one_is_refused():
    model = bigbird()
    before = everything(model)
    with pytest.raises(ValueError, match=r"BigBird.*examples before"):
        tm.collect_features(model, long_examples(5, (60, 7, 64)), tm.Projection(50))
    same(everything(model), before)


def test_examples_of_a_model_that_depends_on_padding_are_passed_one_by_one():
    model = yoso()
    assert chosen(model, ragged_examples(6)).alone
    assert error_of(model, ragged_examples(6)) < 1e-5


def reads_padding(model):
    """Let the classifier read the mean of all positions, padding included."""
    model.classifier.register_forward_pre_hook(lambda _, args: (args[0].mean(1, keepdim=True),))
    return model


def reads_last(model):
    model.classifier.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
    return model


@pytest.mark.parametrize("change", [reads_padding, reads_last])
def test_padding_of_the_data_counts_where_the_model_reads_it(change):
    model, examples = change(tiny_encoder()), ragged_examples(5)
    assert error_of(model, examples) < 1e-5
    for example in examples[:3]:
        example["input_ids"] = example["input_ids"] + [1, 1]
        example["attention_mask"] = example["attention_mask"] + [0, 0]
    assert error_of(model, examples) < 1e-5


def test_masked_mean_takes_padded_batches_without_the_lean_pass():
    model = tiny_encoder("bert")

    def pooled(_, args, named, output):
        mask = named["attention_mask"]
        mask = (mask if mask.dim() == 2 else mask[:, 0, 0]).to(output[0].dtype)
        mean = (output[0] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return type(output)(last_hidden_state=output[0], pooler_output=mean)

    model.bert.register_forward_hook(pooled, with_kwargs=True)
    assert error_of(model, ragged_examples(6)) < 1e-5
    assert not chosen(model, ragged_examples(6)).alone


@pytest.mark.parametrize("rows", ["left", "holes"])
def test_gaps_in_a_mask(rows):
    examples = [e for e in ragged_examples(9) if len(e["input_ids"]) > 4]
    for example in examples[::2]:
        masked = [0, 1] if rows == "left" else [1, 3]
        example["attention_mask"] = [int(i not in masked) for i in range(len(example["input_ids"]))]
    assert error_of(tiny_encoder(), examples) < 1e-5


# --- what is refused ------------------------------------------------------------------------


def test_a_random_model_is_refused():
    model = tiny_encoder()
    model.roberta.encoder.layer[0].register_forward_hook(
        lambda _, __, output: nn.functional.dropout(output, 0.3, training=True)
    )
    with pytest.raises(ValueError, match="is random"):
        tm.exact_influence(model, ragged_examples(3), ragged_examples(2))


def test_a_parameter_of_two_modules_is_refused():
    model = tiny_encoder()
    first, second = attention_layers(model)
    second.query.weight = first.query.weight
    with pytest.raises(ValueError, match=r"layer.0.*query.*layer.1.*query"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(50))


def test_a_weight_that_is_used_outside_its_module_is_refused():
    model = tiny_encoder()
    weight = attention_layers(model)[0].query.weight
    model.roberta.encoder.layer[1].register_forward_hook(lambda _, __, out: out @ weight)
    with pytest.raises(ValueError, match=r"query.weight differ"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(50))


def test_a_hook_on_a_weight_is_refused():
    model = tiny_encoder()
    model.roberta.embeddings.word_embeddings.weight.register_hook(lambda g: g * 0.5)
    with pytest.raises(ValueError, match=r"word_embeddings.weight differ"):
        tm.exact_influence(model, ragged_examples(3), ragged_examples(2), "all")


class Doubled(nn.LayerNorm):
    def forward(self, x):
        return super().forward(2 * x + x.square())


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 3


@pytest.mark.parametrize("kind", ["layernorm", "embedding"])
def test_a_layer_that_computes_something_else_is_refused(kind):
    model = tiny_encoder()
    if kind == "layernorm":
        model.roberta.encoder.layer[0].output.LayerNorm.__class__ = Doubled
    else:
        model.roberta.embeddings.word_embeddings.__class__ = Scaled
    with pytest.raises(ValueError, match=r"(LayerNorm|word_embeddings).weight differ"):
        tm.exact_influence(model, ragged_examples(3), ragged_examples(2), "all")


def test_a_forward_pass_that_fails_is_a_sentence():
    model = tiny_encoder()

    def fails(module, args):
        raise RuntimeError("needs a GPU kernel")

    model.roberta.encoder.layer[0].register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="RuntimeError: needs a GPU kernel"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(50))


def test_weights_that_are_not_in_memory_or_not_numbers_are_refused():
    model = tiny_encoder()
    model.classifier.dense.weight = nn.Parameter(torch.empty(24, 24, device="meta"))
    with pytest.raises(ValueError, match=r"classifier.dense.weight.*meta"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(50))
    quantized = torch.zeros(24, 24, dtype=torch.int8)
    model.classifier.dense.weight = nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(ValueError, match=r"classifier.dense.weight.*int8"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(50))


def test_a_forward_pass_that_writes_to_weights_is_refused():
    model = tiny_encoder()

    def shrink(module, args):
        with torch.no_grad():
            module.weight.mul_(0.9)

    model.classifier.dense.register_forward_pre_hook(shrink)
    with pytest.raises(ValueError, match="writes to"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(50))
    model = tiny_encoder()
    model.roberta.embeddings.word_embeddings.max_norm = 0.1
    before = everything(model)
    with pytest.raises(ValueError, match="max_norm"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(50))
    same(everything(model), before)


def test_a_model_with_a_compiled_part_is_refused():
    model = tiny_encoder()
    model.roberta = torch.compile(model.roberta, backend="eager")
    with pytest.raises(ValueError, match=r"compiled parts.*roberta"):
        tm.collect_features(model, ragged_examples(3), tm.Projection(50))


# --- models that are used in other ways ------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_has_the_features_of_the_model_inside(wrap):
    model, examples, projection = tiny_encoder(), ragged_examples(5), tm.Projection(80)
    expected = tm.collect_features(model, examples, projection)
    wrapped = wrap(model)
    assert torch.equal(tm.collect_features(wrapped, examples, projection), expected)
    again = tm.exact_influence(wrapped, examples, examples)
    assert torch.equal(again, tm.exact_influence(model, examples, examples))


def test_a_model_compiled_in_place_runs_uncompiled():
    model, examples = tiny_encoder(), ragged_examples(5)
    expected = tm.exact_influence(model, examples, examples)

    def compiled(*args, **named):
        raise AssertionError("ran compiled")

    model._compiled_call_impl = compiled
    assert torch.equal(tm.exact_influence(model, examples, examples), expected)
    assert model._compiled_call_impl is compiled


def test_hooks_of_the_user():
    model, examples = tiny_encoder(), ragged_examples(5)
    last, first = model.roberta.encoder.layer[1], model.roberta.encoder.layer[0]
    first.output.dense.register_forward_hook(lambda _, __, output: output * 1.5)
    first.intermediate.dense.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    last.attention.self.register_forward_hook(lambda _, __, out: (out[0] * 0.7, *out[1:]))
    assert error_of(model, examples) < 1e-5
    last.attention.register_full_backward_hook(
        lambda _, g_in, __: tuple(None if g is None else 2 * g for g in g_in)
    )
    assert error_of(model, examples) < 1e-5


def test_forward_passes_of_instances_stay():
    """As accelerate leaves them: the pass of the class is called by another one."""
    model, examples = tiny_encoder(), ragged_examples(5)
    dense, block = model.roberta.encoder.layer[0].output.dense, model.roberta.encoder.layer[1]
    for module in (dense, block):
        module.forward = MethodType(lambda self, *a, **n: type(self).forward(self, *a, **n), module)
    before = everything(model)
    assert error_of(model, examples) < 1e-5
    same(everything(model), before)


@pytest.mark.parametrize(
    "flags",
    [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}],
    ids=lambda flags: next(iter(flags)),
)
def test_outputs_that_the_config_asks_for(flags):
    model = tiny_encoder("bert", attn_implementation="eager")
    for name, value in flags.items():
        setattr(model.config, name, value)
    before = everything(model)
    assert error_of(model, ragged_examples(5)) < 1e-5
    assert all(error.passed for error in check_gradients(model, ragged_examples(4)))
    same(everything(model), before)


def test_a_stopped_gradient_is_zero():
    model, examples = tiny_encoder(), ragged_examples(4)
    block = model.roberta.encoder.layer[0]

    def stopped(self, *args, **named):
        with torch.no_grad():
            return type(self).forward(self, *args, **named)

    block.forward = MethodType(stopped, block)
    assert error_of(model, examples) < 1e-5


def test_the_default_dtype_of_the_caller_does_not_matter():
    model, examples, projection = tiny_encoder(), ragged_examples(5), tm.Projection(80)
    expected = tm.collect_features(model, examples, projection)
    exact = tm.exact_influence(model, examples, examples, normalize="cosine")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(tm.collect_features(model, examples, projection), expected)
        again = tm.exact_influence(model, examples, examples, normalize="cosine")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, exact)


def test_state_that_a_pass_changes_is_restored():
    model = tiny_encoder()
    model.calls, model.history, model.table = 0, [], {"last": None}
    model.register_buffer("running", torch.zeros(3))
    model.running_attribute = torch.zeros(2)

    def counts(module, args, output):
        module.calls += 1
        module.history.append(module.calls)
        module.table["last"] = module.calls
        module.running += 1
        module.running_attribute.add_(1)
        module.config.calls = module.calls
        module.new_attribute = module.calls

    model.register_forward_hook(counts)
    before = everything(model)
    assert error_of(model, ragged_examples(4)) < 1e-5
    same(everything(model), before)
    assert (model.history, model.table) == ([], {"last": None})
    assert torch.equal(model.running_attribute, torch.zeros(2))


@pytest.mark.parametrize("make", [tiny_encoder, bigbird])
@pytest.mark.parametrize("where", ["probe", "batch"])
def test_model_is_left_as_it_was_after_an_interruption(make, where, monkeypatch):
    model = make().train()
    model.classifier.requires_grad_(False)
    before, passes = everything(model), []

    def interrupts(module, args, named):
        passes.append(1)
        if len(passes) == (2 if where == "probe" else 12):
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupts, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        tm.exact_influence(model, long_examples(6), long_examples(3), "attention", batch_tokens=1)
    handle.remove()
    same(everything(model), before)


# --- check ----------------------------------------------------------------------------------


def wrong_mask(monkeypatch):
    right = tm.gradients.capture.ready_mask
    monkeypatch.setattr("tracmod.gradients.capture.ready_mask", lambda m: right(m).tril())


def wrong_lean(monkeypatch):
    import tracmod.gradients.lean_pass as lean_pass
    from tracmod.models.architecture import family

    right = family.attend_from_first
    monkeypatch.setattr(family, "attend_from_first", lambda *args: right(*args) * 1.01)
    monkeypatch.setattr(lean_pass, "_reads_first_alone", lambda *args: True)


def wrong_padding(monkeypatch):
    import tracmod.models.plain_pass as plain_pass

    def collate(*args, **named):
        batch = plain_collate(*args, **named)
        return (
            batch
            if "longest" in named
            else batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
        )

    plain_collate = plain_pass.collate
    monkeypatch.setattr(plain_pass, "collate", collate)
    monkeypatch.setattr("tracmod.gradients.verified_pass.collate", collate)


@pytest.mark.parametrize("fault", [wrong_mask, wrong_lean, wrong_padding])
def test_the_check_fails_for_a_wrong_shortcut_that_is_not_verified(fault, monkeypatch):
    model, examples = tiny_encoder(), ragged_examples(6)
    fault(monkeypatch)
    # Verified, the shortcut is not taken, and everything is right.
    assert error_of(model, examples) < 1e-5
    assert all(error.passed for error in check_gradients(model, examples))
    monkeypatch.setattr("tracmod.gradients.verified_pass._Probe.first_difference", lambda *_: None)
    failed = {e.kind for e in check_gradients(model, examples) if e.verdict == "WRONG"}
    assert {"logits", "encoder linear weight"} <= failed


def test_the_check_fails_for_the_form_of_attention_that_a_short_probe_leaves(monkeypatch):
    model, examples = bigbird(), long_examples(4)
    assert all(error.passed for error in check_gradients(model, examples))
    right = tm.gradients.verified_pass._chosen_pass

    def switched(stack, model, *others):
        model_pass = right(stack, model, *others)
        model.bert.set_attention_type("original_full")
        return type(model_pass)(alone=True)

    monkeypatch.setattr("tracmod.gradients.verified_pass._chosen_pass", switched)
    assert not all(error.passed for error in check_gradients(model, examples))


@pytest.mark.parametrize(("bias", "verdict"), [(0, "ok"), (9, "imprecise"), (13, "WRONG")])
def test_float32_that_is_too_coarse_does_not_pass(bias, verdict):
    model, examples = tiny_encoder("bert"), ragged_examples(3)
    with torch.no_grad():
        model.classifier.bias[0] += bias  # losses of 1, 2e-4 and 4e-6
    for example in examples:
        example["labels"] = 0
    errors = {error.kind: error for error in check_gradients(model, examples)}
    assert errors["logits"].verdict == "ok"
    assert errors["encoder linear weight"].verdict == verdict
