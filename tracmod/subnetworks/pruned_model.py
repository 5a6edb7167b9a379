"""A subnetwork as a model of its own: with the masked heads zeroed, or taken out of the tensors.

Two forms, both with the logits of the masked model:

- `save_masked`: a plain transformers folder of the same shapes, in which what belongs to a masked
  head is zero. Anything that loads transformers models loads it. It is no faster, and only smaller
  once compressed.
- `save_pruned`: the masked heads' rows of query, key and value and columns of the attention output
  projection are gone, from the file and from the matrix products. `load_pruned` reads it.

Why the second form is not for `from_pretrained`: a config of transformers 5 has one
`num_attention_heads` for all layers, from which the width of a head follows as hidden size over
heads; there is no `prune_heads`, and `pruned_heads` in a config is not read. (A config may have a
`per_layer_config`, but BERT-family layers do not look into it.) Code within the folder could do it,
and would ask everyone for `trust_remote_code`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tracmod.models.architecture import AttentionLayer
from tracmod.models.loading import quiet_transformers
from tracmod.models.modes import to_device
from tracmod.models.probe import same_logits
from tracmod.subnetworks.head_mask import (
    HeadMask,
    head_parameters,
    head_slices,
    kept_columns,
    matching_layers,
)

# Not model.safetensors: from_pretrained must not take narrow tensors for a whole model's.
WEIGHTS_FILE = "pruned.safetensors"
MASK_FILE = "head_mask.json"


def save_masked(
    model: PreTrainedModel,
    mask: HeadMask,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Write a transformers folder of the same shapes, the masked heads' parameters zero.

    `AutoModelForSequenceClassification.from_pretrained(folder)` gives, bit for bit, the logits of
    `model` under `mask.apply`: the same products with zeros in the same places.

    Args:
        model: a sequence classifier; not changed.
        mask: heads to keep.
        folder: made if it is not there.
        tokenizer: saved beside it.
        made_from: what else head_mask.json, written beside, is to say: language, ...

    Raises:
        ValueError: the mask does not fit the model.
    """
    folder = Path(folder)
    state, masked = dict(model.state_dict()), head_slices(model, mask)
    state |= {name: state[name].clone() for name in {one.name for one in masked}}
    for one in masked:
        state[one.name][one.index] = 0
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
    _save_beside(folder, mask, tokenizer, made_from)


def save_pruned(
    model: PreTrainedModel,
    mask: HeadMask,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Write the model without its masked heads: fewer bytes, fewer operations.

    Written are pruned.safetensors, config.json (the whole model's) and head_mask.json. Of every
    masked head `4 * hidden * head_dim + 3 * head_dim` numbers are gone, except that a layer with no
    head left keeps one of zeros, since attention needs a head: its output is the projection's bias.

    Args:
        model, mask, folder, tokenizer, made_from: as in `save_masked`.

    Raises:
        ValueError: the mask does not fit the model, or the model does not compute the same without
            its heads.
    """
    folder = Path(folder)
    state = _without_heads(model, mask)
    pruned = _narrow_model(model.config, mask)
    pruned.load_state_dict(state, assign=True)
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
    _save_beside(folder, mask, tokenizer, made_from)


def load_pruned(folder: str | Path) -> PreTrainedModel:
    """Load what `save_pruned` wrote.

    Returns:
        The classifier, in eval mode on the CPU, in the dtype it was saved in. Its layers have as
        many heads as they keep (one of zeros where they keep none); a head mask is no longer for
        it.

    Raises:
        ValueError: no such folder, or its files do not go together.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS_FILE, MASK_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: expected a model that save_pruned wrote, found no {name}")
    mask = HeadMask.load(folder / MASK_FILE)
    model = _narrow_model(AutoConfig.from_pretrained(folder, trust_remote_code=False), mask)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE), assign=True)
    except (RuntimeError, SafetensorError) as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: expected the weights that {MASK_FILE} keeps: {first}"
        ) from None
    return model.eval()


def _save_beside(
    folder: Path,
    mask: HeadMask,
    tokenizer: PreTrainedTokenizerBase | None,
    made_from: Mapping[str, Any] | None,
) -> None:
    mask.save(folder / MASK_FILE, **(made_from or {}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _without_heads(model: PreTrainedModel, mask: HeadMask) -> dict[str, Tensor]:
    """The state dict of the model, narrowed to the heads that are kept."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer, kept_H in zip(matching_layers(model, mask), mask.array, strict=True):
        columns = kept_columns(layer, torch.from_numpy(kept_H.copy()))
        for parameter, axis in head_parameters(layer):
            narrow = parameter.detach().index_select(axis, columns)
            state[names[id(parameter)]] = narrow if kept_H.any() else torch.zeros_like(narrow)
    return state


def _narrow_model(config: Any, mask: HeadMask) -> PreTrainedModel:
    """A classifier with the shapes that the mask leaves; its weights are for the caller to load."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    for layer, kept_H in zip(matching_layers(model, mask), mask.array, strict=True):
        _narrow_layer(model, layer, torch.from_numpy(kept_H.copy()))
    return model


def _narrow_layer(model: nn.Module, layer: AttentionLayer, kept_H: Tensor) -> None:
    columns = kept_columns(layer, kept_H)
    for linear in (layer.query, layer.key, layer.value):
        for name, parameter in list(linear.named_parameters(recurse=False)):
            setattr(linear, name, nn.Parameter(parameter.detach()[columns]))
        linear.out_features = len(columns)
    layer.output.weight = nn.Parameter(layer.output.weight.detach()[:, columns])
    layer.output.in_features = len(columns)
    attention: Any = next(one for one in model.modules() if layer.query in one.children())
    num_heads = len(columns) // layer.head_dim
    for name, value in (
        ("num_attention_heads", num_heads), ("n_heads", num_heads), ("all_head_size", len(columns)),
    ):  # fmt: skip
        if hasattr(attention, name):
            setattr(attention, name, value)
