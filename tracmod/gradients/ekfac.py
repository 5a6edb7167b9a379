"""EK-FAC: the eigenvalue-corrected Kronecker-factored curvature of a model, as a preconditioner.

Shapes: B examples, S tokens, T all tokens of a batch, I in (with the bias's column of ones), O out,
N examples, P distinct pairs of example and id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

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

# Share of a layer's mean eigenvalue that is added to all of them (Grosse et al. 2023, section 2.2).
DAMPING = 0.1
# Its statistics are means over examples: more of them change them little.
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
    """The eigenvalue-corrected Kronecker-factored Fisher matrix of a model on a dataset.

    For each linear layer, Q_in has the eigenvectors of `sum x x^T` and Q_out those of `sum g g^T`,
    over the tokens that the loss depends on (in the last layer often the first alone); then over
    examples `Lambda = mean (Q_out^T G Q_in)^2`. Of LayerNorm and embeddings the diagonal,
    `Lambda = mean G^2`. The metric is the inverse of `Lambda + damping * mean(Lambda)`, the latter
    mean over the layer. Influence in it is that of influence functions (Koh and Liang 2017).

    Args:
        model, parameters, batch_tokens, device: as in `collect_features`; all heads.
        dataset: the training examples, or enough of them; passed through the model twice.
        labels: `sampled` from the model's own predictions, which makes it the Fisher matrix; the
            `given` ones, the empirical Fisher.
        damping: share of a layer's mean eigenvalue that is added.
        seed: of the sampled labels; each example's depends on its place alone.
        advance: called with the number of examples done; 2 N in all.

    Returns:
        The preconditioner, on the device of the pass.

    Raises:
        ValueError: as in `collect_features`; no examples, damping not above 0, or a loss or
            gradient that is not finite.

    Source: George et al. 2018, arXiv 1806.03884 (EK-FAC); Grosse et al. 2023, arXiv 2308.03296.
    """
    if damping <= 0:
        raise ValueError(f"damping: expected more than 0, got {damping}")
    if labels not in ("sampled", "given"):
        raise ValueError(f"labels: expected sampled or given, got {labels!r}")
    examples = as_examples(dataset)
    if not examples:
        raise ValueError("fit_ekfac: expected examples, got none")
    check_examples(model, examples)
    layers = select_layers(model, parameters)
    with frozen(model), on_device(model, device), lean(model) as kept:
        if labels == "sampled":
            examples = _with_sampled_labels(model, examples, batch_tokens, seed)
        covariances, curvature = _Covariances(), _Curvature(layers)

        def passed(on_captured: Callable[[Captured], None]) -> None:
            lengths = [example_length(example) for example in examples]
            for rows in plan_batches(lengths, batch_tokens):
                chosen = [examples[row] for row in rows]
                batch = collate(chosen, pad_token_id(model), model.device)
                capture(model, layers, batch, on_captured, kept=kept)
                if advance is not None:
                    advance(len(rows))

        passed(covariances.add)
        curvature.rotations = covariances.eigenvectors()
        passed(curvature.add)
    return Preconditioner("ekfac", curvature.metrics(len(examples), damping))


def _with_sampled_labels(
    model: PreTrainedModel, examples: list[dict[str, Any]], batch_tokens: int, seed: int
) -> list[dict[str, Any]]:
    logits_NC = predict(model, examples, batch_tokens=batch_tokens).double()
    bad_N = logits_NC.isfinite().all(dim=1).logical_not()
    if bool(bad_N.any()):
        row = int(bad_N.nonzero()[0])
        raise ValueError(f"dataset: row {row}: expected finite logits, got NaN or infinity")
    generator = torch.Generator().manual_seed(seed)
    if logits_NC.shape[1] == 1:  # the loss (f - y)^2 is that of a normal y of variance 1/2
        noise_N = torch.randn(len(examples), generator=generator, dtype=torch.float64)
        labels = (logits_NC[:, 0] + noise_N / 2**0.5).tolist()
    else:
        drawn_N = torch.rand(len(examples), 1, generator=generator, dtype=torch.float64)
        below_N = (logits_NC.softmax(dim=1).cumsum(dim=1) < drawn_N).sum(dim=1)
        labels = below_N.clamp(max=logits_NC.shape[1] - 1).tolist()
    return [{**example, "labels": label} for example, label in zip(examples, labels, strict=True)]


class _Covariances:
    """Sums of x x^T and g g^T over tokens; layers that read the same input share the former."""

    def __init__(self) -> None:
        self.of_input: dict[tuple[str, ...], Tensor] = {}
        self.of_output: dict[str, Tensor] = {}

    def add(self, captured: Captured) -> None:
        if captured.layers[0].kind != "linear":
            return
        names = tuple(layer.name for layer in captured.layers)
        _accumulate(self.of_input, names, input_tokens(captured))
        for place, name in enumerate(names):
            _accumulate(self.of_output, name, output_tokens(captured, place=place))

    def eigenvectors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`Q_in` and `Q_out` of every linear layer, float32."""
        inputs = {
            name: vectors
            for names, covariance in self.of_input.items()
            for vectors in [_eigenvectors(covariance)]
            for name in names
        }
        return {name: (inputs[name], _eigenvectors(own)) for name, own in self.of_output.items()}


