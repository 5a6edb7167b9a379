"""Tiny encoders and ragged examples that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

VOCABULARY, LABELS = 61, 3
FAMILIES = ("bert", "roberta", "xlmr")


def tiny_encoder(family: str = "xlmr", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Make an encoder of two layers with three heads; all weights are random, biases too."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 72,
        "num_labels": LABELS,
    } | overrides
    torch.manual_seed(seed)
    if family == "distilbert":
        names = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}
        common = {k: shape[k] for k in ("vocab_size", "max_position_embeddings", "num_labels")}
        model = DistilBertForSequenceClassification(DistilBertConfig(**names, **common))
    else:
        config_class, model_class = {
            "bert": (BertConfig, BertForSequenceClassification),
            "roberta": (RobertaConfig, RobertaForSequenceClassification),
            "xlmr": (XLMRobertaConfig, XLMRobertaForSequenceClassification),
        }[family]
        if family != "bert":
            shape |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        model = model_class(config_class(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ragged_examples(count: int, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    """Make examples of all lengths from 1 to `longest`, with ids from 3, without padding."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(count):
        length = 1 + (row * 7) % longest
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        label = int(torch.randint(LABELS, (1,), generator=generator))
        examples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": label})
    return examples
