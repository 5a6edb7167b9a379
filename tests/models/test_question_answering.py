"""Models for question answering: the span of an answer as two choices among an example's tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from autograd_truth import exact_error, flat_gradients, influence_error
from families import FORMS, PAD, VOCABULARY, answers, small_model
from made_adapters import changed_adapter
from transformers import AutoModelForQuestionAnswering

import tracmod as tm
from tracmod.gradients.capture import select_layers
from tracmod.gradients.ekfac import _with_sampled_tags
from tracmod.gradients.lean_pass import _last_block
from tracmod.gradients.verified_pass import verified_pass
from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import as_examples
from tracmod.models.loading import load_classifier
from tracmod.models.modes import frozen
from tracmod.models.plain_pass import given_batch, predict_tokens
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.validation.gradients import check_gradients

TOLERANCE = 1e-6
FAST = ("bert", "deberta-v3", "distilbert")
ALL = [
    pytest.param(form, marks=[] if form in FAST else pytest.mark.slow, id=form)
    for form in FORMS
    if answers(form)
]


def reader(form, **settings):
    """Build a small model for question answering of a form."""
    return small_model(form, auto_class=AutoModelForQuestionAnswering, num_labels=2, **settings)


def questions(count, seed=0, padding="none"):
    """Make examples of 3 to 22 tokens with an answer; some are padded if it says so."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(count):
        length = 3 + (row * 7 + seed) % 20
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        first, last = sorted(torch.randint(length, (2,), generator=generator).tolist())
        mask, extra = [1] * length, row % 3
        if padding == "left":
            ids, mask = [PAD] * extra + ids, [0] * extra + mask
            first, last = first + extra, last + extra
        elif padding == "right":
            ids, mask = ids + [PAD] * extra, mask + [0] * extra
        example = {"input_ids": ids, "attention_mask": mask}
        examples.append(example | {"start_positions": first, "end_positions": last})
    return examples


def own_loss(model, example):
    """Return the loss of one example from the model's own pass, over its tokens alone."""
    example = as_examples([example], model=model)[0]
    batch = given_batch(model, example)
    first, last = batch.pop("labels")[0].tolist()
    output, seen = model(**batch), batch["attention_mask"][0].bool()
    nll = [
        logits.masked_fill(~seen, -torch.inf).log_softmax(dim=0)[place]
        for logits, place in ((output.start_logits[0], first), (output.end_logits[0], last))
    ]
    return -(nll[0] + nll[1]) / 2


def own_gradients(model, examples, parameters="all"):
    return flat_gradients(model, examples, own_loss, parameters)


@pytest.mark.parametrize("form", ALL)
def test_exact_influence_is_that_of_one_example_autograd(form):
    model, trains, queries = reader(form), questions(32, seed=1), questions(4, seed=2)
    assert exact_error(model, trains, queries, own_loss, counts=(1, 7, 32)) <= TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("form", ALL)
def test_padding_of_the_dataset_is_no_token(form, padding):
    model, trains, queries = reader(form), questions(9, 1, padding), questions(4, 2, padding)
    assert exact_error(model, trains, queries, own_loss, "encoder") <= TOLERANCE


@pytest.mark.parametrize("form", ALL)
def test_masked_heads(form):
    model, examples = reader(form), questions(7, seed=1)
    layers = attention_layers(model)
    array = np.ones((len(layers), layers[0].num_heads), dtype=np.int64)
    array[0, 1], array[-1, 1:] = 0, 0
    mask = HeadMask(array)
    with mask.apply(model):
        truth = own_gradients(model, examples, "encoder")
    assert not torch.allclose(truth, own_gradients(model, examples, "encoder"), rtol=1e-3)
    actual = tm.exact_influence(model, examples, examples[:2], head_mask=mask)
    assert influence_error(actual, truth, truth[:2]) <= TOLERANCE


@pytest.mark.parametrize("form", ALL)
def test_passes_are_in_batches_and_the_last_layer_is_computed_at_every_token(form):
    model = reader(form)
    examples = as_examples(questions(4, seed=1), model=model)
    with frozen(model), verified_pass(model, examples, select_layers(model)) as chosen:
        block = _last_block(model)
        assert block is None or "forward" not in vars(block[0])
        assert not chosen.alone


@pytest.mark.parametrize("form", ALL)
def test_the_check_passes_against_the_loss_that_transformers_returns(form):
    model = reader(form, dtype=torch.float32)
    assert all(part.passed for part in check_gradients(model, questions(5, seed=1)))


