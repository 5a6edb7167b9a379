"""Digests that identify a model and a tokenizer."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# What a config says beside the model it describes: where it was loaded from, by which version, in
# which dtype (the weights say that), and which loss transformers would take.
_CONFIG_NOISE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "problem_type",
    "torch_dtype",
    "transformers_version",
}


def model_digest(model: nn.Module) -> str:
    """SHA-256 over a model's weights and config.

    Hashed are name, dtype, shape and bytes of every entry of the state dict, in name order, and
    what the config sets apart from the defaults: the same weights divided into other heads are
    another model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    if isinstance(model, PreTrainedModel):
        # By way of text: integer keys (id2label) are sorted as the strings that a file has.
        tree = json.loads(model.config.to_json_string(use_diff=True))
        tree = {name: value for name, value in tree.items() if name not in _CONFIG_NOISE}
        digest.update(json.dumps(tree, sort_keys=True).encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides which ids a text becomes; truncation and padding are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tree = json.loads(backend.to_str())
        tree.pop("truncation", None)
        tree.pop("padding", None)
    else:
        tree = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    tree["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
