"""timm's plain vision transformers as token backbones."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from underpaint.backbones.protocols import Encoded, Layer, StagedBackbone, TokenBackbone, Walk
from underpaint.blocks import sincos_positions
from underpaint.masking import Mask, Masking
from underpaint.patches import patchify, take


class Blocks(Walk):
    """A walk through blocks, which all have the grid of patches."""

    def __init__(self, masking: Masking, taps: Sequence[int], layer: Layer):
        super().__init__()
        self.masking, self.taps, self.layers = masking, list(taps), [layer] * len(taps)

    def sample(
        self, batch: int, height: int, width: int, generator: torch.Generator | None = None, alone: bool = False
    ) -> Mask:
        return self.masking(batch, height, width, generator)

    def mask(self, noise: Mask, number: int) -> Mask:
        return noise


class ViT(TokenBackbone, StagedBackbone):
    """An adapter around timm's VisionTransformer (any name and size), which stays timm's: `model`.

    Learned positions start from the fixed sin-cos ones of `blocks.sincos_positions` and are trained on.
    """

    def __init__(self, model: VisionTransformer):
        super().__init__()
        if not isinstance(model.norm, nn.LayerNorm) or model.pos_embed is None:
            raise ValueError("this vision transformer lacks a final norm or learned positions")
        self.model: Any = model
        self.dim = model.embed_dim
        self.depth = len(model.blocks)
        self.channels = model.in_chans
        self.patch_size: tuple[int, int] = self.model.patch_embed.patch_size
        self.image_size: tuple[int, int] = self.model.patch_embed.img_size
        self.stride, self.embed_dim, self.hierarchical = self.patch_size[0], self.dim, False
        self.initialise_positions()

    @torch.no_grad()
    def initialise_positions(self) -> None:
        """Positions of the patches to sin-cos; those of class and register tokens to 0."""
        positions = sincos_positions(self.grid(*self.image_size), self.dim)
        self.model.pos_embed.zero_()
        self.model.pos_embed[0, -len(positions) :] = positions

    def embed(
        self, images: Float[Tensor, "b c height width"], index: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        self.check_size(images)
        embedding = self.model.patch_embed
        patches = patchify(images, self.patch_size)
        if index is not None:
            patches = take(patches, index)  # hidden patches are never embedded
        tokens = functional.linear(patches, embedding.proj.weight.flatten(1), embedding.proj.bias)
        return embedding.norm(tokens)

    def encode(
        self,
        tokens: Float[Tensor, "b k d"],
        index: Int[Tensor, "b k"] | None = None,
        taps: Sequence[int] = (),
        positions: Float[Tensor, "b n d"] | None = None,
    ) -> Encoded:
        tokens, tapped = self.begin(tokens, index, positions), []
        for number, block in enumerate(self.model.blocks):
            tokens = block(tokens)
            if number in taps:
                tapped.append(self.patches(tokens))
        return self.finish(tokens)._replace(taps=tapped)

    def walk(self, masking: Masking, taps: Sequence[int], images_per_mask: int, seed: int) -> Blocks:
        return Blocks(masking, taps, Layer(self.grid(*self.image_size), self.stride, self.dim))

    def advance(
        self, walk: Blocks, number: int, state: Any, images: Float[Tensor, "b c height width"], noise: Mask
    ) -> tuple[Tensor, Tensor]:
        if state is None:
            state = self.begin(self.embed(images, noise.visible), noise.visible)
        for block in self.model.blocks[walk.taps[number - 1] + 1 if number else 0 : walk.taps[number] + 1]:
            state = block(state)
        last = number + 1 == len(walk.taps)
        return state, self.finish(state).tokens if last else self.patches(state)

    def begin(
        self,
        tokens: Float[Tensor, "b k d"],
        index: Int[Tensor, "b k"] | None = None,
        positions: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """What goes into the first block: positions added, class and register tokens in front."""
        model, prefix = self.model, self.model.num_prefix_tokens
        embedded_prefix = 0 if model.no_embed_class else prefix
        places = model.pos_embed[:, embedded_prefix:] if positions is None else positions
        tokens = tokens + (places if index is None else take(places.expand(len(tokens), -1, -1), index))
        if prefix:
            special = [t for t in (model.cls_token, model.reg_token) if t is not None]
            first = torch.cat(special, dim=1)
            if embedded_prefix:
                first = first + model.pos_embed[:, :prefix]
            tokens = torch.cat([first.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        return model.norm_pre(model.pos_drop(tokens))

    def patches(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b k d"]:
        """Without class and register tokens."""
        return tokens[:, self.model.num_prefix_tokens :]

    def finish(self, tokens: Float[Tensor, "b t d"]) -> Encoded:
        """Through the final norm."""
        tokens, prefix = self.model.norm(tokens), self.model.num_prefix_tokens
        return Encoded(tokens[:, prefix:], [], tokens[:, :prefix])

    def positions(self) -> Float[Tensor, "n d"]:
        return self.model.pos_embed[0, -self.model.patch_embed.num_patches :]

    def fix_positions(self) -> None:
        self.model.pos_embed.requires_grad_(False)

    @property
    def class_token(self) -> bool:
        return self.model.cls_token is not None
