"""Capture the inputs and output gradients of layers, from which per-example gradients follow.

The gradient of a layer's parameters for one example is a sum over tokens of products of the layer's
input and of the loss gradient at its output, for a linear layer `G = sum_s g_s x_s^T`. So one
forward and one backward pass for a whole batch contain the gradients of all of its examples, and no
weight gradient has to be formed. Three decisions make this cheap:

- Weights are frozen (`models.modes.frozen`), so autograd computes activation gradients only. It
  stops at the outputs of the lowest selected layers: a forward hook makes an output require a
  gradient if nothing below it does.
- x and g are passed to a callback as soon as the backward pass has reached a layer, and are then
  forgotten. At any time, only a few layers' tensors are in memory in addition to the activations.
- Layers that read the same tensor (query, key and value) are passed on together, because their
  input needs to be projected only once (see `kernels.project_gradients`).

Shape suffixes: B examples, S tokens, I in, O out, D width of LayerNorm or embedding.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tracmod.choices import ParameterSelection, check_selection, switch
from tracmod.gradients.lean_pass import Columns, LeanColumns
from tracmod.gradients.selection import matching_names
from tracmod.kernels import LayerKind
from tracmod.models.architecture import (
    answers_questions,
    attention_layers,
    embeddings_module,
    family_of,
    is_token_classifier,
)
from tracmod.models.architecture.family import is_rms_norm, normalized
from tracmod.models.loss import ExampleLoss, loss_of_batch
from tracmod.models.modes import ModelState, trained_names
from tracmod.models.plain_pass import Batch, batches, model_logits

# Parts of the names of adapters' parameters: LoRA's matrices, and X-MOD's adapter of each language.
ADAPTERS = {"lora_A", "lora_B", "adapter_modules"}


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose parameters are selected.

    Attributes:
        name: Path of the module in the model.
        kind: `linear` (G = sum_s g_s x_s^T), `elementwise` (LayerNorm: sum_s g_s * x_s) or
            `embedding` (g_s is added to row id_s).
        module: The module.
        bias: Whether its bias is selected, too.
        only_bias: Whether its bias alone is selected. It is then treated as the weight of a layer
            without bias whose input is a column of ones (for LayerNorm, all ones), and `bias` is
            False.
        position: Rank among all layers of the model, selected or not. The key of the layer's
            projection is made from it, so a parameter has the same signs in every selection.
        input_position: Position of the first layer that reads the same input, by which layers that
            share an input (query, key and value) are recognised.
        few_tokens: Whether an example usually has a single token here, so that its gradient is a
            single product g x^T: a linear layer outside the encoder's layers (pooler, classifier),
            or in the last encoder layer, except key and value; never so in a token classifier. It
            depends on the layer alone. A model that reads more than the first position has all
            tokens in its last layer.
    """

    name: str
    kind: LayerKind
    module: nn.Module
    bias: bool
    position: int
    input_position: int
    few_tokens: bool
    only_bias: bool = False

    # The sizes are those of the module, because `lean` may replace its weight by a narrower one.

    @property
    def in_features(self) -> int:
        """I of a linear layer, D of LayerNorm, the number of ids of an embedding."""
        module: Any = self.module
        if self.kind == "linear":
            return 1 if self.only_bias else module.in_features
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
        if self.only_bias:
            return [f"{self.name}.bias"]
        return [f"{self.name}.weight"] + ([f"{self.name}.bias"] if self.bias else [])


