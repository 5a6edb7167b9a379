"""Full and sparse fine-tuning: what is updated, what is not, and resumption to the same bits."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FORMS, mixed_examples, small_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny_examples, tiny_model, tiny_tokenizer
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    get_linear_schedule_with_warmup,
)

from tracmod.models.architecture import parameters_below
from tracmod.models.checkpoints import load_second_moment, recorded_frozen
from tracmod.models.digests import model_digest
from tracmod.models.inputs import collate, pad_token_id
from tracmod.models.loading import load_model
from tracmod.models.loss import per_example_loss
from tracmod.subnetworks.head_mask import HeadMask, head_slices
from tracmod.subnetworks.importance import head_importance, masked_accuracy
from tracmod.training import fine_tune as train_module
from tracmod.training.fine_tune import (
    TrainingSettings,
    _BatchPlan,
    _most_important_heads,
    accuracy_by_language,
    fine_tune,
    scheduled_rate,
)
from tracmod.training.folder import TrainingFolder, epoch_masks
from tracmod.training.optimizer import HeadwiseAdamW

SETTINGS = TrainingSettings(epochs=2, batch_size=4, learning_rate=1e-2, weight_decay=0.1, seed=5)
MASKS = {"en": HeadMask([[1, 0, 0, 1], [0, 1, 1, 1]]), "de": HeadMask([[1, 1, 0, 0], [1, 1, 1, 0]])}
DISJOINT = {
    "en": HeadMask([[1, 0, 0, 1], [0, 1, 0, 1]]),
    "de": HeadMask([[0, 1, 1, 0], [1, 0, 1, 0]]),
}
DYNAMIC = replace(SETTINGS, reestimate_every=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def data(count=22):
    examples = tiny_examples(count)
    return examples, ["de" if row % 3 == 0 else "en" for row in range(count)]


def dev_examples():
    return {"en": tiny_examples(2, seed=10), "de": tiny_examples(2, seed=42)}


def new_model(dropout=0.1):
    return tiny_model("xlm-roberta", dropout=dropout, dtype=torch.float32, scale=1.0)


def train(tokenizer, out_dir, *, masks=None, settings=SETTINGS, model=None, **options):
    if settings.reestimate_every is not None:
        options = {"dev": dev_examples()} | options
    examples, languages = data()
    return fine_tune(
        model or new_model(),
        tokenizer,
        examples,
        languages,
        out_dir,
        settings,
        masks=masks,
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a finished training by its relative name."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# --- the optimizer --------------------------------------------------------------------------


def backward(model, mask, batch):
    inputs = dict(batch)
    labels = inputs.pop("labels")
    with mask.apply(model):
        per_example_loss(model(**inputs).logits, labels).mean().backward()


def split_reference(model, weight_decay):
    """Return the step of a textbook AdamW in which every head has a state of its own."""
    state = {}
    parts = {}
    for part in head_slices(model):
        parts.setdefault(part.name, []).append((part.index, (part.layer, part.head)))
    norms = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}

    def step(rate, mask):
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            decay = 0.0 if name.endswith("bias") or name in norms else weight_decay
            for index, head in parts.get(name, [((slice(None),), None)]):
                if head is not None and not mask.array[head]:
                    continue
                gradient, value = parameter.grad[index], parameter.data[index]
                count, first, second = state.get((name, head), (0, 0.0, 0.0))
                count, first = count + 1, 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                state[name, head] = (count, first, second)
                update = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
                value.copy_(value * (1 - rate * decay) - rate * update)

    return step


@pytest.mark.parametrize("family", FAMILIES)
def test_each_head_is_updated_as_by_an_adamw_of_its_own(family):
    model = tiny_model(family, scale=1.0)
    twin = copy.deepcopy(model)
    optimizer = HeadwiseAdamW(model, weight_decay=0.1, split_heads=True)
    reference = split_reference(twin, 0.1)
    batch = collate(tiny_examples(6), pad_token_id(model))
    # Some heads are masked in all of the first steps, so that their bias correction starts late.
    for number, language in enumerate(["en", "en", "en", "de", "en", "de", "de"]):
        mask, rate = MASKS[language], 1e-2 / (number + 1)
        backward(model, mask, batch)
        backward(twin, mask, batch)
        optimizer.step(rate, mask)
        with torch.no_grad():
            reference(rate, mask)
        model.zero_grad()
        twin.zero_grad()
        for (name, own), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
@pytest.mark.parametrize("split_heads", [False, True])
def test_without_masks_the_optimizer_is_adamw_of_torch(split_heads, epsilon):
    model = tiny_model("roberta", scale=1.0)
    twin = copy.deepcopy(model)
    optimizer = HeadwiseAdamW(model, weight_decay=0.1, split_heads=split_heads, epsilon=epsilon)
    plain = [p for n, p in twin.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    decaying = [p for p in twin.parameters() if not any(p is q for q in plain)]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, foreach=False, eps=epsilon)
    batch = collate(tiny_examples(6), pad_token_id(model))
    for _ in range(4):
        backward(model, HeadMask.full(2, 4), batch)
        backward(twin, HeadMask.full(2, 4), batch)
        optimizer.step(1e-2)
        reference.step()
        model.zero_grad()
        twin.zero_grad()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("split_heads", [False, True])
def test_the_second_moment_is_corrected_for_bias(split_heads):
    model = tiny_model("xlm-roberta", scale=1.0)
    optimizer = HeadwiseAdamW(model, weight_decay=0.0, split_heads=split_heads)
    batch = collate(tiny_examples(6), pad_token_id(model))
    masks = [MASKS["en"], MASKS["en"], MASKS["de"]] if split_heads else [None] * 3
    moments: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    for mask in masks:
        backward(model, mask or HeadMask.full(2, 4), batch)
        moving = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        for part in head_slices(model) if mask else []:
            moving[part.name][part.index] = float(mask.array[part.layer, part.head])
        for name, parameter in model.named_parameters():
            before = moments.get(name, torch.zeros_like(parameter))
            after = 0.999 * before + 0.001 * parameter.grad**2
            moments[name] = torch.where(moving[name] > 0, after, before)
            counts[name] = counts.get(name, 0) + moving[name]
        optimizer.step(1e-2, mask)
        model.zero_grad()
    second_moment = optimizer.second_moment()
    assert second_moment.keys() == moments.keys()
    for name, moment in moments.items():
        expected = torch.where(moment > 0, moment / (1 - 0.999 ** counts[name]), 0)
        torch.testing.assert_close(second_moment[name], expected, rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_masked_heads_stay_bitwise_unchanged(family):
    model = tiny_model(family, dtype=torch.float32, scale=1.0)
    optimizer = HeadwiseAdamW(model, weight_decay=0.1, split_heads=True)
    batch = collate(tiny_examples(6), pad_token_id(model))
    full = HeadMask.full(2, 4)
    for _ in range(2):  # every head then has momentum
        backward(model, full, batch)
        optimizer.step(1e-2, full)
        model.zero_grad()
    masked = {(part.name, part.head) for part in head_slices(model, MASKS["en"])}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in optimizer.state().items()}
    for _ in range(3):
        backward(model, MASKS["en"], batch)
        optimizer.step(1e-2, MASKS["en"])
        model.zero_grad()
    after = optimizer.state()
    for part in head_slices(model):
        moved = not torch.equal(part.parameter[part.index], before[part.name][part.index])
        kept = (part.name, part.head) not in masked
        assert moved == kept, part.name
        for key in ("step", "exp_avg", "exp_avg_sq"):
            entry = f"{key}:{part.name}[{part.head}]"
            # Kept heads may have unchanged entries: key biases have a gradient of rounding alone.
            if not kept:
                assert torch.equal(after[entry], state[entry]), entry
        assert after[f"step:{part.name}[{part.head}]"] == (5 if kept else 2)
    headless = set(before) - {part.name for part in head_slices(model)}
    for name, parameter in model.named_parameters():
        if name in headless:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("split_heads", [False, True])
def test_optimizer_state_can_be_loaded(split_heads):
    masks = [MASKS["en"], MASKS["de"]] if split_heads else [None, None]
    first = tiny_model("xlm-roberta", dtype=torch.float32, scale=1.0)
    optimizer = HeadwiseAdamW(first, weight_decay=0.1, split_heads=split_heads)
    batch = collate(tiny_examples(6), pad_token_id(first))

    def steps(model, own, count):
        for number in range(count):
            mask = masks[number % 2]
            backward(model, mask or HeadMask.full(2, 4), batch)
            own.step(1e-2, mask)
            model.zero_grad()

    steps(first, optimizer, 1)  # heads that `en` masks have no state yet
    second = copy.deepcopy(first)
    other = HeadwiseAdamW(second, weight_decay=0.1, split_heads=split_heads)
    other.load_state({name: value.clone() for name, value in optimizer.state().items()})
    steps(first, optimizer, 3)
    steps(second, other, 3)
    assert model_digest(first) == model_digest(second)
    with pytest.raises(ValueError, match="unexpected exp_avg:other"):
        other.load_state({"exp_avg:other": torch.zeros(1)})


# --- schedule and batches -------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.35, 1.0])
@pytest.mark.parametrize("total", [1, 7, 20])
def test_schedule_agrees_with_transformers(warmup, total):
    settings = TrainingSettings(learning_rate=0.5, warmup=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_linear_schedule_with_warmup(optimizer, int(warmup * total), total)
    for step in range(total):
        assert scheduled_rate(step, total, settings) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("by_language", [False, True])
def test_an_epoch_takes_every_example_once(by_language):
    languages = ["en"] * 11 + ["de"] * 5 + ["zh"] * 8
    plan = _BatchPlan(
        languages, TrainingSettings(batch_size=4, epochs=3, seed=1), by_language=by_language
    )
    first, second = plan.epoch(1), plan.epoch(2)
    for batches in (first, second):
        assert sorted(row for batch in batches for row in batch) == list(range(24))
        assert len(batches) == plan.steps_per_epoch == (7 if by_language else 6)
        assert max(len(batch) for batch in batches) == 4
    assert plan.total_steps == 3 * plan.steps_per_epoch
    assert first != second
    assert first == plan.epoch(1)
    mixed = [len({languages[row] for row in batch}) > 1 for batch in first]
    assert any(mixed) != by_language
    if by_language:
        order = [languages[batch[0]] for batch in first]
        assert order != sorted(order, key=languages.index)


@pytest.mark.parametrize("by_language", [False, True])
def test_uniform_sampling_takes_as_many_of_every_language(by_language):
    languages = ["en"] * 13 + ["de"] * 3 + ["zh"] * 8
    settings = TrainingSettings(batch_size=4, epochs=3, seed=1, sampling="uniform")
    plan = _BatchPlan(languages, settings, by_language=by_language)
    epochs = [plan.epoch(epoch) for epoch in (1, 2)]
    for batches in epochs:
        assert len(batches) == plan.steps_per_epoch == 6
        rows = [row for batch in batches for row in batch]
        times = np.bincount(rows, minlength=24)
        of_language = np.array(languages)
        assert {name: times[of_language == name].sum() for name in ("en", "de", "zh")} == {
            "en": 8, "de": 8, "zh": 8,
        }  # fmt: skip
        assert set(times[of_language == "en"]) == {0, 1}
        assert sorted(times[of_language == "de"]) == [2, 3, 3]  # all of them before any is repeated
        assert set(times[of_language == "zh"]) == {1}
        if by_language:
            names = [{languages[row] for row in batch} for batch in batches]
            assert sorted(names, key=str) == [{"de"}] * 2 + [{"en"}] * 2 + [{"zh"}] * 2
        else:
            assert any(len({languages[row] for row in batch}) > 1 for batch in batches)
    taken = [{row for batch in batches for row in batch if row < 13} for batches in epochs]
    assert taken[0] != taken[1]
    assert epochs[0] == _BatchPlan(languages, settings, by_language=by_language).epoch(1)


def test_uniform_sampling_of_equal_languages_is_proportional():
    languages = ["en", "de", "zh"] * 7
    plans = [
        _BatchPlan(languages, TrainingSettings(batch_size=4, sampling=sampling), by_language=True)
        for sampling in ("uniform", "proportional")
    ]
    assert plans[0].epoch(2) == plans[1].epoch(2)
    assert plans[0].total_steps == plans[1].total_steps


@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (13, 3, 8), (100, 1, 1), (5, 31)])
def test_uniform_sampling_takes_about_as_many_steps(sizes, batch_size):
    languages = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    uniform, proportional = (
        _BatchPlan(
            languages, TrainingSettings(batch_size=batch_size, sampling=sampling), by_language=True
        )
        for sampling in ("uniform", "proportional")
    )
    assert abs(uniform.steps_per_epoch - proportional.steps_per_epoch) < len(sizes)


# --- whole trainings ------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [None, MASKS], ids=["full", "sparse"])
def test_a_training_writes_the_documented_files(tokenizer, tmp_path, masks):
    examples, languages = data()
    checkpoints = train(
        tokenizer,
        tmp_path,
        masks=masks,
        evaluate=lambda model, masks: accuracy_by_language(model, examples, languages, masks),
    )
    steps = 6 if masks is None else 4 + 2
    assert [(c.epoch, c.step) for c in checkpoints] == [(1, steps), (2, 2 * steps)]
    rates = [scheduled_rate(step, 2 * steps, SETTINGS) for step in range(2 * steps)]
    for number, checkpoint in enumerate(checkpoints):
        mean = sum(rates[number * steps : (number + 1) * steps]) / steps
        assert checkpoint.learning_rate == pytest.approx(mean)
        assert checkpoint.path == tmp_path / f"checkpoint-{number + 1}"
        own = json.loads((checkpoint.path / "tracmod.json").read_text())
        assert own.keys() == {"epoch", "step", "learning_rate", "loss"}
        assert own["loss"] == {"kind": "cross_entropy"}
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    model, loaded = load_model(checkpoints[-1].path)
    assert loaded("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert rows[1]["accuracy"] == accuracy_by_language(model, examples, languages, masks)
    assert list(rows[1]["accuracy"]) == ["de", "en"]
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"checkpoint-1", "checkpoint-2", "metrics.json", "training.json"}
    assert not list(tmp_path.rglob("*.bin"))


def test_one_step_by_hand(tokenizer, tmp_path):
    """A single batch of all examples: mean loss, clipped gradient, AdamW with decay, no dropout."""
    examples, languages = data(6)
    settings = TrainingSettings(
        epochs=1, batch_size=6, learning_rate=1e-2, weight_decay=0.1, warmup=0, max_grad_norm=0.1
    )
    model = tiny_model("xlm-roberta", dtype=torch.float64, scale=1.0)
    twin = copy.deepcopy(model)
    fine_tune(model, tokenizer, examples, languages, tmp_path, settings)
    losses = []
    for example in examples:
        batch = collate([example], pad_token_id(twin))
        labels = batch.pop("labels")
        losses.append(nn.functional.cross_entropy(twin(**batch).logits, labels))
    loss = sum(losses) / 6
    loss.backward()
    norm = sum(float(p.grad.square().sum()) for p in twin.parameters()) ** 0.5
    assert norm > 0.1
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            gradient = parameter.grad * 0.1 / (norm + 1e-6)
            decay = 0 if name.endswith("bias") or "LayerNorm" in name else 0.1
            parameter.mul_(1 - 1e-2 * decay).sub_(1e-2 * gradient / (gradient.abs() + 1e-8))
    (row,) = json.loads((tmp_path / "metrics.json").read_text())
    assert row["train_loss"] == pytest.approx(loss.item())
    for (name, own), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        # The gradient of key biases is rounding alone, so its sign is arbitrary.
        if "key.bias" not in name:
            torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_heads_no_language_keeps_never_move(tokenizer, tmp_path):
    masks = {"en": HeadMask([[1, 0, 0, 1], [0, 1, 1, 1]]), "de": HeadMask([[1, 0, 1, 1]] * 2)}
    checkpoints = train(tokenizer, tmp_path, masks=masks)
    model, start = load_model(checkpoints[-1].path)[0], new_model()
    before = dict(start.named_parameters())
    for part in head_slices(model):
        kept = any(mask.array[part.layer, part.head] for mask in masks.values())
        same = torch.equal(part.parameter[part.index], before[part.name][part.index])
        assert same != kept, part


@pytest.fixture
def steps(monkeypatch):
    """Record of every optimizer step: its mask, and which heads and shared parameters changed.

    A head is (layer, head). It has changed if a weight of it, or a moment or step count of it in
    the optimizer, has.
    """
    recorded = []

    class Watched(HeadwiseAdamW):
        def __init__(self, model, **options):
            super().__init__(model, **options)
            self.model = model

        def snapshot(self):
            parts = {}
            for part in head_slices(self.model):
                own = parts.setdefault((part.layer, part.head), {})
                own[part.name] = part.parameter.detach()[part.index].clone()
                for key, value in self.state().items():
                    if key.endswith(f":{part.name}[{part.head}]"):
                        own[key] = value.clone()
            owned = {part.name for part in head_slices(self.model)}
            for name, parameter in self.model.named_parameters():
                if name not in owned:
                    parts[name] = {name: parameter.detach().clone()}
            return parts

        def step(self, learning_rate, mask=None):
            before = self.snapshot()
            super().step(learning_rate, mask)
            moved = {key for key, own in self.snapshot().items() if differ(own, before[key])}
            heads = {key for key in moved if isinstance(key, tuple)}
            recorded.append((mask, heads, moved - heads, set(self.state())))

    monkeypatch.setattr(train_module, "HeadwiseAdamW", Watched)
    return recorded


def differ(first, second):
    return first.keys() != second.keys() or any(
        not torch.equal(first[key], second[key]) for key in first
    )


def kept_heads(mask):
    return set(zip(*(axis.tolist() for axis in np.nonzero(mask.array)), strict=True))


@pytest.mark.parametrize("shared", ["trained", "classifier", "frozen"])
@pytest.mark.parametrize("every", [None, 1], ids=["static", "dynamic"])
def test_every_step_leaves_masked_heads_bitwise_unchanged(
    tokenizer, tmp_path, steps, shared, every
):
    settings = replace(SETTINGS, warmup=0.0, epochs=3, reestimate_every=every, shared=shared)
    train(tokenizer, tmp_path, masks=DISJOINT, settings=settings)
    languages = data()[1]
    plan = _BatchPlan(languages, settings, by_language=True)
    outside = {name for name, _ in new_model().named_parameters()}
    outside -= {part.name for part in head_slices(new_model())}
    trained = {
        "trained": outside,
        "classifier": {name for name in outside if name.startswith("classifier.")},
        "frozen": set(),
    }[shared]
    assert len(steps) == plan.total_steps == 18
    everything = {head for mask in DISJOINT.values() for head in kept_heads(mask)}
    for epoch in (1, 2, 3):
        masks = epoch_masks(tmp_path, epoch, DISJOINT)
        for batch in plan.epoch(epoch):
            mask, heads, moved, state = steps.pop(0)
            assert mask == masks[languages[batch[0]]]
            assert heads == kept_heads(mask) < everything
            assert moved == trained
            of_heads = {name for name in state if name.endswith("]")}
            assert {name.partition(":")[2] for name in state - of_heads} == trained
    assert (masks != DISJOINT) == (every is not None)


@pytest.mark.parametrize("masks", [None, MASKS], ids=["full", "sparse"])
def test_embeddings_that_are_not_trained_stay_and_have_no_state(tokenizer, tmp_path, masks):
    before = new_model().state_dict()
    settings = replace(SETTINGS, train_embeddings=False, epochs=1)
    (checkpoint,) = train(tokenizer, tmp_path, masks=masks, settings=settings, second_moment=True)
    after = load_file(checkpoint.path / "model.safetensors")
    moments = load_file(checkpoint.path / "second_moment.safetensors")
    fixed = {name for name in before if ".embeddings." in name}
    assert len(fixed) >= 4
    for name in after:
        assert torch.equal(after[name], before[name]) == (name in fixed), name
    assert not fixed & {name for name, moment in moments.items() if moment.any()}


@pytest.mark.parametrize("masks", [None, MASKS], ids=["full", "sparse"])
def test_layers_below_those_trained_stay_and_have_no_state(tokenizer, tmp_path, masks):
    before = new_model().state_dict()
    settings = replace(SETTINGS, train_layers=1, epochs=1)
    (checkpoint,) = train(tokenizer, tmp_path, masks=masks, settings=settings, second_moment=True)
    after = load_file(checkpoint.path / "model.safetensors")
    moments = load_file(checkpoint.path / "second_moment.safetensors")
    fixed = {name for name in before if ".embeddings." in name or ".layer.0." in name}
    assert len(fixed) >= 20
    for name in after:
        assert torch.equal(after[name], before[name]) == (name in fixed), name
    assert not fixed & {name for name, moment in moments.items() if moment.any()}
    assert set(recorded_frozen(checkpoint.path)) == fixed


@pytest.mark.parametrize("form", [form for form in FORMS if form != "albert"])
def test_nothing_that_lower_layers_use_is_trained_with_the_highest(form):
    """With its own parameters alone trained, the input of the highest layer depends on none."""
    model = small_model(form)
    below = parameters_below(model, 1)
    for parameter in below:
        parameter.requires_grad_(False)
    example = collate(mixed_examples(2), pad_token_id(model))
    del example["labels"]
    output = model(**example, output_hidden_states=True)
    assert not output.hidden_states[-2].requires_grad
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    output.logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert any(name.partition(".")[0] != model.base_model_prefix for name in trained)


def test_a_model_without_the_layers_to_train_is_refused(tokenizer, tmp_path):
    settings = replace(SETTINGS, train_layers=3)
    with pytest.raises(ValueError, match=r"train_layers: .* 2 layers, got 3"):
        train(tokenizer, tmp_path / "few", settings=settings)
    config = AlbertConfig(
        vocab_size=len(tokenizer), embedding_size=8, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, num_labels=2,
    )  # fmt: skip
    albert = AlbertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"train_layers: .*AlbertFor.* with 1 for 2 layers"):
        train(tokenizer, tmp_path / "one", settings=replace(SETTINGS, train_layers=1), model=albert)


@pytest.mark.parametrize("masks", [None, MASKS], ids=["full", "sparse"])
def test_a_training_without_dropout_is_that_of_a_model_without_it(tokenizer, tmp_path, masks):
    """In every epoch: evaluation after an epoch also turns dropout off."""
    weights = {}
    for name, rate, applied in (("off", 0.3, False), ("none", 0.0, True), ("on", 0.3, True)):
        settings = replace(SETTINGS, dropout=applied)
        model = new_model(dropout=rate)
        *_, last = train(tokenizer, tmp_path / name, masks=masks, settings=settings, model=model)
        weights[name] = load_file(last.path / "model.safetensors")
    same = {name: torch.equal(w, weights["none"][name]) for name, w in weights["off"].items()}
    assert all(same.values()), same
    assert not torch.equal(
        weights["on"]["classifier.dense.weight"], weights["off"]["classifier.dense.weight"]
    )


def test_epsilon_is_that_of_the_settings_and_saved_with_the_second_moment(tokenizer, tmp_path):
    """With an epsilon far above all gradients, a step is as long as it is divided by more."""
    moves = {}
    for epsilon in (50.0, 100.0):
        settings = replace(SETTINGS, epochs=1, adam_epsilon=epsilon, weight_decay=0.0)
        (checkpoint,) = train(
            tokenizer, tmp_path / str(epsilon), settings=settings, second_moment=True
        )
        after = load_file(checkpoint.path / "model.safetensors")["classifier.out_proj.weight"]
        moves[epsilon] = after - new_model().state_dict()["classifier.out_proj.weight"]
        assert load_second_moment(checkpoint.path)[1] == epsilon
    assert moves[50.0].abs().max() > 1e-6
    torch.testing.assert_close(moves[50.0], 2 * moves[100.0], rtol=2e-2, atol=1e-7)


def test_a_training_in_bfloat16_follows_that_in_float32(tokenizer, tmp_path):
    """The weights are float32, and their moves point the same way; no pass is in float32."""
    moves = {}
    for dtype in ("float32", "bfloat16"):
        settings = replace(SETTINGS, dtype=dtype, epochs=1)
        (checkpoint,) = train(tokenizer, tmp_path / dtype, settings=settings)
        after = load_file(checkpoint.path / "model.safetensors")
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        before = new_model().state_dict()
        moves[dtype] = torch.cat([(after[name] - before[name]).flatten() for name in sorted(after)])
    assert not torch.equal(moves["float32"], moves["bfloat16"])
    assert torch.cosine_similarity(moves["float32"], moves["bfloat16"], dim=0) > 0.9


def test_frozen_parameters_need_gradients_again_after_the_training(tokenizer, tmp_path):
    model, (examples, languages) = new_model(), data()
    model.classifier.dense.bias.requires_grad_(False)
    settings = replace(SETTINGS, shared="frozen", epochs=1)
    fine_tune(model, tokenizer, examples, languages, tmp_path, settings, masks=MASKS)
    left_out = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert left_out == ["classifier.dense.bias"]


@pytest.mark.parametrize("shared", ["trained", "classifier", "frozen"])
def test_checkpoints_record_the_parameters_that_were_not_trained(tokenizer, tmp_path, shared):
    model, (examples, languages) = new_model(), data()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = replace(SETTINGS, shared=shared, epochs=1, warmup=0.0)
    (checkpoint,) = fine_tune(
        model, tokenizer, examples, languages, tmp_path, settings, masks=MASKS
    )
    unmoved = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert set(checkpoint.frozen) == unmoved
    assert bool(unmoved) == (shared != "trained")


def test_a_schedule_whose_rates_are_all_0_is_refused_before_the_training(tokenizer, tmp_path):
    examples, languages = data()
    settings = replace(SETTINGS, epochs=1, batch_size=len(examples), warmup=1.0)
    with pytest.raises(ValueError, match=r"learning rate above 0.*warmup 1\.0"):
        fine_tune(new_model(), tokenizer, examples, languages, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def best_heads(model, examples, size, mask=None):
    importance = head_importance(model, examples, mask).reshape(-1)
    return sorted(sorted(range(importance.size), key=lambda head: -importance[head])[:size])


def test_dynamic_masks_use_the_importance_at_the_full_mask():
    model, examples = tiny_model("xlm-roberta"), tiny_examples(9)
    masks = [_most_important_heads(model, examples, size) for size in range(9)]
    chosen = [np.flatnonzero(mask.array).tolist() for mask in masks]
    assert chosen == [best_heads(model, examples, size) for size in range(9)]
    assert chosen != [best_heads(model, examples, size, MASKS["en"]) for size in range(9)]


def test_dynamic_masks_are_the_most_important_heads_of_the_current_model(tokenizer, tmp_path):
    settings = replace(SETTINGS, epochs=4, reestimate_every=2)
    checkpoints = train(tokenizer, tmp_path, masks=DISJOINT, settings=settings)
    assert epoch_masks(tmp_path, 1, DISJOINT) == epoch_masks(tmp_path, 2, DISJOINT) == DISJOINT
    third = epoch_masks(tmp_path, 3, DISJOINT)
    assert third == epoch_masks(tmp_path, 4, DISJOINT)
    models = [load_model(checkpoint.path)[0] for checkpoint in checkpoints]
    best = [
        {language: best_heads(model, own, 4) for language, own in dev_examples().items()}
        for model in models
    ]
    assert {name: np.flatnonzero(mask.array).tolist() for name, mask in third.items()} == best[1]
    assert best[1]["en"] != best[1]["de"]
    assert best[0] != best[1] != best[2]
    tree = json.loads((tmp_path / "masks" / "epoch-3" / "de.json").read_text())
    assert (tree["language"], tree["epoch"]) == ("de", 3)


def test_an_epoch_is_evaluated_with_its_own_masks(tokenizer, tmp_path):
    seen = []
    train(
        tokenizer,
        tmp_path,
        masks=MASKS,
        settings=DYNAMIC,
        evaluate=lambda model, masks: seen.append(masks) or {},
    )
    assert seen == [epoch_masks(tmp_path, epoch, MASKS) for epoch in (1, 2)]
    assert seen[0] != seen[1]
    (tmp_path / "masks" / "epoch-2" / "de.json").unlink()
    with pytest.raises(ValueError, match=r"epoch-2/de\.json"):
        epoch_masks(tmp_path, 2, MASKS)
    with pytest.raises(ValueError, match=r"elsewhere: .*training\.json"):
        epoch_masks(tmp_path / "elsewhere", 2, MASKS)


def test_only_the_last_checkpoint_is_kept(tokenizer, tmp_path, monkeypatch):
    every = train(tokenizer, tmp_path / "all")
    settings = replace(SETTINGS, keep="last")
    (last,) = train(tokenizer, tmp_path / "last", settings=settings)
    assert [path.name for path in (tmp_path / "last").glob("checkpoint-*")] == ["checkpoint-2"]
    assert (last.epoch, last.step) == (2, 12)
    # Its rate is the mean over all steps, not over those of its epoch.
    rates = [checkpoint.learning_rate for checkpoint in every]
    assert last.learning_rate == pytest.approx(sum(rates) / 2)
    models = [load_model(checkpoint.path)[0] for checkpoint in (every[-1], last)]
    assert model_digest(models[0]) == model_digest(models[1])
    metrics = [(tmp_path / name / "metrics.json").read_text() for name in ("all", "last")]
    assert metrics[0] == metrics[1]
    before = contents(tmp_path / "last")
    with monkeypatch.context() as patch:
        stop_at(patch, HeadwiseAdamW, "step", 1)
        assert train(tokenizer, tmp_path / "last", settings=settings) == [last]
    assert contents(tmp_path / "last") == before
    with pytest.raises(ValueError, match="another keep"):
        train(tokenizer, tmp_path / "last")


def test_training_learns(tokenizer, tmp_path):
    examples = tiny_examples(60, seed=3)
    for example in examples:
        example["labels"] = example["input_ids"][1] % 3
    languages = ["en"] * 30 + ["de"] * 30
    model = new_model()
    settings = TrainingSettings(epochs=12, batch_size=10, learning_rate=1e-2)
    fine_tune(model, tokenizer, examples, languages, tmp_path, settings)
    assert masked_accuracy(model, examples, None) > 0.9


def test_the_global_generator_is_neither_used_nor_moved(tokenizer, tmp_path):
    for seed, name in ((11, "a"), (12, "b")):
        model = new_model()
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        fine_tune(model, tokenizer, *data(), tmp_path / name, SETTINGS)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- stopping and resuming ------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a killed process."""


