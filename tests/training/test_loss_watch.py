"""TracInCallback and the loss of a Trainer: what it records, what it notices and leaves alone."""

from __future__ import annotations

import functools
import json
import warnings

import pytest
import torch
from own_model import own_model, own_tokenizer
from test_trainer_callback import BATCH, TRAIN, examples_of, make_trainer
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import tracmod as tm
from tracmod.models.checkpoints import checkpoint_folders, load_checkpoints, loss_of_checkpoints
from tracmod.models.inputs import collate, pad_token_id
from tracmod.training.loss_watch import MOST_STEPS, LossWatch

WEIGHTS = [1.0, 2.0, 5.0]


def train(out, callback=None, loss=None, **arguments):
    """Train; return the record of the last checkpoint and the warnings about the loss."""
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    callback = callback or tm.TracInCallback(own_tokenizer())
    trainer = make_trainer(out, callback, **steps | arguments)
    if loss is not None:
        trainer.compute_loss_func = loss
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    record = json.loads((checkpoint_folders(out)[-1] / "tracmod.json").read_text())
    said = [str(warning.message) for warning in caught if "loss" in str(warning.message)]
    return record, said


def batch_loss(function):
    """Make a `compute_loss_func` of a function of logits and labels."""
    return lambda outputs, labels, num_items_in_batch=None: function(outputs.logits, labels)


def weighted(logits, labels, reduction="mean"):
    return F.cross_entropy(logits, labels, weight=torch.tensor(WEIGHTS), reduction=reduction)


def focal(logits, labels):
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


# --- what is recorded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_the_trainer_is_recorded_and_verified(tmp_path, arguments, smoothing):
    record, said = train(tmp_path, label_smoothing_factor=smoothing, **arguments)
    expected = tm.ExampleLoss(label_smoothing=smoothing)
    assert (record["loss"], record["loss_verified"], said) == (expected.to_json(), True, [])


@pytest.mark.parametrize(
    ("stated", "loss"),
    [
        (tm.ExampleLoss(class_weights=WEIGHTS), weighted),
        (tm.ExampleLoss(class_weights=WEIGHTS), functools.partial(weighted, reduction="sum")),
        (focal, lambda logits, labels: focal(logits, labels).mean()),
        (None, F.cross_entropy),
    ],
)
def test_a_stated_loss_is_verified(tmp_path, stated, loss):
    """`compute_loss_func` takes the labels out of the model's inputs: some label explains a row."""
    callback = tm.TracInCallback(own_tokenizer(), loss=stated)
    record, said = train(tmp_path, callback, batch_loss(loss))
    assert said == []
    assert record["loss_verified"]
    assert record["loss"]["kind"] == ("function" if stated is focal else "cross_entropy")


# --- what is noticed -------------------------------------------------------------------------


def smooth(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.05)


def distilled(logits, labels):
    teacher = torch.tensor([[2.0, -1.0, 0.5]]).expand_as(logits)
    return F.cross_entropy(logits, labels) + F.kl_div(
        logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
    )


def penalized(logits, labels):
    return F.cross_entropy(logits, labels) + 0.1 * logits.square().mean()


def hardest(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none").topk(2).values.mean()


def margin(logits, labels):
    return F.multi_margin_loss(logits, labels)


@pytest.mark.parametrize(
    "loss",
    [
        weighted,
        smooth,
        distilled,
        penalized,
        hardest,
        margin,
        lambda logits, labels: focal(logits, labels).mean(),
        lambda logits, labels: F.cross_entropy(logits / 2, labels),
        lambda logits, labels: -F.cross_entropy(logits, labels),
        lambda logits, labels: F.binary_cross_entropy_with_logits(
            logits, F.one_hot(labels, 3).float()
        ),
        lambda logits, labels: F.cross_entropy(
            logits, 0.7 * F.one_hot(labels, 3) + 0.3 * F.one_hot(labels.roll(1), 3)
        ),
    ],
    ids=["weights", "smoothing", "distillation", "penalty", "hardest", "margin", "focal",
         "temperature", "sign", "sigmoid", "mixup"],
)  # fmt: skip
def test_another_loss_is_noticed_and_its_checkpoints_are_refused(tmp_path, loss):
    record, said = train(tmp_path, None, batch_loss(loss))
    assert record["loss"] == {"kind": "unknown"}
    assert len(said) == 1
    assert "TracInCallback(loss=" in said[0]
    checkpoints = load_checkpoints(checkpoint_folders(tmp_path))
    model = own_model()
    with pytest.raises(ValueError, match=r"checkpoint-4: .*unknown.*--loss"):
        loss_of_checkpoints(checkpoints, model)
    stated = tm.ExampleLoss(class_weights=WEIGHTS)
    assert loss_of_checkpoints(checkpoints, model, stated) == stated


class Watched(Trainer):
    """Computes the loss itself, with the labels in the model's inputs."""

    weights = torch.tensor(WEIGHTS)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], weight=self.weights)
        return (loss, outputs) if return_outputs else loss


