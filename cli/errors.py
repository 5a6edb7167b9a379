"""Translation of exceptions into one sentence on standard error and an exit code."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import click


def fail(sentence: str, code: int = 1) -> NoReturn:
    """End the command with a sentence on standard error and an exit code."""
    click.echo(f"tracmod: {sentence}", err=True)
    raise click.exceptions.Exit(code)


class CommandGroup(click.Group):
    """A group whose commands report an exception as one sentence.

    The exit code is 2 for what the user can correct, 1 for a failed run and 130 for ^C.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and translate its exceptions."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except ValueError as error:
            fail(_one_line(error), 2)
        except KeyboardInterrupt:
            fail("interrupted; run the same command again to resume", 130)
        except Exception as error:
            if os.environ.get("TRACMOD_TRACEBACK"):
                raise
            fail(f"{_one_line(error)} (set TRACMOD_TRACEBACK=1 to see where)")


def _one_line(error: BaseException) -> str:
    """Return the message of an exception, after its type unless it is one that users meet."""
    sentence = " ".join(str(error).split())
    if sentence and isinstance(error, (ValueError, OSError, RuntimeError)):
        return sentence
    return f"{type(error).__name__}: {sentence}"
