"""The one loop: whatever is trained goes through `Training.train`, from its start or last checkpoint to its end.

Everything random in a step is a function of (seed, step), so a training that was killed and started again makes exactly
the steps that it would have made. Flags of steps without a finite gradient are read a step late, so that a GPU never waits
for Python.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from underpaint.console import Bar
from underpaint.data.parallel import WorkerLost
from underpaint.errors import InputError, NotFinite, Stopped
from underpaint.files import finite
from underpaint.seeds import ROLLED_BACK
from underpaint.signals import Interrupted, answered_signals, watched_signals
from underpaint.train.cadence import Due, Plan, Progress
from underpaint.train.loggers import Loggers
from underpaint.train.meter import Meter
from underpaint.train.ranks import Agreement, by_first, meet, same, several
from underpaint.train.run_folder import Run, host_copy, restore_state, training_state
from underpaint.train.speed import out_of_memory
from underpaint.train.stepper import Stepper

ROLL_BACK_AFTER, STOP_AFTER = 3, 10  # steps in a row without a finite gradient; such steps in all
LOST = 3  # times that the processes that decode are started again for one step
LEAVING = "told to end: this step is finished and a checkpoint is written; once more, and it ends now"
Batches = Callable[[int, int], Generator[Any, None, None]]  # from a step on, by a seed


@dataclass
class Watch:
    """What looks at a training from outside.

    Attributes:
        names: of the images of a batch, to say which step was not finite.
        probe: named numbers of where the task stands after a step; called in all processes, of which the first has them.
        export: takes what others use of the task, beside each checkpoint; what it returns writes that, while training goes
            on.
        divided: told in how many parts a batch is computed from here on, where memory asked for it.
        resume_loggers: makes what is told every line, from the step that is gone on from (None at the start).
    """

    names: Callable[[Any], Sequence[str]] | None = None
    probe: Callable[[int], dict[str, float]] | None = None
    export: Callable[[], Callable[[], None]] | None = None
    divided: Callable[[int], None] | None = None
    resume_loggers: Callable[[int | None], Loggers] | None = None


@dataclass
class Training:
    """One training: what makes its steps, how long, where it is written down, and where it stands.

    Attributes:
        run: the folder of its checkpoints and metrics.
        clock: seconds, by which it is timed.
    """

    stepper: Stepper
    plan: Plan
    run: Run
    watch: Watch = field(default_factory=Watch)
    clock: Callable[[], float] = time.perf_counter
    at: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.meter, self.pending = Meter(), deque[tuple[int, Tensor, Sequence[str]]]()
        self.waited, self.since, self.steps = 0.0, 0.0, 0  # seconds and steps since the last line
        self.main = self.stepper.fabric.is_global_zero
        self.seed = self.stepper.seed
        self.lost: list[int] = []  # steps whose batch was lost with a process that decodes
        self.writing: _Writing | None = None  # of a checkpoint
        self.agreement = Agreement()
        self.loggers: Loggers | None = None
        self.bar: Bar

    def resume(self) -> bool:
        """Take up the last checkpoint, if there is one; lines of metrics that lie after it are dropped."""
        self._written()
        meet()
        found = self.run.load()
        if not same(-1 if found is None else found[1]["step"]):
            raise InputError(
                f"--out {self.run.path}: processes see unlike checkpoints; it must lie where all machines see it"
            )
        if found is not None:
            tensors, numbers = found
            restore_state(self.stepper.task, self.stepper.optimiser, tensors)
            self.meter.load(tensors, numbers["window"], self.stepper.fabric.device)
            self.at = Progress(**{name: numbers[name] for name in asdict(self.at)})
            self.plan.logged = self.plan.saved = self.at.seconds
            if self.stepper.scaler is not None and numbers.get("scaler"):
                self.stepper.scaler.load_state_dict(numbers["scaler"])
        meet()
        if self.main:
            self.run.drop_after("metrics.jsonl", -1 if found is None else self.at.step)
        return found is not None

    def start_anew(self) -> bool:
        """Forget the metrics of an earlier start that left no checkpoint."""
        meet()
        if self.main:
            self.run.drop_after("metrics.jsonl", -1)
        return False

    def train(self, batches: Batches, resumed: bool) -> Due | None:
        """Steps until the training ends, or pauses; `resumed` says that `resume` found a checkpoint.

        Returns:
            What was due at the last step; None where there was nothing to do.

        Raises:
            NotFinite: the gradient was not finite too often.
            Stopped: something could not be written, or memory does not suffice for one image.
            Interrupted: told to end; a checkpoint was written.
        """
        self.bar = Bar(self.plan.expected(self.at), self.at.step, enabled=self.main)
        if self.main and self.watch.resume_loggers is not None:
            self.loggers = self.watch.resume_loggers(self.at.step if resumed else None)
        self.stepper.task.train()
        due = None
        try:
            if self.at.owed or (not resumed and self.watch.probe is not None):
                self._log(True)
                self._save()
            with watched_signals(LEAVING) as received:
                while due is None and self.plan.share(self.at) < 1:
                    self.stepper.seed = (
                        self.seed + ROLLED_BACK * self.at.rollbacks
                    )  # other batches than those that failed
                    self._written()  # processes that decode are made of this one, without threads
                    short, lost = False, None
                    with closing(batches(self.at.step, self.stepper.seed)) as source:
                        try:
                            due = self._steps(source, received)
                        except WorkerLost as error:
                            lost = error
                        except (RuntimeError, MemoryError) as error:
                            if not (short := out_of_memory(error)):
                                raise
                    if short:  # here, where nothing holds on to what the step had made so far
                        self._divide()
                    elif lost is not None and not self._replace(lost):
                        continue
                    elif due is None:
                        self._roll_back()
            self._written()
        except (OSError, SafetensorError) as error:
            place = getattr(error, "filename", None) or self.run.path
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise Stopped(f"{place}: {reason}; {self._kept()}: the same command goes on") from error
        finally:
            with suppress(Exception):  # something else went wrong first
                self._written()
            self.bar.close()
            if self.loggers is not None:
                self.loggers.close()
        return due

    def _kept(self) -> str:
        """What there is to go on from."""
        found = self.run.checkpoints()
        return (
            f"the checkpoint of step {int(found[-1].name.removeprefix('step-'))} is kept"
            if found
            else "nothing is lost"
        )

    def _steps(self, source: Generator[Any, None, None], received: list[int]) -> Due | None:
        """Steps until the training ends or pauses; None where it has to be rolled back."""
        at, plan = self.at, self.plan
        self.pending.clear()
        self.waited, self.since, self.steps = 0.0, 0.0, 0
        while True:
            began = self.clock()
            batch = next(source)
            self.waited += self.clock() - began
            numbers, bad = self.stepper.step(batch, at.step, plan.factor(at))
            self.meter.add(numbers, bad)
            at.step += 1
            self.pending.append((at.step, bad, self.watch.names(batch) if self.watch.names else ()))
            told, passed = self.agreement(received[0] if received else 0, at.seconds + self.clock() - began)
            at.passed = max(at.passed, passed)
            self.stepper.task.after_step(min(1.0, plan.share(at)), 1 - bad)
            due = plan.due(at, at.passed, bool(told))
            rolled = self._read_flags(0 if due.log or due.save else 1)
            spent = self.clock() - began
            at.seconds += spent
            self.since, self.steps = self.since + spent, self.steps + 1
            self.bar.expect(plan.expected(at))
            self.bar.step(at.step)
            if rolled:
                return None
            if due.stopping and due.probe and self.watch.probe is not None:
                at.owed = True  # a probe may take minutes, which who tells to end does not have
            elif due.log:
                self._log(due.probe)
            if due.save:
                self._save()
            if due.stopping:
                self._written()
                raise Interrupted(told, self._kept())
            if due.ended or due.pausing:
                return due

    def _read_flags(self, left: int) -> bool:
        """Count the steps, and those in a row, without a finite gradient, all but the last `left`; whether to roll back."""
        rolled = False
        while len(self.pending) > left:
            step, bad, names = self.pending.popleft()
            if not bad.item():
                self.at.in_a_row = 0
                continue
            self.at.bad += 1
            self.at.in_a_row += 1
            line = {"step": step, "paths": list(names)}
            if line not in self.run.lines("not-finite.jsonl"):  # a step that is made again after a kill
                self.run.append("not-finite.jsonl", [line])
            shown = f" ({', '.join(names[:3])}, ...; all in not-finite.jsonl)" if names else ""
            self.bar.above(f"step {step}: not finite, batch left out{shown}")
            if self.at.bad >= STOP_AFTER:
                raise NotFinite(
                    f"the loss stayed not finite ({self.at.bad} batches, the last at step {step}); the last good "
                    f"checkpoint is kept in {self.run.path / 'checkpoints'}; try a lower learning rate"
                )
            rolled = rolled or self.at.in_a_row >= ROLL_BACK_AFTER
        return rolled

    def _replace(self, lost: WorkerLost) -> bool:
        """Other processes decode the batch of this step and what follows, which no step has seen; whether what was found
        meanwhile asks to roll back.

        Raises:
            Stopped: they end again and again.
        """
        step = self.at.step
        self.lost.append(step)
        if self.lost.count(step) > LOST:
            raise Stopped(f"step {step}: {lost}; {self._kept()}: the same command goes on") from lost
        self.bar.above(f"step {step}: {lost}; another is started")
        return self._read_flags(0)

    def _divide(self) -> None:
        """Memory ran out: go on from the last checkpoint with batches in more and smaller parts, which is the same step.

        Raises:
            Stopped: what was out of memory was a single image, or is not divided; or other processes wait in vain.
        """
        stepper, step = self.stepper, self.at.step
        batch, parts = stepper.batch_size, stepper.finer
        if parts is None:
            least = "a smaller encoder or image size" if stepper.task.divisible else f"a batch smaller than {batch}"
            raise Stopped(f"step {step}: out of memory: {least} is needed; {self._kept()}")
        stepper.accumulation = parts
        stepper.optimiser.zero_grad(set_to_none=True)
        if stepper.fabric.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.watch.divided is not None:
            self.watch.divided(parts)
        told = f"step {step}: out of memory; from here on a batch of {batch} is computed in {parts} parts"
        if stepper.fabric.world_size > 1:  # the others are in the middle of a step that this one left
            raise Stopped(f"{told}; {self._kept()}: the same command goes on")
        if not self._back():
            raise Stopped(f"step {step}: out of memory, and there is no checkpoint to go on from with less")
        self.bar.above(f"{told}, from step {self.at.step}")

    def _back(self) -> bool:
        """To the last checkpoint, if there is one; the time is spent, whatever became of it."""
        failed = self.at
        if not self.resume():
            return False
        self.at.seconds, self.at.passed, self.at.bad = failed.seconds, failed.passed, failed.bad
        self.at.rollbacks = failed.rollbacks
        if self.loggers is not None:
            self.loggers.back_to(self.at.step)
        return True

    def _roll_back(self) -> None:
        """Back to the last checkpoint, to go on with other batches."""
        failed = self.at
        if not self._back():
            raise NotFinite("the loss is not finite from the first step on; try a lower learning rate")
        self.at.rollbacks, self.at.in_a_row = failed.rollbacks + 1, 0
        self.bar.above(f"step {failed.step}: {ROLL_BACK_AFTER} steps in a row not finite; back to step {self.at.step}")
        self._save()  # so that a kill from here on does not forget that the data moved on

    def _log(self, probing: bool) -> None:
        """One line of metrics: the means since the last one, and a probe where it is time for one."""
        at, batch_size = self.at, self.stepper.batch_size
        means = self.meter.means(self.stepper.fabric)
        probe = self._probe() if probing and self.watch.probe is not None else None
        self.meter.reset()
        at.owed = False
        if self.main:
            spent = max(self.since, 1e-9)
            line: dict[str, Any] = {
                "step": at.step,
                "images": at.step * batch_size,
                "seconds": round(at.seconds, 3),
                "loss": means.pop("loss", None),
                "gradient_norm": means.pop("gradient_norm", None),
                "terms": means,
                "lr": self.stepper.peaks[0] * self.plan.factor(at),
                "images_per_second": round(self.steps * batch_size / spent, 1),
                "data_wait": round(self.waited / spent, 4),
            }
            if probe:
                line["probe"] = probe
                value = probe.get("linear", -(line["loss"] or math.inf))  # the loss where there are no labels
                if math.isfinite(value) and (at.best is None or value > at.best):
                    at.best, at.best_step = value, at.step
            self.run.append("metrics.jsonl", [line])
            if self.loggers is not None:
                self.loggers.write(finite(line))
            self.bar.line(line)
        self.plan.logged = at.passed
        self.waited, self.since, self.steps = 0.0, 0.0, 0

    def _probe(self) -> dict[str, float]:
        """Named numbers of where the task stands. It may take minutes, so one process leaves it at once when it is told to end,
        and makes it when the training goes on; several, which share it, finish it."""
        assert self.watch.probe is not None
        self._written()  # processes that decode are made of this one, without threads
        if several():
            found = self.watch.probe(self.at.step)
            return by_first(lambda: found)
        try:
            with answered_signals():
                return self.watch.probe(self.at.step)
        except Interrupted as interruption:
            self.at.owed = True
            self._save()
            self._written()
            interruption.kept = self._kept()
            raise

    def _save(self) -> None:
        """A checkpoint, and what others use: taken now, written while training goes on. The next one waits for it."""
        self._written()
        if self.main:
            self.at.loss = self.meter.last() or self.at.loss
            state = training_state(self.stepper.task, self.stepper.optimiser) | self.meter.state()
            tensors = host_copy(state)
            keep = [step for step in (self.at.best_step,) if step is not None]
            scaler = self.stepper.scaler
            scale = None if scaler is None else scaler.state_dict()
            numbers = {**asdict(self.at), "window": list(self.meter.names), "scaler": scale}
            step, write = self.at.step, None if self.watch.export is None else self.watch.export()

            def save() -> None:
                self.run.save(step, tensors, numbers, keep)
                if write is not None:
                    write()

            self.writing = _Writing(save)
        self.plan.saved = self.at.passed

    def _written(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises: what went wrong with it.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.done()


class _Writing(threading.Thread):
    """Something that is written beside the training; a process does not end in its middle, unless it is killed."""

    def __init__(self, work: Callable[[], None]):
        super().__init__()
        self.work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # raised where somebody looks
            self.error = error

    def done(self) -> None:
        self.join()
        if self.error is not None:
            raise self.error
