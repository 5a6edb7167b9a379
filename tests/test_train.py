"""Full and sparse fine-tuning: what moves, what does not, and that nothing is lost on the way."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny_examples, tiny_model, tiny_tokenizer
from torch import nn
from transformers import get_linear_schedule_with_warmup

from tracmod.heads import HeadMask, head_slices, masked_accuracy
from tracmod.model import collate, load_model, model_digest, pad_token_id, per_example_loss
from tracmod.optimizer import HeadwiseAdamW
from tracmod.train import Settings, _Plan, accuracy_by_language, fine_tune, scheduled_rate

SETTINGS = Settings(epochs=2, batch_size=4, learning_rate=1e-2, weight_decay=0.1, seed=5)
MASKS = {"en": HeadMask([[1, 0, 0, 1], [0, 1, 1, 1]]), "de": HeadMask([[1, 1, 0, 0], [1, 1, 1, 0]])}


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


def new_model():
    return tiny_model("xlm-roberta", dropout=0.1, dtype=torch.float32, scale=1.0)


def train(tokenizer, out_dir, *, masks=None, settings=SETTINGS, **options):
    examples, languages = data()
    return fine_tune(
        new_model(), tokenizer, examples, languages, out_dir, settings, masks=masks, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished training by its relative name."""
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
    """Textbook AdamW over copies of the parts of every parameter, heads on their own."""
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
def test_each_head_is_updated_by_an_adamw_of_its_own(family):
    model = tiny_model(family, scale=1.0)
    twin = copy.deepcopy(model)
    optimizer = HeadwiseAdamW(model, weight_decay=0.1, split_heads=True)
    reference = split_reference(twin, 0.1)
    batch = collate(tiny_examples(6), pad_token_id(model))
    # The first masks leave some heads out for several steps: their bias correction starts late.
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


@pytest.mark.parametrize("split_heads", [False, True])
def test_without_masks_it_is_adamw_of_torch(split_heads):
    model = tiny_model("roberta", scale=1.0)
    twin = copy.deepcopy(model)
    optimizer = HeadwiseAdamW(model, weight_decay=0.1, split_heads=split_heads)
    plain = [p for n, p in twin.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    decaying = [p for p in twin.parameters() if not any(p is q for q in plain)]
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
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


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_masked_heads_stay_bitwise_as_they_are(family):
    model = tiny_model(family, dtype=torch.float32, scale=1.0)
    optimizer = HeadwiseAdamW(model, weight_decay=0.1, split_heads=True)
    batch = collate(tiny_examples(6), pad_token_id(model))
    full = HeadMask.full(2, 4)
    for _ in range(2):  # so that every head has momentum to carry it on
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
            # The gradient of key biases is zero but for rounding, so kept ones may stand still.
            if not kept:
                assert torch.equal(after[entry], state[entry]), entry
        assert after[f"step:{part.name}[{part.head}]"] == (5 if kept else 2)
    headless = set(before) - {part.name for part in head_slices(model)}
    for name, parameter in model.named_parameters():
        if name in headless:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("split_heads", [False, True])
def test_optimizer_state_can_be_taken_over(split_heads):
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
def test_schedule_is_that_of_transformers(warmup, total):
    settings = Settings(learning_rate=0.5, warmup=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_linear_schedule_with_warmup(optimizer, int(warmup * total), total)
    for step in range(total):
        assert scheduled_rate(step, total, settings) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("by_language", [False, True])
def test_an_epoch_takes_every_example_once(by_language):
    languages = ["en"] * 11 + ["de"] * 5 + ["zh"] * 8
    plan = _Plan(languages, Settings(batch_size=4, epochs=3, seed=1), by_language=by_language)
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


# --- whole trainings ------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [None, MASKS], ids=["full", "sparse"])
def test_a_training_leaves_what_the_contract_says(tokenizer, tmp_path, masks):
    examples, languages = data()
    checkpoints = train(
        tokenizer,
        tmp_path,
        masks=masks,
        evaluate=lambda model: accuracy_by_language(model, examples, languages, masks),
    )
    steps = 6 if masks is None else 4 + 2
    assert [(c.epoch, c.step) for c in checkpoints] == [(1, steps), (2, 2 * steps)]
    rates = [scheduled_rate(step, 2 * steps, SETTINGS) for step in range(2 * steps)]
    for number, checkpoint in enumerate(checkpoints):
        mean = sum(rates[number * steps : (number + 1) * steps]) / steps
        assert checkpoint.learning_rate == pytest.approx(mean)
        assert checkpoint.path == tmp_path / f"checkpoint-{number + 1}"
        own = json.loads((checkpoint.path / "tracmod.json").read_text())
        assert own.keys() == {"epoch", "step", "learning_rate"}
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
    """One batch of everything: mean loss, clipped gradient, AdamW with decay, no dropout."""
    examples, languages = data(6)
    settings = Settings(
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
        # Where the gradient is rounding alone (key biases), its sign is anybody's.
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


def test_training_learns(tokenizer, tmp_path):
    examples = tiny_examples(60, seed=3)
    for example in examples:
        example["labels"] = example["input_ids"][1] % 3
    languages = ["en"] * 30 + ["de"] * 30
    model = new_model()
    settings = Settings(epochs=12, batch_size=10, learning_rate=1e-2)
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


# --- stopping and going on ------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def stop_at(monkeypatch, owner, method, call):
    """Make the n-th call of a method raise."""
    original = getattr(owner, method)
    calls = []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, method, wrapped)


@pytest.mark.parametrize("masks", [None, MASKS], ids=["full", "sparse"])
@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("step", 1),  # before anything is done
        ("step", 4),  # within the first epoch
        ("step", 9),  # within the second
        ("save_pretrained", 1),  # while a checkpoint is written
        ("save_state", 3),  # before a state is written
        ("write_checkpoint", 2),  # between metrics and the last checkpoint
        ("clear_state", 1),  # when all is done but the tidying up
    ],
)
def test_a_stopped_training_goes_on_to_the_same_bits(
    tokenizer, tmp_path, monkeypatch, masks, method, call
):
    from transformers import PreTrainedModel

    from tracmod.training_folder import TrainingFolder

    examples, languages = data()
    options = {
        "masks": masks,
        "evaluate": lambda model: accuracy_by_language(model, examples, languages, masks),
    }
    train(tokenizer, tmp_path / "whole", **options)
    owners = {"step": HeadwiseAdamW, "save_pretrained": PreTrainedModel}
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


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import test_train as t
t.train(t.tiny_tokenizer(), sys.argv[1], masks=t.MASKS, save_seconds=1e-9,
        settings=t.Settings(epochs=12, batch_size=4, learning_rate=1e-2))
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(tokenizer, tmp_path):
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
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
    settings = Settings(epochs=12, batch_size=4, learning_rate=1e-2)
    train(tokenizer, killed, masks=MASKS, settings=settings)
    train(tokenizer, tmp_path / "whole", masks=MASKS, settings=settings)
    assert contents(killed) == contents(tmp_path / "whole")


