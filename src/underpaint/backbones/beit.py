"""timm's BEiT: a transformer whose attention has relative position biases (Bao et al. 2106.08254)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models.beit import Beit as TimmBeit
from torch import Tensor
from torch.nn import functional

from underpaint.backbones.plain import Plain


class Beit(Plain):
    """An adapter around timm's Beit. Two tokens have the bias of the places that they are from, whichever others are
    there; each block has a table of its own, or all have one."""

    def __init__(self, model: TimmBeit, image_size: tuple[int, int] | None = None):
        super().__init__(model, image_size)

    def places(self, index: Int[Tensor, "b k"] | None) -> Any:
        """The tokens that are there, of the class token (0) and all patches, and the bias that all blocks share."""
        model = self.model
        there = None if index is None else functional.pad(index + 1, (1, 0))
        shared = None if model.rel_pos_bias is None else _between(model.rel_pos_bias().unsqueeze(0), there)
        return there, shared

    def run(self, number: int, tokens: Float[Tensor, "b t d"], places: Any) -> Float[Tensor, "b t d"]:
        block, (there, shared) = self.model.blocks[number], places
        attention = block.attn
        if there is None or attention.relative_position_bias_table is None:
            return block(tokens, shared_rel_pos_bias=shared)
        bias = _between(attention._get_rel_pos_bias(), there)
        attended = _attend(attention, block.norm1(tokens), bias if shared is None else bias + shared)
        if block.gamma_1 is None:
            tokens = tokens + block.drop_path1(attended)
            return tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
        tokens = tokens + block.drop_path1(block.gamma_1 * attended)
        return tokens + block.drop_path2(block.gamma_2 * block.mlp(block.norm2(tokens)))

    def positions(self) -> Float[Tensor, "n d"] | None:
        """None where there are relative biases too: an embedding alone does not say then where a patch is."""
        relative = (
            self.model.rel_pos_bias is not None or self.model.blocks[0].attn.relative_position_bias_table is not None
        )
        return None if relative else super().positions()


def _between(bias: Float[Tensor, "1 heads t t"], there: Int[Tensor, "b k"] | None) -> Float[Tensor, "b heads k k"]:
    """The biases between some tokens of each image."""
    if there is None:
        return bias
    table = bias[0].permute(1, 2, 0)  # indexed by queries and keys
    return table[there.unsqueeze(2), there.unsqueeze(1)].permute(0, 3, 1, 2)


def _attend(attention: Any, tokens: Float[Tensor, "b t d"], bias: Float[Tensor, "b heads t t"]) -> Tensor:
    """timm's attention with biases that differ from image to image."""
    joint = attention.qkv(tokens)
    if attention.q_bias is not None:
        joint = joint + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    q, k, v = joint.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout)
    return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))
