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
from tracmod.cli.options import (
    LARGEST_INT,
    Bytes,
    ColumnNames,
    CountOrAuto,
    GivenPath,
    ParameterNames,
    RealNumber,
    WholeNumber,
    field_option,
    options_of,
    with_options,
)

PARAMETERS = [
    pytest.param(command, parameter, id=f"{name} {parameter.opts[-1]}")
    for name, command in main.commands.items()
    for parameter in command.params
    if not isinstance(parameter.type, (click.Choice, type(click.STRING), type(click.BOOL)))
]
OUT_OF_RANGE = {
    WholeNumber: ["0.5", "nan", "one", "", str(LARGEST_INT + 1), "9" * 5000],
    RealNumber: ["nan", "inf", "-inf", "1e999", "half", ""],
    CountOrAuto: ["0", "-1", "1.5", "nan", "Auto", "", "²", "9" * 5000],
    ParameterNames: ["", ",", "a,,b", " "],
    ColumnNames: ["", "premise", "body=x", "text_a=", "text_a=x,text_a=y", "text_a=x,text_b=x"],
    Bytes: ["0", "-1GB", "nan", "infGB", "1e400GB", "much", "", "9" * 30],
    GivenPath: [""],
}


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


@pytest.mark.parametrize(("command", "parameter"), PARAMETERS)
def test_values_out_of_range_are_refused_by_every_command(command, parameter):
    """By type: an option of a command to come is refused here if its type checks nothing."""
    (values,) = [
        values for kind, values in OUT_OF_RANGE.items() if isinstance(parameter.type, kind)
    ]
    minimum = getattr(parameter.type, "min", None)
    if minimum is not None:
        values = [*values, str(minimum - 1), *(["0"] if parameter.type.min_open else [])]
    for value in values:
        with pytest.raises(click.BadParameter) as caught:
            parameter.type_cast_value(
                click.Context(command), (value,) if parameter.multiple else value
            )
        assert caught.value.param is parameter, value


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--projection-dim", "0"),
        ("--share-error", "nan"),
        ("-k", "0"),
        ("--max-length", str(LARGEST_INT + 1)),
        ("--batch-tokens", "-1"),
        ("--memory", "0"),
        ("--seed", str(2**64)),
        ("--out", ""),
        ("--head-mask", ""),
        ("--weights", "0.1,"),
        ("--weights", "0.1,-0.2"),
        ("--weights", "0.1,nan"),
        ("--weights", "0,0.0"),
        ("--weights", "Uniform"),
    ],
)
def test_attribute_refuses_a_value_out_of_range_by_option(tmp_path, option, value):
    file = tmp_path / "x.tsv"
    file.write_text("")
    given = {"--train": str(file), "--query": str(file), "--out": str(tmp_path / "out")}
    given |= {"--model": str(tmp_path), option: value}
    arguments = [part for pair in given.items() for part in pair]
    result = CliRunner().invoke(main, ["attribute", *arguments])
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output
    assert not (tmp_path / "out").exists()


def test_a_number_of_a_configuration_is_finite(tmp_path):
    for override in ("finetune.learning_rate=.nan", "finetune.learning_rate=.inf"):
        run = ["run", "demo", "--out", str(tmp_path / "run"), "--set", override, "--check"]
        result = CliRunner().invoke(main, run)
        assert result.exit_code == 2, result.output
        assert "finetune.learning_rate" in result.output
    assert not (tmp_path / "run").exists()


def test_attribute_has_the_defaults_and_choices_of_its_dataclass():
    params = {param.name: param for param in main.commands["attribute"].params}
    for option in dataclasses.fields(AttributionOptions):
        if option.default not in (dataclasses.MISSING, None, False, ()):
            context = click.Context(main.commands["attribute"])
            default = params[option.name].type_cast_value(context, params[option.name].default)
            assert default == option.default, option.name
    for name, literal in {
        "preconditioner": MetricKind, "normalize": Normalization,
        "dtype": PassDtype, "store_dtype": StoreDtype,
    }.items():  # fmt: skip
        assert tuple(params[name].type.choices) == get_args(literal)
    assert params["parameters"].type.name.startswith("|".join(get_args(ParameterSet)))


def test_parameters_are_a_set_or_patterns():
    for text, expected in (
        ("attention", "attention"),
        ("classifier, *.query", ["classifier", "*.query"]),
        ("bert.encoder.layer.1", ["bert.encoder.layer.1"]),
    ):
        assert ParameterNames().convert(text, None, None) == expected
    with pytest.raises(click.BadParameter, match="a,,b"):
        ParameterNames().convert("a,,b", None, None)
