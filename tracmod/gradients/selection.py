"""Selections of parameters by patterns of names, or by a function of the name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

NEAR_NAMES = 3  # names that an error shows for a pattern that matches nothing


def matching_names(
    names: Sequence[str], selection: Sequence[str] | Callable[[str], bool]
) -> set[str]:
    """Return the names of the parameters that a selection chooses.

    A pattern chooses a parameter if it matches its full name, or that of a module that it is in:
    `bert.encoder.layer.3` stands for all of a layer, `*.query` for all query projections, and
    `*.bias` for all biases. As in file names, `*` stands for any text (dots too), `?` for a
    character and `[ab]` for one of some.

    Args:
        names: The full names of the model's parameters.
        selection: Patterns, or a function that returns whether a name is chosen.

    Raises:
        ValueError: A pattern matches nothing, or the function chooses nothing.
    """
    if callable(selection):
        chosen = {name for name in names if selection(name)}
        if not chosen:
            raise ValueError(
                f"parameters: expected a function that chooses a parameter, it chooses none of the "
                f"{len(names)} of the model, such as {names[0]}"
            )
        return chosen
    chosen = set()
    for pattern in selection:
        matched = {
            name for name in names if any(fnmatchcase(part, pattern) for part in _parts(name))
        }
        if not matched:
            raise ValueError(
                f"parameters: expected patterns of the names of parameters or modules, {pattern!r} "
                f"matches none; the nearest are {', '.join(_near_names(names, pattern))}"
            )
        chosen |= matched
    return chosen


def _parts(name: str) -> Iterator[str]:
    """Yield the full name of a parameter, and those of the modules that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _near_names(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names of parameters and modules that are most like a pattern.

    A pattern is compared with as many last parts of a name as it has parts, so that `*.qury` is
    like `bert.encoder.layer.0.attention.self.query`.
    """
    literal = pattern.strip("*.")
    count = literal.count(".") + 1
    near: dict[str, float] = {}  # last parts of a name -> how like the pattern they are
    full_name: dict[str, str] = {}
    for name in names:
        for part in _parts(name):
            end = ".".join(part.split(".")[-count:])
            if end not in near:
                near[end] = difflib.SequenceMatcher(None, literal, end).ratio()
                full_name[end] = part
    return [full_name[end] for end in sorted(near, key=lambda end: -near[end])[:NEAR_NAMES]]
