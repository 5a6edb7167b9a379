"""The metagradient: how the loss after fine-tuning changes with the weight of a training example.

Fine-tuning takes the steps s_{t+1} = h_t(s_t, w) on states s = (weights, first and second moments
of AdamW). The weight w_i of training example i, 0 in the training itself, multiplies its loss by
1 + w_i in every batch that it is in. For a quantity f(s_T), such as the mean loss of the test
examples of a language, the adjoint a_t = df/ds_t and the metagradient follow from the last step to
the first:

    a_T = df/ds_T,    a_t = (dh_t/ds_t)^T a_{t+1},    df/dw = sum_t (dh_t/dw)^T a_{t+1}

1. Replay the fine-tuning (`tracmod.training.replay`), compare it with its checkpoints bit for bit,
   and keep states at some of the steps.
2. Take the gradient of every quantity at the end.
3. Go back through the steps. The states between those that were kept are computed again. AdamW,
   weight decay and clipping are differentiated in closed form; autograd is left with the product of
   the Hessian of one batch and one vector for each quantity.

Source: Engstrom et al. 2025, "Optimizing ML training with metagradient descent" (arXiv 2503.13751),
and Ilyas and Engstrom 2025, "MAGIC" (arXiv 2504.16430).

Shape suffixes: B examples of a batch, N training examples, K quantities, T steps.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracmod.choices import DEFAULT_MEMORY, Denominator, PassDtype
from tracmod.files import progress
from tracmod.files.durable import (
    canonical_json,
    publish_file,
    read_json,
    sha256,
    temporary_name,
    write_json,
)
from tracmod.models.inputs import TOKEN_COLUMNS, collate, pad_token_id, plan_batches
from tracmod.models.loss import per_example_loss
from tracmod.subnetworks.head_mask import HeadMask, masked
from tracmod.training.batch_mean import WeightedMean, mean_loss
from tracmod.training.replay import Replay, State

DEFAULT_DISK = 20 * 10**9
# The differentiable pass uses other attention kernels than the training, which round differently.
# A gradient that differs by more than this, relative to its norm, is not one of the same loss.
# After training in bfloat16, the pass is in float32.
GRADIENT_TOLERANCE: dict[PassDtype, float] = {"float32": 0.01, "bfloat16": 0.2}


@dataclass(frozen=True)
class Quantity:
    """A mean loss after training, whose derivatives are computed.

    Attributes:
        name: its name.
        examples: test examples from `encode`, without training labels of their own.
        masks: the head mask that each is evaluated under, None for all heads; empty: all heads.
    """

    name: str
    examples: Sequence[Mapping[str, Any]]
    masks: Sequence[HeadMask | None] = ()

    def by_mask(self) -> dict[HeadMask | None, list[Mapping[str, Any]]]:
        """Return the examples of each mask."""
        examples_of: dict[HeadMask | None, list[Mapping[str, Any]]] = {}
        masks = self.masks or [None] * len(self.examples)
        for example, mask in zip(self.examples, masks, strict=True):
            examples_of.setdefault(mask, []).append(example)
        return examples_of


@dataclass(frozen=True)
class Metagradient:
    """The derivatives of some quantities with respect to the weight of every training example.

    Attributes:
        names: names of the K quantities.
        values_K: the quantities after the training, float64.
        derivatives_KN: (K, N) float64. A negative entry: more weight on the example lowers the
            loss. Minus an entry is the first-order change of the loss when the example is left out.
        adjoint_norms_KT: (K, T + 1) float64, L2 norm of the derivative of each quantity with
            respect to the weights before each step, and after the last.
        gradient_difference: largest relative difference between the gradient that was
            differentiated and that of the training, over the steps compared.
        verified: epochs whose checkpoints equal the replayed weights bit for bit; none if examples
            have weights.
        saved_states: largest number of states on disk at a time.
        replayed_steps: steps taken forward, the first replay included.
        seconds: time of the sweep.
        training_seconds: time of one training by the steps taken forward.
    """

    names: list[str]
    values_K: Tensor
    derivatives_KN: Tensor
    adjoint_norms_KT: Tensor
    gradient_difference: float
    verified: list[int]
    saved_states: int
    replayed_steps: int
    seconds: float
    training_seconds: float


def differentiate(
    replay: Replay,
    quantities: Sequence[Quantity],
    work_dir: str | Path,
    *,
    denominator: Denominator = "fixed",
    memory: int = DEFAULT_MEMORY,
    disk: int = DEFAULT_DISK,
    save_seconds: float = 300.0,
    description: str = "metagradient",
) -> Metagradient:
    """Differentiate mean losses after a fine-tuning with respect to every example's weight.

    The loss of a batch is that of `WeightedMean`. Derivatives are at the weights w of the replay's
    `batch_mean`, or at 0 without one. An example that the training repeats has one weight for all
    times.

    Each quantity costs about 2.4 trainings, and all of them together 2.4 more (measured on a CPU,
    where all states fit into memory). A call with the same arguments continues one that was
    interrupted, with the same result bit for bit.

    Args:
        replay: the fine-tuning, from `open_replay`.
        quantities: the quantities, each with its test examples.
        work_dir: folder for states; emptied at the end.
        denominator: what happens to the mean over a batch, see `WeightedMean`; that of the replay's
            `batch_mean` if it has one.
        memory: bytes for the states between two that are kept on disk, and for the adjoints.
        disk: bytes that `work_dir` may take.
        save_seconds: seconds between two saves of the adjoints, to resume from.
        description: label of the progress bar.

    Raises:
        ValueError: the replayed training is not that of the checkpoints, the gradient cannot be
            differentiated, or `memory` or `disk` is too small; the message has the smallest.
    """
    if not quantities:
        raise ValueError("quantities: expected at least one, got none")
    _check_attention(replay)
    sweep = _Sweep(replay, quantities, Path(work_dir), denominator, memory, disk)
    result = sweep.run(save_seconds, description)
    shutil.rmtree(work_dir, ignore_errors=True)
    return result


def evaluate(replay: Replay, quantities: Sequence[Quantity]) -> Tensor:
    """Compute the (K,) quantities of the model as it is, in float64."""
    with torch.no_grad():
        return torch.stack([_accumulate(replay, q, backward=False) for q in quantities])


def _accumulate(replay: Replay, quantity: Quantity, *, backward: bool) -> Tensor:
    """Compute a quantity; with `backward`, add its gradient to that of the parameters."""
    model, count = replay.model, len(quantity.examples)
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for mask, examples in quantity.by_mask().items():
        with masked(model, mask):
            for batch in plan_batches([len(e["input_ids"]) for e in examples], 8192):
                chosen = [examples[row] for row in batch]
                inputs = collate(chosen, pad_token_id(model), model.device)
                labels_B = inputs.pop("labels")
                loss = per_example_loss(model(**inputs).logits, labels_B).sum() / count
                if backward:
                    loss.backward()
                total += loss.detach().cpu().double()
    return total


# --- one step, backwards --------------------------------------------------------------------


@dataclass
class _Adjoint:
    """The derivatives of one quantity with respect to a state, by parameter."""

    weight: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]

    @classmethod
    def at_end(cls, gradients: Mapping[str, Tensor]) -> _Adjoint:
        """Return the adjoint of a quantity after the last step, which depends on weights alone."""
        zeros = ({n: torch.zeros_like(g) for n, g in gradients.items()} for _ in range(2))
        return cls(dict(gradients), *zeros)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for a file."""
        parts = (("weight", self.weight), ("first", self.first), ("second", self.second))
        return {f"{part}:{name}": t for part, by_name in parts for name, t in by_name.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> _Adjoint:
        """Return the adjoint whose `tensors` these are."""
        parts: dict[str, dict[str, Tensor]] = {"weight": {}, "first": {}, "second": {}}
        for key, tensor in tensors.items():
            part, name = key.split(":", 1)
            parts[part][name] = tensor
        return cls(**parts)

    def norm(self) -> float:
        """Return the L2 norm of the derivative with respect to the weights."""
        # fsum does not depend on the order, which loading changes.
        return math.sqrt(math.fsum(_square(tensor) for tensor in self.weight.values()))


@dataclass(frozen=True)
class _UnitUpdate:
    """The derivatives of AdamW's update of one unit, which are the same for all quantities.

    With the gradient g, m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2, the update is
    `x' = (1 - rate decay) x - (rate / c1) m' / (sqrt(v' / c2) + eps)`, where c = 1 - b^steps.

    Attributes:
        name, index: `tensor[index]` of the parameter is the unit.
        keep: dx'/dx.
        by_first, by_second: dx'/dm' and dx'/dv'.
        by_gradient: dv'/dg.
    """

    name: str
    index: tuple[slice, ...] | None
    keep: float
    by_first: Tensor
    by_second: Tensor
    by_gradient: Tensor


@contextmanager
def _differentiable_attention(replay: Replay, step: int) -> Iterator[None]:
    """Apply the step's mask, and use attention whose backward pass has a derivative."""
    _, mask = replay.batch(step)
    with masked(replay.model, mask), sdpa_kernel(SDPBackend.MATH):
        yield


def _step_back(
    replay: Replay,
    step: int,
    before: State,
    after: State,
    adjoints: Sequence[_Adjoint],
    mean: WeightedMean,
) -> tuple[Tensor, float]:
    """Turn adjoints after a step into those before it, in place.

    Args:
        replay: the fine-tuning; its weights are changed.
        step: the step.
        before, after: the states before and after it.
        adjoints: the adjoints.
        mean: the mean loss of a batch, with the weights of all examples.

    Returns:
        (K, B) derivatives with respect to the weights of the batch's examples, and the relative
        difference between the gradient here and that of the training.
    """
    replay.load_weights(before)
    parameters = list(replay.parameters.values())
    with _differentiable_attention(replay, step):
        losses_B = replay.losses(step)
        rows, _ = replay.batch(step)
        scale_B = (1 + mean.weights_N[rows].to(losses_B)).requires_grad_()
        loss = mean_loss(losses_B, scale_B, mean.denominator)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        raw = {
            name: gradient
            for name, gradient in zip(replay.parameters, gradients, strict=True)
            if gradient is not None
        }
        detached = {name: gradient.detach() for name, gradient in raw.items()}
        norm = float(torch.nn.utils.get_total_norm(list(detached.values())))
        clip = min(1.0, replay.settings.max_grad_norm / (norm + 1e-6))
        updates = list(_unit_updates(replay, step, before, detached, clip))
        difference = _gradient_difference(replay, step, before, after, detached, clip)
        outputs = [gradient for gradient in raw.values() if gradient.requires_grad]
        weights_KB = torch.empty(len(adjoints), len(losses_B), dtype=losses_B.dtype)
        # One buffer for all quantities, because filling new pages is slow on a CPU.
        by_raw = {name: torch.empty_like(gradient) for name, gradient in detached.items()}
        for number, adjoint in enumerate(adjoints):
            _through_update(replay, updates, adjoint, by_raw)
            _through_clipping(by_raw, detached, norm, clip)
            products = torch.autograd.grad(
                outputs,
                [*parameters, scale_B],
                [by_raw[name] for name, gradient in raw.items() if gradient.requires_grad],
                retain_graph=number < len(adjoints) - 1,
                allow_unused=True,
            )
            for name, product in zip(replay.parameters, products[:-1], strict=True):
                if product is not None:
                    adjoint.weight[name] += product
            weights_KB[number] = products[-1].cpu()
    return weights_KB, difference


def _unit_updates(
    replay: Replay, step: int, before: State, gradients: Mapping[str, Tensor], clip: float
) -> Iterator[_UnitUpdate]:
    """Yield the derivatives of the updates of all units that the step moves."""
    _, mask = replay.batch(step)
    rate = replay.learning_rate(step)
    beta1, beta2, epsilon = replay.optimizer.constants
    for unit in replay.optimizer.updated(mask):
        if unit.parameter_name not in gradients:
            continue
        gradient = gradients[unit.parameter_name]
        gradient = clip * (gradient if unit.index is None else gradient[unit.index])
        has_moments = f"step:{unit.name}" in before
        steps = (float(before[f"step:{unit.name}"]) if has_moments else 0.0) + 1
        first, second = (1 - beta1) * gradient, (1 - beta2) * gradient.square()
        if has_moments:
            first = first + beta1 * before[f"exp_avg:{unit.name}"]
            second = second + beta2 * before[f"exp_avg_sq:{unit.name}"]
        scale = rate / (1 - beta1**steps)
        root, correction = second.sqrt(), math.sqrt(1 - beta2**steps)
        inverse = 1 / (root / correction + epsilon)
        # A second moment of 0 has only ever seen gradients of 0, such as those of embeddings of
        # words that no batch had. They stay 0, and the root has no derivative there.
        by_second = scale * first * inverse.square() / (2 * correction * root)
        yield _UnitUpdate(
            unit.parameter_name,
            unit.index,
            keep=1 - rate * (replay.settings.weight_decay if unit.decays else 0.0),
            by_first=-scale * inverse,
            by_second=torch.where(root > 0, by_second, 0),
            by_gradient=2 * (1 - beta2) * gradient,
        )


def _through_update(
    replay: Replay,
    updates: Sequence[_UnitUpdate],
    adjoint: _Adjoint,
    by_gradient: Mapping[str, Tensor],
) -> None:
    """Take an adjoint back through AdamW's update, in place.

    What a step does not move keeps its adjoint. The part that goes through the loss is not yet in
    the result.

    Args:
        replay: the fine-tuning.
        updates: the derivatives of the step's updates.
        adjoint: the adjoint.
        by_gradient: gets the derivative with respect to the clipped gradient, by parameter.
    """
    beta1, beta2, _ = replay.optimizer.constants
    written_whole = {update.name for update in updates if update.index is None}
    for name in by_gradient.keys() - written_whole:
        by_gradient[name].zero_()
    for update in updates:
        index = ... if update.index is None else update.index
        weight, first, second, out = (
            tensors[update.name][index]
            for tensors in (adjoint.weight, adjoint.first, adjoint.second, by_gradient)
        )
        first.addcmul_(update.by_first, weight)
        second.addcmul_(update.by_second, weight)
        torch.mul(first, 1 - beta1, out=out)
        out.addcmul_(update.by_gradient, second)
        first.mul_(beta1)
        second.mul_(beta2)
        weight.mul_(update.keep)


def _through_clipping(
    by_clipped: Mapping[str, Tensor], gradients: Mapping[str, Tensor], norm: float, clip: float
) -> None:
    """Take a derivative back, in place, through `g' = c g`, `c = min(1, limit / (|g| + 1e-6))`.

    `dc/dg = -c / (|g| + 1e-6) g / |g|` where the gradient is clipped, and 0 elsewhere.
    """
    if clip == 1.0:
        return
    inner = sum(float(by_clipped[n].flatten() @ g.flatten()) for n, g in gradients.items())
    along = clip * inner / ((norm + 1e-6) * norm)
    for name, gradient in gradients.items():
        by_clipped[name].mul_(clip).sub_(gradient, alpha=along)


def _gradient_difference(
    replay: Replay,
    step: int,
    before: State,
    after: State,
    gradients: Mapping[str, Tensor],
    clip: float,
) -> float:
    """Compare a clipped gradient with that of the training, from its change of the first moment.

    Returns:
        The norm of the difference relative to that of the gradient.
    """
    _, mask = replay.batch(step)
    beta1, _, _ = replay.optimizer.constants
    difference = total = 0.0
    for unit in replay.optimizer.updated(mask):
        if unit.parameter_name not in gradients:
            continue
        gradient = gradients[unit.parameter_name]
        gradient = clip * (gradient if unit.index is None else gradient[unit.index])
        moment = after[f"exp_avg:{unit.name}"]
        if f"exp_avg:{unit.name}" in before:
            moment = moment - beta1 * before[f"exp_avg:{unit.name}"]
        trained = moment / (1 - beta1)
        difference += _square(gradient - trained)
        total += _square(trained)
    return math.sqrt(difference / total) if total else math.sqrt(difference)


def _square(tensor: Tensor) -> float:
    """Return the squared L2 norm, summed in the tensor's precision: float64 would copy it."""
    return float(torch.linalg.vector_norm(tensor)) ** 2


def _check_attention(replay: Replay) -> None:
    name = getattr(replay.model.config, "_attn_implementation", "eager")
    if name not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation: expected eager or sdpa, whose backward pass can be "
            f"differentiated, got {name}"
        )


