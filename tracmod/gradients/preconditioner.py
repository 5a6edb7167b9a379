"""Preconditioners: gradients in a metric given by the optimizer or by the loss's curvature.

First-order influence `<g', g>` treats all parameters as equally easy to move. With a metric D,
`<g', D g>` is the change of a loss in a step of the optimizer (adam) or of Newton's method (ekfac):

    adam:   D = diag(1 / (sqrt(v) + eps)), v Adam's second moment at the checkpoint
    ekfac:  D = (Q_out x Q_in) diag(1 / (Lambda + damping)) (Q_out x Q_in)^T for each linear layer

D is symmetric, so each gradient is multiplied by its square root when it is collected. Features,
inner products, cosines and self-influence are then all in the same metric, and nothing after the
collection needs to know it.

D scales every entry of a gradient differently, so it is not a product of a factor on the input and
one on the output. The gradient cannot be projected through its two factors, as without a metric.
It has to be formed, a few examples at a time, and is projected by a count sketch.

Shape suffixes: B examples, b some of them, S tokens, I in (including the bias's column of ones),
O out, N examples. The gradient of LayerNorm has O = 1 + bias and I = D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tracmod.choices import ADAM_EPSILON, ParameterSelection, instance, positive_number
from tracmod.files.durable import sha256
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.gradients.capture import Captured, Layer, select_layers, warn_of_frozen
from tracmod.models.checkpoints import load_second_moment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 32 << 20  # gradients of a layer that are formed at a time, at most


@dataclass(frozen=True)
class Metric:
    """The square root of D for the gradient G of one layer: `(Q_out^T G Q_in) * scale`.

    Attributes:
        scale: float32 in the shape of G: linear (O, I), LayerNorm (1 + bias, D), embedding
            (ids, D).
        rotate_in: Q_in, (I, I) float32, orthogonal; or None.
        rotate_out: Q_out, (O, O) float32, orthogonal; or None.
    """

    scale: Tensor
    rotate_in: Tensor | None = None
    rotate_out: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, device: torch.device) -> Metric:
        """Return the metric on a device."""
        return Metric(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class Preconditioner:
    """A metric for each layer, made by `adam_preconditioner` or `fit_ekfac`.

    Pass it to `collect_features` or `exact_influence`. Features of train and query examples must be
    collected with the same one.

    Attributes:
        kind: `adam` or `ekfac`.
        metrics: The metric of each layer, by the layer's name.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import tracmod as tm
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=32
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> moments = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
        >>> preconditioner = tm.adam_preconditioner(model, moments)
        >>> file, identity = f"{tempfile.mkdtemp()}/adam.safetensors", {"model": "mine"}
        >>> preconditioner.save(file, identity)
        >>> loaded = tm.Preconditioner.load(file, "adam", identity)
        >>> loaded.digest == preconditioner.digest
        True
    """

    kind: Literal["adam", "ekfac"]
    metrics: Mapping[str, Metric]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of kind and tensors; features of different digests cannot be compared."""
        content = [self.kind.encode()]
        for name, tensor in sorted(self._tensors().items()):
            content += [name.encode(), tensor.cpu().contiguous().numpy().tobytes()]
        return sha256(b"".join(content))

    def save(self, file: str | Path, identity: Mapping[str, Any] | None = None) -> None:
        """Write the preconditioner as safetensors.

        Args:
            file: Path of the file.
            identity: What it was made from; `load` compares it.
        """
        write_tensors(Path(file), self._tensors(), {"kind": self.kind, **(identity or {})})

    @classmethod
    def load(
        cls,
        file: str | Path,
        kind: Literal["adam", "ekfac"],
        identity: Mapping[str, Any] | None = None,
    ) -> Preconditioner | None:
        """Read what `save` wrote.

        Args:
            file: Path of the file.
            kind: The expected kind.
            identity: The expected identity.

        Returns:
            The preconditioner, or None if there is no file.

        Raises:
            ValueError: The file is damaged, or has another kind or identity.
        """
        tensors = read_tensors(Path(file), {"kind": kind, **(identity or {})})
        if tensors is None:
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, part = name.rpartition(":")
            parts.setdefault(layer, {})[part] = tensor
        return cls(kind, {layer: Metric(**tensors) for layer, tensors in parts.items()})

    def to(self, device: torch.device) -> Preconditioner:
        """Return the preconditioner on a device."""
        metrics = {name: metric.to(device) for name, metric in self.metrics.items()}
        return replace(self, metrics=metrics)

    def check(self, layers: Sequence[Layer]) -> None:
        """Check that there is a metric of the right shape for every layer.

        Raises:
            ValueError: A layer has no metric, or one of another shape.
        """
        for layer in layers:
            metric, shape = self.metrics.get(layer.name), gradient_shape(layer)
            if metric is None or tuple(metric.scale.shape) != shape:
                got = "none" if metric is None else f"shape {tuple(metric.scale.shape)}"
                raise ValueError(
                    f"preconditioner: {layer.name}: expected a metric of shape {shape}, got {got}; "
                    f"it was made for another model or for other parameters"
                )

    def gradients(self, captured: Captured) -> Iterator[tuple[slice, Tensor]]:
        """Form the preconditioned gradients of a linear layer or LayerNorm, some at a time.

        Args:
            captured: Inputs and output gradients of a single layer.

        Yields:
            The slice of examples, and their gradients (b, O, I) or (b, 1 + bias, D), float32.
        """
        layer = captured.layers[0]
        yield from formed_gradients(captured.with_all_columns(), self.metrics[layer.name])

    def scaled(self, captured: Captured) -> Captured:
        """Return an embedding's output gradients, multiplied by the metric.

        The metric of an embedding only scales entries, so the gradient stays sparse: it is scaled
        token by token, and need not be formed.
        """
        scale = self.metrics[captured.layers[0].name].scale
        return replace(captured, g=(captured.g[0].float() * scale[captured.x],))

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{layer}:{part}": tensor
            for layer, metric in self.metrics.items()
            for part, tensor in metric.tensors().items()
        }


