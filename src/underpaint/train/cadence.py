"""What is due after a step: a line of metrics, a probe, a checkpoint, an end."""

from dataclasses import dataclass, field

from underpaint.train.schedules import Duration, Schedule

LINES = 200  # of metrics, about
SAVE_SECONDS = 120.0  # between checkpoints, about


@dataclass
class Progress:
    """Where a training stands; part of a checkpoint.

    Attributes:
        seconds: of training, by this process's clock.
        passed: of them as all processes know it: by the first one's clock, of several a step ago.
        bad: steps without a finite gradient; `in_a_row` of them, the last ones.
        best: the best probe, at `best_step`.
        loss: mean of the last steps.
        owed: the probe of this step, and its line, were interrupted and are still to be made.
    """

    step: int = 0
    seconds: float = 0.0
    passed: float = 0.0
    bad: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    best: float | None = None
    best_step: int | None = None
    loss: float | None = None
    owed: bool = False


@dataclass(frozen=True)
class Due:
    log: bool
    probe: bool
    save: bool
    ended: bool
    stopping: bool  # a signal came
    pausing: bool  # the time of this call is over


@dataclass
class Plan:
    """How long to train, and what happens on the way.

    Attributes:
        log_every, probe_every, save_every: steps. Where None: about 200 lines in all, no probe on the way, a checkpoint
            about every two minutes.
        stop_at: seconds of training in all after which this call ends, with a probe and a checkpoint; never where None.
    """

    duration: Duration
    schedule: Schedule
    log_every: int | None = None
    probe_every: int | None = None
    save_every: int | None = None
    stop_at: float | None = None
    logged: float = field(default=0.0, init=False)  # seconds of training when it was last done
    saved: float = field(default=0.0, init=False)

    def share(self, at: Progress) -> float:
        """The share of the training that is done."""
        return self.duration.share(at.step, at.passed)

    def factor(self, at: Progress) -> float:
        """The learning rate of the coming step, over its peak."""
        return self.schedule.factor(at.step, self.share(at))

    def expected(self, at: Progress) -> int:
        """How many steps there will be, as far as can be said."""
        share = self.share(at)
        return max(at.step, round(at.step / share)) if self.duration.minutes and share > 0 else self.duration.steps

    def due(self, at: Progress, now: float, stop: bool) -> Due:
        """What is due after step `at.step`, `now` seconds into the training; `stop`: whether a signal came to any process."""
        share = self.share(at)
        ended = share >= 1
        pausing = not ended and self.stop_at is not None and at.passed >= self.stop_at
        stopping = not ended and stop
        probe = ended or pausing or (self.probe_every is not None and at.step % self.probe_every == 0)
        log = probe or self._every(self.log_every, at.step, now - self.logged, now / max(share, 1e-12) / LINES)
        save = probe or stopping or self._every(self.save_every, at.step, now - self.saved, SAVE_SECONDS)
        return Due(log, probe, save, ended, stopping, pausing)

    @staticmethod
    def _every(steps: int | None, step: int, since: float, seconds: float) -> bool:
        return since >= seconds if steps is None else step % steps == 0
