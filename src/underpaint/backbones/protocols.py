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


class PatchBackbone(Backbone):
    """A plain transformer over patches, numbered 0..n-1 row by row: BEiT, and the generator of CIM.

    Class and register tokens are the adapter's private business.
    """

    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    depth: int

    def embed(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        """Tokens of the patches, positions not yet added."""
        raise NotImplementedError

    def encode(self, tokens: Float[Tensor, "b n d"], *, taps: Sequence[int] = ()) -> Encoded:
        """Add positions and run the blocks."""
        raise NotImplementedError

    def check_size(self, images: Tensor) -> None:
        if tuple(images.shape[-2:]) != self.image_size:
            got, want = "x".join(map(str, images.shape[-2:])), "x".join(map(str, self.image_size))
            raise ValueError(f"images are {got} pixels; this encoder was built for {want}")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size[0], width // self.patch_size[1]

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        """Patch tokens after the final norm, and their mean (the class token is not part of it)."""
        patches = self.encode(self.embed(images)).tokens
        return Features(patches.mean(1), patches)

    def pyramid(self, images: Float[Tensor, "b c height width"]) -> list[tuple[Tensor, int]]:
        """The outputs of four blocks spread over the depth, all at the patch's stride (there is no other)."""
        taps = sorted({max(0, (self.depth * quarter) // 4 - 1) for quarter in (1, 2, 3, 4)})
        maps = self.encode(self.embed(images), taps=taps).taps
        rows, columns = self.grid(*images.shape[-2:])
        return [(m.transpose(1, 2).unflatten(2, (rows, columns)), self.patch_size[0]) for m in maps]


class TokenBackbone(PatchBackbone):
    """An encoder that can run on a subset of its patches: MAE, CAE, LocalMIM."""

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
