"""Images to corrupted images: plain functions on standardised images, in which 0 is the data's mean.

None of them changes an image's size, none draws anything by itself, and none looks at another image of the batch. A
`Corruption` is one of them with what is random of it, and which of its errors count.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from underpaint.draws import Draws, normal
from underpaint.masking import Mask, Masking, hidden_map
from underpaint.patches import patchify, take, unpatchify

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def mask_cells(
    images: Float[Tensor, "b c height width"], mask: Mask, cell: tuple[int, int]
) -> Float[Tensor, "b c height width"]:
    """Hidden cells become 0, the mean of the data in standardised space; `cell` is (height, width) in pixels."""
    grid = (images.shape[-2] // cell[0], images.shape[-1] // cell[1])
    return images * (1 - hidden_map(mask, grid, cell))


def shuffle_patches(
    images: Float[Tensor, "b c height width"], order: Int[Tensor, "b n"], patch: tuple[int, int]
) -> Float[Tensor, "b c height width"]:
    """Place k of the result shows patch `order[k]` of the image, for patches of (height, width) pixels."""
    grid = (images.shape[-2] // patch[0], images.shape[-1] // patch[1])
    return unpatchify(take(patchify(images, patch), order), patch, grid)


def downsample(images: Float[Tensor, "b c height width"], factor: int) -> Float[Tensor, "b c height width"]:
    """Smaller by `factor` (bicubic, antialiased), then back to size by repeating pixels.

    Raises:
        ValueError: the factor does not divide the image.
    """
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"a factor of {factor} does not divide an image of {height}x{width}")
    small = functional.interpolate(images, (height // factor, width // factor), mode="bicubic", antialias=True)
    return small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def add_noise(
    images: Float[Tensor, "b c height width"], noise: Float[Tensor, "b c height width"], kept: Float[Tensor, "b"]
) -> Float[Tensor, "b c height width"]:
    """sqrt(kept) * image + sqrt(1 - kept) * noise: with normal noise the variance of a standardised image stays."""
    share = kept.view(-1, 1, 1, 1)
    return share.sqrt() * images + (1 - share).sqrt() * noise


def gray(images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
    """One brightness in every channel: luma of three channels, the mean of any other number.

    It weighs standardised channels, whose means and deviations differ little between colours of photographs.
    """
    channels = images.shape[1]
    weights = images.new_tensor(LUMA if channels == 3 else [1 / channels] * channels)
    return (images * weights.view(1, -1, 1, 1)).sum(1, keepdim=True).expand(-1, channels, -1, -1)


@dataclass(frozen=True)
class Corruption:
    """One way to corrupt images."""

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Any:
        """What is random of it, a row an image, on the CPU; None where nothing is.

        Raises:
            ValueError: it does not fit images of this size in pixels.
        """
        return None

    def apply(self, images: Float[Tensor, "b c height width"], noise: Any) -> Float[Tensor, "b c height width"]:
        raise NotImplementedError

    def error(self, squares: Float[Tensor, "b c height width"], noise: Any) -> Float[Tensor, "b c height width"]:
        """The squared errors of what was corrupted; 0 elsewhere."""
        return squares


@dataclass(frozen=True)
class Hide(Corruption):
    """Some cells at the data's mean."""

    masking: Masking

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Mask:
        return self.masking(batch, height, width, draws)

    def apply(self, images: Float[Tensor, "b c height width"], noise: Mask) -> Float[Tensor, "b c height width"]:
        return mask_cells(images, noise, self.masking.unit)

    def error(self, squares: Float[Tensor, "b c height width"], noise: Mask) -> Float[Tensor, "b c height width"]:
        grid = self.masking.grid(*squares.shape[-2:])
        return squares * hidden_map(noise, grid, self.masking.unit).expand_as(squares)


@dataclass(frozen=True)
class Shuffle(Corruption):
    """Patches of (height, width) pixels out of order: position k gets patch order[k]."""

    patch: tuple[int, int]

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Tensor:
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(f"patches of {self.patch} px do not divide an image of {height}x{width}")
        count = (height // self.patch[0]) * (width // self.patch[1])
        return Draws.some_or_new(draws, batch).uniform(count).argsort(dim=1, stable=True)

    def apply(self, images: Float[Tensor, "b c height width"], noise: Tensor) -> Float[Tensor, "b c height width"]:
        return shuffle_patches(images, noise, self.patch)


@dataclass(frozen=True)
class Downsample(Corruption):
    """Resolution lost by one of these factors an image."""

    factors: tuple[int, ...] = (2, 4)

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Tensor:
        for factor in self.factors:
            if height % factor or width % factor:
                raise ValueError(f"factor {factor} does not divide an image of {height}x{width}")
        return Draws.some_or_new(draws, batch).integers(len(self.factors))

    def apply(self, images: Float[Tensor, "b c height width"], noise: Tensor) -> Float[Tensor, "b c height width"]:
        made = images
        for number, factor in enumerate(self.factors):
            made = torch.where((noise == number).view(-1, 1, 1, 1), downsample(images, factor), made)
        return made


@dataclass(frozen=True)
class AddNoise(Corruption):
    """Normal noise that leaves a share of the variance, uniform in (0, 1) an image.

    What is drawn of a pixel is a key an image; its numbers are made where the image is.
    """

    def sample(
        self, batch: int, height: int, width: int, draws: Draws | None = None
    ) -> tuple[Float[Tensor, "b"], Int[Tensor, "b"]]:
        draws = Draws.some_or_new(draws, batch)
        return draws.uniform(), draws.keys()

    def apply(self, images: Float[Tensor, "b c height width"], noise: Any) -> Float[Tensor, "b c height width"]:
        kept, keys = noise
        return add_noise(images, normal(keys, *images.shape[1:]), kept)


@dataclass(frozen=True)
class Gray(Corruption):
    """Lost colour."""

    def apply(self, images: Float[Tensor, "b c height width"], noise: Any) -> Float[Tensor, "b c height width"]:
        return gray(images)
