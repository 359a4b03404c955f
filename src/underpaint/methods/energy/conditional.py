"""The energy of hidden patches, given visible ones. Ours: no paper's.

The encoder reads the visible patches alone, as in a masked autoencoder, and the energy is that of the hidden ones given
these:

    latent  = encoder(visible patches)
    E       = half the squared length of W t, summed over the hidden tokens t of upper(latent, embedded hidden patches)
    hidden' = hidden - step_size * dE / d hidden,  from hidden = 0

The upper blocks are narrow and thrown away. Only they are differentiated twice; the encoder runs once, forward and
backward, on the visible patches.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.backbones import TokenBackbone
from underpaint.blocks import MaskedDecoder
from underpaint.masking import Mask, hidden_map
from underpaint.methods.energy.descent import Descent, Given, State
from underpaint.patches import patchify, put, standardize, take, unpatchify, unstandardize


class ConditionalEnergy(Descent[Mask]):
    """Restore hidden patches by steps down their energy, given the visible ones.

    >>> import torch, underpaint
    >>> energy = underpaint.ConditionalEnergy(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = energy(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline', 'energy', 'error', 'gradient_rms', 'step_size']

    Args:
        encoder: any `TokenBackbone` (a plain ViT).
        mask_ratio: share of the patches that is hidden.
        mask: a name of `masking.MASKS`, or such a function.
        mask_patch_size: pixels of a side of what is hidden as one; a patch where None.
        steps: N, restoring steps.
        step_size: start value of the learned step size; measured on the first batch so that the step changes a pixel by
            0.1 (root of the mean square) where None.
        readout: of the hidden tokens: "square", half the squared length of a linear map of each, summed; or a linear of
            each, summed or averaged.
        upper_dim: width of the blocks above the encoder; half the encoder's where None.
        upper_depth: their number; a sixth of the encoder's depth where None, half of a masked autoencoder's decoder:
            going back through them does the other half.

    Raises:
        TypeError: the encoder cannot run on a subset of its patches.
        ValueError: a setting that does not fit encoder or images.
    """

    encoder: TokenBackbone
    readout: Literal["sum", "mean", "class", "square"] = "square"
    upper_dim: int | None = None
    upper_depth: int | None = None

    def __post_init__(self) -> None:
        encoder = self.encoder
        if not isinstance(encoder, TokenBackbone):
            raise TypeError(
                "conditional-energy needs an encoder that runs on part of its patches (a plain ViT), not "
                f"{type(encoder).__name__}"
            )
        if self.readout == "class":
            raise ValueError("readout class needs a class token among the hidden ones; take square, sum or mean")
        self.hide(encoder.patch_size, encoder.image_size)
        dim = self.upper_dim or max(64, round(encoder.dim / 2 / 32) * 32)
        depth = self.upper_depth or max(1, encoder.depth // 6)
        self.upper = MaskedDecoder(encoder.dim, encoder.grid(*encoder.image_size), dim, depth, None)
        height, width = encoder.patch_size
        self.embed_hidden = nn.Linear(height * width * encoder.channels, dim, bias=False)
        nn.init.xavier_uniform_(self.embed_hidden.weight)
        self.begin(dim, self.upper.norm)

    def corrupt(self, images: Float[Tensor, "b c height width"], noise: Mask) -> State:
        return (self.hidden(images, noise),)

    def target(self, images: Float[Tensor, "b c height width"], noise: Mask) -> Float[Tensor, "b c height width"]:
        """The images, each hidden patch to mean 0 and variance 1, as in MAE."""
        return self._with_hidden(images, noise, standardize(take(self._patches(images), noise.hidden)))

    def given(self, images: Float[Tensor, "b c height width"], noise: Mask) -> Given:
        visible = self.encoder.embed(images, noise.visible)
        return Given(self.encoder.encode(visible, noise.visible).tokens, noise)

    def tokens(self, *state: Tensor, given: Given | None = None) -> Float[Tensor, "b h d"]:
        assert given is not None
        hidden = take(self._patches(state[0]), given.mask.hidden)
        return self.upper(given.latent, given.mask, self.embed_hidden(hidden))

    def counted(self, squares: Float[Tensor, "b c height width"], noise: Mask) -> Float[Tensor, "b c height width"]:
        unit = self.masking.unit
        return squares * hidden_map(noise, self.masking.grid(*squares.shape[-2:]), unit).expand_as(squares)

    def shown(self, state: State, images: Float[Tensor, "b c height width"], noise: Mask) -> Tensor:
        """Mean and contrast of hidden patches are those of the original."""
        hidden = take(self._patches(state[0]), noise.hidden)
        shown = unstandardize(hidden, take(self._patches(images), noise.hidden))
        return self._with_hidden(state[0], noise, shown)

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """The energy of the hidden patches, mean over four fixed masks."""
        masks = self.fixed_noise(images, 4)
        return torch.stack([self.energy(self.target(images, m), given=self.given(images, m)) for m in masks]).mean(0)

    def _patches(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b n p"]:
        return patchify(images, self.masking.unit)

    def _with_hidden(self, images: Tensor, mask: Mask, hidden: Float[Tensor, "b h p"]) -> Tensor:
        filled = put(self._patches(images), mask.hidden, hidden)
        return unpatchify(filled, self.masking.unit, self.masking.grid(*images.shape[-2:]))
