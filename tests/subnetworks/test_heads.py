"""Head masks and importance, compared with edited weights and numerical derivatives."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, tiny_examples, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import collate, pad_token_id
from tracmod.models.loss import per_example_loss
from tracmod.models.plain_pass import predict
from tracmod.subnetworks.head_mask import HeadMask, head_slices
from tracmod.subnetworks.importance import head_importance, mask_least_important

MASK = HeadMask([[1, 0, 0, 1], [0, 1, 1, 1]])


# --- masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [[1, 0, 1], [[0.5, 1.0]], [[2, 1]], [], [[]], [[float("nan"), 1.0]]], ids=str
)
def test_only_zeros_and_ones_make_a_mask(bad):
    with pytest.raises(ValueError, match="head mask"):
        HeadMask.from_array(bad)


def test_a_mask_is_a_value():
    same = HeadMask(np.array([[True, False, False, True], [False, True, True, True]]))
    assert same == MASK
    assert hash(same) == hash(MASK)
    assert same.digest() == MASK.digest()
    assert HeadMask.full(2, 4) != MASK
    # The same entries in another shape are another mask.
    assert HeadMask(MASK.array.reshape(4, 2)).digest() != MASK.digest()
    assert MASK.array.dtype == np.int8
    assert MASK.size == 5
    with pytest.raises(ValueError, match="read-only"):
        MASK.array[0, 0] = 0


@pytest.mark.parametrize("size", [0, 1, 17, 35, 36])
def test_random_masks_have_their_size(size):
    mask = HeadMask.random(9, 4, size, seed=3)
    assert mask.size == size
    assert mask == HeadMask.random(9, 4, size, seed=3)


def test_random_masks_are_uniform():
    total = sum(HeadMask.random(3, 4, 5, seed).array.astype(int) for seed in range(2000))
    # 2000 draws of probability 5/12: standard deviation 22
    assert np.abs(total - 2000 * 5 / 12).max() < 5 * 22
    with pytest.raises(ValueError, match=r"size: .* 12, got 13"):
        HeadMask.random(3, 4, 13, 0)


def test_saved_masks_have_the_documented_fields(tmp_path):
    path = tmp_path / "subnetworks" / "en.json"
    MASK.save(path, language="en", score=0.7, full_score=0.72, threshold=0.95, seeds=[0])
    tree = json.loads(path.read_text())
    assert tree == {
        "language": "en",
        "num_layers": 2,
        "num_heads": 4,
        "mask": MASK.array.tolist(),
        "score": 0.7,
        "full_score": 0.72,
        "threshold": 0.95,
        "seeds": [0],
    }
    assert HeadMask.load(path) == MASK
    assert [file.name for file in path.parent.iterdir()] == ["en.json"]


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"num_layers": 3, "num_heads": 1, "mask": [[1]]}']
)
def test_bad_mask_files_are_named(tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=r"bad\.json"):
        HeadMask.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no such file"):
        HeadMask.load(tmp_path / "gone.json")


def test_similarity():
    other = HeadMask([[1, 1, 0, 0], [0, 1, 1, 0]])  # 3 in common, 6 in either
    assert MASK.similarity(other) == other.similarity(MASK) == 3 / 6
    nothing = HeadMask(np.zeros((2, 4)))
    assert MASK.similarity(MASK) == 1
    assert nothing.similarity(nothing) == 1
    assert MASK.similarity(nothing) == 0
    with pytest.raises(ValueError, match=r"shape, got \(2, 4\) and \(4, 2\)"):
        MASK.similarity(HeadMask.full(4, 2))


# --- masking a model ------------------------------------------------------------------------


def zero_columns(model: nn.Module, mask: HeadMask) -> nn.Module:
    """Return a copy whose output projections ignore masked heads."""
    edited = copy.deepcopy(model)
    for layer, kept in zip(attention_layers(edited), mask.array, strict=True):
        for head in np.flatnonzero(kept == 0):
            columns = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
            layer.output.weight.data[:, columns] = 0
    return edited


def without_heads(model: nn.Module, mask: HeadMask) -> nn.Module:
    """Return a copy of a BERT or XLM-R without the weights of its masked heads."""
    small = copy.deepcopy(model)
    modules = [m for m in small.modules() if hasattr(m, "self") and hasattr(m, "output")]
    for module, kept in zip(modules, mask.array, strict=True):
        inner = module.self
        width = inner.attention_head_size
        index = torch.tensor(np.flatnonzero(np.repeat(kept, width)))
        for linear in (inner.query, inner.key, inner.value):
            linear.weight = nn.Parameter(linear.weight[index])
            linear.bias = nn.Parameter(linear.bias[index])
        module.output.dense.weight = nn.Parameter(module.output.dense.weight[:, index])
        inner.num_attention_heads = int(kept.sum())
        inner.all_head_size = len(index)
    return small


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_is_zeroing_the_columns(family):
    model, examples = tiny_model(family), tiny_examples(7)
    full = predict(model, examples)
    with MASK.apply(model):
        masked = predict(model, examples)
    assert (masked - full).abs().max() > 1e-3
    torch.testing.assert_close(masked, predict(zero_columns(model, MASK), examples))
    assert torch.equal(predict(model, examples), full)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_masking_is_taking_the_heads_out(family):
    model, examples = tiny_model(family), tiny_examples(7)
    with MASK.apply(model):
        masked = predict(model, examples)
    torch.testing.assert_close(masked, predict(without_heads(model, MASK), examples))


def test_the_full_mask_changes_no_bit():
    model, examples = tiny_model(dtype=torch.float32), tiny_examples(5)
    with HeadMask.full(2, 4).apply(model):
        assert not attention_layers(model)[0].output._forward_pre_hooks
        masked = predict(model, examples)
    assert torch.equal(masked, predict(model, examples))


def test_nested_masks_keep_what_both_keep():
    model, examples = tiny_model(), tiny_examples(5)
    other = HeadMask([[1, 1, 1, 0], [1, 1, 0, 0]])
    with MASK.apply(model), other.apply(model):
        nested = predict(model, examples)
    with HeadMask(MASK.array & other.array).apply(model):
        torch.testing.assert_close(nested, predict(model, examples))


def test_a_mask_is_copied_once_to_each_dtype():
    class Copies(TorchDispatchMode):
        """Records the dtype of every copy of an int8 tensor; only masks are int8 here."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.int8:
                copied.append(out.dtype)
            return out

    copied: list[torch.dtype] = []
    examples = tiny_examples(3)
    model = tiny_model(dtype=torch.float32)
    with MASK.apply(model), Copies():
        for _ in range(3):
            predict(model, examples)
        assert copied == [torch.float32] * 2  # both layers have masked heads
        predict(model.double(), examples)
    assert copied == [torch.float32] * 2 + [torch.float64] * 2


