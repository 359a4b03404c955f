"""The contract between a method and everything around it."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.backbones import Backbone
from underpaint.patches import Standardize
from underpaint.tokenizers import Tokenizer


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


class Method(nn.Module):
    """A pretraining method around an encoder: `method(images)` is an `Objective`.

    Images are standardised, float32 [b, c, height, width]. What is random in a step is drawn by `sample`, outside
    compiled regions; a method called without noise makes its own. Draws are a `Mask`, or a tuple of a method's own that
    has the same three verbs: `to(device)`, `rows(slice)`, and `repeat(batch)` of the noise of one image.

    A loss that is a sum of independent parts has `num_losses` above 1. `forward(images, noise, part, carry)` is then
    one of them, to be backpropagated before the next is made, which starts from the `carry` of the one before; the
    last one has the terms. Without `part`, forward is their sum.
    """

    encoder: Backbone
    num_losses: int = 1

    def sample(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Any:
        """The random part of a step for `batch` images of this size in pixels, on the CPU."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "b c height width"], noise: Any = None) -> Objective:
        raise NotImplementedError

    def rate_factors(self) -> dict[str, float]:
        """Weights in a parameter group of their own, without decay: the factor on their learning rate, by name."""
        return {}

    def clipped_apart(self) -> list[list[nn.Parameter]]:
        """Weights whose gradients are clipped by norms of their own; all together where empty."""
        return []

    def parts(self, images: Float[Tensor, "b c height width"], noise: Any = None) -> Iterator[Objective]:
        """The parts of the loss one by one; backpropagate each before asking for the next, and memory is that of one."""
        if self.num_losses == 1:
            yield self(images, noise)
            return
        if noise is None:
            noise = self.sample(len(images), images.shape[2], images.shape[3]).to(images.device)
        carry = None
        for part in range(self.num_losses):
            objective = self(images, noise, part, carry)
            yield objective
            carry = objective.carry

    def prepare(self, standardize: Standardize) -> Tokenizer | None:
        """Take over the transform of the images, where it is needed; returns the tokenizer that has to be ready before
        step 0, for methods that predict words."""
        return None

    def calibrate(
        self, images: Float[Tensor, "b c height width"], noise: Any, mean: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, float]:
        """Settings that are measured on the first batch before step 0: taken over at once, and returned by name.

        `mean` averages a number over the processes of a run, so that all take over the same.
        """
        return {}

    def after_step(self, progress: float) -> None:
        """After a step that was taken, where the share `progress` of the run is done: a moving-average teacher follows
        here."""

    def restore(self, images: Float[Tensor, "b c height width"], noise: Any = None) -> dict[str, Tensor]:
        """Pictures by caption, standardised like the images, from the original to the restoration."""
        raise NotImplementedError

    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """How unusual each image is: higher means less like the training data."""
        raise NotImplementedError

    def held_out(
        self, images: Float[Tensor, "b c height width"], generator: torch.Generator
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By task: each image's squared error on what was corrupted, restored and trivially restored ([b] each)."""
        raise NotImplementedError

    def fixed_noise(self, images: Tensor, count: int) -> list[Any]:
        """The noise of `count` steps, the same at every call, for scores and pictures that can be compared."""
        generator = torch.Generator().manual_seed(0)
        batch, _, height, width = images.shape
        return [self.sample(1, height, width, generator).repeat(batch).to(images.device) for _ in range(count)]
