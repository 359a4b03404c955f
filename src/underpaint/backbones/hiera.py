"""timm's Hiera (Ryali et al., arXiv 2306.00989): on whole images, and on the visible ones of its mask units alone."""

from typing import Any

from jaxtyping import Float
from timm.models.hiera import Hiera as TimmHiera
from torch import Tensor, nn

from underpaint.backbones.maps import MapBackbone, Stages
from underpaint.blocks import recomputing
from underpaint.masking import Mask, Masking, hidden_map


class UnnormedMaps(MapBackbone):
    """An adapter around a network whose `forward_intermediates` has no final norm: Hiera of SAM 2."""

    normed = False


class Units(Stages):
    """A walk from stage to stage of a Hiera."""

    by_layer = True


class Hiera(UnnormedMaps):
    """An adapter around timm's Hiera, which stays timm's: `model`.

    What is hidden as one is a mask unit, 8 x 8 tokens of the first stage and one of the last (32 px with patches of 4).
    Attention of the first stages and pooling stay inside a unit, so that hidden units are left out behind the embedding
    (`walk`, `advance`). The embedding is a convolution, whose 7 x 7 pixels lie in several units: to it hidden pixels are 0,
    the mean of the data, as in the paper and in timm.

    The final norm is that of timm's head, which there comes behind the mean over all tokens. Here it comes before: it is
    the norm of a transformer whose blocks begin with theirs, the public masked autoencoders were trained with it on
    tokens, and methods say something of each token. So it is trained and exported.
    """

    pooling = "mean of the last map behind head.norm"

    def __init__(self, model: TimmHiera, channels: int, image_size: tuple[int, int]):
        """
        Raises:
            ValueError: patches or pooling that are not square; an image that is no whole number of units.
        """
        super().__init__(model, channels, image_size)
        made: Any = model
        patch, pooled, unit = (tuple(size) for size in (made.patch_stride, made.q_stride, made.mask_unit_size))
        if any(len(size) != 2 or size[0] != size[1] for size in (patch, pooled, unit)):
            raise ValueError(f"patches {patch}, pooling {pooled} and mask units {unit} must be squares")
        # timm's own numbers hold for patches of 4 px and pooling at every stage alone
        self.info = [
            info | {"reduction": patch[0] * pooled[0] ** min(stage, made.q_pool)}
            for stage, info in enumerate(self.info)
        ]
        self.stride = self.info[-1]["reduction"]
        self.mask_unit: int = patch[0] * unit[0]  # pixels of a side
        whole = max(self.mask_unit, patch[0] * pooled[0] ** (len(self.info) - 1))
        if image_size[0] % whole or image_size[1] % whole:
            raise ValueError(
                f"an image of {image_size[0]}x{image_size[1]} px is no whole number of units of {whole} px"
            )
        for parameter in self.final_norm.parameters():
            parameter.requires_grad_(True)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.head.norm

    def _maps(self, images: Tensor, indices: Any, model: Any = None) -> list[Tensor]:
        maps = super()._maps(images, indices, model)
        if not isinstance(indices, (list, tuple)) or len(self.info) - 1 in indices:
            maps[-1] = (model or self.model).head.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return maps

    # --- visible units alone ----------------------------------------------------------------------------------------

    def walk(self, masking: Masking, taps: Any = (), images_per_mask: int = 1, seed: int = 0) -> Units:
        """By stage, without those of more tokens than other encoders have layers of.

        Raises:
            ValueError: a mask unit is no position of the last stage.
        """
        if self.mask_unit != self.stride:
            raise ValueError(
                f"a mask unit of {self.mask_unit} px is no position of the last stage, {self.stride} px: hiding units "
                "needs a mask_unit_size of as many patches as are pooled into one"
            )
        return Units(masking, *self.stages(), sound=True)

    def embed(self, images: Float[Tensor, "b c height width"], noise: Mask) -> Float[Tensor, "b k d"]:
        """The tokens of visible units, in the order of timm's `Unroll`: the first of each unit, then the second, ..."""
        hidden = hidden_map(noise, self.grid(*self.image_size), self.unit).to(images.dtype)
        tokens = self.model.unroll(self.model._pos_embed(self.model.patch_embed(images * (1 - hidden))))
        tokens = tokens.unflatten(1, (self.model.mu_size, -1))
        index = noise.visible.view(len(images), 1, -1, 1).expand(-1, tokens.shape[1], -1, tokens.shape[3])
        return tokens.gather(2, index).flatten(1, 2)

    def advance(
        self, walk: Any, number: int, state: Any, images: Float[Tensor, "b c height width"], noise: Mask
    ) -> tuple[Tensor, Tensor]:
        """The state are the tokens of visible units, in timm's order."""
        if state is None:
            state = self.embed(images, noise)
        ends = [self.model.stage_ends[stage] for stage in walk.taken]
        for block in self.model.blocks[ends[number - 1] + 1 if number else 0 : ends[number] + 1]:
            state = recomputing(self, block, state)
        tokens = self.model.reroll(state, ends[number], mask=noise.visible).flatten(1, 3)  # unit by unit, as `refine`
        return state, self.final_norm(tokens) if number + 1 == len(ends) else tokens
