"""What a method may ask of an encoder, in three strengths."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from underpaint.computing import full
from underpaint.draws import Draws
from underpaint.errors import InputError
from underpaint.masking import Mask, Masking
from underpaint.transforms import Picture, Transform


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
    stride: int  # pixels of a side of a position of the final feature map
    pooling = "mean of the last map"  # what the vector of an image is, in `encoder.json`
    recomputes = False  # see `recompute_blocks`
    takes: Transform | None = None  # what it asks of images; known of encoders that were loaded

    @property
    def final_norm(self) -> nn.Module | None:
        """What the features come out of, where it has a name of its own."""
        return getattr(self.model, "norm", None)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the final feature map for an image of this size in pixels."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        raise NotImplementedError

    def pyramid(self, images: Float[Tensor, "b c height width"]) -> list[tuple[Tensor, int]]:
        """Feature maps [b, d, rows, columns] with their strides in pixels, fine to coarse."""
        raise NotImplementedError

    def transform(self, images: Picture | Sequence[Picture]) -> Float[Tensor, "b c height width"]:
        """Files, PIL images or arrays ([h, w] or [h, w, c], in the units of the files that it was trained on) to what this
        encoder takes, as `evaluate` and `embed` read theirs: the centre, standardised, on the device of the weights.

        Raises:
            InputError: an image that cannot be read or is of another kind; an encoder that was not loaded.
        """
        if self.takes is None:
            raise InputError(
                "this encoder does not say what it asks of images: underpaint.load_encoder(RUN) does, with "
                "image_size=(height, width) where RUN was written before underpaint said it"
            )
        weight = next(self.parameters())
        return self.takes(images).to(weight.device, weight.dtype)

    def recompute_blocks(self) -> None:
        """From here on, keep what is between blocks alone, and compute their inside again on the way back.

        Raises:
            ValueError: this network cannot.
        """
        self.recomputes = True


class Layer(NamedTuple):
    """An intermediate layer: rows and columns of its tokens, pixels of a side of each, their width."""

    grid: tuple[int, int]
    stride: int
    dim: int


class Walk(nn.Module):
    """A way through an encoder that stops at some of its layers, on what is visible alone.

    Holds what depends on masks and not on weights. The last layer is the encoder's output, after its final norm.
    """

    layers: list[Layer]
    by_layer = True  # whether a layer is computed from the one before it, and not all at once

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None, alone: bool = False) -> Any:
        """Masks for a batch, on the CPU; each image has its own where `alone`."""
        raise NotImplementedError

    def mask(self, noise: Any, number: int) -> Mask:
        """What is visible and what hidden among the tokens of layer `number`."""
        raise NotImplementedError


class StagedBackbone(Backbone):
    """An encoder from which part of an image can be hidden, and that can be left at intermediate layers: MAE, SimMIM,
    BEiT, LocalMIM. What is hidden are positions of its final grid."""

    image_size: tuple[int, int]  # pixels: of the images that it is trained on
    token_dim: int  # width of what a learned token takes the place of
    hierarchical: bool  # whether its layers have grids of several sizes
    depth: int

    @property
    def unit(self) -> tuple[int, int]:
        """Height and width in pixels of a position of the final grid."""
        return self.stride, self.stride

    def covered(
        self, images: Float[Tensor, "b c height width"], mask: Mask, unit: tuple[int, int], token: Float[Tensor, "e"]
    ) -> Float[Tensor, "b n d"]:
        """The tokens of the final grid, after the final norm, of images whose hidden places (`unit` pixels high and
        wide) were replaced by one learned token."""
        raise NotImplementedError

    def walk(self, masking: Masking, taps: Sequence[int] = (), images_per_mask: int = 1, seed: int = 0) -> Walk:
        """A walk that stops behind the blocks `taps`, or of a hierarchical encoder behind each of its stages.

        `images_per_mask` consecutive images share a mask where that is faster; `seed` is that of masks drawn before.

        Raises:
            ValueError: the image is no whole number of positions of the final grid.
        """
        raise NotImplementedError

    def advance(
        self, walk: Any, number: int, state: Any, images: Float[Tensor, "b c height width"], noise: Any
    ) -> tuple[Any, Tensor]:
        """The state at layer `number` from that at the layer before (None before the first), and the tokens there, of
        the last layer normed."""
        raise NotImplementedError


class TokenBackbone(StagedBackbone):
    """A plain transformer over patches, numbered 0..n-1 row by row, that can run on a subset of them: CAE, and with words
    of one patch BEiT.

    Class and register tokens are the adapter's private business.
    """

    patch_size: tuple[int, int]
    pooling = "mean of the normed patch tokens"

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

    def positions(self) -> Float[Tensor, "n d"] | None:
        """The position embedding of each patch; None where that is not all that says where a patch is (positions are
        turned, or relative)."""
        raise NotImplementedError

    def fix_positions(self) -> None:
        """Position embeddings are trained no more."""
        raise NotImplementedError

    @property
    def class_token(self) -> bool:
        """Whether the first of the special tokens is a class token."""
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
        return Features(full(patches).mean(1), patches)

    def pyramid(self, images: Float[Tensor, "b c height width"]) -> list[tuple[Tensor, int]]:
        """The outputs of four blocks spread over the depth, all at the patch's stride (there is no other)."""
        taps = sorted({max(0, (self.depth * quarter) // 4 - 1) for quarter in (1, 2, 3, 4)})
        maps = self.encode(self.embed(images), taps=taps).taps
        rows, columns = self.grid(*images.shape[-2:])
        return [(m.transpose(1, 2).unflatten(2, (rows, columns)), self.patch_size[0]) for m in maps]
