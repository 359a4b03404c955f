"""Images to corrupted images: plain functions on standardised images, in which 0 is the data's mean.

None of them changes an image's size, none draws anything by itself, and none looks at another image of the batch.
"""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from underpaint.masking import Mask, hidden_map
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
