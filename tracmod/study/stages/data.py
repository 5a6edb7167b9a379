"""The stage `data`: sample the examples of the task into data/."""

from __future__ import annotations

from tracmod.files.durable import write_parquet
from tracmod.study.context import SPLITS, RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.stages.retrain import draw_subsets_of
from tracmod.tasks import load_task


def run(context: RunContext) -> None:
    """Write the sampled examples to data/, and the names of the labels to run.json."""
    task = load_task(context.config.task)
    for split in SPLITS:
        write_parquet(context.run.data(split), getattr(task, split))
    for name, table in task.known.items():
        write_parquet(context.run.data(name), table)
    context.run.record |= {
        "label_names": task.label_names,
        "languages": task.languages,
        "parallel": task.parallel,
        "device": context.device,
    }
    if task.tag_names is not None:
        context.run.record["tag_names"] = task.tag_names
    if context.config.retrain is not None:
        # Refuses subsets that lack a language now, not after days of work.
        draw_subsets_of(context.config, task.train)


def estimate(forecast: Forecast) -> Estimate:
    """Count the examples."""
    counts = ", ".join(f"{forecast.count(split)} {split}" for split in forecast.tables)
    languages = len(forecast.config.task.languages)
    return Estimate(f"{counts} examples in {languages} languages")
