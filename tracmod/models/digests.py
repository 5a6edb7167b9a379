"""Digests that identify a model and a tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import nn

from tracmod.models.adapters import AdaptedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Config entries that do not change what the model computes: where it was loaded from and by which
# version, its dtype (the weights carry that), and the loss that transformers would choose.
_IGNORED_CONFIG_KEYS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "problem_type",
    "torch_dtype",
    "transformers_version",
}


def model_digest(model: nn.Module) -> str:
    """Compute the SHA-256 digest of a model's weights and config.

    The digest covers name, dtype, shape and bytes of every entry of the state dict, in name order,
    the scaling of LoRA adapters, and every config entry that differs from its default. The config
    is part of it because the same weights divided into another number of heads are another model.

    Returns:
        64 hexadecimal digits. Saving and loading the model does not change them.
    """
    from transformers import PreTrainedModel  # whoever has a model has imported it already

    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):  # its scaling is in no tensor and no config
            digest.update(f"{name} scaled by {module.scaling!r}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    if isinstance(model, PreTrainedModel):
        # Through text, because a loaded config has the integer keys of id2label as strings, and
        # strings sort in another order ("10" before "2").
        config = json.loads(model.config.to_json_string(use_diff=True))
        config = {key: value for key, value in config.items() if key not in _IGNORED_CONFIG_KEYS}
        digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Compute the SHA-256 digest of everything that decides which ids a text becomes.

    Truncation and padding are left out: they are settings of the last call, not of the tokenizer.

    Returns:
        64 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tree = json.loads(backend.to_str())
        tree.pop("truncation", None)
        tree.pop("padding", None)
    else:
        tree = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    tree["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
