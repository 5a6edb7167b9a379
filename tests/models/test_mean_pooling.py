"""Classifiers that read the mean of all tokens: what they compute, and how they are kept."""

from __future__ import annotations

import pytest
import torch
from autograd_truth import exact_error
from families import DEBERTA, FORMS, LABELS, SHAPE, mixed_examples, small_model
from made_adapters import changed_adapter
from own_model import own_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from tracmod.models.architecture import MEAN_POOLING
from tracmod.models.digests import model_digest
from tracmod.models.inputs import collate, pad_token_id
from tracmod.models.loading import create_from_config, create_model, load_classifier, load_model
from tracmod.models.plain_pass import given_batch

NAMES = ["no", "maybe", "yes"]
# Forms without an entry for pooling in their config, whose tokens see each other.
ENCODERS = ["roberta", "electra", "distilbert", "deberta-v3", "nomic", "jina", "xmod", "mpnet"]
ENCODERS += ["albert"]


def mean_model(form="bert", **settings):
    return small_model(form, architectures=[MEAN_POOLING], **settings)


def encoder_folder(folder, form="bert", **settings):
    """Write an encoder without a classifier, and a tokenizer whose ids it has."""
    tokenizer = own_tokenizer()
    shape = SHAPE | FORMS[form].settings | {"vocab_size": len(tokenizer)} | settings
    torch.manual_seed(4)
    model = AutoModel.from_config(AutoConfig.for_model(FORMS[form].model_type, **shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ENCODERS)
def test_the_classifier_is_linear_in_the_mean_of_the_tokens(form):
    model, examples = mean_model(form), mixed_examples(6, seed=1)
    batch = collate(examples, pad_token_id(model))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        actual = model(**inputs).logits
        hidden = model.base_model(**inputs).last_hidden_state
        for row, example in enumerate(examples):
            tokens = [place for place, seen in enumerate(batch["attention_mask"][row]) if seen]
            assert len(tokens) == len(example["input_ids"])
            mean = hidden[row, tokens].mean(dim=0)
            expected = model.classifier.weight @ mean + model.classifier.bias
            torch.testing.assert_close(actual[row], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ENCODERS)
def test_exact_influence_is_that_of_one_example_autograd(form):
    model, trains, queries = mean_model(form), mixed_examples(9, 1), mixed_examples(3, 2)

    def loss_of(model, example):
        return model(**given_batch(model, example)).loss

    assert exact_error(model, trains, queries, loss_of) <= 1e-6


def test_a_model_without_a_mask_reads_all_tokens():
    model = mean_model()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits
        )


def test_an_encoder_gets_the_classifier_and_keeps_it(tmp_path):
    """A saved model is the same for tracmod, also if it is told nothing, and for transformers."""
    source = encoder_folder(tmp_path / "encoder")
    model, tokenizer = load_model(source, NAMES, pooling="mean", seed=3)
    again, _ = load_model(source, NAMES, pooling="mean", seed=3)
    other, _ = load_model(source, NAMES, pooling="mean", seed=4)
    assert type(model).__name__ == MEAN_POOLING
    assert not any("pooler" in name for name, _ in model.named_parameters())
    assert model_digest(model) == model_digest(again) != model_digest(other)
    words, own_words = "embeddings.word_embeddings.weight", AutoModel.from_pretrained(source)
    assert torch.equal(model.base_model.get_parameter(words), own_words.get_parameter(words))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    batch = tokenizer(["ein Hund", "der"], padding=True, return_tensors="pt")
    for pooling in (None, "mean"):
        for names in (None, NAMES):
            loaded, _ = load_model(tmp_path / "saved", names, pooling=pooling)
            assert model_digest(loaded) == model_digest(model)
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", trust_remote_code=True
    )
    assert torch.equal(theirs.eval()(**batch).logits, model(**batch).logits)
    inner = AutoModel.from_pretrained(tmp_path / "saved")
    last = "encoder.layer.1.output.dense.weight"
    assert torch.equal(inner.get_parameter(last), model.base_model.get_parameter(last))


def test_a_model_with_other_pooling_is_another_model():
    """ModernBERT has the same weights with either, so the digest must tell them apart."""
    models = [small_model("modernbert", classifier_pooling=name) for name in ("cls", "mean")]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert model_digest(models[0]) != model_digest(models[1])


def test_a_family_that_can_read_the_mean_is_told_to(tmp_path):
    source = encoder_folder(tmp_path / "encoder", "modernbert")
    model, _ = load_model(source, NAMES, pooling="mean")
    assert type(model).__name__ == "ModernBertForSequenceClassification"
    assert model.config.classifier_pooling == "mean"


def test_new_models_read_the_mean(tmp_path):
    tokenizer = own_tokenizer()
    model = create_model(
        tokenizer, NAMES, layers=1, hidden=16, heads=2, max_length=32, pooling="mean"
    )
    assert type(model).__name__ == MEAN_POOLING
    for stated in (["DebertaV2ForSequenceClassification"], [MEAN_POOLING]):
        shape = SHAPE | DEBERTA | {"architectures": stated}
        AutoConfig.for_model("deberta-v2", **shape).save_pretrained(tmp_path)
        for pooling in ("mean", None):
            made = create_from_config(tmp_path, tokenizer, NAMES, pooling=pooling)
            is_mean = pooling == "mean" or stated == [MEAN_POOLING]
            assert (type(made).__name__ == MEAN_POOLING) == is_mean


@pytest.mark.parametrize("form", ["bert", "modernbert"])
def test_a_classifier_that_reads_something_else_is_refused(tmp_path, form):
    model = small_model(form, dtype=torch.float32, vocab_size=len(own_tokenizer()))
    model.save_pretrained(tmp_path)
    own_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"pooling mean: .*{type(model).__name__}"):
        load_model(tmp_path, pooling="mean")


def test_classifiers_of_tokens_and_of_the_last_token_are_refused(tmp_path):
    source = encoder_folder(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"pooling mean: .*of tokens"):
        load_model(source, NAMES, unit="token", pooling="mean")
    source = encoder_folder(tmp_path / "decoder", "llama")
    with pytest.raises(ValueError, match=r"pooling mean: .*llama"):
        load_model(source, NAMES, pooling="mean")


def test_other_code_of_a_folder_is_not_run(tmp_path):
    model = mean_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    (tmp_path / "mean_pooling.py").write_text("raise RuntimeError('was run')")
    assert model_digest(load_classifier(tmp_path)) == model_digest(model)


@pytest.mark.parametrize("form", ["bert", "modernbert"])
@pytest.mark.parametrize("has_classifier", [True, False])
def test_an_adapter_is_loaded_on_the_same_classifier(tmp_path, form, has_classifier):
    """The base's own config may say that its classifier reads the first token."""
    pytest.importorskip("peft")
    source = encoder_folder(tmp_path / "encoder", form)
    model, tokenizer = load_model(source, NAMES, pooling="mean")
    if has_classifier:
        source = tmp_path / "whole"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    adapted = changed_adapter(model, source, tmp_path / "adapter")
    again = load_classifier(tmp_path / "adapter", NAMES)
    assert type(again) is type(model)
    assert model_digest(again) == model_digest(adapted)


def test_transformers_trainer_trains_it(tmp_path):
    model = mean_model(dtype=torch.float32)
    before = model.classifier.weight.detach().clone()
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    data = [{"input_ids": [5, 6, 7 + row], "labels": row % LABELS} for row in range(8)]
    Trainer(model=model, args=settings, train_dataset=data).train()
    assert not torch.equal(model.classifier.weight, before)