@dataclass(frozen=True)
class Captured:
    """Input and output gradients of one layer, or of layers that read the same input.

    Attributes:
        layers: The layers; more than one only for linear layers (query, key, value).
        x: (B, S, I) input; for LayerNorm the normalised input (B, S, D); for an embedding (B, S)
            int64 ids.
        g: For each layer, (B, S, O) gradients of each example's own loss at the output. float32 or
            bfloat16, which the kernels take; those of a pass in float16 or float64 are converted
            to float32. A floating-point x has the same dtype.
        lengths: (B,) int64 numbers of tokens up to the last one that is attended to; None if S = 1.
        input_columns: If columns of x were left out (masked heads), the numbers of the remaining
            ones in the complete layer, followed by that of the bias's column of ones; or None.
        output_columns: For each layer, the numbers of the columns of g if some were left out, or
            None.
    """

    layers: tuple[Layer, ...]
    x: Tensor
    g: tuple[Tensor, ...]
    lengths: Tensor | None
    input_columns: Tensor | None = None
    output_columns: tuple[Tensor | None, ...] = (None,)

    def of(self, positions: Sequence[int]) -> Captured:
        """Return the part for some of the layers, given by their positions in `layers`."""
        return replace(
            self,
            layers=tuple(self.layers[position] for position in positions),
            g=tuple(self.g[position] for position in positions),
            output_columns=tuple(self.output_columns[position] for position in positions),
        )

    def with_all_columns(self) -> Captured:
        """Return the same with zeros in the columns that were left out."""
        x, widths = self.x, [layer.out_features for layer in self.layers]
        if self.input_columns is not None:
            x = _widened(x, self.input_columns[: x.shape[-1]], self.layers[0].in_features)
        g = tuple(
            g_BSO if columns is None else _widened(g_BSO, columns, width)
            for g_BSO, columns, width in zip(self.g, self.output_columns, widths, strict=True)
        )
        return replace(self, x=x, g=g, input_columns=None, output_columns=(None,) * len(g))

    @property
    def num_bytes(self) -> int:
        """The bytes of x and g."""
        return self.x.nbytes + sum(g.nbytes for g in self.g)


def select_layers(
    model: nn.Module, parameters: ParameterSelection = "encoder", include_frozen: bool = False
) -> list[Layer]:
    """Return the layers with the selected parameters, in the order of the model.

    Training does not move a parameter with `requires_grad=False`, so its gradient has no part in
    the influence of an example. Such parameters are left out, unless they are frozen only within
    `models.modes.frozen`.

    Args:
        model: A classifier of texts or tokens of transformers.
        parameters: `encoder` (all parameters outside the embeddings module), `all`, `attention`
            (what belongs to heads: query, key and value with biases, and the weight of the
            attention output projection, whose bias belongs to no head, with the matrices of LoRA
            that the heads divide), `classifier` (outside the base model) or `adapter` (LoRA's
            matrices, or X-MOD's language adapters); or patterns of names, or a function of a name
            (`matching_names`).
        include_frozen: Whether parameters with `requires_grad=False` are selected, too.

    Raises:
        ValueError: The selection is unknown or matches nothing, or a selected parameter is not part
            of a Linear, LayerNorm or Embedding module (it would be left out silently), or of two of
            them.
    """
    check_selection("parameters", parameters)
    selected = _selected_names(model, parameters)
    if not switch("include_frozen", include_frozen):
        frozen = set(frozen_names(model, parameters))
        if frozen and frozen >= selected:
            raise ValueError(
                f"parameters {_described(parameters)}: expected some that training moves, all "
                f"{len(frozen)} are frozen (requires_grad=False); set requires_grad of those that "
                f"were trained, or include frozen ones (include_frozen=True, --include-frozen)"
            )
        selected -= frozen
    _check_untied(model, selected)
    layers = []
    for layer in _all_layers(model):
        weight, bias = f"{layer.name}.weight" in selected, f"{layer.name}.bias" in selected
        if weight or bias:
            only_bias = bias and not weight
            layers.append(replace(layer, bias=bias and weight, only_bias=only_bias))
            selected -= {f"{layer.name}.weight", f"{layer.name}.bias"}
    if selected:
        raise ValueError(
            f"parameters: expected weights and biases of Linear, LayerNorm, RMSNorm and Embedding "
            f"modules, got {', '.join(sorted(selected)[:5])}"
        )
    return layers


def frozen_names(model: nn.Module, parameters: ParameterSelection = "encoder") -> list[str]:
    """Return the selected parameters with `requires_grad=False`, in the order of the model."""
    selected, trained = _selected_names(model, parameters), trained_names(model)
    return [
        name for name, _ in model.named_parameters() if name in selected and name not in trained
    ]


def warn_of_frozen(model: nn.Module, parameters: ParameterSelection, include_frozen: bool) -> None:
    """Warn the caller of a public function of the frozen parameters that it leaves out."""
    check_selection("parameters", parameters)
    names = [] if include_frozen else frozen_names(model, parameters)
    if names:
        warnings.warn(
            f"{describe_frozen(names)}; include_frozen=True includes them",
            FrozenParametersWarning,
            stacklevel=3,
        )


class FrozenParametersWarning(UserWarning):
    """Selected parameters are left out because they are frozen."""


