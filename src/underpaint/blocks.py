"""The trainable pieces that methods share."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from underpaint.masking import Mask
from underpaint.patches import take

T = TypeVar("T")


def recomputing(owner: Any, function: Callable[..., T], *given: Any) -> T:
    """`function(*given)`; where `owner.recomputes`, what the way back needs of its inside is computed again there, in place of
    being kept (Chen et al., arXiv 1604.06174)."""
    if owner.recomputes and torch.is_grad_enabled():
        made: Any = checkpoint(function, *given, use_reentrant=False)
        return made
    return function(*given)


def sincos_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "n d"]:
    """Fixed position embeddings of a grid (rows, columns): the first half of the width codes the row, the second the
    column, each by sines and then cosines.

    Frequencies fall geometrically from 1 towards 1/10000 (Vaswani et al. 2017). The order is CAE's; MAE and LocalMIM
    code the column first. Where `dim` is not a multiple of 4 the rest stays 0.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / max(quarter, 1))
    rows = torch.arange(grid[0], dtype=torch.float64).outer(frequencies)
    columns = torch.arange(grid[1], dtype=torch.float64).outer(frequencies)
    row_part = torch.cat([rows.sin(), rows.cos()], dim=1).repeat_interleave(grid[1], dim=0)
    column_part = torch.cat([columns.sin(), columns.cos()], dim=1).repeat(grid[0], 1)
    positions = torch.zeros(grid[0] * grid[1], dim)
    positions[:, : 4 * quarter] = torch.cat([row_part, column_part], dim=1).float()
    return positions


class MaskedDecoder(nn.Module):
    """Predict something at every hidden place from the tokens of the visible ones.

    Visible tokens, narrowed to `dim`, and one learned mask token for each hidden place get fixed positions and go
    through `depth` transformer blocks together. Attention does not mind the order, so nothing is sorted back into
    the grid, and the norm and the head run on hidden places only. Without `outputs` there is no head. Hidden places
    may have contents of their own, which are added to the mask token.
    """

    positions: Tensor
    recomputes = False

    def __init__(self, encoder_dim: int, grid: tuple[int, int], dim: int, depth: int, outputs: int | None):
        super().__init__()
        heads = max(1, dim // 32)  # 32 wide, as in MAE's 512 with 16 heads
        if dim % heads:
            raise ValueError(f"decoder_dim is {dim}; it must be below 32 or a multiple of 32")
        self.narrow = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("positions", sincos_positions(grid, dim), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.head = nn.Identity() if outputs is None else nn.Linear(dim, outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(xavier)

    def forward(
        self, latent: Float[Tensor, "b v e"], mask: Mask, contents: Float[Tensor, "b h d"] | None = None
    ) -> Float[Tensor, "b h outputs"]:
        return self.head(self.norm(self.tokens(latent, mask, contents)[:, latent.shape[1] :]))

    def tokens(
        self, latent: Float[Tensor, "b v e"], mask: Mask, contents: Float[Tensor, "b h d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """After the blocks and before the norm: first the visible places, then the hidden ones."""
        positions = self.positions.expand(len(latent), -1, -1)
        visible = self.narrow(latent) + take(positions, mask.visible)
        hidden = self.mask_token + take(positions, mask.hidden)
        if contents is not None:
            hidden = hidden + contents
        tokens = torch.cat([visible, hidden.to(visible.dtype)], dim=1)
        for block in self.blocks:
            tokens = recomputing(self, block, tokens)
        return tokens


def replaced(
    tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b k"], token: Float[Tensor, "d"]
) -> Float[Tensor, "b n d"]:
    """The tokens with one learned token in place of those at `index`."""
    hidden = torch.zeros_like(tokens[..., 0]).scatter(1, index, 1.0).unsqueeze(-1)
    return tokens * (1 - hidden) + token.to(tokens.dtype) * hidden


def heads_for(dim: int) -> int:
    """Attention heads 64 wide; where the width is no multiple of 64, as near to 32 wide as its divisors allow."""
    if dim % 64 == 0:
        return dim // 64
    return max(heads for heads in range(1, max(1, dim // 32) + 1) if dim % heads == 0)


def xavier(module: nn.Module) -> None:
    """Uniform weights and no bias, as MAE and CAE start: for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
