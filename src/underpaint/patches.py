"""Images as sequences of patches, and moving single patches in and out of a sequence.

A patch is flattened as (channel, row, column), the order of a convolution's weight, so a patch embedding is one
matrix product with timm's own parameters.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn


def patchify(images: Float[Tensor, "b c height width"], size: tuple[int, int]) -> Float[Tensor, "b n d"]:
    """Cut images into patches of `size` (height, width) pixels, row by row; d = c * size[0] * size[1]."""
    b, c, height, width = images.shape
    p, q = size
    cells = images.reshape(b, c, height // p, p, width // q, q)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // p) * (width // q), c * p * q)


def unpatchify(
    patches: Float[Tensor, "b n d"], size: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "b c height width"]:
    """The inverse of `patchify`: `grid` counts the patches (rows, columns)."""
    (p, q), (rows, columns) = size, grid
    b, _, d = patches.shape
    cells = patches.reshape(b, rows, columns, d // (p * q), p, q)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(b, d // (p * q), rows * p, columns * q)


def take(tokens: Shaped[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Shaped[Tensor, "b k d"]:
    """The tokens at `index`, image by image."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def put(
    tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b k"], values: Float[Tensor, "b k d"]
) -> Float[Tensor, "b n d"]:
    """A copy of `tokens` with `values` at `index`: the inverse of `take`."""
    return tokens.scatter(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), values.to(tokens.dtype))


def standardize(patches: Float[Tensor, "b n d"], epsilon: float = 1e-6) -> Float[Tensor, "b n d"]:
    """Each patch to mean 0 and variance 1 (unbiased, as in MAE) over its pixels and channels together."""
    centred = patches - patches.mean(-1, keepdim=True)
    # torch's own var is several times slower than this
    variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return centred * (variance + epsilon).rsqrt()


def unstandardize(patches: Float[Tensor, "b n d"], like: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Standardised patches with the mean and the contrast of others: for pictures."""
    return patches * like.std(-1, keepdim=True) + like.mean(-1, keepdim=True)


def weighted_mean(values: Float[Tensor, "*shape"], weights: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """sum(weights * values) / sum(weights), 0 where every weight is 0."""
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(values.dtype).tiny)


class Standardize(nn.Module):
    """Images in [0, 1] to mean 0 and deviation 1 per channel, and `inverse` back. Not trained."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return (images - self.mean) / self.std

    def inverse(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        return images * self.std + self.mean
