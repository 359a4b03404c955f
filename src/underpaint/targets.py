"""What hidden patches should become: oriented gradients or pixels, at one scale or several.

A `Target` is what a method is told to predict. TARGETS has them by the name that `--set method.target=` takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from underpaint.computing import full, in_full
from underpaint.patches import patchify, standardize, unpatchify, unstandardize

SMALLEST_CELL = 2  # pixels; an orientation needs two


@torch.no_grad()
def hog_pyramid(
    images: Float[Tensor, "b c height width"], cells: Sequence[int], bins: int = 9
) -> list[Float[Tensor, "b d rows columns"]]:
    """Histograms of oriented gradients at several scales (LocalMIM, arXiv 2303.05251; as in MaskFeat, 2112.09133).

    For each channel: Sobel gradients (reflected at the border), each pixel's magnitude counted whole in one of `bins`
    bins of 180 degrees, the mean over a cell, and each cell's histogram to length 1. Magnitudes and bins are computed
    once and coarser cells added up from finer ones, which is exact up to rounding since the mean comes before the
    length. float32 (or float64), also under autocast: half precision flips bins near their edges. float32 flips
    those of pixels whose gradient lies on an edge but for rounding: float64 or a convolution may count them elsewhere.

    Args:
        images: of any range and channels; the target does not depend on a channel's contrast.
        cells: pixels of a side, ascending, each a multiple of the one before; each divides the image.
        bins: of orientations.

    Returns:
        One map a cell size, d = channels * bins (bins of the first channel first). A flat cell is 0.

    Raises:
        ValueError: a cell that does not divide the image, or the next cell.
    """
    height, width = images.shape[-2:]
    for cell, finer in zip(cells, (1, *cells), strict=False):
        if cell < 1 or cell % finer or height % cell or width % cell:
            raise ValueError(
                f"HOG cells of {tuple(cells)} px do not divide one another and an image of {height}x{width}"
            )
    with in_full(images):
        images = full(images)
        size = cells[0]
        pixels = [
            # [b, c, rows, columns, pixels of a cell]
            values.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4).flatten(4)
            for values in _gradients(images, bins)
        ]
        magnitude, bin_ = pixels
        level = magnitude.new_zeros(*magnitude.shape[:-1], bins).scatter_add_(4, bin_, magnitude)
        found = []
        for cell in cells:
            if cell != size:  # sums do as well as means: only the direction of a histogram is kept
                times, size = cell // size, cell
                level = level.unflatten(3, (-1, times)).unflatten(2, (-1, times)).sum((3, 5))
            length = level.square().sum(4, keepdim=True).sqrt()
            found.append((level / length.clamp_min(1e-12)).permute(0, 1, 4, 2, 3).flatten(1, 2))
    return found


def _gradients(images: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Magnitude and orientation bin of each pixel of each channel.

    The Sobel filters are written as sums of shifted images (smoothing one way, difference the other), which a
    convolution of one channel at a time is not faster at. The angle is atan2(gx, gy), in this order, as published.
    """
    padded = functional.pad(images, (1, 1, 1, 1), mode="reflect")
    down = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    gx = down[..., :-2] - down[..., 2:]
    along = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    gy = along[..., :-2, :] - along[..., 2:, :]
    # a direction that is no number has no bin; its magnitude is none either, and spoils the cell as it should
    bin_ = (torch.atan2(gx, gy) * (bins / math.pi)).floor().remainder(bins).nan_to_num(0).long()
    return (gx.square() + gy.square()).sqrt(), bin_


def strokes(
    histograms: Float[Tensor, "b d rows columns"], bins: int, channels: int, side: int = 9
) -> Float[Tensor, "b 1 height width"]:
    """A picture of a HOG map, `side` pixels a cell: a bright line along the edge for each orientation, its brightness
    the mean of the channels. Values from 0 to 1."""
    b, _, rows, columns = histograms.shape
    weights = histograms.unflatten(1, (channels, bins)).mean(1)
    weights = weights / weights.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    middle = torch.arange(side, device=histograms.device) - (side - 1) / 2
    # atan2(gx, gy) of a bin's middle: the gradient points along (sin, cos) in (x, y), the edge across it
    angles = (torch.arange(bins, device=histograms.device) + 0.5) * math.pi / bins
    off = angles.sin().view(-1, 1, 1) * middle + angles.cos().view(-1, 1, 1) * middle.view(-1, 1)
    lines = (1 - off.abs()).clamp(min=0).to(histograms.dtype)  # [bins, side, side], one pixel wide
    drawn = torch.einsum("bkrc,kyx->brycx", weights.clamp(min=0), lines)
    return drawn.reshape(b, 1, rows * side, columns * side).clamp(max=1)


def hog_picture(
    histograms: Float[Tensor, "b d rows columns"], bins: int, channels: int, side: int
) -> Float[Tensor, "b c height width"]:
    """Strokes among standardised images: about black to white."""
    return (4 * strokes(histograms, bins, channels, side) - 2).expand(-1, channels, -1, -1)


