"""Whole images for dense tasks, in their own size."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from underpaint.data import ImageSet, Scaling, Source, load_images

AS_THEY_ARE = (2**14, 2**14)  # pixels: cached images are reduced to twice the size wanted, so this reduces none


class FullResImages:
    """Images of a source by their number there, float32 [c, h, w] in [0, 1]."""

    def __init__(self, source: Source, indices: Sequence[int], channels: int, scaling: Scaling | None = None):
        """`scaling`: that of the encoder's images; measured on these where None."""
        self._images: ImageSet = load_images(
            source, list(indices), size=AS_THEY_ARE, channels=channels, scaling=scaling
        )
        place = {name: number for number, name in enumerate(self._images.names)}
        self._place = {
            index: place[source.entries[index].name] for index in indices if source.entries[index].name in place
        }
        self.skipped = self._images.skipped

    def groups_of(self, indices: Sequence[int]) -> list[str] | None:
        """The group (patient, slide, video) of each; None where each image is by itself."""
        groups = self._images.groups
        return None if groups is None else [groups[self._place[index]] for index in indices]

    def __contains__(self, index: int) -> bool:
        return index in self._place

    def __getitem__(self, index: int) -> Float[Tensor, "c h w"]:
        """Raises `Unreadable` where a streamed image cannot be decoded."""
        array = torch.from_numpy(self._images.raw(self._place[index])).permute(2, 0, 1)
        return self._images.scaling.unit(array.to(torch.float32, copy=True))
