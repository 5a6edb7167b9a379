"""Influence by head and layer: against one-example autograd in float64, and added up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from encoders import ragged_examples, tiny_encoder
from tiny_models import tiny_examples, tiny_model

import tracmod as tm
from tracmod.gradients.capture import select_layers
from tracmod.influence.blocks import Block, block_influence, parameter_blocks, weighted_sum
from tracmod.subnetworks.head_mask import masked
from tracmod.validation.gradients import autograd_gradients

MASK = tm.HeadMask.from_array([[0, 1, 1], [1, 0, 0]])
EMPTY_LAYER = tm.HeadMask.from_array([[0, 0, 0], [1, 1, 0]])


def by_language(count, names, seed=0):
    """Ragged examples, a different number for every language."""
    return {
        name: ragged_examples(count + number, seed + number) for number, name in enumerate(names)
    }


TRAIN, TEST = by_language(5, ["de", "en", "zh"]), by_language(1, ["en", "ru"], seed=9)


def brute_force(model, parameters, mask, normalize, train=TRAIN, test=TEST):
    """Every pair's product in every block from one-example float64 gradients, then the means."""
    names = [name for layer in select_layers(model, parameters) for name in layer.parameter_names]
    model = model.double()

    def gradients(examples):
        """Gradients by name of the parameter, one dict per example."""
        with masked(model, mask):
            gradients = [autograd_gradients(model, example, names) for example in examples]
        scaled = []
        for by_name in gradients:
            norm = torch.cat([gradient.flatten() for gradient in by_name.values()]).norm()
            scale = 1.0 if normalize is None else 1.0 / norm
            scaled.append({name: gradient * scale for name, gradient in by_name.items()})
        return scaled

    trains = {name: gradients(examples) for name, examples in train.items()}
    tests = {name: gradients(examples) for name, examples in test.items()}
    means = {}
    for (test_name, qs), (train_name, ts) in itertools.product(tests.items(), trains.items()):
        for block, parts in blocks_by_name(model, names).items():
            pairs = [sum((q[n][i] * t[n][i]).sum() for n, i in parts) for q in qs for t in ts]
            means[(test_name, train_name, *block)] = float(torch.stack(pairs).mean())
    return means


def blocks_by_name(model, names):
    """The blocks written down from the names of XLM-R's parameters, not by the code under test."""
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    size, blocks = width // heads, {}
    for name in names:
        parts = name.split(".")
        layer = int(parts[parts.index("layer") + 1]) if "layer" in parts else None
        rows = parts[-2] in ("query", "key", "value")
        columns = name.endswith("attention.output.dense.weight")
        for head in range(heads) if rows or columns else [None]:
            own = slice(None) if head is None else slice(head * size, (head + 1) * size)
            index = (slice(None), own) if columns else (own,)
            blocks.setdefault((layer, head), []).append((name, index))
    return blocks


def rows_of(table):
    keys = ("test_language", "train_language", "layer", "head")
    return {tuple(row[key] for key in keys): row["influence"] for row in table.to_pylist()}


@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize("mask", [None, MASK, EMPTY_LAYER], ids=["whole", "masked", "empty layer"])
@pytest.mark.parametrize("parameters", ["encoder", "all", "attention", "classifier"])
def test_every_block_agrees_with_one_example_autograd(parameters, mask, normalize):
    blocks = rows_of(
        block_influence(tiny_encoder(), TRAIN, TEST, parameters, mask, normalize, batch_tokens=90)
    )
    expected = brute_force(tiny_encoder(), parameters, mask, normalize)
    assert blocks.keys() == expected.keys()
    scale = max(map(abs, expected.values()))
    np.testing.assert_allclose(
        [blocks[key] for key in expected], list(expected.values()), rtol=1e-4, atol=2e-6 * scale
    )


@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_blocks_add_up_to_mean_exact_influence(normalize):
    model = tiny_encoder(num_attention_heads=4, num_hidden_layers=3)
    table = block_influence(model, TRAIN, TEST, normalize=normalize)
    totals = table.group_by(["test_language", "train_language"]).aggregate([("influence", "sum")])
    for row in totals.to_pylist():
        scores_QN = tm.exact_influence(
            model, TRAIN[row["train_language"]], TEST[row["test_language"]], normalize=normalize
        )
        assert row["influence_sum"] == pytest.approx(float(scores_QN.double().mean()), rel=1e-4)


