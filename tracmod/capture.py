"""Layer inputs and output gradients of one backward pass, with no weight gradient formed.

A parameter's per-example gradient is a sum over tokens of products of what goes into its layer
and the loss gradient at what comes out. `capture` hooks the selected layers and hands both to a
callback, layer by layer, while the backward pass runs, so that they can be used and freed at once.
Weights are frozen: autograd computes activation gradients only, and stops at the outputs of the
lowest selected layers, because those are the first tensors that require a gradient.

Shapes: B examples, S tokens, I in, O out, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracmod.model import attention_layers, embeddings_module, per_example_loss

LayerKind = Literal["linear", "elementwise", "embedding"]
PARAMETER_SETS = ("encoder", "all", "attention", "classifier")


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer whose parameters are selected.

    Attributes:
        name: path of the module in the model.
        kind: `linear` (G = sum_s g_s x_s^T), `elementwise` (LayerNorm: sum_s g_s * x_s) or
            `embedding` (row id gets g_s).
        bias: whether the bias is selected too.
        position: rank among all layers of the model, whatever is selected: the key of its
            projection, so that parameters keep the same signs whatever is selected.
        input_position: rank of the layer that owns the input; query, key and value share one.
    """

    name: str
    kind: LayerKind
    module: nn.Module
    bias: bool
    position: int
    input_position: int

    @property
    def in_features(self) -> int:
        """I of a linear layer, D of LayerNorm, rows of an embedding."""
        return self._weight_shape[1 if self.kind == "linear" else 0]

    @property
    def out_features(self) -> int:
        """O of a linear layer, 1 of LayerNorm, D of an embedding."""
        return 1 if self.kind == "elementwise" else self._weight_shape[self.kind == "embedding"]

    @property
    def _weight_shape(self) -> torch.Size:
        return self.module.get_parameter("weight").shape

    @property
    def parameter_names(self) -> list[str]:
        """Full names of the selected parameters."""
        return [f"{self.name}.weight"] + ([f"{self.name}.bias"] if self.bias else [])


@dataclass(frozen=True)
class Captured:
    """What one backward pass shows of one layer, ready for the kernels.

    Attributes:
        layer: the layer.
        x: (B, S, I) input; LayerNorm: (B, S, D) normalised input; embedding: (B, S) int64 ids.
        g: (B, S, O) gradient of each example's own loss at the output, float32 or bfloat16 (a pass
            in float16 or float64 is cast to float32); a floating x has its dtype.
        lengths: (B,) int64, tokens up to the last that is attended to; None where S is 1.
    """

    layer: Layer
    x: Tensor
    g: Tensor
    lengths: Tensor | None


def select_layers(model: nn.Module, parameters: str = "encoder") -> list[Layer]:
    """The layers that hold the selected parameters, in the model's order.

    Args:
        model: a BERT-family sequence classifier of transformers.
        parameters: `encoder` (every parameter outside the embeddings module), `all`, `attention`
            (what belongs to heads: query, key, value with bias, and the weight of the attention
            output projection, whose bias belongs to no head) or `classifier` (outside the base
            model).

    Raises:
        ValueError: unknown selection, or a selected parameter that is in no Linear, LayerNorm or
            Embedding: it would silently be left out.
    """
    if parameters not in PARAMETER_SETS:
        expected = ", ".join(PARAMETER_SETS)
        raise ValueError(f"parameters: expected one of {expected}, got {parameters!r}")
    selected = _selected_names(model, parameters)
    layers = []
    for layer in _all_layers(model):
        weight, bias = f"{layer.name}.weight" in selected, f"{layer.name}.bias" in selected
        if weight:
            layers.append(Layer(**{**vars(layer), "bias": bias}))
            selected -= {f"{layer.name}.weight", f"{layer.name}.bias"}
    if selected:
        raise ValueError(
            f"parameters: expected every selected parameter to be a weight or bias of Linear, "
            f"LayerNorm or Embedding, got {', '.join(sorted(selected)[:5])}"
        )
    return layers


def _all_layers(model: nn.Module) -> list[Layer]:
    kinds: list[tuple[type[nn.Module], LayerKind]] = [
        (nn.Linear, "linear"),
        (nn.LayerNorm, "elementwise"),
        (nn.Embedding, "embedding"),
    ]
    shared_input = {}
    for attention in attention_layers(model):
        shared_input[attention.key] = attention.query
        shared_input[attention.value] = attention.query
    layers: list[Layer] = []
    position_of: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        kind = next((kind for cls, kind in kinds if isinstance(module, cls)), None)
        if kind is None or next(module.parameters(recurse=False), None) is None:
            continue
        position = position_of[module] = len(position_of)
        owner = position_of[shared_input.get(module, module)]
        layers.append(Layer(name, kind, module, True, position, owner))
    return layers


