"""Which entries are trained on and which judge: splits, and hold-outs that no seed moves."""

import numpy as np

from underpaint.data.sources.base import Source
from underpaint.data.sources.index import Indices

HOLD_OUT = 0.2


def pretraining_indices(source: Source, *, all_images: bool = False) -> np.ndarray:
    """The entries of the train split where there is one, else all; without those that `labelled_indices` holds out to
    judge by, and what is of their groups, unless `all_images`."""
    train = source.entries.within("train")
    chosen = train if train.any() else np.ones(len(source.entries), dtype=bool)
    if not all_images and len(held := held_out(source)):
        if source.grouped:
            numbers, names = source.groups
            aside = np.zeros(len(names), dtype=bool)
            aside[numbers[held]] = True
            chosen &= ~aside[numbers]
        else:
            chosen[held] = False
    return np.flatnonzero(chosen)


def held_out(source: Source) -> np.ndarray:
    """The labelled test part where it is no split of the source's own."""
    none = np.empty(0, np.int64)
    sides = labelled_indices(source)
    if sides is None or not len(sides[1]):
        return none
    fitted, judged = (set(np.unique(source.entries.splits[side]).tolist()) for side in sides)
    names = source.entries.split_names
    return sides[1] if fitted & judged or [names[k] for k in fitted if k >= 0] != ["train"] or -1 in fitted else none


def labelled_indices(source: Source) -> tuple[np.ndarray, np.ndarray] | None:
    """Which labelled entries to fit on and which to judge by.

    The test split judges if it is labelled, else the val split, else a stratified hold-out of 20 % (whole groups,
    where the source was opened with `groups`), which depends on names, labels and groups alone. None where there are
    no labels, or none that can judge (`labels_judge`).
    """
    sides = _sides(source)
    return None if sides is None or _useless(source, *sides) else sides


def labels_judge(source: Source) -> str:
    """Why class labels cannot judge; nothing where they can, or where there are none."""
    sides = _sides(source)
    return "" if sides is None else _useless(source, *sides)


def _sides(source: Source) -> tuple[np.ndarray, np.ndarray] | None:
    labelled = np.flatnonzero(source.entries.labels >= 0)
    return split_indices(source, labelled) if len(labelled) else None


def _useless(source: Source, train: np.ndarray, test: np.ndarray) -> str:
    if len(np.unique(source.entries.labels[train])) < 2:
        return "they are all of one class" if len(train) else "none of them is of an image to train on"
    return "" if len(test) else "no class has two images, one of which could judge"


def split_indices(source: Source, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
    """Some entries in two: to fit on and to judge by, as `labelled_indices` does it."""
    chosen = np.asarray(indices, np.int64)
    parts = {split: chosen[source.entries.within(split)[chosen]] for split in ("train", "test", "val")}
    if not len(parts["train"]):
        return _hold_out(source, chosen)
    for judge in ("test", "val"):
        if len(parts[judge]):
            return parts["train"], parts[judge]
    return _hold_out(source, parts["train"])


def _hold_out(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups go to the test side one by one where that brings its class counts nearer to 20 %.

    They come in the order of their names' hashes: no seed moves them, and images that are added later move few others.
    """
    _, labels, sizes = np.unique(source.entries.labels[indices], return_inverse=True, return_counts=True)
    wanted = np.asarray([min(max(1, round(HOLD_OUT * size)), size - 1) for size in sizes.tolist()])
    held = (_held_groups if source.grouped else _held_images)(source, indices, labels, wanted)
    return indices[~held], indices[held]


def _rank(order: np.ndarray) -> np.ndarray:
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _held_images(source: Source, indices: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of images that are groups each, the first of every class are what the rule takes, as many as are wanted."""
    order = np.lexsort((_rank(source.order)[indices], labels))
    counts = np.bincount(labels, minlength=len(wanted))
    within = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    held = np.zeros(len(indices), dtype=bool)
    held[order] = within < np.repeat(wanted, counts)
    return held


def _held_groups(source: Source, indices: np.ndarray, labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    rank = _rank(source.order)[source.groups[0][indices]]
    # how many images of each class each group has, one group after the other
    pairs, counts = np.unique(rank * len(wanted) + labels, return_counts=True)
    groups, touched = np.divmod(pairs, len(wanted))
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    held = np.zeros(len(wanted), np.int64)
    taken = np.zeros(len(source.order), dtype=bool)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(groups)], strict=True):
        classes = touched[start:stop]
        after = held[classes] + counts[start:stop]
        if ((after - wanted[classes]) ** 2).sum() < ((held[classes] - wanted[classes]) ** 2).sum():
            held[classes] = after
            taken[groups[start]] = True
    return taken[rank]
