"""Layer inputs and output gradients of one backward pass, with no weight gradient formed.

A parameter's per-example gradient is a sum over tokens of products of what goes into its layer
and the loss gradient at what comes out. `capture` hooks the selected layers and hands both to a
callback while the backward pass runs, so that they can be used and freed at once; layers that read
the same input (query, key, value) come together. Weights are frozen: autograd computes activation
gradients only, and stops at the outputs of the lowest selected layers, because those are the first
tensors that require a gradient.

Shapes: B examples, S tokens, I in, O out, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracmod.choices import ParameterSet
from tracmod.gradients.lean_pass import Columns, Kept
from tracmod.models.architecture import attention_layers, embeddings_module
from tracmod.models.inputs import per_example_loss

LayerKind = Literal["linear", "elementwise", "embedding"]
PARAMETER_SETS = get_args(ParameterSet)


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
        pooled: lies beyond the encoder's layers (pooler, classifier), where an example is one
            vector: its gradient is a single product g x^T.
    """

    name: str
    kind: LayerKind
    module: nn.Module
    bias: bool
    position: int
    input_position: int
    pooled: bool

    # The module's own sizes, not its weight's: `lean` may have taken heads out of that.

    @property
    def in_features(self) -> int:
        """I of a linear layer, D of LayerNorm, rows of an embedding."""
        module: Any = self.module
        if self.kind == "linear":
            return module.in_features
        return module.weight.numel() if self.kind == "elementwise" else module.num_embeddings

    @property
    def out_features(self) -> int:
        """O of a linear layer, 1 of LayerNorm, D of an embedding."""
        module: Any = self.module
        if self.kind == "linear":
            return module.out_features
        return 1 if self.kind == "elementwise" else module.embedding_dim

    @property
    def parameter_names(self) -> list[str]:
        """Full names of the selected parameters."""
        return [f"{self.name}.weight"] + ([f"{self.name}.bias"] if self.bias else [])


@dataclass(frozen=True)
class Captured:
    """What one backward pass shows of a layer, or of layers that read the same input.

    Attributes:
        layers: the layer; of linear layers maybe several (query, key, value).
        x: (B, S, I) input; LayerNorm: (B, S, D) normalised input; embedding: (B, S) int64 ids.
        g: for each layer (B, S, O), the gradient of each example's own loss at its output, float32
            or bfloat16 (a pass in float16 or float64 is cast to float32); a floating x has its
            dtype.
        lengths: (B,) int64, tokens up to the last that is attended to; None where S is 1.
        input_columns: numbers of x's columns and, with a bias, of its column of ones; None: all.
        output_columns: for each layer the numbers of g's columns; None: all.
    """

    layers: tuple[Layer, ...]
    x: Tensor
    g: tuple[Tensor, ...]
    lengths: Tensor | None
    input_columns: Tensor | None = None
    output_columns: tuple[Tensor | None, ...] = (None,)

    def of(self, places: Sequence[int]) -> Captured:
        """The same of some of the layers."""
        return replace(
            self,
            layers=tuple(self.layers[place] for place in places),
            g=tuple(self.g[place] for place in places),
            output_columns=tuple(self.output_columns[place] for place in places),
        )

    def with_all_columns(self) -> Captured:
        """The same with zeros in the columns of heads that were left out."""
        x, widths = self.x, [layer.out_features for layer in self.layers]
        if self.input_columns is not None:
            x = _widened(x, self.input_columns[: x.shape[-1]], self.layers[0].in_features)
        g = tuple(
            one if columns is None else _widened(one, columns, width)
            for one, columns, width in zip(self.g, self.output_columns, widths, strict=True)
        )
        return replace(self, x=x, g=g, input_columns=None, output_columns=(None,) * len(g))

    @property
    def num_bytes(self) -> int:
        """Of x and g."""
        return self.x.nbytes + sum(g.nbytes for g in self.g)


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
    attentions = attention_layers(model)
    for attention in attentions:
        shared_input[attention.key] = attention.query
        shared_input[attention.value] = attention.query
    names = {module: name for name, module in model.named_modules()}
    numbered = re.split(r"\.\d+\.", names[attentions[0].query], maxsplit=1)[0]
    per_token = (f"{numbered}.", names[embeddings_module(model)])  # ELECTRA: embeddings_project too
    layers: list[Layer] = []
    position_of: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        kind = next((kind for cls, kind in kinds if isinstance(module, cls)), None)
        if kind is None or next(module.parameters(recurse=False), None) is None:
            continue
        position = position_of[module] = len(position_of)
        owner = position_of[shared_input.get(module, module)]
        pooled = kind == "linear" and not name.startswith(per_token)
        layers.append(Layer(name, kind, module, True, position, owner, pooled))
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


