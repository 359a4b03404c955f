"""What methods share that hide part of an image by a `Mask`."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from underpaint.backbones import Backbone
from underpaint.corruptions import mask_cells
from underpaint.masking import Mask, Masking, Strategy, masking
from underpaint.methods.method import Method, N


class MaskedMethod(Method[N]):
    """A method that hides a share of the patches, and is judged by what it makes of them.

    Args:
        encoder: any that the method can use.
        mask_ratio: share of what can be hidden that is.
        mask: a name of `masking.MASKS`, or such a function.
        mask_patch_size: pixels of a side of what is hidden as one; the method's own unit where None.
    """

    encoder: Backbone
    mask_ratio: float = 0.75
    mask: str | Strategy = "random"
    mask_patch_size: int | None = None

    masking = Masking()

    def hide(self, unit: tuple[int, int], size: tuple[int, int], mask_patch_size: int | None = None) -> None:
        """Masks from here on number units of (height, width) pixels; says early what is impossible for images of this
        size. `mask_patch_size` is the default."""
        self.masking = masking(self.mask_ratio, self.mask, self.mask_patch_size or mask_patch_size, unit)
        self.masking(1, *size, torch.Generator())

    def sample(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Any:
        return self.masking(batch, height, width, generator)

    def hidden(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b c height width"]:
        """The images with what is hidden at the data's mean."""
        return mask_cells(images, mask, self.masking.unit)

    def predict(self, images: Float[Tensor, "b c height width"], mask: N) -> Float[Tensor, "b h d"]:
        """What the method says of the hidden patches."""
        raise NotImplementedError

    def targets(self, images: Float[Tensor, "b c height width"], mask: N) -> Tensor:
        """What it should say."""
        raise NotImplementedError

    def trivial(self, target: Float[Tensor, "b h d"]) -> Float[Tensor, "b h d"]:
        """What is to be beaten: the mean of the data."""
        return torch.zeros_like(target)

    def errors(self, images: Float[Tensor, "b c height width"], noise: N) -> dict[str, tuple[Tensor, Tensor]]:
        """Squared, against the trivial prediction."""
        target = self.targets(images, noise)
        left = (self.predict(images, noise) - target).square().mean((1, 2))
        return {"mask": (left, (target - self.trivial(target)).square().mean((1, 2)))}
