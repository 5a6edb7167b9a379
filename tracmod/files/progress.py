"""The progress of long work: a bar on a terminal, elsewhere a line a minute, and a file for others.

    with progress.bar("collect", total=1000) as bar:
        ...
        bar.update(16)

On a terminal a bar is drawn (tqdm). Where standard error is a file or a pipe, as under nohup or
SLURM, a thread writes a plain line from time to time, so that counting costs next to nothing. Bars
within another one appear in its line. Begin and end of what takes less than a second are not
written.

A process that works in a folder can also leave its progress in a file (`kept_in`), which
`tracmod status` reads from any process or machine, also after the process was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

LINE_SECONDS = 60.0  # between two lines; TRACMOD_PROGRESS_SECONDS sets another number
FILE_SECONDS = 3.0  # between two versions of the file
TICK_SECONDS = 1.0  # between two looks at the bars
RATE_MOVES = 600  # moves of a bar, a second apart or more, over which its rate is taken
SCALED_FROM = 10_000  # totals from which a bar on a terminal shows 12.3k

Write = Callable[[str], Any]
Item = TypeVar("Item")


class Bar:
    """The progress of one piece of work.

    Attributes:
        description: what is done.
        total: number of parts; None if there are none to count.
        unit: name of a part, singular.
        done: number of parts done.
        note: what else there is to say, such as the loss.
    """

    def __init__(self, description: str, total: int | None, unit: str, initial: int = 0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done, self.note = initial, ""
        self.is_announced = False
        self._start = time.monotonic()
        # (time, done) whenever a look at the bar finds that it has moved, for the recent rate.
        self._moves = deque([(self._start, initial)], maxlen=RATE_MOVES)
        self._drawn: Any = None

    def draw(self) -> None:
        """Draw the bar on the terminal."""
        from tqdm import tqdm  # not at the top: `tracmod --help` does without

        self._drawn = tqdm(
            total=self.total,
            initial=self.done,
            desc=self.description,
            unit=self.unit,
            unit_scale=(self.total or 0) >= SCALED_FROM,
            smoothing=0.05,
        )

    def update(self, count: int = 1) -> None:
        """Count parts that are done."""
        self.done += count
        if self._drawn is not None:
            if self.note:
                self._drawn.set_postfix_str(self.note, refresh=False)
            self._drawn.update(count)

    def skip(self, count: int) -> None:
        """Count parts that were done before, which say nothing about the rate."""
        self.done += count
        self._moves = deque(((at, done + count) for at, done in self._moves), maxlen=RATE_MOVES)
        if self._drawn is not None:
            self._drawn.initial += count
            self._drawn.update(count)

    def close(self) -> None:
        """Finish drawing."""
        if self._drawn is not None:
            self._drawn.close()

    @property
    def seconds(self) -> float:
        """Seconds since the work began in this process."""
        return time.monotonic() - self._start

    def look(self) -> None:
        """Remember when the bar has moved."""
        if self.done != self._moves[-1][1]:
            self._moves.append((time.monotonic(), self.done))

    def state(self) -> dict[str, Any]:
        """Return the progress as JSON can hold it, with the recent number of parts per second."""
        (since, done_then), done = self._moves[0], self.done
        passed = time.monotonic() - since
        rate = (done - done_then) / passed if passed > 0 else 0.0
        return {
            "description": self.description,
            "done": done,
            "total": self.total,
            "unit": self.unit,
            "rate": rate,
            "note": self.note,
        }


class _Progress:
    """All bars of this process, and the thread that writes about them."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []  # the outermost first
        self.is_quiet = False
        self.write: Write | None = None  # None: to standard error
        self.file: Path | None = None
        self.lock = threading.RLock()
        self._stopped: threading.Event | None = None  # of the thread that runs now

    def uses_lines(self) -> bool:
        """Return whether lines are written, in place of bars on a terminal."""
        return not self.is_quiet and (self.write is not None or not sys.stderr.isatty())

    def line(self, text: str) -> None:
        """Write a line, with the time unless a log adds it."""
        # Progress never stops the work: the reader of a pipe may be gone, the disk of a log full.
        with contextlib.suppress(OSError, ValueError):
            if self.write is not None:
                self.write(text)
            else:
                sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                sys.stderr.flush()

    def open(self, bar: Bar) -> None:
        with self.lock:
            self.bars.append(bar)
            if self._stopped is None and (self.uses_lines() or self.file is not None):
                self._stopped = threading.Event()
                arguments = (self._stopped, _line_seconds())
                threading.Thread(target=self._watch, args=arguments, daemon=True).start()

    def close(self, bar: Bar) -> None:
        with self.lock:
            self.bars.remove(bar)
            if not self.bars and self._stopped is not None:
                self._stopped.set()
                self._stopped = None

    def _watch(self, stopped: threading.Event, line_seconds: float) -> None:
        """Write lines and the file until all bars are closed."""
        line_at, file_at = time.monotonic() + line_seconds, 0.0
        while not stopped.wait(min(TICK_SECONDS, line_seconds)):
            with self.lock:
                if stopped.is_set() or not self.bars:
                    return
                now = time.monotonic()
                for bar in self.bars:
                    bar.look()
                if now >= file_at:
                    self.write_file()
                    file_at = now + FILE_SECONDS
                if not self.uses_lines():
                    continue
                if now >= line_at:
                    self.line("; ".join(describe(bar.state()) for bar in self.bars))
                    line_at = now + line_seconds
                    self.bars[0].is_announced = True
                elif not self.bars[0].is_announced and self.bars[0].seconds >= TICK_SECONDS:
                    self.line(f"{self.bars[0].description}: begun")
                    self.bars[0].is_announced = True

    def write_file(self) -> None:
        """Replace the file by the present progress."""
        if self.file is None:
            return
        state = {"time": time.time(), "bars": [bar.state() for bar in self.bars]}
        temporary = self.file.with_name(f"{self.file.name}.tmp")
        with contextlib.suppress(OSError):  # a missing report is no reason to stop the work
            temporary.write_text(json.dumps(state), encoding="utf-8")
            os.replace(temporary, self.file)


