"""SimMIM: Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling", CVPR 2022, arXiv 2111.09886.

A control. Hidden patches stay in the encoder's input as one learned token; a linear map of the encoder's output gives
the pixels of the hidden cells; the loss is their absolute error. Every encoder whose patch embeddings can be replaced
will do: a plain ViT or a Swin.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.backbones import Backbone, ViT
from underpaint.backbones.swin import Swin
from underpaint.corruptions import mask_cells
from underpaint.masking import Mask, hidden_count, random_mask, refine
from underpaint.methods.masked import MaskedMethod
from underpaint.methods.method import Objective
from underpaint.patches import patchify, put, take, unpatchify


class SimMIM(MaskedMethod):
    """Restore hidden patches in place.

    >>> import torch, underpaint
    >>> simmim = underpaint.SimMIM(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = simmim(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline']

    Args:
        encoder: a plain ViT or a Swin.
        mask_ratio: share of the cells that is hidden (0.6 in the paper).
        cell: pixels of a side of a hidden cell (32 in the paper): a place of a Swin's last stage, or two patches of a
            ViT where that divides the image, else one, where None.

    Raises:
        TypeError: an encoder of another kind.
        ValueError: a cell that is no whole number of the encoder's last places, or does not divide the image.
    """

    encoder: Any

    def __init__(self, encoder: Backbone, mask_ratio: float = 0.6, cell: int | None = None):
        super().__init__()
        if not isinstance(encoder, (ViT, Swin)):
            raise TypeError(f"SimMIM needs a plain ViT or a Swin, not {type(encoder).__name__}")
        self.encoder, self.mask_ratio = encoder, mask_ratio
        height, width = encoder.image_size
        place = encoder.patch_size[0] if isinstance(encoder, ViT) else encoder.stride
        if cell is None:
            cell = (
                2 * place if isinstance(encoder, ViT) and not (height % (2 * place) or width % (2 * place)) else place
            )
        if cell % place or height % cell or width % cell:
            raise ValueError(f"cell is {cell} px; it must be a multiple of {place} px that divides {height}x{width}")
        self.cell, self.place = cell, place
        self.cells = (height // cell, width // cell)
        self.hidden_cells = hidden_count(self.cells[0] * self.cells[1], mask_ratio)
        dim = encoder.dim if isinstance(encoder, ViT) else encoder.info[0]["num_chs"]
        self.mask_token = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(encoder.dim, encoder.channels * place * place)

    def sample(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Mask:
        return random_mask(batch, self.cells[0] * self.cells[1], self.hidden_cells, generator)

    def predict(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        """The pixels of the hidden places of the encoder's last grid."""
        tokens = self.encoder.embed(images)
        patches = refine(mask, self.cells, self.cell // self.encoder.patch_size[0]).hidden
        hidden = torch.zeros_like(tokens[..., 0]).scatter(1, patches, 1.0).unsqueeze(-1)
        tokens = tokens * (1 - hidden) + self.mask_token.to(tokens.dtype) * hidden
        last = self.encoder.encode(tokens).tokens
        return self.head(take(last, refine(mask, self.cells, self.cell // self.place).hidden)).float()

    def targets(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        places = refine(mask, self.cells, self.cell // self.place).hidden
        return take(patchify(images, (self.place, self.place)), places)

    def forward(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> Objective:
        if mask is None:
            mask = self.mask_for(images)
        target = self.targets(images, mask)
        loss = (self.predict(images, mask) - target).abs().mean()
        return Objective(loss, {"baseline": target.abs().mean().detach()})  # of the mean of the data: 0

    @torch.no_grad()
    def restore(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> dict[str, Tensor]:
        if mask is None:
            mask = Mask(*self.fixed_noise(images, 1)[0])
        size = (self.place, self.place)
        grid = (images.shape[-2] // self.place, images.shape[-1] // self.place)
        places = refine(mask, self.cells, self.cell // self.place).hidden
        restored = put(patchify(images, size), places, self.predict(images, mask))
        hidden = mask_cells(images, mask, (self.cell, self.cell))
        return {"original": images, "hidden": hidden, "restored": unpatchify(restored, size, grid)}

    def errors(
        self, images: Float[Tensor, "b c height width"], mask: Mask
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Squared, as for the other methods, against the mean of the data."""
        target = self.targets(images, mask)
        return (self.predict(images, mask) - target).square().mean((1, 2)), target.square().mean((1, 2))
