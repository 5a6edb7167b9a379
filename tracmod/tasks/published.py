"""What the published corpora share: files in a folder or on the Hub, and rows left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from tracmod.config import TaskConfig


def check_languages(config: TaskConfig, known: Sequence[str]) -> None:
    """Refuse a language that the corpus does not have.

    Raises:
        ValueError: which languages are unknown, and which there are.
    """
    unknown = [language for language in config.languages if language not in known]
    if unknown and config.hub_name is None:
        raise ValueError(
            f"task {config.name} has no language {', '.join(unknown)}, only {', '.join(known)}"
        )


def find_file(folder: Path, *names: str) -> Path:
    """The first of `folder / name` that is there, plain or gzipped.

    Raises:
        ValueError: none is there.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ValueError(f"{folder}: expected the published file {names[0]}, found none")


def load_from_hub(
    repository: str, language: str, split: str, columns: Mapping[str, str], files: str
) -> pa.Table:
    """Load a split of a language from the Hub.

    Args:
        repository: `owner/name`; its configurations are named as the languages.
        language: the configuration.
        split: `train`, `validation` or `test`.
        columns: new name -> the name there, of the columns to return.
        files: which published files to put into `task.path` instead, for the error.

    Raises:
        ValueError: it could not be loaded, or lacks a column.
    """
    import datasets

    try:
        data = datasets.load_dataset(repository, language, split=split)
    except Exception as error:  # whatever the Hub's client may raise, offline or not
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ValueError(
            f"{repository} ({language}, {split}) could not be loaded from the Hub "
            f"({type(error).__name__}: {reason}); to use local files, set task.path to a folder "
            f"with {files}"
        ) from None
    missing = [name for name in columns.values() if name not in data.column_names]
    if missing:
        raise ValueError(
            f"{repository} ({language}, {split}): expected columns {', '.join(columns.values())}, "
            f"got {', '.join(data.column_names)}"
        )
    table = data.with_format("arrow")[:]
    return pa.table({name: table[there] for name, there in columns.items()})


def filled(table: pa.Table, *columns: str, but: str | None = None) -> pa.Table:
    """The rows whose text in every one of `columns` is neither blank nor `but`."""
    keep = pc.is_valid(table[columns[0]])
    for column in columns:
        text = pc.utf8_trim_whitespace(pc.fill_null(table[column], ""))
        keep = pc.and_(keep, pc.not_equal(text, ""))
        if but is not None:
            keep = pc.and_(keep, pc.not_equal(text, but))
    return table.filter(keep)
