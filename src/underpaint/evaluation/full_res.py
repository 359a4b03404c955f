"""Whole images for dense tasks, in their own size."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from underpaint.console import progress, say
from underpaint.data import ImageSet, Indices, Scaling, Source, Unreadable, load_images
from underpaint.errors import InputError
from underpaint.evaluation.bundle import EncoderBundle

AS_THEY_ARE = (2**14, 2**14)  # pixels: cached images are reduced to twice the size wanted, so this reduces none


class FullResImages:
    """Images of a source by their number there, float32 [c, h, w] in [0, 1]."""

    def __init__(self, source: Source, indices: Indices, channels: int, scaling: Scaling | None = None):
        """`scaling`: that of the encoder's images; measured on these where None."""
        self._images: ImageSet = load_images(source, indices, size=AS_THEY_ARE, channels=channels, scaling=scaling)
        position = {name: number for number, name in enumerate(self._images.names)}
        named = {index: source.entries.names[index] for index in np.asarray(indices).tolist()}
        self._position = {index: position[name] for index, name in named.items() if name in position}
        self.skipped = self._images.skipped

    @classmethod
    def readable(cls, source: Source, bundle: EncoderBundle) -> Iterator[tuple[int, Float[Tensor, "c h w"]]]:
        """Every image of a source with its number there; those that cannot be read are named and left out.

        Raises:
            InputError: none can be read.
        """
        images = cls(source, range(len(source.entries)), bundle.encoder.channels, bundle.scaling)
        count = 0
        for index in progress(range(len(source.entries)), "predicting"):
            if index in images:
                try:
                    yield index, images[index]
                    count += 1
                except Unreadable as error:
                    say(f"left out: {source.entries[index].name}: {error}")
        if not count:
            raise InputError(f"{source.location}: no image could be read")

    def groups_of(self, indices: Sequence[int]) -> list[str] | None:
        """The group (patient, slide, video) of each; None where each image is by itself."""
        groups = self._images.groups
        return None if groups is None else [groups[self._position[index]] for index in indices]

    def __contains__(self, index: int) -> bool:
        return index in self._position

    def __getitem__(self, index: int) -> Float[Tensor, "c h w"]:
        """Raises `Unreadable` where a streamed image cannot be decoded."""
        array = torch.from_numpy(self._images.raw(self._position[index])).permute(2, 0, 1)
        return self._images.scaling.unit(array.to(torch.float32, copy=True))
