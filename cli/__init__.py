"""The `tracmod` command: thin click commands over the package. `--help` loads no torch."""

from __future__ import annotations

import click

from tracmod import __version__
from tracmod.cli import attribution, checks, results, study
from tracmod.cli.errors import CommandGroup
from tracmod.engine.waiting import choose_waiting_policy


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tracmod")
def main() -> None:
    """Find out which languages' training data a multilingual classifier relies on.

    \b
    The whole study, built-in data:   tracmod run demo --out runs/demo
    On your own model and data:       tracmod attribute --model DIR --train T.tsv --query Q.tsv --out O
    Versions and native build:        tracmod doctor
    """  # noqa: E501
    choose_waiting_policy()


for module in (study, attribution, results, checks):
    for command in module.COMMANDS:
        main.add_command(command)