def test_a_complete_training_is_left_alone(tokenizer, tmp_path, monkeypatch):
    first = train(tokenizer, tmp_path)
    before = contents(tmp_path)
    stop_at(monkeypatch, HeadwiseAdamW, "step", 1)
    assert train(tokenizer, tmp_path) == first
    assert contents(tmp_path) == before


def test_another_training_in_the_same_folder_is_refused(tokenizer, tmp_path):
    train(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="another batch_size, seed"):
        train(
            tokenizer, tmp_path, settings=Settings(**{**vars(SETTINGS), "batch_size": 2, "seed": 1})
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


# --- what can go wrong ----------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_and_names_the_examples(tokenizer, tmp_path):
    examples, languages = data()
    model = new_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    guilty = [row for row, example in enumerate(examples) if 50 in example["input_ids"]]
    assert guilty
    ids = [f"x{row}" for row in range(len(examples))]
    with pytest.raises(RuntimeError, match=r"step \d+: loss nan") as caught:
        fine_tune(model, tokenizer, examples, languages, tmp_path, SETTINGS, ids=ids)
    named = str(caught.value).partition("examples ")[2].split(", ")
    assert set(named) & {f"x{row}" for row in guilty}
    assert len(named) == 4


def test_inputs_that_do_not_fit_are_named(tokenizer, tmp_path):
    examples, languages = data()
    model = new_model()

    def attempt(given, of, settings=SETTINGS, masks=None):
        fine_tune(model, tokenizer, given, of, tmp_path, settings, masks=masks)

    with pytest.raises(ValueError, match="got none"):
        attempt([], [])
    with pytest.raises(ValueError, match="21 languages for 22 examples"):
        attempt(examples, languages[1:])
    with pytest.raises(ValueError, match="no head mask for de"):
        attempt(examples, languages, masks={"en": MASKS["en"]})
    with pytest.raises(ValueError, match="2 layers of 4 heads"):
        attempt(examples, languages, masks={**MASKS, "de": HeadMask.full(3, 4)})
    with pytest.raises(ValueError, match="0 and 4"):
        attempt(examples, languages, Settings(epochs=0, batch_size=4))
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
