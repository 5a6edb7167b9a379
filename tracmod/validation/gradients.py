"""Comparison of the engine's per-example gradients with autograd, one example at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracmod import kernels
from tracmod.choices import ParameterSelection, StatedLossKind
from tracmod.gradients.capture import (
    Captured,
    ModelPass,
    capture,
    select_layers,
    warn_of_frozen,
)
from tracmod.gradients.verified_pass import verified_pass
from tracmod.models.architecture import model_unit
from tracmod.models.checkpoints import (
    Checkpoint,
    freeze,
    loss_of_checkpoints,
    recorded_frozen,
    recorded_loss,
)
from tracmod.models.inputs import as_examples, check_examples, encode, num_cut, unwrapped
from tracmod.models.language_adapters import with_language_ids
from tracmod.models.loading import class_names, load_model
from tracmod.models.loss import (
    UNLABELLED,
    ExampleLoss,
    LossFunction,
    as_loss,
    loss_of_examples,
    own_loss,
    stated_loss,
)
from tracmod.models.modes import evaluating, frozen, in_float64
from tracmod.models.plain_pass import given_batch, labelled_logits, logits_of, model_logits
from tracmod.subnetworks.head_mask import HeadMask, masked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative error up to which gradients count as right whatever that of autograd is.
ROUNDING = 1e-5
# Relative error above which none counts as right. The gradient of a loss L is a difference of
# numbers near 1, which float32 rounds by 6e-8: autograd's error was 2e-4 at L = 2e-4, 2e-3 at 3e-5
# and 2e-2 at 4e-6. An example that the model is so sure of cannot be checked in float32.
CEILING = 1e-2
# Relative error of float32 autograd itself of which a warning says so.
FAR = 1e-4
# A kind of parameters with a smaller share of the whole gradient's norm is compared with this share
# of it. Some gradients are sums in which everything cancels: queries and keys of a text of one
# token have a gradient of 0, of which float32 leaves rounding errors.
NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class GradientError:
    """Error of the gradients of one kind of parameter, or of the logits.

    Attributes:
        kind: such as "encoder linear weight", or "logits".
        num_parameters: number of parameter tensors of this kind; 0 for logits.
        engine: `|engine - autograd64| / |autograd64|`, the largest over the examples; norms run
            over all parameters of the kind. The denominator is at least `NEGLIGIBLE` times the norm
            over all kinds.
        autograd: the same for float32 autograd, the error of float32 itself.
    """

    kind: str
    num_parameters: int
    engine: float
    autograd: float

    @property
    def passed(self) -> bool:
        """Whether the error is at most twice that of float32 autograd, or `ROUNDING`.

        Above `CEILING`, none passes: a fault could not be told from the error of float32.
        """
        return self.engine <= min(max(2 * self.autograd, ROUNDING), CEILING)

    @property
    def verdict(self) -> str:
        """Return "WRONG", "imprecise" where float32 autograd itself is far off, or "ok"."""
        if not self.passed:
            return "WRONG"
        return "imprecise" if self.autograd > FAR else "ok"


@dataclass(frozen=True)
class ModelCheck:
    """The result of `check_model`.

    Attributes:
        errors: as `check_gradients` returns them.
        num_examples: number of examples that were compared.
        num_cut: how many of their texts had more than `max_length` tokens, and were cut; of a token
            classifier, how many words were cut off.
        max_length: longest length in tokens.
        num_words: number of words of the examples, for a token classifier.
    """

    errors: list[GradientError]
    num_examples: int
    num_cut: int
    max_length: int
    num_words: int | None = None


def check_model(
    source: str,
    data: Path,
    parameters: ParameterSelection = "all",
    head_mask: Path | None = None,
    num_examples: int = 8,
    max_length: int = 128,
    include_frozen: bool = False,
    *,
    columns: Mapping[str, str] | None = None,
    loss: StatedLossKind | None = None,
    label_smoothing: float | None = None,
    class_weights: str | None = None,
) -> ModelCheck:
    """Run `check_gradients` for a model folder on the first examples of a file.

    Args:
        source: transformers folder with its tokenizer, or a Hub name.
        data: example file.
        parameters: as in `collect_features`.
        head_mask: file of a head mask; None for none.
        num_examples: number of examples to take.
        max_length: longest length in tokens, lowered to that of the tokenizer.
        include_frozen: as in `collect_features`.
        columns: our column -> its name in the file, where they differ.
        loss, label_smoothing, class_weights: the loss of the training, as in `AttributionOptions`.
    """
    # Imported here because tasks need pydantic, which a GPU machine that tests the engine may lack.
    from tracmod.tasks.token_files import read_labelled_files

    model, tokenizer = load_model(source)
    mask = None if head_mask is None else HeadMask.load(head_mask)
    labels = class_names(model)
    stated = stated_loss(loss, label_smoothing, class_weights, labels, unit=model_unit(model))
    trained = Checkpoint(Path(source), 1, 0, learning_rate=None, loss=recorded_loss(source))
    trained_loss = loss_of_checkpoints([trained], model, stated)
    (table,) = read_labelled_files([data], labels, columns, loss_kind=trained_loss.kind)
    table = table.slice(0, num_examples)
    max_length = min(max_length, tokenizer.model_max_length)
    examples = with_language_ids(
        model.config,
        encode(tokenizer, table, max_length, num_labels=len(labels)),
        table.column("language").to_pylist(),
    )
    if not include_frozen:
        freeze(model, recorded_frozen(source), source)
    errors = check_gradients(model, examples, parameters, mask, include_frozen, loss=trained_loss)
    num_words = sum(map(len, table["tokens"].to_pylist())) if model_unit(model) == "token" else None
    cut = num_cut(tokenizer, table, max_length)
    return ModelCheck(errors, len(examples), cut, max_length, num_words)


def check_gradients(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    parameters: ParameterSelection = "all",
    head_mask: HeadMask | None = None,
    include_frozen: bool = False,
    *,
    loss: ExampleLoss | LossFunction | None = None,
) -> list[GradientError]:
    """Compare the gradients that the engine captures with one-example autograd in float64.

    The engine's side is the pass that `collect_features` and `exact_influence` make, with all
    examples as one padded batch where the model allows it. The other side is the model in float64,
    in its own pass, one example at a time as it was given: no mask, batch or module of the engine
    takes part in it. The logits of both are compared, too. The gradients of one example are
    held at a time: memory is a few times that of the model.

    Args:
        model: a float32 model on the CPU; left as it was.
        examples: encoded examples, as `encode` returns them.
        parameters: as in `collect_features`.
        head_mask: mask to apply on both sides; None for none.
        include_frozen: as in `collect_features`.
        loss: as in `collect_features`. The engine's own is used for the engine only: autograd
            differentiates the loss of transformers (`reference_loss`).

    Returns:
        One error for the logits, and one per kind of parameter.

    Raises:
        ValueError: there are no examples, or the model, the loss or an example is one that
            `collect_features` refuses.
    """
    model, examples = unwrapped(model), as_examples(examples, "examples", model)
    if not examples:
        raise ValueError("examples: expected at least 1, got none")
    warn_of_frozen(model, parameters, include_frozen)
    layers = select_layers(model, parameters, include_frozen)
    chosen = check_examples(model, examples, "examples", as_loss(loss))
    logits: dict[int, Tensor] = {}
    with frozen(model), verified_pass(model, examples, layers, head_mask) as model_pass:
        engine = engine_gradients(
            model, examples, parameters, model_pass, logits, include_frozen, loss=chosen
        )
    by_kind: dict[str, list[str]] = {}
    for layer in layers:
        for name in layer.parameter_names:
            by_kind.setdefault(_kind(model, name), []).append(name)
    with masked(model, head_mask):
        errors = torch.tensor(
            [
                _errors(model, example, gradients | {"logits": logits[row]}, by_kind, chosen)
                for row, (example, gradients) in enumerate(zip(examples, engine, strict=True))
            ]
        )
    counts = {"logits": 0} | {kind: len(names) for kind, names in by_kind.items()}
    return [
        GradientError(kind, count, *worst)
        for (kind, count), worst in zip(counts.items(), errors.amax(dim=0).tolist(), strict=True)
    ]


def _errors(
    model: PreTrainedModel,
    example: Mapping[str, Any],
    engine: Mapping[str, Tensor],
    by_kind: Mapping[str, list[str]],
    loss: ExampleLoss,
) -> list[tuple[float, float]]:
    """Return the relative errors (engine, autograd) of one example for the logits and every kind.

    The logits of each side are beside its gradients, under the name "logits".
    """
    names = [name for members in by_kind.values() for name in members]
    plain = autograd_gradients(model, example, names, loss=loss)
    plain["logits"] = own_logits(model, example)
    with in_float64(model):
        truth = autograd_gradients(model, example, names, loss=loss)
        truth["logits"] = own_logits(model, example)
    least = NEGLIGIBLE * _norm([truth[name] for name in names])
    return [
        (
            _relative_error(engine, truth, members, at_least),
            _relative_error(plain, truth, members, at_least),
        )
        for members, at_least in (
            (["logits"], 0.0),
            *((members, least) for members in by_kind.values()),
        )
    ]


def _relative_error(
    gradients: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    names: Sequence[str],
    at_least: float,
) -> float:
    """Return |gradients - truth| / |truth|, with a denominator of `at_least` something.

    Where the denominator is 0, return the numerator.
    """
    difference = _norm([gradients[name].double() - truth[name] for name in names])
    norm = max(_norm([truth[name] for name in names]), at_least)
    return difference / norm if norm > 0 else difference


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5


def engine_gradients(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    parameters: ParameterSelection = "all",
    model_pass: ModelPass | None = None,
    logits: dict[int, Tensor] | None = None,
    include_frozen: bool = False,
    *,
    loss: ExampleLoss | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Return the whole gradients of each example by name of the parameter, as an iterator.

    The examples pass through the model at once, as one padded batch or one by one. Only for checks,
    within `frozen(model)`: the engine exists in order not to form gradients.

    Args:
        model: the model.
        examples: encoded examples.
        parameters: as in `collect_features`.
        model_pass: what `verified_pass` has chosen; None for the model's own pass.
        logits: receives the logits of every example by its number, as `own_logits` has them.
        include_frozen: as in `collect_features`.
        loss: the loss; None for the one that transformers chooses.

    Yields:
        One example's gradients; zeros for a parameter that the engine shows nothing of.
    """
    layers = select_layers(model, parameters, include_frozen)
    model_pass = model_pass or ModelPass()
    # For every example, the layers of its batch and its row there.
    captured: list[tuple[dict[str, Captured], int]] = [({}, 0)] * len(examples)
    for rows, batch in model_pass.batches(model, examples, batch_tokens=1 << 30):
        by_layer: dict[str, Captured] = {}
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda *_, outputs=outputs: outputs.append(_[2]))
        with hook:
            keep = partial(_keep, by_layer)
            capture(model, layers, batch, keep, model_pass=model_pass, loss=loss)
        for position, row in enumerate(rows):
            captured[row] = by_layer, position
            if logits is not None:
                only = slice(position, position + 1)
                own = logits_of(model, outputs[0], batch["attention_mask"])[only]
                own = labelled_logits(model, own, batch["labels"][only])
                logits[row] = own.detach()

    def example_gradients(by_layer: Mapping[str, Captured], row: int) -> dict[str, Tensor]:
        gradients: dict[str, Tensor] = {}
        for layer in layers:
            if layer.name in by_layer:
                whole = _whole_gradients(by_layer[layer.name], row)
            else:
                whole = [torch.zeros_like(model.get_parameter(n)) for n in layer.parameter_names]
            gradients |= dict(zip(layer.parameter_names, whole, strict=True))
        return gradients

    return (example_gradients(*place) for place in captured)


