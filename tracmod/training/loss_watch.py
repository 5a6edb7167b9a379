"""Compares the loss that a training uses with the one that is stated, from its gradients.

A Trainer does not say which loss it computes: `compute_loss` may be overridden, and labels may be
taken out of the model's inputs before. What a loss does to the model is seen at its logits. The
watch therefore records the logits of the first training steps and the gradient that arrives at
them, and compares it with the gradient of the stated loss, up to one factor per batch (a mean over
the batch, gradient accumulation, the scale of a GradScaler). Within a batch, weights of classes or
of examples are no such factor.

The training is not changed: the hooks return nothing, draw no random numbers, and are removed.

Shape suffixes: B examples of a batch, C outputs, Y labels that are tried for each example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tracmod.models.architecture import answers_questions, is_token_classifier
from tracmod.models.loss import UNLABELLED, ExampleLoss

# Steps that are watched: the first ones, and further ones until batches with every class were seen.
FEWEST_STEPS, MOST_STEPS = 3, 32

LossOf = Callable[[Tensor | None], ExampleLoss]  # of the labels of a batch, if they are known


@dataclass
class _Batch:
    """Logits of one forward pass in training, their labels if known, and their gradient."""

    logits_BC: Tensor
    labels: Tensor | None
    gradient_BC: Tensor | None = None


@dataclass
class _Single:
    """Factor of a batch of one example."""

    factor: float
    tolerance: float


class LossWatch:
    """Watches the first steps of a training.

    Attributes:
        matched: whether batches were compared, and all had the gradients of the stated loss.
        differs: whether a batch had other gradients.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf, *, one_factor: bool) -> None:
        """Attach the hook.

        Args:
            model: the model that is trained, without wrappers such as DataParallel.
            loss_of: returns the stated loss.
            one_factor: whether batches of one size have the same factor in all steps, which lets
                batches of a single example be compared with each other.
        """
        self.matched = self.differs = False
        self._loss_of, self._one_factor = loss_of, one_factor
        self._batches: list[_Batch] = []
        self._singles: list[_Single] = []
        self._classes: set[int] = set()
        self._steps = 0
        self._hook: Any = model.register_forward_hook(self._see_logits, with_kwargs=True)

    @property
    def is_watching(self) -> bool:
        """Whether the hook is still attached."""
        return self._hook is not None

    def stop(self) -> None:
        """Remove the hook and forget what was recorded."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._batches.clear()

    def end_step(self) -> None:
        """Compare the batches of an optimizer step; stop after the first steps."""
        batches, self._batches = self._batches, []
        if not self._one_factor:
            self._singles.clear()
        for batch in batches:
            self._compare(batch)
        self._steps += 1
        num_outputs = batches[-1].logits_BC.shape[-1] if batches else 0
        is_complete = self._steps >= FEWEST_STEPS and len(self._classes) >= num_outputs
        if self.differs or is_complete or self._steps >= MOST_STEPS:
            self.stop()

    def _see_logits(
        self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> None:
        """Record the logits of a forward pass, and have the backward pass record their gradient."""
        if answers_questions(module):  # the first and the last token are two choices
            places = [named.get(name) for name in ("start_positions", "end_positions")]
            has_loss = all(place is not None for place in places)
            given = output[has_loss:] if isinstance(output, tuple) else None
            for number, name in enumerate(("start_logits", "end_logits")):
                logits = getattr(output, name, None) if given is None else given[number]
                self._record(logits, places[number], dim=2)
            return
        labels = named.get("labels")
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, tuple):
            logits = output[labels is not None]
        self._record(logits, labels, dim=3 if is_token_classifier(module) else 2)

    def _record(self, logits: Any, labels: Any, dim: int) -> None:
        """Record logits, and have the backward pass record their gradient."""
        if not isinstance(logits, Tensor) or logits.dim() != dim or logits.grad_fn is None:
            return  # an evaluation, or a model that returns something else
        # Under autocast the model returns a widened copy, and computes its loss from the original.
        node: Any = logits.grad_fn
        position = logits.output_nr
        while node.name().startswith("ToCopyBackward"):
            node, position = node.next_functions[0]
        batch = _Batch(logits.detach().clone(), labels if isinstance(labels, Tensor) else None)

        def see_gradient(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[position]
            if gradient is not None:
                batch.gradient_BC = gradient.detach().clone()

        node.register_prehook(see_gradient)
        self._batches.append(batch)

    def _compare(self, batch: _Batch) -> None:
        if batch.gradient_BC is None:  # the loss does not come from the logits
            self.differs = True
            return
        if batch.gradient_BC.shape != batch.logits_BC.shape or not (
            batch.gradient_BC.isfinite().all() and batch.logits_BC.isfinite().all()
        ):
            return  # a step that a GradScaler skips
        loss = self._loss_of(batch.labels)
        if loss.kind == "span_cross_entropy":
            loss = replace(loss, kind="cross_entropy")
        if loss.kind == "token_cross_entropy":
            loss, batch = replace(loss, kind="cross_entropy"), _of_tokens(batch)
        expected_BYC = _expected_gradients(loss, batch)
        if expected_BYC is None:
            return
        assert batch.gradient_BC is not None
        gradient_BC = batch.gradient_BC.double().cpu()
        eps = torch.finfo(batch.gradient_BC.dtype).eps
        tolerance = max(1e-3, 4 * eps)
        if loss.kind == "binary_cross_entropy":  # each output has a label of its own
            gradient_BC = gradient_BC.reshape(-1, 1)
            expected_BYC = expected_BYC.transpose(1, 2).reshape(len(gradient_BC), -1, 1)
        factor, labels_B = _common_factor(gradient_BC, expected_BYC, tolerance, 8 * eps)
        if factor is None or labels_B is None:
            self.differs = True
            return
        self.matched = True
        if loss.kind != "cross_entropy":
            self._classes.update(range(batch.logits_BC.shape[1]))
            return
        if batch.labels is not None:
            labels_B = batch.labels.reshape(-1).cpu()
        self._see_classes(labels_B, factor, tolerance)

    def _see_classes(self, labels_B: Tensor, factor: float, tolerance: float) -> None:
        """Note the classes whose weights are known to be equal.

        Those of one batch have one factor. A batch of a single example has a factor of its own,
        which is compared with those of others.
        """
        classes = set(labels_B.tolist())
        if len(labels_B) > 1:
            if len(classes) > 1:
                self._classes |= classes
            return
        self._singles.append(_Single(factor, tolerance))
        factors = [single.factor for single in self._singles]
        self.differs |= max(factors) > min(factors) * (1 + 4 * tolerance)
        if len(factors) > 1:
            self._classes |= classes


def _of_tokens(batch: _Batch) -> _Batch:
    """Return the labelled tokens of a batch as examples; without labels, those with a gradient.

    The loss of a token classifier's batch is a mean over its labelled tokens, all with one factor.
    """
    assert batch.gradient_BC is not None
    counted = batch.gradient_BC.ne(0).any(dim=-1)
    if batch.labels is not None:
        counted = batch.labels.ne(UNLABELLED)
    labels = None if batch.labels is None else batch.labels[counted]
    return _Batch(batch.logits_BC[counted], labels, batch.gradient_BC[counted])


def _expected_gradients(loss: ExampleLoss, batch: _Batch) -> Tensor | None:
    """Return the gradients (B, Y, C) of the loss for each label that an example may have.

    Without labels these are the classes, or 0 and 1 for each of several labels. None if they cannot
    be enumerated, as the targets of a regression, or if a user's function does not take them.
    """
    logits_BC, labels = batch.logits_BC, batch.labels
    if loss.function is None:
        logits_BC = logits_BC.double().cpu()
        labels = None if labels is None else labels.cpu()
    count, num_outputs = logits_BC.shape
    if labels is not None:
        candidates = [labels]
    elif loss.kind == "binary_cross_entropy":
        candidates = [torch.full_like(logits_BC, value) for value in (0, 1)]
    elif loss.kind == "squared_error" or num_outputs == 1:
        return None
    else:
        candidates = [
            torch.full((count,), label, device=logits_BC.device) for label in range(num_outputs)
        ]
    gradients = []
    # A user's function may draw random numbers.
    devices = [logits_BC.device] if logits_BC.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        for candidate in candidates:
            leaf_BC = logits_BC.detach().clone().requires_grad_()
            try:
                total = loss(leaf_BC, candidate).sum()
                gradients.append(torch.autograd.grad(total, leaf_BC)[0].double().cpu())
            except (IndexError, RuntimeError, TypeError, ValueError):
                return None
    return torch.stack(gradients, dim=1)


def _common_factor(
    gradient_BC: Tensor, expected_BYC: Tensor, tolerance: float, floor: float
) -> tuple[float | None, Tensor | None]:
    """Find f and labels with gradient[b] = f expected[b, label[b]] for all rows, up to rounding.

    The row with the largest gradient has a factor for each of its labels; f is one of them if there
    is any.

    Args:
        gradient_BC: what arrived at the logits.
        expected_BYC: gradients of the stated loss for each label that a row may have.
        tolerance: relative error of a row.
        floor: absolute error of a row, in the unit of `expected_BYC`.

    Returns:
        The factor, and the (B,) labels; None each if there is no such factor.
    """
    largest = int(gradient_BC.norm(dim=1).argmax())
    expected_YC = expected_BYC[largest]
    factors_Y = (expected_YC @ gradient_BC[largest]) / expected_YC.square().sum(dim=1)
    allowed_BY = tolerance * expected_BYC.norm(dim=2) + floor
    for factor in factors_Y[factors_Y.isfinite() & (factors_Y > 0)].tolist():
        residual_BY = (gradient_BC[:, None] / factor - expected_BYC).norm(dim=2)
        excess_B, labels_B = (residual_BY - allowed_BY).min(dim=1)
        if bool((excess_B <= 0).all()):
            return factor, labels_B
    return None, None
