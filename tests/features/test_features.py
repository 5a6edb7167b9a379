"""Features are unbiased, complete and the same for every batch, order and padding; and stores."""

from __future__ import annotations

import copy

import pytest
import torch
from encoders import ragged_examples, tiny_encoder

import tracmod as tm
from tracmod.features.collector import SHARDS_PER_TASK, Collector, collect_to_store, divide_shards
from tracmod.features.projection import projection_keys
from tracmod.features.recipe import FeatureRecipe
from tracmod.gradients.capture import ModelPass, select_layers
from tracmod.kernels import reference
from tracmod.models.modes import frozen
from tracmod.subnetworks.head_mask import head_slices
from tracmod.validation.gradients import autograd_gradients


def two_sided(layer, slot, gradient, seed):
    input_key, output_key = projection_keys(layer)
    r_out, r_in = (
        reference.projection_matrix(slot.kind, k, n, seed, key).float()
        for k, n, key in zip(
            (slot.k_out, slot.k_in), gradient.shape, (output_key, input_key), strict=True
        )
    )
    return r_out @ gradient @ r_in.T


def projected(layers, projection, gradients):
    """Compute the features of an example from its gradients by parameter name, by the reference."""
    row, slots = torch.zeros(projection.dim), projection.slots(layers)
    for layer in layers:
        slot, (weight, *bias) = slots[layer.name], [gradients[n] for n in layer.parameter_names]
        size = slot.k_out * slot.k_in
        if layer.kind == "linear":
            feature = torch.cat([weight, *(b[:, None] for b in bias)], dim=1)
        else:
            feature = torch.stack([weight, *bias])
        if slot.kind != "identity" and layer.kind == "elementwise":
            rows = torch.arange(len(feature))
            key = 2 * layer.position + 1
            feature = reference.count_sketch(feature, rows, size, projection.seed, key)
        elif slot.kind == "sketch":
            input_key, key = projection_keys(layer)
            if slot.rows > 0:
                r_out = reference.projection_matrix(
                    "rademacher", slot.rows, len(feature), projection.seed, key, torch.float32
                )
                feature, key = r_out @ feature, ~input_key
            feature = reference.formed_sketch(feature, size, projection.seed, input_key, key)
        elif slot.kind != "identity":
            feature = two_sided(layer, slot, feature, projection.seed)
        row[slot.offset : slot.offset + size] += feature.flatten()
    return row


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("layout", ["accumulate", "concatenate"])
@pytest.mark.parametrize("parameters", ["encoder", "attention", "classifier"])
def test_features_are_the_projected_autograd_gradients(kind, layout, parameters):
    model, projection = tiny_encoder(), tm.Projection(700, kind, seed=3, layers=layout)
    examples = ragged_examples(3)
    layers = select_layers(model, parameters)
    names = [name for layer in layers for name in layer.parameter_names]
    actual = tm.collect_features(model, examples, projection, parameters)
    assert actual.shape == (3, 700)
    assert actual.dtype == torch.float32
    for row, example in zip(actual, examples, strict=True):
        expected = projected(layers, projection, autograd_gradients(model, example, names))
        assert (row - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("parameters", ["encoder", "all"])
def test_inner_products_are_right_in_expectation(kind, parameters):
    model, examples = tiny_encoder(), ragged_examples(4)
    exact = tm.exact_influence(model, examples, examples, parameters)
    draws = []
    for seed in range(60):
        features = tm.collect_features(
            model, examples, tm.Projection(400, kind, seed=seed), parameters
        )
        draws.append(features @ features.T)
    draws = torch.stack(draws)
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - exact).abs() <= 4.5 * standard_error + 1e-5).all()


