"""What a method may ask of an encoder, in two strengths."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn


class Features(NamedTuple):
    """What an encoder makes of a batch: one vector an image, and one a place of its grid (row by row)."""

    pooled: Float[Tensor, "b d"]
    patches: Float[Tensor, "b n d"]


class Encoded(NamedTuple):
    """Patch tokens after the final norm, the raw outputs of the blocks that were asked for, and class and register
    tokens after the final norm."""

    tokens: Float[Tensor, "b k d"]
    taps: list[Tensor]
    special: Float[Tensor, "b s d"]


class Backbone(nn.Module):
    """Enough for the energy method, CIM and every evaluation: ViT, Swin, ResNet, ConvNeXt, any timm model."""

    model: Any  # timm's own module, so that weights load back by name
    dim: int
    channels: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the final feature map for an image of this size in pixels."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        raise NotImplementedError

    def pyramid(self, images: Float[Tensor, "b c height width"]) -> list[tuple[Tensor, int]]:
        """Feature maps [b, d, rows, columns] with their strides in pixels, fine to coarse."""
        raise NotImplementedError


class TokenBackbone(Backbone):
    """An encoder that can run on a subset of its patches: MAE, SimMIM, BEiT, CAE, LocalMIM.

    Patches are numbered 0..n-1 row by row; class and register tokens are the adapter's private business.
    """

    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    depth: int

    def embed(
        self, images: Float[Tensor, "b c height width"], index: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        """Tokens of the patches `index` (all where None), positions not yet added."""
        raise NotImplementedError

    def encode(
        self,
        tokens: Float[Tensor, "b k d"],
        index: Int[Tensor, "b k"] | None = None,
        taps: Sequence[int] = (),
        positions: Float[Tensor, "b n d"] | None = None,
    ) -> Encoded:
        """Add the positions of `index` (of all patches; the encoder's own or those given), run the blocks on those tokens alone."""
        raise NotImplementedError

    def positions(self) -> Float[Tensor, "n d"]:
        """The position embedding of each patch."""
        raise NotImplementedError
