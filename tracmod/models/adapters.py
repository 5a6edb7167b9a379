"""LoRA adapters of PEFT: the same model as plain layers, new adapters, and adapter folders.

PEFT replaces a linear layer by a module that holds the layer, its two low-rank matrices, and
switches between adapters. `adapted_model` turns such a model into one of transformers again, in
which an adapted layer is an `AdaptedLinear`: a linear layer whose low-rank matrices are two further
linear layers. All parameters are shared with the PEFT model, none is copied.

Shape suffixes: B examples, S tokens, I in, O out, R rank.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tracmod.choices import Unit
from tracmod.files.durable import read_json
from tracmod.models.architecture import MEAN_POOLING, attention_layers, model_unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


# What a model says something of -> PEFT's name of the task.
TASK_OF_UNIT: dict[Unit, str] = {"text": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
UNIT_OF_TASK: dict[str, Unit] = {task: unit for unit, task in TASK_OF_UNIT.items()}


class AdaptedLinear(nn.Linear):
    """A linear layer with a LoRA adapter.

    It computes, with W (O, I) and b (O,) the base layer's::

        y = x W^T + b + scaling * (x A^T) B^T        A (R, I) is `lora_A`, B (O, R) is `lora_B`

    `lora_A` and `lora_B` are linear layers, so their per-example gradients are captured like those
    of any other. `scaling` is alpha / R, or alpha / sqrt(R) for rsLoRA.

    Source: Hu et al. 2021 (LoRA), arXiv 2106.09685; Kalajdzievski 2023 (rsLoRA), arXiv 2312.03732.
    """

    def __init__(
        self, base: nn.Linear, lora_A: nn.Linear, lora_B: nn.Linear, scaling: float
    ) -> None:
        """Build the layer from a base layer and its adapter, whose parameters it shares."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scaling = scaling

    def forward(self, input: Tensor) -> Tensor:
        """Compute the adapted output (B, S, O) of an input (B, S, I)."""
        base_BSO = super().forward(input)
        adapter_BSO = self.lora_B(self.lora_A(input.to(self.lora_A.weight.dtype)))
        return base_BSO + (adapter_BSO * self.scaling).to(base_BSO.dtype)


def is_peft_model(model: Any) -> bool:
    """Return whether a model is PEFT's wrapper around one of transformers. Imports no PEFT."""
    return type(model).__module__.partition(".")[0] == "peft" and hasattr(model, "peft_config")


def adapted_model(model: Any) -> PreTrainedModel:
    """Return the transformers model that a PEFT model computes, with shared parameters.

    The functions of tracmod that take a model do this by themselves. Do it yourself to apply a head
    mask, which needs the adapted model: `with mask.apply(adapted): ...`. Names of parameters are
    those of the base model; an adapter's end in `.lora_A.weight` and `.lora_B.weight`.

    Args:
        model: A `PeftModel` with one active LoRA adapter (also rsLoRA) on linear layers, and
            possibly modules that are trained whole (`modules_to_save`, usually the classifier). It
            is left as it is. Dropout of the adapter is not part of the result, which is made for
            evaluation.

    Returns:
        A sequence classifier of transformers in evaluation mode. What training changes in the
        parameters of one of the two is changed in both.

    Raises:
        ValueError: The adapter is of another kind (such as DoRA, IA3 or a prompt), switched off,
            merged into the weights, or one of several.

    Examples:
        >>> import tracmod as tm
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=4,
        ... )
        >>> lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        >>> model = get_peft_model(BertForSequenceClassification(config), lora)
        >>> adapted = tm.adapted_model(model)
        >>> [name for name, p in adapted.named_parameters() if p.requires_grad][0]
        'bert.encoder.layer.0.attention.self.query.lora_A.weight'
    """
    if not is_peft_model(model):
        raise ValueError(f"model: expected a PeftModel, got {type(model).__name__}")
    _check_adapter(model)
    inner = model.base_model.model
    # Everything of the model is copied but its tensors.
    tensors = [*inner.parameters(), *inner.buffers()]
    adapted = copy.deepcopy(inner, {id(tensor): tensor for tensor in tensors})
    for name, module in list(adapted.named_modules()):
        if _kind(module).endswith("ModulesToSaveWrapper"):
            _replace(adapted, name, module.modules_to_save[module.active_adapters[0]])
    for name, module in list(adapted.named_modules()):
        if _kind(module).startswith("peft.tuners.lora."):
            _replace(adapted, name, _adapted_linear(name, module))
    _remember_adapter(adapted, model)
    left = [name for name, module in adapted.named_modules() if _kind(module).startswith("peft.")]
    if left:
        kind = _kind(adapted.get_submodule(left[0]))
        raise ValueError(f"model: expected LoRA on linear layers, got {kind} at {left[0]}")
    return adapted.eval()


