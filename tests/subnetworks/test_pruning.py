"""Pruning: heads planted in a model, a second implementation, thresholds and seeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models import tiny_examples, tiny_model
from torch import nn

from tracmod.models.architecture import attention_layers
from tracmod.models.plain_pass import predict
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import head_importance, masked_accuracy
from tracmod.subnetworks.pruning import PruneResult, combine_masks, prune


def planted_model() -> nn.Module:
    """Build one layer of four heads: only head 1 tells ids 4 and 5 apart, only head 3 ids 6 and 7.

    Each head carries one direction of the embeddings to a direction of its own, which the
    classifier reads; the other two heads carry nothing that it reads.
    """
    model = tiny_model("xlm-roberta", layers=1, hidden=16, heads=4, num_labels=2, scale=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
        embeddings = model.get_input_embeddings().weight
        for token, (direction, sign) in {4: (0, 1), 5: (0, -1), 6: (1, 1), 7: (1, -1)}.items():
            embeddings[token, direction] = 2.0 * sign
            embeddings[token, direction + 2] = -2.0 * sign  # LayerNorm then keeps the sign
        # Without content of its own in <s>, LayerNorm would undo a change of a head's scale.
        embeddings[0, 12], embeddings[0, 13] = 1.0, -1.0
        layer = attention_layers(model)[0]
        for head, direction in ((1, 0), (3, 1)):
            layer.value.weight[4 * head, direction] = 1.0
            layer.output.weight[8 + direction, 4 * head] = 3.0
            model.classifier.dense.weight[direction, 8 + direction] = 1.0
            model.classifier.out_proj.weight[:, direction] = torch.tensor([1.0, -1.0])
        model.classifier.out_proj.bias[0] = 0.05  # class 0 without a signal
        for head in (0, 2):
            layer.value.weight[4 * head, 4] = 1.0
            layer.output.weight[12 + head, 4 * head] = 1.0
    return model


def planted_examples(first: int) -> list[dict]:
    """Return examples of id `first` (label 0) or `first + 1` (label 1) between neutral ids."""
    examples = []
    for length in range(1, 6):
        for label in (0, 1):
            ids = [0, *[first + label] * length, 2]
            examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label})
    return examples


@pytest.mark.parametrize(("first", "needed"), [(4, 1), (6, 3)])
def test_a_language_keeps_the_head_it_needs(first, needed):
    model, examples = planted_model(), planted_examples(first)
    result = prune(model, examples, threshold=0.95, step=0.25)
    assert result.full_score == 1.0
    assert result.score == 1.0
    assert np.flatnonzero(result.mask.array).tolist() == [needed]
    assert [row["heads"] for row in result.course] == [4, 3, 2, 1]
    alone = np.ones((1, 4))
    alone[0, needed] = 0
    assert masked_accuracy(model, examples, HeadMask(alone)) == 0.5


def test_both_languages_together_keep_both_heads():
    model = planted_model()
    result = prune(model, planted_examples(4) + planted_examples(6), threshold=0.95, step=0.25)
    assert np.flatnonzero(result.mask.array).tolist() == [1, 3]
    assert [row["heads"] for row in result.course] == [4, 3, 2, 1]
    assert result.course[-1]["score"] == 0.75


def reference_prune(model, examples, threshold, count):
    """Prune as `prune` does, written with lists of heads."""
    kept = [(layer, head) for layer in range(2) for head in range(4)]

    def mask_of(heads):
        array = np.zeros((2, 4))
        array[tuple(zip(*heads, strict=True))] = 1
        return HeadMask(array)

    full = masked_accuracy(model, examples, None)
    last = kept
    while len(kept) > 1:
        importance = head_importance(model, examples, mask_of(kept))
        ranked = sorted(kept, key=lambda head: (importance[head], head))
        kept = sorted(ranked[min(count, len(kept) - 1) :])
        if masked_accuracy(model, examples, mask_of(kept)) < threshold * full - 1e-9:
            break
        last = kept
    return mask_of(last)


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize(("step", "count"), [(0.01, 1), (0.10, 1), (0.25, 2), (1.0, 8)])
def test_pruning_follows_the_algorithm(threshold, step, count):
    model = tiny_model(seed=1)
    examples = tiny_examples(60)
    for example, row in zip(examples, predict(model, examples), strict=True):
        example["labels"] = int(row.argmax())
    result = prune(model, examples, threshold=threshold, step=step)
    assert result.mask == reference_prune(model, examples, threshold, count)
    assert result.score >= threshold * result.full_score - 1e-9
    first, *others = result.course
    assert (first["heads"], first["score"]) == (8, result.full_score)
    np.testing.assert_allclose(first["importance"], head_importance(model, examples))
    assert all(np.sum(row["mask"]) == row["heads"] for row in result.course)
    assert result.mask.array.tolist() in [row["mask"] for row in result.course]
    assert others[-1]["importance"] is None
    assert result.mask.size >= 1
    again = prune(model, examples, threshold=threshold, step=step)
    assert again == result


def test_a_result_is_saved_as_a_subnetwork(tmp_path):
    result = prune(planted_model(), planted_examples(4), step=0.5)
    result.save(tmp_path / "xx.json", "xx", seeds=[3])
    tree = json.loads((tmp_path / "xx.json").read_text())
    assert tree["language"] == "xx"
    assert tree["seeds"] == [3]
    assert (tree["score"], tree["full_score"], tree["threshold"]) == (1.0, 1.0, 0.95)
    assert HeadMask.load(tmp_path / "xx.json") == result.mask


@pytest.mark.parametrize(
    "option", [{"threshold": 0}, {"threshold": 1.1}, {"step": 0}, {"step": 2}, {"lowest": 0}]
)
def test_shares_outside_zero_to_one_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        prune(tiny_model(), tiny_examples(2), **option)


def predictable(model, number=60):
    """Return examples that the full model classifies correctly."""
    examples = tiny_examples(number)
    for example, row in zip(examples, predict(model, examples), strict=True):
        example["labels"] = int(row.argmax())
    return examples


def test_one_course_gives_every_threshold_down_to_the_lowest():
    model = tiny_model(seed=0)
    examples = predictable(model)
    result = prune(model, examples, threshold=0.95, step=0.10, lowest=0.3)
    assert result.mask == prune(model, examples, threshold=0.95, step=0.10).mask
    for threshold in (0.3, 0.8, 0.9, 0.98, 1.0):
        alone = prune(model, examples, threshold=threshold, step=0.10)
        same_course = result.at(threshold)
        assert (same_course.mask, same_course.score) == (alone.mask, alone.score)
    short = prune(model, examples, threshold=0.95, step=0.10)
    assert short.course[-1]["heads"] > 1
    with pytest.raises(ValueError, match=r"threshold .*got 0\.5"):
        short.at(0.5)


def test_every_head_is_kept_if_the_first_step_masks_too_many():
    result = prune(planted_model(), planted_examples(4), threshold=0.95, step=1.0)
    assert result.mask.size == 1  # head 1 is the most important
    both = prune(planted_model(), planted_examples(4) + planted_examples(6), step=1.0)
    assert both.mask.size == 4
    assert not both.pruned
    assert result.pruned


def test_a_result_is_unchanged_by_saving(tmp_path):
    result = prune(planted_model(), planted_examples(4), step=0.25, lowest=0.2)
    result.save(tmp_path / "xx.json", "xx", seeds=[0], model="multilingual")
    assert PruneResult.load(tmp_path / "xx.json") == result
    assert json.loads((tmp_path / "xx.json").read_text())["model"] == "multilingual"
    HeadMask([[1, 0]]).save(tmp_path / "bare.json")
    with pytest.raises(ValueError, match=r"bare\.json: .*score"):
        PruneResult.load(tmp_path / "bare.json")


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("first", [[1, 1, 0, 0]]),
        ("union", [[1, 1, 1, 0]]),
        ("majority", [[1, 1, 0, 0]]),
        ("intersection", [[1, 0, 0, 0]]),
    ],
)
def test_masks_of_several_seeds_are_combined(combine, expected):
    masks = [HeadMask([[1, 1, 0, 0]]), HeadMask([[1, 1, 0, 0]]), HeadMask([[1, 0, 1, 0]])]
    assert combine_masks(masks, combine) == HeadMask(expected)
    assert combine_masks(masks[:1], combine) == masks[0]


def test_half_of_the_seeds_is_no_majority():
    masks = [HeadMask([[1, 1, 0]]), HeadMask([[1, 0, 1]])]
    assert combine_masks(masks, "majority") == HeadMask([[1, 0, 0]])
    with pytest.raises(ValueError, match=r"shape, got \[\(1, 2\), \(2, 1\)\]"):
        combine_masks([HeadMask([[1, 1]]), HeadMask([[1], [1]])], "union")
