"""Masked autoencoders: He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

The control that every other method stands beside. Most patches are hidden; the encoder sees the visible ones alone;
a small decoder, thrown away afterwards, predicts the pixels of the hidden ones.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from underpaint.backbones import TokenBackbone
from underpaint.blocks import MaskedDecoder
from underpaint.corruptions import mask_cells
from underpaint.masking import Mask, hidden_count, random_mask
from underpaint.methods.masked import MaskedMethod
from underpaint.methods.method import Objective
from underpaint.patches import patchify, put, standardize, take, unpatchify, unstandardize
from underpaint.targets import SMALLEST_CELL, enlarge, enlargement, hog_picture, hog_pyramid

BINS = 9


class MAE(MaskedMethod):
    """Restore hidden patches from visible ones.

    >>> import torch, underpaint
    >>> mae = underpaint.MAE(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = mae(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline']

    Args:
        encoder: any `TokenBackbone` (a plain ViT).
        mask_ratio: share of the patches that is hidden (0.75 in the paper).
        decoder_dim: width of the decoder; half the encoder's where None (512 in the paper at every encoder, which
            at ViT-Ti makes the decoder 90 % of a step).
        decoder_depth: blocks of the decoder; a third of the encoder's where None (8 in the paper).
        target: the pixels of a patch, or its HOG (cells of half a patch, 9 bins a channel): the control that shows
            what LocalMIM's several depths add to its target.
        norm_pix_loss: each target patch to mean 0 and variance 1 (the paper's better variant).

    Raises:
        TypeError: the encoder cannot run on a subset of its patches.
        ValueError: half a patch is below 2 px, or no whole number of pixels (HOG).
    """

    encoder: TokenBackbone

    def __init__(
        self,
        encoder: TokenBackbone,
        mask_ratio: float = 0.75,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        target: Literal["pixels", "hog"] = "pixels",
        norm_pix_loss: bool = True,
    ):
        super().__init__()
        if not isinstance(encoder, TokenBackbone):
            raise TypeError(
                f"MAE needs an encoder that runs on part of its patches (a plain ViT), not {type(encoder).__name__}"
            )
        self.encoder = encoder
        self.patch_size = encoder.patch_size
        self.mask_ratio = mask_ratio
        self.target, self.norm_pix_loss = target, norm_pix_loss
        grid = encoder.grid(*encoder.image_size)
        hidden_count(grid[0] * grid[1], mask_ratio)  # says early that a ratio or a grid is impossible
        dim = decoder_dim or max(64, round(encoder.dim / 2 / 32) * 32)
        depth = decoder_depth or max(2, encoder.depth // 3)
        outputs = self.patch_size[0] * self.patch_size[1] * encoder.channels
        if target == "hog":
            side = self.patch_size[0]
            if self.patch_size != (side, side) or side % 2 or side < 2 * SMALLEST_CELL:
                raise ValueError(
                    f"HOG cells of half a patch need square patches of an even side of 4 px or more, not {self.patch_size}"
                )
            outputs = 4 * BINS * encoder.channels
        self.decoder = MaskedDecoder(encoder.dim, grid, dim, depth, outputs)

    def sample(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Mask:
        rows, columns = self.encoder.grid(height, width)
        return random_mask(batch, rows * columns, hidden_count(rows * columns, self.mask_ratio), generator)

    def predict(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        """The hidden patches, from the visible ones."""
        visible = self.encoder.embed(images, mask.visible)
        latent = self.encoder.encode(visible, mask.visible).tokens
        return self.decoder(latent, mask).float()

    def targets(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        if self.target == "hog":
            return take(patchify(self.hog(images), (2, 2)), mask.hidden)
        hidden = take(patchify(images, self.patch_size), mask.hidden)
        return standardize(hidden) if self.norm_pix_loss else hidden

    def hog(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b d rows columns"]:
        return hog_pyramid(images, [self.patch_size[0] // 2], BINS)[0]

    def trivial(self, target: Float[Tensor, "b h d"]) -> Float[Tensor, "b h d"]:
        """What is to be beaten: the mean of each patch, or the mean HOG."""
        if self.target == "hog":
            return target.mean((0, 1)).expand_as(target)
        return target.mean(-1, keepdim=True).expand_as(target)

    def forward(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> Objective:
        if mask is None:
            mask = self.mask_for(images)
        target = self.targets(images, mask)
        loss = (self.predict(images, mask) - target).square().mean()
        return Objective(loss, {"baseline": (target - self.trivial(target)).square().mean().detach()})

    @torch.no_grad()
    def restore(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> dict[str, Tensor]:
        """Standardised targets leave mean and contrast of a hidden patch open: pictures take them from the original."""
        if mask is None:
            mask = Mask(*self.fixed_noise(images, 1)[0])
        grid = self.encoder.grid(*images.shape[-2:])
        predicted = self.predict(images, mask)
        if self.target == "hog":
            times, level = enlargement(images), self.hog(images)
            filled = unpatchify(put(patchify(level, (2, 2)), mask.hidden, predicted), (2, 2), grid)
            frames = {"original": images, "hidden": mask_cells(images, mask, self.patch_size)}
            frames = {name: enlarge(frame, times) for name, frame in frames.items()}
            for name, values in (("target\nhog", level), ("restored\nhog", filled)):
                frames[name] = hog_picture(values, BINS, images.shape[1], self.patch_size[0] // 2 * times)
            return frames
        patches = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            predicted = unstandardize(predicted, take(patches, mask.hidden))
        restored = unpatchify(put(patches, mask.hidden, predicted), self.patch_size, grid)
        return {"original": images, "hidden": mask_cells(images, mask, self.patch_size), "restored": restored}

    def errors(
        self, images: Float[Tensor, "b c height width"], mask: Mask
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Squared, against the trivial prediction, as in the loss."""
        target = self.targets(images, mask)
        left = (self.predict(images, mask) - target).square().mean((1, 2))
        return left, (target - self.trivial(target)).square().mean((1, 2))
