"""What follows from the sizes of images and objects where nothing is said: the input of a segmenter or a detector, and its
batch."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

CELL = 16.0  # pixels of a side that nine of ten objects should have at least: four cells of a finest map of stride 4
MOST = 1_024  # patches of an image: attention over more costs more than it brings where time is short
MANY = 10  # objects of a class: fewer tell nothing of its sizes
MAP = 32  # pixels: the coarsest stride of a network without patches
MAP_CELL = 16  # pixels of what counts as a patch there


def small_side(sides: Float[np.ndarray, "n"], labels: Int[np.ndarray, "n"]) -> float | None:
    """The side that nine of ten objects of every class have at least; of classes with few objects, all together.

    A mean over classes counts a rare small kind as much as a frequent large one.
    """
    counts = {label: int((labels == label).sum()) for label in np.unique(labels).tolist()}
    parts = [sides[labels == label] for label, count in counts.items() if count >= MANY]
    parts += [part for part in [sides[[counts[label] < MANY for label in labels.tolist()]]] if len(part)]
    return min((float(np.quantile(part, 0.1)) for part in parts), default=None)


def fitting_size(
    shapes: Sequence[tuple[int, int]], small: float | None, patch: tuple[int, int] | None
) -> tuple[tuple[int, int], str]:
    """Height and width in pixels of what a network is given, and why, in a few words.

    The whole image, made so small that the smaller objects can still be told (nine of ten have a side of `CELL` pixels),
    never larger than it is, and of at most `MOST` patches.

    Args:
        shapes: height and width of images to train on.
        small: side of the smaller objects on them in pixels (`small_side`); the whole image counts where None.
        patch: of the encoder, height and width in pixels; None where it has none.
    """
    tall, wide = (float(np.median([shape[k] for shape in shapes])) for k in (0, 1))
    why = f"images are {tall:.0f}x{wide:.0f} px"
    scale = 1.0
    if small is not None:
        scale = min(1.0, CELL / max(small, 1e-6))
        why += f", and nine of ten objects of every class have a side of {small:.0f} px or more"
    unit = patch or (MAP, MAP)
    cell = patch or (MAP_CELL, MAP_CELL)
    most = math.sqrt(MOST * cell[0] * cell[1] / (tall * wide))
    if scale > most:
        scale = most
        why += f"; more than {MOST:,} patches would cost too much"
    height, width = (
        max(2, _rounded(scale * side / step)) * step for side, step in zip((tall, wide), unit, strict=True)
    )
    return (height, width), why


def _rounded(value: float) -> int:
    """Up, where it is nothing but rounding down."""
    return math.ceil(value - 1e-6)


def fitting_batch(size: tuple[int, int], pixels: int, most: int) -> int:
    """Images a step: the power of two of which a step has about as many pixels, from 2 up to `most`."""
    return int(2 ** min(math.log2(most), max(1, math.floor(math.log2(pixels / (size[0] * size[1]))))))