def test_the_error_falls_with_the_dimension():
    model, examples = tiny_encoder(), ragged_examples(12)
    exact = tm.exact_influence(model, examples, examples, normalize="cosine")
    errors = []
    for dim in (128, 512, 4096):
        features = tm.collect_features(model, examples, tm.Projection(dim))
        scores = tm.influence_scores(features, features, normalize="cosine")
        errors.append(float((scores - exact).square().mean().sqrt()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


@pytest.mark.parametrize("batch_tokens", [1, 17, 100])
def test_features_do_not_depend_on_the_batches(batch_tokens):
    model, examples, projection = tiny_encoder(), ragged_examples(10), tm.Projection(300)
    whole = tm.collect_features(model, examples, projection, "all")
    actual = tm.collect_features(model, examples, projection, "all", batch_tokens=batch_tokens)
    torch.testing.assert_close(actual, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_features_follow_the_order_of_the_examples():
    model, examples, projection = tiny_encoder(), ragged_examples(10), tm.Projection(300)
    order = [3, 0, 9, 4]
    whole = tm.collect_features(model, examples, projection)
    actual = tm.collect_features(model, [examples[row] for row in order], projection)
    torch.testing.assert_close(actual, whole[order], rtol=1e-4, atol=1e-4)


def test_padded_rows_and_tensors():
    model, examples, projection = tiny_encoder(), ragged_examples(6), tm.Projection(300)
    padded = []
    for example in examples:
        blank = 25 - len(example["input_ids"])
        padded.append(
            {
                "input_ids": torch.tensor(example["input_ids"] + [1] * blank),
                "attention_mask": torch.tensor(example["attention_mask"] + [0] * blank),
                "labels": torch.tensor(example["labels"]),
            }
        )
    plain = tm.collect_features(model, examples, projection)
    assert torch.equal(tm.collect_features(model, padded, projection), plain)
    bare = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in examples]
    assert torch.equal(tm.collect_features(model, bare, projection), plain)


def test_a_datasets_dataset_is_a_dataset():
    datasets = pytest.importorskip("datasets")
    examples, model, projection = ragged_examples(5), tiny_encoder(), tm.Projection(300)
    dataset = datasets.Dataset.from_list(examples)
    plain = tm.collect_features(model, examples, projection)
    assert torch.equal(tm.collect_features(model, dataset, projection), plain)
    assert torch.equal(tm.collect_features(model, dataset.with_format("torch"), projection), plain)


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("parameters", ["encoder", "attention", "classifier"])
def test_parameters_keep_the_same_signs_whatever_is_selected(kind, parameters):
    """A layer has the same projection in a smaller selection, if it has the same slot."""
    model, examples = tiny_encoder(), ragged_examples(3)
    projection = tm.Projection(900, kind, layers="concatenate")
    with frozen(model):
        everything = Collector(model, projection, "all")
        part = Collector(model, projection, parameters)
        part.slots = everything.slots
        whole, actual = everything.collect(examples), part.collect(examples)
    with_bias = {layer.name: layer.bias for layer in everything.layers}
    same = [layer for layer in part.layers if layer.bias == with_bias[layer.name]]
    kinds = {part.slots[layer.name].kind for layer in same}
    assert kinds & {kind, "sketch"}
    for layer in same:
        slot = part.slots[layer.name]
        columns = slice(slot.offset, slot.offset + slot.k_out * slot.k_in)
        # up to rounding, since the backward pass of a smaller selection may end earlier
        scale = whole[:, columns].abs().max().item()
        torch.testing.assert_close(
            actual[:, columns], whole[:, columns], rtol=1e-4, atol=1e-5 * scale
        )
        assert scale > 0


def test_query_key_and_value_share_the_projection_of_their_input():
    layers = {layer.name: layer for layer in select_layers(tiny_encoder(), "attention")}
    prefix = "roberta.encoder.layer.1.attention.self."
    owners = {layers[prefix + name].input_position for name in ("query", "key", "value")}
    assert owners == {layers[prefix + "query"].position}
    assert len({layers[prefix + name].position for name in ("query", "key", "value")}) == 3


def test_the_classifiers_output_is_kept_exactly():
    model, example = tiny_encoder(), ragged_examples(1)
    features = tm.collect_features(model, example, tm.Projection(4096), "classifier")
    names = ["classifier.out_proj.weight", "classifier.out_proj.bias"]
    gradients = autograd_gradients(model, example[0], names)
    exact = torch.cat([gradients[names[0]], gradients[names[1]][:, None]], dim=1).flatten()
    torch.testing.assert_close(features[0, : len(exact)], exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["accumulate", "concatenate"])
def test_features_under_a_mask_are_those_of_the_model_without_the_heads_columns(layout):
    """For every parameter except those columns, whose gradient is zero under the mask."""
    model, examples = tiny_encoder(), ragged_examples(5)
    projection = tm.Projection(600, layers=layout)
    mask = tm.HeadMask.from_array([[1, 0, 1], [0, 1, 1]])
    actual = tm.collect_features(model, examples, projection, head_mask=mask)
    layers = select_layers(model, "encoder")
    names = [name for layer in layers for name in layer.parameter_names]
    columns = [
        part for part in head_slices(model, mask) if part.name.endswith("output.dense.weight")
    ]
    assert len(columns) == 2
    without = copy.deepcopy(model)
    for part in columns:
        without.get_parameter(part.name).data[part.index] = 0
    for row, example in zip(actual, examples, strict=True):
        gradients = autograd_gradients(without, example, names)
        for part in columns:
            gradients[part.name][part.index] = 0
        expected = projected(layers, projection, gradients)
        assert (row - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_pass_gives_nearly_the_same_scores(dtype):
    model, examples, projection = tiny_encoder(), ragged_examples(12), tm.Projection(1024)
    whole = tm.collect_features(model, examples, projection, "all")
    half = tm.collect_features(model, examples, projection, "all", dtype=dtype)
    assert half.dtype == torch.float32
    assert not torch.equal(whole, half)
    similarity = torch.nn.functional.cosine_similarity(whole, half, dim=1)
    assert similarity.min() > 0.97


@pytest.mark.parametrize(
    ("dtype", "similar"), [(torch.float64, 0.99999), (torch.float16, 0.97), (torch.bfloat16, 0.97)]
)
def test_models_of_other_dtypes_give_nearly_the_same_scores(dtype, similar):
    model, examples, projection = tiny_encoder(), ragged_examples(12), tm.Projection(1024)
    whole = tm.collect_features(model, examples, projection, "all")
    exact = tm.exact_influence(model, examples, examples, normalize="cosine")
    other = model.to(dtype)
    actual = tm.collect_features(other, examples, projection, "all")
    assert actual.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(whole, actual, dim=1).min() > similar
    scores = tm.exact_influence(other, examples, examples, normalize="cosine")
    assert (scores - exact).abs().max() < 2 * (1 - similar)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"dim": 8, "kind": "gauss"}, "kind: expected rademacher or sjlt"),
        ({"dim": 8, "seed": -1}, "seed: expected .*0, got -1"),
        ({"dim": 8, "layers": "stack"}, "layers: expected accumulate or concatenate"),
    ],
)
def test_invalid_projections_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tm.Projection(**arguments)


