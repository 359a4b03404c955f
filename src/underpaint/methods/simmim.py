"""SimMIM: Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling", CVPR 2022, arXiv 2111.09886.

A control. Hidden patches stay in the encoder's input as one learned token; a linear map of the encoder's output gives
the pixels of the hidden patches; the loss is their absolute error. In a net that embeds no patches the token is a colour.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.backbones import StagedBackbone
from underpaint.masking import Mask
from underpaint.methods.masked import MaskedMethod, check_staged
from underpaint.methods.method import Objective
from underpaint.patches import patchify, put, take, unpatchify


class SimMIM(MaskedMethod[Mask]):
    """Restore hidden patches in place.

    >>> import torch, underpaint
    >>> simmim = underpaint.SimMIM(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = simmim(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline']

    Args:
        encoder: any `StagedBackbone`.
        mask_ratio: share of what can be hidden that is (0.6 in the paper).
        mask: a name of `masking.MASKS`, or such a function.
        mask_patch_size: pixels of a side of what is hidden as one (32 in the paper): a position of the last feature map, or
            two patches of a plain transformer where that divides the image, else one, where None.

    Raises:
        TypeError: an encoder of another kind.
        ValueError: a mask patch that is no whole number of the encoder's last positions, or does not divide the image.
    """

    encoder: StagedBackbone
    mask_ratio: float = 0.6

    def __post_init__(self) -> None:
        encoder = self.encoder
        check_staged(self, encoder)
        unit, (height, width) = encoder.stride, encoder.image_size
        twice = not encoder.hierarchical and not (height % (2 * unit) or width % (2 * unit))
        self.hide((unit, unit), encoder.image_size, 2 * unit if twice else unit)
        self.mask_token = nn.Parameter(torch.zeros(encoder.token_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(encoder.dim, encoder.channels * unit * unit)

    def predict(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        """The pixels of the hidden positions of the encoder's last grid."""
        tokens = self.encoder.covered(images, mask, self.masking.unit, self.mask_token)
        return self.head(take(tokens, mask.hidden)).float()

    def targets(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        return take(patchify(images, self.masking.unit), mask.hidden)

    def forward(self, images: Float[Tensor, "b c height width"], noise: Mask | None = None) -> Objective:
        mask = self.sample_for(images) if noise is None else noise
        target = self.targets(images, mask)
        loss = (self.predict(images, mask) - target).abs().mean()
        return Objective(loss, {"baseline": target.abs().mean().detach()})  # of the mean of the data: 0

    @torch.no_grad()
    def restore(
        self, images: Float[Tensor, "b c height width"], noise: Mask | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        mask = self.fixed_noise(images, 1)[0] if noise is None else noise
        filled = put(patchify(images, self.masking.unit), mask.hidden, self.predict(images, mask))
        restored = unpatchify(filled, self.masking.unit, self.masking.grid(*images.shape[-2:]))
        return {"original": images, "hidden": self.hidden(images, mask), "restored": restored}
