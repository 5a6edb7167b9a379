"""Read a configuration from YAML, with key=value overrides, and describe what is wrong in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import (
    ByteSize,
    TypeAdapter,
    ValidationError,
)

from tracmod.config.run import RunConfig
from tracmod.files.yaml_tree import parse_overrides, read_tree, set_value


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file into a `RunConfig`, with `section.key=value` overrides applied.

    Args:
        path: a YAML file, or the name of a built-in configuration such as `demo`.
        overrides: `section.key=value`; the value is read as YAML, so `[en, de]` is a list.

    Raises:
        ValueError: the file is missing or invalid. The message names each key at fault, with the
            expected and the given value.
    """
    tree = read_tree(path)
    for key, value in parse_overrides(overrides).items():
        set_value(tree, key, value)
    return parse_config(tree, str(path))


def override_config(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """Return the configuration with `section.key=value` overrides applied.

    A configuration read from run.json does not record which values were inherited. A value of
    `sparse_finetune` that equals that of `finetune` counts as inherited, so it follows an override
    of `finetune`.

    Raises:
        ValueError: as in `load_config`.
    """
    tree = config.model_dump(mode="json")
    if tree["sparse_finetune"] is not None:
        tree["sparse_finetune"] = {
            key: value
            for key, value in tree["sparse_finetune"].items()
            if value != tree["finetune"].get(key)
        }
    for key, value in parse_overrides(overrides).items():
        set_value(tree, key, value)
    return parse_config(tree, "--set")


def parse_config(tree: dict[str, Any], source: str) -> RunConfig:
    """Validate a tree of plain values.

    Args:
        tree: section -> key -> value.
        source: where the tree comes from, for messages.

    Raises:
        ValueError: one message that names each key at fault.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ValueError("; ".join(_describe(fault, source) for fault in error.errors())) from None


def _describe(fault: Any, source: str) -> str:
    """Return one of pydantic's errors as `source: key: message, got value`."""
    key = ".".join(str(part) for part in fault["loc"]) or "config"
    got = f", got {fault['input']!r}" if not isinstance(fault["input"], dict) else ""
    message = fault["msg"].removeprefix("Value error, ")
    return f"{source}: {key}: {message}{got}"


def parse_bytes(text: str) -> int:
    """Return a size such as 4GB (10^9 bytes each), 512MiB (2^20 bytes each) or 1000 in bytes.

    Raises:
        ValueError: not a size, or less than one byte.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < 1:
        raise ValueError(f"memory: expected a size such as 4GB or 512MiB, got {text!r}")
    return size