def stop_at(monkeypatch, owner, method, call):
    """Make the n-th call of a method raise `Killed`."""
    original = getattr(owner, method)
    calls = []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, method, wrapped)


@pytest.mark.parametrize(
    ("masks", "settings"),
    [(None, SETTINGS), (MASKS, SETTINGS), (MASKS, DYNAMIC)],
    ids=["full", "sparse", "dynamic"],
)
@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("step", 1),  # before the first step
        ("step", 4),  # within the first epoch
        ("step", 9),  # within the second
        ("save_pretrained", 1),  # while a checkpoint is written
        ("save_state", 3),  # before a state is written
        ("write_checkpoint", 2),  # between metrics and the last checkpoint
        ("clear_state", 1),  # when only the state is left to remove
    ],
)
def test_a_stopped_training_resumes_to_the_same_bits(
    tokenizer, tmp_path, monkeypatch, masks, settings, method, call
):
    check_stopped_and_resumed(tokenizer, tmp_path, monkeypatch, masks, settings, method, call)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_training_stopped_between_its_masks_resumes_to_the_same_bits(
    tokenizer, tmp_path, monkeypatch, call
):
    """It is stopped between two languages' masks of the first or of the second epoch."""
    check_stopped_and_resumed(tokenizer, tmp_path, monkeypatch, MASKS, DYNAMIC, "save", call)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": "uniform"},
        {"shared": "frozen"},
        {"dtype": "bfloat16"},
        {"train_embeddings": False},
        {"train_layers": 1},
        {"dropout": False, "adam_epsilon": 1e-3},
    ],
    ids=str,
)
def test_every_kind_of_sparse_fine_tuning_resumes(tokenizer, tmp_path, monkeypatch, change):
    settings = replace(DYNAMIC, **change)
    check_stopped_and_resumed(tokenizer, tmp_path, monkeypatch, MASKS, settings, "step", 9)