@contextmanager
def frozen_as_configured() -> Iterator[None]:
    """Keep `FrozenParametersWarning` quiet where a configuration or a note says what is frozen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FrozenParametersWarning)
        yield


def describe_frozen(names: Sequence[str]) -> str:
    """Return a clause that says which frozen parameters are left out."""
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} frozen parameters (not trained) are left out: {some}"


def _all_layers(model: nn.Module) -> list[Layer]:
    """Return every layer of the model with parameters, numbered in the order of its modules."""
    shared_input = {}
    attentions = attention_layers(model)
    for attention in attentions:
        shared_input[attention.key] = attention.query
        shared_input[attention.value] = attention.query
    names = {module: name for name, module in model.named_modules()}
    # Layers under `encoder.layer` and the embeddings (and ELECTRA's `embeddings_project`) see every
    # token; other linear layers see one vector per example. Of the last encoder layer, a lean pass
    # computes the first position only, except key and value, if the family has such a pass. A model
    # that classifies tokens, or finds answers, has all of them in every layer.
    encoder_layers = re.split(r"\.\d+\.", names[attentions[0].query], maxsplit=1)[0]
    family, last = family_of(model), attentions[-1]
    others = family.layers_of_tokens(model)
    per_token = (f"{encoder_layers}.", *(names[module] for module in others))
    per_token += (names[embeddings_module(model)],)
    lean = family.lean_last_layer(model, last)
    in_last_layer = set() if lean is None else set(lean[0].modules()) - {last.key, last.value}
    of_tokens = is_token_classifier(model) or answers_questions(model)
    layers: list[Layer] = []
    position_of: dict[nn.Module, int] = {}
    for name, module in model.named_modules():
        kind = _kind_of(module)
        if kind is None or next(module.parameters(recurse=False), None) is None:
            continue
        position = position_of[module] = len(position_of)
        owner = position_of[shared_input.get(module, module)]
        few_tokens = (
            kind == "linear"
            and not of_tokens
            and (not name.startswith(per_token) or module in in_last_layer)
        )
        layers.append(Layer(name, kind, module, True, position, owner, few_tokens))
    return layers


def _kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer, or None if the module is of no kind that can be captured."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "elementwise" if isinstance(module, nn.LayerNorm) or is_rms_norm(module) else None


def _check_untied(model: nn.Module, selected: set[str]) -> None:
    """Raise an error if two modules share a selected parameter: one would be left out silently."""
    owner_of: dict[nn.Parameter, str] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            other = owner_of.setdefault(parameter, full_name)
            if other != full_name and names[parameter] in selected:
                raise ValueError(
                    f"{other}: expected a parameter of one module, but {full_name} is the same "
                    f"(parameters that modules share are not supported)"
                )


def _described(parameters: ParameterSelection) -> str:
    if callable(parameters):
        return "chosen by a function"
    return repr(parameters) if isinstance(parameters, str) else ", ".join(map(repr, parameters))


def chosen_names(model: nn.Module, parameters: ParameterSelection) -> list[str]:
    """Return the full names of the selected parameters, in the order of the model."""
    selected = _selected_names(model, parameters)
    return [name for name, _ in model.named_parameters() if name in selected]


def _selected_names(model: nn.Module, parameters: ParameterSelection) -> set[str]:
    """Return the full names of the selected parameters."""
    if not isinstance(parameters, str):
        return matching_names([name for name, _ in model.named_parameters()], parameters)
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
    if parameters == "adapter":
        in_adapters = {name for name in names if ADAPTERS & set(name.split("."))}
        if not in_adapters:
            raise ValueError(
                f"parameters 'adapter': expected a model with LoRA or language adapters, got "
                f"{type(model).__name__} without"
            )
        return in_adapters
    of_heads = set()
    for attention in attention_layers(model):
        for module in attention.projections:
            of_heads |= {f"{prefix[module]}.{part}" for part in ("weight", "bias", "lora_B.weight")}
        of_heads |= {f"{prefix[attention.output]}.{part}" for part in ("weight", "lora_A.weight")}
    return of_heads & names  # some models have no biases there, and most have no adapters


@dataclass(frozen=True)
class ModelPass:
    """How batches go through a model; `verified_pass` chooses it.

    The default is the model's own pass: it makes the attention mask itself, and examples are padded
    to a common length.

    Attributes:
        lean_columns: What `lean` yields, if the pass is run in its context.
        ready_mask: Whether the attention mask is handed over as (B, 1, S, S), ready to use.
        alone: Whether every example is a batch by itself, as it was given.
        state: What is restored after every pass; None for a model whose state the caller restores.
    """

    lean_columns: LeanColumns = field(default_factory=dict)
    ready_mask: bool = False
    alone: bool = False
    state: ModelState | None = None

    def batches(
        self, model: Any, examples: Sequence[Mapping[str, Any]], batch_tokens: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """Yield the row numbers and inputs of batches, as `models.plain_pass.batches` does."""
        return batches(model, examples, batch_tokens, self.alone)


def capture(
    model: nn.Module,
    layers: list[Layer],
    batch: Mapping[str, Tensor],
    on_captured: Callable[[Captured], None],
    dtype: torch.dtype | None = None,
    model_pass: ModelPass | None = None,
    *,
    loss: ExampleLoss | None = None,
) -> None:
    """Run one forward and one backward pass; pass every selected layer to `on_captured` once.

    The losses of the examples are summed, not averaged: averaged gradients would be scaled by 1/B,
    and the examples of a short last batch would count more.

    Args:
        model: A classifier within `frozen`, with a head mask applied if there is one.
        layers: The layers to capture, from `select_layers`.
        batch: `input_ids` (B, S), `attention_mask` (B, S), `labels` (B,), (B, C) or (B, S), on the
            model's device.
        on_captured: Called with what was captured, from the last layer to the first.
        dtype: bfloat16 or float16 for a pass under autocast; None for the dtype of the model.
        model_pass: What `verified_pass` yields, within its context; None for the model's own pass.
        loss: The loss; None for the one that transformers chooses for the model and the labels.

    Raises:
        ValueError: The loss depends on no selected layer.
    """

    def loss_of(logits_BC: Tensor) -> Tensor:
        labels = batch["labels"]
        return loss_of_batch(model, labels, loss)(logits_BC, labels).sum()

    capture_loss(model, layers, batch, on_captured, loss_of, dtype, model_pass)


def capture_loss(
    model: nn.Module,
    layers: list[Layer],
    batch: Mapping[str, Tensor],
    on_captured: Callable[[Captured], None],
    loss_of: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
    model_pass: ModelPass | None = None,
) -> None:
    """Run `capture` for any loss: a function of the model's logits that returns a number."""
    model_pass = model_pass or ModelPass()
    lengths = token_lengths(batch["attention_mask"])
    if model_pass.alone:  # a model whose loss may depend on padding, too
        lengths = torch.full_like(lengths, batch["attention_mask"].shape[1])
    groups = _Groups(lengths, on_captured, model_pass.lean_columns)
    with ExitStack() as stack:
        if model_pass.state is not None:
            stack.callback(model_pass.state.restore)
        for layer in layers:
            # Before any hook of the user, which may change the output.
            hook = layer.module.register_forward_hook(groups.hook(layer), prepend=True)
            stack.callback(hook.remove)
        count, tokens = batch["attention_mask"].shape
        stack.enter_context(family_of(model).examples_apart(model, count, tokens))
        inputs = dict(batch)
        if model_pass.ready_mask:
            inputs["attention_mask"] = ready_mask(batch["attention_mask"])
        # Entered without a dtype, too: it then turns off any autocast of the caller.
        with torch.autocast(lengths.device.type, dtype, enabled=dtype is not None):
            loss = loss_of(model_logits(model, inputs))
        if loss.requires_grad:
            torch.autograd.backward(loss)
        elif layers:
            raise ValueError(
                f"{type(model).__name__}: expected a loss that depends on the selected layers, "
                f"got one that requires no gradient"
            )
        groups.finish()


