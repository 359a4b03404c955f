"""Some images of a set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from underpaint.data import ImageSet
from underpaint.evaluate.splits import stratified


@dataclass
class Part:
    """Some labelled images of a set."""

    images: ImageSet
    indices: list[int]

    @property
    def labels(self) -> np.ndarray:
        return self.labels_of(self.indices)

    def labels_of(self, samples: Sequence[int]) -> np.ndarray:
        """A streamed set learns only on the way which images can be read."""
        return np.array([self.images.labels[k] for k in samples])

    def groups_of(self, samples: Sequence[int]) -> list[str] | None:
        """The group (patient, slide, video) of each; None where each image is by itself."""
        groups = self.images.groups
        return None if groups is None else [groups[k] for k in samples]

    def subset(self, count: int, seed: int) -> "Part":
        chosen = stratified(self.labels, count, seed)
        return Part(self.images, [self.indices[k] for k in chosen])
