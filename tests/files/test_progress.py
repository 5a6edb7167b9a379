"""Progress: plain lines where there is no terminal, bars where there is one, and a file."""

from __future__ import annotations

import json
import re
import sys
import time

import pytest

from tracmod.files import progress

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture
def fast(monkeypatch):
    """A line every 20 ms, the file at every look."""
    monkeypatch.setenv("TRACMOD_PROGRESS_SECONDS", "0.02")
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.01)


def work(seconds=0.3, total=1000):
    """Count 300 of 1,000 parts, then take some seconds."""
    with progress.bar("collect", total) as bar:
        bar.update(200)
        bar.update(100)
        bar.note = "loss 0.5"
        time.sleep(seconds)


def test_lines_are_plain_and_say_how_much_is_done(fast, capsys):
    with progress.stage("collect", 5, 9):
        work()
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(LINE + "stage 5 of 9, collect: begun", lines[0])
    assert re.fullmatch(LINE + "stage 5 of 9, collect: done in 0 s", lines[-1])
    assert len(lines) > 2
    for line in lines[1:-1]:
        assert re.fullmatch(
            LINE + r"stage 5 of 9, collect; collect: 300 of 1,000 examples \(30%\), "
            r"[\d.,]+/s, \d+ s left, loss 0\.5",
            line,
        )


def test_a_failed_stage_is_not_said_to_be_done(fast, capsys):
    with pytest.raises(OSError, match="disk"), progress.stage("collect", 5, 9):
        raise OSError("disk full")
    assert "done" not in capsys.readouterr().err


def test_short_work_writes_nothing(capsys):
    work(seconds=0)
    list(progress.each([1, 2, 3], "measure", "effort"))
    assert capsys.readouterr().err == ""


def test_long_work_outside_a_stage_says_that_it_began_and_ended(monkeypatch, capsys):
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.05)
    work()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(LINE, "", line) for line in lines] == [
        "collect: begun",
        "collect: done in 0 s",
    ]


def test_quiet_shows_nothing_but_keeps_the_file(fast, capsys, tmp_path):
    file = tmp_path / "progress.json"
    progress.set_quiet(True)
    try:
        progress.announce("begun")
        with progress.kept_in(file), progress.stage("collect", 1, 1):
            work()
            states = progress.read_progress(file)
    finally:
        progress.set_quiet(False)
    assert capsys.readouterr().err == ""
    assert states["bars"][0]["description"] == "stage 1 of 1, collect"


def test_a_terminal_gets_a_bar_and_no_lines(fast, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.stage("collect", 1, 1):
        work()
    shown = capsys.readouterr().err
    assert "\r" in shown
    assert not re.search(LINE, shown)


def test_the_file_is_removed_at_the_end_and_left_by_a_failure(fast, tmp_path):
    file = tmp_path / "later" / "progress.json"
    for error in (None, RuntimeError("lost")):
        try:
            with progress.kept_in(file), progress.stage("prune", 1, 1):
                file.parent.mkdir(exist_ok=True)
                with progress.bar("prune", 10, "head") as bar:
                    bar.update(4)
                    time.sleep(0.2)
                    assert progress.read_progress(file)["bars"][1]["done"] == 4
                if error:
                    raise error
        except RuntimeError:
            pass
        assert file.exists() == (error is not None)
    assert progress.read_progress(file)["bars"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"time": null, "bars": []}'])
def test_a_damaged_file_is_no_progress(tmp_path, text):
    file = tmp_path / "progress.json"
    assert progress.read_progress(file) is None
    file.write_text(text)
    assert progress.read_progress(file) is None


def test_work_goes_on_where_nobody_reads(fast, monkeypatch):
    class Closed:
        def isatty(self):
            return False

        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with progress.stage("collect", 1, 1):
        work()


def test_parts_that_were_there_do_not_count_for_the_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Bar("collect", 1000, "example")
    bar.skip(900)
    now[0] = 10.0
    bar.update(20)
    bar.look()
    assert json.loads(json.dumps(bar.state())) == {
        "description": "collect", "done": 920, "total": 1000, "unit": "example", "rate": 2.0,
        "note": "",
    }  # fmt: skip
    assert progress.describe(bar.state()) == "collect: 920 of 1,000 examples (92%), 2/s, 40 s left"


def test_the_rate_follows_the_last_moves(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Bar("collect", 10**6, "example")
    for second in range(2000):
        now[0] += 1
        bar.update(1000 if second < 1000 else 10)
        bar.look()
    assert bar.state()["rate"] == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize(
    ("rate", "words"),
    [(1234.5, "1,234/s"), (2.345, "2.35/s"), (0.5, "30/min"), (0.01, "36/h")],
)
def test_rates_are_per_second_minute_or_hour(rate, words):
    state = {"description": "retrain", "done": 1, "total": 64, "unit": "training", "note": ""}
    assert f"retrain: 1 of 64 trainings (1%), {words}, " in progress.describe(
        state | {"rate": rate}
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (120, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (4e5, "4.6 days"),
    ],
)
def test_durations(seconds, words):
    assert progress.duration(seconds) == words
