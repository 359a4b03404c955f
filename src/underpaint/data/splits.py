"""Which entries are trained on and which judge: splits, and hold-outs that no seed moves."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from underpaint.data.sources.base import Source

HOLD_OUT = 0.2


def pretraining_indices(source: Source, *, all_images: bool = False) -> list[int]:
    """The entries of the train split where there is one, else all; without those that `labelled_indices` holds out to
    judge by, and what is of their groups, unless `all_images`."""
    train = [i for i, entry in enumerate(source.entries) if entry.split == "train"]
    chosen = train or list(range(len(source.entries)))
    if all_images or not (held := held_out(source)):
        return chosen
    groups = {source.group_of(i) for i in held}
    return [i for i in chosen if source.group_of(i) not in groups]


def held_out(source: Source) -> list[int]:
    """The labelled test part where it is no split of the source's own."""
    sides = labelled_indices(source)
    if sides is None or not sides[1]:
        return []
    fitted = {source.entries[i].split for i in sides[0]}
    return sides[1] if fitted & {source.entries[i].split for i in sides[1]} or fitted != {"train"} else []


def labelled_indices(source: Source) -> tuple[list[int], list[int]] | None:
    """Which labelled entries to fit on and which to judge by.

    The test split judges if it is labelled, else the val split, else a stratified hold-out of 20 % (whole groups,
    where the source was opened with `groups`), which depends on names, labels and groups alone. None where there are
    no labels, or none that can judge (`labels_judge`).
    """
    labelled = [i for i, entry in enumerate(source.entries) if entry.label is not None]
    sides = split_indices(source, labelled) if labelled else ([], [])
    return sides if labelled and not _useless(source, *sides) else None


def labels_judge(source: Source) -> str:
    """Why class labels cannot judge; nothing where they can, or where there are none."""
    labelled = [i for i, entry in enumerate(source.entries) if entry.label is not None]
    return _useless(source, *split_indices(source, labelled)) if labelled else ""


def _useless(source: Source, train: list[int], test: list[int]) -> str:
    classes = {source.entries[i].label for i in train}
    if len(classes) < 2:
        return "they are all of one class" if train else "none of them is of an image to train on"
    return "" if test else "no class has two images, one of which could judge"


def split_indices(source: Source, indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Some entries in two: to fit on and to judge by, as `labelled_indices` does it."""
    by_split: dict[str | None, list[int]] = {}
    for i in indices:
        by_split.setdefault(source.entries[i].split, []).append(i)
    if "train" not in by_split:
        return _hold_out(source, list(indices))
    for judge in ("test", "val"):
        if judge in by_split:
            return by_split["train"], by_split[judge]
    return _hold_out(source, by_split["train"])


def _hold_out(source: Source, indices: list[int]) -> tuple[list[int], list[int]]:
    """Groups go to the test side one by one where that brings its class counts nearer to 20 %.

    They come in the order of their names' hashes: no seed moves them, and images that are added later move few others.
    """
    labels = [source.entries[i].label for i in indices]
    place = {label: n for n, label in enumerate(sorted(set(labels), key=str))}
    members: dict[str, list[int]] = {}
    for position, i in enumerate(indices):
        members.setdefault(source.group_of(i), []).append(position)
    sizes = Counter(labels)
    wanted = np.zeros(len(place))
    for label, size in sizes.items():
        wanted[place[label]] = min(max(1, round(HOLD_OUT * size)), size - 1)
    held = np.zeros(len(place))
    test: list[int] = []
    for name in sorted(members, key=_order):
        group = members[name]
        touched, counts = np.unique([place[labels[p]] for p in group], return_counts=True)
        after = held[touched] + counts
        if ((after - wanted[touched]) ** 2).sum() < ((held[touched] - wanted[touched]) ** 2).sum():
            held[touched] = after
            test += group
    chosen = set(test)
    return [i for p, i in enumerate(indices) if p not in chosen], [indices[p] for p in sorted(chosen)]


def _order(name: str) -> tuple[bytes, str]:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), name
