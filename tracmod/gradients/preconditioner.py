"""Preconditioners: gradients in a metric that knows the curvature, or the optimizer's steps.

First-order influence `<g', g>` takes every parameter to be as easily moved as any other. With a
metric D, `<g', D g>`, it is what a step of the optimizer changes, or of Newton's method. Here D is
symmetric, and both gradients are multiplied by its root once, so that features, inner products,
cosines and norms of self-influence are all in one metric:

    adam:   D = diag(1 / (sqrt(v) + eps)), v Adam's second moment at the checkpoint
    ekfac:  D = (Q_out x Q_in) diag(1 / (Lambda + damping)) (Q_out x Q_in)^T for each linear layer

D is no product of a factor on the input and one on the output, so that each example's gradient of
a layer has to be formed, a few examples at a time; it is then projected by the count sketch.

Shapes: B examples, S tokens, I in (with the bias's column of ones), O out, N examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracmod.files.durable import sha256
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.gradients.capture import Captured, Layer, select_layers
from tracmod.models.checkpoints import load_second_moment

ADAM_EPS = 1e-8  # of torch.optim.AdamW and of the Trainer
# Bytes of the gradients of a layer that are formed at a time.
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Metric:
    """The root of D for one layer's gradient G: `(Q_out^T G Q_in) * scale`.

    Attributes:
        scale: float32, of G's shape: linear (O, I), LayerNorm (1 + bias, D), embedding (ids, D).
        rotate_in: (I, I) float32, orthogonal; None for none.
        rotate_out: (O, O) likewise.
    """

    scale: Tensor
    rotate_in: Tensor | None = None
    rotate_out: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def to(self, device: torch.device) -> Metric:
        """The same on a device."""
        return Metric(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class Preconditioner:
    """A metric for each layer; made by `adam_preconditioner` or `fit_ekfac`.

    Attributes:
        kind: which of the two.
        metrics: by layer name.
    """

    kind: Literal["adam", "ekfac"]
    metrics: Mapping[str, Metric]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all of it: features that were made with another one are not comparable."""
        content = [self.kind.encode()]
        for name, tensor in sorted(self._tensors().items()):
            content += [name.encode(), tensor.cpu().contiguous().numpy().tobytes()]
        return sha256(b"".join(content))

    def save(self, file: str | Path, identity: Mapping[str, Any] | None = None) -> None:
        """Write it as safetensors.

        Args:
            file: where.
            identity: what it was made of, compared by `load`.
        """
        write_tensors(Path(file), self._tensors(), {"kind": self.kind, **(identity or {})})

    @classmethod
    def load(
        cls,
        file: str | Path,
        kind: Literal["adam", "ekfac"],
        identity: Mapping[str, Any] | None = None,
    ) -> Preconditioner | None:
        """What `save` wrote; None where there is no file.

        Raises:
            ValueError: the file is damaged, or of another kind or identity.
        """
        tensors = read_tensors(Path(file), {"kind": kind, **(identity or {})})
        if tensors is None:
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, part = name.rpartition(":")
            parts.setdefault(layer, {})[part] = tensor
        return cls(kind, {layer: Metric(**of_layer) for layer, of_layer in parts.items()})

    def to(self, device: torch.device) -> Preconditioner:
        """The same on a device."""
        return replace(self, metrics={name: one.to(device) for name, one in self.metrics.items()})

    def check(self, layers: Sequence[Layer]) -> None:
        """ValueError where a layer has no metric, or one of another shape."""
        for layer in layers:
            metric, shape = self.metrics.get(layer.name), gradient_shape(layer)
            if metric is None or tuple(metric.scale.shape) != shape:
                found = "none" if metric is None else f"one of {tuple(metric.scale.shape)}"
                raise ValueError(
                    f"preconditioner: expected a metric of shape {shape} for {layer.name}, got "
                    f"{found}; it was made for another model or for other parameters"
                )

    def gradients(self, captured: Captured) -> Iterator[tuple[slice, Tensor]]:
        """Preconditioned gradients of one layer, linear or LayerNorm, a few examples at a time.

        Args:
            captured: of a single layer.

        Yields:
            Which examples, and (b, O, I) or (b, 1 + bias, D) float32.
        """
        layer = captured.layers[0]
        yield from formed_gradients(captured.with_all_columns(), self.metrics[layer.name])

    def scaled(self, captured: Captured) -> Captured:
        """An embedding's gradient, preconditioned: its rows are only scaled, so it stays sparse."""
        scale = self.metrics[captured.layers[0].name].scale
        return replace(captured, g=(captured.g[0].float() * scale[captured.x],))

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{layer}:{part}": tensor
            for layer, metric in self.metrics.items()
            for part, tensor in metric.tensors().items()
        }


