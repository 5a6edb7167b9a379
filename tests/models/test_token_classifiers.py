"""Token classifiers: the engine against one-example autograd of transformers' own loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from autograd_truth import exact_error, flat_gradients, influence_error
from families import FAST, FORMS, LABELS, has_tokens, small_model, small_tagger, tagged_examples
from torch import nn

import tracmod as tm
from tracmod.gradients import ekfac
from tracmod.gradients.capture import select_layers
from tracmod.gradients.lean_pass import _last_block, lean
from tracmod.gradients.verified_pass import verified_pass
from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import TokenLabels, as_examples
from tracmod.models.modes import frozen
from tracmod.models.plain_pass import given_batch, predict_tokens
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import head_importance
from tracmod.validation.gradients import check_gradients

TOLERANCE = 1e-6
FAST_TAGGERS = ("bert", "xlm-roberta", "deberta-v3", "modernbert", "distilbert", "electra")
ALL = [
    pytest.param(form, marks=[] if form in FAST_TAGGERS else pytest.mark.slow, id=form)
    for form in FORMS
    if has_tokens(form)
]


def own_loss(model, example):
    """Return the mean over labelled tokens of the cross entropy, from the model's own pass."""
    batch = given_batch(model, example)
    labels_S = batch.pop("labels")[0]
    log_SC = model(**batch).logits[0].log_softmax(dim=-1)
    counted = labels_S != -100
    return -log_SC[counted, labels_S[counted]].mean()


def own_gradients(model, examples, parameters="all"):
    return flat_gradients(model, examples, own_loss, parameters)


@pytest.mark.parametrize("form", ALL)
def test_exact_influence_is_that_of_one_example_autograd(form):
    model, trains, queries = (
        small_tagger(form),
        tagged_examples(32, seed=1),
        tagged_examples(4, seed=2),
    )
    assert exact_error(model, trains, queries, own_loss, counts=(1, 7, 32)) <= TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("form", ALL)
def test_padding_of_the_dataset_is_read_as_the_model_reads_it(form, padding):
    model, trains, queries = (
        small_tagger(form),
        tagged_examples(9, 1, padding),
        tagged_examples(4, 2, padding),
    )
    assert exact_error(model, trains, queries, own_loss, "encoder") <= TOLERANCE


@pytest.mark.parametrize("form", ALL)
def test_the_last_layer_is_computed_at_every_position(form):
    """The lean pass of the first position would be wrong; masked heads may still be left out."""
    model = small_tagger(form)
    examples = as_examples(tagged_examples(4, seed=1), model=model)
    with lean(model):
        block = _last_block(model)
        assert block is None or "forward" not in vars(block[0])
    with frozen(model), verified_pass(model, examples, select_layers(model)) as chosen:
        block = _last_block(model)
        assert block is None or "forward" not in vars(block[0])
        assert not chosen.alone


@pytest.mark.parametrize("form", ALL)
def test_masked_heads(form):
    model, examples = small_tagger(form), tagged_examples(7, seed=1)
    layers = attention_layers(model)
    array = np.ones((len(layers), layers[0].num_heads), dtype=np.int64)
    array[0, 1], array[-1, 1:] = 0, 0
    mask = HeadMask(array)
    with mask.apply(model):
        truth = own_gradients(model, examples, "encoder")
    plain = own_gradients(model, examples, "encoder")
    assert not torch.allclose(truth, plain, rtol=1e-3)
    actual = tm.exact_influence(model, examples, examples[:2], head_mask=mask)
    assert influence_error(actual, truth, truth[:2]) <= TOLERANCE


@pytest.mark.parametrize("form", [form for form in ALL if FORMS[form.values[0]].pruned])
def test_smaller_models_have_the_logits_of_the_masked_model(form, tmp_path):
    model = small_tagger(form, dtype=torch.float32)
    examples = as_examples(tagged_examples(5, seed=1), model=model)
    layers = attention_layers(model)
    array = np.ones((len(layers), layers[0].num_heads), dtype=np.int64)
    array[0, 1] = 0
    with HeadMask(array).apply(model):
        expected = predict_tokens(model, examples)
    tm.save_masked(model, HeadMask(array), tmp_path / "zeros")
    tm.save_pruned(model, HeadMask(array), tmp_path / "pruned")
    zeros = type(model).from_pretrained(tmp_path / "zeros")
    for smaller in (zeros.eval(), tm.load_pruned(tmp_path / "pruned")):
        assert type(smaller) is type(model)
        for own, whole in zip(predict_tokens(smaller, examples), expected, strict=True):
            torch.testing.assert_close(own, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ALL)
