"""Command-line options made from the fields of a dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import click
import pytest
from click.testing import CliRunner

from tracmod.attribution.options import AttributionOptions
from tracmod.choices import MetricKind, Normalization, ParameterSet, PassDtype, StoreDtype
from tracmod.cli import main
from tracmod.cli.options import field_option, options_of, with_options


@dataclass(frozen=True)
class Settings:
    file: Path = field(metadata={"help": "A file."})
    kind: Literal["big", "small"] = field(default="big", metadata={"help": "A choice."})
    n: int = field(default=3, metadata={"help": "A bounded number.", "min": 1, "max": 9})
    share: float = field(default=0.5, metadata={"help": "A share.", "min": 0, "min_open": True})
    room_left: int = field(default=2 * 10**9, metadata={"help": "A size.", "unit": "bytes"})
    limit: int | None = field(default=None, metadata={"help": "A number or none."})
    quick: bool = field(default=False, metadata={"help": "A flag."})


@pytest.fixture
def command():
    @click.command()
    @with_options(options_of(Settings, {"limit": [field_option(Settings, "limit", help="Other.")]}))
    def command(**values):
        click.echo(repr(Settings(**values)))

    return command


def test_options_fill_the_dataclass_with_its_defaults(command, tmp_path):
    result = CliRunner().invoke(command, ["--file", str(tmp_path)])
    assert result.output.strip() == repr(Settings(tmp_path))
    given = ["--kind", "small", "-n", "9", "--share", "0.1", "--room-left", "3MB", "--limit", "4"]
    result = CliRunner().invoke(command, ["--file", str(tmp_path), *given, "--quick"])
    expected = Settings(tmp_path, "small", 9, 0.1, 3 * 10**6, 4, True)
    assert result.output.strip() == repr(expected)


def test_help_lists_the_fields_in_order_with_choices_bounds_and_defaults(command):
    text = CliRunner().invoke(command, ["--help"]).output
    shown = [
        "--file", "[required]", "--kind [big|small]", "[default: big]", "-n", "1<=x<=9", "--share",
        "x>0", "--room-left", "[default: 2GB]", "--limit", "Other.", "--quick",
    ]  # fmt: skip
    positions = [text.index(part) for part in shown]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--kind", "medium"), ("-n", "0"), ("-n", "10"), ("--share", "0"), ("--file", "/absent")],
)
def test_a_value_out_of_bounds_is_refused_by_name(command, tmp_path, option, value):
    result = CliRunner().invoke(command, ["--file", str(tmp_path), option, value])
    assert result.exit_code == 2
    assert f"'{option}'" in result.output
    assert value in result.output


def test_attribute_has_the_defaults_and_choices_of_its_dataclass():
    params = {param.name: param for param in main.commands["attribute"].params}
    for option in dataclasses.fields(AttributionOptions):
        if option.default not in (dataclasses.MISSING, None, False, ()):
            context = click.Context(main.commands["attribute"])
            default = params[option.name].type_cast_value(context, params[option.name].default)
            assert default == option.default, option.name
    for name, literal in {
        "parameters": ParameterSet, "preconditioner": MetricKind, "normalize": Normalization,
        "dtype": PassDtype, "store_dtype": StoreDtype,
    }.items():  # fmt: skip
        assert tuple(params[name].type.choices) == get_args(literal)
