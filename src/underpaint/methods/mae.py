"""Masked autoencoders: He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

The control that every other method stands beside. Most patches are hidden; the encoder sees the visible ones alone;
a small decoder, thrown away afterwards, predicts the pixels of the hidden ones.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from underpaint.backbones import TokenBackbone
from underpaint.blocks import MaskedDecoder
from underpaint.corruptions import mask_cells
from underpaint.masking import Mask, hidden_count, random_mask
from underpaint.methods.method import Method, Objective
from underpaint.patches import patchify, put, standardize, take, unpatchify


class MAE(Method):
    """Restore hidden patches from visible ones.

    >>> import torch, underpaint
    >>> mae = underpaint.MAE(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = mae(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline']

    Args:
        encoder: any `TokenBackbone` (a plain ViT).
        image_size: pixels (height, width) of the images; the encoder's own where None.
        hidden_ratio: share of the patches that is hidden (0.75 in the paper).
        decoder_dim: width of the decoder; half the encoder's where None (512 in the paper at every encoder, which
            at ViT-Ti makes the decoder 90 % of a step).
        decoder_depth: blocks of the decoder; a third of the encoder's where None (8 in the paper).
        standardize_targets: each target patch to mean 0 and variance 1 (the paper's better variant).

    Raises:
        TypeError: the encoder cannot run on a subset of its patches.
    """

    paper = "hide most patches, predict their pixels from the rest (MAE, arXiv 2111.06377)"
    encoder: TokenBackbone

    def __init__(
        self,
        encoder: TokenBackbone,
        hidden_ratio: float = 0.75,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        standardize_targets: bool = True,
    ):
        super().__init__()
        if not isinstance(encoder, TokenBackbone):
            raise TypeError(f"MAE needs an encoder that runs on part of its patches (a plain ViT), not {encoder}")
        self.encoder = encoder
        self.patch_size = encoder.patch_size
        self.hidden_ratio = hidden_ratio
        self.standardize_targets = standardize_targets
        grid = encoder.grid(*encoder.image_size)
        hidden_count(grid[0] * grid[1], hidden_ratio)  # says early that a ratio or a grid is impossible
        dim = decoder_dim or max(64, round(encoder.dim / 2 / 32) * 32)
        depth = decoder_depth or max(2, encoder.depth // 3)
        pixels = self.patch_size[0] * self.patch_size[1] * encoder.channels
        self.decoder = MaskedDecoder(encoder.dim, grid, dim, depth, pixels)

    def draw(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Mask:
        rows, columns = self.encoder.grid(height, width)
        return random_mask(batch, rows * columns, hidden_count(rows * columns, self.hidden_ratio), generator)

    def predict(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        """The hidden patches, from the visible ones."""
        visible = self.encoder.embed(images, mask.visible)
        latent = self.encoder.encode(visible, mask.visible).tokens
        return self.decoder(latent, mask).float()

    def targets(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        hidden = take(patchify(images, self.patch_size), mask.hidden)
        return standardize(hidden) if self.standardize_targets else hidden

    def forward(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> Objective:
        if mask is None:
            mask = self.draw(len(images), images.shape[2], images.shape[3]).to(images.device)
        target = self.targets(images, mask)
        loss = (self.predict(images, mask) - target).square().mean()
        flat = target - target.mean(-1, keepdim=True)  # what is left where each patch's mean is predicted
        return Objective(loss, {"baseline": flat.square().mean().detach()})

    @torch.no_grad()
    def restore(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> dict[str, Tensor]:
        """Standardised targets leave mean and contrast of a hidden patch open: pictures take them from the original."""
        if mask is None:
            mask = Mask(*self.fixed_draws(images, 1)[0])
        grid = self.encoder.grid(*images.shape[-2:])
        patches = patchify(images, self.patch_size)
        predicted = self.predict(images, mask)
        if self.standardize_targets:
            hidden = take(patches, mask.hidden)
            predicted = predicted * hidden.std(-1, keepdim=True) + hidden.mean(-1, keepdim=True)
        restored = unpatchify(put(patches, mask.hidden, predicted), self.patch_size, grid)
        return {"original": images, "hidden": mask_cells(images, mask, self.patch_size), "restored": restored}

    @torch.no_grad()
    def held_out(
        self, images: Float[Tensor, "b c height width"], generator: torch.Generator
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Against the mean of each hidden patch, as in the loss."""
        mask = self.draw(len(images), images.shape[2], images.shape[3], generator).to(images.device)
        target = self.targets(images, mask)
        left = (self.predict(images, mask) - target).square().mean((1, 2))
        return {"mask": (left, (target - target.mean(-1, keepdim=True)).square().mean((1, 2)))}

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """Squared error on hidden patches, mean over four fixed masks."""
        errors = [
            (self.predict(images, mask) - self.targets(images, mask)).square().mean((1, 2))
            for mask in self.fixed_draws(images, 4)
        ]
        return torch.stack(errors).mean(0)