def test_a_training_that_keeps_only_its_last_checkpoint_resumes(tokenizer, tmp_path, monkeypatch):
    settings = replace(SETTINGS, keep="last")
    check_stopped_and_resumed(tokenizer, tmp_path, monkeypatch, None, settings, "step", 9)


def check_stopped_and_resumed(tokenizer, tmp_path, monkeypatch, masks, settings, method, call):
    from transformers import PreTrainedModel

    examples, languages = data()
    options = {
        "masks": masks,
        "settings": settings,
        "evaluate": lambda model, masks: accuracy_by_language(model, examples, languages, masks),
    }
    train(tokenizer, tmp_path / "whole", **options)
    owners = {"step": HeadwiseAdamW, "save_pretrained": PreTrainedModel, "save": HeadMask}
    with monkeypatch.context() as patch:
        stop_at(patch, owners.get(method, TrainingFolder), method, call)
        with pytest.raises(Killed):
            train(tokenizer, tmp_path / "stopped", save_seconds=1e-9, **options)
    torch.manual_seed(77)
    train(tokenizer, tmp_path / "stopped", **options)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_stopped_training_does_not_start_over(tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, HeadwiseAdamW, "step", 9)
        with pytest.raises(Killed):
            train(tokenizer, tmp_path, save_seconds=1e-9)
    assert [folder.name for folder in (tmp_path / "resume").iterdir()] == ["8"]
    state = load_file(tmp_path / "resume" / "8" / "optimizer.safetensors")
    assert all(value == 8 for name, value in state.items() if name.startswith("step:"))
    steps = []
    with monkeypatch.context() as patch:
        original = HeadwiseAdamW.step
        patch.setattr(HeadwiseAdamW, "step", lambda *given: (steps.append(1), original(*given))[1])
        train(tokenizer, tmp_path)
    assert len(steps) == 12 - 8