_progress = _Progress()


@contextmanager
def bar(
    description: str, total: int | None = None, unit: str = "example", initial: int = 0
) -> Iterator[Bar]:
    """Show the progress of the work within the context.

    Args:
        description: what is done.
        total: number of parts; None if there are none to count.
        unit: name of a part, singular; "B" for bytes.
        initial: number of parts that were done before.
    """
    with _open(Bar(description, total, unit, initial)) as opened:
        if not _progress.is_quiet and not _progress.uses_lines():
            opened.draw()
        yield opened


def each(items: Sequence[Item], description: str, unit: str) -> Iterator[Item]:
    """Yield items, and show how many of them are done.

    Args:
        items: the items.
        description: what is done with them.
        unit: name of an item, singular.
    """
    with bar(description, len(items), unit) as opened:
        for item in items:
            yield item
            opened.update()


@contextmanager
def stage(name: str, number: int, count: int) -> Iterator[None]:
    """Write a line when a stage begins and one when it is done; its bars appear within it.

    Args:
        name: name of the stage.
        number, count: its position from 1, and the number of stages.
    """
    title = f"stage {number} of {count}, {name}"
    opened = Bar(title, None, "")
    opened.is_announced = True
    if _progress.uses_lines():
        _progress.line(f"{title}: begun")
    with _open(opened):
        yield


@contextmanager
def _open(opened: Bar) -> Iterator[Bar]:
    """Count a bar among those that are open; write a line when the outermost is done."""
    _progress.open(opened)
    is_done = False
    try:
        yield opened
        is_done = True
    finally:
        is_outermost = _progress.bars[:1] == [opened]
        _progress.close(opened)
        opened.close()
        if is_done and is_outermost and opened.is_announced and _progress.uses_lines():
            _progress.line(f"{opened.description}: done in {duration(opened.seconds)}")


def announce(sentence: str) -> None:
    """Write a sentence to standard error, unless progress is quiet."""
    if not _progress.is_quiet:
        print(f"tracmod: {sentence}", file=sys.stderr, flush=True)


def set_quiet(quiet: bool) -> None:
    """Show no progress in this process, or show it again. Files are still written."""
    _progress.is_quiet = quiet


def write_lines_with(write: Write) -> None:
    """Write lines with a function of one text, also on a terminal: workers use their log."""
    _progress.write = write


@contextmanager
def kept_in(file: Path) -> Iterator[None]:
    """Leave the progress of the work within the context in a file, which is removed at its end.

    A process that is killed leaves the file behind, and so does an exception. The file's folder may
    be made later.
    """
    _progress.file = file
    try:
        yield
        file.unlink(missing_ok=True)
    finally:
        _progress.file = None


def read_progress(file: Path) -> dict[str, Any] | None:
    """Return what a process left in its file: `time` and the states of its `bars`, or None."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return {"time": float(state["time"]), "bars": list(state["bars"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(state: dict[str, Any]) -> str:
    """Return a bar's state in words: `collect: 1,200 of 5,000 examples (24%), 80/s, 48 s left`."""
    parts = []
    done, total, rate = state["done"], state["total"], state["rate"]
    if total is not None:
        share = f" ({100 * done // total}%)" if total else ""
        unit = state["unit"]
        if unit == "B":
            parts.append(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB{share}")
        else:
            plural = "" if total == 1 else "es" if unit.endswith("x") else "s"
            parts.append(f"{done:,} of {total:,} {unit}{plural}{share}")
        if rate > 0 and done < total:
            if unit != "B":
                parts.append(_rate(rate))
            parts.append(f"{duration((total - done) / rate)} left")
    if state["note"]:
        parts.append(state["note"])
    return f"{state['description']}: {', '.join(parts)}" if parts else state["description"]


def _rate(rate: float) -> str:
    """Return parts per second, minute or hour, whichever is 1 or more."""
    for factor, name in ((1, "s"), (60, "min")):
        if rate * factor >= 1:
            return f"{rate * factor:,.0f}/{name}" if rate >= 100 else f"{rate * factor:.3g}/{name}"
    return f"{rate * 3600:.3g}/h"


def duration(seconds: float) -> str:
    """Return a time to two digits or so: 5 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _line_seconds() -> float:
    """Return the seconds between two lines."""
    with contextlib.suppress(ValueError):
        seconds = float(os.environ.get("TRACMOD_PROGRESS_SECONDS", LINE_SECONDS))
        if seconds > 0:
            return seconds
    return LINE_SECONDS