def test_projected_features_estimate_the_sum_of_the_blocks():
    model = tiny_encoder()
    blocks = rows_of(block_influence(model, TRAIN, TEST, normalize="cosine"))
    total = sum(value for key, value in blocks.items() if key[:2] == ("ru", "de"))
    means = []
    for seed in range(20):
        projection = tm.Projection(512, seed=seed)
        query, train = (
            tm.collect_features(model, rows, projection) for rows in (TEST["ru"], TRAIN["de"])
        )
        means.append(float(tm.influence_scores(query, train, normalize="cosine").mean()))
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert error < 0.02
    assert np.mean(means) == pytest.approx(total, abs=4 * error + 1e-3)


def test_masked_heads_have_no_influence_and_the_others_have():
    blocks = rows_of(block_influence(tiny_encoder(), TRAIN, TEST, head_mask=MASK))
    for (_, _, layer, head), value in blocks.items():
        if head is not None:
            assert (value == 0) == (MASK.array[layer, head] == 0)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_blocks_of_other_families_hold_every_parameter_once(family):
    model = tiny_model(family, hidden=24, heads=3, dtype=torch.float32)
    names = [name for layer in select_layers(model, "all") for name in layer.parameter_names]
    assert set(names) == {name for name, _ in model.named_parameters()}
    count = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for parts in parameter_blocks(model, names).values():
        for name, index in parts:
            count[name][index] += 1
    assert all(bool((times == 1).all()) for times in count.values())
    assert list(parameter_blocks(model, names))[3:5] == [Block(0, None), Block(1, 0)]
    examples = {"en": tiny_examples(3)}
    total = sum(rows_of(block_influence(model, examples, examples, "all")).values())
    exact = tm.exact_influence(model, examples["en"], examples["en"], "all")
    assert total == pytest.approx(float(exact.mean()), rel=1e-4)


def test_checkpoints_add_up_with_their_weights():
    models = [tiny_encoder(seed=seed) for seed in (0, 1)]
    tables = [block_influence(model, TRAIN, TEST) for model in models]
    total, parts = rows_of(weighted_sum(tables, [0.5, 2.0])), [rows_of(table) for table in tables]
    for key, value in total.items():
        assert value == pytest.approx(0.5 * parts[0][key] + 2.0 * parts[1][key], rel=1e-12)


def test_batch_sizes_do_not_change_the_result_and_the_model_stays_the_same():
    model = tiny_encoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = []
    tables = [
        block_influence(model, TRAIN, TEST, normalize="cosine", batch_tokens=size, advance=add)
        for size, add in ((1, done.append), (4096, None))
    ]
    first, second = (np.array(table["influence"]) for table in tables)
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-6 * np.abs(first).max())
    assert sum(done) == sum(map(len, [*TRAIN.values(), *TEST.values()]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_invalid_arguments_are_refused_before_the_work():
    model, done = tiny_encoder(), []
    wrong = [
        ({"train": {"en": []}}, r"train en.* 1 example"),
        ({"normalize": "l2"}, r"normalize.*got 'l2'"),
        ({"parameters": "heads"}, r"parameters.*heads"),
        ({"test": {"de": [{"input_ids": [3, 999], "labels": 0}]}}, "test de: row 0"),
        ({"head_mask": tm.HeadMask.full(2, 4)}, r"head mask.*\b2\b.*\b3\b"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            block_influence(
                model, **{"train": TRAIN, "test": TEST, "advance": done.append} | arguments
            )
    assert not done


def test_gradient_that_is_not_finite_names_the_example():
    model = tiny_encoder()
    with torch.no_grad():
        model.roberta.embeddings.word_embeddings.weight[40] = torch.nan
    train = {"en": [*ragged_examples(2), {"input_ids": [40, 41], "labels": 1}]}
    for rows in (train["en"][:2], TEST["en"]):
        assert all(40 not in row["input_ids"] for row in rows), "the planted id is drawn too"
    with pytest.raises(ValueError, match=r"train en: row 2.*finite"):
        block_influence(model, train, {"en": TEST["en"]})
