"""Sequence classifiers of the BERT family: made, loaded, taken apart, fed and identified.

Shape suffixes: B examples of a batch, S tokens, N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)
from transformers.utils import logging

from tracmod.models.architecture import attention_layers, embeddings_module

_TOKENIZER_FILES = (
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
# --- making and loading ---------------------------------------------------------------------


def create_model(
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    intermediate: int | None = None,
    dropout: float = 0.1,
    max_length: int = 128,
    seed: int = 0,
) -> PreTrainedModel:
    """Build a new XLM-R classifier (float32, eval mode), its weights a function of `seed` alone.

    Args:
        tokenizer: gives the vocabulary's size and the special ids.
        label_names: one per class, in the order of the labels 0, 1, ...
        layers: encoder layers.
        hidden: width; a multiple of `heads`.
        heads: attention heads per layer.
        intermediate: width of the feed-forward layer; None is 4 x hidden.
        dropout: of hidden states and attention.
        max_length: tokens the model takes.
        seed: of the weights; the global generator is left as it was.
    """
    if hidden % heads:
        raise ValueError(f"hidden must be a multiple of heads, got hidden {hidden}, heads {heads}")
    pad_id = _pad_id(tokenizer)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate or 4 * hidden,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        # XLM-R counts positions from pad_id + 1 on.
        max_position_embeddings=max_length + pad_id + 1,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **_label_config(label_names),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XLMRobertaForSequenceClassification(config)
    return model.float().eval()


def load_model(
    source: str | Path, label_names: Sequence[str] | None = None, *, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier and its tokenizer from a transformers folder or the Hub.

    Only safetensors weights are read and no code from the folder is run.

    Args:
        source: folder or Hub name.
        label_names: the task's classes. With them a model without a classifier (`xlm-roberta-base`)
            gets a new one; without them that is an error.
        seed: of the new classifier's weights.

    Returns:
        The model (float32, eval mode, CPU) and the tokenizer, whose `model_max_length` is the
        `max_tokens` of the two.

    Raises:
        ValueError: no such folder or Hub name, no tokenizer, no (or another) classifier, or an
            architecture whose attention heads `attention_layers` does not find.
    """
    name, folder = str(source), Path(source)
    check_source(source)
    if folder.is_dir() and not has_tokenizer(folder):
        raise ValueError(
            f"model {name}: no tokenizer in the folder, expected one of "
            + ", ".join(_TOKENIZER_FILES)
        )
    model = load_classifier(source, label_names, seed=seed)
    with quiet_transformers():
        tokenizer = _load_tokenizer(name)
    embeddings: Any = embeddings_module(model)
    rows = embeddings.word_embeddings.num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"model {name}: its tokenizer has {len(tokenizer)} ids, its embeddings only {rows} rows"
        )
    tokenizer.model_max_length = max_tokens(model, tokenizer)
    return model, tokenizer


def load_classifier(
    source: str | Path, label_names: Sequence[str] | None = None, *, seed: int = 0
) -> PreTrainedModel:
    """The model of `load_model`, from a folder that need not have a tokenizer."""
    name = str(source)
    check_source(source)
    with quiet_transformers():
        model, info = _load_weights(name, label_names, seed)
    _check_weights(name, model, info, label_names)
    attention_layers(model)
    return model.float().eval()


def has_tokenizer(folder: Path) -> bool:
    """Whether a transformers folder has a tokenizer in it."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The longest input that both take: the tokenizer's limit, if it states one, and the positions.

    RoBERTa and XLM-R count positions from the padding id + 1 on, and so take that many fewer.
    """
    positions: Any = getattr(embeddings_module(model), "position_embeddings", None)
    if positions is None:
        return int(tokenizer.model_max_length)
    unused = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return min(int(tokenizer.model_max_length), positions.num_embeddings - unused)


def class_names(model: PreTrainedModel) -> list[str]:
    """The model's classes in the order of the labels 0, 1, ..."""
    return names_in_order(model.config)


def names_in_order(config: Any) -> list[str]:
    return [config.id2label[label] for label in sorted(config.id2label)]


def check_source(source: str | Path) -> None:
    name, folder = str(source), Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {name}: expected a transformers folder, found no config.json")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model {name}: no such folder")
    else:
        _check_hub(name)


def _check_hub(name: str) -> None:
    """Ask the Hub for the model once: transformers goes on asking for 20 s without a network."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:
        pass  # the Hub has answered: transformers says in better words what is wrong
    except Exception as error:  # huggingface_hub's own, or any of its HTTP library
        raise ValueError(
            f"model {name}: no such folder, and it cannot be had from the Hub: {first_line(error)}"
        ) from None


def _label_config(label_names: Sequence[str]) -> dict[str, Any]:
    # num_labels goes first: setting it resets the names.
    return {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: index for index, label in enumerate(label_names)},
    }


def _load_weights(
    name: str, label_names: Sequence[str] | None, seed: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        own_names = names_in_order(config)
        if label_names is not None:
            for key, value in _label_config(label_names).items():
                setattr(config, key, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by _check_weights in our words
            )
    except OSError as error:
        where = "in the folder" if Path(name).is_dir() else "from the Hub"
        raise ValueError(f"model {name}: cannot be had {where}: {first_line(error)}") from None
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"model {name}: not a sequence classifier of transformers: {first_line(error)}"
        ) from None
    if label_names is not None:
        _check_label_names(name, own_names, label_names)
    return model, info


def _check_label_names(name: str, own: list[str], label_names: Sequence[str]) -> None:
    """A trained classifier's named classes must be the task's; LABEL_0, ... says nothing."""
    named = not all(label.startswith("LABEL_") for label in own)
    if named and [label.lower() for label in own] != [label.lower() for label in label_names]:
        raise ValueError(f"model {name}: expected the classes {list(label_names)}, it has {own}")


def _check_weights(
    name: str, model: PreTrainedModel, info: dict[str, Any], label_names: Sequence[str] | None
) -> None:
    for key, got, expected in info["mismatched_keys"]:
        raise ValueError(
            f"model {name}: expected {key} of shape {tuple(expected)}, got {tuple(got)}"
        )
    missing = sorted(info["missing_keys"])
    body = f"{model.base_model_prefix}."
    lost = [key for key in missing if key.startswith(body) and ".pooler." not in key]
    if lost:
        raise ValueError(f"model {name}: weights are missing from the folder, first {lost[0]}")
    if missing and label_names is None:
        raise ValueError(f"model {name}: not a sequence classifier, it has no {missing[0]}")


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises anything here, from KeyError to ImportError
        raise ValueError(f"model {name}: cannot load its tokenizer: {first_line(error)}") from None
    _pad_id(tokenizer)
    return tokenizer


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path}: expected a padding token, got none")
    return int(tokenizer.pad_token_id)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' progress bars and its report of what it did not find."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# --- checkpoints ----------------------------------------------------------------------------


# --- parts of a model -----------------------------------------------------------------------


# --- examples, batches, loss ----------------------------------------------------------------


# --- identity -------------------------------------------------------------------------------
