"""What would be read from DATA and how it was understood; no training."""

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from underpaint.data.decode import MAX_PIXELS, Unreadable, decode, read_header
from underpaint.data.images import measure_scaling, resize
from underpaint.data.open import open_source
from underpaint.data.parallel import ordered_map, spare_workers
from underpaint.data.sources.base import Source
from underpaint.data.splits import pretraining_indices

HASHED = 100_000  # images compared for near-duplicates
NEAR = 2  # differing bits of 64
CHUNK = 32
BANDS = ((0, 21), (21, 21), (42, 22))  # two hashes that differ in at most 2 bits agree in at least one of 3 bands


def check(
    data: str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    groups: str | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Read every image of DATA once and describe the set.

    Returns:
        `location`, `notes`; `images` and `readable` (counts); `height`, `width` (min, median, max in pixels);
        `channels`, `dtypes`, `splits` (counts by value; "none" for no split); `scaling` (lines on how values would
        become 0 to 1, none where all is 8 bit); `classes` (images by class name);
        `unreadable` and `left_out` ({"path", "reason"}); `duplicates` and `near_duplicates` (groups of names with the
        same bytes, or with difference hashes at most 2 of 64 bits apart), `duplicates_across_splits` and
        `near_duplicates_across_splits` (how many of those groups), `compared` (images hashed for likeness), `flat`
        (names of images of one colour, which look alike to no other).

    Raises:
        InputError: as `open_source`.
    """
    source = open_source(data, groups=groups)
    entries, numbers = source.entries, range(math.ceil(len(source.entries) / CHUNK))
    workers = workers or spare_workers(len(entries))
    chunks = ordered_map(_Examine(source, max_pixels), numbers, workers)
    seen = dict(enumerate(result for results in chunks for result in results))
    names = entries.names
    known = {index: result for index, result in seen.items() if not isinstance(result, str)}
    channels = Counter(str(count) for _, count, _, _, _ in known.values())
    dtypes = Counter(dtype for _, _, dtype, _, _ in known.values())
    digests: dict[bytes, list[int]] = {}
    for index, (_, _, _, digest, _) in known.items():
        digests.setdefault(digest, []).append(index)
    same = [group for group in digests.values() if len(group) > 1]
    copies = {i for group in same for i in group[1:]}
    hashes = dict([(i, bits) for i, (*_, bits) in known.items() if bits is not None][:HASHED])
    numbers = [i for i in hashes if i not in copies]
    near = near_groups(np.asarray([hashes[i] for i in numbers], dtype=np.uint64))
    near = [[numbers[p] for p in group] for group in near]
    heights, widths = ([size[axis] for size, *_ in known.values()] for axis in (0, 1))
    classes = source.classes or []
    labels = np.bincount(entries.labels[entries.labels >= 0], minlength=len(classes)).tolist()
    return {
        "location": source.location,
        "notes": source.notes,
        "images": len(source.entries),
        "readable": len(known),
        "height": _range(heights),
        "width": _range(widths),
        "channels": dict(channels),
        "dtypes": dict(dtypes),
        "scaling": _scaling(source, channels, dtypes, max_pixels),
        "splits": {split or "none": count for split, count in entries.counts().items()},
        "classes": {name: labels[n] for n, name in enumerate(classes)},
        "unreadable": [{"path": names[i], "reason": why} for i, why in seen.items() if isinstance(why, str)],
        "left_out": source.skipped,
        "duplicates": _names(source, same),
        "duplicates_across_splits": _across(source, same),
        "near_duplicates": _names(source, near),
        "near_duplicates_across_splits": _across(source, near),
        "compared": len(hashes),
        "flat": [names[i] for i, (*_, bits) in known.items() if bits is None],
    }


def format_check(result: dict[str, Any]) -> str:
    """The result of `check` as text for people."""
    lines = [result["location"], *(f"  {note}" for note in result["notes"])]
    lines.append(f"  readable: {result['readable']:,} of {result['images']:,}")
    for name in ("height", "width"):
        if result[name]:
            low, middle, high = result[name]
            lines.append(f"  {name}: {low} to {high} pixels, median {middle:g}")
    for name in ("channels", "dtypes"):
        lines.append(f"  {name}: " + ", ".join(f"{key} ({count:,})" for key, count in result[name].items()))
    lines += [f"  {line}" for line in result["scaling"]]
    classes = result["classes"]
    if classes:
        counts = sorted(classes.values())
        lines.append(f"  images a class: {counts[0]:,} to {counts[-1]:,}")
        shown = sorted(classes.items(), key=lambda item: -item[1])[:20]
        lines += [f"    {name}: {count:,}" for name, count in shown]
        lines += [f"    and {len(classes) - 20} more classes"] if len(classes) > 20 else []
    for key, title in (("unreadable", "cannot be read"), ("left_out", "left out")):
        skips = result[key]
        lines.append(f"  {title}: {len(skips):,}")
        lines += [f"    {skip['path']}: {skip['reason']}" for skip in skips[:10]]
        lines += [f"    and {len(skips) - 10:,} more"] if len(skips) > 10 else []
    lines.append(f"  of one colour: {len(result['flat']):,}")
    for key, title in (("duplicates", "same bytes"), ("near_duplicates", "look alike")):
        groups, across = result[key], result[f"{key}_across_splits"]
        lines.append(f"  {title}: {len(groups):,} groups, {across:,} of them across splits")
        lines += ["    " + ", ".join(group[:4]) + (", ..." if len(group) > 4 else "") for group in groups[:5]]
        lines += [f"    and {len(groups) - 5:,} more"] if len(groups) > 5 else []
    if result["compared"] < result["readable"] - len(result["flat"]):
        lines.append(f"  (only the first {result['compared']:,} images were compared for likeness)")
    return "\n".join(lines)


def difference_hash(grey: np.ndarray) -> int | None:
    """64 bits: whether each of 8 x 8 places is brighter than its right neighbour; None for an image of one colour."""
    small = resize(grey.astype(np.float32), (8, 9))[..., 0]
    if small.max() - small.min() < 1 / 255:
        return None
    return int(np.packbits(small[:, :-1] > small[:, 1:]).view(">u8")[0])


def near_groups(hashes: np.ndarray, bits: int = NEAR) -> list[list[int]]:
    """Groups of positions whose 64-bit hashes are chained by steps of at most `bits` (0 to 2) differing bits."""
    unique, inverse = np.unique(hashes, return_inverse=True)
    parent = list(range(len(unique)))

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for start, length in BANDS:
        band = (unique >> np.uint64(start)) & np.uint64(2**length - 1)
        order = np.argsort(band, kind="stable")
        edges = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(order, edges):
            for place, first in enumerate(bucket[:-1]):
                others = bucket[place + 1 :]
                close = others[np.bitwise_count(unique[others] ^ unique[first]) <= bits]
                for other in close.tolist():
                    parent[root(other)] = root(int(first))
    groups: dict[int, list[int]] = {}
    for position, n in enumerate(inverse.tolist()):
        groups.setdefault(root(n), []).append(position)
    return [group for group in groups.values() if len(group) > 1]


class _Examine:
    """Size, channels, type, digest and difference hash of the n-th chunk of entries, or the reason why not."""

    def __init__(self, source: Source, max_pixels: int):
        self._source = source
        self._max_pixels = max_pixels

    def __call__(self, chunk: int) -> list[tuple[tuple[int, int], int, str, bytes, int | None] | str]:
        stretch = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self._source.entries)))
        results: list[tuple[tuple[int, int], int, str, bytes, int | None] | str] = []
        for index in stretch:
            try:
                results.append(self._one(index))
            except Unreadable as error:
                results.append(str(error))
        return results

    def _one(self, index: int) -> tuple[tuple[int, int], int, str, bytes, int | None]:
        data = self._source.read(index)
        header = read_header(data, max_pixels=self._max_pixels)
        # a reduced JPEG is still read to its end, so that truncation is found
        pixels = decode(data, channels=None, max_pixels=self._max_pixels, reduce_to=16)
        grey = pixels.mean(axis=2, keepdims=True, dtype=np.float32)
        if pixels.dtype != np.uint8:  # 12 bit in 16, or any units
            spread = grey.max() - grey.min()
            grey = (grey - grey.min()) / (spread if spread > 0 else 1)
        else:
            grey /= 255
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return (header.height, header.width), header.channels, header.dtype, digest, difference_hash(grey)


def _scaling(source: Source, channels: Counter[str], dtypes: Counter[str], max_pixels: int) -> list[str]:
    """How pretraining would scale these images, in their own number of channels, where they are not plain 8 bit."""
    if set(dtypes) <= {"uint8"}:
        return []
    found, notes = measure_scaling(
        source,
        pretraining_indices(source),
        size=(224, 224),
        channels=int(channels.most_common(1)[0][0]),
        max_pixels=max_pixels,
    )
    return [] if found.plain else [str(found), *notes]


def _range(values: list[int]) -> tuple[int, float, int] | None:
    return (min(values), float(np.median(values)), max(values)) if values else None


def _names(source: Source, groups: list[list[int]]) -> list[list[str]]:
    return [[source.entries.names[i] for i in group] for group in groups]


def _across(source: Source, groups: list[list[int]]) -> int:
    return sum(len(np.unique(source.entries.splits[group])) > 1 for group in groups)
