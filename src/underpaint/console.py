"""What a person sees while training: a live bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE, BETWEEN = 3.0, 10.0  # seconds before anything is said of progress, and between two lines of it
Item = TypeVar("Item")

_live: Progress | None = None  # what is on the terminal: two displays at once would fight for it
_quiet = False


def say(text: str) -> None:
    """A line for the person who waits; results that a program reads go elsewhere."""
    print(printable(text), flush=True)


def printable(text: str) -> str:
    """What cannot be written here, as a byte of a file name that is not UTF-8, is written as its escape."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def quiet(really: bool = True) -> Generator[None, None, None]:
    """Nothing is said of progress inside: another process says it, or it was said once."""
    global _quiet
    before, _quiet = _quiet, _quiet or really
    try:
        yield
    finally:
        _quiet = before


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Generator[Item, None, None]:
    """The same items; where they take more than 3 seconds, how many are done and how long the rest will take.

    Args:
        what: is done, in a few words: "decoding".
        total: of the items, where they have no length.
    """
    with Going(what, len(items) if total is None and isinstance(items, Sized) else total) as going:
        for item in items:
            yield item
            going.advance()


class Going:
    """Work of which so much is done: a bar on a terminal, elsewhere a line at most every ten seconds; for 3 seconds neither.

    Attributes:
        total: None where it is not known.
    """

    def __init__(self, what: str, total: int | None = None):
        self.what, self.total, self.done = what, total, 0

    def __enter__(self) -> "Going":
        self.began = time.monotonic()
        self.due = math.inf if _quiet else self.began + PATIENCE
        self.live: Progress | None = None
        self.owned = False
        return self

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        now = time.monotonic()
        if now >= self.due:
            self._show(now)

    def _show(self, now: float) -> None:
        global _live
        if not sys.stdout.isatty():
            self.due = now + BETWEEN
            say(f"{self.what}: {self._told(now)}")
            return
        self.due = now + 0.1
        if self.live is None:
            if _live is None:
                self.owned, _live = True, _display(transient=True)
                _live.start()
            self.live, self.task = _live, _live.add_task(printable(self.what), total=self.total)
        self.live.update(self.task, completed=self.done)

    def _told(self, now: float) -> str:
        if self.total is None or not self.done:
            return f"{self.done:,} so far"
        left = (now - self.began) / self.done * max(0, self.total - self.done)
        return f"{self.done:,} of {self.total:,}, about {lasting(left)} left"

    def __exit__(self, *_: object) -> None:
        global _live
        if self.live is not None:
            self.live.remove_task(self.task)
            if self.owned:
                self.live.stop()
                _live = None


def lasting(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3.5 h", "4.2 days"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 5_400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.1f} h" if seconds < 48 * 3_600 else f"{seconds / 86_400:.1f} days"


def _display(transient: bool = False) -> Progress:
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(),
        transient=transient,
    )


class Bar:
    """Loss, its trivial baseline, images a second, share of time spent waiting for data, time left."""

    def __init__(self, total: int, start: int, enabled: bool = True):
        self.total = total
        self.began, self.first = time.monotonic(), start
        self.said = 0.0
        self.enabled = enabled
        self.live: Progress | None = None
        if enabled and sys.stdout.isatty():
            global _live
            self.live = _live = _display()
            self.task = self.live.add_task("training", total=total, completed=start)
            self.live.start()

    def expect(self, total: int) -> None:
        """Another number of steps than was expected so far."""
        self.total = total
        if self.live:
            self.live.update(self.task, total=total)

    def step(self, step: int) -> None:
        if step == self.first + 1:
            self.began = time.monotonic()  # what came before the first step says nothing about the rest
        if self.live:
            self.live.update(self.task, completed=step)

    def line(self, line: Mapping[str, Any]) -> None:
        """Show one line of metrics; where there is no terminal, at most one every ten seconds, those with a probe, and the last."""
        if not self.enabled:
            return
        shown = describe(line)
        if self.live:
            self.live.update(self.task, completed=line["step"], description=shown)
            return
        now = time.monotonic()
        if now - self.said < 10 and line["step"] != self.total and "probe" not in line:
            return
        self.said = now
        left = ""
        if line["step"] > self.first:
            seconds = (now - self.began) / (line["step"] - self.first) * max(0, self.total - line["step"])
            left = f"  {seconds / 60:.1f} min left"
        say(f"step {line['step']}/{self.total}  {shown}{left}")

    def above(self, text: str) -> None:
        """A message that stays, above the bar."""
        if self.live:
            self.live.console.print(printable(text), highlight=False, markup=False)
        elif self.enabled:
            say(text)

    def close(self) -> None:
        if self.live:
            global _live
            self.live.stop()
            _live = None


def describe(line: Mapping[str, Any]) -> str:
    """Loss against its baseline, speed and data wait, in one short line."""
    loss, baseline = line.get("loss"), (line.get("terms") or {}).get("baseline")
    parts = []
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if baseline is not None:
        parts.append(f"(trivial {baseline:.4f})")
    if loss is not None:
        parts.append(f"{line['images_per_second']:.0f} images/s")
        parts.append(f"data wait {line['data_wait']:.0%}")
    kinds = {"linear": "linear probe", "attentive": "attentive", "knn": "kNN", "rank": "effective rank"}
    probe = line.get("probe") or {}
    parts += [f"{label} {probe[kind]:.3g}" for kind, label in kinds.items() if kind in probe]
    return " ".join(parts)