def _selected_names(model: nn.Module, parameters: str) -> set[str]:
    names = {name for name, _ in model.named_parameters()}
    prefix = {module: name for name, module in model.named_modules()}
    if parameters == "all":
        return names
    if parameters == "encoder":
        embeddings = prefix[embeddings_module(model)] + "."
        return {name for name in names if not name.startswith(embeddings)}
    if parameters == "classifier":
        base = prefix[model.base_model] + "."
        return {name for name in names if not name.startswith(base)}
    heads = set()
    for attention in attention_layers(model):
        for module in (attention.query, attention.key, attention.value):
            heads |= {f"{prefix[module]}.weight", f"{prefix[module]}.bias"}
        heads.add(f"{prefix[attention.output]}.weight")
    return heads & names


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients; both are put back afterwards.

    Within it autograd records, also inside `torch.no_grad()` or `torch.inference_mode()`.
    """
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, require in required:
            parameter.requires_grad_(require)


def capture(
    model: nn.Module,
    layers: list[Layer],
    batch: Mapping[str, Tensor],
    on_layer: Callable[[Captured], None],
    dtype: torch.dtype | None = None,
) -> None:
    """One forward and one backward pass; `on_layer` is called once for every selected layer.

    The loss is each example's own, not averaged over the batch: averaged gradients would be scaled
    by 1/B, so that a short last batch counts more.

    Args:
        model: a sequence classifier within `frozen`; head masks, if any, applied.
        layers: from `select_layers`.
        batch: `input_ids` (B, S), `attention_mask` (B, S), `labels` (B,), on the model's device.
        on_layer: receives what was captured, from the last layer to the first.
        dtype: bfloat16 or float16 for autocast; None for the model's own.

    Raises:
        ValueError: a layer that runs twice in one pass (its parameters are shared across depth), or
            a loss that no selected layer reaches.
    """
    lengths = token_lengths(batch["attention_mask"])
    num_examples = len(lengths)
    seen: set[str] = set()
    with ExitStack() as stack:
        for layer in layers:
            hook = _forward_hook(layer, num_examples, lengths, on_layer, seen)
            stack.callback(layer.module.register_forward_hook(hook).remove)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with _autocast(lengths.device.type, dtype):
            loss_B = per_example_loss(model(**inputs).logits, batch["labels"])
        if loss_B.requires_grad:
            torch.autograd.backward(loss_B.sum())
        elif layers:
            raise ValueError(
                f"{type(model).__name__}: expected a loss that depends on the selected layers, "
                f"got one that requires no gradient"
            )


def token_lengths(attention_mask_BS: Tensor) -> Tensor:
    """Tokens up to and including the last one that is attended to, (B,) int64."""
    position_S = torch.arange(1, attention_mask_BS.shape[1] + 1, device=attention_mask_BS.device)
    return (attention_mask_BS.ne(0) * position_S).amax(dim=1)


def _autocast(device_type: str, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _forward_hook(
    layer: Layer,
    num_examples: int,
    lengths: Tensor,
    on_layer: Callable[[Captured], None],
    seen: set[str],
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if layer.name in seen:
            raise ValueError(
                f"{layer.name}: expected each layer to run once in a forward pass, it ran twice "
                f"(parameters shared across depth are not supported)"
            )
        seen.add(layer.name)
        if not output.requires_grad:  # nothing below is selected: the backward pass ends here
            output = output.detach().requires_grad_()
        if output.shape[0] != num_examples:  # BERT looks positions up once for the whole batch
            output = output.expand(num_examples, *output.shape[1:])
        x = args[0].detach()

        def gradient_hook(g: Tensor) -> None:
            on_layer(_captured(layer, x, g, lengths))

        output.register_hook(gradient_hook)
        return output

    return forward_hook


def _captured(layer: Layer, x: Tensor, g: Tensor, lengths: Tensor) -> Captured:
    g = g if g.dtype in (torch.float32, torch.bfloat16) else g.float()  # what the kernels take
    module = layer.module
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(x, module.normalized_shape, eps=module.eps).to(g.dtype)
    elif isinstance(module, nn.Embedding):
        x = x.expand(g.shape[0], -1)
        if module.padding_idx is not None:  # autograd gives the padding row no gradient either
            g = g.masked_fill((x == module.padding_idx)[..., None], 0)
    else:
        x = x.to(g.dtype)
    if g.dim() == 2:
        x, g = x[:, None], g[:, None]
    whole = g.shape[1] == 1
    return Captured(layer, x.contiguous(), g.contiguous(), None if whole else lengths)