@pytest.mark.parametrize("form", [form for form in ALL if FORMS[form.values[0]].pruned])
def test_smaller_models_have_the_logits_of_the_masked_model(form, tmp_path):
    model = reader(form, dtype=torch.float32)
    examples = as_examples(questions(5, seed=1), model=model)
    layers = attention_layers(model)
    array = np.ones((len(layers), layers[0].num_heads), dtype=np.int64)
    array[0, 1] = 0
    with HeadMask(array).apply(model):
        expected = predict_tokens(model, examples)
    assert [part.shape for part in expected] == [(2, len(e["input_ids"])) for e in examples]
    tm.save_masked(model, HeadMask(array), tmp_path / "zeros")
    tm.save_pruned(model, HeadMask(array), tmp_path / "pruned")
    zeros = type(model).from_pretrained(tmp_path / "zeros")
    for smaller in (zeros.eval(), tm.load_pruned(tmp_path / "pruned")):
        for own, whole in zip(predict_tokens(smaller, examples), expected, strict=True):
            torch.testing.assert_close(own, whole, rtol=1e-5, atol=1e-5)


def test_features_are_those_of_formed_gradients_whatever_the_batch():
    model, examples = reader("bert"), questions(9, seed=1)
    features = tm.collect_features(model, examples, tm.Projection(512))
    for row in (0, 4):
        alone = tm.collect_features(model, [examples[row]], tm.Projection(512))
        torch.testing.assert_close(features[row], alone[0], rtol=1e-5, atol=1e-6)


def test_half_precision_agrees():
    model, examples = reader("bert", dtype=torch.float32), questions(9, seed=1)
    exact = tm.exact_influence(model, examples, examples)
    half = tm.exact_influence(model, examples, examples, dtype=torch.bfloat16)
    assert float((half - exact).norm() / exact.norm()) < 0.05


def test_ekfac_draws_answers_from_the_model_s_own_distribution():
    """Each end by itself, and never at padding, though the examples of a batch have some."""
    model = reader("bert", dtype=torch.float32)
    for padding in ("none", "left", "right"):
        given = questions(3, seed=1, padding=padding)
        given[2]["input_ids"][4:] = []  # a short one beside longer ones
        given[2]["attention_mask"][4:] = []
        given[2] |= {"start_positions": 2, "end_positions": 3}
        examples = as_examples(given, model=model)
        generator = torch.Generator().manual_seed(0)
        drawn = _with_sampled_tags(model, examples * 400, 4096, generator)
        for row, (example, logits) in enumerate(
            zip(examples, predict_tokens(model, examples), strict=True)
        ):
            labels = torch.tensor([one["labels"] for one in drawn[row :: len(examples)]])
            assert all(example["attention_mask"][place] for place in labels.flatten().tolist())
            for end, expected in enumerate(logits.double().softmax(dim=1)):
                shares = torch.bincount(labels[:, end], minlength=len(expected)) / len(labels)
                assert float((shares - expected).abs().max()) < 4 * 0.5 / len(labels) ** 0.5


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"end_positions": 99}, r"got 99"),
        ({"start_positions": 2, "end_positions": 1}, r"got \[2, 1\]"),
        ({"start_positions": None}, r"labels"),
        ({"start_positions": -1}, r"got \[-1, "),
    ],
)
def test_answers_outside_the_tokens_are_refused(change, got):
    examples = questions(3, seed=1)
    with pytest.raises(ValueError, match=rf"row 1: .*{got}"):
        tm.exact_influence(
            reader("bert"), [examples[0], examples[1] | change, examples[2]], examples[:1]
        )


def test_an_answer_in_padding_is_refused():
    examples = questions(3, seed=1, padding="right")
    examples[2]["end_positions"] = len(examples[2]["input_ids"]) - 1
    with pytest.raises(ValueError, match=r"row 2: .*tokens, got"):
        tm.exact_influence(reader("bert"), examples, examples[:1])


def test_losses_of_other_models_are_refused():
    examples = questions(3)
    for kind in ("cross_entropy", "token_cross_entropy"):
        with pytest.raises(ValueError, match=r"expected span_cross_entropy for BertForQuestion"):
            tm.exact_influence(reader("bert"), examples, examples, loss=tm.ExampleLoss(kind))
    spans = tm.ExampleLoss("span_cross_entropy")
    texts = [{"input_ids": [4, 5], "labels": 1}]
    with pytest.raises(ValueError, match=r"loss of texts for BertForSequence"):
        tm.exact_influence(small_model("bert"), texts, texts, loss=spans)
    for setting in ({"label_smoothing": 0.1}, {"class_weights": [1, 2]}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            tm.ExampleLoss("span_cross_entropy", **setting)


def test_an_adapter_is_saved_and_loaded(tmp_path):
    pytest.importorskip("peft")
    model = reader("bert", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    adapted = changed_adapter(model, tmp_path / "base", tmp_path / "adapter")
    again = load_classifier(tmp_path / "adapter")
    examples = as_examples(questions(3), model=model)
    for one, other in zip(
        predict_tokens(again, examples), predict_tokens(adapted, examples), strict=True
    ):
        torch.testing.assert_close(one, other)
