"""Save a subnetwork as a model of its own: masked heads zeroed, or taken out of the tensors.

Both forms have the logits of the masked model:

- `save_masked` writes a plain transformers folder with tensors of the same shapes, in which all
  that belongs to a masked head is zero. Anything that loads transformers models loads it. It is not
  faster, and smaller only once compressed.
- `save_pruned` takes the masked heads' rows of query, key and value and columns of the attention
  output projection out of the file, and so out of the matrix products. `load_pruned` reads it.

`from_pretrained` cannot read the second form. A transformers 5 config has one `num_attention_heads`
for all layers, and derives the width of a head as hidden size over heads; `prune_heads` and the
config's `pruned_heads` are gone, and BERT-family layers do not read `per_layer_config`. Code within
the folder could do it, but then every user would have to set `trust_remote_code`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tracmod.choices import Unit
from tracmod.models.adapters import check_no_adapters
from tracmod.models.architecture import AttentionLayer, model_unit
from tracmod.models.loading import classifier_class, quiet_transformers, stated_unit
from tracmod.models.modes import to_device
from tracmod.models.probe import same_logits
from tracmod.subnetworks.head_mask import (
    HeadMask,
    head_parameters,
    head_slices,
    kept_columns,
    matching_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Not model.safetensors, so that from_pretrained does not read the narrow tensors as a whole model.
WEIGHTS_FILE = "pruned.safetensors"
MASK_FILE = "head_mask.json"


def save_masked(
    model: PreTrainedModel,
    mask: HeadMask,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Write a transformers folder with the same shapes and the masked heads' parameters zero.

    `AutoModelForSequenceClassification.from_pretrained(folder)` gives the logits of `model` under
    `mask.apply` bit for bit: the same products, with zeros in the same positions.

    Args:
        model: a sequence classifier; not changed.
        mask: heads to keep.
        folder: folder to write, created if it does not exist.
        tokenizer: saved in the same folder if given.
        made_from: further entries of head_mask.json, which is written beside the model, such as
            the language.

    Raises:
        ValueError: the mask does not fit the model, or the model has adapters.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> import tracmod as tm
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=4,
        ... )
        >>> model = BertForSequenceClassification(config).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tm.save_masked(model, tm.HeadMask([[0, 1, 1, 1]]), folder)
        ...     saved = BertForSequenceClassification.from_pretrained(folder)
        >>> saved.bert.encoder.layer[0].attention.self.query.weight[:4].any().item()
        False
    """
    check_no_adapters(model)
    folder = Path(folder)
    state, masked_slices = dict(model.state_dict()), head_slices(model, mask)
    state |= {name: state[name].clone() for name in {part.name for part in masked_slices}}
    for part in masked_slices:
        state[part.name][part.index] = 0
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
    _save_mask_and_tokenizer(folder, mask, tokenizer, made_from)


