"""Evaluations that train a network: what is trained is a module with its loss, and one loop trains it."""

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.evaluation.base import Context
from underpaint.train.fit import Fitting, Trained, fit_task
from underpaint.train.optim import adamw
from underpaint.train.schedules import Duration, Schedule
from underpaint.trainable import Objective, Trainable

STATE = 2  # of what a checkpoint holds; 1 named the weights otherwise
Batch = TypeVar("Batch")


class Task(Trainable, Generic[Batch]):
    """What is trained: `network`, with batches, loss and optimiser.

    Attributes:
        size: images a batch.
        clip: largest norm of the gradient; none where None.
        duration, schedule: of the training and of its learning rate.
    """

    clip: float | None = None
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


def train(task: AnyTask, context: Context, folder: Path, settings: Mapping[str, object]) -> Trained:
    """Train a task in place, or go on where `folder` holds a checkpoint of it; it is in eval mode at the end.

    Args:
        settings: plain data; what differs from those in `folder` is refused.

    Raises:
        InputError: `folder` holds training with other settings.
        NotFinite: the loss was not finite too often.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    bundle, seed = context.bundle, context.options.seed
    described = {"state": STATE, "encoder": bundle.name, "size": list(bundle.size), "seed": seed, **settings}
    how = Fitting(task.duration, task.schedule, seed, task.clip, task.size, described)
    return fit_task(task, task.optimiser(), task.numbered, folder, how)


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
    sample: Callable[[np.random.Generator], Batch], seed: int, first: int
) -> Generator[Batch, None, None]:
    """A batch a step, each from a generator of (seed, step)."""
    step = first
    while True:
        yield sample(np.random.default_rng([seed, step]))
        step += 1


def as_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, with tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
