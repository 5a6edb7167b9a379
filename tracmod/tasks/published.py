"""Shared parts of loaders of published corpora: files, the Hub, labels, rows without text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tracmod.config import TaskConfig
from tracmod.tasks.readers import read_rows

HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def check_languages(config: TaskConfig, known: Sequence[str]) -> None:
    """Check that the corpus has every language, unless `hub_name` names another corpus.

    Raises:
        ValueError: a language is unknown.
    """
    unknown = [language for language in config.languages if language not in known]
    if unknown and config.hub_name is None:
        raise ValueError(
            f"task {config.name}: languages: expected some of {', '.join(known)}, "
            f"got {', '.join(unknown)}"
        )


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of `folder / name` that exists, plain or gzipped.

    Raises:
        ValueError: none exists.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ValueError(f"{folder}: expected the published file {names[0]}, found none")


def read_hub(
    repository: str, language: str, split: str, columns: Mapping[str, str], files: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Load a split of a language from the Hub and yield its rows.

    Args:
        repository: `owner/name`; its configurations have the names of the languages.
        language: the configuration to load.
        split: `train`, `dev` or `test`.
        columns: our name -> the name in the data set, for each column to read.
        files: the published files that `task.path` can provide instead, for the error message.

    Yields:
        (location, values by our names) of each row; the location is for error messages.

    Raises:
        ValueError: the data set cannot be loaded, or lacks a column.
    """
    import datasets

    source = f"{repository} ({language}, {HUB_SPLITS[split]})"
    try:
        data = datasets.load_dataset(repository, language, split=HUB_SPLITS[split])
    except Exception as error:  # the client of the Hub raises exceptions of many types
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"{source} could not be loaded from the Hub ({type(error).__name__}: {reason}); "
            f"to use local files, set task.path to the folder of {files}"
        ) from None
    missing = [name for name in columns.values() if name not in data.column_names]
    if missing:
        raise ValueError(
            f"{source}: expected columns {', '.join(missing)}, got {', '.join(data.column_names)}"
        )
    table = data.with_format("arrow")[:]
    values = [
        _with_names(table[name].to_pylist(), data.features[name]) for name in columns.values()
    ]
    for number, row in enumerate(zip(*values, strict=True)):
        yield f"{source}, row {number}", dict(zip(columns, row, strict=True))


def _with_names(values: list[Any], feature: Any) -> list[Any]:
    """Return the values of a column; numbers in lists by the names that its feature gives them."""
    names = getattr(getattr(feature, "feature", None), "names", None)
    if names is None:
        return values
    return [[names[number] for number in numbers] for numbers in values]


def read_published(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a published file, as `read_hub` does; the location is `file:line`.

    Args:
        path: the file.
        columns: our name -> the name in the file, for each column to read.

    Raises:
        ValueError: a column is missing, or a row is malformed.
    """
    for line, row in read_rows(path):
        missing = [name for name in columns.values() if name not in row]
        if missing:
            raise ValueError(
                f"{path}:{line}: expected columns {', '.join(missing)}, got {', '.join(row)}"
            )
        yield f"{path}:{line}", {ours: row[theirs] for ours, theirs in columns.items()}


def class_number(label: object, numbers: Mapping[str, int], location: str) -> int:
    """Return the class of a published label.

    Args:
        label: the label.
        numbers: label -> class.
        location: where the label is, for the error message.

    Raises:
        ValueError: the label is unknown.
    """
    number = numbers.get(str(label))
    if number is None:
        raise ValueError(
            f"{location}: unknown label {label!r}, expected one of {', '.join(numbers)}"
        )
    return number


def is_left_out(*texts: str | None) -> bool:
    """Return whether a text is blank, or "NS", PAWS-X's mark for a missing translation."""
    return any(text is None or text.strip() in ("", "NS") for text in texts)
