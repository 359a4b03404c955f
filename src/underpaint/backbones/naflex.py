"""timm's NaFlexVit: transformers for images of any size and shape (NaViT, Dehghani et al. 2307.06304; SigLIP 2, Tschannen
et al. 2502.14786; C-RADIO), here for images of one size."""

from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models.naflexvit import NaFlexVit
from torch import Tensor
from torch.nn import functional

from underpaint.backbones.eva import Turns
from underpaint.backbones.plain import Plain, placed
from underpaint.blocks import sincos_positions


class NaFlex(Plain):
    """An adapter around timm's NaFlexVit. Its learned positions stay on a grid of their own, and are resampled to that of
    the patches by timm's own rule in each step; so they load back whatever the image size.

    Args:
        image_size: height and width in pixels, since the model has none.

    Raises:
        ValueError: as `Plain`.
    """

    def __init__(self, model: NaFlexVit, image_size: tuple[int, int]):
        super().__init__(model, image_size)
        self.turns = Turns(model.rope, self.grid(*self.image_size))

    @property
    def embedding(self) -> Any:
        return self.model.embeds

    @property
    def kernel(self) -> Float[Tensor, "d c height width"]:
        weight, (height, width) = self.embedding.proj.weight, self.embedding.patch_size
        if weight.ndim == 4:
            return weight
        if not self.embedding.channels_last:
            return weight.unflatten(1, (-1, height, width))
        return weight.unflatten(1, (height, width, -1)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def initialise_positions(self) -> None:
        """So that the patches have about those of sin-cos: exactly where the model's grid is that of the patches."""
        embeds, (rows, columns) = self.embedding, self.grid(*self.image_size)
        if embeds.pos_embed_ar_preserving:
            rows = columns = max(rows, columns)
        table = sincos_positions((rows, columns), self.dim).T.view(1, self.dim, rows, columns)
        if embeds.pos_embed is not None:
            size = tuple(embeds.pos_embed.shape[1:3])
            embeds.pos_embed.copy_(functional.interpolate(table, size, mode="bicubic").permute(0, 2, 3, 1))
        elif embeds.pos_embed_y is not None:
            half = self.dim // 4 * 2  # what codes the row, in front of what codes the column
            for learned, line, mine in (
                (embeds.pos_embed_y, table[..., 0], slice(0, half)),
                (embeds.pos_embed_x, table[:, :, 0], slice(half, None)),
            ):
                learned.zero_()
                stretched = functional.interpolate(line, learned.shape[1], mode="linear")
                learned[..., mine] = stretched.transpose(1, 2)[..., mine]

    def learned(self) -> Float[Tensor, "1 n d"] | None:
        """The positions of the patches, from the learned ones of the model's own grid."""
        embeds, grid = self.embedding, self.grid(*self.image_size)
        table = embeds.pos_embed if embeds.pos_embed is not None else embeds.pos_embed_y
        if table is None:
            return None
        made = table.new_zeros(1, grid[0] * grid[1], self.dim)
        add = embeds._apply_learned_pos_embed if embeds.pos_embed is not None else embeds._apply_factorized_pos_embed
        add(made, grid_size=list(grid))  # to what is given
        return made

    def begin(
        self,
        tokens: Float[Tensor, "b k d"],
        index: Int[Tensor, "b k"] | None = None,
        positions: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        embeds = self.embedding
        added = self.learned() if positions is None else positions
        if added is not None:
            tokens = placed(tokens, added, index)
        first = [one for one in (embeds.cls_token, embeds.reg_token) if one is not None]
        tokens = torch.cat([*(one.expand(tokens.shape[0], -1, -1).to(tokens.dtype) for one in first), tokens], dim=1)
        return self.model.norm_pre(embeds.pos_drop(tokens))

    def places(self, index: Int[Tensor, "b k"] | None) -> Any:
        return self.turns(self.model.rope, index)

    def run(self, number: int, tokens: Float[Tensor, "b t d"], places: Any) -> Float[Tensor, "b t d"]:
        block = self.model.blocks[number]
        if places is None:
            return block(tokens)
        return block(tokens, rope=places[number] if self.model.rope_is_mixed else places)

    def positions(self) -> Float[Tensor, "n d"] | None:
        """None where tokens are turned too: an embedding alone does not say then where a patch is."""
        learned = self.learned() if self.model.rope is None else None
        return None if learned is None else learned[0]

    def fix_positions(self) -> None:
        for learned in (self.embedding.pos_embed, self.embedding.pos_embed_y, self.embedding.pos_embed_x):
            if learned is not None:
                learned.requires_grad_(False)

    @property
    def class_token(self) -> bool:
        return self.embedding.cls_token is not None

    def no_weight_decay(self) -> set[str]:
        """timm leaves factorised positions and the frequencies of turns out of its own."""
        frequencies = (
            {f"model.rope.{name}" for name, _ in self.model.rope.named_parameters()} if self.model.rope else set()
        )
        return frequencies | {"model.embeds.pos_embed_y", "model.embeds.pos_embed_x"}