def _keep(by_layer: dict[str, Captured], group: Captured) -> None:
    for position, layer in enumerate(group.layers):
        by_layer[layer.name] = group.of([position]).with_all_columns()


def _whole_gradients(captured: Captured, row: int) -> list[Tensor]:
    """Return the gradients of a layer's weight and, if selected, bias for one example.

    The projection kernel with the projection "identity" forms them.
    """
    layer, only = captured.layers[0], slice(row, row + 1)
    x, g = captured.x[only], captured.g[0][only]
    if layer.kind == "embedding":
        gradient = torch.zeros(
            layer.in_features, layer.out_features, dtype=torch.float32, device=g.device
        )
        return [gradient.index_add_(0, x[0], g[0])]
    k_out, k_in = layer.out_features, layer.in_features + layer.bias
    if layer.kind == "elementwise":
        k_out, k_in = 1 + layer.bias, layer.in_features
    out = torch.zeros(1, k_out * k_in, dtype=torch.float32, device=g.device)
    kernels.project_gradients(
        x,
        g,
        out,
        lengths=None if captured.lengths is None else captured.lengths[only],
        layer=layer.kind,
        kind="identity",
        k_out=k_out,
        k_in=k_in,
        seed=0,
        input_key=0,
        output_key=0,
        bias=layer.bias,
    )
    whole = out.view(k_out, k_in)
    if layer.kind == "elementwise":
        return list(whole)
    if layer.only_bias:
        return [whole[:, 0]]
    return [whole[:, : layer.in_features], *([whole[:, -1]] if layer.bias else [])]


