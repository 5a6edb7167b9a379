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

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracmod.files import progress
from tracmod.gradients.capture import Captured, Layer, capture, select_layers
from tracmod.gradients.lean_pass import lean
from tracmod.gradients.preconditioner import (
    Metric,
    Preconditioner,
    adam_preconditioner,
    formed_gradients,
    gradient_shape,
    input_tokens,
    output_tokens,
)
from tracmod.models.inputs import (
    as_examples,
    check_examples,
    collate,
    example_length,
    pad_token_id,
    plan_batches,
    predict,
)
from tracmod.models.modes import frozen, on_device

# The share of a layer's mean eigenvalue that is added to each eigenvalue (Grosse et al. 2023,
# section 2.2).
DAMPING = 0.1
# Examples on which a checkpoint is fitted, at most. The statistics are means over examples, which
# more examples would change little.
FIT_EXAMPLES = 10_000


def fit_ekfac(
    model: PreTrainedModel,
    dataset: Iterable[Mapping[str, Any]],
    parameters: str = "encoder",
    *,
    labels: Literal["sampled", "given"] = "sampled",
    damping: float = DAMPING,
    batch_tokens: int = 8192,
    device: torch.device | str | None = None,
    seed: int = 0,
    advance: Callable[[int], Any] | None = None,
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
            matrix; `given` for those of the dataset, which give the empirical Fisher matrix.
        damping: Share of a layer's mean eigenvalue that is added to each eigenvalue.
        batch_tokens: As for `collect_features`.
        device: As for `collect_features`.
        seed: Seed of the sampled labels. The label of an example depends on its position in the
            dataset, but not on the batches.
        advance: Called with the number of examples that were processed, 2 N in total.

    Returns:
        The preconditioner, on the device of the passes.

    Raises:
        ValueError: As for `collect_features`; or there are no examples, damping is not positive, or
            a loss or gradient is not finite.

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
    if damping <= 0:
        raise ValueError(f"damping: expected a number above 0, got {damping}")
    if labels not in ("sampled", "given"):
        raise ValueError(f"labels: expected sampled or given, got {labels!r}")
    examples = as_examples(dataset)
    if not examples:
        raise ValueError("dataset: expected at least one example, got none")
    check_examples(model, examples)
    layers = select_layers(model, parameters)
    with frozen(model), on_device(model, device), lean(model) as lean_columns:
        if labels == "sampled":
            examples = _with_sampled_labels(model, examples, batch_tokens, seed)
        covariances, curvature = _Covariances(), _Curvature(layers)

        def run_pass(on_captured: Callable[[Captured], None]) -> None:
            lengths = [example_length(example) for example in examples]
            for rows in plan_batches(lengths, batch_tokens):
                chosen = [examples[row] for row in rows]
                batch = collate(chosen, pad_token_id(model), model.device)
                capture(model, layers, batch, on_captured, lean_columns=lean_columns)
                if advance is not None:
                    advance(len(rows))

        run_pass(covariances.add)
        curvature.rotations = covariances.eigenvectors()
        run_pass(curvature.add)
    return Preconditioner("ekfac", curvature.metrics(len(examples), damping))


def _with_sampled_labels(
    model: PreTrainedModel, examples: list[dict[str, Any]], batch_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """Return the examples with labels drawn from the model's predictions."""
    logits_NC = predict(model, examples, batch_tokens=batch_tokens).double()
    not_finite_N = logits_NC.isfinite().all(dim=1).logical_not()
    if bool(not_finite_N.any()):
        row = int(not_finite_N.nonzero()[0])
        raise ValueError(f"dataset: row {row}: expected finite logits, got NaN or infinity")
    generator = torch.Generator().manual_seed(seed)
    if logits_NC.shape[1] == 1:
        # The loss (f - y)^2 is the negative log-likelihood of a normal y of variance 1/2.
        noise_N = torch.randn(len(examples), generator=generator, dtype=torch.float64)
        labels = (logits_NC[:, 0] + noise_N / 2**0.5).tolist()
    else:
        # Inverse of the cumulative distribution; clamped because rounding may leave it below 1.
        drawn_N = torch.rand(len(examples), 1, generator=generator, dtype=torch.float64)
        below_N = (logits_NC.softmax(dim=1).cumsum(dim=1) < drawn_N).sum(dim=1)
        labels = below_N.clamp(max=logits_NC.shape[1] - 1).tolist()
    return [{**example, "labels": label} for example, label in zip(examples, labels, strict=True)]


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
    return torch.linalg.eigh(covariance_DD).eigenvectors.float()


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
            metric = Metric(torch.ones((), device=captured.x.device), *self._rotation(layer.name))
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
            self.sums[layer.name] = torch.zeros(gradient_shape(layer), device=device)
        return self.sums[layer.name]

    def metrics(self, count: int, damping: float) -> dict[str, Metric]:
        """Return the square root of D of every layer; 0 if no gradient has reached the layer."""
        metrics = {}
        for name, layer in self.layers.items():
            if name not in self.sums:
                metrics[name] = Metric(torch.zeros(gradient_shape(layer)))
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
    parameters: str,
    damping: float = DAMPING,
    batch_tokens: int,
    keep_in: Path,
    identity: Mapping[str, Any],
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

    Raises:
        ValueError: The folder has no second moment, or the saved file is damaged or has another
            identity.
    """
    if kind == "adam":
        return adam_preconditioner(model, folder, parameters)
    identity = {**identity, "parameters": parameters, "damping": damping}
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
        )
    fitted.save(keep_in, identity)
    return fitted
