"""Training beside pretraining, on one device: a classifier, a segmenter, a detector, a tokenizer."""

import json
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import SingleDeviceStrategy

from underpaint.computing import best_precision
from underpaint.console import say
from underpaint.errors import InputError
from underpaint.files import write_json
from underpaint.reading import read_object
from underpaint.train.cadence import Plan
from underpaint.train.loop import Training
from underpaint.train.run_folder import Run
from underpaint.train.schedules import Duration, Schedule
from underpaint.train.stepper import Stepper
from underpaint.trainable import Trainable


@dataclass(frozen=True)
class Fitting:
    """How a task is trained.

    Attributes:
        clip: largest norm of the gradient; none where None.
        batch_size: images a step.
        settings: plain data that says what is trained on what; other data in the same folder is refused.
        clock: seconds, by which it is timed.
        precision: of the network's products; the best of the device where None.
    """

    duration: Duration
    schedule: Schedule
    seed: int
    clip: float | None
    batch_size: int
    settings: Mapping[str, object]
    clock: Callable[[], float] = time.perf_counter
    precision: str | None = None


class Trained(TypedDict):
    """How a training went."""

    steps: int
    minutes: float
    loss: float | None  # mean of the last steps


def fit_task(
    task: Trainable,
    optimiser: torch.optim.Optimizer,
    batches: Callable[[int, int], Generator[Any, None, None]],
    folder: Path,
    how: Fitting,
) -> Trained:
    """Train `task` in place, or go on where `folder` holds a checkpoint; it is in eval mode at the end.

    Args:
        optimiser: the rates of its groups are the peaks (times `lr_scale`, where timm set one).
        batches: gives the batches from a step on, by a seed.

    Returns:
        steps, minutes, and the mean loss of the last steps.

    Raises:
        InputError: `folder` holds training with other settings.
        NotFinite: the gradient was not finite too often.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(folder, how.settings)
    device = next(task.parameters()).device
    stepper = Stepper(
        Fabric(strategy=SingleDeviceStrategy(device)),
        task,
        optimiser,
        lambda batch: batch,
        how.batch_size,
        clip=how.clip,
        seed=how.seed,
        stream=0,
        precision=how.precision or best_precision(device),
    )
    training = Training(stepper, Plan(how.duration, how.schedule), Run(folder), clock=how.clock)
    if resumed := training.resume():
        say(f"{folder.name}: going on from step {training.at.step}")
    training.train(batches, resumed)
    task.eval()
    return Trained(steps=training.at.step, minutes=training.at.seconds / 60, loss=training.at.loss)


def _same_settings(folder: Path, settings: Mapping[str, object]) -> None:
    file, wanted = folder / "settings.json", json.loads(json.dumps(settings))
    if file.is_file():
        stored = read_object(file)
        differ = sorted(name for name in stored | wanted if stored.get(name) != wanted.get(name))
        if differ:
            shown = "; ".join(f"{name} {stored.get(name)} there, {wanted.get(name)} here" for name in differ[:3])
            raise InputError(f"--out: {folder} holds training with other settings ({shown}); choose another path")
    else:
        write_json(file, wanted)