def test_a_mask_first_used_in_inference_mode_can_be_trained_under():
    model, examples = tiny_model(), tiny_examples(3)
    batch = collate(examples, pad_token_id(model))
    with MASK.apply(model):
        with torch.inference_mode():
            model(batch["input_ids"])
        model(batch["input_ids"]).logits.sum().backward()
    assert attention_layers(model)[0].query.weight.grad is not None


def test_other_hooks_see_the_masked_input():
    model = tiny_model()
    seen = []
    layer = attention_layers(model)[0]
    hook = layer.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with MASK.apply(model):
        predict(model, tiny_examples(2))
    hook.remove()
    kept = seen[0].reshape(-1, 4, 6).abs().amax((0, 2)) > 0
    assert kept.tolist() == [True, False, False, True]


def test_the_mask_is_gone_after_an_exception():
    model, examples = tiny_model(), tiny_examples(3)
    full = predict(model, examples)
    with pytest.raises(RuntimeError, match="stop"), MASK.apply(model):
        raise RuntimeError("stop")
    assert torch.equal(predict(model, examples), full)
    assert not any(layer.output._forward_pre_hooks for layer in attention_layers(model))


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2, 3), (4, 2)])
def test_a_mask_of_another_shape_is_refused(shape):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"expected 2 layers of 4 heads"):
        HeadMask.full(*shape).apply(model).__enter__()
    assert not any(layer.output._forward_pre_hooks for layer in attention_layers(model))


