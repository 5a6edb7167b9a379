"""Command-line options made from the fields of a dataclass, and those that commands share."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import click

from tracmod.choices import LARGEST_INT, EngineName, ModelName, ParameterSet

if TYPE_CHECKING:
    from tracmod.engine import Engine

Option = Callable[[Any], Any]  # a decorator, as `click.option` returns it


class GivenPath(click.Path):
    """A path that is not empty: an empty one, of an unset variable, would be the current folder."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the checked Path."""
        if not str(value):
            self.fail("expected a path, got ''.", param, ctx)
        return super().convert(value, param, ctx)


EXISTING = GivenPath(exists=True)
FOLDER = GivenPath(file_okay=False)


class PathOrUrl(GivenPath):
    """A path, or the URL of object storage as text (a Path would lose one of its slashes)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a URL unchanged and anything else as a checked Path."""
        return value if "://" in str(value) else super().convert(value, param, ctx)


class WholeNumber(click.IntRange):
    """A whole number within bounds, and within those of int64."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        number = int(super().convert(value, param, ctx))
        if abs(number) > LARGEST_INT:
            self.fail(f"expected at most {LARGEST_INT}, got {value}.", param, ctx)
        return number


class RealNumber(click.FloatRange):
    """A finite number within bounds; NaN would pass any of them."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"expected a finite number, got {value}.", param, ctx)
        return number


class Weights(RealNumber):
    """Real numbers separated by commas, not all 0, or `uniform`."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers as a tuple, or `uniform`."""
        if value == "uniform":
            return value
        numbers = tuple(super(Weights, self).convert(x, param, ctx) for x in str(value).split(","))
        if not any(numbers):
            self.fail(f"expected a number above 0, got {value!r}.", param, ctx)
        return numbers


