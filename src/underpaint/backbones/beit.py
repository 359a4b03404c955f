"""timm's BEiT: a transformer whose attention has relative position biases. It always runs on all patches."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.models.beit import Beit as TimmBeit
from torch import Tensor
from torch.nn import functional

from underpaint.backbones.protocols import Encoded, PatchBackbone
from underpaint.patches import patchify


class Beit(PatchBackbone):
    """An adapter around timm's Beit, which stays timm's: `model`. Its biases are tables over the whole grid, so it does
    not run on part of its patches."""

    def __init__(self, model: TimmBeit):
        super().__init__()
        if not isinstance(model.norm, torch.nn.LayerNorm):
            raise ValueError("this BEiT lacks a final norm; give use_fc_norm=False")
        self.model: Any = model
        self.dim = model.embed_dim
        self.depth = len(model.blocks)
        self.patch_size: tuple[int, int] = self.model.patch_embed.patch_size
        self.image_size: tuple[int, int] = self.model.patch_embed.img_size
        self.stride = self.patch_size[0]
        self.channels: int = self.model.patch_embed.proj.in_channels

    def embed(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n d"]:
        self.check_size(images)
        embedding = self.model.patch_embed
        tokens = functional.linear(
            patchify(images, self.patch_size), embedding.proj.weight.flatten(1), embedding.proj.bias
        )
        return embedding.norm(tokens)

    def encode(self, tokens: Float[Tensor, "b n d"], *, taps: Sequence[int] = ()) -> Encoded:
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
