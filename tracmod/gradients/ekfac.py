"""EK-FAC: the eigenvalue-corrected Kronecker-factored curvature of a model, as a preconditioner.

The Fisher matrix of a linear layer has (I O)^2 entries and cannot be formed. K-FAC takes it to be
the Kronecker product of the covariances of inputs and of output gradients, so its eigenvectors are
products Q_out x Q_in of theirs. EK-FAC keeps these eigenvectors, but measures the eigenvalues: the
mean square of the gradients rotated by them. So two passes over the data are needed, one for the
covariances and one for the eigenvalues.

Shape suffixes: B examples, S tokens, T all tokens of a batch, I in (including the bias's column of
ones), O out, D either of them, N examples, b examples whose gradients are formed together, P
distinct pairs of example and id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tracmod.choices import ParameterSelection, positive_number, selection_record, whole_number
from tracmod.files import progress
from tracmod.gradients.capture import Captured, Layer, capture, select_layers, warn_of_frozen
from tracmod.gradients.preconditioner import (
    Metric,
    Preconditioner,
    adam_preconditioner,
    formed_gradients,
    gradient_shape,
    input_tokens,
    output_tokens,
)
from tracmod.gradients.verified_pass import verified_pass
from tracmod.models.inputs import TokenLabels, as_examples, check_examples, unwrapped
from tracmod.models.loss import UNLABELLED, ExampleLoss, LossFunction, as_loss
from tracmod.models.modes import frozen, on_device
from tracmod.models.plain_pass import predict, predict_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The share of a layer's mean eigenvalue that is added to each eigenvalue (Grosse et al. 2023,
# section 2.2).
DAMPING = 0.1
# Examples on which a checkpoint is fitted, at most. The statistics are means over examples, which
# more examples would change little.
FIT_EXAMPLES = 10_000


def fit_ekfac(
    model: PreTrainedModel,
    dataset: Iterable[Mapping[str, Any]],
    parameters: ParameterSelection = "encoder",
    *,
    labels: Literal["sampled", "given"] = "sampled",
    damping: float = DAMPING,
    batch_tokens: int = 8192,
    device: torch.device | str | None = None,
    seed: int = 0,
    advance: Callable[[int], Any] | None = None,
    include_frozen: bool = False,
    loss: ExampleLoss | LossFunction | None = None,
) -> Preconditioner:
    """Fit the inverse of the EK-FAC approximation of a model's Fisher matrix as a metric.

    For a linear layer::

        Q_in, Q_out = eigenvectors of sum x x^T and of sum g g^T over tokens
        Lambda      = mean over examples of (Q_out^T G Q_in)^2
        D           = (Q_out x Q_in) diag(1 / (Lambda + damping * mean(Lambda))) (Q_out x Q_in)^T

    The sums are over the tokens on which the loss depends (in the last layer, often the first
    position only). LayerNorm and embeddings have a diagonal D, without rotations. Influence in this
    metric at the last checkpoint is that of influence functions (Koh and Liang 2017).

    Args:
        model: As for `collect_features`; all heads are used.
        dataset: The training examples, or enough of them. They are passed through the model twice.
        parameters: As for `collect_features`.
        labels: `sampled` to draw labels from the model's own predictions, which gives the Fisher
            matrix (the Gauss-Newton matrix of the loss, which label smoothing does not change and
            weights do); `given` for those of the dataset, which give the empirical Fisher matrix.
        damping: Share of a layer's mean eigenvalue that is added to each eigenvalue.
        batch_tokens: As for `collect_features`.
        device: As for `collect_features`.
        seed: Seed of the sampled labels. The label of an example depends on its position in the
            dataset, but not on the batches.
        advance: Called with the number of examples that were processed, 2 N in total.
        include_frozen: As for `collect_features`.
        loss: As for `collect_features`. A function of your own needs `given` labels, since it does
            not say how labels are distributed.

    Returns:
        The preconditioner, on the device of the passes.

    Raises:
        ValueError: As for `collect_features`; or there are no examples, damping is not positive, a
            loss or gradient is not finite, or labels of a function are to be sampled.

    Examples:
        >>> import tracmod as tm
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=32
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> dataset = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 0}]
        >>> preconditioner = tm.fit_ekfac(model, dataset)
        >>> projection = tm.Projection(dim=64)
        >>> features = tm.collect_features(
        ...     model, dataset, projection, preconditioner=preconditioner
        ... )
        >>> features.shape
        torch.Size([2, 64])

    Source: George et al. 2018, arXiv 1806.03884 (EK-FAC); Grosse et al. 2023, arXiv 2308.03296.
    """
    damping = positive_number("damping", damping)
    batch_tokens, seed = whole_number("batch_tokens", batch_tokens), whole_number("seed", seed, 0)
    if labels not in ("sampled", "given"):
        raise ValueError(f"labels: expected sampled or given, got {labels!r}")
    model = unwrapped(model)
    examples = as_examples(dataset, "dataset", model)
    if not examples:
        raise ValueError("dataset: expected at least one example, got none")
    loss = check_examples(model, examples, loss=as_loss(loss))
    if loss.kind == "token_cross_entropy" and loss.class_weights and labels == "sampled":
        raise ValueError(
            "labels: expected given for the tags of words with class weights, got sampled"
        )
    if loss.function is not None and labels == "sampled":
        raise ValueError(
            f"labels: expected given for {loss}, which does not say how labels are distributed, "
            f"got sampled"
        )
    warn_of_frozen(model, parameters, include_frozen)
    layers = select_layers(model, parameters, include_frozen)
    with (
        frozen(model),
        on_device(model, device),
        verified_pass(model, examples, layers) as model_pass,
    ):
        if labels == "sampled":
            examples, loss = _with_sampled_labels(model, examples, loss, batch_tokens, seed)
        covariances, curvature = _Covariances(), _Curvature(layers)

        def run_pass(on_captured: Callable[[Captured], None]) -> None:
            for rows, batch in model_pass.batches(model, examples, batch_tokens):
                capture(model, layers, batch, on_captured, model_pass=model_pass, loss=loss)
                if advance is not None:
                    advance(len(rows))

        run_pass(covariances.add)
        curvature.rotations = covariances.eigenvectors()
        run_pass(curvature.add)
    return Preconditioner("ekfac", curvature.metrics(len(examples), damping))


def _with_sampled_labels(
    model: PreTrainedModel,
    examples: list[dict[str, Any]],
    loss: ExampleLoss,
    batch_tokens: int,
    seed: int,
) -> tuple[list[dict[str, Any]], ExampleLoss]:
    """Return the examples with labels drawn from the model's predictions, and the loss for them.

    The mean of the squared gradients is then the Gauss-Newton matrix of the loss. Its middle factor
    is the Hessian H of the loss by the logits. For cross entropy and squared error there are labels
    whose gradients g at the logits have E g g^T = H. Weights depend on the true label, so that
    there are none: g itself then stands for the label, and the loss is `<g, logits>`.
    """
    generator = torch.Generator().manual_seed(seed)
    if loss.kind in ("token_cross_entropy", "span_cross_entropy"):
        sampled = _with_sampled_tags(model, examples, batch_tokens, generator)
        return sampled, ExampleLoss("function", function=_sampled_tags_loss)
    logits_NC = predict(model, examples, batch_tokens=batch_tokens).double()
    not_finite_N = logits_NC.isfinite().all(dim=1).logical_not()
    if bool(not_finite_N.any()):
        raise _not_finite(int(not_finite_N.nonzero()[0]))
    num_outputs = logits_NC.shape[1]
    labels: list[Any]
    sampled_loss = loss.measured
    if loss.kind == "squared_error":
        # The mean over C outputs of (f - y)^2 is the negative log-likelihood of normal y of
        # variance C / 2.
        noise_NC = torch.randn(logits_NC.shape, generator=generator, dtype=torch.float64)
        targets_NC = logits_NC + noise_NC * (num_outputs / 2) ** 0.5
        labels = (targets_NC[:, 0] if num_outputs == 1 else targets_NC).tolist()
    elif loss.kind == "binary_cross_entropy":
        probability_NC = logits_NC.sigmoid()
        drawn_NC = torch.rand(logits_NC.shape, generator=generator, dtype=torch.float64)
        true_NC = torch.tensor([example["labels"] for example in examples], dtype=torch.float64)
        weight_NC = torch.ones_like(logits_NC)
        if loss.pos_weight is not None:
            weight_NC += (torch.tensor(loss.pos_weight, dtype=torch.float64) - 1) * true_NC
        residual_NC = probability_NC - (drawn_NC < probability_NC).double()
        labels = ((weight_NC / num_outputs).sqrt() * residual_NC).tolist()
        sampled_loss = ExampleLoss("function", function=_inner_product)
    else:
        probability_NC = logits_NC.softmax(dim=1)
        below_N = _drawn_classes(probability_NC, generator)
        labels = below_N.tolist()
        if loss.class_weights is not None:
            weight_N = _curvature_weights(loss, examples)
            residual_NC = probability_NC - torch.nn.functional.one_hot(below_N, num_outputs)
            labels = (weight_N.sqrt()[:, None] * residual_NC).tolist()
            sampled_loss = ExampleLoss("function", function=_inner_product)
    sampled = [
        {**example, "labels": label} for example, label in zip(examples, labels, strict=True)
    ]
    return sampled, sampled_loss


def _drawn_classes(probability_NC: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class (N,) from each row of probabilities."""
    # Inverse of the cumulative distribution; clamped because rounding may leave it below 1.
    drawn_N1 = torch.rand(len(probability_NC), 1, generator=generator, dtype=torch.float64)
    below_N = (probability_NC.cumsum(dim=1) < drawn_N1).sum(dim=1)
    return below_N.clamp(max=probability_NC.shape[1] - 1)


