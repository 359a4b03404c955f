"""How pixel values become numbers in [0, 1]: measured once, on the images that an encoder is pretrained on, and kept
with it, so that an image is the same to it wherever it lies."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

TAIL = 1e-3  # share of the pixels on either side that may be faults: hot pixels, dust, missing values
MARGIN = 1.0  # spans between the tails by which the range reaches beyond them, so that small bright objects stay
BLOCK = 1e-3  # share of the pixels from which on one value, far from all others, looks like a marker of missing ones
KINDS = {"uint8": "8-bit", "uint16": "16-bit", "float32": "float"}


@dataclass(frozen=True)
class Scaling:
    """What the pixels of a set mean.

    Attributes:
        dtype: "uint8", "uint16" or "float32", in which all its images are held.
        types: of the files it was measured on. A file of another type has units that nothing is known about.
        low, high: per channel, in the units of `dtype`: what becomes 0 and 1; 0 and 255 for 8 bit. Beyond is clipped.
        background: per channel, what shows through alpha; a fraction of full scale (float: in the files' units).
        nodata: a value that stands for missing pixels, beside NaN, infinities and what a TIFF's own tag says.
    """

    dtype: str
    types: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    background: tuple[float, ...]
    nodata: float | None = None

    @property
    def plain(self) -> bool:
        """Whether it is that of ordinary 8-bit images."""
        return self.dtype == "uint8" and self.nodata is None

    def same_units(self, other: "Scaling | None") -> bool:
        """Whether images become the same numbers by another; what says nothing is taken to."""
        return other is None or (self.dtype, self.low, self.high) == (other.dtype, other.low, other.high)

    def stored(self) -> dict[str, Any]:
        """As plain data, for YAML and JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def unit(self, images: Tensor) -> Tensor:
        """Float images [..., c, h, w] in the units of `dtype` to [0, 1], in place."""
        if len(set(self.low)) == len(set(self.high)) == 1:
            return images.sub_(self.low[0]).div_(self.high[0] - self.low[0]).clamp_(0, 1)
        low, span = _limits(self, images.device)
        return images.sub_(low).div_(span).clamp_(0, 1)

    def __str__(self) -> str:
        """A line for people."""
        pairs = [f"{a:.5g} to {b:.5g}" for a, b in zip(self.low, self.high, strict=True)]
        if len(set(pairs)) == 1:
            told = f"values from {pairs[0]} become 0 to 1"
        else:
            told = "values become 0 to 1 by channel, " + ", ".join(pairs[:4])
            told += f", ... ({len(pairs)} channels)" if len(pairs) > 4 else ""
        told += "" if self.nodata is None else f"; {self.nodata:g} stands for missing pixels"
        return f"{' and '.join(KINDS[name] for name in self.types)} images: {told}"


def stored_scaling(found: Mapping[str, Any] | None) -> Scaling | None:
    """What `Scaling.stored` gave; None for None."""
    if found is None:
        return None
    listed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Scaling(**listed)


@lru_cache(maxsize=16)
def _limits(scaling: Scaling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Low and span [c, 1, 1]; kept, so that no batch waits for a copy to the device."""
    low, high = (torch.tensor(side, device=device).view(-1, 1, 1) for side in (scaling.low, scaling.high))
    return low, high - low


def robust_range(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The range of one channel that a few faulty pixels do not change: `MARGIN` spans beyond the tails of `TAIL` on
    either side, or the smallest and largest value where these lie nearer.

    A channel that is all but constant (sparse spots on nothing) has the range of what differs from its median.
    """
    if len(values) == 0:
        return 0.0, 1.0
    low, middle, high = weighted_quantiles(values, weights, (TAIL, 0.5, 1 - TAIL))
    least, most = float(values.min()), float(values.max())
    if low == high:
        other = values != middle
        if not other.any():
            return middle, middle + 1.0
        tails = weighted_quantiles(values[other], weights[other], (TAIL, 1 - TAIL))
        return min(middle, tails[0]), max(middle, tails[1])
    span = high - low
    return max(least, low - MARGIN * span), min(most, high + MARGIN * span)


def weighted_quantiles(values: np.ndarray, weights: np.ndarray, shares: Sequence[float]) -> list[float]:
    """The smallest values below or at which lie these shares of the weight."""
    order = np.argsort(values, kind="stable")
    summed = np.cumsum(weights[order], dtype=np.float64)
    places = np.searchsorted(summed, np.asarray(shares) * summed[-1])
    return [float(values[order[min(place, len(order) - 1)]]) for place in places.tolist()]


def told_of_channel(values: np.ndarray, weights: np.ndarray, low: float, high: float, name: str) -> list[str]:
    """What a user should know of a channel's range: tails that are cut, and a value that looks like missing pixels."""
    notes = []
    tails = weighted_quantiles(values, weights, (TAIL, 1 - TAIL))
    if tails[0] == tails[1]:
        notes.append(f"{name}: nearly constant over all images ({tails[0]:.5g})")
    beyond = (values < low) | (values > high)
    if beyond.any():
        share = float(weights[beyond].sum() / weights.sum())
        notes.append(
            f"{name}: values go from {values.min():.5g} to {values.max():.5g}; beyond {low:.5g} to {high:.5g} they are "
            f"clipped ({100 * share:.2g} % of the pixels)"
        )
    for end, rest in ((values.min(), values[values > values.min()]), (values.max(), values[values < values.max()])):
        if len(rest) == 0 or rest.min() == rest.max():
            continue
        nearest, spread = (rest.min(), rest.max()) if end < rest.min() else (rest.max(), rest.min())
        at_end = float(weights[values == end].sum() / weights.sum())
        if at_end > BLOCK and abs(nearest - end) > abs(spread - nearest):
            notes.append(
                f"{name}: {100 * at_end:.2g} % of the pixels are {end:g}, far from all others; if that stands for "
                f"missing ones, --set data.nodata={end:g}"
            )
    return notes