def test_the_check_passes_against_the_loss_that_transformers_returns(form):
    model = small_tagger(form, dtype=torch.float32)
    assert all(part.passed for part in check_gradients(model, tagged_examples(5, seed=1)))


@pytest.mark.parametrize(
    "loss",
    [
        tm.ExampleLoss("token_cross_entropy", label_smoothing=0.2),
        tm.ExampleLoss("token_cross_entropy", class_weights=[0.5, 2, 1], label_smoothing=0.1),
    ],
)
def test_stated_losses_of_tokens(loss):
    model, examples = small_tagger("bert", dtype=torch.float32), tagged_examples(5, seed=1)
    assert all(part.passed for part in check_gradients(model, examples, loss=loss))
    assert loss.measured == tm.ExampleLoss("token_cross_entropy")


def test_the_loss_of_a_sentence_is_a_mean_over_its_tokens():
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, -100, 2, 1], [-100, 1, -100, -100]])
    losses = tm.ExampleLoss("token_cross_entropy")(logits, labels)
    own = nn.CrossEntropyLoss()
    expected = [own(logits[row], labels[row]) for row in range(2)]
    torch.testing.assert_close(losses, torch.stack(expected))
    assert not torch.isclose(losses.mean(), own(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("form", ["bert", "modernbert"])
def test_products_of_features_estimate_influence(form):
    """Over seeds of the projection, they are unbiased; a linear layer's tokens are all counted."""
    model, examples = small_tagger(form, dtype=torch.float32), tagged_examples(6, seed=1)
    exact = tm.exact_influence(model, examples, examples)
    estimates = torch.stack(
        [
            rows @ rows.T
            for seed in range(40)
            for rows in [tm.collect_features(model, examples, tm.Projection(2048, seed=seed))]
        ]
    )
    standard_error = estimates.std(dim=0) / len(estimates) ** 0.5
    assert ((estimates.mean(dim=0) - exact).abs() <= 4.5 * standard_error + 1e-6).all()
    assert (standard_error.diagonal() < 0.1 * exact.diagonal()).all()


def test_importance_of_heads_is_the_derivative_of_the_loss():
    model = small_tagger("bert")
    examples = as_examples(tagged_examples(5, seed=1), model=model)
    actual = head_importance(model, examples, normalize=False)
    layer, head, step = attention_layers(model)[1], 2, 1e-5
    columns = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
    weight, derivatives = layer.output.weight.data, []
    whole = weight.clone()
    for example in examples:
        losses = []
        for factor in (1 + step, 1 - step):
            weight[:, columns] = whole[:, columns] * factor
            losses.append(float(own_loss(model, example).detach()))
        weight.copy_(whole)
        derivatives.append(abs(losses[0] - losses[1]) / (2 * step))
    assert actual[1, head] == pytest.approx(np.mean(derivatives), rel=1e-6)


def test_predictions_are_those_of_labelled_tokens():
    model = small_tagger("xlm-roberta")
    examples = as_examples(tagged_examples(9, 1, "left"), model=model)
    predicted = predict_tokens(model, examples, batch_tokens=64)
    for example, logits in zip(examples, predicted, strict=True):
        batch = given_batch(model, example)
        labelled = batch["labels"][0] != -100
        own = model(**{name: part for name, part in batch.items() if name != "labels"}).logits
        torch.testing.assert_close(logits, own[0, labelled].detach())


@pytest.mark.parametrize("labels", ["given", "sampled"])
def test_ekfac(labels):
    model, examples = small_tagger("bert", dtype=torch.float32), tagged_examples(6, seed=1)
    metric = tm.fit_ekfac(model, examples, labels=labels)
    scores = tm.exact_influence(model, examples, examples, preconditioner=metric)
    assert (scores.diagonal() > 0).all()
    weighted = tm.ExampleLoss("token_cross_entropy", class_weights=[1, 2, 3])
    with pytest.raises(ValueError, match=r"labels.*given.*class weights"):
        tm.fit_ekfac(model, examples, loss=weighted)


def test_sampled_tags_have_the_hessian_of_the_loss(monkeypatch):
    """The mean of g g^T at the logits over many draws, against torch's Hessian."""
    draws, tags = 20_000, TokenLabels([1, -100, 2, 0])
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labelled = torch.tensor(tags) != -100
    monkeypatch.setattr(ekfac, "predict_tokens", lambda *_, **__: [logits[labelled]] * draws)
    loss = tm.ExampleLoss("token_cross_entropy")
    sampled, sampled_loss = ekfac._with_sampled_labels(None, [{"labels": tags}] * draws, loss, 9, 0)
    leaf = logits.expand(draws, -1, -1).clone().requires_grad_()
    chosen = torch.tensor([example["labels"] for example in sampled])
    (gradient,) = torch.autograd.grad(sampled_loss(leaf, chosen).sum(), leaf)
    outer = gradient.flatten(1).T @ gradient.flatten(1) / draws
    hessian = torch.autograd.functional.hessian(
        lambda z: loss(z.view(1, 4, 3), torch.tensor([tags])).sum(), logits.flatten()
    )
    torch.testing.assert_close(outer, hessian, rtol=0.1, atol=0.004)


IDS = [5, 6, 7]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"labels": [-100, -100, -100]}, "row 1.*labelled token"),
        ({"labels": [0, 1]}, "row 1.*3 tokens.*2"),
        ({"labels": [0, LABELS, 1]}, "row 1.*0 to 2.*3"),
        ({"labels": [0, -1, 1]}, "row 1.*-1"),
        ({"labels": [0, 1.0, 1]}, "row 1.*1.0"),
        ({"labels": 1}, "row 1.*list.*1"),
        ({"labels": [0, 1, 2], "attention_mask": [0, 1, 1]}, "row 1.*padding.*0 at token 0"),
        ({"labels": [0, 1, 2], "attention_mask": [1, 1, 0]}, "row 1.*padding.*2 at token 2"),
    ],
)
def test_labels_that_do_not_fit_the_tokens_are_refused(example, message):
    examples = [
        {"input_ids": IDS, "labels": [0, -100, 1], "attention_mask": [1, 1, 1]},
        {"input_ids": IDS, "attention_mask": [1, 1, 1], **example},
    ]
    with pytest.raises(ValueError, match=f"dataset: {message}"):
        tm.collect_features(small_tagger("bert"), examples, tm.Projection(64))


