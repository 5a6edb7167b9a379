"""The loss of one example, from its logits and its label.

Influence is about gradients of the loss that a model was trained with. transformers chooses one by
the model's config (`own_loss`); a Trainer may smooth labels or weight classes, and a user may have
a function of their own. `ExampleLoss` states which.

Shape suffixes: B examples of a batch, S tokens, C outputs of the model.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tracmod.choices import LossKind, Unit, is_real
from tracmod.models.architecture import model_unit

LossFunction = Callable[[Tensor, Tensor], Tensor]

# Kinds with which features and scores were made before losses could be stated. Their identities
# have no entry for the loss, so that stores made then remain valid.
_KINDS_WITHOUT_IDENTITY = ("cross_entropy", "squared_error")

# Cross entropy of each kind of model.
CROSS_ENTROPY_OF: dict[Unit, LossKind] = {
    "text": "cross_entropy",
    "token": "token_cross_entropy",
    "span": "span_cross_entropy",
}

# The label of tokens that have none, which losses of torch and transformers leave out.
UNLABELLED = -100


@dataclass(frozen=True)
class ExampleLoss:
    """The loss of one example, a function of its logits z (C outputs) and its label.

        cross_entropy:         w_y (1 - e) nll_y + e / C sum_c w_c nll_c,  nll = -log softmax(z)
        squared_error:         mean over the outputs of (z_c - y_c)^2
        binary_cross_entropy:  mean over the labels of
                               -(v_c y_c log sigmoid(z_c) + (1 - y_c) log(1 - sigmoid(z_c)))
        token_cross_entropy:   mean over the labelled tokens of their cross entropy
        span_cross_entropy:    (nll_first + nll_last) / 2, of the first and the last token of the
                               answer, each -log softmax over the S tokens
        function:              `function(logits_BC, labels_B) -> losses_B`

    They are the losses of transformers' classifiers of sequences and of tokens
    (`CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss`), and of its models for question answering,
    for a batch of one example. With label
    smoothing e, cross entropy is that of the Trainer's `label_smoothing_factor`, which equals
    torch's.

    A token classifier's loss of a batch is a mean over all labelled tokens of the batch, in which
    long sentences count more. The loss of an example is that of a batch of it alone.

    With class weights w, the loss of an example is its cross entropy times the weight of its class.
    torch's weighted mean over a batch divides by the sum of the batch's weights instead of by its
    size. That factor is the same for all examples of a batch and belongs to the training, as the
    learning rate does; it is not part of the loss of an example.

    Attributes:
        kind: `cross_entropy`, `squared_error`, `binary_cross_entropy`, `token_cross_entropy`,
            `span_cross_entropy` or `function`.
        label_smoothing: e, from 0 to 1; of cross entropy, also of tokens.
        class_weights: w, (C,) numbers of at least 0; of cross entropy, also of tokens. None for 1
            each.
        pos_weight: v, (C,) numbers of at least 0; of binary cross entropy. None for 1 each.
        function: of the kind `function`. Each of its B losses may depend on its own row only.

    Examples:
        >>> import torch
        >>> import tracmod as tm
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> tm.ExampleLoss(label_smoothing=0.1)(logits, labels)
        tensor([0.2269, 1.2633])
        >>> tm.ExampleLoss(class_weights=[3, 1])(logits, labels)
        tensor([0.3808, 3.9398])
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=32
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> train = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 0}]
        >>> smoothed = tm.ExampleLoss(label_smoothing=0.1)
        >>> tm.exact_influence(model, train, train, loss=smoothed).shape
        torch.Size([2, 2])

    Source: Szegedy et al. 2016, arXiv 1512.00567, section 7 (label smoothing).
    """

    kind: LossKind = "cross_entropy"
    _: KW_ONLY
    label_smoothing: float = 0.0
    class_weights: Sequence[float] | None = None
    pos_weight: Sequence[float] | None = None
    function: LossFunction | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: a setting is out of range, or belongs to another kind.
        """
        if self.kind not in get_args(LossKind):
            raise ValueError(
                f"loss: expected one of {', '.join(get_args(LossKind))}, got {self.kind!r}"
            )
        if (
            isinstance(self.label_smoothing, bool)
            or not _is_real(self.label_smoothing)
            or not 0 <= self.label_smoothing <= 1
        ):
            raise ValueError(
                f"label_smoothing: expected a number from 0 to 1, got {self.label_smoothing!r}"
            )
        for name in ("class_weights", "pos_weight"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checked_weights(name, getattr(self, name)))
        needed_kinds = {
            "label_smoothing": ("cross_entropy", "token_cross_entropy"),
            "class_weights": ("cross_entropy", "token_cross_entropy"),
            "pos_weight": ("binary_cross_entropy",),
            "function": ("function",),
        }
        for name, kinds in needed_kinds.items():
            if getattr(self, name) and self.kind not in kinds:
                raise ValueError(
                    f"{name}: expected only with the loss {' or '.join(kinds)}, got {self.kind}"
                )
        if self.kind == "function" and not callable(self.function):
            raise ValueError(f"function: expected a function, got {self.function!r}")

    def __call__(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Compute the loss of each example, (B,).

        Logits of lower precision are widened to float32 first; float64 stays float64.

        Args:
            logits_BC: (B, C), or (B, S, C) for token cross entropy, or (B, 2, S) for that of spans.
            labels_B: (B,) classes for cross entropy; (B, S) for token cross entropy, -100 for
                tokens without a label; (B, 2) positions for spans; (B, C) targets for the other
                kinds, also (B,) if C is 1.

        Raises:
            ValueError: a function of the user does not return a loss per example.
        """
        if logits_BC.dtype != torch.float64:
            logits_BC = logits_BC.float()
        if self.kind == "function":
            assert self.function is not None
            losses: Any = self.function(logits_BC, labels_B)
            if not isinstance(losses, Tensor) or losses.shape != logits_BC.shape[:1]:
                got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(
                    f"loss {function_name(self.function)}: expected a loss per example, shape "
                    f"({len(logits_BC)},), got {got}; a mean over the batch hides them"
                )
            return losses
        if self.kind == "cross_entropy":
            return F.cross_entropy(
                logits_BC,
                labels_B.reshape(len(logits_BC)),
                weight=_like(self.class_weights, logits_BC),
                label_smoothing=self.label_smoothing,
                reduction="none",
            )
        # The first and the last token of an answer are two choices among S tokens, as two labelled
        # tokens are two choices among C classes.
        if self.kind in ("token_cross_entropy", "span_cross_entropy"):
            losses_BS = F.cross_entropy(
                logits_BC.flatten(0, 1),
                labels_B.flatten(),
                weight=_like(self.class_weights, logits_BC),
                label_smoothing=self.label_smoothing,
                ignore_index=UNLABELLED,
                reduction="none",
            ).view(labels_B.shape)
            return losses_BS.sum(dim=1) / labels_B.ne(UNLABELLED).sum(dim=1)
        labels_BC = labels_B.to(logits_BC.dtype).reshape(logits_BC.shape)
        if self.kind == "squared_error":
            squares_BC = (logits_BC - labels_BC).square()
            return squares_BC.squeeze(-1) if squares_BC.shape[1] == 1 else squares_BC.mean(dim=1)
        losses_BC = F.binary_cross_entropy_with_logits(
            logits_BC, labels_BC, pos_weight=_like(self.pos_weight, logits_BC), reduction="none"
        )
        return losses_BC.mean(dim=1)

    @property
    def measured(self) -> ExampleLoss:
        """The same loss without smoothing and weights, which measures a prediction.

        Under smoothing, a prediction that is surer than the smoothed label has too high a loss, and
        a training example that makes it less sure would count as its proponent.
        """
        return self if self.kind == "function" else ExampleLoss(self.kind)

    def label_problem(self, label: Any, num_labels: int) -> str | None:
        """Return what is wrong with a label, to follow "expected" in a message, or None."""
        if self.kind == "cross_entropy":
            if type(label) is int and 0 <= label < num_labels:
                return None
            problem = f"an integer label from 0 to {num_labels - 1}, got {label!r}{_mark_of(label)}"
            if isinstance(label, list | tuple):
                problem += (
                    "; a model with several labels per text has problem_type "
                    "multi_label_classification"
                )
            return problem
        if self.kind == "token_cross_entropy":
            return _token_label_problem(label, num_labels)
        if self.kind == "span_cross_entropy":
            return _span_problem(label)
        is_list = isinstance(label, list | tuple)
        numbers = label if is_list else [label]
        valid = all(_is_real(number) for number in numbers)
        if self.kind == "function":
            return None if valid else f"a number or numbers as its label, got {label!r}"
        if self.kind == "binary_cross_entropy":
            if valid and len(numbers) == num_labels and is_list:
                valid = all(0 <= number <= 1 for number in numbers)
                return None if valid else f"labels from 0 to 1, got {label!r}"
            return (
                f"a list of {num_labels} numbers from 0 to 1, one per label "
                f"(multi_label_classification), got {label!r}"
            )
        if valid and len(numbers) == num_labels and is_list == (num_labels > 1):
            return None
        return f"{_counted(num_labels, 'number')} as its label, got {label!r}"

    def check_outputs(self, num_labels: int) -> None:
        """Raise an error for a model with another number of outputs.

        Raises:
            ValueError: cross entropy of a model with one output, which is always 0; or there are
                weights for another number of classes.
        """
        if self.kind in ("cross_entropy", "token_cross_entropy") and num_labels < 2:
            raise ValueError(
                f"loss {self.kind}: expected a model with 2 outputs or more, got {num_labels}, "
                f"for which it is always 0"
            )
        for name in ("class_weights", "pos_weight"):
            weights = getattr(self, name)
            if weights is not None and len(weights) != num_labels:
                raise ValueError(
                    f"{name}: expected {num_labels} numbers, one per class, got {len(weights)}"
                )

    def check_function(self, labels: Tensor, num_labels: int) -> None:
        """Check a user's function on a few labels and random logits.

        Args:
            labels: (B, ...) labels of a few examples.
            num_labels: C.

        Raises:
            ValueError: it fails, does not return one loss per example, or a row's loss depends on
                other rows or not on its logits.
        """
        if self.function is None:
            return
        name = f"loss {function_name(self.function)}"
        generator = torch.Generator().manual_seed(0)
        logits_BC = torch.randn(len(labels), num_labels, generator=generator).requires_grad_()
        try:
            together_B = self(logits_BC, labels)
            alone_B = torch.cat([self(logits_BC[row : row + 1], labels[row : row + 1])
                                 for row in range(len(labels))])  # fmt: skip
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{name}: expected a function of logits {tuple(logits_BC.shape)} and labels "
                f"{tuple(labels.shape)}, {labels.dtype}, it fails with: {error}"
            ) from None
        if not torch.allclose(together_B, alone_B, rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"{name}: expected the loss of each example to depend on its own row only, but it "
                f"is another one beside other rows"
            )
        if not together_B.requires_grad:
            raise ValueError(f"{name}: expected a function of the logits, it has no gradient")

    @property
    def identity(self) -> dict[str, Any] | None:
        """What features and scores depend on, or None for a loss that identities do not name."""
        tree = self.to_json()
        return None if tree in [{"kind": kind} for kind in _KINDS_WITHOUT_IDENTITY] else tree

    def to_json(self) -> dict[str, Any]:
        """Return the loss as JSON; of a function, its name and a digest of its source."""
        if self.function is not None:
            digest = _function_digest(self.function)
            return {
                "kind": "function",
                "name": function_name(self.function),
                "digest": digest,
            }
        tree: dict[str, Any] = {"kind": self.kind, "label_smoothing": self.label_smoothing or None}
        tree |= {
            name: None if getattr(self, name) is None else list(getattr(self, name))
            for name in ("class_weights", "pos_weight")
        }
        return {name: value for name, value in tree.items() if value is not None}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> ExampleLoss:
        """Return the loss of `to_json`.

        Raises:
            ValueError: it is a function, which JSON does not hold, or no loss.
        """
        known = {field.name for field in fields(cls)} - {"function"}
        unknown = sorted(set(tree) - known)
        if unknown or "kind" not in tree or tree["kind"] == "function":
            raise ValueError(f"loss: expected kind, {', '.join(sorted(known))}, got {dict(tree)}")
        return cls(tree["kind"], **{name: tree[name] for name in tree if name != "kind"})

    def __str__(self) -> str:
        """Return the loss in words."""
        if self.function is not None:
            return f"the function {function_name(self.function)}"
        return described_loss(self.to_json())


def described_loss(tree: Mapping[str, Any]) -> str:
    """Return a loss in words.

    Args:
        tree: the loss as `ExampleLoss.to_json` returns it, or as a training recorded it.
    """
    if tree.get("kind") == "function":
        return f"the function {tree.get('name')}"
    words = str(tree.get("kind", tree)).replace("_", " ")
    details = [
        f"{name.replace('_', ' ')} "
        + (
            ", ".join(f"{number:g}" for number in value)
            if isinstance(value, list)
            else f"{value:g}"
        )
        for name, value in tree.items()
        if name != "kind"
    ]
    return words + (f" with {' and '.join(details)}" if details else "")


def as_loss(loss: ExampleLoss | LossFunction | None) -> ExampleLoss | None:
    """Return a loss as `ExampleLoss`: a plain function becomes one of the kind `function`.

    Raises:
        ValueError: it is neither.
    """
    if loss is None or isinstance(loss, ExampleLoss):
        return loss
    if not callable(loss):
        raise ValueError(f"loss: expected an ExampleLoss or a function, got {loss!r}")
    return ExampleLoss("function", function=loss)


def own_loss(model: Any, *, float_vectors: bool = False) -> ExampleLoss:
    """Return the loss that transformers chooses for a classifier.

    For a token classifier it is token cross entropy, for question answering that of spans. For a
    sequence classifier, `problem_type` says; without one, it is squared error for one output,
    binary cross entropy if the labels are vectors of floats, and cross entropy otherwise.

    Args:
        model: the model, of which the class and the config count.
        float_vectors: whether a label is a vector of floats.

    Raises:
        ValueError: the problem type is unknown.
    """
    unit = model_unit(model)
    if unit != "text":
        return ExampleLoss(CROSS_ENTROPY_OF[unit])
    config = model.config
    problem_type, num_labels = getattr(config, "problem_type", None), int(config.num_labels or 0)
    if problem_type is None:
        problem_type = "multi_label_classification" if float_vectors else ""
        if num_labels == 1:
            problem_type = "regression"
    kinds: dict[str, LossKind] = {
        "": "cross_entropy",
        "single_label_classification": "cross_entropy",
        "regression": "squared_error",
        "multi_label_classification": "binary_cross_entropy",
    }
    if problem_type not in kinds:
        raise ValueError(
            f"problem_type: expected {', '.join(filter(None, kinds))}, got {problem_type!r}"
        )
    return ExampleLoss(kinds[problem_type])


def check_unit(model: Any, loss: ExampleLoss) -> None:
    """Refuse the loss of texts, tokens or spans for a model of another kind.

    Raises:
        ValueError: the loss is one of another kind of model.
    """
    unit = model_unit(model)
    others = {kind: other for other, kind in CROSS_ENTROPY_OF.items() if other != "text"}
    if others.get(loss.kind, "text") != unit:
        expected = "a loss of texts" if unit == "text" else CROSS_ENTROPY_OF[unit]
        raise ValueError(f"loss: expected {expected} for {type(model).__name__}, got {loss}")


def stated_loss(
    kind: LossKind | None,
    label_smoothing: float | None,
    class_weights: str | None,
    label_names: Sequence[str],
    *,
    unit: Unit = "text",
) -> ExampleLoss | None:
    """Return the loss that options of the command line state, or None if they state none.

    Args:
        kind: the kind; None for cross entropy if one of the others is given.
        label_smoothing: as in `ExampleLoss`.
        class_weights: `name=weight,...` for all classes, or weights in the order of the classes.
        label_names: the names of the classes.
        unit: what the model says something of, which says whose cross entropy it is.

    Raises:
        ValueError: an option is malformed or belongs to another kind.
    """
    if kind is None and label_smoothing is None and class_weights is None:
        return None
    weights = None
    if class_weights is not None:
        parts = [part.strip() for part in class_weights.split(",")]
        names, numbers = list(label_names), parts
        if all("=" in part for part in parts):
            pairs = [part.rpartition("=") for part in parts]
            names, numbers = [name.strip() for name, _, _ in pairs], [value for *_, value in pairs]
        try:
            weight_of = dict(zip(names, map(float, numbers), strict=True))
        except ValueError:
            weight_of = {}
        if sorted(weight_of) != sorted(label_names) or len(names) != len(label_names):
            raise ValueError(
                f"--class-weights: expected a number for each of {', '.join(label_names)}, such as "
                f"{','.join(f'{name}=1' for name in label_names)}, got {class_weights!r}"
            )
        weights = [weight_of[name] for name in label_names]
    return ExampleLoss(
        kind or CROSS_ENTROPY_OF[unit],
        label_smoothing=label_smoothing or 0.0,
        class_weights=weights,
    )


def loss_of_examples(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    loss: ExampleLoss | LossFunction | None = None,
) -> ExampleLoss:
    """Return the loss that was given, or else the model's own for the labels of these examples."""
    given = as_loss(loss)
    if given is not None:
        return given
    label = examples[0]["labels"] if examples else None
    is_vector = isinstance(label, list | tuple) and any(isinstance(n, float) for n in label)
    return own_loss(model, float_vectors=is_vector)


def loss_of_batch(model: Any, labels: Tensor, loss: ExampleLoss | None) -> ExampleLoss:
    """Return the loss that was given, or else the model's own for a batch's labels."""
    if loss is not None:
        return loss
    return own_loss(model, float_vectors=labels.dim() > 1 and labels.is_floating_point())


def per_example_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Compute the loss of each example that the study trains with, (B,).

    `-log softmax(logits)[label]`, or `(logit - label)^2` for a model with one output; for a token
    classifier, the mean over the labelled tokens.

    Args:
        logits_BC: (B, C), or (B, S, C) of a token classifier.
        labels_B: (B,) class indices, or targets if C is 1; (B, S) of a token classifier.
    """
    kind: LossKind = "squared_error" if logits_BC.shape[-1] == 1 else "cross_entropy"
    kind = "token_cross_entropy" if logits_BC.dim() == 3 else kind
    return ExampleLoss(kind)(logits_BC, labels_B)


def function_name(function: Callable[..., Any]) -> str:
    """Return the full name of a function, or of the class of a callable object."""
    if isinstance(function, functools.partial):
        return f"partial({function_name(function.func)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _function_digest(function: Any) -> str:
    """Compute a SHA-256 digest of a function's source and of the values that it closes over.

    Values whose text has an address in it give another digest in every process. Features are then
    made again, never taken over by mistake.
    """
    digest = hashlib.sha256(function_name(function).encode())
    if isinstance(function, functools.partial):
        digest.update(_function_digest(function.func).encode())
        digest.update(repr((function.args, sorted(function.keywords.items()))).encode())
        return digest.hexdigest()
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        digest.update(inspect.getsource(named).encode())
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        digest.update(repr(named).encode() if code is None else code.co_code)
        digest.update(b"" if code is None else repr(code.co_consts).encode())
    closure = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    digest.update(repr((getattr(function, "__defaults__", None), closure)).encode())
    if isinstance(function, torch.nn.Module):
        tensors = {name: tensor.tolist() for name, tensor in function.state_dict().items()}
        digest.update(repr((function, tensors)).encode())
    elif named is not function:
        digest.update(repr(sorted(getattr(function, "__dict__", {}).items())).encode())
    return digest.hexdigest()


def _is_real(number: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(number, Real) and math.isfinite(number)


def _checked_weights(name: str, weights: Any) -> tuple[float, ...]:
    """Return weights as a tuple of numbers, after checking them."""
    plain = weights.tolist() if hasattr(weights, "tolist") else weights
    valid = (
        isinstance(plain, Sequence)
        and all(is_real(weight) and math.isfinite(weight) and weight >= 0 for weight in plain)
        and any(plain)
    )
    if not valid:
        raise ValueError(
            f"{name}: expected numbers of at least 0, one per class and not all 0, got {weights!r}"
        )
    return tuple(float(weight) for weight in plain)


def _like(weights: Sequence[float] | None, logits_BC: Tensor) -> Tensor | None:
    return None if weights is None else logits_BC.new_tensor(weights)


def _counted(count: int, name: str) -> str:
    return f"a {name}" if count == 1 else f"a list of {count} {name}s"


def _token_label_problem(labels: Any, num_labels: int) -> str | None:
    """Return what is wrong with the labels of an example's tokens, or None."""
    if not isinstance(labels, list | tuple):
        return f"a list of labels, one per token, got {labels!r}"
    for label in labels:
        if type(label) is not int or (label != UNLABELLED and not 0 <= label < num_labels):
            return f"labels of tokens from 0 to {num_labels - 1}, or -100 for none, got {label!r}"
    if all(label == UNLABELLED for label in labels):
        return "at least one labelled token, got labels of -100 only"
    return None


def _span_problem(span: Any) -> str | None:
    """Return what is wrong with the label of an example of question answering, or None."""
    is_pair = isinstance(span, list | tuple) and len(span) == 2
    if not is_pair or any(type(position) is not int for position in span):
        return f"the positions of the answer's first and last token, got {span!r}"
    if not 0 <= span[0] <= span[1]:
        return f"an answer that begins at or before its last token, got {span!r}"
    return None


def _mark_of(label: Any) -> str:
    """Return what a label that is no class usually means, to follow it in a message."""
    if label == -1:
        return ", the usual mark of examples without a label"
    if label == -100:
        return ", the usual mark of examples that a loss leaves out"
    if isinstance(label, float) and label.is_integer():
        return " (transformers takes float labels for several labels per text)"
    return ""
