"""What the published corpora share: files in a folder, the Hub, labels, rows without text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tracmod.config import TaskConfig
from tracmod.tasks.readers import read_rows

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


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


def read_hub(
    repository: str, language: str, split: str, columns: Mapping[str, str], files: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Load a split of a language from the Hub; yield (place, values by our names) for every row.

    Args:
        repository: `owner/name`; its configurations are named as the languages.
        language: the configuration.
        split: `train`, `dev` or `test`.
        columns: our name -> the name there, of the columns to read.
        files: which published files to put into `task.path` instead, for the error.

    Raises:
        ValueError: it could not be loaded, or lacks a column.
    """
    import datasets

    where = f"{repository} ({language}, {HUB_SPLITS[split]})"
    try:
        data = datasets.load_dataset(repository, language, split=HUB_SPLITS[split])
    except Exception as error:  # whatever the Hub's client may raise, offline or not
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"{where} could not be loaded from the Hub ({type(error).__name__}: {reason}); "
            f"to use local files, set task.path to the folder of {files}"
        ) from None
    missing = [name for name in columns.values() if name not in data.column_names]
    if missing:
        raise ValueError(
            f"{where}: expected columns {', '.join(missing)}, got {', '.join(data.column_names)}"
        )
    table = data.with_format("arrow")[:]
    values = [table[name].to_pylist() for name in columns.values()]
    for number, row in enumerate(zip(*values, strict=True)):
        yield f"{where}, row {number}", dict(zip(columns, row, strict=True))


def read_published(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, values by our names) for every row.

    Args:
        path: of the file.
        columns: our name -> the file's, of the columns to read.

    Raises:
        ValueError: a column is missing, or a row is malformed.
    """
    for line, row in read_rows(path):
        missing = [name for name in columns.values() if name not in row]
        if missing:
            raise ValueError(f"{path}:{line}: expected {', '.join(missing)}, got {', '.join(row)}")
        yield f"{path}:{line}", {name: row[there] for name, there in columns.items()}


def class_number(label: object, numbers: Mapping[str, int], place: str) -> int:
    """The number of a published label.

    Raises:
        ValueError: there is no such label; `place` is named.
    """
    number = numbers.get(str(label))
    if number is None:
        raise ValueError(f"{place}: unknown label {label!r}, expected one of {', '.join(numbers)}")
    return number


def is_left_out(*texts: str | None) -> bool:
    """Whether a published row has no text: blank, or PAWS-X's placeholder for "no translation"."""
    return any(text is None or text.strip() in ("", "NS") for text in texts)
