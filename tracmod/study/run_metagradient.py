"""The metagradient of a run's fine-tuning: its replay, its quantities, and one sweep over them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import torch

from tracmod.choices import DEFAULT_MEMORY, Denominator, ModelName, instance, is_real, whole_number
from tracmod.study.context import RunContext
from tracmod.study.run_folder import RunFolder
from tracmod.study.run_training import initial_model, training_settings
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.training.batch_mean import WeightedMean
from tracmod.training.folder import epoch_masks
from tracmod.training.metagradient import DEFAULT_DISK, Quantity, differentiate
from tracmod.training.replay import Replay, open_replay


def metagradient(
    run_dir: str | Path,
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    model: ModelName = "full",
    denominator: Denominator = "fixed",
    memory: int = DEFAULT_MEMORY,
    disk: int = DEFAULT_DISK,
    work_dir: str | Path | None = None,
) -> pa.Table:
    """Compute the influence of every training example on losses after a run's fine-tuning.

    The influence of example i on a group of test examples is `-d loss / d w_i`, where loss is the
    group's mean loss after the last step, and the loss of i in its batches is multiplied by
    `1 + w_i`. It is the first-order change of the loss when the example is left out of the same
    fine-tuning: same weights at the start, batches, dropout, learning rates and head masks.
    Positive: the loss would rise without the example.

    The fine-tuning is taken again step by step, compared with its checkpoints bit for bit, and
    differentiated backwards. That takes about 2.4 trainings per group.

    Args:
        run_dir: a run folder whose models are trained.
        groups: name of a group -> ids of its test examples. None: the test examples of each
            language.
        weights: id of a training example -> its weight, between 0 (left out) and 1 (as trained),
            at which the derivatives are taken; 1 for all others. The mean of the summed derivatives
            of some examples over a path of their weights from 1 to 0 is the change of the loss
            when they are left out.
        model: `full` or `sparse`. Each test example is evaluated with its language's head mask in
            the sparse model.
        denominator: `fixed`: without an example, the others of its batch keep their weight.
            `weighted`: the batch's mean is taken over the others.
        memory, disk: bytes for the states of the training, see `tracmod metagradient`.
        work_dir: folder for states, from which an interrupted call is continued; None for a
            temporary one.

    Returns:
        A row per training example: train_id, train_language, and the influence on each group.

    Raises:
        ValueError: the run or model is not trained, a weight is out of range, an id is unknown or a
            group has none, the replayed weights are not those of the checkpoints, or a budget is
            too small.

    Examples:
        >>> import tracmod as tm
        >>> influence = tm.metagradient("runs/demo")  # groups: {"name": [ids of test examples]}
        >>> influence.column_names
        ['train_id', 'train_language', 'en', 'de', 'es']
    """
    memory, disk = whole_number("memory", memory), whole_number("disk", disk, 0)
    context = RunContext(RunFolder(run_dir))
    stage = "finetune" if model == "full" else "sparse-finetune"
    if not context.run.is_done(stage):
        raise ValueError(f"{run_dir}: expected a trained model `{model}`, but {stage} is not done")
    quantities = quantities_of(context, model, groups)
    instance("weights", weights, Mapping, optional=True)
    mean = None if weights is None else _weighted_mean(context, weights, denominator)
    with (
        tempfile.TemporaryDirectory() as temporary,
        open_run_replay(context, model, mean) as replay,
    ):
        result = differentiate(
            replay,
            quantities,
            temporary if work_dir is None else work_dir,
            denominator=denominator,
            memory=memory,
            disk=disk,
            description=f"metagradient {model}",
        )
    train = context.table("train")
    columns = {"train_id": train["id"], "train_language": train["language"]}
    influence_KN = (-result.derivatives_KN).numpy()
    return pa.table({**columns, **dict(zip(result.names, influence_KN, strict=True))})


def _weighted_mean(
    context: RunContext, weights: Mapping[str, float], denominator: Denominator
) -> WeightedMean:
    ids = context.table("train")["id"].to_pylist()
    unknown = weights.keys() - set(ids)
    if unknown:
        raise ValueError(
            f"weights: expected ids of training examples, got {min(unknown, key=str)!r}"
        )
    for name, weight in weights.items():
        if not is_real(weight) or not 0 <= weight <= 1:
            raise ValueError(f"weights[{name!r}]: expected a number from 0 to 1, got {weight!r}")
    weights_N = torch.tensor([weights.get(name, 1.0) for name in ids], dtype=torch.float64)
    return WeightedMean(weights_N - 1, denominator)


def quantities_of(
    context: RunContext, model_name: ModelName, groups: Mapping[str, Sequence[str]] | None
) -> list[Quantity]:
    """Return the mean losses of groups of test examples, or of each test language.

    Raises:
        ValueError: A group is empty, or has an unknown id.
    """
    test = context.table("test")
    ids, languages = test["id"].to_pylist(), test["language"].to_pylist()
    if groups is None:
        groups = {
            name: [i for i, language in zip(ids, languages, strict=True) if language == name]
            for name in dict.fromkeys(languages)
        }
    row_of = {name: row for row, name in enumerate(ids)}
    model, tokenizer = context.latest("initial model", "run", lambda: initial_model(context))
    encoded = context.encode(tokenizer, test, model)
    masks = _last_masks(context) if model_name == "sparse" else {}
    quantities = []
    for name, group in groups.items():
        unknown = [test_id for test_id in group if test_id not in row_of]
        if unknown or not group:
            got = unknown[0] if unknown else "none"
            raise ValueError(f"group {name}: expected ids of test examples, got {got}")
        rows = [row_of[test_id] for test_id in group]
        quantities.append(
            Quantity(
                name,
                [encoded[row] for row in rows],
                [masks.get(languages[row]) for row in rows],
            )
        )
    return quantities


def _last_masks(context: RunContext) -> dict[str, HeadMask]:
    sparse = context.config.sparse
    return epoch_masks(context.run.model("sparse"), sparse.epochs, context.subnetworks)


@contextmanager
def open_run_replay(
    context: RunContext, model_name: ModelName, batch_mean: WeightedMean | None = None
) -> Iterator[Replay]:
    """Open the fine-tuning of one of the run's models, see `open_replay`."""
    model, tokenizer = initial_model(context)
    train, is_sparse = context.table("train"), model_name == "sparse"
    config = context.config.sparse if is_sparse else context.config.finetune
    masks = context.subnetworks if is_sparse else None
    dev = {
        language: context.encode(tokenizer, context.table_of("dev", language), model)
        for language in masks or {}
    }
    with open_replay(
        model,
        tokenizer,
        context.encode(tokenizer, train, model),
        train["language"].to_pylist(),
        context.run.model(model_name),
        training_settings(config, context.config.seed),
        masks=masks,
        dev=dev,
        device=context.device,
        batch_mean=batch_mean,
    ) as replay:
        yield replay


def left_out_weights(num_train: int, share: float, seed: int) -> torch.Tensor:
    """Return (N,) weights that leave out a random share of the examples: -1 for these, else 0."""
    generator = torch.Generator().manual_seed(seed)
    weights_N = torch.zeros(num_train)
    weights_N[
        torch.randperm(num_train, generator=generator)[: max(1, round(share * num_train))]
    ] = -1
    return weights_N
