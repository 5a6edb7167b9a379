"""Sequence classifiers of the BERT family: made, loaded, taken apart, fed and identified.

Shape suffixes: B examples of a batch, S tokens, N examples, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn
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

from tracmod.durable import read_json

Example = dict[str, Any]

# Tokens of padding in a batch. About what starting another batch costs on a CPU; few examples of
# many lengths would otherwise be a third padding.
MAX_PADDING = 512
_TOKENIZER_FILES = (
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)
_WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
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


@dataclass(frozen=True)
class Checkpoint:
    """A model saved during training.

    Attributes:
        path: the transformers folder.
        epoch: epochs done, from 1.
        step: optimizer steps done.
        learning_rate: mean learning rate of the steps since the checkpoint before, or None.
    """

    path: Path
    epoch: int
    step: int
    learning_rate: float | None


class AttentionLayer(NamedTuple):
    """The four linear layers of a self-attention and how its heads divide them.

    Head h owns rows `h * head_dim : (h + 1) * head_dim` of query, key and value (weight and
    bias) and the same columns of the output projection's weight.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    num_heads: int
    head_dim: int


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
    _check_source(source)
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
    _check_source(source)
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


def check_checkpoint(path: Path, config: Any) -> None:
    """Refuse a checkpoint that is not of the model with this config, without reading its weights.

    Raises:
        ValueError: no config or weights in the folder, other classes, or another shape.
    """
    _check_source(path)
    if not any((path / file).is_file() for file in _WEIGHTS_FILES):
        raise ValueError(f"{path}: no weights in the folder, expected {_WEIGHTS_FILES[0]}")
    try:
        own = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path}: its config cannot be read: {_first_line(error)}") from None
    expected, got = _names_in_order(config), _names_in_order(own)
    if got != expected:
        raise ValueError(
            f"{path}: expected the model's classes, {', '.join(expected)}, got {', '.join(got)}"
        )
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if getattr(own, name) != getattr(config, name):
            raise ValueError(
                f"{path}: expected the model's {name}, {getattr(config, name)}, "
                f"got {getattr(own, name)}"
            )


def resolve_device(text: str | None) -> str:
    """The device to compute on; None or "auto" is a GPU if there is one.

    Raises:
        ValueError: not a name of a CPU or GPU, or that GPU is not there.
    """
    if text is None or text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:1, ..., got {text}")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device: got {text}, but torch finds {gpus or 'no'} GPUs here")
    return text


def to_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Move a model in place. (`PreTrainedModel.to` is wrapped in a way that hides its types.)"""
    nn.Module.to(model, torch.device(device))
    return model


def class_names(model: PreTrainedModel) -> list[str]:
    """The model's classes in the order of the labels 0, 1, ..."""
    return _names_in_order(model.config)


def _names_in_order(config: Any) -> list[str]:
    return [config.id2label[label] for label in sorted(config.id2label)]


def _check_source(source: str | Path) -> None:
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
            f"model {name}: no such folder, and it cannot be had from the Hub: {_first_line(error)}"
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
        own_names = _names_in_order(config)
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
        raise ValueError(f"model {name}: cannot be had {where}: {_first_line(error)}") from None
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"model {name}: not a sequence classifier of transformers: {_first_line(error)}"
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
        raise ValueError(f"model {name}: cannot load its tokenizer: {_first_line(error)}") from None
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


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# --- checkpoints ----------------------------------------------------------------------------


def load_checkpoints(paths: Iterable[str | Path]) -> list[Checkpoint]:
    """Read epoch (rounded), step and learning rate of checkpoint folders, in the order given.

    They come from `tracmod.json`; else from `trainer_state.json`, where the learning rate is the
    mean of those logged in the steps after the nearest earlier checkpoint given, or, if none was
    logged there, the last one logged before. A folder with neither file has learning rate None,
    its place in the list as epoch, and step 0.

    Raises:
        ValueError: a folder does not exist, or one of the two files is malformed.
    """
    folders = [Path(path) for path in paths]
    states = [_training_state(folder) for folder in folders]
    steps = sorted({int(state["step"]) for state in states})
    checkpoints = []
    for place, (folder, state) in enumerate(zip(folders, states, strict=True), start=1):
        step = int(state["step"])
        before = max((earlier for earlier in steps if earlier < step), default=0)
        rate = state["learning_rate"]
        if rate is None:
            rate = _logged_rate(state["log"], before, step)
        checkpoints.append(Checkpoint(folder, int(state["epoch"] or place), step, rate))
    return checkpoints


def checkpoint_folders(folder: Path) -> list[Path]:
    """Every `checkpoint-<number>/` in the output folder of a training, in order of the numbers.

    Raises:
        ValueError: there is none.
    """
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()
    ]
    if not numbered:
        raise ValueError(
            f"{folder}: expected checkpoint-<number> folders in it, as a training saves them, "
            f"found none"
        )
    return [path for _, path in sorted(numbered)]


