"""Small classifiers of every supported family and form, built from configs with random weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from tracmod.models.architecture import MEAN_POOLING
from tracmod.models.loading import classifier_class

VOCABULARY, LABELS, PAD = 61, 3, 1


class Form(NamedTuple):
    """One form of a family: a `model_type`, and what its config states.

    Attributes:
        model_type: as in config.json.
        settings: what differs from `SHAPE`.
        family: heading of the form's row in docs/models.md.
        models: well-known models of this form.
        lean: whether the last layer is computed at the first position alone.
        pruned: whether heads can be taken out of the tensors.
    """

    model_type: str
    settings: dict[str, Any]
    family: str
    models: str
    lean: bool = True
    pruned: bool = True


# Forms that the fast tests cover: each differs from BERT in another way. The others are slow tests.
FAST = (
    "bert-mean",
    "deberta-v3",
    "modernbert",
    "modernbert-mean",
    "eurobert",
    "mpnet",
    "albert",
    "qwen3",
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 72,
    "num_labels": LABELS,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DEBERTA = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
    "pooler_hidden_size": 24,
    "max_relative_positions": 64,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
}
MODERN = {
    "classifier_pooling": "cls",
    "num_hidden_layers": 3,
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
FORMS = {
    "bert": Form("bert", {}, "BERT", "BERT, mBERT, LaBSE"),
    "bert-mean": Form(
        "bert",
        {"architectures": [MEAN_POOLING]},
        "BERT with `pooling: mean`",
        "multilingual-e5-small",
        lean=False,
    ),
    "roberta": Form("roberta", {}, "RoBERTa", "RoBERTa, CamemBERT"),
    "xlm-roberta": Form("xlm-roberta", {}, "XLM-R", "XLM-R, multilingual-e5, BGE-M3"),
    "electra": Form("electra", {"embedding_size": 12}, "ELECTRA", "ELECTRA"),
    "distilbert": Form(
        "distilbert",
        {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40},
        "DistilBERT",
        "DistilBERT, DistilmBERT",
    ),
    "deberta-v3": Form(
        "deberta-v2",
        DEBERTA | {"share_att_key": True},
        "DeBERTa-v3",
        "mDeBERTa-v3, DeBERTa-v3",
    ),
    "deberta-v2": Form(
        "deberta-v2",
        DEBERTA | {"share_att_key": False, "position_buckets": -1, "type_vocab_size": 2},
        "DeBERTa-v2",
        "DeBERTa-v2 without a convolution",
    ),
    "modernbert": Form(
        "modernbert",
        MODERN,
        "ModernBERT, first token",
        "ModernBERT with `classifier_pooling: cls`",
    ),
    "modernbert-mean": Form(
        "modernbert",
        MODERN | {"classifier_pooling": "mean", "norm_bias": True, "attention_bias": True},
        "ModernBERT, mean",
        "mmBERT, ModernBERT",
        lean=False,
    ),
    "eurobert": Form(
        "eurobert",
        GROUPED | {"classifier_pooling": "bos"},
        "EuroBERT, first token",
        "EuroBERT with `classifier_pooling: bos`",
        pruned=False,
    ),
    "eurobert-late": Form(
        "eurobert",
        {"classifier_pooling": "late"},
        "EuroBERT, mean of logits",
        "EuroBERT",
        lean=False,
    ),
    "nomic": Form("nomic_bert", {}, "Nomic BERT", "Nomic BERT"),
    "jina": Form("jina_embeddings_v3", {}, "Jina v3", "Jina embeddings v3"),
    "xmod": Form(
        "xmod",
        {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
        "X-MOD",
        "X-MOD",
        lean=False,
    ),
    "mpnet": Form("mpnet", {}, "MPNet", "MPNet, paraphrase-multilingual-mpnet", pruned=False),
    "albert": Form("albert", {"embedding_size": 12}, "ALBERT", "ALBERT", lean=False),
    "llama": Form("llama", GROUPED, "Llama", "Llama 3", lean=False, pruned=False),
    "mistral": Form("mistral", GROUPED, "Mistral", "Mistral", lean=False, pruned=False),
    "qwen2": Form("qwen2", GROUPED, "Qwen2", "Qwen2.5", lean=False, pruned=False),
    "qwen3": Form("qwen3", GROUPED, "Qwen3", "Qwen3", lean=False, pruned=False),
    "gemma3": Form("gemma3_text", GROUPED, "Gemma 3", "Gemma 3 (text)", lean=False, pruned=False),
}


def small_model(
    form: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    auto_class: Any = None,
    **settings: Any,
) -> PreTrainedModel:
    """Build a classifier of a form with random weights, biases and norms too; no dropout."""
    shape = SHAPE | FORMS[form].settings | settings
    config = AutoConfig.for_model(FORMS[form].model_type, **shape)
    attention = shape.get("attn_implementation")
    torch.manual_seed(seed)
    auto_class = auto_class or classifier_class(config, "text")
    model = auto_class.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def has_tokens(form: str) -> bool:
    """Return whether transformers has a token classifier of a form."""
    if "architectures" in FORMS[form].settings:  # a classifier of texts
        return False
    config = AutoConfig.for_model(FORMS[form].model_type)
    return type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING


def answers(form: str) -> bool:
    """Return whether transformers has a model for question answering of a form."""
    if "architectures" in FORMS[form].settings:  # a classifier of texts
        return False
    config = AutoConfig.for_model(FORMS[form].model_type)
    return type(config) in MODEL_FOR_QUESTION_ANSWERING_MAPPING


def small_tagger(form: str, **settings: Any) -> PreTrainedModel:
    """Build a token classifier of a form, as `small_model` does."""
    return small_model(form, auto_class=AutoModelForTokenClassification, **settings)


def tagged_examples(count: int, seed: int = 0, padding: str = "none") -> list[dict[str, Any]]:
    """Make the examples of `mixed_examples` with labels of tokens, about a third of them -100."""
    generator = torch.Generator().manual_seed(seed + 100)
    examples = mixed_examples(count, seed, padding)
    for example in examples:
        tokens = len(example["input_ids"])
        labels = torch.randint(-1, LABELS, (tokens,), generator=generator)
        mask = torch.tensor(example["attention_mask"])
        labels[(labels < 0) | (mask == 0)] = -100
        if bool((labels == -100).all()):
            labels[int(mask.argmax())] = 0
        example["labels"] = labels.tolist()
    return examples


def mixed_examples(count: int, seed: int = 0, padding: str = "none") -> list[dict[str, Any]]:
    """Make examples of 1 to 20 tokens; some of them padded on the left or right if it says so."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(count):
        length = 1 + (row * 7 + seed) % 20
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        mask, extra = [1] * length, row % 3
        if padding == "left":
            ids, mask = [PAD] * extra + ids, [0] * extra + mask
        elif padding == "right":
            ids, mask = ids + [PAD] * extra, mask + [0] * extra
        label = int(torch.randint(LABELS, (1,), generator=generator))
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": label})
    return examples
