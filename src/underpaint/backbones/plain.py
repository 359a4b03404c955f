"""What the adapters of plain transformers share: one grid of patches, blocks that any subset of it can run through."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from underpaint.backbones.protocols import Encoded, Layer, TokenBackbone, Walk
from underpaint.blocks import recomputing, replaced, sincos_positions
from underpaint.draws import Draws
from underpaint.masking import Mask, Masking, refine
from underpaint.patches import patchify, take


class Blocks(Walk):
    """A walk through blocks, which all have the grid of patches."""

    def __init__(self, masking: Masking, taps: Sequence[int], layer: Layer):
        super().__init__()
        self.masking, self.taps, self.layers = masking, list(taps), [layer] * len(taps)

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None, alone: bool = False) -> Mask:
        return self.masking(batch, height, width, draws)

    def mask(self, noise: Mask, number: int) -> Mask:
        return noise


def placed(
    tokens: Float[Tensor, "b k d"], positions: Float[Tensor, "#b n d"], index: Int[Tensor, "b k"] | None
) -> Float[Tensor, "b k d"]:
    """The tokens of the patches `index` (of all where None), with the positions of those added."""
    return tokens + (positions if index is None else take(positions.expand(tokens.shape[0], -1, -1), index))


class Plain(TokenBackbone):
    """An adapter around a plain transformer of timm, which stays timm's: `model`.

    An adapter of its own says what its blocks need beside the tokens (`places`, `run`), and what is put in front of the
    patches (`begin`). Learned positions start from the fixed sin-cos ones of `blocks.sincos_positions` and are trained on.

    Args:
        image_size: height and width in pixels, for a model that does not say for which images it was made.

    Raises:
        ValueError: no final norm, or an image that is no whole number of patches.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int] | None = None):
        super().__init__()
        self.model: Any = model
        if isinstance(getattr(model, "norm", None) or nn.Identity(), nn.Identity):
            raise ValueError("this transformer lacks a final norm behind its blocks")
        self.dim: int = self.model.embed_dim
        self.depth = len(self.model.blocks)
        self.channels = int(self.kernel.shape[1])
        self.patch_size: tuple[int, int] = tuple(self.embedding.patch_size)
        own: Any = getattr(self.embedding, "img_size", image_size)
        self.image_size: tuple[int, int] = (own[0], own[1])
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            size, patch = ("x".join(map(str, pair)) for pair in (self.image_size, self.patch_size))
            raise ValueError(f"an image of {size} px is no whole number of patches of {patch} px")
        self.stride, self.token_dim, self.hierarchical = self.patch_size[0], self.dim, False
        self.initialise_positions()

    @property
    def embedding(self) -> Any:
        """timm's module that makes tokens of patches; not an attribute, which would put it into the state twice."""
        return self.model.patch_embed

    @property
    def kernel(self) -> Float[Tensor, "d c height width"]:
        """What a patch is multiplied by."""
        return self.embedding.proj.weight

    @property
    def unit(self) -> tuple[int, int]:
        return self.patch_size

    @property
    def prefix(self) -> int:
        """Class and register tokens, in front of the patches."""
        return self.model.num_prefix_tokens

    @torch.no_grad()
    def initialise_positions(self) -> None:
        """Learned positions of the patches to sin-cos; those of class and register tokens to 0."""
        learned: Any = self.model.pos_embed
        if learned is not None:
            positions = sincos_positions(self.grid(*self.image_size), self.dim)
            learned.zero_()
            learned[0, -len(positions) :] = positions

    # --- all patches, or some -----------------------------------------------------------------------------------------

    def embed(
        self, images: Float[Tensor, "b c height width"], index: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        self.check_size(images)
        patches = patchify(images, self.patch_size)
        if index is not None:
            patches = take(patches, index)  # hidden patches are never embedded
        return self.embedding.norm(functional.linear(patches, self.kernel.flatten(1), self.embedding.proj.bias))

    def encode(
        self,
        tokens: Float[Tensor, "b k d"],
        index: Int[Tensor, "b k"] | None = None,
        taps: Sequence[int] = (),
        positions: Float[Tensor, "b n d"] | None = None,
    ) -> Encoded:
        tokens, places, tapped = self.begin(tokens, index, positions), self.places(index), []
        for number in range(self.depth):
            tokens = recomputing(self, self.run, number, tokens, places)
            if number in taps:
                tapped.append(self.patches(tokens))
        return self.finish(tokens)._replace(taps=tapped)

    def covered(
        self, images: Float[Tensor, "b c height width"], mask: Mask, unit: tuple[int, int], token: Float[Tensor, "e"]
    ) -> Float[Tensor, "b n d"]:
        grid, factor = (images.shape[-2] // unit[0], images.shape[-1] // unit[1]), unit[0] // self.patch_size[0]
        hidden = mask.hidden if factor == 1 else refine(mask, grid, factor).hidden
        return self.encode(replaced(self.embed(images), hidden, token)).tokens

    def walk(self, masking: Masking, taps: Sequence[int], images_per_mask: int = 1, seed: int = 0) -> Blocks:
        return Blocks(masking, taps, Layer(self.grid(*self.image_size), self.stride, self.dim))

    def advance(
        self, walk: Blocks, number: int, state: Any, images: Float[Tensor, "b c height width"], noise: Mask
    ) -> tuple[Tensor, Tensor]:
        if state is None:
            state = self.begin(self.embed(images, noise.visible), noise.visible)
        places = self.places(noise.visible)
        for block in range(walk.taps[number - 1] + 1 if number else 0, walk.taps[number] + 1):
            state = recomputing(self, self.run, block, state, places)
        last = number + 1 == len(walk.taps)
        return state, self.finish(state).tokens if last else self.patches(state)

    # --- what an adapter has of its own -------------------------------------------------------------------------------

    def begin(
        self,
        tokens: Float[Tensor, "b k d"],
        index: Int[Tensor, "b k"] | None = None,
        positions: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """What goes into the first block: positions added, class and register tokens in front."""
        model, prefix = self.model, self.prefix
        embedded_prefix = 0 if getattr(model, "no_embed_class", False) else prefix
        added: Any = positions
        if added is None and model.pos_embed is not None:
            added = model.pos_embed[:, embedded_prefix:]
        if added is not None:
            tokens = placed(tokens, added, index)
        if prefix:
            names = ("cls_token", "dist_token", "reg_token")
            first = torch.cat([t for name in names if (t := getattr(model, name, None)) is not None], dim=1)
            if embedded_prefix and model.pos_embed is not None:
                first = first + model.pos_embed[:, :prefix]
            tokens = torch.cat([first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return getattr(model, "norm_pre", nn.Identity())(model.pos_drop(tokens))

    def places(self, index: Int[Tensor, "b k"] | None) -> Any:
        """What the blocks have to know of where the tokens are, beside what was added to them."""
        return None

    def run(self, number: int, tokens: Float[Tensor, "b t d"], places: Any) -> Float[Tensor, "b t d"]:
        """Through one block."""
        return self.model.blocks[number](tokens)

    def patches(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b k d"]:
        """Without class and register tokens."""
        return tokens[:, self.prefix :]

    def finish(self, tokens: Float[Tensor, "b t d"]) -> Encoded:
        """Through the final norm."""
        tokens = self.model.norm(tokens)
        return Encoded(tokens[:, self.prefix :], [], tokens[:, : self.prefix])

    def positions(self) -> Float[Tensor, "n d"] | None:
        learned: Any = self.model.pos_embed
        rows, columns = self.grid(*self.image_size)
        return None if learned is None else learned[0, -rows * columns :]

    def fix_positions(self) -> None:
        self.model.pos_embed.requires_grad_(False)

    @property
    def class_token(self) -> bool:
        return self.model.cls_token is not None
