"""What can be trained: a module that gives a loss, the same for methods, tokenizers, classifiers, segmenters, detectors."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.draws import Draws

Same = TypeVar("Same")


class Objective(NamedTuple):
    """A loss, and the named numbers it was made of.

    `terms` holds scalars without gradient, among them `baseline`: the loss of a trivial prediction. A loss that
    does not fall below its baseline has learned nothing. `carry` is what the next part of a loss in parts starts from.
    `weights` says how much a term counts in a mean over micro-batches, processes and steps where that is not the same
    each time: the denominator of a ratio, the number of images that it speaks of (0 where there are none).
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Tensor]
    carry: Any = None
    weights: Mapping[str, Tensor] = MappingProxyType({})


@runtime_checkable
class Noise(Protocol):
    """What is random in a step, a row an image."""

    def to(self: Same, device: torch.device) -> Same: ...

    def rows(self: Same, rows: slice) -> Same: ...


class Trainable(nn.Module):
    """A module that the loop can train: `module(inputs, noise)` is an `Objective`.

    A loss that is a sum of independent parts has `num_losses` above 1. `forward(inputs, noise, part, carry)` is then one
    of them, to be backpropagated before the next is made, which starts from the `carry` of the one before; the last one
    has the terms.

    A task whose inputs have no row an image is not `divisible`: its batches are computed in one piece.
    A task whose gradient is a small difference of large numbers is `exact`: its products of float32 numbers are never shortened.
    """

    num_losses: int = 1
    divisible: bool = True
    exact: bool = False

    def noise_for(self, inputs: Any, draws: Draws) -> Any:
        """What is random in a step for these images of the global batch, on the CPU; None where forward draws by itself."""
        return None

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, object]]:
        """For the optimiser: `params`, their peak learning rate `lr` and their `weight_decay`."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr, "weight_decay": weight_decay}]

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Weights whose gradients are clipped by norms of their own; all together where empty."""
        return []

    def after_step(self, progress: float, taken: Float[Tensor, ""]) -> None:
        """After a step, when `progress` (0 to 1) of the training is done: a moving average of the weights follows here.

        `taken` is 1, or 0 where the gradient was not finite and the step changed nothing; it lies on the device, so that
        nobody waits for it.
        """
