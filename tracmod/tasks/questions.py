"""Tasks of question answering: XQuAD, and files of a user's own.

All questions of a context stay in one split.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pyarrow as pa

from tracmod.config import TaskConfig
from tracmod.tasks.examples import SPLITS, Corpus, Pool
from tracmod.tasks.files import check_disjoint, files_of_splits
from tracmod.tasks.published import find_file, read_hub
from tracmod.tasks.question_files import question_table, read_question_files

CLASSES = ["question"]  # all questions have one class


def load_xquad(config: TaskConfig) -> Corpus:
    """Load XQuAD: questions of SQuAD and their contexts, translated; splits are drawn from them.

    With `task.path`, a language is the published file `xquad.<language>.json` in that folder.

    Source: Artetxe, Ruder and Yogatama 2020, arXiv 1910.11856.
    """
    tables = []
    for language in config.languages:
        if config.path is None:
            table = question_table("xquad", _from_hub(config, language), {}, language)
        else:
            path = find_file(config.path, f"xquad.{language}.json")
            (table,) = read_question_files([path], {"language": ""}, language)
        tables.append(_with_ids(table, language, parallel=True))
    return Corpus(CLASSES, True, [Pool(pa.concat_tables(tables), SPLITS)])


def load_question_files(config: TaskConfig) -> Corpus:
    """Read the task `question-files`; splits without a file of their own are drawn from train's."""
    pools = []
    for splits, sources in files_of_splits(config).items():
        tables = []
        for path, language in sources:
            notes: list[str] = []
            (table,) = read_question_files([path], config.columns, language, notes=notes)
            for note in notes:
                warnings.warn(note, stacklevel=2)
            tables.append(_with_ids(table, language, parallel=False))
        pools.append(Pool(pa.concat_tables(tables), splits))
    check_disjoint(pools)
    return Corpus(CLASSES, False, pools)


def _from_hub(config: TaskConfig, language: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the questions of a language from the Hub, which has all of them in one split."""
    names = {name: name for name in ("id", "question", "context", "answers")}
    repository = config.hub_name or "google/xquad"
    rows = read_hub(
        repository, f"xquad.{language}", "dev", names, "the files xquad.<language>.json"
    )
    return ((number, row) for number, (_, row) in enumerate(rows, 1))


def _with_ids(table: pa.Table, language: str | None, *, parallel: bool) -> pa.Table:
    """Return a pool: ids that differ between languages, and contexts that stay in one split.

    The contexts of parallel questions are numbered, since they are in the same order everywhere.
    """
    ids, contexts = table["id"].to_pylist(), table["text_b"].to_pylist()
    number_of = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
    prefix = "" if parallel or language is None else f"{language}-"
    apart = [f"{prefix}context-{number_of[context]}" for context in contexts]
    if language is not None:
        own = pa.array([f"{language}-{name}" for name in ids])
        table = table.set_column(table.column_names.index("id"), "id", own)
    if parallel:
        position = table.column_names.index("group")
        table = table.set_column(position, "group", pa.array(ids, pa.string()))
    return table.append_column("split_group", pa.array(apart, pa.string()))
