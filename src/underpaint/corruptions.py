"""Images to corrupted images: plain functions on standardised images."""

from jaxtyping import Float
from torch import Tensor

from underpaint.masking import Mask, hidden_map


def mask_cells(
    images: Float[Tensor, "b c height width"], mask: Mask, cell: tuple[int, int]
) -> Float[Tensor, "b c height width"]:
    """Hidden cells become 0, the mean of the data in standardised space; `cell` is (height, width) in pixels."""
    grid = (images.shape[-2] // cell[0], images.shape[-1] // cell[1])
    return images * (1 - hidden_map(mask, grid, cell))
