"""What a person sees while training: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def say(text: str) -> None:
    """A line for the person who waits; results that a program reads go elsewhere."""
    print(text, flush=True)


class Bar:
    """Loss, its trivial baseline, images a second, share of time spent waiting for data, time left."""

    def __init__(self, total: int, start: int, enabled: bool = True):
        self.total = total
        self.began, self.first = time.monotonic(), start
        self.said = 0.0
        self.enabled = enabled
        self.live: Progress | None = None
        if enabled and sys.stdout.isatty():
            columns = ("[progress.description]{task.description}", "{task.completed}/{task.total}")
            self.live = Progress(
                TextColumn(columns[0]),
                BarColumn(bar_width=24),
                TextColumn(columns[1]),
                TimeRemainingColumn(),
                console=Console(),
            )
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
            self.live.console.print(text, highlight=False, markup=False)
        elif self.enabled:
            say(text)

    def close(self) -> None:
        if self.live:
            self.live.stop()


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