def autograd_gradients(
    model: PreTrainedModel,
    example: Mapping[str, Any],
    names: Sequence[str],
    *,
    loss: ExampleLoss | None = None,
) -> dict[str, Tensor]:
    """Compute the gradient of one example's loss with autograd, with dropout off.

    Args:
        model: the model, in any floating dtype.
        example: an encoded example.
        names: names of the parameters.
        loss: the loss; None for the one that transformers chooses.

    Returns:
        Gradient by name; zeros for parameters that the loss does not depend on.
    """
    parameters = dict(model.named_parameters())
    selected = [parameters[name] for name in names]
    required = [parameter.requires_grad for parameter in selected]
    loss = loss or loss_of_examples(model, [example])
    with evaluating(model):
        try:
            for parameter in selected:
                parameter.requires_grad_(True)
            value = reference_loss(model, given_batch(model, example), loss)
            gradients = torch.autograd.grad(value, selected, allow_unused=True)
        finally:
            for parameter, requires_grad in zip(selected, required, strict=True):
                parameter.requires_grad_(requires_grad)
    return {
        name: torch.zeros_like(parameters[name]) if gradient is None else gradient
        for name, gradient in zip(names, gradients, strict=True)
    }


def reference_loss(
    model: PreTrainedModel, batch: Mapping[str, Tensor], loss: ExampleLoss
) -> Tensor:
    """Compute the loss of a batch of one example by the code of transformers or torch, not ours.

    The model's own loss is what the model returns for labels, and label smoothing is that of the
    Trainer. The other losses are the modules of torch; a function of the user is called itself.

    Args:
        model: the model; its config is left as it is.
        batch: inputs and labels of one example.
        loss: the loss.

    Returns:
        A scalar.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    if loss.kind in ("squared_error", "binary_cross_entropy"):
        labels = labels.to(model.dtype)  # as transformers needs them
    if loss.kind == "span_cross_entropy":
        first_B, last_B = labels.unbind(dim=1)
        output = model(**inputs, start_positions=first_B, end_positions=last_B)
        return output[0] if isinstance(output, tuple) else output.loss
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    float_vectors = labels.dim() > 1 and labels.is_floating_point()
    if takes_labels and loss == own_loss(model, float_vectors=float_vectors):
        problem_type = model.config.problem_type
        try:
            output = model(**inputs, labels=labels)
            return output[0] if isinstance(output, tuple) else output.loss
        finally:
            model.config.problem_type = problem_type  # which transformers sets
    logits_BC = model_logits(model, inputs)
    if loss.function is not None:
        return loss.function(logits_BC, labels).sum()
    if loss.kind == "squared_error":
        return nn.MSELoss()(logits_BC, labels.reshape(logits_BC.shape))
    if loss.kind == "binary_cross_entropy":
        weights = None if loss.pos_weight is None else logits_BC.new_tensor(loss.pos_weight)
        return nn.BCEWithLogitsLoss(pos_weight=weights)(logits_BC, labels)
    if loss.class_weights is None and loss.label_smoothing:
        from transformers.trainer_pt_utils import LabelSmoother

        return LabelSmoother(loss.label_smoothing)({"logits": logits_BC}, labels)
    weights = None if loss.class_weights is None else logits_BC.new_tensor(loss.class_weights)
    smoothing = loss.label_smoothing
    # A mean over a batch of one, or over its tokens, would divide by the weights.
    total = nn.CrossEntropyLoss(weights, reduction="sum", label_smoothing=smoothing)
    if loss.kind == "token_cross_entropy":
        return total(logits_BC.flatten(0, 1), labels.flatten()) / labels.ne(UNLABELLED).sum()
    return total(logits_BC, labels)


@torch.no_grad()
def own_logits(model: PreTrainedModel, example: Mapping[str, Any]) -> Tensor:
    """Compute the logits of one example in the model's own pass, with dropout off.

    (1, C), or (T, C) of the labelled tokens; of question answering (2 T, 1).
    """
    with evaluating(model):
        batch = given_batch(model, example)
        return labelled_logits(model, model_logits(model, batch), batch["labels"])


def _kind(model: PreTrainedModel, name: str) -> str:
    """Return the kind of a parameter, such as "encoder linear weight"."""
    module_name, _, parameter = name.rpartition(".")
    module = type(model.get_submodule(module_name)).__name__.lower()
    base = model.base_model_prefix + "."
    part = "classifier"
    if name.startswith(base):
        part = "embeddings" if name.startswith(base + "embeddings.") else "encoder"
    return f"{part} {module} {parameter}"
