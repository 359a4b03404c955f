"""Images that look alike: 64 bits an image find candidates, small grey pictures of them decide."""

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
SIDE = 16  # pixels of the small pictures
SAME = 0.96  # correlation of two of them from which on they are alike
NONE = 0  # the hash of an image of one colour, or of one that cannot be read: it is like no other


def look_of(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """The hash of an image [h, w, c], 64 bits: whether each of 8 x 8 places is brighter than its right neighbour, NONE for
    an image of one colour; and a small grey picture of it, [256] uint8."""
    grey = pixels.mean(axis=2, dtype=np.float32)
    if pixels.dtype != np.uint8:  # 12 bit in 16, or any units
        grey -= grey.min()
        grey *= 255 / max(float(grey.max()), 1e-30)
    whole = Image.fromarray(grey)
    picture = np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BOX)).clip(0, 255).astype(np.uint8).reshape(-1)
    small = np.asarray(whole.resize((9, 8), Image.Resampling.BICUBIC))
    if small.max() - small.min() < 1:
        return NONE, picture
    return int(np.packbits(small[:, :-1] > small[:, 1:]).view(">u8")[0]) or 1, picture


def alike_groups(hashes: np.ndarray, pictures: np.ndarray) -> list[list[int]]:
    """Groups of positions: of those that the hashes chain, each joins the first before it that it correlates with by
    `SAME`.

    Args:
        pictures: [n, 256], as `look_of` makes them.
    """
    found = []
    for group in near_groups(hashes):
        values = pictures[group].astype(np.float32)
        values -= values.mean(axis=1, keepdims=True)
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)
        first: list[int] = []  # of each group, its place in `values`
        members: list[list[int]] = []
        for place, position in enumerate(group):
            close = np.flatnonzero(values[first] @ values[place] >= SAME) if first else np.zeros(0, int)
            if len(close):
                members[int(close[0])].append(position)
            else:
                first.append(place)
                members.append([position])
        found += [each for each in members if len(each) > 1]
    return found


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


class _Looks:
    """Hash and small picture of each image of the n-th chunk of some."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source = source
        self._indices = indices

    def __call__(self, chunk: int) -> list[tuple[int, np.ndarray]]:
        found = []
        for index in self._indices[chunk * CHUNK : (chunk + 1) * CHUNK].tolist():
            try:
                pixels = decode(self._source.read(index), channels=None, max_pixels=MAX_PIXELS, reduce_to=16)
                found.append(look_of(pixels))
            except Unreadable:
                found.append((NONE, np.zeros(SIDE * SIDE, np.uint8)))
        return found


def looks_of(source: Source, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, [n] uint64, NONE for what is like no other, and small pictures, [n, 256]; kept in the cache by the source's
    fingerprint."""
    chosen = np.asarray(indices, np.int64)
    key = hashlib.sha256(source.fingerprint().encode() + chosen.astype("<i8").tobytes()).hexdigest()
    file = cache_root() / "alike" / f"{key[:32]}.npy"
    with suppress(OSError, ValueError):
        stored = np.load(file)
        if stored.dtype == np.uint8 and stored.shape == (len(chosen), 8 + SIDE * SIDE):
            return stored[:, :8].copy().view(np.uint64).reshape(-1), stored[:, 8:]
    chunks = range(-(-len(chosen) // CHUNK))
    made = ordered_map(_Looks(source, chosen), chunks, spare_workers(len(chosen)))
    rows = [each for row in progress(made, "looking for images that are alike", len(chunks)) for each in row]
    hashes = np.array([bits for bits, _ in rows], np.uint64)
    pictures = np.array([picture for _, picture in rows], np.uint8).reshape(-1, SIDE * SIDE)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial, partial.open("wb") as opened:
            np.save(opened, np.concatenate([hashes.view(np.uint8).reshape(-1, 8), pictures], axis=1))
    return hashes, pictures


def near_copies(source: Source, indices: Indices, other: Source, judged: Indices) -> np.ndarray:
    """Which entries `indices` of `source` look like one of the entries `judged` of `other`, or like one before them."""
    chosen, apart = np.asarray(indices, np.int64), np.asarray(judged, np.int64)
    parts = looks_of(other, apart), looks_of(source, chosen)
    hashes, pictures = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
    known = np.flatnonzero(hashes != NONE)
    surplus = [p for group in alike_groups(hashes[known], pictures[known]) for p in sorted(group)[1:]]
    positions = known[np.array(surplus, np.int64)] - len(apart)
    return np.sort(chosen[positions[positions >= 0]])
