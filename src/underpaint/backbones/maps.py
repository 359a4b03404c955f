"""Any timm model that makes feature maps: ResNet, ConvNeXt, and the rest."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.backbones.protocols import Features, Layer, StagedBackbone, Walk
from underpaint.backbones.visible import VisibleOnly, soundly
from underpaint.draws import Draws
from underpaint.masking import Mask, Masking, hidden_map, refine

log = logging.getLogger(__name__)
tell_once = functools.cache(log.warning)  # a run makes its method twice: to plan, and to train
LARGEST = 28 * 28  # places of a layer that is walked to: those of a Swin's first at 224 px


class Stages(Walk):
    """A walk to feature maps, whose places are visible or hidden with the position of the last map that they lie in."""

    by_layer = False

    def __init__(self, masking: Masking, taken: list[int], layers: list[Layer], sound: bool):
        super().__init__()
        self.masking, self.taken, self.layers, self.sound = masking, taken, layers, sound

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None, alone: bool = False) -> Mask:
        return self.masking(batch, height, width, draws)

    def mask(self, noise: Mask, number: int) -> Mask:
        coarse, factor = self.layers[-1], self.layers[-1].stride // self.layers[number].stride
        return noise if factor == 1 else refine(noise, coarse.grid, factor)


class MapBackbone(StagedBackbone):
    """An adapter through `forward_intermediates` (timm's `features_only` would rename the weights).

    Where part of an image is hidden, its places stay empty through the whole network (`visible.py`); where the network
    carries something from empty places to others all the same, hidden pixels are at the mean of the data, and that is all.
    """

    normed = True  # whether the last map can be had behind the final norm

    def __init__(self, model: nn.Module, channels: int, image_size: tuple[int, int]):
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{type(model).__name__} has no forward_intermediates, so it gives no feature maps")
        self.model: Any = model
        self.channels, self.image_size = channels, image_size
        info: Any = model.feature_info
        every: list[dict[str, Any]] = info if isinstance(info, list) else info.info
        # a neck behind the blocks (SAM's) counts as a norm, and makes another width of theirs
        self.info = [{**one, "num_chs": one.get("num_chs_norm", one["num_chs"])} for one in every]
        self.dim: int = self.info[-1]["num_chs"]
        self.stride: int = self.info[-1]["reduction"]
        self.token_dim, self.hierarchical, self.depth = channels, True, len(self.info)
        for parameter in getattr(model, "head", nn.Identity()).parameters():
            parameter.requires_grad_(False)  # ConvNeXt's norm behind the pooling: the maps are from before it

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)

    def _maps(self, images: Tensor, indices: int | Sequence[int] | None, model: Any = None) -> list[Tensor]:
        return (model or self.model).forward_intermediates(
            images, indices=indices, norm=self.normed, output_fmt="NCHW", intermediates_only=True
        )

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        """The last feature map as places, and their mean."""
        patches = _places(self._maps(images, 1)[-1])
        return Features(patches.mean(1), patches)

    def pyramid(self, images: Float[Tensor, "b c height width"]) -> list[tuple[Tensor, int]]:
        return [(m, info["reduction"]) for m, info in zip(self._maps(images, None), self.info, strict=True)]

    # --- part of an image -------------------------------------------------------------------------------------------

    def covered(
        self, images: Float[Tensor, "b c height width"], mask: Mask, unit: tuple[int, int], token: Float[Tensor, "e"]
    ) -> Float[Tensor, "b n d"]:
        """The learned token is a colour."""
        hidden = hidden_map(mask, (images.shape[-2] // unit[0], images.shape[-1] // unit[1]), unit).to(images.dtype)
        return self(images * (1 - hidden) + token.to(images.dtype).view(1, -1, 1, 1) * hidden).patches

    def walk(self, masking: Masking, taps: Sequence[int] = (), images_per_mask: int = 1, seed: int = 0) -> Stages:
        height, width = self.image_size
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"an image of {height}x{width} px is no whole number of positions of the last feature map, {self.stride} px"
            )
        taken, layers = self.stages()
        size = (self.channels, height, width)
        self._check_maps(taken, layers, size)
        sound = soundly(self.model, lambda model, images: self._maps(images, taken, model), size)
        if not sound:
            tell_once(
                f"{type(self.model).__name__} carries hidden places to visible ones inside: hidden pixels are at the mean of "
                "the data, and it computes on them too"
            )
        return Stages(masking, taken, layers, sound)

    def stages(self) -> tuple[list[int], list[Layer]]:
        """The feature maps that are walked to, by number, and what they are: four at most, none of more places than
        `LARGEST`.

        Raises:
            ValueError: the last map is not the coarsest.
        """
        height, width = self.image_size
        every = [
            (number, Layer((height // stride, width // stride), stride, info["num_chs"]))
            for number, info in enumerate(self.info)
            if (stride := info["reduction"]) <= self.stride and self.stride % stride == 0
        ]
        fine = [one for one in every if one[1].grid[0] * one[1].grid[1] <= LARGEST] or every[-1:]
        few = fine[-4:] if len(self.info) <= 8 else [fine[len(fine) * quarter // 4 - 1] for quarter in (1, 2, 3, 4)]
        taken, layers = [number for number, _ in few], [layer for _, layer in few]
        if taken[-1] != len(self.info) - 1:
            raise ValueError(f"the last feature map, of {self.stride} px, is not the coarsest")
        return taken, layers

    @torch.no_grad()
    def _check_maps(self, taken: Sequence[int], layers: Sequence[Layer], size: tuple[int, int, int]) -> None:
        """Its maps are as large as it says.

        Raises:
            ValueError: they are not.
        """
        was = self.model.training
        maps = self._maps(torch.zeros(1, *size), taken, self.model.eval())
        self.model.train(was)
        for made, layer in zip(maps, layers, strict=True):
            if (found := tuple(made.shape[1:])) != (want := (layer.dim, *layer.grid)):
                raise ValueError(
                    f"the feature map of {layer.stride} px is {'x'.join(map(str, found))}, not {'x'.join(map(str, want))}"
                )

    def advance(
        self, walk: Stages, number: int, state: Any, images: Float[Tensor, "b c height width"], noise: Mask
    ) -> tuple[Any, Tensor]:
        """The state is all maps: they are made at the first layer."""
        if state is None:
            grid, unit = walk.layers[-1].grid, self.stride
            hidden = hidden_map(noise, grid, (1, 1)).to(images.dtype)
            if walk.sound:
                with VisibleOnly(1 - hidden):
                    state = tuple(self._maps(images, walk.taken))
            else:
                pixels = hidden.repeat_interleave(unit, 2).repeat_interleave(unit, 3)
                state = tuple(self._maps(images * (1 - pixels), walk.taken))
        return state, _visible(state[number], walk.mask(noise, number))


def _places(maps: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b n d"]:
    return maps.flatten(2).transpose(1, 2)


def _visible(maps: Float[Tensor, "b d rows columns"], mask: Mask) -> Float[Tensor, "b v d"]:
    index = mask.visible.unsqueeze(1).expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, index).transpose(1, 2)