def test_a_loss_of_the_other_unit_is_refused():
    tagger, examples = small_tagger("bert"), tagged_examples(2, seed=1)
    with pytest.raises(ValueError, match=r"token_cross_entropy.*BertForToken.*got cross entropy"):
        tm.exact_influence(tagger, examples, examples, loss=tm.ExampleLoss())
    with pytest.raises(ValueError, match=r"token_cross_entropy.*function"):
        tm.exact_influence(tagger, examples, examples, loss=lambda z, y: z.sum(dim=(1, 2)))
    texts = [{"input_ids": IDS, "labels": 1}]
    loss = tm.ExampleLoss("token_cross_entropy")
    with pytest.raises(ValueError, match=r"BertForSequence.*got token cross entropy"):
        tm.exact_influence(small_model("bert"), texts, texts, loss=loss)


def test_a_subclass_of_a_token_classifier_is_one():
    model = small_tagger("bert", dtype=torch.float32)

    class Mine(type(model)):
        """Computes the same."""

    examples = tagged_examples(3, seed=1)
    expected = tm.exact_influence(model, examples, examples)
    model.__class__ = Mine
    torch.testing.assert_close(tm.exact_influence(model, examples, examples), expected)


def test_the_fast_forms_have_token_classifiers():
    assert set(FAST_TAGGERS) <= {form for form in FORMS if has_tokens(form)}
    assert [form for form in FAST if not has_tokens(form)] == ["bert-mean"]