def gradient_shape(layer: Layer) -> tuple[int, int]:
    """Return the rows and columns of a layer's gradient, which includes the bias."""
    if layer.kind == "elementwise":
        return 1 + layer.bias, layer.in_features
    if layer.kind == "embedding":
        return layer.in_features, layer.out_features
    return layer.out_features, layer.in_features + layer.bias


def formed_gradients(captured: Captured, metric: Metric) -> Iterator[tuple[slice, Tensor]]:
    """Form `Preconditioner.gradients` of a single layer from which no columns were left out."""
    layer = captured.layers[0]
    rows, columns = gradient_shape(layer)
    step = max(1, CHUNK_BYTES // (4 * rows * columns))
    for start in range(0, len(captured.x), step):
        chosen = slice(start, start + step)
        x_BSI, g_BSO = input_tokens(captured, chosen), output_tokens(captured, chosen)
        if layer.kind == "elementwise":
            parts = [(g_BSO * x_BSI).sum(dim=1), *([g_BSO.sum(dim=1)] if layer.bias else [])]
            yield chosen, torch.stack(parts, dim=1) * metric.scale
            continue
        # Q_out^T G Q_in = sum_s (Q_out^T g_s) (Q_in^T x_s)^T. Rotating S tokens costs less than
        # rotating G while S is below O and I.
        if metric.rotate_in is not None and metric.rotate_out is not None:
            x_BSI, g_BSO = x_BSI @ metric.rotate_in, g_BSO @ metric.rotate_out
        yield chosen, (g_BSO.mT @ x_BSI).mul_(metric.scale)


def input_tokens(captured: Captured, chosen: slice = slice(None)) -> Tensor:
    """Return inputs with the bias's column of ones, (b, S, I) float32, zero in the padding."""
    layer, x_BSI = captured.layers[0], captured.x[chosen].float()
    if layer.kind == "linear" and layer.bias:
        x_BSI = torch.cat([x_BSI, x_BSI.new_ones(*x_BSI.shape[:2], 1)], dim=-1)
    return _without_padding(x_BSI, captured.lengths, chosen)


def output_tokens(captured: Captured, chosen: slice = slice(None), position: int = 0) -> Tensor:
    """Return the output gradients of one of the layers, (b, S, O) float32, zero in the padding."""
    return _without_padding(captured.g[position][chosen].float(), captured.lengths, chosen)


def _without_padding(tokens_BSD: Tensor, lengths: Tensor | None, chosen: slice) -> Tensor:
    if lengths is None:
        return tokens_BSD
    position_S = torch.arange(tokens_BSD.shape[1], device=tokens_BSD.device)
    return tokens_BSD.masked_fill((position_S >= lengths[chosen, None])[..., None], 0)


def adam_preconditioner(
    model: PreTrainedModel,
    second_moment: Mapping[str, Tensor] | str | Path,
    parameters: ParameterSelection = "encoder",
    eps: float | None = None,
    *,
    include_frozen: bool = False,
) -> Preconditioner:
    """Return the metric of Adam at a checkpoint, in which a gradient is the step taken for it.

    `D = diag(1 / (sqrt(v) + eps))`, where v is Adam's second moment after its bias correction.
    `<g', D g>` is the optimizer-aware influence of LESS without the first moment, which all
    training examples of a step share. If v is 0, the parameter has never received a gradient (that
    of a masked head, or of a word that does not occur), so Adam has not moved it, and D is 0.

    Args:
        model: The classifier.
        second_moment: v by parameter name, in the shapes of the parameters; or the folder of a
            checkpoint in which `tracmod` or `TracInCallback(second_moment=True)` has saved it.
        parameters: As for `collect_features`.
        eps: The epsilon of Adam; None is the one that is saved with the second moment, or 1e-8,
            AdamW's default, where none is.
        include_frozen: As for `collect_features`.

    Returns:
        The preconditioner, on the device of the model.

    Raises:
        ValueError: The folder or a selected parameter has no second moment, or its shape differs,
            or it has numbers that are negative or not finite.

    Examples:
        >>> import torch
        >>> import tracmod as tm
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=32
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> moments = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
        >>> preconditioner = tm.adam_preconditioner(model, moments)
        >>> dataset = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 0}]
        >>> projection = tm.Projection(dim=64)
        >>> features = tm.collect_features(
        ...     model, dataset, projection, preconditioner=preconditioner
        ... )
        >>> features.shape
        torch.Size([2, 64])

    Source: Xia et al. 2024, LESS, arXiv 2402.04333, section 4.1; Kingma and Ba 2015.
    """
    saved_epsilon = ADAM_EPSILON
    if isinstance(second_moment, str | Path):
        second_moment, saved_epsilon = load_second_moment(second_moment)
    eps = saved_epsilon if eps is None else positive_number("eps", eps)
    instance("second_moment", second_moment, Mapping)
    metrics = {}
    warn_of_frozen(model, parameters, include_frozen)
    for layer in select_layers(model, parameters, include_frozen):
        parts = [_moment_of(second_moment, model, name) for name in layer.parameter_names]
        if layer.kind == "linear" and layer.only_bias:
            whole = parts[0][:, None]
        elif layer.kind == "linear":
            whole = torch.cat([parts[0], *(bias[:, None] for bias in parts[1:])], dim=1)
        else:
            whole = torch.stack(parts) if layer.kind == "elementwise" else parts[0]
        scale = torch.where(whole > 0, (whole.sqrt() + eps).rsqrt(), 0)
        metrics[layer.name] = Metric(scale.to(model.device))
    return Preconditioner("adam", metrics)


def _moment_of(moments: Mapping[str, Tensor], model: PreTrainedModel, name: str) -> Tensor:
    """Return the second moment of a parameter as float32, after checking it."""
    shape = model.get_parameter(name).shape
    if name not in moments or moments[name].shape != shape:
        got = tuple(moments[name].shape) if name in moments else "none"
        raise ValueError(
            f"second moment of {name}: expected shape {tuple(shape)}, got {got}; was it trained "
            f"with another model?"
        )
    moment = torch.as_tensor(moments[name]).float()
    if not bool(((moment >= 0) & moment.isfinite()).all()):
        raise ValueError(f"second moment of {name}: expected finite numbers of at least 0")
    return moment
