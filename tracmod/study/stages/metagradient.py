"""The stage `metagradient`: derivatives of test losses through the fine-tuning; metagradient/.

1. Differentiate the mean test loss of every language, and single test examples that the config
   names, for each model. A task is one sweep over as many quantities as fit into memory.
2. If the config has `path_points`, do so also where the examples of one training language have less
   weight, for each language and each of some weights: a task each. The mean of these derivatives is
   the change of the loss when the language is left out, and not only its start.
3. To check them, train with some examples left out of their batches, with the same order, dropout
   and initial weights: a task for each share. One more for the smallest share, in which these
   examples lose a tenth of their weight, says whether the derivatives are right where a change is
   small.
4. Write tables, and summary.json with how smooth the training was measured to be.

Signs are those of influence: minus the derivative, the first-order change of the loss when the
example is left out. Positive: a proponent.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tracmod.choices import ModelName
from tracmod.config import MetagradientConfig
from tracmod.files import progress
from tracmod.files.durable import file_sha256, write_csv, write_json, write_parquet
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.run_metagradient import left_out_weights, open_run_replay, quantities_of
from tracmod.study.run_training import initial_model, training_settings
from tracmod.study.worker import Advance, run_tasks
from tracmod.training.batch_mean import WeightedMean
from tracmod.training.fine_tune import untrained_parameters
from tracmod.training.metagradient import Quantity, differentiate, evaluate
from tracmod.validation.smoothness import relative_error, verdict

SMALL_CHANGE = 0.1  # of the weights of examples, where a derivative must be right if it ever is


def run(context: RunContext) -> None:
    """Differentiate, check and write the tables."""
    config = _section(context)
    tasks: list[Sweep | Check] = []
    for model_name in config.models:
        for point in [None, *_path(context)]:
            tasks += [Sweep(model_name, names, point) for names in _groups(context, model_name)]
        tasks += _checks(model_name, config)
    missing = [task for task in tasks if task.result(context) is None]
    with progress.bar("metagradient", len(missing), "task") as bar:
        # Never twice at a time: a sweep keeps the states it resumes from in its folder.
        run_tasks(context, missing, bar.update, twice=False)
    _write_tables(context, config, tasks)


def estimate(forecast: Forecast) -> Estimate:
    """Count the trainings that sweeps and checks are worth."""
    config = forecast.config.metagradient
    assert config is not None
    quantities = len(forecast.config.task.languages) + len(config.examples)
    steps, trainings = 0.0, 0
    for model_name in config.models:
        section = forecast.config.finetune if model_name == "full" else forecast.config.sparse
        each = section.epochs * math.ceil(forecast.count("train") / section.batch_size)
        sweeps = 1 + config.path_points * len(forecast.config.task.languages)
        worth = sweeps * (2 * quantities + 3) + len(_checks(model_name, config))
        trainings, steps = trainings + worth, steps + worth * each
    work = (
        f"{quantities} quantities for {len(config.models)} models: about {trainings} trainings' "
        f"time, states of up to {config.disk / 1e9:.0f} GB while it runs"
    )
    return Estimate(work, steps * forecast.rates.step, 16 * quantities * forecast.count("train"))


# --- tasks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathPoint:
    """A training in which the examples of one language have another weight than the others.

    Attributes:
        language: The language.
        weight: The weight of its examples, between 0 and 1.
        share: The share of this point in the mean over the path.
    """

    language: str
    weight: float
    share: float


@dataclass(frozen=True)
class Sweep:
    """A task: the derivatives of some quantities of one model.

    Attributes:
        model_name: The model.
        names: The names of the quantities.
        point: The weights at which the derivatives are; None: all 1, those of the fine-tuning.
    """

    model_name: ModelName
    names: tuple[str, ...]
    point: PathPoint | None = None

    def run(self, context: RunContext, advance: Advance) -> None:
        """Differentiate, and write the result, whole or not at all."""
        config, file = _section(context), self._file(context)
        mean = None
        if self.point is not None:
            languages_N = np.array(context.example_languages("train"))
            removed_N = (1 - self.point.weight) * (languages_N == self.point.language)
            mean = WeightedMean(-torch.from_numpy(removed_N), config.denominator)
        with open_run_replay(context, self.model_name, mean) as replay:
            result = differentiate(
                replay,
                [q for q in _quantities(context, self.model_name) if q.name in self.names],
                file.with_suffix(""),
                denominator=config.denominator,
                memory=config.memory,
                disk=config.disk,
                save_seconds=context.config.finetune.save_seconds,
                description=f"metagradient {self.model_name}",
            )
        measured = [
            result.gradient_difference,
            result.seconds,
            result.training_seconds,
            result.saved_states,
            result.replayed_steps,
        ]
        tensors = {
            "values": result.values_K,
            "derivatives": result.derivatives_KN,
            "norms": result.adjoint_norms_KT,
            "measured": torch.tensor(measured, dtype=torch.float64),
        }
        write_tensors(file, tensors, self._identity(context))
        advance(1)

    def result(self, context: RunContext) -> dict[str, torch.Tensor] | None:
        """Return what `run` wrote, or None."""
        return _read(self._file(context), self._identity(context))

    def _file(self, context: RunContext) -> Path:
        number = _groups(context, self.model_name).index(self.names)
        folder = context.run.metagradient / "results" / self.model_name
        if self.point is not None:
            position = _path(context).index(self.point)
            folder = folder / f"without-{self.point.language}" / f"point-{position}"
        return folder / f"sweep-{number}.safetensors"

    def _identity(self, context: RunContext) -> dict[str, Any]:
        identity = _identity(context, self.model_name) | {"quantities": list(self.names)}
        if self.point is not None:
            identity |= {"language": self.point.language, "weight": self.point.weight}
        return identity


@dataclass(frozen=True)
class Check:
    """A task: a training in which a random share of the examples has less weight.

    Attributes:
        model_name: The model.
        share: The share.
        number: The number of the share, from 0.
        removed: How much less; 1: the examples are left out.
    """

    model_name: ModelName
    share: float
    number: int
    removed: float = 1.0

    def run(self, context: RunContext, advance: Advance) -> None:
        """Train, and write all quantities, whole or not at all."""
        weights_N = self.weights(context)
        mean = WeightedMean(weights_N, _section(context).denominator)
        with open_run_replay(context, self.model_name, mean) as replay:
            for step in range(replay.total_steps):
                replay.advance(step)
            values_K = evaluate(replay, _quantities(context, self.model_name))
        write_tensors(self._file(context), {"values": values_K}, self._identity(context))
        advance(1)

    def weights(self, context: RunContext) -> torch.Tensor:
        """Return the (N,) weights of the training examples."""
        seed = context.config.seed + self.number
        return self.removed * left_out_weights(len(context.table("train")), self.share, seed)

    def result(self, context: RunContext) -> dict[str, torch.Tensor] | None:
        """Return what `run` wrote, or None."""
        return _read(self._file(context), self._identity(context))

    def _file(self, context: RunContext) -> Path:
        folder = context.run.metagradient / "results" / self.model_name
        suffix = "" if self.removed == 1 else f"-removed-{self.removed:g}"
        return folder / f"check-{self.number}{suffix}.safetensors"

    def _identity(self, context: RunContext) -> dict[str, Any]:
        names = [q.name for q in _quantities(context, self.model_name)]
        return _identity(context, self.model_name) | {"quantities": names, "share": self.share}


def _checks(model_name: ModelName, config: MetagradientConfig) -> list[Check]:
    """Return the checks of a model, that of a small change of weights last."""
    checks = [Check(model_name, share, n) for n, share in enumerate(config.checks)]
    smallest = min(checks, key=lambda check: check.share, default=None)
    return checks if smallest is None else [*checks, replace(smallest, removed=SMALL_CHANGE)]


def _section(context: RunContext) -> MetagradientConfig:
    assert context.config.metagradient is not None
    return context.config.metagradient


def _identity(context: RunContext, model_name: ModelName) -> dict[str, Any]:
    return {
        "training": file_sha256(context.run.model(model_name) / "training.json"),
        "test": context.data_digest("test"),
        "denominator": _section(context).denominator,
    }


def _read(file: Path, identity: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """Read a result; remove one of other settings, which may be changed later."""
    try:
        return read_tensors(file, identity)
    except ValueError:
        file.unlink()
        return None


def _quantities(context: RunContext, model_name: ModelName) -> list[Quantity]:
    """Return the mean loss of every test language, then that of every single example wanted."""
    singles = {test_id: [test_id] for test_id in _section(context).examples}
    return [
        *quantities_of(context, model_name, None),
        *quantities_of(context, model_name, singles),
    ]


def _path(context: RunContext) -> list[PathPoint]:
    """Return the points of the paths from weight 1 to 0, by Gauss-Legendre quadrature."""
    points = _section(context).path_points
    if points == 0:
        return []
    nodes, shares = np.polynomial.legendre.leggauss(points)
    return [
        PathPoint(language, float(0.5 * (1 + node)), float(0.5 * share))
        for language in dict.fromkeys(context.example_languages("train"))
        for node, share in zip(nodes[::-1], shares[::-1], strict=True)
    ]


def _groups(context: RunContext, model_name: ModelName) -> list[tuple[str, ...]]:
    """Divide the quantities into those of each sweep, whose adjoints fit into half the memory."""
    config = _section(context)
    names = list(dict.fromkeys(context.example_languages("test"))) + list(config.examples)
    size = config.at_once
    if size is None:
        model, _ = context.latest("initial model", "run", lambda: initial_model(context))
        section = context.config.finetune if model_name == "full" else context.config.sparse
        settings = training_settings(section, context.config.seed)
        untrained = set(untrained_parameters(model, settings))
        trained = [p for p in model.parameters() if p.requires_grad and p not in untrained]
        adjoint_bytes = 3 * sum(p.numel() * p.element_size() for p in trained)
        size = max(1, config.memory // 2 // adjoint_bytes)
    return [tuple(names[start : start + size]) for start in range(0, len(names), size)]


# --- tables ---------------------------------------------------------------------------------


def _write_tables(
    context: RunContext, config: MetagradientConfig, tasks: Sequence[Sweep | Check]
) -> None:
    """Write the tables of all models, and summary.json."""
    folder = context.run.metagradient
    for path in folder.iterdir():  # tables of an earlier config, and states of its sweeps
        if path.name != "results":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    tables: dict[str, list[pa.Table]] = {"languages": [], "strongest": [], "adjoint": []}
    tables |= {"checks": [], "path": [], "left_out": []}
    summary: dict[str, Any] = {"settings": config.model_dump(mode="json"), "models": {}}
    for model_name in config.models:
        own = [t for t in tasks if isinstance(t, Sweep) and t.model_name == model_name]
        sweeps = [sweep for sweep in own if sweep.point is None]
        checks = [t for t in tasks if isinstance(t, Check) and t.model_name == model_name]
        results = [sweep.result(context) for sweep in sweeps]
        joined = {
            name: np.concatenate([result[name].numpy() for result in results if result])
            for name in ("values", "derivatives", "norms")
        }
        names = [name for sweep in sweeps for name in sweep.names]
        influence_KN = -joined["derivatives"]
        write_parquet(folder / f"{model_name}.parquet", _matrix(context, names, influence_KN))
        tables["languages"].append(_languages(context, model_name, names, influence_KN))
        tables["strongest"].append(_strongest(context, model_name, names, influence_KN))
        tables["adjoint"].append(_adjoint(model_name, names, joined["norms"]))
        checked = [
            _check_table(context, task, names, joined["values"], influence_KN) for task in checks
        ]
        tables["checks"] += checked
        slopes = _path_slopes(context, [sweep for sweep in own if sweep.point is not None])
        if slopes.num_rows:
            tables["path"].append(slopes)
            tables["left_out"].append(_left_out(slopes))
        measured_SM = np.array([result["measured"].numpy() for result in results if result])
        summary["models"][model_name] = _summary(
            names, joined["values"], joined["norms"], measured_SM, checks, checked
        )
    for name, parts in tables.items():
        if parts:
            write_parquet(folder / f"{name}.parquet", pa.concat_tables(parts))
            write_csv(folder / f"{name}.csv", pa.concat_tables(parts))
    write_json(folder / "summary.json", summary)


def _matrix(context: RunContext, names: Sequence[str], influence_KN: np.ndarray) -> pa.Table:
    train = context.table("train")
    columns = {"train_id": train["id"], "train_language": train["language"]}
    return pa.table({**columns, **dict(zip(names, influence_KN, strict=True))})


def _languages(
    context: RunContext, model_name: str, names: Sequence[str], influence_KN: np.ndarray
) -> pa.Table:
    """Sum the influence on each quantity by training language."""
    languages_N = np.array(context.example_languages("train"))
    rows = [
        {
            "model": model_name,
            "quantity": name,
            "train_language": language,
            "influence": float(influence_N[languages_N == language].sum()),
            "mean_influence": float(influence_N[languages_N == language].mean()),
            "num_train": int((languages_N == language).sum()),
        }
        for name, influence_N in zip(names, influence_KN, strict=True)
        for language in dict.fromkeys(languages_N.tolist())
    ]
    return pa.Table.from_pylist(rows)


def _strongest(
    context: RunContext, model_name: str, names: Sequence[str], influence_KN: np.ndarray
) -> pa.Table:
    """Rank the k strongest proponents and opponents of each quantity."""
    train, k = context.table("train"), context.config.influence.ks[0]
    ids, languages = train["id"].to_pylist(), train["language"].to_pylist()
    rows = [
        {
            "model": model_name,
            "quantity": name,
            "sign": sign,
            "rank": rank,
            "train_id": ids[row],
            "train_language": languages[row],
            "influence": float(influence_N[row]),
        }
        for name, influence_N in zip(names, influence_KN, strict=True)
        for sign, factor in (("positive", -1), ("negative", 1))
        for rank, row in enumerate(np.argsort(factor * influence_N, kind="stable")[:k], start=1)
        if factor * influence_N[row] < 0
    ]
    return pa.Table.from_pylist(rows)


def _adjoint(model_name: str, names: Sequence[str], norms_KT: np.ndarray) -> pa.Table:
    steps = norms_KT.shape[1]
    return pa.table(
        {
            "model": [model_name] * norms_KT.size,
            "quantity": np.repeat(names, steps),
            "steps_taken": np.tile(np.arange(steps), len(names)),
            "norm": norms_KT.ravel(),
        }
    )


def _path_slopes(context: RunContext, sweeps: Sequence[Sweep]) -> pa.Table:
    """Return the derivatives along the paths: how fast a loss rises as a language loses weight."""
    languages_N = np.array(context.example_languages("train"))
    rows = []
    for sweep in sweeps:
        point, result = sweep.point, sweep.result(context)
        assert point is not None
        assert result is not None
        own_N = languages_N == point.language
        for name, value, derivatives_N in zip(
            sweep.names, result["values"].tolist(), result["derivatives"].numpy(), strict=True
        ):
            rows.append(
                {
                    "model": sweep.model_name,
                    "quantity": name,
                    "train_language": point.language,
                    "weight": point.weight,
                    "share": point.share,
                    "slope": float(-derivatives_N[own_N].sum()),
                    "loss": value,
                }
            )
    return pa.Table.from_pylist(rows)


def _left_out(slopes: pa.Table) -> pa.Table:
    """Return the change of each quantity without a language: the mean of the slopes on its path."""
    changes: dict[tuple[str, str, str], float] = {}
    for row in slopes.to_pylist():
        key = (row["model"], row["quantity"], row["train_language"])
        changes[key] = changes.get(key, 0.0) + row["share"] * row["slope"]
    names = ("model", "quantity", "train_language")
    return pa.Table.from_pylist(
        [dict(zip(names, key, strict=True)) | {"change": change} for key, change in changes.items()]
    )


def _check_table(
    context: RunContext,
    task: Check,
    names: Sequence[str],
    values_K: np.ndarray,
    influence_KN: np.ndarray,
) -> pa.Table:
    """Compare the predicted change of every quantity with that of a training."""
    result = task.result(context)
    assert result is not None
    return pa.table(
        {
            "model": [task.model_name] * len(names),
            "share": [task.share] * len(names),
            "check": [task.number] * len(names),
            "removed": [task.removed] * len(names),
            "quantity": list(names),
            "predicted": -influence_KN @ task.weights(context).double().numpy(),
            "actual": result["values"].numpy() - values_K,
        }
    )


def _summary(
    names: Sequence[str],
    values_K: np.ndarray,
    norms_KT: np.ndarray,
    measured_SM: np.ndarray,
    checks: Sequence[Check],
    checked: Sequence[pa.Table],
) -> dict[str, Any]:
    """Return the measured properties of one model's derivatives."""
    growth_K = norms_KT[:, 0] / norms_KT[:, -1]
    errors = {
        task: relative_error(table["predicted"].to_numpy(), table["actual"].to_numpy())
        for task, table in zip(checks, checked, strict=True)
    }
    left_out = [task for task in checks if task.removed == 1]
    error_of_share = {
        share: float(np.mean([errors[task] for task in left_out if task.share == share]))
        for share in sorted({task.share for task in left_out})
    }
    of_small_change = next((error for task, error in errors.items() if task.removed != 1), None)
    difference, seconds, training_seconds, states, _ = measured_SM.T
    return {
        "quantities": list(names),
        "loss": values_K.tolist(),
        "steps": norms_KT.shape[1] - 1,
        "checkpoints_equal": True,  # or the sweep would have stopped
        "gradient_difference": float(difference.max()),
        "adjoint_growth": dict(zip(names, growth_K.tolist(), strict=True)),
        "relative_error": {str(share): error for share, error in error_of_share.items()},
        "relative_error_of_small_change": of_small_change,
        "verdict": verdict(float(growth_K.max()), error_of_share, of_small_change),
        "seconds": float(seconds.sum()),
        "trainings": float((seconds / training_seconds).sum()),
        "saved_states": int(states.max()),
    }
