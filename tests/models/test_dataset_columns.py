"""Columns of a Python dataset: inputs, labels under all their names, and the names of classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import (
    BartConfig,
    LayoutLMConfig,
    LukeConfig,
    PreTrainedModel,
    XLMConfig,
)

import tracmod as tm
from tracmod.models.inputs import as_examples, other_inputs

ROWS = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 0}]
PROJECTION = tm.Projection(64)
SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
SHAPE |= {"intermediate_size": 8}


def _model(**options: Any) -> PreTrainedModel:
    return tiny_model(dtype=torch.float32, layers=1, **options)


def _features(rows: Any, **options: Any) -> torch.Tensor:
    return tm.collect_features(_model(**options), rows, PROJECTION)


class Rows(list):
    """Rows with the features of a `datasets.Dataset`, of which only the names are read."""

    def __init__(self, rows: list[dict[str, Any]], **names: Any) -> None:
        super().__init__(rows)
        self.features = {"input_ids": object()}
        self.features |= {name: SimpleNamespace(names=value) for name, value in names.items()}


# Inputs


@pytest.mark.parametrize(
    ("config", "column"),
    [
        (LayoutLMConfig(**SHAPE), "bbox"),
        (LukeConfig(**SHAPE, entity_vocab_size=9, entity_emb_size=4), "entity_ids"),
        (XLMConfig(emb_dim=8, n_layers=1, n_heads=2, n_words=20), "langs"),
        (
            BartConfig(d_model=8, encoder_layers=1, decoder_layers=1, vocab_size=20,
                       encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_attention_heads=2,
                       decoder_attention_heads=2),
            "decoder_input_ids",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)  # fmt: skip
def test_inputs_that_the_forward_pass_takes_are_refused(config, column):
    model = Classifier.from_config(config)
    assert column in other_inputs(model)
    with pytest.raises(ValueError, match=f"row 1.*got {column}"):
        tm.collect_features(model, [ROWS[0], ROWS[1] | {column: [0, 1]}], PROJECTION)


@pytest.mark.parametrize("column", ["position_ids", "inputs_embeds"])
def test_inputs_of_bert_are_refused(column):
    with pytest.raises(ValueError, match=f"row 0.*got {column}"):
        _features([ROWS[0] | {column: [0, 1, 2]}])
    assert torch.equal(_features([row | {column: None} for row in ROWS]), _features(ROWS))


def test_columns_that_the_forward_pass_does_not_take_are_left_out_as_by_the_trainer():
    rows = [row | {"langs": "en", "bbox": [0], "text": "a", "id": 7} for row in ROWS]
    assert torch.equal(_features(rows), _features(ROWS))


def test_a_wrapper_that_names_no_inputs_has_those_of_all_models():
    wrapper = torch.nn.DataParallel(_model())
    assert {"position_ids", "langs", "entity_ids"} <= other_inputs(wrapper)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("input_ids", [[5, 6, 7]], "one list of input_ids"),
        ("input_ids", torch.tensor([[5, 6, 7]]), "one list of input_ids"),
        ("input_ids", 5, "a list of input_ids, got int"),
        ("input_ids", "567", "a list of input_ids, got str"),
        ("input_ids", [True, 6, 7], "got True"),
        ("input_ids", [5.0, 6.0, 7.0], r"got 5\.0"),
        ("attention_mask", [1, 0.5, 1], r"attention_mask of 0 and 1, got 0\.5"),
        ("attention_mask", [1, 2, 1], "attention_mask of 0 and 1, got 2"),
        ("attention_mask", [1, float("nan"), 1], "attention_mask of 0 and 1, got nan"),
    ],
)
def test_token_columns_of_another_kind_are_refused(column, value, named):
    with pytest.raises(ValueError, match=f"row 0: expected .*{named}"):
        _features([ROWS[0] | {column: value}])


@pytest.mark.parametrize("convert", [torch.tensor, np.array, tuple, list])
def test_lists_arrays_and_tensors_are_the_same(convert):
    rows = [
        {"input_ids": convert(row["input_ids"]), "attention_mask": convert([True] * n)}
        for row, n in zip(ROWS, (3, 2), strict=True)
    ]
    labels = (np.int64(1), torch.tensor(0))
    rows = [row | {"labels": label} for row, label in zip(rows, labels, strict=True)]
    assert torch.equal(_features(rows), _features(ROWS))


# Labels


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_a_label_may_have_the_names_that_data_collators_take(name):
    rows = [{"input_ids": row["input_ids"], name: row["labels"]} for row in ROWS]
    assert torch.equal(_features(rows), _features(ROWS))
    both = [row | {name: np.int32(row["labels"])} for row in ROWS]
    assert torch.equal(_features(both), _features(ROWS))
    in_words = [row | {name: "positive"} for row in ROWS]
    assert torch.equal(_features(in_words), _features(ROWS))


def test_two_labels_that_differ_are_refused():
    with pytest.raises(ValueError, match="row 1: expected one label, got labels 0 and label 2"):
        _features([ROWS[0], ROWS[1] | {"label": 2}])


@pytest.mark.parametrize(
    ("label", "named"),
    [
        (-1, "-1, the usual mark of examples without a label"),
        (-100, "-100, the usual mark of examples that a loss leaves out"),
        (1.0, r"1\.0 \(transformers takes float labels"),
        (np.float32(1), r"1\.0 \(transformers"),
        (True, "True"),
        (np.bool_(True), "True"),
        (3, "3"),
        (2**70, str(2**70)),
        (float("nan"), "nan"),
        ("1", "'1'"),
    ],
)
def test_labels_that_are_no_class_are_named(label, named):
    with pytest.raises(ValueError, match=f"row 1: expected .*got {named}"):
        _features([ROWS[0], ROWS[1] | {"labels": label}])


def test_minus_one_is_a_target_of_a_model_with_one_output():
    rows = [ROWS[0] | {"labels": -1.0}, ROWS[1] | {"labels": -100}]
    assert _features(rows, num_labels=1).isfinite().all()


def _named_model(*names: str) -> PreTrainedModel:
    model = _model(num_labels=len(names))
    model.config.id2label = dict(enumerate(names))
    return model


@pytest.mark.parametrize("column", ["labels", "label"])
def test_a_dataset_that_numbers_the_classes_of_the_model_otherwise_is_refused(column):
    rows = [{"input_ids": row["input_ids"], column: row["labels"]} for row in ROWS]
    model = _named_model("NEGATIVE", "POSITIVE")
    swapped = Rows(rows, **{column: ["positive", "negative"]})
    with pytest.raises(ValueError, match=f"{column}: expected positive to be class 1 .* class 0"):
        tm.collect_features(model, swapped, PROJECTION)
    with pytest.raises(ValueError, match=r"query: .*positive"):
        tm.exact_influence(model, rows, swapped)


@pytest.mark.parametrize(
    ("stated", "own"),
    [
        (["neg", "pos"], ["NEG", "POS"]),
        (["negative", "positive"], ["LABEL_0", "LABEL_1"]),
        (["bad", "good"], ["neg", "pos"]),
        (["0", "1"], ["1", "2"]),  # numbers are no names
    ],
)
def test_names_of_classes_that_do_not_contradict_the_model_are_accepted(stated, own):
    model = _named_model(*own)
    expected = tm.collect_features(model, ROWS, PROJECTION)
    assert torch.equal(tm.collect_features(model, Rows(ROWS, labels=stated), PROJECTION), expected)


def test_class_labels_of_datasets_are_read():
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int64")),
            "label": datasets.ClassLabel(names=["pos", "neg"]),
        }
    )
    columns = {"input_ids": [[5, 6], [7, 8, 9]], "label": [0, 1]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    with pytest.raises(ValueError, match="expected pos to be class 1"):
        tm.collect_features(_named_model("neg", "pos"), dataset, PROJECTION)
    model = _named_model("pos", "neg")
    for rows in (dataset, dataset.with_format("torch"), dataset.with_format("numpy")):
        assert [row["labels"] for row in as_examples(rows, model=model)] == [0, 1]