def enlargement(images: Float[Tensor, "b c height width"]) -> int:
    """How many times as large a picture must be for strokes to be seen: to at least 96 px."""
    return max(1, -(-96 // min(images.shape[-2:])))


def enlarge(images: Float[Tensor, "b c height width"], times: int) -> Float[Tensor, "b c tall wide"]:
    return images.repeat_interleave(times, 2).repeat_interleave(times, 3)


def window_moments(
    images: Float[Tensor, "b c height width"], side: int
) -> tuple[Float[Tensor, "b c height width"], Float[Tensor, "b c height width"]]:
    """Mean and (biased) variance of the `side` x `side` window around each pixel, a channel each, edges reflected.

    The window of an even side reaches one pixel further up and left. float32 always, and never below 0: on bright flat
    images the difference of two large numbers would be.
    """
    x = images.float()
    before, after = side // 2, (side - 1) // 2
    padded = functional.pad(x, (before, after, before, after), mode="reflect")
    mean = functional.avg_pool2d(padded, side, 1)
    variance = functional.avg_pool2d(padded.square(), side, 1) - mean.square()
    return mean, variance.clamp_min(0)


def sliding_window(
    images: Float[Tensor, "b c height width"], side: int, epsilon: float
) -> Float[Tensor, "b c height width"]:
    """Each pixel by the mean and deviation of the window around it (CIM's targets)."""
    mean, variance = window_moments(images, side)
    return (images.float() - mean) * (variance + epsilon).rsqrt()


@dataclass(frozen=True)
class Target:
    """A description of square cells, one vector each: float32 whatever images are, and without a gradient.

    Attributes:
        name: in TARGETS, and in the names of losses.
        smallest: pixels of a side of the smallest cell that it can describe.
        along: cells along a patch where a method asks for one scale.
    """

    name: ClassVar[str]
    smallest: ClassVar[int] = 1
    along: ClassVar[int] = 1

    def width(self, cell: int, channels: int) -> int:
        """Numbers that describe a cell of so many pixels of a side."""
        raise NotImplementedError

    def __call__(
        self, images: Float[Tensor, "b c height width"], cells: Sequence[int]
    ) -> list[Float[Tensor, "b d rows columns"]]:
        """A map for each side of a cell in pixels, ascending."""
        raise NotImplementedError

    def trivial(self, values: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        """The prediction that is to be beaten: one for all cells."""
        return values.flatten(0, -2).mean(0).expand_as(values)

    def picture(
        self, level: Float[Tensor, "b d rows columns"], images: Float[Tensor, "b c height width"], times: int
    ) -> Float[Tensor, "b c tall wide"]:
        """A picture of a map of these standardised images, `times` as large as they are."""
        raise NotImplementedError


@dataclass(frozen=True)
class Pixels(Target):
    """The pixels of a cell, channel by channel, to mean 0 and variance 1 where `norm_pix_loss` (MAE, arXiv 2111.06377)."""

    name = "pixels"
    norm_pix_loss: bool = True

    def width(self, cell: int, channels: int) -> int:
        return channels * cell * cell

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "b c height width"], cells: Sequence[int]
    ) -> list[Float[Tensor, "b d rows columns"]]:
        height, width = images.shape[-2:]
        found = []
        for cell in cells:
            patches = patchify(images.float(), (cell, cell))
            patches = standardize(patches) if self.norm_pix_loss else patches
            found.append(patches.transpose(1, 2).unflatten(2, (height // cell, width // cell)))
        return found

    def trivial(self, values: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        """The mean of each cell."""
        return values.mean(-1, keepdim=True).expand_as(values)

    def picture(
        self, level: Float[Tensor, "b d rows columns"], images: Float[Tensor, "b c height width"], times: int
    ) -> Float[Tensor, "b c tall wide"]:
        """Standardised cells leave mean and contrast open: pictures take them from the original."""
        rows, columns = level.shape[-2:]
        size = (images.shape[-2] // rows, images.shape[-1] // columns)
        patches = level.flatten(2).transpose(1, 2)
        if self.norm_pix_loss:
            patches = unstandardize(patches, patchify(images, size))
        return enlarge(unpatchify(patches, size, (rows, columns)), times)


@dataclass(frozen=True)
class HOG(Target):
    """Oriented gradients: `hog_pyramid` with so many bins."""

    name = "hog"
    smallest = SMALLEST_CELL
    along = 2
    bins: int = 9

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"bins is {self.bins}; HOG has 1 orientation or more")

    def width(self, cell: int, channels: int) -> int:
        return channels * self.bins

    def __call__(
        self, images: Float[Tensor, "b c height width"], cells: Sequence[int]
    ) -> list[Float[Tensor, "b d rows columns"]]:
        return hog_pyramid(images, cells, self.bins)

    def picture(
        self, level: Float[Tensor, "b d rows columns"], images: Float[Tensor, "b c height width"], times: int
    ) -> Float[Tensor, "b c tall wide"]:
        """A stroke along the edges of each cell."""
        side = images.shape[-2] // level.shape[-2] * times
        return hog_picture(level, self.bins, images.shape[1], side)


TARGETS: dict[str, type[Target]] = {kind.name: kind for kind in (Pixels, HOG)}


def target_for(target: str | Target, **settings: Any) -> Target:
    """A target by its name, with those of a method's settings that it knows; a target as it is.

    Raises:
        ValueError: there is no such target.
    """
    if isinstance(target, Target):
        return target
    if target not in TARGETS:
        raise ValueError(f"target is '{target}'; it must be one of {', '.join(TARGETS)}")
    known = {field.name for field in fields(TARGETS[target])}
    return TARGETS[target](**{name: value for name, value in settings.items() if name in known})
