"""The contract between a method and everything around it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.backbones import Backbone
from underpaint.masking import Mask


class Objective(NamedTuple):
    """A loss, and the named numbers it was made of.

    `terms` holds scalars without gradient, among them `baseline`: the loss of a trivial prediction. A loss that
    does not fall below its baseline has learned nothing.
    """

    loss: Float[Tensor, ""]
    terms: dict[str, Tensor]


class Method(nn.Module):
    """A pretraining method around an encoder: `method(images)` is an `Objective`.

    Images are standardised, float32 [b, c, height, width]. What is random in a step is drawn by `draw`, outside
    compiled regions; a method called without draws makes its own.
    """

    paper: str  # one line: what it does, and where it comes from
    encoder: Backbone

    def draw(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Mask:
        """The random part of a step for `batch` images of this size in pixels, on the CPU."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> Objective:
        raise NotImplementedError

    def calibrate(
        self, images: Float[Tensor, "b c height width"], mask: Mask, mean: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, float]:
        """Settings that are measured on the first batch before step 0: taken over at once, and returned by name.

        `mean` averages a number over the processes of a run, so that all take over the same.
        """
        return {}

    def restore(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> dict[str, Tensor]:
        """Pictures by caption, standardised like the images, from the original to the restoration."""
        raise NotImplementedError

    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """How unusual each image is: higher means less like the training data."""
        raise NotImplementedError

    def fixed_draws(self, images: Tensor, count: int) -> Sequence[Mask]:
        """The same `count` draws at every call, for scores and pictures that can be compared."""
        generator = torch.Generator().manual_seed(0)
        batch, _, height, width = images.shape
        one = [self.draw(1, height, width, generator) for _ in range(count)]
        return [Mask(*(index.expand(batch, -1) for index in mask)).to(images.device) for mask in one]
