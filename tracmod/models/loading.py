"""Create a classifier, or load one and its tokenizer from a transformers folder or the Hub.

transformers is imported by the functions that make or load a model, because it takes seconds:
importing tracmod, and refusing what can be refused without a model, do not wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from tracmod.choices import Pooling, Unit
from tracmod.files.durable import read_json
from tracmod.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    UNIT_OF_TASK,
    adapter_settings,
    adapter_tensors,
    adapts_mean_pooling,
    is_adapter_folder,
    load_adapter,
    number_of_classes,
)
from tracmod.models.architecture import (
    MEAN_POOLING,
    Decoder,
    attention_layers,
    embeddings_module,
    max_positions,
    model_unit,
    unit_of,
    word_embeddings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)

# Tensors that published encoders carry and a classifier does not read: buffers of older versions of
# transformers, the heads of pretraining, and the pooler of models whose classifier has its own.
LEFTOVERS = re.compile(
    r"(.*\.)?position_ids|(.*\.)?pooler\.dense\.(weight|bias)"
    r"|(lm_head|generator_lm_head|sop_classifier|cls\.(predictions|seq_relationship)"
    r"|decoder(?=\.(weight|bias)$)|vocab_(transform|layer_norm|projector)|(lm_|mask_|generator_|discriminator_)?predictions"
    r")\..*"
)

# Special tokens whose ids configs state.
SPECIAL = ("bos", "eos", "cls", "sep", "mask")

# Files of an adapter, whose base model alone would be loaded.
ADAPTER_FILES = (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    "adapter_model.bin",
    "adapter.safetensors",
    "pytorch_adapter.bin",
)


def classifier_class(config: Any, unit: Unit) -> Any:
    """Return the class that makes or loads a model that says something of texts, tokens or spans.

    That is transformers' auto class, or tracmod's own if the config states mean pooling.
    """
    from transformers import (
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    if states_mean_pooling(config):
        from tracmod.models.mean_pooling import MeanPoolingForSequenceClassification

        return MeanPoolingForSequenceClassification
    if unit == "text":
        return AutoModelForSequenceClassification
    return AutoModelForTokenClassification if unit == "token" else AutoModelForQuestionAnswering


def states_mean_pooling(config: Any) -> bool:
    """Return whether a config says that its model is one of `tracmod.models.mean_pooling`."""
    return list(config.architectures or ()) == [MEAN_POOLING]


def _set_pooling(name: str, config: Any, pooling: Pooling | None, unit: Unit) -> None:
    """State in a config what the classifier of a new model reads.

    Families whose own classifier can read the mean have an entry for it in their config.

    Raises:
        ValueError: the model classifies tokens, reads the last token, or has a classifier already
            that reads something else.
    """
    if pooling is None:
        return
    given = None
    if unit != "text":
        given = f"one of {unit}s"
    elif config.model_type in Decoder.model_types:
        given = f"{config.model_type}, whose classifier reads the last token"
    elif any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ()):
        own = getattr(config, "classifier_pooling", "mean" if states_mean_pooling(config) else None)
        if own != pooling:
            given = f"{config.architectures[0]}, which has a classifier that reads something else"
    if given is not None:
        raise ValueError(
            f"model {name}: pooling {pooling}: expected an encoder with a new classifier of texts, "
            f"got {given}"
        )
    if hasattr(config, "classifier_pooling"):
        config.classifier_pooling = pooling
    else:
        config.architectures = [MEAN_POOLING]


def stated_unit(config: Any) -> Unit:
    """Return what a config says that its model says something of."""
    return unit_of(config.architectures or ())


def create_model(
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    unit: Unit = "text",
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    intermediate: int | None = None,
    dropout: float = 0.1,
    max_length: int = 128,
    pooling: Pooling | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Create an XLM-R classifier with random weights that depend on `seed` alone.

    Args:
        tokenizer: gives the size of the vocabulary and the special ids.
        label_names: names of the classes, in the order of the labels 0, 1, ...
        unit: whether it says something of texts, tokens or spans (question answering).
        layers: number of encoder layers.
        hidden: width of the hidden states, a multiple of `heads`.
        heads: attention heads per layer.
        intermediate: width of the feed-forward layers; None is 4 x `hidden`.
        dropout: dropout rate of hidden states and attention weights.
        max_length: longest input that the model takes, in tokens.
        pooling: as in `load_model`.
        seed: seed of the weights. The global random generator is not moved.

    Returns:
        The model in float32 and evaluation mode.

    Raises:
        ValueError: `hidden` is not a multiple of `heads`, or the tokenizer has no padding token.
    """
    from transformers import XLMRobertaConfig

    if hidden % heads:
        raise ValueError(f"hidden must be a multiple of heads, got hidden {hidden}, heads {heads}")
    pad_id = _tokenizer_pad_id(tokenizer)
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
    _set_pooling("from nothing", config, pooling, unit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = classifier_class(config, unit).from_config(config)
    return model.float().eval()


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weights of any kind, so that it is a trained model's."""
    files = (path.name for path in folder.iterdir())
    return any(
        re.search(r"\.(safetensors|bin|pt|pth|h5|msgpack)(\.index\.json)?$", f) for f in files
    )


def create_from_config(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    label_names: Sequence[str],
    *,
    unit: Unit = "text",
    pooling: Pooling | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Create a classifier of any supported family with random weights that depend on `seed` alone.

    Args:
        folder: folder with the config.json that states family and shape. The size of the
            vocabulary and the special ids are those of the tokenizer.
        tokenizer: its `model_max_length` is set to the `max_tokens` of both.
        label_names: names of the classes, in the order of the labels 0, 1, ...
        unit: whether it says something of texts, tokens or spans (question answering).
        pooling: as in `load_model`.
        seed: seed of the weights. The global random generator is not moved.

    Returns:
        The model in float32 and evaluation mode.

    Raises:
        ValueError: the config cannot be read, or is of no family that is supported.
    """
    pad_id = _tokenizer_pad_id(tokenizer)
    config = _read_config(str(folder))
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    stated = {name: token_id for name, token_id in special.items() if hasattr(config, name)}
    settings = {"vocab_size": len(tokenizer), **stated, "pad_token_id": pad_id}
    for key, value in {**settings, **_label_config(label_names)}.items():
        setattr(config, key, value)
    if pooling is not None:
        config.architectures = None  # there are no weights of another classifier to lose
        _set_pooling(str(folder), config, pooling, unit)
    try:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            auto_class = classifier_class(config, unit)
            model = auto_class.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"model {folder}: not a {_kind(unit)} of transformers: {first_line_of(error)}"
        ) from None
    attention_layers(model)
    tokenizer.model_max_length = max_tokens(model, tokenizer)
    return model.float().eval()


def load_model(
    source: str | Path,
    label_names: Sequence[str] | None = None,
    *,
    unit: Unit | None = None,
    pooling: Pooling | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a classifier of texts or tokens, and its tokenizer, from a folder or the Hub.

    Only safetensors weights are read, and no code from the folder is run.

    A folder that has a LoRA adapter of PEFT alone is loaded on the base model that it names, as
    `adapted_model` returns it.

    Args:
        source: folder or Hub name.
        label_names: the task's classes. If given, a model without a classifier
            (`xlm-roberta-base`) gets a new one; if not, such a model is an error.
        unit: whether it is to say something of texts, tokens or spans (question answering); None
            for what its config says.
        pooling: `mean` gives a model without a classifier one that reads the mean of its tokens;
            None one of its family, which mostly reads the first token. A model that has a
            classifier keeps it.
        seed: seed of the new classifier's weights.
        tokenizer: that of the source if it is loaded already; None loads it.

    Returns:
        The model (float32, evaluation mode, CPU) and the tokenizer, whose `model_max_length` is set
        to the `max_tokens` of both.

    Raises:
        ValueError: there is no such folder or Hub name, it has no tokenizer, no classifier or one
            of other classes, its weights are damaged, or the loaded model would not be the one that
            was trained: the folder holds an adapter, weights that the architecture has no place
            for, or a model of another class. Also if its architecture has no attention heads that
            `attention_layers` finds.
    """
    name = str(source)
    check_model_source(source)
    tokenizer_name = tokenizer_source(source)
    if Path(tokenizer_name).is_dir() and not has_tokenizer(Path(tokenizer_name)):
        raise ValueError(
            f"model {name}: no tokenizer in the folder, expected one of "
            + ", ".join(TOKENIZER_FILES)
        )
    model = load_classifier(source, label_names, unit=unit, pooling=pooling, seed=seed)
    tokenizer = tokenizer or load_tokenizer(tokenizer_name)
    rows = word_embeddings(model).num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"model {name}: its tokenizer has {len(tokenizer)} ids, its embeddings only {rows} rows"
        )
    types: Any = getattr(embeddings_module(model), "token_type_embeddings", None)
    given = max(tokenizer("a", "b").get("token_type_ids", [0]))
    if types is not None and given >= types.num_embeddings:
        raise ValueError(
            f"model {name}: its tokenizer gives token_type_ids up to {given}, expected less than "
            f"{types.num_embeddings}, the types that the model has"
        )
    tokenizer.model_max_length = max_tokens(model, tokenizer)
    return model, tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        ValueError: it cannot be loaded, or has no padding token.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises anything here, from KeyError to ImportError
        message = first_line_of(error)
        raise ValueError(f"model {name}: cannot load its tokenizer: {message}") from None
    _tokenizer_pad_id(tokenizer)
    return tokenizer


def load_classifier(
    source: str | Path,
    label_names: Sequence[str] | None = None,
    *,
    unit: Unit | None = None,
    pooling: Pooling | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Load the model of `load_model` from a source that need not have a tokenizer."""
    check_model_source(source)
    if is_adapter_folder(Path(source)):
        return _load_adapted(Path(source), label_names, seed)
    return _load_whole(str(source), label_names, unit, pooling, seed)[0]


def _load_whole(
    name: str,
    label_names: Sequence[str] | None,
    unit: Unit | None,
    pooling: Pooling | None,
    seed: int,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model that is no adapter, and return the weights that it has from the seed, too."""
    if label_names is None and Path(name).is_dir():
        _check_no_pipeline(Path(name))
    with quiet_transformers():
        model, loading_info = _load_weights(name, label_names, unit, pooling, seed)
    for key, got, expected in sorted(loading_info["mismatched_keys"]):
        raise ValueError(
            f"model {name}: expected {key} of shape {tuple(expected)}, got {tuple(got)}"
        )
    missing = sorted(loading_info["missing_keys"])
    # A pretrained encoder may lack the classifier, and the pooler that is trained with it.
    in_encoder = f"{model.base_model_prefix}."
    lost = [key for key in missing if key.startswith(in_encoder) and ".pooler." not in key]
    if lost:
        unread = sorted(loading_info["unexpected_keys"])
        instead = f"; it has {unread[0]}, ..." if unread else ""
        raise ValueError(
            f"model {name}: weights are missing from the folder, first {lost[0]}{instead}"
        )
    if missing and label_names is None:
        kind = _kind(model_unit(model))
        raise ValueError(f"model {name}: not a {kind}, it has no {missing[0]}")
    unread = [key for key in loading_info["unexpected_keys"] if not LEFTOVERS.fullmatch(key)]
    if unread:
        raise ValueError(
            f"model {name}: expected the weights of a {type(model).__name__}, got {len(unread)} "
            f"more that it has no place for, such as {sorted(unread)[0]}: the loaded model would "
            f"not be the one that was trained"
        )
    trained_as = model.config.architectures or []
    if not missing and trained_as and type(model).__name__ not in trained_as:
        raise ValueError(
            f"model {name}: expected architectures {type(model).__name__} in config.json, got "
            f"{', '.join(trained_as)}: the loaded model would not be the one that was trained"
        )
    attention_layers(model)
    return model.float().eval(), missing


def _load_adapted(folder: Path, label_names: Sequence[str] | None, seed: int) -> PreTrainedModel:
    """Load an adapter's base model and the adapter on it.

    A base model without a classifier gets one of as many classes as the adapter folder has. Their
    names are the ones that `TracInCallback` recorded, or transformers' LABEL_0, LABEL_1, ...
    """
    settings = adapter_settings(folder)
    base, unit = str(settings["base_model_name_or_path"]), None
    if settings.get("task_type") is not None:
        unit = UNIT_OF_TASK[settings["task_type"]]
    num_classes = number_of_classes(folder)
    names = label_names or _recorded_class_names(folder)
    if names is None and num_classes is not None and not _is_classifier(base, num_classes):
        names = [f"LABEL_{number}" for number in range(num_classes)]
    pooling: Pooling | None = "mean" if adapts_mean_pooling(settings) else None
    model, drawn = _load_whole(base, names, unit, pooling, seed)
    lost = sorted(set(drawn) - adapter_tensors(folder).keys())
    if lost:
        raise ValueError(
            f"model {folder}: expected {lost[0]} in the adapter or in its base model {base}, found "
            f"it in neither: the loaded model would not be the one that was trained"
        )
    return load_adapter(model, folder)


def _is_classifier(name: str, num_classes: int) -> bool:
    """Return whether a model has a classifier of so many classes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    heads = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    has_head = any(kind.endswith(heads) for kind in config.architectures or ())
    return has_head and len(config.id2label) == num_classes


def _kind(unit: Unit) -> str:
    kinds = {"text": "sequence classifier", "token": "token classifier"}
    return kinds.get(unit, "model for question answering")


def _recorded_class_names(folder: Path) -> list[str] | None:
    """Return the names of the classes that the tracmod.json of an adapter records, or None."""
    file = folder / "tracmod.json"
    tree = read_json(file) if file.is_file() else {}
    names = tree.get("class_names") if isinstance(tree, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else None


def tokenizer_source(source: str | Path) -> str:
    """Return where the tokenizer of a model is: for an adapter without one, at its base model."""
    folder = Path(source)
    if is_adapter_folder(folder) and not has_tokenizer(folder):
        return str(adapter_settings(folder)["base_model_name_or_path"])
    return str(source)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a transformers folder has a tokenizer in it."""
    return any((folder / file).is_file() for file in TOKENIZER_FILES)


def max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the longest input that both take: the tokenizer's limit or the model's positions."""
    return int(min(tokenizer.model_max_length, max_positions(model)))


def class_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the model's classes in the order of the labels 0, 1, ..."""
    return config_class_names(model.config)


def config_class_names(config: Any) -> list[str]:
    """Return the names of a config's classes in the order of the labels 0, 1, ..."""
    return [config.id2label[label] for label in sorted(config.id2label)]


def check_model_source(source: str | Path) -> None:
    """Check that a source is a transformers folder, or that the Hub can be asked for it.

    Raises:
        ValueError: the folder does not exist, has no config.json or holds an adapter, or the Hub
            cannot be reached; the same for the base model of a folder with an adapter alone.
    """
    name, folder = str(source), Path(source)
    if is_adapter_folder(folder):
        check_model_source(adapter_settings(folder)["base_model_name_or_path"])
        return
    if folder.is_dir():
        for file in ADAPTER_FILES:
            if (folder / file).is_file():
                raise ValueError(
                    f"model {name}: expected a whole model or an adapter of PEFT alone, found an "
                    f"adapter ({file}) beside a model or in another form; merge it into its base "
                    f"model first, for example with PEFT's merge_and_unload"
                )
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {name}: expected a transformers folder, found no config.json")
        _check_weights_files(folder)
        return
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model {name}: no such folder")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    # Ask the Hub once: without a network, transformers would go on trying for 20 seconds.
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:
        pass  # the Hub has answered; transformers explains better what is wrong
    except Exception as error:  # huggingface_hub's own, or any of its HTTP library
        raise ValueError(
            f"model {name}: no such folder, and the Hub cannot be asked for it: "
            f"{first_line_of(error)}"
        ) from None


def _check_weights_files(folder: Path) -> None:
    """Check that a folder has whole safetensors weights whose numbers are not quantized."""
    single, index = (folder / file for file in WEIGHTS_FILES)
    shards = [single]
    for file in (single, index):
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file}: expected weights, got a link to a file that is missing")
    if index.is_file() and not single.is_file():
        tree = read_json(index)
        weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a weight_map from tensors to files, got none")
        if not isinstance(tree.get("metadata"), dict):
            raise ValueError(f"{index}: expected metadata, which transformers reads, got none")
        shards = [folder / str(file) for file in sorted(set(weight_map.values()))]
    elif not single.is_file():
        files = sorted(path.name for path in folder.iterdir())
        others = [file for file in files if re.search(r"(?i)model|weights|fsdp|zero|global", file)]
        raise ValueError(
            f"model {folder}: no weights in the folder, expected {WEIGHTS_FILES[0]}, found "
            f"{', '.join(others[:3]) or 'none'}; save the whole model as safetensors"
        )
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"model {folder}: weights are missing, expected {shard.name}")
        try:
            with safe_open(shard, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                    dtype = tensors.get_slice(key).get_dtype()
                    is_parameter = key.endswith(("weight", "bias"))
                    if is_parameter and dtype not in ("F64", "F32", "F16", "BF16"):
                        raise ValueError(
                            f"model {folder}: expected weights that are not quantized, got {key} "
                            f"of dtype {dtype}"
                        )
        except SafetensorError as error:
            raise ValueError(
                f"{shard}: the weights are damaged or were not copied whole: {first_line_of(error)}"
            ) from None


def _check_no_pipeline(folder: Path) -> None:
    """Refuse a model that is only the first part of what was trained."""
    modules = folder / "modules.json"
    tree = read_json(modules) if modules.is_file() else []
    types = [str(row.get("type")) for row in tree if isinstance(row, dict)]
    parts = [kind for kind in types if kind.endswith((".Pooling", ".Dense"))]
    parts += [file for file in ("model_head.pkl", "model_head.skops") if (folder / file).is_file()]
    if parts:
        raise ValueError(
            f"model {folder}: expected a sequence classifier of transformers, found one of "
            f"sentence-transformers or SetFit with further parts: {', '.join(parts)}"
        )


def _config_fault(config: Any) -> str | None:
    """Return what would make transformers build another model than was trained, or None."""
    if getattr(config, "quantization_config", None):
        return "expected weights that are not quantized, got a quantization_config in config.json"
    own_code = [key for key in getattr(config, "auto_map", None) or {} if "AutoModel" in key]
    if own_code and not states_mean_pooling(config):
        return (
            f"expected a model of transformers itself, got code of its own (auto_map of "
            f"config.json: {own_code[0]}), which is not run"
        )
    if getattr(config, "pruned_heads", None):
        return (
            f"expected no pruned_heads in config.json, got {config.pruned_heads}: transformers "
            f"does not apply them any more"
        )
    numbers, names = sorted(config.id2label), list(config.id2label.values())
    if numbers != list(range(len(numbers))):
        return (
            f"expected id2label of config.json to have the numbers 0 to {len(numbers) - 1}, got "
            f"{', '.join(map(str, numbers))}"
        )
    unnamed = next((label for label in names if not isinstance(label, str)), None)
    if unnamed is not None:
        return f"expected names of classes in id2label of config.json, got {unnamed!r}"
    repeated = next((label for label in names if names.count(label) > 1), None)
    if repeated is not None:
        return f"expected different names of classes, got {repeated} twice"
    numbers_by_name = {label: number for number, label in config.id2label.items()}
    for label, number in (getattr(config, "label2id", None) or {}).items():
        if numbers_by_name.get(label, number) != number:
            return (
                f"id2label and label2id of config.json contradict each other: {label} is "
                f"{numbers_by_name[label]} and {number}"
            )
    return None


def _load_weights(
    name: str,
    label_names: Sequence[str] | None,
    unit: Unit | None,
    pooling: Pooling | None,
    seed: int,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the weights; return the model and what transformers reports of missing weights."""
    config = _read_config(name)
    unit = stated_unit(config) if unit is None else unit
    _set_pooling(name, config, pooling, unit)
    try:
        own_names = config_class_names(config)
        if label_names is not None:
            for key, value in _label_config(label_names).items():
                setattr(config, key, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of a new classifier's weights
            model, loading_info = classifier_class(config, unit).from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # load_classifier reports them, with the shapes
            )
    except OSError as error:
        where = "the folder" if Path(name).is_dir() else "the Hub"
        raise ValueError(
            f"model {name}: cannot be loaded from {where}: {first_line_of(error)}"
        ) from None
    except SafetensorError as error:
        raise ValueError(
            f"model {name}: its weights are damaged or were not copied whole: "
            f"{first_line_of(error)}"
        ) from None
    except ImportError as error:
        raise ValueError(f"model {name}: cannot be loaded: {first_line_of(error)}") from None
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"model {name}: not a {_kind(unit)} of transformers: {first_line_of(error)}"
        ) from None
    # transformers names classes LABEL_0, LABEL_1, ... if the config does not name them.
    unnamed = all(own.startswith("LABEL_") for own in own_names)
    expected = own_names if label_names is None else list(label_names)
    if not unnamed and [own.lower() for own in own_names] != [name.lower() for name in expected]:
        raise ValueError(f"model {name}: expected the classes {expected}, it has {own_names}")
    return model, loading_info


def _read_config(name: str) -> Any:
    """Read the config of a folder or the Hub, after checking it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises anything here, from KeyError to its own
        where = "the folder" if Path(name).is_dir() else "the Hub"
        raise ValueError(
            f"model {name}: its config cannot be loaded from {where}: {first_line_of(error)}"
        ) from None
    if (fault := _config_fault(config)) is not None:
        raise ValueError(f"model {name}: {fault}")
    return config


def _label_config(label_names: Sequence[str]) -> dict[str, Any]:
    # num_labels comes first: setting it resets the names.
    return {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: index for index, label in enumerate(label_names)},
        "problem_type": None,  # of the encoder's earlier training; a study's is cross entropy
    }


def _tokenizer_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path}: expected a padding token, got none")
    return int(tokenizer.pad_token_id)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars, and its report of missing weights, within the context."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def first_line_of(error: Exception) -> str:
    """Return the first non-empty line of an error's message, or the name of its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
