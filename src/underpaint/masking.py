"""Which patches are hidden: exact counts, static shapes, no boolean indexing.

Every kind of mask writes one score a patch; the highest scores are hidden. Scores are drawn on the CPU from a
generator that the training loop seeds with (seed, step) for the whole global batch, so one process or many see the
same masks, and a resumed run needs no saved random state.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Mask(NamedTuple):
    """Patch numbers 0..n-1 of each image: those an encoder may see, and those it may not."""

    visible: Int[Tensor, "b v"]
    hidden: Int[Tensor, "b h"]

    def to(self, device: torch.device) -> "Mask":
        return Mask(self.visible.to(device, non_blocking=True), self.hidden.to(device, non_blocking=True))

    def rows(self, rows: slice) -> "Mask":
        """The masks of some images of the batch."""
        return Mask(self.visible[rows], self.hidden[rows])

    def repeat(self, batch: int) -> "Mask":
        """The mask of one image for each of a batch."""
        return Mask(self.visible.expand(batch, -1), self.hidden.expand(batch, -1))


def hide_highest(score: Float[Tensor, "b n"], count: int) -> Mask:
    """Hide the `count` patches of highest score in each image; both index lists are in ascending order."""
    order = score.argsort(dim=1, stable=True)
    kept = score.shape[1] - count
    return Mask(order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values)


def random_mask(batch: int, patches: int, hidden: int, generator: torch.Generator | None = None) -> Mask:
    """Hide `hidden` of `patches` patches, all choices equally likely (MAE, 2111.06377, section 3)."""
    return hide_highest(torch.rand(batch, patches, generator=generator), hidden)


def hidden_count(patches: int, ratio: float) -> int:
    """How many of `patches` a ratio hides: at least one hidden and one visible.

    Raises:
        ValueError: the ratio is not between 0 and 1, or there are fewer than two patches.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"hidden_ratio is {ratio}; it must lie between 0 and 1")
    if patches < 2:
        raise ValueError(f"the grid has {patches} patch; masking needs at least 2: a smaller patch size")
    return min(max(round(patches * ratio), 1), patches - 1)


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
