"""Evaluations that train a network: what is trained is a module with its loss, and one loop trains it."""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.data.parallel import ordered_map, reading_workers, size_of, within_memory
from underpaint.evaluation.base import Context
from underpaint.report.words import listing, span_text
from underpaint.train.fit import Fitting, Trained, fit_task
from underpaint.train.optim import adamw
from underpaint.train.run_folder import Run
from underpaint.train.schedules import Duration, Schedule
from underpaint.trainable import Objective, Trainable

STEEP = 0.2  # share of all that the loss fell: where the last quarter brought more, it was far from done
FEWEST = 20  # steps: of fewer nothing can be said
OFF_THE_FLOOR = 0.02  # of a share: what no network is beyond says nothing of any
STATE = 2  # of what a checkpoint holds; 1 named the weights otherwise
Batch = TypeVar("Batch")


class Learned(Trained):
    """How a training went, and how far."""

    passes: float  # over the images to train on
    fall: float | None  # the share of all that the loss fell that came in the last quarter; None where it did not fall


class Task(Trainable, Generic[Batch]):
    """What is trained: `network`, with batches, loss and optimiser.

    Attributes:
        size: images a batch.
        clip: largest norm of the gradient; none where None.
        precision: of the network's products; the best of the device where None.
        duration, schedule: of the training and of its learning rate.
    """

    clip: float | None = None
    precision: str | None = None
    divisible = False

    def __init__(self, network: nn.Module, size: int, duration: Duration, schedule: Schedule):
        super().__init__()
        self.network, self.size, self.duration, self.schedule = network, size, duration, schedule

    @abstractmethod
    def batches(self, first: int, seed: int) -> Generator[Batch, None, None]:
        """From the step `first` on; each is a function of seed and step. The seed moves on after a roll-back."""

    @abstractmethod
    def loss(self, batch: Batch, step: int) -> Float[Tensor, ""]:
        """Of a batch."""

    @abstractmethod
    def optimiser(self) -> torch.optim.Optimizer:
        """The rates of its groups are the peaks."""

    def forward(self, inputs: tuple[int, Batch], noise: None = None) -> Objective:
        """Of a batch and its step."""
        step, batch = inputs
        return Objective(self.loss(batch, step), {})

    def numbered(self, first: int, seed: int) -> Generator[tuple[int, Batch], None, None]:
        """Batches with their steps."""
        with closing(self.batches(first, seed)) as source:
            yield from enumerate(source, start=first)


AnyTask: TypeAlias = Task[Any]


def train(task: AnyTask, context: Context, folder: Path, settings: Mapping[str, Any]) -> Learned:
    """Train a task in place, or go on where `folder` holds a checkpoint of it; it is in eval mode at the end.

    Args:
        settings: plain data, with the number of images in `train`; what differs from those in `folder` is refused.

    Raises:
        InputError: `folder` holds training with other settings.
        NotFinite: the loss was not finite too often.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    bundle, seed = context.bundle, context.options.seed
    described = {"state": STATE, "encoder": bundle.name, "size": list(bundle.size), "seed": seed, **settings}
    how = Fitting(task.duration, task.schedule, seed, task.clip, task.size, described, precision=task.precision)
    trained = fit_task(task, task.optimiser(), task.numbered, folder, how)
    losses = [line["loss"] for line in Run(folder).lines("metrics.jsonl") if line.get("loss") is not None]
    return Learned(**trained, passes=round(trained["steps"] * task.size / settings["train"], 2), fall=last_fall(losses))


def last_fall(losses: Sequence[float]) -> float | None:
    """The share of all that a loss fell, between the means of its first and its last quarter, that came in the last."""
    if len(losses) < 4:
        return None
    first, _, third, last = (float(np.mean(part)) for part in np.array_split(np.asarray(losses, float), 4))
    return round((third - last) / (first - last), 2) if first > last else None


def too_short(trained: Mapping[str, Learned], above: float) -> str:
    """Why trainings were too short for their numbers to be compared, in a sentence; nothing where they were not.

    Args:
        trained: by the name of the network.
        above: how far the best of them is above what needs no network, a share.
    """
    rates = [trained[name] for name in trained]
    few = [name for name, one in trained.items() if one["steps"] < FEWEST]
    steep = {name: one["fall"] for name, one in trained.items() if one["fall"] is not None and one["fall"] > STEEP}
    if few:
        why = f"{listing(few)} had fewer than {FEWEST} steps"
    elif steep:
        falls = listing([f"{name} ({100 * fall:.0f} %)" for name, fall in steep.items()])
        why = f"the loss was still falling steeply, a large share of all that it fell in the last quarter: {falls}"
    elif above < OFF_THE_FLOOR:
        why = "no network is off the floor, that of what needs none"
    else:
        return ""
    passes = span_text([one["passes"] for one in rates], lambda value: f"{value:.3g}")
    return (
        f"too short to compare anything: {why}; the images were seen {passes} times. Give more `--minutes`, or "
        "`--set steps=...` or `epochs=...`, before a number here is taken for an answer."
    )


def two_rates(
    network: nn.Module, encoder: nn.Module, lr: float, encoder_lr: float | None, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW with one rate for what is new and one for the encoder, which is not trained where that is None."""
    inside = {id(parameter) for parameter in encoder.parameters()}
    new = [p for p in network.parameters() if id(p) not in inside and p.requires_grad]
    groups = [{"params": new, "lr": lr, "weight_decay": weight_decay}]
    if encoder_lr is not None:
        old = [p for p in encoder.parameters() if p.requires_grad]
        groups.append({"params": old, "lr": encoder_lr, "weight_decay": weight_decay})
    return adamw(groups, fused=False)  # which sums in another order: published numbers were found without


def sampled_batches(
    sample: Callable[[np.random.Generator], Batch], seed: int, first: int, device: torch.device
) -> Generator[Batch, None, None]:
    """A batch a step, each from a generator of (seed, step). Those for a GPU are made ahead by other processes, as many as
    memory has room for batches like the first, with twice as much in them."""

    def at(step: int) -> Batch:
        return sample(np.random.default_rng([seed, step]))

    made = at(first)
    yield made
    workers, prefetch = within_memory(reading_workers(device.type, cached=True), 2 * size_of(made))
    del made
    steps = itertools.count(first + 1)
    with closing(ordered_map(at, steps, workers, device.type == "cuda" and workers > 0, prefetch)) as batches:
        yield from batches


def as_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, with tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