def test_invalid_rows_and_arguments_are_refused():
    model, good = tiny_encoder(), ragged_examples(1)
    projection = tm.Projection(64)
    with pytest.raises(ValueError, match="row 1: expected labels"):
        tm.collect_features(model, [*good, {"input_ids": [3]}], projection)
    with pytest.raises(ValueError, match="row 0: expected at least one token"):
        tm.collect_features(model, [{"input_ids": [], "labels": 0}], projection)
    with pytest.raises(ValueError, match="dtype: expected None"):
        tm.collect_features(model, good, projection, dtype=torch.float64)
    with pytest.raises(ValueError, match="batch_tokens: expected at least 1"):
        tm.collect_features(model, good, projection, batch_tokens=0)
    with pytest.raises(ValueError, match=r"dim: .*, got 8"):
        tm.collect_features(model, good, tm.Projection(8, layers="concatenate"))
    with pytest.raises(ValueError, match="head mask"):
        tm.collect_features(model, good, projection, head_mask=tm.HeadMask.full(3, 3))
    assert tm.collect_features(model, [], projection).shape == (0, 64)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": 3}, "an integer label from 0 to 2, got 3"),
        ({"labels": -100}, "an integer label from 0 to 2, got -100"),
        ({"labels": 1.0}, "an integer label from 0 to 2, got 1.0"),
        ({"labels": [1]}, r"an integer label from 0 to 2, got \[1\]"),
        ({"input_ids": [5, 61]}, "input_ids from 0 to 60, got 61"),
        ({"input_ids": [5, -1]}, "input_ids from 0 to 60, got -1"),
        ({"input_ids": [5, 7.5]}, "input_ids from 0 to 60, got 7.5"),
        ({"input_ids": [5] * 71, "attention_mask": [1] * 71}, "at most 70 tokens, got 71"),
        ({"attention_mask": [1]}, "attention_mask of 2 tokens as in input_ids, got 1"),
        ({"attention_mask": [1, 1, 1]}, "attention_mask of 2 tokens as in input_ids, got 3"),
        ({"attention_mask": [0, 0]}, "at least one token, got none"),
        ({"token_type_ids": [0, 0]}, "token_type_ids in all rows or in none"),
    ],
)
def test_rows_that_the_model_cannot_take_are_refused(wrong, message):
    model = tiny_encoder()  # 72 positions, the first two of which are padding's
    good = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": 0}
    rows = [good, good | wrong]
    with pytest.raises(ValueError, match=f"^dataset: row 1: expected {message}"):
        tm.collect_features(model, rows, tm.Projection(64))
    with pytest.raises(ValueError, match=r"^query: row 1: expected"):
        tm.exact_influence(model, [good], rows)
    with pytest.raises(ValueError, match=r"^train: row 1: expected"):
        tm.exact_influence(model, rows, [good])


