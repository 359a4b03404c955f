"""How long a training lasts, and the learning rate on the way."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Duration:
    """How long to train: minutes on the clock where they are given, else steps."""

    steps: int
    minutes: float | None = None

    def share(self, step: int, seconds: float) -> float:
        """The share that is done: 1 or more at the end."""
        return step / self.steps if self.minutes is None else seconds / (60 * self.minutes)


@dataclass(frozen=True)
class Schedule:
    """Of the learning rate: linear warm-up, then a cosine, or a polynomial of `power`, to `min_lr_ratio` of the peak."""

    warmup: float  # share of the training
    min_lr_ratio: float = 0.0
    power: float | None = None

    def factor(self, step: int, share: float) -> float:
        """The rate over its peak where `share` (0 to 1) of the training is done, whatever the step."""
        if share < self.warmup:
            return share / self.warmup
        done = min(1.0, (share - self.warmup) / max(1e-12, 1 - self.warmup))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.power is None else (1 - done) ** self.power
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left


@dataclass(frozen=True)
class WarmedAgain(Schedule):
    """The schedule of a run that was made longer at step `first`: from the rate that it had there, `had` of the peak, it
    warms up again to that of the longer schedule."""

    first: int = 0
    had: float = 0.0
    steps: int = 1

    def factor(self, step: int, share: float) -> float:
        factor = super().factor(step, share)
        if step < self.first:
            return factor
        done = (step - self.first) / max(1e-12, self.warmup * (self.steps - self.first))
        return factor if done >= 1 else self.had + done * (factor - self.had)
