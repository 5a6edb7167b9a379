"""Small models, tokenizers and examples for the tests of models, subnetworks and training."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    XLMRobertaConfig,
)

from tracmod.models.tokenizer import train_tokenizer

VOCABULARY = 160
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
SENTENCES = (
    "the cat sits on the mat",
    "a dog runs in the green park",
    "der Hund läuft schnell durch den Park",
    "die Katze sitzt auf der Matte",
    "el gato duerme en la casa",
    "猫坐在垫子上",
    "собака бежит по парку",
)


def tiny_model(
    family: str = "bert",
    *,
    layers: int = 2,
    hidden: int = 24,
    heads: int = 4,
    num_labels: int = 3,
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scale: float = 4.0,
    vocabulary: int = VOCABULARY,
) -> PreTrainedModel:
    """Build a random classifier in evaluation mode.

    `scale` multiplies its matrices: with transformers' small initial weights, attention is almost
    uniform and heads hardly matter.
    """
    shape: dict[str, Any] = {"vocab_size": vocabulary, "num_labels": num_labels}
    if family == "distilbert":
        shape |= {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": 2 * hidden}
        shape |= {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
        shape |= {"max_position_embeddings": 40}
    else:
        shape |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        shape |= {"intermediate_size": 2 * hidden, "max_position_embeddings": 40}
        shape |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if family == "electra":
        shape |= {"embedding_size": hidden // 2}  # ELECTRA then has embeddings_project
    if family in ("roberta", "xlm-roberta"):
        shape |= {"pad_token_id": 1, "type_vocab_size": 1}
    configs = {
        "bert": BertConfig,
        "roberta": RobertaConfig,
        "xlm-roberta": XLMRobertaConfig,
        "electra": ElectraConfig,
        "distilbert": DistilBertConfig,
    }
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(configs[family](**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name and parameter.ndim == 2:
                parameter.mul_(scale)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.to(dtype).eval()


def tiny_examples(
    count: int, *, num_labels: int = 3, longest: int = 12, seed: int = 0
) -> list[dict[str, Any]]:
    """Return encoded examples of random ids with 3 to `longest` tokens."""
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        ids = [draw.randrange(4, VOCABULARY) for _ in range(draw.randint(3, longest))]
        examples.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": draw.randrange(num_labels),
            }
        )
    return examples


def tiny_tokenizer(max_length: int = 32) -> PreTrainedTokenizerBase:
    """Train a tokenizer on SENTENCES."""
    return train_tokenizer(SENTENCES * 10, 300, max_length)


def table(rows: list[tuple[str, str, str | None, int]]) -> pa.Table:
    """Build an example table from rows of (id, text_a, text_b, label), all in language `en`."""
    ids, first, second, labels = zip(*rows, strict=True)
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "language": pa.array(["en"] * len(ids), pa.string()),
            "text_a": pa.array(first, pa.string()),
            "text_b": pa.array(second, pa.string()),
            "label": pa.array(labels, pa.int64()),
            "group": pa.array([None] * len(ids), pa.string()),
        }
    )