@pytest.mark.parametrize(("family", "longest"), [("bert", 72), ("xlmr", 70), ("distilbert", 72)])
def test_the_longest_text_fits_and_one_token_more_is_refused(family, longest):
    model = tiny_encoder(family)
    texts = [{"input_ids": [5] * length, "labels": 2} for length in (longest, longest + 1)]
    assert tm.collect_features(model, texts[:1], tm.Projection(64)).isfinite().all()
    with pytest.raises(ValueError, match=f"row 1: expected at most {longest} tokens"):
        tm.collect_features(model, texts, tm.Projection(64))


def test_token_types_beyond_the_models_are_refused():
    rows = [{"input_ids": [5, 6], "token_type_ids": [0, kind], "labels": 0} for kind in (1, 2)]
    with pytest.raises(ValueError, match="row 1: expected token_type_ids from 0 to 1, got 2"):
        tm.collect_features(tiny_encoder("bert"), rows, tm.Projection(64))


def test_a_model_with_one_output_takes_numbers():
    model = tiny_encoder(num_labels=1)
    rows = [{"input_ids": [5, 6], "labels": label} for label in (-0.5, 3)]
    assert tm.collect_features(model, rows, tm.Projection(64)).isfinite().all()
    for label in ("a", float("nan"), [0.5]):
        with pytest.raises(ValueError, match="row 2: expected a number as its label"):
            tm.collect_features(model, [*rows, rows[0] | {"labels": label}], tm.Projection(64))


def test_a_class_is_no_label_of_a_model_with_several_labels_per_text():
    model = tiny_encoder(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"row 0: .* 3 numbers .*multi_label_classification"):
        tm.collect_features(model, ragged_examples(1), tm.Projection(64))


def test_a_store_is_the_same_however_often_it_was_interrupted(tmp_path):
    model, examples = tiny_encoder().eval(), ragged_examples(11)
    identity = FeatureRecipe(tm.Projection(200), "encoder", "float32", 30, 64).identity(model="m")

    def collect(name, fail_after):
        done = []

        def advance(count):
            done.append(count)
            if sum(done) > fail_after:
                raise KeyboardInterrupt

        store = tm.FeatureStore.create(
            tmp_path / name,
            ids=[str(row) for row in range(11)],
            dim=200,
            identity=identity,
            shard_rows=4,
        )
        with store:
            collector = Collector(model, tm.Projection(200), batch_tokens=30)
            collect_to_store(collector, examples, store, advance)
        return store

    whole = collect("whole", fail_after=100).read()
    for fail_after in (0, 5, 0, 2):
        with pytest.raises(KeyboardInterrupt):
            collect("parts", fail_after)
    again = collect("parts", fail_after=100)
    assert torch.equal(again.read(), whole)
    names = sorted(path.name for path in (tmp_path / "whole").glob("shard*"))
    assert len(names) == 3
    for name in names:
        bytes_of = [(tmp_path / folder / name).read_bytes() for folder in ("whole", "parts")]
        assert bytes_of[0] == bytes_of[1]


