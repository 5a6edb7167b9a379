"""The model families, and where a model keeps its attention layers, embeddings and positions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from tracmod.choices import Unit
from tracmod.models.architecture.albert import Albert
from tracmod.models.architecture.deberta import Deberta
from tracmod.models.architecture.distilbert import DistilBert
from tracmod.models.architecture.family import AttentionLayer, Family
from tracmod.models.architecture.modernbert import ModernBert
from tracmod.models.architecture.mpnet import MPNet
from tracmod.models.architecture.rotary import Decoder, EuroBert, NomicBert

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The class of `tracmod.models.mean_pooling`, as config.json names it.
MEAN_POOLING = "MeanPoolingForSequenceClassification"

# Modules of base models that follow all layers: poolers, and norms of models that normalize first.
AFTER_LAYERS = {"pooler", "final_norm", "norm", "encoder.ln"}

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


def unit_of(class_names: Iterable[str]) -> Unit:
    """Return what models of a class say something of, by the names that transformers gives classes.

    A model for question answering scores every token as the first and as the last of the answer, a
    span.

    Args:
        class_names: the class and its bases, or the `architectures` of a config.
    """
    for name in class_names:
        if name.endswith("ForTokenClassification"):
            return "token"
        if name.endswith("ForQuestionAnswering"):
            return "span"
    return "text"


def model_unit(model: Any) -> Unit:
    """Return what a model says something of, also if PEFT or a subclass wraps it."""
    return unit_of(kind.__name__ for kind in type(model).__mro__)


def is_token_classifier(model: Any) -> bool:
    """Return whether a model classifies tokens."""
    return model_unit(model) == "token"


def answers_questions(model: Any) -> bool:
    """Return whether a model finds the span of a text that answers a question."""
    return model_unit(model) == "span"


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


def parameters_below(model: PreTrainedModel, upper: int) -> set[nn.Parameter]:
    """Return the parameters of the base model that come before its `upper` highest layers.

    These are the embeddings, the layers below, and what all layers share, such as a table of
    relative positions. What comes after the layers (AFTER_LAYERS) is not among them.

    Raises:
        ValueError: the model has fewer layers, or uses one of them several times.
    """
    attention, family = attention_layers(model), family_of(model)
    calls = getattr(model.config, "num_hidden_layers", len(attention))
    layers = [layer for own in attention if (layer := family.layer_around(model, own))]
    if len(layers) != calls:
        raise ValueError(
            f"train_layers: expected a model whose layers have weights of their own, got "
            f"{type(model).__name__} with {len(attention)} for {calls} layers"
        )
    if upper > calls:
        raise ValueError(f"train_layers: expected at most the model's {calls} layers, got {upper}")
    above = {p for layer in layers[calls - upper :] for p in layer.parameters()}
    for name, module in model.base_model.named_modules():
        if name in AFTER_LAYERS:
            above.update(module.parameters())
    return set(model.base_model.parameters()) - above


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
