"""What a person sees while something takes long."""

import io
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from underpaint import console
from underpaint.console import Going, lasting, progress, quiet, say

pytestmark = pytest.mark.quick


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is told."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_short_work_says_nothing(passing: Callable[[float], None], capsys: Any) -> None:
    for _ in progress(range(100), "reading"):
        passing(0.02)
    assert capsys.readouterr().out == ""


def test_long_work_says_how_long(passing: Callable[[float], None], capsys: Any) -> None:
    assert [passing(1) or k for k in progress(range(1_200), "reading")] == list(range(1_200))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reading: 3 of 1,200, about 20 min left"
    assert lines[1] == "reading: 13 of 1,200, about 20 min left"
    assert lines[-1] == "reading: 1,193 of 1,200, about 7 s left"
    assert len(lines) == 120


def test_work_of_unknown_length(passing: Callable[[float], None], capsys: Any) -> None:
    with Going("fitting") as going:
        for _ in range(4):
            passing(1)
            going.advance(10)
    assert capsys.readouterr().out == "fitting: 30 so far\n"


def test_quiet_work_says_nothing(passing: Callable[[float], None], capsys: Any) -> None:
    with quiet():
        for _ in progress(range(100), "reading"):
            passing(1)
    assert capsys.readouterr().out == ""
    with quiet(False):
        for _ in progress(range(10), "reading"):
            passing(1)
    assert capsys.readouterr().out


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_one_display_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of the training's bar, or of each other, they share it; it ends with who began it, whatever happens."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    bar = console.Bar(10, 0)
    assert list(progress(iter("ab"), "judging", 2)) == ["a", "b"]
    assert bar.live is not None
    assert len(bar.live.tasks) == 1
    bar.close()
    assert console._live is None

    def fail() -> None:
        for _ in progress(range(3), "outer"):
            for number in progress(range(3), "inner"):
                if number == 1 and console._live is not None and len(console._live.tasks) == 2:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert console._live is None
    assert "outer" in terminal.getvalue()
    assert "inner" in terminal.getvalue()


def test_names_that_are_not_utf8_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    say(b"caf\xe9.png".decode("utf-8", "surrogateescape"))
    assert raw.getvalue() == b"caf\\udce9.png\n"


def test_times_are_told_in_words() -> None:
    assert [lasting(s) for s in (0.0, 59.0, 90.0, 5_000.0, 5_400.0)] == ["0 s", "59 s", "2 min", "83 min", "1.5 h"]
    assert [lasting(3_600.0 * hours) for hours in (47, 48, 100)] == ["47.0 h", "2.0 days", "4.2 days"]


@pytest.mark.unhooked  # under the shape-checking hook the checks of arguments are most of the time
def test_it_costs_nothing() -> None:
    times = []
    for _ in range(3):  # what else runs on the machine costs some of them more
        began = time.perf_counter()
        for _ in progress(range(100_000), "counting"):
            pass
        times.append(time.perf_counter() - began)
    assert min(times) < 0.1  # a microsecond each, on a slow machine: it takes 0.15