class Bytes(click.ParamType):
    """A number of bytes, given as 4GB, 512MiB or 1000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        from tracmod.config import parse_bytes

        try:
            size = parse_bytes(str(value))
        except (ValueError, OverflowError) as error:
            self.fail(f"{error}.", param, ctx)
        if size > LARGEST_INT:
            self.fail(f"expected at most {LARGEST_INT} bytes, got {value!r}.", param, ctx)
        return size


class ColumnNames(click.ParamType):
    """Names of columns, given as text_a=premise,text_b=hypothesis."""

    name = "COLUMN=NAME,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, str]:
        """Return our column -> the name in the file."""
        from tracmod.tasks.columns import parse_columns

        try:
            return parse_columns(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class ParameterNames(click.ParamType):
    """A set of parameters, or patterns of names separated by commas."""

    name = f"{'|'.join(get_args(ParameterSet))}|PATTERN,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | list[str]:
        """Return the name of the set, or the patterns."""
        if value in get_args(ParameterSet):
            return str(value)
        patterns = [pattern.strip() for pattern in str(value).split(",")]
        if not all(patterns):
            self.fail(f"expected patterns of names, got {value!r}.", param, ctx)
        return patterns


class CountOrAuto(click.ParamType):
    """A whole number from 1 on, or `auto`, which becomes None."""

    name = "K|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        """Return the number, or None for `auto`."""
        if value == "auto":
            return None
        is_number = re.fullmatch("[0-9]{1,18}", str(value)) is not None
        if not is_number or int(value) < 1:
            self.fail(f"expected a whole number from 1 on, or auto, got {value!r}.", param, ctx)
        return int(value)


def choice(literal: Any) -> click.Choice[str]:
    """Return the click type of a `Literal`."""
    return click.Choice(get_args(literal))


def with_options(options: Sequence[Option]) -> Option:
    """Combine options into one decorator that lists them in this order in --help."""
    return lambda command: functools.reduce(lambda inner, add: add(inner), options[::-1], command)


def options_of(model: type, replaced: Mapping[str, Sequence[Option]] | None = None) -> list[Option]:
    """Return the options that fill a dataclass, in the order of its fields.

    Args:
        model: a dataclass whose fields have the metadata `help` (see `field_option`).
        replaced: name of a field -> the options that are listed in its place.
    """
    options: list[Option] = []
    for field in dataclasses.fields(model):
        given = (replaced or {}).get(field.name)
        options += [field_option(model, field.name)] if given is None else given
    return options


def field_option(model: type, name: str, **overrides: Any) -> Option:
    """Return the option that fills a field of a dataclass.

    The option is named after the field, its type follows from the annotation (a `Literal` is a
    choice, a bool a flag, a Path must exist), and its default and help are those of the field. The
    metadata `min`, `max`, `min_open` and `max_open` bound a number; `unit="bytes"` reads sizes such
    as 4GB.

    Args:
        model: the dataclass.
        name: the field.
        overrides: arguments of `click.option` that differ.
    """
    field = next(field for field in dataclasses.fields(model) if field.name == name)
    default: Any = field.default
    bounds = dict(field.metadata)
    settings: dict[str, Any] = {"help": bounds.pop("help")}
    unit = bounds.pop("unit", None)
    annotation = get_type_hints(model)[name]
    if NoneType in get_args(annotation):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    if default is dataclasses.MISSING:
        settings["required"] = True
    elif annotation is bool:
        settings["is_flag"] = True
    elif default is not None:
        settings |= {"default": default, "show_default": True}
    if unit == "bytes":
        settings |= {"type": Bytes(), "default": f"{default / 1e9:g}GB"}
    elif get_origin(annotation) is Literal:
        settings["type"] = choice(annotation)
    elif annotation in (int, float):
        settings["type"] = (WholeNumber if annotation is int else RealNumber)(**bounds)
    else:
        settings["type"] = EXISTING if annotation is Path else annotation
    option = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
    return click.option(option, name, **settings | overrides)


def engine_of(
    device: str | None,
    engine: str,
    address: str | None,
    workers: int | None,
    worker_cpus: int,
    **_: Any,
) -> closing[Engine]:
    """Open the engine that `ENGINE_OPTIONS` describe.

    Args:
        device: the device to compute on, see `resolve_device`; on GPUs the default is one local
            worker for each.
        engine, address, workers, worker_cpus: the options.
    """
    import torch

    from tracmod.engine import open_engine
    from tracmod.models.modes import resolve_device

    if engine == "local" and workers is None and resolve_device(device) == "cuda":
        workers = torch.cuda.device_count()
    return closing(open_engine(engine, address, workers, worker_cpus))


def merged_columns(
    ctx: click.Context, param: click.Parameter, values: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """Return the columns of an option that can be given several times."""
    columns: dict[str, str] = {}
    for value in values:
        for name, name_in_file in value.items():
            if columns.setdefault(name, name_in_file) != name_in_file:
                raise click.BadParameter(f"expected {name} once, got it twice.", param=param)
    return columns


def _set_quiet(ctx: click.Context, param: click.Parameter, quiet: bool) -> None:
    from tracmod.files.progress import set_quiet

    set_quiet(quiet)


QUIET = click.option(
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_set_quiet,
    help="Show no progress. Warnings and errors are still printed.",
)
ENGINE_OPTIONS = [
    click.option(
        "--engine",
        type=choice(EngineName),
        default="local",
        show_default=True,
        help="Where the work runs: on this machine, or on a Ray cluster.",
    ),
    click.option(
        "--address",
        help="Address of the Ray cluster; auto: the one started on this machine with `ray start`. "
        "Default: Ray on this machine, for this command only.",
    ),
    click.option(
        "--workers",
        type=WholeNumber(min=1),
        help="Number of parallel tasks. Default: locally 1, or one per GPU; on Ray as many as fit.",
    ),
    click.option(
        "--worker-cpus",
        type=WholeNumber(min=1),
        default=1,
        show_default=True,
        help="Cores and threads of each worker on Ray.",
    ),
]
RUN_OPTIONS = [
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a value of the configuration, such as --set finetune.epochs=5. Can be "
        "repeated.",
    ),
    *ENGINE_OPTIONS,
    click.option(
        "--memory",
        type=Bytes(),
        help="Memory for features, rankings and buffers while scoring, such as 4GB (the default). "
        "Features are read in blocks within it. The same as --set influence.memory=SIZE.",
    ),
    QUIET,
]
COLUMNS = click.option(
    "--columns",
    type=ColumnNames(),
    multiple=True,
    callback=merged_columns,
    help="Names of the columns in the file where they differ from id, language, text_a, text_b, "
    "label and group (of a token classifier: tokens and tags), such as "
    "text_a=premise,text_b=hypothesis. An empty name (text_b=) leaves a column out. Can be "
    "repeated.",
)
VIEW_OPTIONS = [
    click.option(
        "--model",
        type=choice(ModelName),
        default="full",
        show_default=True,
        help="Model fine-tuned on all languages together, or on each through its subnetwork.",
    ),
    click.option(
        "--view", default="full", show_default=True, help="full, subnetwork, random-0, ..."
    ),
    click.option("--mask", help="Language of the mask, for views with a mask per language."),
]

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
