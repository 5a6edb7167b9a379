"""Examples, languages and labels: every task, sampled and split."""

from __future__ import annotations

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SCHEMA, TaskData, check_classes
from tracmod.tasks.files import load_files, read_examples, read_model_examples, read_model_files
from tracmod.tasks.grammar import load_grammar
from tracmod.tasks.marc import load_marc
from tracmod.tasks.pawsx import load_pawsx
from tracmod.tasks.planted import load_planted
from tracmod.tasks.sampling import sample
from tracmod.tasks.xnli import load_xnli

__all__ = [
    "SCHEMA",
    "TaskData",
    "load_task",
    "read_examples",
    "read_model_examples",
    "read_model_files",
]


def load_task(config: TaskConfig) -> TaskData:
    """Load, check, sample and split a task; the same config and data give the same examples.

    Raises:
        ValueError: malformed data (file and line), an unknown language, too few examples, or all
            of one class.
    """
    if (
        config.name == "planted"
    ):  # makes just what is asked for, so that it knows its part of each split
        return check_classes(load_planted(config))
    loader = {
        "grammar": load_grammar,
        "xnli": load_xnli,
        "pawsx": load_pawsx,
        "marc": load_marc,
        "files": load_files,
    }[config.name]
    return check_classes(sample(loader(config), config))