def gradient_shape(layer: Layer) -> tuple[int, int]:
    """Rows and columns of a layer's gradient."""
    if layer.kind == "elementwise":
        return 1 + layer.bias, layer.in_features
    if layer.kind == "embedding":
        return layer.in_features, layer.out_features
    return layer.out_features, layer.in_features + layer.bias


def formed_gradients(captured: Captured, metric: Metric) -> Iterator[tuple[slice, Tensor]]:
    """See `Preconditioner.gradients`; of a single layer, with all columns."""
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
        if metric.rotate_in is not None and metric.rotate_out is not None:
            x_BSI, g_BSO = x_BSI @ metric.rotate_in, g_BSO @ metric.rotate_out
        yield chosen, (g_BSO.mT @ x_BSI).mul_(metric.scale)


def input_tokens(captured: Captured, chosen: slice = slice(None)) -> Tensor:
    """(b, S, I) float32 inputs with the bias's column of ones, zero where there is padding."""
    layer, x_BSI = captured.layers[0], captured.x[chosen].float()
    if layer.kind == "linear" and layer.bias:
        x_BSI = torch.cat([x_BSI, x_BSI.new_ones(*x_BSI.shape[:2], 1)], dim=-1)
    return _without_padding(x_BSI, captured.lengths, chosen)


def output_tokens(captured: Captured, chosen: slice = slice(None), place: int = 0) -> Tensor:
    """(b, S, O) float32 gradients at the output of one of the layers, zero in the padding."""
    return _without_padding(captured.g[place][chosen].float(), captured.lengths, chosen)


def _without_padding(tokens_BSD: Tensor, lengths: Tensor | None, chosen: slice) -> Tensor:
    if lengths is None:
        return tokens_BSD
    place_S = torch.arange(tokens_BSD.shape[1], device=tokens_BSD.device)
    return tokens_BSD.masked_fill((place_S >= lengths[chosen, None])[..., None], 0)


# --- Adam ---------------------------------------------------------------------------------------


def adam_preconditioner(
    model: PreTrainedModel,
    second_moment: Mapping[str, Tensor] | str | Path,
    parameters: str = "encoder",
    eps: float = ADAM_EPS,
) -> Preconditioner:
    """Adam's own metric at a checkpoint: a gradient becomes the step that Adam would take for it.

    `<g', g / (sqrt(v) + eps)>`, v the second moment after its bias correction: the optimizer-aware
    influence of LESS without the first moment, which every training example of a step shares.
    Where v is 0 no gradient has ever come (a masked head, a word never seen), Adam has moved
    nothing, and the metric is 0.

    Args:
        model: the classifier.
        second_moment: by parameter name, of the parameter's shape; or the checkpoint's folder, into
            which `tracmod` or `TracInCallback(second_moment=True)` has put it.
        parameters: as in `collect_features`.
        eps: Adam's.

    Raises:
        ValueError: no second moment in the folder or of a selected parameter, or one that is not a
            number from 0 on.

    Source: Xia et al. 2024, LESS, arXiv 2402.04333, section 4.1; Kingma and Ba 2015.
    """
    if isinstance(second_moment, str | Path):
        second_moment = load_second_moment(second_moment)
    metrics = {}
    for layer in select_layers(model, parameters):
        parts = [_moment_of(second_moment, model, name) for name in layer.parameter_names]
        if layer.kind == "linear":
            whole = torch.cat([parts[0], *(bias[:, None] for bias in parts[1:])], dim=1)
        else:
            whole = torch.stack(parts) if layer.kind == "elementwise" else parts[0]
        scale = torch.where(whole > 0, (whole.sqrt() + eps).rsqrt(), 0)
        metrics[layer.name] = Metric(scale.to(model.device))
    return Preconditioner("adam", metrics)


def _moment_of(moments: Mapping[str, Tensor], model: PreTrainedModel, name: str) -> Tensor:
    shape = model.get_parameter(name).shape
    if name not in moments or moments[name].shape != shape:
        found = tuple(moments[name].shape) if name in moments else "none"
        raise ValueError(
            f"second moment of {name}: expected shape {tuple(shape)}, got {found}; was it trained "
            f"with another model?"
        )
    moment = moments[name].float()
    if not bool(((moment >= 0) & moment.isfinite()).all()):
        raise ValueError(f"second moment of {name}: expected finite numbers from 0 on, got others")
    return moment
