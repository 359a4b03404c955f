"""Labels understood once for every probe, and parts of a training set that keep its classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from underpaint.data import ImageSet, Indices
from underpaint.errors import InputError

Labels = np.ndarray | Tensor | Sequence[int]


class Task(NamedTuple):
    """Labels as a probe needs them."""

    classes: Int[np.ndarray, "k"]  # the labels that occur in train, ascending
    train: Int[np.ndarray, "n"]  # positions in `classes`
    test: Int[np.ndarray, "m"]  # labels as given: one that train lacks can never be hit

    def hits(self, predicted: Int[np.ndarray, "m"]) -> Bool[np.ndarray, "m"]:
        """Which predictions, given as positions in `classes`, are right."""
        return self.classes[predicted] == self.test


def as_task(train_x: Tensor, train_y: Labels, test_x: Tensor, test_y: Labels) -> Task:
    """Check features and labels against each other.

    Raises InputError where a part is empty, counts differ, features are not finite, or train has one class only.
    """
    labels = []
    for part, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        found = as_labels(y)
        if len(x) != len(found):
            raise InputError(f"the {part} part has {len(x)} images but {len(found)} labels")
        if not len(found):
            raise InputError(f"the {part} part of the probe is empty; it needs at least one labelled image")
        # a sum is finite only where every value is, and makes no second copy of many gigabytes
        if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
            raise InputError(f"the features of the {part} part are not all finite")
        labels.append(found)
    classes, positions = np.unique(labels[0], return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"a probe needs at least 2 classes in train; there is only {classes[0]}")
    return Task(classes, positions, labels[1])


def as_labels(labels: Labels) -> Int[np.ndarray, "n"]:
    """Whole-number labels as int64, or InputError."""
    found = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iub"):
        raise InputError(f"labels must be one whole number an image; got shape {found.shape}, type {found.dtype}")
    return found.astype(np.int64)


def stratified(labels: Labels, count: int, seed: int) -> Int[np.ndarray, "k"]:
    """Sorted indices of a random subset of at most `count` images that keeps the shares of the classes.

    Every class keeps at least one image where `count` is not below the number of classes.
    """
    found = as_labels(labels)
    if count >= len(found):
        return np.arange(len(found))
    generator = np.random.default_rng(seed)
    share = np.empty(len(found))  # how much of its class stands before an image, in a random order
    for value in np.unique(found):
        members = generator.permutation(np.flatnonzero(found == value))
        share[members] = np.arange(len(members)) / len(members)
    # equal shares, the first images of all classes among them, are taken in a random order
    order = np.lexsort((generator.random(len(found)), share))
    return np.sort(order[:count])


def evenly(images: int, count: int) -> Int[np.ndarray, "k"]:
    """Numbers of at most `count` of so many images, from the first to the last at equal distances."""
    return np.linspace(0, images - 1, min(count, images)).round().astype(int)


def shots(labels: Labels, count: int, seed: int) -> Int[np.ndarray, "k"]:
    """Sorted indices of `count` random images of each class, or of all where a class has fewer."""
    found = as_labels(labels)
    generator = np.random.default_rng([seed, 2])  # not the stream of `stratified` or `hold_out`
    chosen = [generator.permutation(np.flatnonzero(found == value))[:count] for value in np.unique(found)]
    return np.sort(np.concatenate(chosen))


def hold_out(labels: Labels, seed: int) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
    """Indices to fit on and to choose on: a stratified fifth of train, rounded per class, is for choosing.

    Classes with fewer than 3 images are fitted on only, so the second part can be empty.
    """
    found = as_labels(labels)
    generator = np.random.default_rng([seed, 1])  # not the stream of `stratified`
    held = np.zeros(len(found), dtype=bool)
    for value in np.unique(found):
        members = generator.permutation(np.flatnonzero(found == value))
        held[members[: round(0.2 * len(members))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


@dataclass
class Split:
    """Some labelled images of a set."""

    images: ImageSet
    indices: Indices

    @property
    def labels(self) -> np.ndarray:
        return self.labels_of(self.indices)

    def labels_of(self, samples: Indices) -> np.ndarray:
        """A streamed set learns only on the way which images can be read."""
        return self.images.labels[np.asarray(samples, np.int64)].astype(np.int64)

    def numbers_of(self, samples: Indices) -> np.ndarray:
        """The number to be predicted of each."""
        assert self.images.numbers is not None  # what is read for its numbers has them
        return self.images.numbers[np.asarray(samples, np.int64)]

    def groups_of(self, samples: Indices) -> list[str] | None:
        """The group (patient, slide, video) of each; None where each image is by itself."""
        groups = self.images.groups
        return None if groups is None else [groups[k] for k in samples]

    def subset(self, count: int, seed: int) -> "Split":
        chosen = stratified(self.labels, count, seed)
        return Split(self.images, np.asarray(self.indices)[chosen])
