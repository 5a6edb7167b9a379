"""Translation of exceptions into one sentence on standard error and an exit code."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click


def fail(sentence: str, code: int = 1) -> NoReturn:
    """End the command with a sentence on standard error and an exit code."""
    click.echo(f"tracmod: {sentence}", err=True)
    raise click.exceptions.Exit(code)


class Terminated(BaseException):
    """The process was asked to end by SIGTERM or SIGHUP."""


@contextmanager
def _raising_termination() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM and SIGHUP within the context, so that files are left whole.

    Signals that are ignored, such as SIGHUP under nohup, stay ignored.
    """

    def terminate(number: int, frame: Any) -> NoReturn:
        raise Terminated

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class CommandGroup(click.Group):
    """A group whose commands report an exception as one sentence.

    The exit code is 2 for what the user can correct, 1 for a failed run, 130 for ^C and 143 for
    SIGTERM, which clusters send before they kill a job, or SIGHUP.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and translate its exceptions."""
        try:
            with _raising_termination():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except ValueError as error:
            fail(_one_line(error), 2)
        except KeyboardInterrupt:
            fail("interrupted; run the same command again to resume", 130)
        except Terminated:
            fail("terminated; run the same command again to resume", 143)
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
