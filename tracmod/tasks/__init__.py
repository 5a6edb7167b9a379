"""Tasks: examples with languages and labels, drawn and split."""

from __future__ import annotations

from tracmod.config import TaskConfig
from tracmod.tasks.entities import load_entities
from tracmod.tasks.examples import SCHEMA, TaskData, check_classes
from tracmod.tasks.files import load_files, read_examples, read_model_examples, read_model_files
from tracmod.tasks.grammar import load_grammar
from tracmod.tasks.marc import load_marc
from tracmod.tasks.pawsx import load_pawsx
from tracmod.tasks.planted import load_planted
from tracmod.tasks.questions import load_question_files, load_xquad
from tracmod.tasks.sampling import sample
from tracmod.tasks.tagged import load_tagged_files, load_treebanks, load_wikiann
from tracmod.tasks.xnli import load_xnli

__all__ = [
    "SCHEMA",
    "TaskData",
    "load_task",
    "read_examples",
    "read_model_examples",
    "read_model_files",
]

# Task -> the function that loads everything there is of it, from which the splits are drawn.
_LOADERS = {
    "grammar": load_grammar,
    "xnli": load_xnli,
    "pawsx": load_pawsx,
    "marc": load_marc,
    "files": load_files,
    "entities": load_entities,
    "wikiann": load_wikiann,
    "ud": load_treebanks,
    "tagged-files": load_tagged_files,
    "xquad": load_xquad,
    "question-files": load_question_files,
}


def load_task(config: TaskConfig) -> TaskData:
    """Load a task, draw its splits and check them.

    The same config and data always give the same examples.

    Raises:
        ValueError: malformed data (with file and line), an unknown language, too few examples, or
            examples of one class only.
    """
    if config.name == "planted":  # draws its splits itself, because it plants examples in them
        return check_classes(load_planted(config))
    return check_classes(sample(_LOADERS[config.name](config), config))