def token_lengths(attention_mask_BS: Tensor) -> Tensor:
    """Return the number of tokens up to the last one that is attended to, (B,) int64."""
    position_S = torch.arange(1, attention_mask_BS.shape[1] + 1, device=attention_mask_BS.device)
    return (attention_mask_BS.ne(0) * position_S).amax(dim=1)


def ready_mask(mask_BS: Tensor) -> Tensor:
    """Return the mask in the form that scaled-dot-product attention takes, (B, 1, S, S).

    transformers would make it from (B, S), but it first checks whether all of the mask is set, in
    which case it needs no mask. That check waits for the GPU in every batch. A model whose mask
    depends on more than padding, such as a decoder's, needs to make its own.
    """
    batch, tokens = mask_BS.shape
    return mask_BS.bool()[:, None, None, :].expand(batch, 1, tokens, tokens)


@dataclass
class _Call:
    """One call of a layer in a pass: its input, and the gradient at its output once it is there."""

    x: Tensor  # keeps the memory of the input alive, so no other group can have its address
    g: Tensor | None = None


class _Groups:
    """Collects what the hooks of one pass see, and passes a group on when it is complete.

    A group is the layers of one pass that read the same tensor. The forward pass runs the hooks of
    a group's layers one after the other, so a group has all of its layers before the backward pass
    begins; the backward pass then brings their gradients. A layer that a model calls several times
    (parameters shared across depth) is a group by itself, complete with the gradients of all calls.
    """

    def __init__(
        self, lengths: Tensor, on_captured: Callable[[Captured], None], lean_columns: LeanColumns
    ) -> None:
        self.lengths, self.on_captured, self.lean_columns = lengths, on_captured, lean_columns
        self.calls: dict[str, list[_Call]] = {}
        self.groups: dict[Any, list[Layer]] = {}  # by what their layers have in common
        self.key_of: dict[str, Any] = {}

    def hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """Return the forward hook of a layer, which records its input and its output's gradient."""

        def forward_hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # The model stops the gradient here, or calls the layer for no example (X-MOD's adapters
            # of other languages).
            if not torch.is_grad_enabled() or not len(output):
                return output
            if not output.requires_grad:  # no selected layer below: the backward pass ends here
                output = output.detach().requires_grad_()
            batch = len(self.lengths)
            # BERT looks position embeddings up once for the batch, (1, S, D). Expanded, every
            # example has a gradient of its own.
            if output.shape[0] != batch:
                output = output.expand(batch, *output.shape[1:])
            call = _Call(args[0].detach())
            calls = self.calls.setdefault(layer.name, [])
            calls.append(call)
            self._join_group(layer, args[0], is_first=len(calls) == 1)

            def gradient_hook(g: Tensor) -> None:
                call.g = g
                group = self.groups[self.key_of[layer.name]]
                if all(call.g is not None for own in group for call in self.calls[own.name]):
                    self.pass_on(self.key_of[layer.name])

            output.register_hook(gradient_hook)
            return output

        return forward_hook

    def _join_group(self, layer: Layer, x: Tensor, is_first: bool) -> None:
        """Put a layer into the group of its input, or into one of its own if it is called again."""
        # The position says which layers read the same input in the architecture; the tensor says
        # whether they do in this pass. In a lean last layer the query does not. An address
        # identifies the tensor, because the group keeps its memory from being reused. Whether
        # weight and bias are selected is the same for all layers of a group.
        key: Any = (layer.input_position, x.data_ptr(), x.shape, layer.bias, layer.only_bias)
        if not is_first:
            previous, key = self.key_of[layer.name], layer.name
            self.groups[previous].remove(layer)
            if not self.groups[previous]:
                del self.groups[previous]
        self.groups.setdefault(key, []).append(layer)
        self.key_of[layer.name] = key

    def pass_on(self, key: Any) -> None:
        """Pass a group to the callback and forget it, so that its memory can be freed."""
        layers = self.groups.pop(key)
        calls = [self.calls.pop(layer.name) for layer in layers]
        self.on_captured(_captured(layers, calls, self.lengths, self.lean_columns))

    def finish(self) -> None:
        """Pass on groups in which only some layers or calls received a gradient."""
        for key, layers in list(self.groups.items()):
            for layer in layers:
                calls = self.calls[layer.name]
                self.calls[layer.name] = [call for call in calls if call.g is not None]
            self.groups[key] = [layer for layer in layers if self.calls[layer.name]]
            if self.groups[key]:
                self.pass_on(key)