LONG = TrainingSettings(epochs=12, batch_size=4, learning_rate=1e-2, reestimate_every=1)
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import test_train as t
t.train(t.tiny_tokenizer(), sys.argv[1], masks=t.MASKS, save_seconds=1e-9, settings=t.LONG)
"""


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(tokenizer, tmp_path):
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(killed)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (killed / "checkpoint-2").is_dir() and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (killed / "checkpoint-2").is_dir()
    assert not (killed / "checkpoint-12").is_dir()
    train(tokenizer, killed, masks=MASKS, settings=LONG)
    train(tokenizer, tmp_path / "whole", masks=MASKS, settings=LONG)
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_complete_training_is_not_touched(tokenizer, tmp_path, monkeypatch):
    first = train(tokenizer, tmp_path)
    before = contents(tmp_path)
    stop_at(monkeypatch, HeadwiseAdamW, "step", 1)
    assert train(tokenizer, tmp_path) == first
    assert contents(tmp_path) == before


def test_another_training_in_the_same_folder_is_refused(tokenizer, tmp_path):
    train(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="another batch_size, seed"):
        train(
            tokenizer,
            tmp_path,
            settings=TrainingSettings(**{**vars(SETTINGS), "batch_size": 2, "seed": 1}),
        )
    with pytest.raises(ValueError, match="another masks"):
        train(tokenizer, tmp_path, masks=MASKS)
    examples, languages = data()
    examples[3]["labels"] = (examples[3]["labels"] + 1) % 3
    with pytest.raises(ValueError, match="another examples"):
        fine_tune(new_model(), tokenizer, examples, languages, tmp_path, SETTINGS)
    other = tiny_model("xlm-roberta", dtype=torch.float32, seed=1)
    with pytest.raises(ValueError, match="another model"):
        fine_tune(other, tokenizer, *data(), tmp_path, SETTINGS)


def test_a_training_recorded_before_a_setting_existed_resumes(tokenizer, tmp_path):
    first = train(tokenizer, tmp_path)
    file = tmp_path / "training.json"
    tree = json.loads(file.read_text())
    older = {"epochs", "batch_size", "learning_rate", "weight_decay", "warmup", "max_grad_norm"}
    newer = asdict(SETTINGS).keys() - older - {"seed"}
    assert newer <= tree.keys()
    file.write_text(json.dumps({key: tree[key] for key in tree.keys() - newer}))
    assert train(tokenizer, tmp_path) == first
    with pytest.raises(ValueError, match="another sampling"):
        train(tokenizer, tmp_path, settings=replace(SETTINGS, sampling="uniform"))


def test_dynamic_masks_of_other_dev_examples_are_another_training(tokenizer, tmp_path):
    train(tokenizer, tmp_path, masks=MASKS, settings=DYNAMIC)
    dev = dev_examples() | {"de": tiny_examples(2, seed=43)}
    with pytest.raises(ValueError, match=r"another dev\b"):
        train(tokenizer, tmp_path, masks=MASKS, settings=DYNAMIC, dev=dev)


# --- errors ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_examples(tokenizer, tmp_path):
    examples, languages = data()
    model = new_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    affected = [row for row, example in enumerate(examples) if 50 in example["input_ids"]]
    assert affected
    ids = [f"x{row}" for row in range(len(examples))]
    with pytest.raises(RuntimeError, match=r"step \d+: loss nan") as caught:
        fine_tune(model, tokenizer, examples, languages, tmp_path, SETTINGS, ids=ids)
    named = str(caught.value).partition("examples ")[2].split(", ")
    assert set(named) & {f"x{row}" for row in affected}
    assert len(named) == 4


def test_inputs_that_do_not_fit_are_refused(tokenizer, tmp_path):
    examples, languages = data()
    model = new_model()

    def attempt(examples, languages, settings=SETTINGS, masks=None, dev=None):
        fine_tune(model, tokenizer, examples, languages, tmp_path, settings, masks=masks, dev=dev)

    with pytest.raises(ValueError, match="examples, got none"):
        attempt([], [])
    with pytest.raises(ValueError, match="21 languages for 22 examples"):
        attempt(examples, languages[1:])
    with pytest.raises(ValueError, match="mask for de"):
        attempt(examples, languages, masks={"en": MASKS["en"]})
    with pytest.raises(ValueError, match="2 layers of 4 heads"):
        attempt(examples, languages, masks={**MASKS, "de": HeadMask.full(3, 4)})
    with pytest.raises(ValueError, match="0 and 4"):
        attempt(examples, languages, TrainingSettings(epochs=0, batch_size=4))
    with pytest.raises(ValueError, match=r"masks: .*shared.* `frozen` and None"):
        attempt(examples, languages, replace(SETTINGS, shared="frozen"))
    with pytest.raises(ValueError, match=r"masks: .*shared.* `trained` and 1"):
        attempt(examples, languages, DYNAMIC)
    three = {**MASKS, "zh": MASKS["en"]}
    with pytest.raises(ValueError, match=r"dev examples.* de, zh"):
        attempt(examples, languages, DYNAMIC, three, {"en": examples, "de": []})
    with pytest.raises(ValueError, match=r"reestimate_every.* 2 and 2"):
        attempt(examples, languages, replace(SETTINGS, reestimate_every=2), MASKS, dev_examples())
    assert not list(tmp_path.iterdir())


def test_accuracy_by_language_uses_each_languages_mask():
    examples, languages = data()
    model = tiny_model("bert")
    scores = accuracy_by_language(model, examples, languages, MASKS)
    for language, mask in MASKS.items():
        own = [e for e, of in zip(examples, languages, strict=True) if of == language]
        assert scores[language] == masked_accuracy(model, own, mask)
    plain = accuracy_by_language(model, examples, languages)
    share = np.mean([plain[language] for language in languages])
    assert share == pytest.approx(masked_accuracy(model, examples, None))
