"""timm's BEiT: a transformer whose attention has relative position biases. It always runs on all patches."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models.beit import Beit as TimmBeit
from torch import Tensor
from torch.nn import functional

from underpaint.backbones.protocols import Encoded, Features, TokenBackbone
from underpaint.patches import patchify


class Beit(TokenBackbone):
    """An adapter around timm's Beit, which stays timm's: `model`. Its biases are tables over the whole grid, so a
    subset of the patches is refused."""

    def __init__(self, model: TimmBeit):
        super().__init__()
        if not isinstance(model.norm, torch.nn.LayerNorm):
            raise ValueError("this BEiT lacks a final norm; give use_fc_norm=False")
        self.model: Any = model
        self.dim = model.embed_dim
        self.depth = len(model.blocks)
        self.patch_size: tuple[int, int] = self.model.patch_embed.patch_size
        self.image_size: tuple[int, int] = self.model.patch_embed.img_size
        self.channels: int = self.model.patch_embed.proj.in_channels

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_size[0], width // self.patch_size[1]

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        """Patch tokens after the final norm, and their mean (the class token is not part of it)."""
        patches = self.encode(self.embed(images)).tokens
        return Features(patches.mean(1), patches)

    def pyramid(self, images: Float[Tensor, "b c height width"]) -> list[tuple[Tensor, int]]:
        """The outputs of four blocks spread over the depth, all at the patch's stride."""
        taps = sorted({max(0, (self.depth * quarter) // 4 - 1) for quarter in (1, 2, 3, 4)})
        maps = self.encode(self.embed(images), taps=taps).taps
        grid = self.grid(*images.shape[-2:])
        return [(m.transpose(1, 2).unflatten(2, grid), self.patch_size[0]) for m in maps]

    def embed(
        self, images: Float[Tensor, "b c height width"], index: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        if index is not None:
            raise TypeError("timm's BEiT cannot run on part of its patches; take a plain ViT (vit_...) for this method")
        embedding = self.model.patch_embed
        tokens = functional.linear(
            patchify(images, self.patch_size), embedding.proj.weight.flatten(1), embedding.proj.bias
        )
        return embedding.norm(tokens)

    def encode(
        self,
        tokens: Float[Tensor, "b k d"],
        index: Int[Tensor, "b k"] | None = None,
        taps: Sequence[int] = (),
        positions: Float[Tensor, "b n d"] | None = None,
    ) -> Encoded:
        if index is not None or positions is not None:
            raise TypeError("timm's BEiT cannot run on part of its patches; take a plain ViT (vit_...) for this method")
        model = self.model
        tokens = torch.cat([model.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        if model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        tokens = model.pos_drop(tokens)
        bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        tapped = []
        for number, block in enumerate(model.blocks):
            tokens = block(tokens, shared_rel_pos_bias=bias)
            if number in taps:
                tapped.append(tokens[:, 1:])
        tokens = model.norm(tokens)
        return Encoded(tokens[:, 1:], tapped, tokens[:, :1])

    def positions(self) -> Float[Tensor, "n d"]:
        if self.model.pos_embed is None:
            raise TypeError("this BEiT has relative positions only")
        return self.model.pos_embed[0, 1:]
