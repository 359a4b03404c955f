"""What methods share whose only draw is which patches are hidden."""

import torch
from jaxtyping import Float
from torch import Tensor

from underpaint.masking import Mask
from underpaint.methods.method import Method


class MaskedMethod(Method):
    """A method that hides patches by a `Mask` and is judged by what it makes of the hidden ones: `errors`."""

    task: str = "mask"  # the name of those errors: squared errors of the target, or words: cross-entropies

    def errors(
        self, images: Float[Tensor, "b c height width"], mask: Mask
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """What is wrong with each image's hidden patches: as predicted, and by the trivial prediction."""
        raise NotImplementedError

    def mask_for(self, images: Float[Tensor, "b c height width"], generator: torch.Generator | None = None) -> Mask:
        """A mask for each image, on their device."""
        return self.sample(len(images), images.shape[2], images.shape[3], generator).to(images.device)

    @torch.no_grad()
    def held_out(
        self, images: Float[Tensor, "b c height width"], generator: torch.Generator
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return {self.task: self.errors(images, self.mask_for(images, generator))}

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """The error on hidden patches, mean over four fixed masks."""
        return torch.stack([self.errors(images, mask)[0] for mask in self.fixed_noise(images, 4)]).mean(0)