def _accumulate(sums: dict[Any, Tensor], key: Any, tokens_BSD: Tensor) -> None:
    tokens_TD = tokens_BSD.flatten(0, 1)
    product_DD = (tokens_TD.mT @ tokens_TD).double()
    sums[key] = sums[key].add_(product_DD) if key in sums else product_DD


def _eigenvectors(covariance_DD: Tensor) -> Tensor:
    if not bool(covariance_DD.isfinite().all()):
        raise ValueError("fit_ekfac: expected finite inputs and gradients, got NaN or infinity")
    return torch.linalg.eigh(covariance_DD).eigenvectors.float()


class _Curvature:
    """Sums over examples of the squares of rotated gradients."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.rotations: dict[str, tuple[Tensor, Tensor]] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, captured: Captured) -> None:
        if captured.layers[0].kind == "embedding":
            self._add_embedding(captured)
            return
        for place, layer in enumerate(captured.layers):
            metric = Metric(torch.ones((), device=captured.x.device), *self._of(layer.name))
            for _, gradients_bRC in formed_gradients(captured.of([place]), metric):
                self._sum(layer, captured.x.device).add_(gradients_bRC.square().sum(dim=0))

    def _add_embedding(self, captured: Captured) -> None:
        """Of each example the rows of the ids in it, those of one id summed."""
        layer, (batch, _) = captured.layers[0], captured.x.shape
        g_BSD = output_tokens(captured)
        owner_B1 = torch.arange(batch, device=captured.x.device)[:, None]
        pairs, place = (captured.x + owner_B1 * layer.in_features).unique(return_inverse=True)
        rows_PD = g_BSD.new_zeros(len(pairs), g_BSD.shape[-1])
        rows_PD.index_add_(0, place.flatten(), g_BSD.flatten(0, 1))
        sums = self._sum(layer, captured.x.device)
        sums.index_add_(0, pairs % layer.in_features, rows_PD.square())

    def _of(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        return self.rotations.get(name, (None, None))

    def _sum(self, layer: Layer, device: torch.device) -> Tensor:
        if layer.name not in self.sums:
            self.sums[layer.name] = torch.zeros(gradient_shape(layer), device=device)
        return self.sums[layer.name]

    def metrics(self, count: int, damping: float) -> dict[str, Metric]:
        """Of every layer the root of the inverse; 0 for a layer that no gradient has reached."""
        metrics = {}
        for name, layer in self.layers.items():
            if name not in self.sums:
                metrics[name] = Metric(torch.zeros(gradient_shape(layer)))
                continue
            mean = self.sums[name] / count
            damped = mean + damping * mean.double().mean().float()
            scale = torch.where(damped > 0, damped.rsqrt(), 0)
            metrics[name] = Metric(scale, *self._of(name))
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
    """The preconditioner of a checkpoint: Adam's from its folder, EK-FAC read or else fitted.

    EK-FAC is fitted on the training examples, of more than `FIT_EXAMPLES` on so many drawn at
    random, and kept, since features are only comparable with those of the very same one.

    Args:
        kind: which.
        model: the checkpoint's.
        folder: the checkpoint's.
        train: gives the training examples, encoded; called where one is fitted.
        parameters, batch_tokens: as in `collect_features`.
        damping: as in `fit_ekfac`.
        keep_in: file of a fitted one.
        identity: what it depends on beside these: digests of the model and of the data.

    Raises:
        ValueError: no second moment in the folder, or a kept file that is damaged or of another
            identity.
    """
    if kind == "adam":
        return adam_preconditioner(model, folder, parameters)
    identity = {**identity, "parameters": parameters, "damping": damping}
    kept = Preconditioner.load(keep_in, "ekfac", identity)
    if kept is not None:
        return kept.to(model.device)
    examples, generator = train(), torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(examples), generator=generator)[:FIT_EXAMPLES]
    chosen = [examples[row] for row in drawn.sort().values.tolist()]
    with tqdm(
        total=2 * len(chosen), desc=f"EK-FAC of {folder.name}", unit="example", disable=None
    ) as bar:
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
