"""Images that look alike: 64 bits an image, and groups of images that differ in few of them."""

import hashlib
from contextlib import suppress

import numpy as np
from PIL import Image

from underpaint.console import progress
from underpaint.data.decode import MAX_PIXELS, Unreadable, decode
from underpaint.data.parallel import ordered_map, spare_workers
from underpaint.data.sources.base import Source, cache_root
from underpaint.data.sources.index import Indices
from underpaint.files import replacing

NEAR = 2  # differing bits of 64
BANDS = ((0, 21), (21, 21), (42, 22))  # two hashes that differ in at most 2 bits agree in at least one of 3 bands
CHUNK = 32
NONE = 0  # the hash of an image of one colour, or of one that cannot be read: it is like no other


def difference_hash(pixels: np.ndarray) -> int:
    """64 bits: whether each of 8 x 8 places of an image [h, w, c] is brighter than its right neighbour; NONE for an image
    of one colour."""
    grey = pixels.mean(axis=2, dtype=np.float32)
    if pixels.dtype != np.uint8:  # 12 bit in 16, or any units
        grey -= grey.min()
        grey *= 255 / max(float(grey.max()), 1e-30)
    small = np.asarray(Image.fromarray(grey).resize((9, 8), Image.Resampling.BICUBIC))
    if small.max() - small.min() < 1:
        return NONE
    return int(np.packbits(small[:, :-1] > small[:, 1:]).view(">u8")[0]) or 1


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


class _Hashes:
    """The hashes of the n-th chunk of some images."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source = source
        self._indices = indices

    def __call__(self, chunk: int) -> list[int]:
        found = []
        for index in self._indices[chunk * CHUNK : (chunk + 1) * CHUNK].tolist():
            try:
                pixels = decode(self._source.read(index), channels=None, max_pixels=MAX_PIXELS, reduce_to=16)
                found.append(difference_hash(pixels))
            except Unreadable:
                found.append(NONE)
        return found


def hashes_of(source: Source, indices: Indices) -> np.ndarray:
    """[n] uint64, NONE for what is like no other; kept in the cache by the source's fingerprint."""
    chosen = np.asarray(indices, np.int64)
    key = hashlib.sha256(source.fingerprint().encode() + chosen.astype("<i8").tobytes()).hexdigest()
    file = cache_root() / "alike" / f"{key[:32]}.npy"
    with suppress(OSError, ValueError):
        stored = np.load(file)
        if stored.dtype == np.uint64 and stored.shape == chosen.shape:
            return stored
    chunks = range(-(-len(chosen) // CHUNK))
    made = ordered_map(_Hashes(source, chosen), chunks, spare_workers(len(chosen)))
    rows = progress(made, "looking for images that are alike, of 32", len(chunks))
    found = np.array([each for row in rows for each in row], np.uint64)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial, partial.open("wb") as opened:
            np.save(opened, found)
    return found


def near_copies(source: Source, indices: Indices, other: Source, judged: Indices) -> np.ndarray:
    """Which entries `indices` of `source` look like one of the entries `judged` of `other`, or like one before them."""
    chosen, apart = np.asarray(indices, np.int64), np.asarray(judged, np.int64)
    hashes = np.concatenate([hashes_of(other, apart), hashes_of(source, chosen)])
    known = np.flatnonzero(hashes != NONE)
    surplus = [p for group in near_groups(hashes[known]) for p in sorted(group)[1:]]
    positions = known[np.array(surplus, np.int64)] - len(apart)
    return np.sort(chosen[positions[positions >= 0]])
