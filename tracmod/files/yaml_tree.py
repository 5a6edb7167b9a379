"""Trees of plain values, section -> key -> value, from YAML files and `key=value` overrides."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number, as YAML 1.2, JSON and Python do; YAML 1.1 wants 2.0e-5."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_tree(path: str | Path, embedded: str = "") -> dict[str, Any]:
    """Read the sections of a YAML file or of a built-in configuration.

    Args:
        path: a file or a name.
        embedded: the folder of built-in configurations that a name is looked up in: `sweeps`, or
            empty for those of runs.

    Raises:
        ValueError: there is no such file, it is not YAML, or it has no sections.
    """
    built_in = resources.files("tracmod.configs").joinpath(embedded, f"{path}.yaml")
    if Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8")
    elif built_in.is_file():
        text = built_in.read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"{path}: expected a YAML file or the name of a built-in configuration, found neither"
        )
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path}: expected sections (task:, model:, ...), got {type(tree).__name__}"
        )
    return tree


def parse_overrides(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of `section.key=value` overrides, read as YAML; the last of a key counts.

    Raises:
        ValueError: an override has no key or no value, or its value is not YAML.
    """
    values = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"--set {override}: expected key=value, for example finetune.epochs=5")
        try:
            values[key] = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError:
            raise ValueError(f"--set {override}: {value} is not valid YAML") from None
    return values


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` in a tree of sections, in place.

    Raises:
        ValueError: a part of the key before the last is a value, not a section.
    """
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:  # absent, or given as null
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ValueError(f"{key}={value}: {section} is a value, not a section")
    node[last] = value
