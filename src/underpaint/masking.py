"""Which patches are hidden: exact counts, static shapes, no boolean indexing.

Every kind of mask writes one score a patch; the highest scores are hidden. Scores are `Draws`: of a step they are
functions of (seed, step, image), so one process or many see the same masks, and a resumed run needs no saved random
state. They are drawn on the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from underpaint.draws import Draws

TRIES = 10  # of a block, before no other is laid
Noise = TypeVar("Noise")  # of a step: tuples and dicts of tensors, a row an image


def each_tensor(noise: Noise, change: Callable[[Tensor], Tensor]) -> Noise:
    """The same tuples and dicts with every tensor changed."""
    made: Any = noise
    if isinstance(noise, Tensor):
        made = change(noise)
    elif isinstance(noise, dict):
        made = {name: each_tensor(value, change) for name, value in noise.items()}
    elif isinstance(noise, tuple):
        made = [each_tensor(value, change) for value in noise]
        made = type(noise)(*made) if hasattr(noise, "_fields") else tuple(made)
    return made


def to_device(noise: Noise, device: torch.device) -> Noise:
    return each_tensor(noise, lambda value: value.to(device, non_blocking=True))


def some_rows(noise: Noise, rows: slice) -> Noise:
    """The noise of some images of the batch."""
    return each_tensor(noise, lambda value: value[rows])


def repeated(noise: Noise, batch: int) -> Noise:
    """The noise of one image for each of a batch."""
    return each_tensor(noise, lambda value: value.expand(batch, *value.shape[1:]))


class Mask(NamedTuple):
    """Patch numbers 0..n-1 of each image: those an encoder may see, and those it may not."""

    visible: Int[Tensor, "b v"]
    hidden: Int[Tensor, "b h"]

    to = to_device
    rows = some_rows
    repeat = repeated


def hide_highest(score: Float[Tensor, "b n"], count: int) -> Mask:
    """Hide the `count` patches of highest score (float32) in each image, of equal ones the last; both index lists are in
    ascending order."""
    n, kept = score.shape[1], score.shape[1] - count
    places = torch.arange(n, device=score.device)
    bits = score.float().view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # whole numbers in the order of the scores
    unlike = (bits.long() << 32) | places
    hidden = unlike > unlike.kthvalue(kept, dim=1, keepdim=True).values  # a third of the time of sorting
    before = hidden.cumsum(1)
    at = torch.where(hidden, kept + before - 1, places - before)
    both = torch.empty_like(at).scatter_(1, at, places.expand_as(at))
    return Mask(both[:, :kept].contiguous(), both[:, kept:].contiguous())


def random_mask(batch: int, grid: tuple[int, int], hidden: int, draws: Draws | None = None) -> Mask:
    """Hide `hidden` patches of a grid (rows, columns), all choices equally likely (MAE, 2111.06377, section 3)."""
    return hide_highest(Draws.some_or_new(draws, batch).uniform(grid[0] * grid[1]), hidden)


def block_mask(batch: int, grid: tuple[int, int], hidden: int, draws: Draws | None = None) -> Mask:
    """Hide `hidden` patches in blocks (BEiT, arXiv 2106.08254, algorithm 1), exactly as many in each image.

    A block is a rectangle of an area between 0.08 of the grid (two patches or more) and what is still to be hidden, with an
    aspect log-uniform in [0.3, 1 / 0.3]. One that does not fit the grid, or would hide nothing new or too much, is drawn
    again, up to ten times. What such tries leave open is filled in beside the blocks. The images of a batch are tried
    together, each with numbers of its own.
    """
    draws = Draws.some_or_new(draws, batch)
    rows, columns = grid
    smallest, widest = max(2, round(0.08 * rows * columns)), math.log(1 / 0.3)
    covered = torch.zeros(batch, rows, columns, dtype=torch.bool)
    y, x = torch.arange(rows), torch.arange(columns)
    going, trying = torch.arange(batch), draws.apart()  # images that another block is tried for
    while len(going):
        sums = functional.pad(covered[going].int().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
        left = hidden - sums[:, -1:]
        drawn = trying.uniform(4, TRIES).unbind(1)
        area, aspect = smallest + drawn[0] * (left - smallest), torch.exp((2 * drawn[1] - 1) * widest)
        tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (tall < rows) & (wide < columns)
        tall, wide = tall.clamp(max=rows).long(), wide.clamp(max=columns).long()
        top = (drawn[2] * (rows - tall + 1)).long()
        first = (drawn[3] * (columns - wide + 1)).long()
        # how much of a block is hidden already, by the sums above and left of its corners
        corners = [(down * (columns + 1) + along) for down in (top, top + tall) for along in (first, first + wide)]
        before = [sums.gather(1, corner) for corner in corners]
        new = tall * wide - (before[3] - before[1] - before[2] + before[0])
        good = fits & (new > 0) & (new <= left)
        found, chosen = good.any(1), good.int().argmax(1, keepdim=True)
        top, first, tall, wide = (value.gather(1, chosen) for value in (top, first, tall, wide))
        inside = ((y >= top) & (y < top + tall)).unsqueeze(2) & ((x >= first) & (x < first + wide)).unsqueeze(1)
        covered[going] |= inside & found.view(-1, 1, 1)
        unfinished = found & (new.gather(1, chosen) < left).squeeze(1)
        going, trying = going[unfinished], trying.some(unfinished)
    beside = functional.pad(covered.float(), (1, 1, 1, 1))
    beside = beside[:, 2:, 1:-1] + beside[:, :-2, 1:-1] + beside[:, 1:-1, 2:] + beside[:, 1:-1, :-2]
    score = 8 * covered + beside + draws.uniform(rows, columns)
    return hide_highest(score.flatten(1), hidden)


Strategy = Callable[[int, tuple[int, int], int, Draws], Mask]  # batch, grid, hidden, draws
MASKS: dict[str, Strategy] = {"random": random_mask, "block": block_mask}


@dataclass(frozen=True)
class Masking:
    """How masks of a batch are made: a share of a grid, by a strategy, `factor` x `factor` positions hidden as one.

    A mask numbers the positions of a grid of `unit` pixels (height, width), row by row.
    """

    ratio: float = 0.75
    strategy: Strategy = random_mask
    unit: tuple[int, int] = (1, 1)
    factor: int = 1

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an image of this size in pixels."""
        return height // self.unit[0], width // self.unit[1]

    def __call__(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Mask:
        """Masks for images of this size in pixels, on the CPU. Where no draws are given, torch's global generator seeds some.

        Raises:
            ValueError: what is hidden as one does not divide the image; the ratio hides all of it, or nothing.
        """
        if height % (self.factor * self.unit[0]) or width % (self.factor * self.unit[1]):
            sides = " x ".join(str(self.factor * side) for side in self.unit)
            raise ValueError(f"mask_patch_size: {sides} px do not divide an image of {height}x{width}")
        draws = Draws.some_or_new(draws, batch)
        rows, columns = self.grid(height, width)
        coarse = (rows // self.factor, columns // self.factor)
        mask = self.strategy(batch, coarse, hidden_count(coarse[0] * coarse[1], self.ratio), draws)
        return mask if self.factor == 1 else refine(mask, coarse, self.factor)


def masking(ratio: float, mask: str | Strategy, mask_patch_size: int | None, unit: tuple[int, int]) -> Masking:
    """The masks that a method's settings ask for: `mask` is a name of MASKS or a strategy, `mask_patch_size` the pixels of
    a side of what is hidden as one, a whole number of units; one unit where None.

    Raises:
        ValueError: no such mask; no whole number of units.
    """
    if isinstance(mask, str) and mask not in MASKS:
        raise ValueError(f"mask is '{mask}'; it must be one of {', '.join(MASKS)}")
    side = mask_patch_size or unit[0]
    if side % unit[0] or (mask_patch_size and unit[0] != unit[1]):
        sides = " x ".join(map(str, unit))
        raise ValueError(f"mask_patch_size is {side} px; it must be a multiple of square units, which are {sides} px")
    return Masking(ratio, MASKS[mask] if isinstance(mask, str) else mask, unit, side // unit[0])


def hidden_count(patches: int, ratio: float) -> int:
    """How many of `patches` a ratio hides, rounded up as in MAE and SimMIM: at least one hidden and one visible.

    Raises:
        ValueError: the ratio is not between 0 and 1, or there are fewer than two patches.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"mask_ratio is {ratio}; it must lie between 0 and 1")
    if patches < 2:
        raise ValueError(f"the grid has {patches} patch; masking needs at least 2: a smaller patch size")
    return min(max(math.ceil(patches * ratio - 1e-9), 1), patches - 1)


def hidden_map(mask: Mask, grid: tuple[int, int], cell: tuple[int, int]) -> Float[Tensor, "b 1 height width"]:
    """1 where a pixel is hidden, 0 where it is visible; `cell` is the size of one grid place in pixels."""
    b = mask.hidden.shape[0]
    flat = torch.zeros(b, grid[0] * grid[1], device=mask.hidden.device)
    flat = flat.scatter(1, mask.hidden, 1.0).reshape(b, 1, grid[0], 1, grid[1], 1)
    return flat.expand(-1, -1, -1, cell[0], -1, cell[1]).reshape(b, 1, grid[0] * cell[0], grid[1] * cell[1])


def refine(mask: Mask, grid: tuple[int, int], factor: int) -> Mask:
    """The same mask on a grid that is `factor` times as fine: each place becomes factor x factor of them.

    Both lists are in the order of the coarse places, then row by row inside each.
    """
    steps = torch.arange(factor, device=mask.hidden.device)
    inside = (steps.view(-1, 1) * (grid[1] * factor) + steps).flatten()

    def finer(index: Int[Tensor, "b k"]) -> Int[Tensor, "b m"]:
        first = index // grid[1] * (grid[1] * factor * factor) + index % grid[1] * factor
        return (first.unsqueeze(-1) + inside).flatten(1)

    return Mask(finer(mask.visible), finer(mask.hidden))
