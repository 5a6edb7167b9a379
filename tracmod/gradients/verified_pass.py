"""Choose how batches go through a model, so that its gradients are those of the model's own pass.

The engine takes shortcuts: the lean pass, a ready-made attention mask, and padding to a common
length. They are right for the families that tracmod was made for; but a decoder has a mask of its
own, BigBird exchanges its attention for short texts, YOSO's scores depend on padding, and hooks,
wrappers and subclasses may do anything. So each form of a pass is tried before it is used, fastest
first:

1. the lean pass with a ready-made mask, in padded batches;
2. the model's own pass in padded batches;
3. the model's own pass, one example at a time.

The first form is taken whose gradients agree with those that autograd computes from the model's own
pass, one example at a time and without padding. If none does, the model is refused.

The probe. The examples are those of the data that differ most: the longest and the shortest, and
the first with gaps in its mask. Of a padded batch of them, the summed gradients of all small
parameters are compared (biases and LayerNorms, which show the output gradient of every layer); of
the shortest alone, those of all parameters but large embedding tables. The loss of the probe is a
random sum of logits, because the loss of an example that the model is sure of has a gradient that
consists of rounding errors; of a token classifier, the logits of labelled tokens, which the loss
reads. The cost is that of collecting about a dozen examples.

Shape suffixes: B examples of a batch, or labelled tokens of a token classifier, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracmod.gradients.capture import (
    Captured,
    Layer,
    ModelPass,
    add_gradients,
    capture_loss,
)
from tracmod.gradients.lean_pass import lean
from tracmod.models.architecture import answers_questions, family_of
from tracmod.models.inputs import TokenLabels, collate, example_length, pad_token_id
from tracmod.models.loss import UNLABELLED
from tracmod.models.modes import ModelState
from tracmod.models.plain_pass import (
    given_batch,
    labelled_logits,
    logits_agree,
    model_logits,
    probe_rows,
)
from tracmod.subnetworks.head_mask import HeadMask, masked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parameters of at most so many numbers are compared for a whole batch.
SMALL = 1 << 16

# Relative differences that rounding may make, of a gradient's own norm and of the largest norm;
# some gradients are sums in which everything cancels (a key's bias, exactly). In 12 layers,
# rounding makes up to 3e-6 and 1e-6 in float32, 0.01 and 0.01 in float16, 0.1 and 0.03 in bfloat16.
TOLERANCES = {
    torch.float64: (1e-4, 1e-5),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (0.05, 0.03),
    torch.bfloat16: (0.15, 0.1),
}

# What a forward pass raises that a model was not made for.
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)

Gradients = dict[str, Tensor]
Form = Callable[[ExitStack], ModelPass]


@contextmanager
def verified_pass(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    layers: Sequence[Layer],
    head_mask: HeadMask | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[ModelPass]:
    """Prepare a model for passes that compute what its own pass computes; restore it afterwards.

    Args:
        model: A classifier within `frozen`, on the device of the passes.
        examples: The examples that will be passed, from which those of the probe are taken.
        layers: The layers whose gradients are wanted.
        head_mask: A head mask to apply, or None.
        dtype: dtype of passes under autocast, or None. Forms are compared without autocast.

    Yields:
        The pass, for `capture`.

    Raises:
        ValueError: No form of a pass has the gradients of the model's own pass, because it is
            random or uses a parameter in other ways; the model's own pass fails, writes to weights,
            or changes the model so that the next example has other logits.
    """
    with ExitStack() as stack:
        yield _chosen_pass(stack, model, examples, layers, head_mask, dtype)


def _chosen_pass(
    stack: ExitStack,
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    layers: Sequence[Layer],
    head_mask: HeadMask | None,
    dtype: torch.dtype | None,
) -> ModelPass:
    """Enter the first form of a pass that is right, so that the stack undoes it."""

    def fast(attempt: ExitStack) -> ModelPass:
        columns = attempt.enter_context(lean(model, head_mask, dtype))
        ready = model.config._attn_implementation == "sdpa" and family_of(model).takes_ready_mask
        return ModelPass(columns, ready_mask=ready, state=ModelState(model))

    def plain(attempt: ExitStack, alone: bool = False) -> ModelPass:
        attempt.enter_context(masked(model, head_mask))
        return ModelPass(alone=alone, state=ModelState(model))

    def one_by_one(attempt: ExitStack) -> ModelPass:
        return plain(attempt, alone=True)

    if not examples:
        return plain(stack)
    chosen = [examples[row] for row in probe_rows(examples)]
    with masked(model, head_mask):
        probe = _Probe(model, chosen, layers)
    if not probe.finite:  # no two passes agree; the caller names the example when it has passed
        return plain(stack)
    forms: list[Form] = [fast, plain, one_by_one]
    for form in forms:
        with ExitStack() as attempt:
            try:
                model_pass = form(attempt)
                different = probe.first_difference(model_pass)
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:  # the model does not take the mask, or heads are missing
                if form is not one_by_one:
                    continue
                if isinstance(error, ValueError):
                    raise
                raise ValueError(
                    f"{type(model).__name__}: expected a model of a supported family, but its "
                    f"gradients cannot be captured: {type(error).__name__}: {error}"
                ) from error
            if different is None:
                stack.push(attempt.pop_all())
                return model_pass
    with masked(model, head_mask):
        raise ValueError(probe.reason(different))


class _Probe:
    """The gradients of a model's own pass on a few examples, and comparisons with other passes.

    Attributes:
        batch: The examples as a padded batch, the shortest first.
        finite: Whether all of the logits and gradients are finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[Mapping[str, Any]],
        layers: Sequence[Layer],
    ) -> None:
        self.model, self.layers, self.state = model, list(layers), ModelState(model)
        self.examples = sorted(examples, key=example_length)
        device = next(model.parameters()).device
        self.batch = collate(self.examples, pad_token_id(model), device)
        tables = {layer.name for layer in layers if _is_plain_table(layer)}
        names = [name for layer in layers for name in layer.parameter_names]
        dtypes = {model.get_parameter(name).dtype for name in names} | {torch.float32}
        self.tolerances = max(TOLERANCES[dtype] for dtype in dtypes)
        numbers = {name: model.get_parameter(name).numel() for name in names}
        # Of the whole weights: the lean pass narrows those of masked heads.
        self.shapes = {name: model.get_parameter(name).shape for name in names}
        self.small = [name for name in names if numbers[name] <= SMALL]
        # Large tables are left out: their rows are sums of output gradients, which are compared.
        self.not_tables = [
            name
            for name in names
            if numbers[name] <= SMALL or name.rpartition(".")[0] not in tables
        ]
        generator = torch.Generator().manual_seed(0)
        # Rows of logits of each example begin at these.
        of_spans = answers_questions(model)
        counts = [_num_logits(example, of_spans) for example in self.examples]
        self.starts = [0, *accumulate(counts)]
        size = (self.starts[-1], 1 if of_spans else int(model.config.num_labels or 1))
        self.weights_BC = torch.randn(size, generator=generator, dtype=torch.float32).to(device)
        self.changes_itself = False
        versions = [parameter._version for parameter in model.parameters()]
        own = [
            self._own(row, self.small if row else self.not_tables)
            for row in range(len(self.examples))
        ]
        if versions != [parameter._version for parameter in model.parameters()]:
            raise ValueError(
                f"{type(model).__name__}: expected a forward pass that leaves the weights as they "
                f"are, but it writes to them"
            )
        self.logits_BC = torch.cat([logits for logits, _ in own])
        if self.changes_itself and not logits_agree(self._logits_in_turn(), self.logits_BC):
            raise ValueError(
                f"{type(model).__name__}: expected a model whose logits do not depend on the "
                f"examples before, but its forward pass changes the model for the next one"
            )
        self.first = own[0][1]
        self.summed = {
            name: torch.stack([gradients[name] for _, gradients in own]).sum(dim=0)
            for name in self.small
        }
        self.finite = bool(self.logits_BC.isfinite().all()) and all(
            bool(gradient.isfinite().all())
            for _, gradients in own
            for gradient in gradients.values()
        )

    def _own(self, row: int, names: Sequence[str]) -> tuple[Tensor, Gradients]:
        """Return the logits and gradients of the model's own pass on one example."""
        parameters = [self.model.get_parameter(name) for name in names]
        required = [parameter.requires_grad for parameter in parameters]
        batch = given_batch(self.model, self.examples[row])
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.autocast(batch["labels"].device.type, enabled=False):
                all_logits = model_logits(self.model, batch)
                logits_BC = labelled_logits(self.model, all_logits, batch["labels"])
                loss = self._loss(logits_BC, row, row + 1)
            gradients: Sequence[Tensor | None] = [None] * len(names)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            raise ValueError(
                f"{type(self.model).__name__}: expected a model whose forward pass takes the "
                f"examples, got {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        finally:
            for parameter, requires_grad in zip(parameters, required, strict=True):
                parameter.requires_grad_(requires_grad)
            self.changes_itself |= self.state.restore()
        return logits_BC.detach(), {
            name: (torch.zeros_like(parameter) if gradient is None else gradient).detach().float()
            for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
        }

    @torch.no_grad()
    def _logits_in_turn(self) -> Tensor:
        """Return the logits of all examples if the model is not restored between them."""
        try:
            with torch.autocast(self.batch["labels"].device.type, enabled=False):
                batches = [given_batch(self.model, example) for example in self.examples]
                passes = [
                    labelled_logits(self.model, model_logits(self.model, batch), batch["labels"])
                    for batch in batches
                ]
        finally:
            self.state.restore()
        return torch.cat(passes)

    def _loss(self, logits_BC: Tensor, first: int, last: int) -> Tensor:
        weights_BC = self.weights_BC[self.starts[first] : self.starts[last]]
        if logits_BC.shape != weights_BC.shape:
            raise ValueError(
                f"{type(self.model).__name__}: expected logits of shape "
                f"{tuple(weights_BC.shape)}, got {tuple(logits_BC.shape)}"
            )
        return (logits_BC * weights_BC.to(logits_BC.dtype)).sum()

    def first_difference(self, model_pass: ModelPass) -> str | None:
        """Return what differs between a pass and the model's own; None if nothing does."""
        rows = range(len(self.examples))
        parts = [(row, row + 1) for row in rows] if model_pass.alone else [(0, len(rows))]
        first, logits = self._captured(model_pass, [(0, 1)], self.not_tables)
        summed = first
        if len(rows) > 1:
            summed, logits = self._captured(model_pass, parts, self.small)
        if not logits_agree(logits, self.logits_BC, self.tolerances[0]):
            return "logits"
        return self._first_difference(summed, self.summed) or self._first_difference(
            first, self.first
        )

    def _first_difference(self, gradients: Gradients, expected: Gradients) -> str | None:
        """Return the first parameter whose gradient differs by more than rounding."""
        norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
        largest, (of_own, of_largest) = max(norms.values(), default=0.0), self.tolerances
        for name in expected:
            difference = float((gradients[name] - expected[name]).norm())
            if not difference <= of_own * norms[name] + of_largest * largest:
                return name
        return None

    def _captured(
        self, model_pass: ModelPass, parts: Sequence[tuple[int, int]], names: Sequence[str]
    ) -> tuple[Gradients, Tensor]:
        """Return the summed gradients that the engine captures in batches, and the logits."""
        device = self.batch["labels"].device
        total = {
            name: torch.zeros(self.shapes[name], dtype=torch.float32, device=device)
            for name in names
        }
        logits: list[Tensor] = []
        for first, last in parts:

            def add(captured: Captured) -> None:
                ones_B = torch.ones(len(captured.x), dtype=torch.float32, device=device)
                add_gradients(captured, ones_B, total)

            chosen = self.examples[first:last]
            if model_pass.alone:
                batch = given_batch(self.model, chosen[0])
            else:
                batch = collate(chosen, pad_token_id(self.model), device)
            labels = batch["labels"]

            def loss_of(
                all_logits: Tensor, labels: Tensor = labels, first: int = first, last: int = last
            ) -> Tensor:
                logits_BC = labelled_logits(self.model, all_logits, labels)
                logits.append(logits_BC.detach())
                return self._loss(logits_BC, first, last)

            capture_loss(self.model, self.layers, batch, add, loss_of, model_pass=model_pass)
        return total, torch.cat(logits)

    def reason(self, different: str | None) -> str:
        """Return why the model is refused, as a sentence."""
        name = type(self.model).__name__
        again, _ = self._own(0, [])
        if not logits_agree(again, self.logits_BC[: self.starts[1]]):
            return (
                f"{name}: expected the same logits whenever an example is passed in evaluation "
                f"mode, got different ones: the model is random"
            )
        return (
            f"{name}: expected gradients that follow from the inputs and outputs of layers, but "
            f"those of {different} differ from autograd's"
        )


def _num_logits(example: Mapping[str, Any], of_spans: bool) -> int:
    """Return how many rows of logits the loss of an example reads.

    That is 1, or one per labelled token, or two per token of question answering.
    """
    if of_spans:
        return 2 * sum(example.get("attention_mask", [1] * len(example["input_ids"])))
    labels = example["labels"]
    if not isinstance(labels, TokenLabels):
        return 1
    return sum(label != UNLABELLED for label in labels)


def _is_plain_table(layer: Layer) -> bool:
    """Return whether a layer is an embedding that looks rows up and does nothing else."""
    module: Any = layer.module
    return (
        layer.kind == "embedding"
        and type(module).forward is nn.Embedding.forward
        and "forward" not in vars(module)
        and not module.scale_grad_by_freq
        and not module.weight._backward_hooks
    )