def _captured(
    layers: list[Layer], calls: list[list[_Call]], lengths: Tensor, lean_columns: LeanColumns
) -> Captured:
    """Convert a complete group to `Captured`: several layers with one call, or one with several."""
    columns = [lean_columns.get(layer.module, Columns(None, None)) for layer in layers]
    if len(calls[0]) == 1:
        gradients = [own[0].g for own in calls]
        x, gs, token_counts = _tokens(layers[0], calls[0][0].x, gradients, lengths)
    else:
        # Calls are further tokens of the same product. Padding is then no longer at the end, so
        # its gradients are set to 0 instead.
        of_calls = [_tokens(layers[0], call.x, [call.g], lengths) for call in calls[0]]
        parts = [_without_padding(*of_call) for of_call in of_calls]
        x = torch.cat([x_BSI for x_BSI, _ in parts], dim=1)
        gs, token_counts = [torch.cat([g_BSO for _, g_BSO in parts], dim=1)], None
    return Captured(
        tuple(layers),
        x.contiguous(),
        tuple(g.contiguous() for g in gs),
        token_counts,
        None if layers[0].only_bias else columns[0].input,
        tuple(layer_columns.output for layer_columns in columns),
    )


def _tokens(
    layer: Layer, x: Tensor, gradients: Sequence[Tensor | None], lengths: Tensor
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Convert what the hooks of a call saw to input and output gradients as in `Captured`.

    An input with further dimensions between examples and features (the heads of a normalised query,
    rows of a table) has as many tokens as these have entries. None of them is padding: where a
    model has padding in them, its gradient is 0.

    Args:
        layer: a layer of the call's group.
        x: input of the call.
        gradients: gradients at the outputs of the layers of the group.
        lengths: (B,) numbers of tokens of the examples.

    Returns:
        (B, S, I) inputs or (B, S) ids, gradients (B, S, O), and the numbers of tokens, or None.
    """
    module: Any = layer.module
    gs = [g for g in gradients if g is not None]
    gs = [g if g.dtype in (torch.float32, torch.bfloat16) else g.float() for g in gs]
    # A pooled layer, or the first position of a lean last layer: no padding.
    one_token = gs[0].dim() == 2 or gs[0].shape[1] == 1
    if layer.kind == "elementwise":
        x = normalized(module, x).to(gs[0].dtype)
    elif layer.kind == "embedding":
        x = x.expand(gs[0].shape[:-1])
        if getattr(module, "embed_scale", None) is not None:  # Gemma scales the rows it looks up
            gs = [g * module.embed_scale.to(g.dtype) for g in gs]
        if module.padding_idx is not None:  # its row has no gradient in autograd either
            gs = [g.masked_fill((x == module.padding_idx)[..., None], 0) for g in gs]
    else:
        x = x.to(gs[0].dtype)
    if layer.only_bias:
        x = torch.ones_like(x if layer.kind == "elementwise" else x[..., :1])
    if gs[0].dim() == 2:
        x, gs = x[:, None], [g[:, None] for g in gs]
    if gs[0].dim() == 3:
        return x, gs, None if one_token else lengths
    x = x.flatten(1) if layer.kind == "embedding" else x.flatten(1, -2)
    return x, [g.flatten(1, -2) for g in gs], None


def _without_padding(x: Tensor, gs: list[Tensor], lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return input and output gradient of a call with zeros in the padding."""
    (g_BSO,) = gs
    if lengths is None:
        return x, g_BSO
    position_S = torch.arange(g_BSO.shape[1], device=g_BSO.device)
    padding_BS = position_S >= lengths[:, None]
    is_ids = x.dim() == 2
    x = x.masked_fill(padding_BS if is_ids else padding_BS[..., None], 0)
    return x, g_BSO.masked_fill(padding_BS[..., None], 0)


def add_gradients(captured: Captured, weights_B: Tensor, total: dict[str, Tensor]) -> None:
    """Add the weighted gradients of a batch, `sum_b weights[b] G_b`, to a sum.

    For a linear layer `G_b = sum_s g_s x_s^T`, so the sum over examples and tokens is one matrix
    product of all tokens, and the gradient of a single example is never formed.

    Args:
        captured: layers that share their input.
        weights_B: weight of each example.
        total: sums by name of the parameter, changed in place; others are not computed.
    """
    captured = captured.with_all_columns()
    x_BSI = captured.x if captured.layers[0].kind == "embedding" else captured.x.float()
    weights_BS = weights_B[:, None].expand(x_BSI.shape[:2])
    if captured.lengths is not None:
        position_S = torch.arange(x_BSI.shape[1], device=x_BSI.device)
        weights_BS = weights_BS * (position_S < captured.lengths[:, None])
    for layer, g_BSO in zip(captured.layers, captured.g, strict=True):
        g_TO = (g_BSO.float() * weights_BS[..., None]).flatten(0, 1)
        weight, bias = (total.get(f"{layer.name}.{name}") for name in ("weight", "bias"))
        if weight is None:
            pass
        elif layer.kind == "linear":
            weight.addmm_(g_TO.T, x_BSI.flatten(0, 1))
        elif layer.kind == "elementwise":
            weight += (g_TO * x_BSI.flatten(0, 1)).sum(dim=0)
        else:
            weight.index_add_(0, x_BSI.flatten(), g_TO)
        if bias is not None and (layer.bias or layer.only_bias):
            bias += g_TO.sum(dim=0)


def _widened(narrow: Tensor, columns: Tensor, width: int) -> Tensor:
    wide = narrow.new_zeros(*narrow.shape[:-1], width)
    return wide.index_copy_(-1, columns, narrow)