class Contrasted(Trainer):
    """A loss of hidden states alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, output_hidden_states=True)
        return outputs.hidden_states[-1].square().mean()


@pytest.mark.parametrize("trainer_class", [Watched, Contrasted])
def test_an_overridden_compute_loss_is_noticed(tmp_path, trainer_class):
    trainer = make_trainer(tmp_path, tm.TracInCallback(own_tokenizer()), max_steps=2)
    trainer.__class__ = trainer_class
    with pytest.warns(UserWarning, match="loss is not cross entropy"):
        trainer.train()


def test_weights_are_noticed_with_batches_of_one_example(tmp_path):
    loss = batch_loss(functools.partial(weighted, reduction="sum"))
    record, said = train(
        tmp_path, None, loss, per_device_train_batch_size=1, max_steps=6, save_steps=6
    )
    assert (record["loss"], len(said)) == ({"kind": "unknown"}, 1)


def test_a_wrong_statement_is_noticed(tmp_path):
    callback = tm.TracInCallback(own_tokenizer(), loss=tm.ExampleLoss(class_weights=[1, 2, 4.9]))
    record, said = train(tmp_path, callback, batch_loss(weighted))
    assert (record["loss"], len(said)) == ({"kind": "unknown"}, 1)
    with pytest.raises(ValueError, match="class_weights: expected 3"):
        train(tmp_path, tm.TracInCallback(loss=tm.ExampleLoss(class_weights=[1, 2])))
    with pytest.raises(ValueError, match=r"loss.*0\.1"):
        tm.TracInCallback(loss=0.1)


@pytest.mark.parametrize(
    ("config", "label", "loss"),
    [
        ({"num_labels": 1}, lambda row: row / 7, tm.ExampleLoss("squared_error")),
        ({"problem_type": "regression"}, lambda row: [row / 7, 1.0, -2.5],
         tm.ExampleLoss("squared_error")),
        ({"problem_type": "multi_label_classification"}, lambda row: [row % 2.0, 1.0, 0.0],
         tm.ExampleLoss("binary_cross_entropy")),
        ({}, lambda row: [row % 2.0, 1.0, 0.0], tm.ExampleLoss("binary_cross_entropy")),
    ],
)  # fmt: skip
def test_other_kinds_are_recorded_and_verified(tmp_path, config, label, loss):
    model, rows = own_model(**config), examples_of("train", TRAIN)
    examples = [row | {"labels": label(number)} for number, row in enumerate(rows)]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=BATCH, use_cpu=True,
            report_to=[], disable_tqdm=True, save_steps=4,
        ),
        train_dataset=examples,
        data_collator=lambda rows: collate(rows, pad_token_id(model)),
        callbacks=[tm.TracInCallback(own_tokenizer())],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*loss")
        trainer.train()
    record = json.loads((tmp_path / "checkpoint-4/tracmod.json").read_text())
    assert (record["loss"], record["loss_verified"]) == (loss.to_json(), True)


def test_a_compiled_model_is_said_not_to_be_verified(tmp_path):
    callback = tm.TracInCallback(own_tokenizer())
    trainer = make_trainer(tmp_path, callback)
    trainer.args.torch_compile = True
    trainer.model.compile(backend="eager")
    with pytest.warns(UserWarning, match="could not be verified"):
        trainer.train()
    record = json.loads((tmp_path / "checkpoint-7/tracmod.json").read_text())
    assert record["loss_verified"] is False


# --- what is left alone ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", [None, batch_loss(F.cross_entropy)])
def test_the_training_is_the_same_bit_for_bit(tmp_path, loss):
    """With dropout, so that a random number drawn would be seen."""

    def weights(folder, *callbacks):
        torch.manual_seed(3)
        trainer = make_trainer(folder, *callbacks, seed=3, max_steps=5)
        trainer.compute_loss_func = loss
        trainer.train()
        assert not trainer.model._forward_hooks
        return trainer.model.state_dict()

    def noisy(logits, labels):
        torch.rand(3)
        return F.cross_entropy(logits, labels, reduction="none")

    alone = weights(tmp_path / "alone")
    for number, callback in enumerate([tm.TracInCallback(), tm.TracInCallback(loss=noisy)]):
        watched = weights(tmp_path / str(number), callback)
        assert all(torch.equal(alone[name], watched[name]) for name in alone)


class Head(nn.Module):
    """Returns logits as a model of transformers does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, inputs, labels=None):
        return SequenceClassifierOutput(logits=self.linear(inputs))


@pytest.mark.parametrize(("classes", "steps"), [([0, 1, 2, 0], 3), ([0, 0, 1, 1], MOST_STEPS)])
def test_the_hook_is_removed_when_all_classes_were_seen(classes, steps):
    model, labels = Head(), torch.tensor(classes)
    watch = LossWatch(model, lambda _: tm.ExampleLoss(), one_factor=False)
    for step in range(MOST_STEPS):
        assert bool(model._forward_hooks) == (step < steps)
        logits = model(torch.randn(4, 2), labels=labels).logits
        F.cross_entropy(logits, labels).backward()
        watch.end_step()
    assert not model._forward_hooks
    assert watch.matched
    assert not watch.differs