# --- slices of a head -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_all_heads_cover_their_parameters_once(family):
    model = tiny_model(family)
    counts = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in head_slices(model):
        counts[part.name][part.index] += 1
    owned = {name for name, count in counts.items() if (count == 1).all()}
    assert all((count == 0).all() or (count == 1).all() for count in counts.values())
    assert len(owned) == 2 * 7  # per layer: three weights, three biases, one output weight


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_slices_have_no_gradient_and_all_others_have(family):
    model, examples = tiny_model(family), tiny_examples(5)
    batch = collate(examples, pad_token_id(model))
    labels = batch.pop("labels")
    with MASK.apply(model):
        per_example_loss(model(**batch).logits, labels).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    parts = head_slices(model, MASK)
    assert len(parts) == (8 - MASK.size) * 7
    for part in parts:
        assert not MASK.array[part.layer, part.head]
        assert (gradients[part.name][part.index] == 0).all()
        gradients[part.name][part.index] = 1
    # All other parts of these parameters have one, except key biases: softmax cancels them.
    for name in {part.name for part in parts}:
        if "key.bias" not in name and "k_lin.bias" not in name:
            assert (gradients[name] != 0).all(), name


# --- importance -----------------------------------------------------------------------------


def loss_with_gates(model, example, gates_LH) -> torch.Tensor:
    """Return the loss of one example with every head's columns scaled by its gate."""
    scaled = copy.deepcopy(model)
    for layer, gates in zip(attention_layers(scaled), gates_LH, strict=True):
        layer.output.weight.data *= torch.as_tensor(gates).repeat_interleave(layer.head_dim)
    batch = collate([example], pad_token_id(model))
    labels = batch.pop("labels")
    with torch.no_grad():
        return per_example_loss(scaled(**batch).logits, labels)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_importance_is_the_mean_absolute_derivative(family, mask):
    model, examples = tiny_model(family), tiny_examples(5)
    start = np.ones((2, 4)) if mask is None else mask.array.astype(float)
    expected = np.zeros((2, 4))
    step = 1e-5
    for example in examples:
        for head in np.ndindex(2, 4):
            change = np.zeros((2, 4))
            change[head] = step
            above = loss_with_gates(model, example, start + change)
            below = loss_with_gates(model, example, start - change)
            expected[head] += abs(float(above - below)) / (2 * step) / len(examples)
    raw = head_importance(model, examples, mask, normalize=False)
    np.testing.assert_allclose(raw, expected, rtol=1e-5, atol=1e-9)
    normalized = head_importance(model, examples, mask)
    np.testing.assert_allclose(
        normalized, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5
    )


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_importance_does_not_depend_on_batches_or_mode(batch_tokens):
    model, examples = tiny_model(dropout=0.5), tiny_examples(9)
    expected = head_importance(model, examples)
    model.train()
    again = head_importance(model, examples, batch_tokens=batch_tokens)
    assert model.training
    np.testing.assert_allclose(again, expected, rtol=1e-9)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(layer.output._forward_pre_hooks for layer in attention_layers(model))


def test_importance_works_with_frozen_weights_and_without_gradients():
    model, examples = tiny_model(), tiny_examples(4)
    expected = head_importance(model, examples)
    model.requires_grad_(False)
    with torch.no_grad():
        np.testing.assert_array_equal(head_importance(model, examples), expected)


def test_importance_of_a_layer_without_effect_stays_zero():
    model = tiny_model()
    attention_layers(model)[1].output.weight.data.zero_()
    importance = head_importance(model, tiny_examples(4))
    assert (importance[1] == 0).all()
    assert np.linalg.norm(importance[0]) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"examples, got none"):
        head_importance(model, [])


def test_of_equal_heads_the_lower_layer_and_head_is_masked_first():
    mask = HeadMask([[1, 0, 1], [1, 1, 1]])
    equal = np.ones((2, 3))
    assert mask_least_important(mask, equal, 2).array.tolist() == [[0, 0, 0], [1, 1, 1]]
    equal[0, 2] = 2
    assert mask_least_important(mask, equal, 2).array.tolist() == [[0, 0, 1], [0, 1, 1]]