# --- all steps ------------------------------------------------------------------------------


class _Sweep:
    """The reverse sweep through all steps, with its states on disk and in memory.

    ```
    sweep.json                 what is differentiated; another sweep's folder is emptied
    states/<step>.safetensors  a state before a step
    adjoints/<step>/           adjoints before a step, one file per quantity, and what was summed
    ```

    The states on disk form a stack. The sweep always needs the states of the steps just before the
    one it has come to: it takes the steps again from the last state on the stack, as many at a time
    as fit in memory. Where they do not, it first puts further states on the stack.
    """

    def __init__(
        self,
        replay: Replay,
        quantities: Sequence[Quantity],
        folder: Path,
        denominator: Denominator,
        memory: int,
        disk: int,
    ) -> None:
        self._replay, self._quantities, self._folder = replay, quantities, folder
        unweighted = WeightedMean(torch.zeros(replay.num_examples), denominator)
        self._mean = replay.batch_mean or unweighted
        state, adjoints = replay.state_bytes, len(quantities) * replay.state_bytes
        # In memory: the adjoints, and the states before and after every step of a segment.
        self._segment = min((memory - adjoints) // state - 1, replay.total_steps)
        if self._segment < 1:
            raise ValueError(
                f"memory: expected room for {len(quantities)} adjoints and 2 states, "
                f"{adjoints + 2 * state:,} bytes, got {memory:,}"
            )
        # On disk: the adjoints, twice while they are replaced, and states.
        self._slots = (disk - 2 * adjoints) // state
        if self._slots < 1:
            raise ValueError(
                f"disk: expected room for two saves of {len(quantities)} adjoints and a state, "
                f"{2 * adjoints + state:,} bytes, got {disk:,}"
            )
        steps = replay.total_steps
        self._adjoints: list[_Adjoint] = []
        self._derivatives_KN = torch.zeros(
            len(quantities), replay.num_examples, dtype=torch.float64
        )
        self._norms_KT = torch.zeros(len(quantities), steps + 1, dtype=torch.float64)
        self._values_K = torch.zeros(len(quantities), dtype=torch.float64)
        self._difference, self._saved_states, self._replayed_steps = 0.0, 0, 0
        self._started, self._replay_seconds = time.perf_counter(), 0.0

    def run(self, save_seconds: float, description: str) -> Metagradient:
        """Sweep from the last step, or from where an interrupted sweep came to, to the first."""
        total = self._replay.total_steps
        self._claim()
        step = self._load_adjoints()
        saved = time.monotonic()
        with progress.bar(description, total, "step", initial=total - step) as bar:
            while step > 0 or not self._adjoints:
                base, states = self._segment_before(step)
                if not self._adjoints:
                    self._begin()
                for number in reversed(range(base, step)):
                    self._take_back(number, states.pop(), states[-1])
                    bar.update()
                step = base
                if step and time.monotonic() - saved >= save_seconds:
                    self._save_adjoints(step)
                    saved = time.monotonic()
        return Metagradient(
            names=[quantity.name for quantity in self._quantities],
            values_K=self._values_K,
            derivatives_KN=self._derivatives_KN,
            adjoint_norms_KT=self._norms_KT,
            gradient_difference=self._difference,
            verified=[] if self._replay.batch_mean else list(self._replay.settings.kept_epochs),
            saved_states=self._saved_states,
            replayed_steps=self._replayed_steps,
            seconds=time.perf_counter() - self._started,
            training_seconds=self._replay_seconds / max(1, self._replayed_steps) * total,
        )

    def _begin(self) -> None:
        """Take the gradients of all quantities after the last step."""
        for number, quantity in enumerate(self._quantities):
            self._replay.model.zero_grad(set_to_none=True)
            self._values_K[number] = _accumulate(self._replay, quantity, backward=True)
            gradients = {n: torch.zeros_like(p) for n, p in self._replay.parameters.items()}
            for name, parameter in self._replay.parameters.items():
                if parameter.grad is not None:
                    gradients[name].copy_(parameter.grad)
            self._adjoints.append(_Adjoint.at_end(gradients))
            self._norms_KT[number, -1] = self._adjoints[-1].norm()
        self._replay.model.zero_grad(set_to_none=True)

    def _take_back(self, step: int, after: State, before: State) -> None:
        weights_KB, difference = _step_back(
            self._replay, step, before, after, self._adjoints, self._mean
        )
        self._difference = max(self._difference, difference)
        tolerance = GRADIENT_TOLERANCE[self._replay.settings.dtype]
        if not difference <= tolerance:
            raise ValueError(
                f"step {step + 1}: expected the gradient of the training to within "
                f"{tolerance:.0%} when it is computed so that it can be differentiated, "
                f"got a difference of {difference:.1%}; train with attn_implementation eager, or "
                f"without dropout of attention weights"
            )
        rows, _ = self._replay.batch(step)
        self._derivatives_KN.index_add_(1, torch.tensor(rows), weights_KB.double())
        for number, adjoint in enumerate(self._adjoints):
            self._norms_KT[number, step] = adjoint.norm()
        if not self._norms_KT[:, step].isfinite().all():
            raise ValueError(
                f"step {step + 1}: expected finite derivatives, got others: the training is too "
                f"rough to be differentiated; use a lower learning rate or fewer steps"
            )

    # --- states -----------------------------------------------------------------------------

    def _segment_before(self, step: int) -> tuple[int, list[State]]:
        """Return the first step of the segment that ends before `step`, and all its states.

        The states are those before each of its steps, and that after the last.
        """
        stack = self._saved_steps()
        for useless in [saved for saved in stack if saved >= step > 0]:
            self._state_file(useless).unlink()
            stack.remove(useless)
        base = stack[-1] if stack else 0
        if stack:
            self._replay.load(load_file(self._state_file(base), str(self._replay.model.device)))
        else:
            self._replay.restart()
        to_save, start = self._plan(base, step, self._slots - len(stack))
        for number in range(base, start):
            self._advance(number)
            if number + 1 in to_save:
                self._save_state(number + 1)
        states = [self._replay.state()]
        for number in range(start, step):
            self._advance(number)
            states.append(self._replay.state())
        return start, states

    def _plan(self, base: int, step: int, free: int) -> tuple[set[int], int]:
        """Choose which states to save between two steps, and where the last segment starts.

        With room for all states that are needed, one is saved per segment. Otherwise half of the
        free room is used now, and the rest when the sweep comes to the segments that are too long.
        """
        segments = math.ceil((step - base) / self._segment)
        start = max(base, step - self._segment)
        if segments - 1 <= free:
            return {start - i * self._segment for i in range(segments - 1)}, start
        spread = math.ceil(free / 2)
        positions = {base + (i + 1) * (step - base) // (spread + 1) for i in range(spread)}
        return {position for position in positions if base < position <= start}, start

    def _advance(self, step: int) -> None:
        started = time.perf_counter()
        self._replay.advance(step)
        self._replay_seconds += time.perf_counter() - started
        self._replayed_steps += 1
        if not self._adjoints:  # the first time
            self._replay.verify(step + 1)

    def _saved_steps(self) -> list[int]:
        return sorted(int(file.stem) for file in (self._folder / "states").glob("*.safetensors"))

    def _state_file(self, step: int) -> Path:
        return self._folder / "states" / f"{step}.safetensors"

    def _save_state(self, step: int) -> None:
        _save_tensors(self._replay.state(), self._state_file(step))
        self._saved_states = max(self._saved_states, len(self._saved_steps()))

    # --- resuming ---------------------------------------------------------------------------

    def _claim(self) -> None:
        """Empty the folder unless it is of the same sweep."""
        identity = {
            "training": read_json(self._replay.folder / "training.json"),
            "quantities": [
                [q.name, [m and m.digest() for m in q.masks], _plain(q.examples)]
                for q in self._quantities
            ],
            **self._mean.identity(),
        }
        digest = sha256(canonical_json(identity))
        file = self._folder / "sweep.json"
        if file.is_file() and read_json(file) == digest:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "states").mkdir(parents=True)
        write_json(file, digest)

    def _save_adjoints(self, step: int) -> None:
        folder = self._folder / "adjoints" / str(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, adjoint in enumerate(self._adjoints):
            _save_tensors(adjoint.tensors(), folder / f"{number}.safetensors")
        sums = {
            "derivatives": self._derivatives_KN,
            "norms": self._norms_KT,
            "values": self._values_K,
            "difference": torch.tensor(self._difference, dtype=torch.float64),
            "counts": torch.tensor([self._saved_states, self._replayed_steps]),
            "seconds": torch.tensor(
                [time.perf_counter() - self._started, self._replay_seconds], dtype=torch.float64
            ),
        }
        # Written last: a folder without it is not whole.
        _save_tensors(sums, folder / "sums.safetensors")
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)

    def _load_adjoints(self) -> int:
        """Load the adjoints of an interrupted sweep, and return the step that it came to."""
        saved = sorted((self._folder / "adjoints").glob("*/sums.safetensors"))
        if not saved:
            return self._replay.total_steps
        # An older one is only there if it was not yet removed.
        file = min(saved, key=lambda file: int(file.parent.name))
        sums = load_file(file)
        self._derivatives_KN, self._norms_KT = sums["derivatives"], sums["norms"]
        self._values_K, self._difference = sums["values"], float(sums["difference"])
        self._saved_states, self._replayed_steps = sums["counts"].tolist()
        seconds, self._replay_seconds = sums["seconds"].tolist()
        self._started = time.perf_counter() - seconds
        device = str(self._replay.model.device)
        self._adjoints = [
            _Adjoint.of(load_file(file.parent / f"{number}.safetensors", device))
            for number in range(len(self._quantities))
        ]
        return int(file.parent.name)


def _plain(examples: Sequence[Mapping[str, Any]]) -> str:
    rows = [{k: list(v) if k in TOKEN_COLUMNS else v for k, v in e.items()} for e in examples]
    return sha256(json.dumps(rows, sort_keys=True).encode())


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    temporary = temporary_name(file)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    publish_file(temporary, file)