def test_a_failed_write_stops_the_collection(tmp_path, monkeypatch):
    model, examples = tiny_encoder(), ragged_examples(12)
    projection = tm.Projection(200)
    store = tm.FeatureStore.create(
        tmp_path / "store", ids=[str(row) for row in range(12)], dim=200, identity={}, shard_rows=4
    )
    right = store.write_shard

    def full(shard, features):
        if shard == 1:
            raise OSError(28, "No space left on device")
        right(shard, features)

    monkeypatch.setattr(store, "write_shard", full)
    with store, frozen(model), pytest.raises(OSError, match="No space left"):
        collect_to_store(Collector(model, projection), examples, store)
    assert store.missing_shards()[0] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_batch_waits_for_the_gpu(dtype):
    model, examples = tiny_encoder().cuda(), ragged_examples(12)
    mask = tm.HeadMask.from_array([[0, 1, 1], [1, 1, 0]])
    collector = Collector(model, tm.Projection(600), dtype=dtype, head_mask=mask)
    with frozen(model), collector.verified(examples) as model_pass:
        assert model_pass.ready_mask
        collector.collect_verified(examples, model_pass)  # the first use may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            collector.collect_verified(examples, model_pass)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_layers_of_few_tokens_are_sketched_and_err_as_a_sketch():
    """The pooler's and the classifier's gradient, whose factors are alike for all examples."""
    model, examples = tiny_encoder(), ragged_examples(1)
    layers = select_layers(model, "encoder")
    sketched = {layer.name for layer in layers if layer.few_tokens}
    last = "roberta.encoder.layer.1."
    assert sketched == {
        "classifier.dense", "classifier.out_proj", f"{last}attention.self.query",
        f"{last}attention.output.dense", f"{last}intermediate.dense", f"{last}output.dense",
    }  # fmt: skip
    slots = tm.Projection(64).slots(layers)
    whole = {name for name, slot in slots.items() if slot.kind == "sketch" and slot.rows == 0}
    assert whole == sketched
    exact = tm.exact_influence(model, examples, examples, "classifier")[0, 0]
    seeds = 120
    features = torch.cat([
        tm.collect_features(model, examples, tm.Projection(64, seed=seed), "classifier")
        for seed in range(seeds)
    ])  # fmt: skip
    relative = features.square().sum(1) / exact - 1
    assert relative.square().mean().sqrt() < 1.3 * (2 / 64) ** 0.5


def test_features_do_not_depend_on_the_pass():
    """The plain pass computes all positions of the last layer, the lean pass only the first."""
    model, examples = tiny_encoder(), ragged_examples(5)
    projection = tm.Projection(600)
    lean = tm.collect_features(model, examples, projection)
    with frozen(model):
        collector = Collector(model, projection)
        plain = collector.collect_verified(examples, ModelPass())
    torch.testing.assert_close(plain, lean, rtol=1e-4, atol=1e-5 * lean.abs().max().item())


def test_features_of_another_version_are_another_identity():
    identity = FeatureRecipe(tm.Projection(64), "encoder", "float32", 512, 64).identity()
    assert identity["projection"]["version"] == 2


@pytest.mark.parametrize("count", [0, 1, 5, 98, 1000])
def test_shards_are_divided_among_workers(count):
    missing = list(range(3, 3 + count))
    assert divide_shards(missing, 1) == ([tuple(missing)] if count else [])
    for workers in (2, 7):
        tasks = divide_shards(missing, workers)
        assert [shard for task in tasks for shard in task] == missing
        assert all(1 <= len(task) <= SHARDS_PER_TASK for task in tasks)
        assert len(tasks) >= min(count, 4 * workers)