def _with_sampled_tags(
    model: PreTrainedModel,
    examples: list[dict[str, Any]],
    batch_tokens: int,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Return examples with the labels of tokens, or answers, drawn from the predictions."""
    sampled = []
    predicted = predict_tokens(model, examples, batch_tokens=batch_tokens)
    for row, (example, logits_TC) in enumerate(zip(examples, predicted, strict=True)):
        padding_TC = logits_TC == -math.inf  # of question answering, before the first token
        if not bool((logits_TC.isfinite() | padding_TC).all()):
            raise _not_finite(row)
        drawn = _drawn_classes(logits_TC.double().softmax(dim=1), generator).tolist()
        labels: list[int] = drawn  # of question answering
        if isinstance(example["labels"], TokenLabels):
            tags = iter(drawn)
            labels = TokenLabels(
                label if label == UNLABELLED else next(tags) for label in example["labels"]
            )
        sampled.append({**example, "labels": labels})
    return sampled


def _sampled_tags_loss(logits_BSC: Tensor, labels_BS: Tensor) -> Tensor:
    """Compute the loss of drawn tags whose gradients g at the logits have E g g^T = H.

    The Hessian of a mean over T tokens is that of each of them by T; the tokens' gradients are
    independent, so each has to have the factor 1 / sqrt(T).
    """
    counts_B = labels_BS.ne(UNLABELLED).sum(dim=1)
    return ExampleLoss("token_cross_entropy")(logits_BSC, labels_BS) * counts_B.sqrt()


def _not_finite(row: int) -> ValueError:
    return ValueError(f"dataset: row {row}: expected finite logits, got NaN or infinity")


def _curvature_weights(loss: ExampleLoss, examples: list[dict[str, Any]]) -> Tensor:
    """Return the factors (N,) of the Hessian of weighted cross entropy: (1 - e) w_y + e mean(w)."""
    weight_C = torch.tensor(loss.class_weights, dtype=torch.float64)
    label_N = torch.tensor([example["labels"] for example in examples]).reshape(len(examples))
    smoothing = loss.label_smoothing
    return (1 - smoothing) * weight_C[label_N] + smoothing * weight_C.mean()


def _inner_product(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    return (logits_BC * labels_BC).sum(dim=1)


class _Covariances:
    """Sums of x x^T and g g^T over tokens; layers that read the same input share x x^T."""

    def __init__(self) -> None:
        self.of_input: dict[tuple[str, ...], Tensor] = {}
        self.of_output: dict[str, Tensor] = {}

    def add(self, captured: Captured) -> None:
        if captured.layers[0].kind != "linear":
            return
        names = tuple(layer.name for layer in captured.layers)
        _accumulate(self.of_input, names, input_tokens(captured))
        for position, name in enumerate(names):
            _accumulate(self.of_output, name, output_tokens(captured, position=position))

    def eigenvectors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return Q_in and Q_out of every linear layer, float32."""
        inputs = {
            name: vectors
            for names, covariance in self.of_input.items()
            for vectors in [_eigenvectors(covariance)]
            for name in names
        }
        return {
            name: (inputs[name], _eigenvectors(covariance))
            for name, covariance in self.of_output.items()
        }


def _accumulate(sums: dict[Any, Tensor], key: Any, tokens_BSD: Tensor) -> None:
    """Add a batch's product, computed in float32, to a float64 sum over batches."""
    tokens_TD = tokens_BSD.flatten(0, 1)
    product_DD = (tokens_TD.mT @ tokens_TD).double()
    sums[key] = sums[key].add_(product_DD) if key in sums else product_DD


def _eigenvectors(covariance_DD: Tensor) -> Tensor:
    if not bool(covariance_DD.isfinite().all()):
        raise ValueError("fit_ekfac: expected finite inputs and gradients, got NaN or infinity")
    # LAPACK returns them in the order of columns, and products with them would round otherwise than
    # those with the same matrix from a file, which is in the order of rows.
    return torch.linalg.eigh(covariance_DD).eigenvectors.float().contiguous()


class _Curvature:
    """Sums over examples of the squares of rotated gradients: Lambda times N."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.rotations: dict[str, tuple[Tensor, Tensor]] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, captured: Captured) -> None:
        if captured.layers[0].kind == "embedding":
            self._add_embedding(captured)
            return
        for position, layer in enumerate(captured.layers):
            metric = Metric(
                torch.ones((), dtype=torch.float32, device=captured.x.device),
                *self._rotation(layer.name),
            )
            for _, gradients_bOI in formed_gradients(captured.of([position]), metric):
                self._sum(layer, captured.x.device).add_(gradients_bOI.square().sum(dim=0))

    def _add_embedding(self, captured: Captured) -> None:
        """Add the squares of the rows of an embedding's gradients, without forming whole ones.

        Row `id` of an example's gradient is the sum over the tokens with this id, so tokens are
        summed by pair of example and id before they are squared.
        """
        layer, (batch, _) = captured.layers[0], captured.x.shape
        g_BSD = output_tokens(captured)
        owner_B1 = torch.arange(batch, device=captured.x.device)[:, None]
        pairs, pair_BS = (captured.x + owner_B1 * layer.in_features).unique(return_inverse=True)
        rows_PD = g_BSD.new_zeros(len(pairs), g_BSD.shape[-1])
        rows_PD.index_add_(0, pair_BS.flatten(), g_BSD.flatten(0, 1))
        sums = self._sum(layer, captured.x.device)
        sums.index_add_(0, pairs % layer.in_features, rows_PD.square())

    def _rotation(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        return self.rotations.get(name, (None, None))

    def _sum(self, layer: Layer, device: torch.device) -> Tensor:
        if layer.name not in self.sums:
            self.sums[layer.name] = torch.zeros(
                gradient_shape(layer), dtype=torch.float32, device=device
            )
        return self.sums[layer.name]

    def metrics(self, count: int, damping: float) -> dict[str, Metric]:
        """Return the square root of D of every layer; 0 if no gradient has reached the layer."""
        metrics = {}
        for name, layer in self.layers.items():
            if name not in self.sums:
                metrics[name] = Metric(torch.zeros(gradient_shape(layer), dtype=torch.float32))
                continue
            mean = self.sums[name] / count
            damped = mean + damping * mean.double().mean().float()
            scale = torch.where(damped > 0, damped.rsqrt(), 0)
            metrics[name] = Metric(scale, *self._rotation(name))
        return metrics


def checkpoint_preconditioner(
    kind: Literal["adam", "ekfac"],
    model: PreTrainedModel,
    folder: Path,
    train: Callable[[], Sequence[Mapping[str, Any]]],
    *,
    parameters: ParameterSelection,
    damping: float = DAMPING,
    batch_tokens: int,
    keep_in: Path,
    identity: Mapping[str, Any],
    include_frozen: bool = False,
    loss: ExampleLoss | None = None,
) -> Preconditioner:
    """Return the preconditioner of a checkpoint: Adam's from its folder, or EK-FAC's.

    EK-FAC is fitted on the training examples, or on `FIT_EXAMPLES` of them drawn at random, and
    saved. Later calls read the file, because features can only be compared if they were collected
    with exactly the same preconditioner.

    Args:
        kind: `adam` or `ekfac`.
        model: The model of the checkpoint.
        folder: The folder of the checkpoint.
        train: Returns the encoded training examples; called if EK-FAC has to be fitted.
        parameters, batch_tokens: As for `collect_features`.
        damping: As for `fit_ekfac`.
        keep_in: The file in which the fitted preconditioner is saved.
        identity: What it depends on otherwise: digests of the model and of the data.
        include_frozen: As for `collect_features`.
        loss: As for `fit_ekfac`.

    Raises:
        ValueError: The folder has no second moment, or the saved file is damaged or has another
            identity.
    """
    if kind == "adam":
        return adam_preconditioner(model, folder, parameters, include_frozen=include_frozen)
    identity = {**identity, "parameters": selection_record(parameters), "damping": damping}
    if loss is not None and loss.identity is not None:
        identity["loss"] = loss.identity
    saved = Preconditioner.load(keep_in, "ekfac", identity)
    if saved is not None:
        return saved.to(model.device)
    examples, generator = train(), torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(examples), generator=generator)[:FIT_EXAMPLES]
    chosen = [examples[row] for row in drawn.sort().values.tolist()]
    with progress.bar(f"EK-FAC of {folder.name}", 2 * len(chosen)) as bar:
        fitted = fit_ekfac(
            model,
            chosen,
            parameters,
            damping=damping,
            batch_tokens=batch_tokens,
            advance=bar.update,
            include_frozen=include_frozen,
            loss=loss,
        )
    fitted.save(keep_in, identity)
    return fitted
