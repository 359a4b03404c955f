"""What methods share that hide part of an image by a `Mask`."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from underpaint.backbones import Backbone, StagedBackbone, Walk
from underpaint.corruptions import mask_cells
from underpaint.draws import Draws
from underpaint.masking import Mask, Masking, Strategy, masking
from underpaint.methods.method import Method, N, Sampled


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
        self.masking(1, *size, Draws.of(0, 1))

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Any:
        return self.masking(batch, height, width, draws)

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


def check_staged(method: Any, encoder: Any) -> None:
    """
    Raises:
        TypeError: no part of an image can be hidden from this encoder.
    """
    if not isinstance(encoder, StagedBackbone):
        raise TypeError(
            f"{type(method).__name__} needs an encoder that part of an image can be hidden from, not "
            f"{type(encoder).__name__}"
        )


class WalkedMethod(MaskedMethod[Sampled]):
    """A masked method whose encoder runs on what is visible alone, layer by layer (`StagedBackbone.walk`).

    Args:
        images_per_mask: how many consecutive images share a mask (Swin).
        seed: of the masks that these are drawn from (Swin); a run's own seed, else 0, where None.
    """

    encoder: StagedBackbone
    images_per_mask: int = 64
    seed: int | None = None

    walk: Walk = field(init=False)  # a module

    def hide_from(self, encoder: StagedBackbone, taps: Sequence[int] | None = None) -> None:
        """Masks of positions of its final grid from here on, and the way through it that stops behind the blocks `taps`,
        at its end alone where None (of a hierarchical encoder behind each stage).

        Raises:
            TypeError: an encoder of another kind.
            ValueError: images that are no whole number of such positions.
        """
        check_staged(self, encoder)
        self.hide(encoder.unit, encoder.image_size)
        self.walk = encoder.walk(
            self.masking, [encoder.depth - 1] if taps is None else taps, self.images_per_mask, self.seed or 0
        )

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Sampled:
        return self.walk.sample(batch, height, width, draws)

    def seen(self, images: Float[Tensor, "b c height width"], noise: Sampled) -> Float[Tensor, "b v d"]:
        """The visible tokens behind the whole encoder."""
        state, tokens = None, images
        for number in range(len(self.walk.layers)):
            state, tokens = self.encoder.advance(self.walk, number, state, images, noise)
        return tokens

    def mask_at(self, noise: Sampled, number: int = -1) -> Mask:
        """What is visible and what hidden at a layer of the walk, or at its end."""
        return self.walk.mask(noise, number % len(self.walk.layers))

    def hidden(self, images: Float[Tensor, "b c height width"], mask: Sampled) -> Float[Tensor, "b c height width"]:
        return super().hidden(images, self.mask_at(mask))

    @torch.no_grad()
    def held_out(self, images: Float[Tensor, "b c height width"], draws: Draws) -> dict[str, tuple[Tensor, Tensor]]:
        """Each image under a mask of its own: they share some for speed alone."""
        noise = self.walk.sample(len(images), images.shape[2], images.shape[3], draws, alone=True)
        return self.errors(images, noise.to(images.device))
