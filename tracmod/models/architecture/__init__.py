"""The model families, and where a model keeps its attention layers, embeddings and positions."""

from __future__ import annotations

from typing import Any

from torch import nn

from tracmod.models.architecture.albert import Albert
from tracmod.models.architecture.deberta import Deberta
from tracmod.models.architecture.distilbert import DistilBert
from tracmod.models.architecture.family import AttentionLayer, Family
from tracmod.models.architecture.modernbert import ModernBert
from tracmod.models.architecture.mpnet import MPNet
from tracmod.models.architecture.rotary import Decoder, EuroBert, NomicBert

BERT, DISTILBERT = Family(), DistilBert()
# Those that their configs name. A model of another type may still be built like BERT or DistilBERT.
FAMILIES: tuple[Family, ...] = (
    BERT,
    DISTILBERT,
    Deberta(),
    ModernBert(),
    EuroBert(),
    NomicBert(),
    MPNet(),
    Albert(),
    Decoder(),
)


def family_of(model: nn.Module) -> Family:
    """Return the family of a model: that of its `model_type`, or the one it is built like."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    is_distilbert = any(DISTILBERT.attention(module) for module in model.modules())
    return DISTILBERT if is_distilbert else BERT


def is_token_classifier(model: Any) -> bool:
    """Return whether a model classifies tokens, by the name that transformers gives such a class.

    A subclass of one, and PEFT's wrapper around one, are token classifiers, too.
    """
    return any(kind.__name__.endswith("ForTokenClassification") for kind in type(model).__mro__)


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Return the self-attention layers of a model, first layer first.

    A layer that a model uses several times (ALBERT) is one layer.

    Raises:
        ValueError: the model is of no family that is supported.
    """
    family = family_of(model)
    layers = [layer for module in model.modules() if (layer := family.attention(module))]
    if not layers:
        raise ValueError(
            f"{type(model).__name__}: {_expected(model)}, found no attention layers with query, "
            f"key, value and output projections"
        )
    return layers


def embeddings_module(model: nn.Module) -> nn.Module:
    """Return the module that turns token ids into the encoder's first hidden states.

    Raises:
        ValueError: the model is of no family that is supported.
    """
    embeddings = family_of(model).embeddings(model)
    if embeddings is None:
        raise ValueError(
            f"{type(model).__name__}: {_expected(model)}, found no embeddings module with "
            f"word_embeddings"
        )
    return embeddings


def lower_layers(model: nn.Module, upper: int) -> list[nn.Module]:
    """Return the layers below the `upper` highest ones, first layer first.

    Raises:
        ValueError: the model has fewer layers, or uses one of them several times.
    """
    attention = attention_layers(model)
    if upper > len(attention):
        raise ValueError(
            f"train_layers: expected at most the model's {len(attention)} layers, got {upper}"
        )
    family = family_of(model)
    layers = [family.layer_around(model, layer) for layer in attention]
    calls = getattr(getattr(model, "config", None), "num_hidden_layers", len(layers))
    found = [layer for layer in layers if layer is not None]
    if len(found) != calls:
        raise ValueError(
            f"train_layers: expected a model with {calls} layers of their own, got one that is "
            f"built otherwise: {type(model).__name__}"
        )
    return found[: len(found) - upper]


def word_embeddings(model: nn.Module) -> nn.Embedding:
    """Return the table of words, whose rows are the ids that the model takes."""
    return family_of(model).word_embeddings(embeddings_module(model))


def max_positions(model: nn.Module) -> float:
    """Return the length of the longest input that the model's positions allow, in tokens.

    Returns:
        An int, or infinity for a model without a table of positions.
    """
    return family_of(model).max_positions(embeddings_module(model))


def _expected(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    names = ", ".join(family.name for family in FAMILIES[1:])
    stated = getattr(config, "model_type", "")
    return (
        f"expected a model of the BERT family or one of {names}, got "
        f"{f'model_type {stated!r}' if stated else 'another model'}"
    )