def add_lora(
    model: PreTrainedModel,
    base_name: str,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    rank_stabilized: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Put a new LoRA adapter of PEFT on a classifier, and return the adapted model.

    The adapter's matrices are trained, and all that comes after the encoder's layers (pooler and
    classifier) is trained whole. The rest is frozen.

    Args:
        model: The classifier. It is changed: its parameters are those of the adapted model.
        base_name: Its folder or Hub name, which an adapter folder names.
        rank: Rank of the matrices.
        alpha: The adapter's output is multiplied by alpha / rank.
        targets: Names of the linear layers that are adapted, or their last parts, such as
            `["query", "value", "output.dense"]`; None for the query and value projections of
            attention, of a fused projection all of it.
        rank_stabilized: Whether the factor is alpha / sqrt(rank) instead (rsLoRA).
        seed: Seed of the matrices. The global random generator is not moved.

    Returns:
        The adapted model, in evaluation mode.

    Raises:
        ValueError: PEFT is not installed, or the targets match nothing.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError(
            "LoRA: expected the package peft, which is not installed: pip install 'tracmod[peft]'"
        ) from None
    if targets is None:
        targets = _queries_and_values(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            some = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ValueError(
                f"LoRA: targets: expected names of linear layers of {type(model).__name__}, or "
                f"their last parts ({some}), got {target}"
            )
    base = model.base_model
    after = {name: child for name, child in model.named_children() if child is not base}
    after |= {name: child for name, child in base.named_children() if name == "pooler"}
    trained_whole = [name for name, child in after.items() if any(True for _ in child.parameters())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = LoraConfig(
                task_type=TASK_OF_UNIT[model_unit(model)],
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                target_modules=list(targets),
                modules_to_save=trained_whole,
                use_rslora=rank_stabilized,
            )
            peft_model = _peft_model(model, config)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"LoRA: {type(model).__name__}: {reason}") from None
    config.base_model_name_or_path = base_name  # PEFT would write where the model was read from
    own: Any = model.config
    if type(model).__name__ == MEAN_POOLING or getattr(own, "classifier_pooling", None) == "mean":
        # The base's folder need not say so. PEFT names the class of a base model here.
        kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        config.auto_mapping = kind | {"pooling": "mean"}
    return adapted_model(peft_model)


def _peft_model(model: PreTrainedModel, config: Any) -> Any:
    """Return PEFT's model of a config, without what transformers says of how PEFT makes it."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def _queries_and_values(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    layers = attention_layers(model)
    return list(dict.fromkeys(names[p] for layer in layers for p in (layer.query, layer.value)))


def _remember_adapter(adapted: Any, model: Any) -> None:
    """Give an adapted model what a folder of its adapter needs: config, and PEFT's names."""
    from peft.utils import get_peft_model_state_dict

    keys = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapted.adapter_config = model.peft_config[model.active_adapters[0]]
    adapted.adapter_keys = {plain_parameter_name(key): key for key in keys}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what an adapter folder has of an adapted model, by name; nothing of another model."""
    keys: Any = getattr(model, "adapter_keys", {})
    return {name: p for name, p in model.named_parameters() if name in keys}


def merge_adapters(model: Any) -> None:
    """Make an adapted model a plain one, in place: `W + scaling B A` in place of W."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            product = module.lora_B.weight.detach() @ module.lora_A.weight.detach()
            weight = module.weight.detach() + module.scaling * product.to(module.weight.dtype)
            linear.weight, linear.bias = nn.Parameter(weight), module.bias
            _replace(model, name, linear)
    model.adapter_keys = {}


def _check_adapter(model: Any) -> None:
    """Refuse a PEFT model that is not one of transformers with exactly one active LoRA adapter."""
    active = list(getattr(model, "active_adapters", []))
    if len(active) != 1:
        raise ValueError(f"model: expected one active adapter, got {', '.join(active) or 'none'}")
    config = model.peft_config[active[0]]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(f"model: expected a LoRA adapter, got {kind}; merge it (merge_and_unload)")
    for name, module in model.named_modules():
        fault = None
        if getattr(module, "merged_adapters", None):
            fault = "one that is not merged into the weights"
        elif _kind(module).startswith("peft.") and getattr(module, "_disable_adapters", False):
            fault = "one that is switched on"
        if fault:
            raise ValueError(f"model: expected an adapter, {fault}, got another at {name}")


def _adapted_linear(name: str, module: Any) -> AdaptedLinear:
    """Return a LoRA layer of PEFT as an `AdaptedLinear`."""
    active = module.active_adapters[0]
    base = module.base_layer
    if type(base) is not nn.Linear or active not in module.lora_A:
        raise ValueError(f"{name}: expected LoRA on a linear layer, got {type(base).__name__}")
    lora_A, lora_B = module.lora_A[active], module.lora_B[active]
    variant = getattr(module, "lora_variant", {}).get(active)
    if variant is not None or module.lora_magnitude_vector:
        kind = type(variant).__name__ if variant is not None else "DoRA"
        raise ValueError(f"{name}: expected plain LoRA or rsLoRA, got {kind}")
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        raise ValueError(f"{name}: expected low-rank linear layers, got {type(lora_A).__name__}")
    return AdaptedLinear(base, lora_A, lora_B, float(module.scaling[active]))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def check_no_adapters(model: nn.Module) -> None:
    """Raise an error if a layer is an `AdaptedLinear`, which no file format of a model has.

    Raises:
        ValueError: the model has adapters.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            raise ValueError(
                f"model: expected one without adapters, got LoRA at {name}; merge it into its base "
                f"(PEFT's merge_and_unload) before saving"
            )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def plain_parameter_name(name: str) -> str:
    """Return the name in `adapted_model` of a parameter of a PEFT model, or of its adapter folder.

    The model has one adapter, whose name is part of the names in the model, but not in the folder.

    Examples:
        >>> plain_parameter_name("base_model.model.bert.pooler.dense.base_layer.weight")
        'bert.pooler.dense.weight'
    """
    parts = name.removeprefix("base_model.model.").split(".")
    plain: list[str] = []
    for position, part in enumerate(parts):
        before = parts[position - 1] if position else ""
        in_adapter = before in ("lora_A", "lora_B", "modules_to_save") and position < len(parts) - 1
        if part not in ("base_layer", "modules_to_save") and not in_adapter:
            plain.append(part)
    return ".".join(plain)


# --- adapter folders ------------------------------------------------------------------------


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder has an adapter of PEFT and no model beside it."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def adapter_settings(folder: Path) -> Mapping[str, Any]:
    """Read and check the settings of an adapter folder.

    Raises:
        ValueError: the adapter is no LoRA adapter of a classifier, names no base model, or
            its weights are missing or damaged.
    """
    file = folder / ADAPTER_CONFIG
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(settings).__name__}")
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        raise ValueError(f"{file}: expected a LoRA adapter, got {kind}; merge it into its base")
    if settings.get("task_type") not in (*UNIT_OF_TASK, None):
        raise ValueError(
            f"{file}: expected task_type {' or '.join(UNIT_OF_TASK)}, got {settings['task_type']}"
        )
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise ValueError(f"{file}: expected base_model_name_or_path, got none")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"model {folder}: expected {ADAPTER_WEIGHTS} in the adapter's folder")
    return settings


def adapts_mean_pooling(settings: Mapping[str, Any]) -> bool:
    """Return whether the classifier under an adapter reads the mean of its tokens.

    Args:
        settings: as `adapter_settings` returns them.
    """
    names = settings.get("auto_mapping")
    return isinstance(names, dict) and names.get("pooling") == "mean"


def number_of_classes(folder: Path) -> int | None:
    """Return how many classes the classifier of an adapter folder has; None if it has none.

    Its last layer is `out_proj` (RoBERTa) or `classifier` itself (BERT).
    """
    last = re.compile(r"(.*\.)?(out_proj|classifier|score|qa_outputs)\.weight")
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
            names = [name for name in tensors.keys() if last.fullmatch(name)]  # noqa: SIM118
            return int(tensors.get_slice(names[0]).get_shape()[0]) if names else None
    except SafetensorError as error:
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS}: the weights are damaged or were not copied whole: {error}"
        ) from None


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the folder of an adapted model's adapter, as PEFT does.

    Raises:
        ValueError: a parameter is trained that no such folder has.
    """
    config: Any = copy.copy(model.adapter_config)
    keys: Any = model.adapter_keys
    lost = [n for n, p in model.named_parameters() if p.requires_grad and n not in keys]
    if lost:
        raise ValueError(f"adapter: expected {lost[0]} to be frozen or of the adapter, got neither")
    for option in ("target_modules", "modules_to_save"):  # in an order that is always the same
        names = getattr(config, option)
        if isinstance(names, (list, set)):
            setattr(config, option, sorted(set(names)))
    config.save_pretrained(str(folder))
    tensors = {
        keys[name]: parameter.detach().contiguous()
        for name, parameter in adapter_parameters(model).items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder, by the names that `adapted_model` gives them."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    return {plain_parameter_name(name): tensor for name, tensor in tensors.items()}


def load_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load an adapter folder on its base model and return the plain adapted model.

    Raises:
        ValueError: PEFT is not installed, or the adapter does not fit the base model.
    """
    try:
        from peft import PeftConfig
        from peft.utils import load_peft_weights, set_peft_model_state_dict
    except ImportError:
        raise ValueError(
            f"model {folder}: expected the package peft to load an adapter, which is not "
            f"installed: pip install 'tracmod[peft]'"
        ) from None
    expected = f"model {folder}: expected an adapter of its base model, {type(base).__name__}"
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False  # PEFT would freeze what the training moved
        base_name = config.base_model_name_or_path
        model = _peft_model(base, config)
        config.base_model_name_or_path = base_name  # PEFT writes where the base was read from
        tensors = load_peft_weights(str(folder), device="cpu")
        result: Any = set_peft_model_state_dict(model, tensors)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{expected}; it cannot be applied: {reason}") from None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    lost = sorted(map(plain_parameter_name, trained & set(result.missing_keys)))
    if lost:
        raise ValueError(f"{expected}; its weights lack {lost[0]}")
    if result.unexpected_keys:
        raise ValueError(f"{expected}, which has no place for {sorted(result.unexpected_keys)[0]}")
    return adapted_model(model)