def save_pruned(
    model: PreTrainedModel,
    mask: HeadMask,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Write the model without its masked heads: fewer bytes and fewer operations.

    The folder gets pruned.safetensors, config.json (the whole model's) and head_mask.json. Every
    masked head saves `4 * hidden * head_dim + 3 * head_dim` numbers, except that a layer without
    any head keeps one of zeros, because attention needs a head: its output is the projection's
    bias, as under the mask.

    Args:
        model, mask, folder, tokenizer, made_from: as in `save_masked`.

    Raises:
        ValueError: the mask does not fit the model, several of its heads share keys and values, the
            model has adapters, or without its masked heads it does not compute the logits of the
            masked model.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> import tracmod as tm
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=4,
        ... )
        >>> model = BertForSequenceClassification(config).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tm.save_pruned(model, tm.HeadMask([[0, 1, 1, 0]]), folder)
        ...     pruned = tm.load_pruned(folder)
        >>> model.num_parameters() - pruned.num_parameters()  # 2 heads of 4 * 16 * 4 + 3 * 4
        536
    """
    check_no_adapters(model)
    folder = Path(folder)
    if any(layer.is_grouped for layer in matching_layers(model, mask)):
        raise ValueError(
            f"{type(model).__name__}: expected heads with keys and values of their own, got heads "
            f"that share them, which cannot be taken out one by one; use the form with zeros"
        )
    state = _without_heads(model, mask)
    pruned = _narrow_model(model.config, mask, model_unit(model))
    pruned.load_state_dict(state, assign=True)
    # An architecture may count on all of its heads in a way that the tensors do not show. It is
    # better found now, on a few tokens, than by a user of the folder.
    with mask.apply(model):
        same = same_logits(to_device(pruned, model.device).eval(), model)
    if not same:
        raise ValueError(
            f"{type(model).__name__}: expected the logits of the masked model without its masked "
            f"heads, got others; use the form with zeros"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    save_file(state, folder / WEIGHTS_FILE, {"format": "pt"})
    _save_mask_and_tokenizer(folder, mask, tokenizer, made_from)


def load_pruned(folder: str | Path) -> PreTrainedModel:
    """Load a model that `save_pruned` wrote.

    Args:
        folder: the folder written.

    Returns:
        The classifier, in evaluation mode on the CPU, in the dtype in which it was saved. Its
        layers have as many heads as they keep (one of zeros if they keep none), so that a head mask
        of the whole model no longer fits it.

    Raises:
        ValueError: the folder does not exist, or its files do not match each other.

    Examples:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> import tracmod as tm
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=4,
        ... )
        >>> model = BertForSequenceClassification(config).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tm.save_pruned(model, tm.HeadMask([[0, 1, 1, 0]]), folder)
        ...     pruned = tm.load_pruned(folder)
        >>> pruned.bert.encoder.layer[0].attention.self.num_attention_heads
        2
    """
    from transformers import AutoConfig

    folder = Path(folder)
    for name in ("config.json", WEIGHTS_FILE, MASK_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: expected a model that save_pruned wrote, found no {name}")
    mask = HeadMask.load(folder / MASK_FILE)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = _narrow_model(config, mask, stated_unit(config))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE), assign=True)
    except (RuntimeError, SafetensorError) as error:
        last_line = str(error).splitlines()[-1].strip()  # torch lists keys after a heading
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: expected the weights that {MASK_FILE} keeps: {last_line}"
        ) from None
    return model.eval()


def _save_mask_and_tokenizer(
    folder: Path,
    mask: HeadMask,
    tokenizer: PreTrainedTokenizerBase | None,
    made_from: Mapping[str, Any] | None,
) -> None:
    mask.save(folder / MASK_FILE, **(made_from or {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _without_heads(model: PreTrainedModel, mask: HeadMask) -> dict[str, Tensor]:
    """Return the model's state dict, narrowed to the heads that the mask keeps."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer, kept_H in zip(matching_layers(model, mask), mask.array, strict=True):
        for parameter, axis, starts in head_parameters(layer):
            columns = kept_columns(layer, torch.from_numpy(kept_H.copy()), starts)
            narrow = parameter.detach().index_select(axis, columns)
            state[names[id(parameter)]] = narrow if kept_H.any() else torch.zeros_like(narrow)
    return state


def _narrow_model(config: Any, mask: HeadMask, unit: Unit) -> PreTrainedModel:
    """Create a classifier with the shapes that the mask leaves; its weights are still random."""
    auto_class = classifier_class(config, unit)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        model = auto_class.from_config(config, trust_remote_code=False)
    for layer, kept_H in zip(matching_layers(model, mask), mask.array, strict=True):
        _narrow_layer(layer, torch.from_numpy(kept_H.copy()))
    return model


def _narrow_layer(layer: AttentionLayer, kept_H: Tensor) -> None:
    """Narrow an attention layer's linear layers, and its count of heads, in place."""
    for linear, starts in layer.first_rows.items():
        rows = kept_columns(layer, kept_H, starts)
        for name, parameter in list(linear.named_parameters(recurse=False)):
            setattr(linear, name, nn.Parameter(parameter.detach()[rows]))
        linear.out_features = len(rows)
    columns = kept_columns(layer, kept_H)
    layer.output.weight = nn.Parameter(layer.output.weight.detach()[:, columns])
    layer.output.in_features = len(columns)
    for name, count in layer.head_counts(len(columns) // layer.head_dim).items():
        setattr(layer.module, name, count)