def capture(
    model: nn.Module,
    layers: list[Layer],
    batch: Mapping[str, Tensor],
    on_captured: Callable[[Captured], None],
    dtype: torch.dtype | None = None,
    kept: Kept | None = None,
) -> None:
    """One forward and one backward pass; every selected layer is in one call of `on_captured`.

    The loss is each example's own, not averaged over the batch: averaged gradients would be scaled
    by 1/B, so that a short last batch counts more.

    Args:
        model: a sequence classifier within `frozen`; head masks, if any, applied.
        layers: from `select_layers`.
        batch: `input_ids` (B, S), `attention_mask` (B, S), `labels` (B,), on the model's device.
        on_captured: receives what was captured, from the last layer to the first.
        dtype: bfloat16 or float16 for autocast; None for the model's own.
        kept: what `lean` yields, within its context.

    Raises:
        ValueError: a layer that runs twice in one pass (its parameters are shared across depth), or
            a loss that no selected layer reaches.
    """
    lengths = token_lengths(batch["attention_mask"])
    groups = _Groups(lengths, on_captured, kept or {})
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(groups.hook(layer)).remove)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        inputs["attention_mask"] = _attention_mask(model, batch["attention_mask"])
        with _autocast(lengths.device.type, dtype):
            loss_B = per_example_loss(model(**inputs).logits, batch["labels"])
        if loss_B.requires_grad:
            torch.autograd.backward(loss_B.sum())
        elif layers:
            raise ValueError(
                f"{type(model).__name__}: expected a loss that depends on the selected layers, "
                f"got one that requires no gradient"
            )
        groups.finish()


def token_lengths(attention_mask_BS: Tensor) -> Tensor:
    """Tokens up to and including the last one that is attended to, (B,) int64."""
    position_S = torch.arange(1, attention_mask_BS.shape[1] + 1, device=attention_mask_BS.device)
    return (attention_mask_BS.ne(0) * position_S).amax(dim=1)


def _attention_mask(model: Any, mask_BS: Tensor) -> Tensor:
    """The mask in the form that attention takes: made by transformers, each batch waits for a GPU.

    It looks whether all of the mask is set, and only then is it free to leave it out.
    """
    if model.config._attn_implementation != "sdpa":
        return mask_BS
    batch, tokens = mask_BS.shape
    return mask_BS.bool()[:, None, None, :].expand(batch, 1, tokens, tokens)


def _autocast(device_type: str, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@dataclass
class _Group:
    """Layers of one pass that read the same tensor, and the gradients that have come so far."""

    x: Tensor
    layers: list[Layer] = field(default_factory=list)
    g: dict[str, Tensor] = field(default_factory=dict)


class _Groups:
    """Puts together what the hooks of one pass show, and hands it on when a group is whole."""

    def __init__(
        self, lengths: Tensor, on_captured: Callable[[Captured], None], kept: Kept
    ) -> None:
        self.lengths, self.on_captured, self.kept = lengths, on_captured, kept
        self.seen: set[str] = set()
        self.groups: dict[Any, _Group] = {}

    def hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """The layer's forward hook: notes its input, and has its output's gradient noted."""

        def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if layer.name in self.seen:
                raise ValueError(
                    f"{layer.name}: expected each layer to run once in a forward pass, it ran "
                    f"twice (parameters shared across depth are not supported)"
                )
            self.seen.add(layer.name)
            if not output.requires_grad:  # nothing below is selected: the backward pass ends here
                output = output.detach().requires_grad_()
            batch = len(self.lengths)
            if output.shape[0] != batch:  # BERT looks positions up once for the whole batch
                output = output.expand(batch, *output.shape[1:])
            # Layers may share an input where its position is the same, and do where the tensor is.
            key = (layer.input_position, args[0].data_ptr(), args[0].shape)
            self.groups.setdefault(key, _Group(args[0].detach())).layers.append(layer)

            def gradient_hook(g: Tensor) -> None:
                group = self.groups[key]
                group.g[layer.name] = g
                if len(group.g) == len(group.layers):
                    self.hand_on(key)

            output.register_hook(gradient_hook)
            return output

        return forward_hook

    def hand_on(self, key: Any) -> None:
        """Give a group's layers to the callback and forget them, so that memory can be freed."""
        self.on_captured(_captured(self.groups.pop(key), self.lengths, self.kept))

    def finish(self) -> None:
        """Hand on groups of which the loss reached some layers and not all."""
        for key, group in list(self.groups.items()):
            group.layers = [layer for layer in group.layers if layer.name in group.g]
            if group.layers:
                self.hand_on(key)


def _captured(group: _Group, lengths: Tensor, kept: Kept) -> Captured:
    module = group.layers[0].module
    gs = [_for_kernels(group.g[layer.name]) for layer in group.layers]
    x, whole = group.x, gs[0].dim() == 2 or gs[0].shape[1] == 1
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(x, module.normalized_shape, eps=module.eps).to(gs[0].dtype)
    elif isinstance(module, nn.Embedding):
        x = x.expand(gs[0].shape[0], -1)
        if module.padding_idx is not None:  # autograd gives the padding row no gradient either
            gs = [g.masked_fill((x == module.padding_idx)[..., None], 0) for g in gs]
    else:
        x = x.to(gs[0].dtype)
    if gs[0].dim() == 2:
        x, gs = x[:, None], [g[:, None] for g in gs]
    columns = [kept.get(layer.module, Columns(None, None)) for layer in group.layers]
    return Captured(
        tuple(group.layers),
        x.contiguous(),
        tuple(g.contiguous() for g in gs),
        None if whole else lengths,
        columns[0].input,
        tuple(one.output for one in columns),
    )


def _widened(narrow: Tensor, columns: Tensor, width: int) -> Tensor:
    wide = narrow.new_zeros(*narrow.shape[:-1], width)
    return wide.index_copy_(-1, columns, narrow)


def _for_kernels(g: Tensor) -> Tensor:
    return g if g.dtype in (torch.float32, torch.bfloat16) else g.float()
