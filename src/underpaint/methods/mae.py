"""Masked autoencoders: He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

The control that every other method stands beside. Most patches are hidden; the encoder sees the visible ones alone;
a small decoder, thrown away afterwards, predicts the pixels of the hidden ones. A patch is a position of the encoder's
final grid: of a hierarchical transformer a unit (GreenMIM, 2205.13515; Hiera, 2306.00989), of a convolutional net a place
of its last map, empty through the whole net where it is hidden (`backbones/visible.py`; FCMAE, 2301.00808).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from underpaint.blocks import MaskedDecoder
from underpaint.methods.masked import WalkedMethod
from underpaint.methods.method import Objective, Sampled
from underpaint.patches import patchify, put, take, unpatchify
from underpaint.targets import Target, enlarge, enlargement, target_for


class MAE(WalkedMethod):
    """Restore hidden patches from visible ones.

    >>> import torch, underpaint
    >>> mae = underpaint.MAE(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = mae(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline']

    Args:
        encoder: any `StagedBackbone`.
        mask_ratio: share of the patches that is hidden (0.75 in the paper).
        mask: a name of `masking.MASKS`, or such a function.
        mask_patch_size: pixels of a side of what is hidden as one; a patch where None.
        decoder_dim: width of the decoder; half the encoder's where None (512 in the paper at every encoder, which
            at ViT-Ti makes the decoder 90 % of a step), at most 512 for an encoder with feature maps.
        decoder_depth: blocks of the decoder; a third of the encoder's where None (8 in the paper).
        target: a name of `targets.TARGETS`, or a `Target`: the pixels of a patch, or its HOG (cells of half a patch, 9
            bins a channel), the control that shows what LocalMIM's several depths add to its target.
        norm_pix_loss: each target patch to mean 0 and variance 1 (the paper's better variant).
        images_per_mask: how many consecutive images share a mask (Swin).
        seed: of the masks that these are drawn from (Swin); a run's own seed, else 0, where None.

    Raises:
        TypeError: an encoder of another kind.
        ValueError: cells that are too small, or no whole number of pixels (HOG).
    """

    decoder_dim: int | None = None
    decoder_depth: int | None = None
    target: str | Target = "pixels"
    norm_pix_loss: bool = True

    def __post_init__(self) -> None:
        encoder = self.encoder
        self.hide_from(encoder)
        self.wanted = target_for(self.target, norm_pix_loss=self.norm_pix_loss)
        side, along = encoder.unit[0], self.wanted.along
        if encoder.unit != (side, side) or side % along or side < along * self.wanted.smallest:
            raise ValueError(
                f"{self.wanted.name} needs square patches of {along} x {along} cells of at least "
                f"{self.wanted.smallest} px, not {encoder.unit}"
            )
        self.cell = side // along
        dim = self.decoder_dim or max(64, round(encoder.dim / 2 / 32) * 32)
        if encoder.hierarchical and self.decoder_dim is None:
            dim = min(dim, 512)  # ResNet-50 has 2048
        depth = self.decoder_depth or max(2, encoder.depth // 3)
        outputs = along * along * self.wanted.width(self.cell, encoder.channels)
        self.decoder = MaskedDecoder(encoder.dim, encoder.grid(*encoder.image_size), dim, depth, outputs)

    def predict(self, images: Float[Tensor, "b c height width"], mask: Sampled) -> Float[Tensor, "b h d"]:
        """The hidden patches, from the visible ones."""
        return self.decoder(self.seen(images, mask), self.mask_at(mask)).float()

    def targets(self, images: Float[Tensor, "b c height width"], mask: Sampled) -> Float[Tensor, "b h d"]:
        return take(self.patches(self.wanted(images, [self.cell])[0]), self.mask_at(mask).hidden)

    def patches(self, level: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b n d2"]:
        """The cells of each patch together."""
        return patchify(level, (self.wanted.along, self.wanted.along))

    def trivial(self, target: Float[Tensor, "b h d"]) -> Float[Tensor, "b h d"]:
        return self.wanted.trivial(target)

    def forward(self, images: Float[Tensor, "b c height width"], noise: Sampled | None = None) -> Objective:
        mask = self.sample_for(images) if noise is None else noise
        target = self.targets(images, mask)
        loss = (self.predict(images, mask) - target).square().mean()
        return Objective(loss, {"baseline": (target - self.trivial(target)).square().mean().detach()})

    @torch.no_grad()
    def restore(
        self, images: Float[Tensor, "b c height width"], noise: Sampled | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """Original, visible patches, and the target with the prediction where it is hidden."""
        mask = self.fixed_noise(images, 1)[0] if noise is None else noise
        [level], along = self.wanted(images, [self.cell]), self.wanted.along
        times = 1 if self.wanted.name == "pixels" else enlargement(images)
        frames = {"original": enlarge(images, times), "hidden": enlarge(self.hidden(images, mask), times)}
        filled = put(self.patches(level), self.mask_at(mask).hidden, self.predict(images, mask))
        filled = unpatchify(filled, (along, along), self.encoder.grid(*images.shape[-2:]))
        if self.wanted.name == "pixels":
            return {**frames, "restored": self.wanted.picture(filled, images, times)}
        for name, values in (("target", level), ("restored", filled)):
            frames[f"{name}\n{self.wanted.name}"] = self.wanted.picture(values, images, times)
        return frames