def _training_state(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: no such folder")
    ours, theirs = folder / "tracmod.json", folder / "trainer_state.json"
    if ours.is_file():
        return _our_state(ours)
    if theirs.is_file():
        return _trainer_state(theirs)
    return {"epoch": 0, "step": 0, "learning_rate": None, "log": []}


def _our_state(file: Path) -> dict[str, Any]:
    tree = _read_object(file)
    if not {"epoch", "step", "learning_rate"} <= tree.keys():
        raise ValueError(f"{file}: expected epoch, step and learning_rate, got {sorted(tree)}")
    rate = tree["learning_rate"]
    return {
        "epoch": int(_number(file, tree, "epoch")),
        "step": int(_number(file, tree, "step")),
        "learning_rate": None if rate is None else _number(file, tree, "learning_rate"),
        "log": [],
    }


def _trainer_state(file: Path) -> dict[str, Any]:
    tree = {"epoch": 0, "global_step": 0, "log_history": []} | _read_object(file)
    log = tree["log_history"]
    if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
        raise ValueError(f"{file}: expected log_history to be a list of objects")
    rows = [row for row in log if "learning_rate" in row]
    return {
        "epoch": round(_number(file, tree, "epoch")),
        "step": int(_number(file, tree, "global_step")),
        "learning_rate": None,
        "log": [
            (int(_number(file, row, "step")), _number(file, row, "learning_rate")) for row in rows
        ],
    }


def _number(file: Path, tree: dict[str, Any], name: str) -> float:
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{file}: expected {name} to be a number, got {json.dumps(value)}")
    return float(value)


def _logged_rate(log: list[tuple[int, float]], before: int, step: int) -> float | None:
    since = [rate for at, rate in log if before < at <= step]
    if since:
        return sum(since) / len(since)
    earlier = [rate for at, rate in log if at <= step]
    return earlier[-1] if earlier else None


def _read_object(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


# --- parts of a model -----------------------------------------------------------------------


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Find the self-attention layers of a BERT-family encoder, first layer first.

    Found are `attention.self.{query,key,value}` with `attention.output.dense` (BERT, RoBERTa,
    XLM-R, CamemBERT, ELECTRA, ...) and DistilBERT's `attention.{q_lin,k_lin,v_lin,out_lin}`.

    Raises:
        ValueError: there are none.
    """
    layers = []
    for _, module in model.named_modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in ("self", "output")):
            layer = _bert_attention(module)
        else:
            layer = _distilbert_attention(module)
        if layer is not None:
            layers.append(layer)
    if not layers:
        raise ValueError(
            f"{type(model).__name__}: expected an encoder of the BERT family, "
            "found no attention layers with query, key, value and output projections"
        )
    return layers


def _bert_attention(module: nn.Module) -> AttentionLayer | None:
    inner, dense = module.self, getattr(module.output, "dense", None)
    linears = [getattr(inner, name, None) for name in ("query", "key", "value")]
    return _attention_layer([*linears, dense], getattr(inner, "num_attention_heads", None))


def _distilbert_attention(module: nn.Module) -> AttentionLayer | None:
    linears = [getattr(module, name, None) for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
    return _attention_layer(linears, getattr(module, "n_heads", None))


def _attention_layer(linears: list[Any], num_heads: int | None) -> AttentionLayer | None:
    if num_heads is None or not all(isinstance(linear, nn.Linear) for linear in linears):
        return None
    query, key, value, output = linears
    return AttentionLayer(query, key, value, output, num_heads, output.in_features // num_heads)


def embeddings_module(model: nn.Module) -> nn.Module:
    """Return the module that turns token ids into the encoder's first hidden states.

    Raises:
        ValueError: the model has none with `word_embeddings` in it.
    """
    base = getattr(model, "base_model", model)
    embeddings = getattr(base, "embeddings", None)
    if embeddings is None or not hasattr(embeddings, "word_embeddings"):
        raise ValueError(
            f"{type(model).__name__}: expected an encoder of the BERT family, "
            "found no embeddings module with word_embeddings"
        )
    return embeddings


# --- examples, batches, loss ----------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase,
    table: Any,
    max_length: int,
    *,
    num_labels: int | None = None,
) -> list[Example]:
    """Tokenize a table of examples, rows in table order, without padding.

    Pairs are cut longest text first. BERT's kind of tokenizer adds `token_type_ids`.

    Args:
        tokenizer: the model's.
        table: `pyarrow.Table` with id, text_a, text_b (nullable), label.
        max_length: tokens, special ones included.
        num_labels: the model's; given, labels are checked against it (1: regression, no check).

    Returns:
        Dicts of `input_ids`, `attention_mask` (lists of int) and `labels` (int).

    Raises:
        ValueError: `max_length` is more than the tokenizer's model takes or leaves no token of a
            pair, or a label is outside the model's range (the example's id is named).
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length <= special:
        raise ValueError(
            f"max_length: expected more than the {special} special tokens of a pair, got "
            f"{max_length}"
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length {max_length} is more than the model takes ({tokenizer.model_max_length})"
        )
    ids, labels = table.column("id").to_pylist(), table.column("label").to_pylist()
    if num_labels is not None and num_labels > 1:
        _check_labels(ids, labels, num_labels)
    first, second = table.column("text_a").to_pylist(), table.column("text_b").to_pylist()
    examples: list[Example] = [{} for _ in ids]
    for is_pair in (False, True):
        rows = [row for row, text in enumerate(second) if (text is not None) == is_pair]
        if not rows:
            continue
        pair = [second[row] for row in rows] if is_pair else None
        encoded = tokenizer(
            [first[row] for row in rows], pair, truncation="longest_first", max_length=max_length
        )
        for place, row in enumerate(rows):
            examples[row] = {name: column[place] for name, column in encoded.items()}
            examples[row]["labels"] = labels[row]
    return examples


def _check_labels(ids: list[str], labels: list[int], num_labels: int) -> None:
    for example_id, label in zip(ids, labels, strict=True):
        if not 0 <= label < num_labels:
            raise ValueError(
                f"example {example_id}: expected a label from 0 to {num_labels - 1}, got {label}"
            )


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group examples into batches of like length, bounded in tokens, padding included.

    Examples are taken longest first (equal lengths in the order given), so that a batch that
    does not fit in memory shows at once. A batch holds `longest * count <= batch_tokens` tokens, at
    most 512 of them padding, or a single example.

    Returns:
        Lists of positions in `lengths`; each position is in exactly one.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    batches: list[list[int]] = []
    longest = padding = 0
    for position in order:
        padding += longest - lengths[position]
        full = not batches or longest * (len(batches[-1]) + 1) > batch_tokens
        if full or padding > MAX_PADDING:
            batches.append([])
            longest, padding = lengths[position], 0
        batches[-1].append(position)
    return batches


def collate(
    examples: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Pad examples on the right into one batch.

    Args:
        examples: dicts with `input_ids`, `attention_mask`, `labels`, maybe `token_type_ids`.
        pad_id: the tokenizer's; `attention_mask` and `token_type_ids` are padded with 0.
        device: where the tensors go.

    Returns:
        `input_ids`, `attention_mask` (and `token_type_ids`) (B, S) int64; `labels` (B,) int64, or
        float32 where they are floats.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    batch: dict[str, Tensor] = {}
    for name, padding in (("input_ids", pad_id), ("attention_mask", 0), ("token_type_ids", 0)):
        if name not in examples[0]:
            continue
        rows = [list(example[name]) for example in examples]
        padded = [row + [padding] * (longest - len(row)) for row in rows]
        batch[name] = send(torch.tensor(padded, dtype=torch.int64), device)
    batch["labels"] = send(torch.tensor([example["labels"] for example in examples]), device)
    return batch


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`; by way of pinned memory, so that no GPU is waited for."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad_token_id(model: PreTrainedModel) -> int:
    """The id that `collate` pads with for this model; 0 where its config names none."""
    pad_id = model.config.pad_token_id
    return 0 if pad_id is None else int(pad_id)


def per_example_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Loss of each example on its own, no mean over the batch, in float32 (float64 stays).

    `-log softmax(logits)[label]`, or `(logit - label)^2` for a model with one output.

    Args:
        logits_BC: (B, C).
        labels_B: (B,) class indices, or targets where C is 1.

    Returns:
        (B,).
    """
    if logits_BC.dtype != torch.float64:
        logits_BC = logits_BC.float()
    if logits_BC.shape[-1] == 1:
        return (logits_BC.squeeze(-1) - labels_B.to(logits_BC.dtype)).square()
    return nn.functional.cross_entropy(logits_BC, labels_B, reduction="none")


@torch.no_grad()
def predict(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], *, batch_tokens: int = 8192
) -> Tensor:
    """Logits of every example, in the order given, dropout off.

    Args:
        model: on any device; left in the mode it was in.
        examples: as `encode` returns them.
        batch_tokens: largest batch, in tokens.

    Returns:
        (N, C) on the CPU, in the model's dtype.
    """
    was_training = model.training
    model.eval()
    try:
        num_labels = int(model.config.num_labels or 0)
        logits_NC = torch.empty(len(examples), num_labels, dtype=model.dtype)
        for batch in plan_batches([len(e["input_ids"]) for e in examples], batch_tokens):
            inputs = collate([examples[i] for i in batch], pad_token_id(model), model.device)
            inputs.pop("labels")
            logits_NC[batch] = model(**inputs).logits.cpu()
        return logits_NC
    finally:
        model.train(was_training)


def accuracy(logits_NC: Tensor, labels_N: Sequence[int]) -> float:
    """Share of examples whose largest logit is at the label.

    Raises:
        ValueError: there are no examples, or the model has one output and so no classes.
    """
    if logits_NC.shape[0] == 0 or logits_NC.shape[1] == 1:
        raise ValueError(
            "accuracy: expected at least 1 example and 2 classes, "
            f"got logits of shape {tuple(logits_NC.shape)}"
        )
    return float((logits_NC.argmax(1) == torch.as_tensor(labels_N)).double().mean())


# --- identity -------------------------------------------------------------------------------


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
