"""The stages of a run, in order: one record for each. Loads neither torch nor pydantic.

A stage is a module `tracmod.study.stages.<name>` with two functions:

    run(context)        does the stage; files that are there and right are not made again
    estimate(forecast)  says what the stage would do, before it does it (`tracmod run --check`)

To add a stage, write its module and its record here. The pipeline, the commands of single stages,
`--check`, `tracmod status`, sweeps and checksums iterate over this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracmod.config import RunConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: The name of its command and in run.json.
        folder: The part of the run folder that it writes.
        reads: The sections of the config that it is the first to read.
        redone: Those of `reads` that may be changed later: the stage and those after it are then
            done again. A change of any other section is refused once the stage has begun, because
            days of work depend on it.
        records: The keys that it adds to run.json.
        requires: A section of the config without which a run does not have this stage, if any.
        uses_model: Whether it computes with the model, and so needs the device.
        shareable: Whether a run may take the finished stage from another run that has the same
            settings.
        summary: One sentence for the help of its command.
        details: A paragraph for the help of its command.
        options: Options of the example in that help.
    """

    name: str
    folder: str
    reads: tuple[str, ...] = ()
    redone: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    requires: str | None = None
    uses_model: bool = True
    shareable: bool = True
    summary: str = ""
    details: str = ""
    options: str = ""

    @property
    def module(self) -> str:
        """The name of its module."""
        return f"tracmod.study.stages.{self.name.replace('-', '_')}"


STAGES = (
    Stage(
        "data",
        folder="data",
        reads=("task",),
        records=("label_names", "tag_names", "languages", "parallel", "device"),
        uses_model=False,
        summary="Sample the examples of the task.",
    ),
    Stage(
        "finetune",
        folder="models/full",
        reads=("seed", "model", "finetune"),
        summary="Draw the examples and fine-tune on all languages.",
        options="--config demo",
    ),
    Stage(
        "prune",
        folder="subnetworks",
        reads=("prune",),
        summary="Prune attention heads to one subnetwork per language.",
    ),
    Stage(
        "sparse-finetune",
        folder="models/sparse",
        reads=("sparse_finetune",),
        summary="Fine-tune again, each language through its subnetwork.",
    ),
    Stage(
        "collect",
        folder="features",
        reads=("collect", "views"),
        redone=("views",),
        summary="Collect the features of every model, view and checkpoint.",
    ),
    Stage(
        "influence",
        folder="influence",
        reads=("influence", "analyze"),
        redone=("influence", "analyze"),
        summary="Compute influence scores and sums by language.",
    ),
    Stage(
        "analyze",
        folder="analysis",
        records=("fidelity",),
        uses_model=False,
        summary="Compare views and models, with intervals and tests.",
    ),
    Stage(
        "metagradient",
        folder="metagradient",
        reads=("metagradient",),
        redone=("metagradient",),
        requires="metagradient",
        summary="Differentiate test losses through the whole fine-tuning.",
        details="Computes how the mean loss of each test language after training changes with the "
        "weight of each training example. Takes two to three trainings per test language, and one "
        "for each check. If the run's configuration has no section `metagradient`, its defaults "
        "are used.",
        options="--set 'metagradient.models=[full]'",
    ),
    Stage(
        "retrain",
        folder="retraining",
        reads=("retrain",),
        redone=("retrain",),
        requires="retrain",
        summary="Compare influence scores with actual retraining.",
        details="Retrains the model without some of the training examples. If the run's "
        "configuration has no section `retrain`, its defaults are used. `tracmod run` with the "
        "same --set and --check prints the number of trainings.",
        options="--set retrain.subsets=16",
    ),
    Stage(
        "report",
        folder="report",
        reads=("name",),
        redone=("name",),
        uses_model=False,
        shareable=False,
        summary="Write report/index.html.",
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
_BY_NAME = {stage.name: stage for stage in STAGES}


def stage_named(name: str) -> Stage:
    """Return the stage of a name."""
    return _BY_NAME[name]


def stages_of(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the stages that a config has work for, in order."""
    return tuple(
        stage.name
        for stage in STAGES
        if stage.requires is None or getattr(config, stage.requires) is not None
    )


def stages_through(name: str) -> Sequence[Stage]:
    """Return a stage and all stages before it, in order."""
    return STAGES[: STAGES.index(_BY_NAME[name]) + 1]
