"""Masks that lie beside their images: told by names, and then by what a sample of them holds."""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from underpaint.data.decode import Unreadable, decode, read_header
from underpaint.errors import InputError

WORDS = re.compile(r"(.+?)[-_. ](masks?|labels?|gt|seg|segmentation|ground_?truth)([-_ ]?\d+)?$", re.IGNORECASE)
LOSSLESS = (
    "gif",
    "png",
    "bmp",
    "tif",
    "tiff",
)  # what a mask of class numbers is kept in; of two, the first is the mask
LOOKED_AT = 24  # of the files that may be masks in one way
NEEDED = 0.9  # share of these that must look like masks
FEW = 64  # values, or colours, that a mask has at most
EXTREME, EXTREMES = 16, 0.98  # a blurred mask: nearly all pixels are so near to black or white
SAME = 0.95  # correlation from which on two files are one picture, and neither is a mask


class Beside(NamedTuple):
    """Files that may be masks of images, in one way of being named."""

    kind: str  # "png beside jpg", or "_mask"
    images: dict[str, str]  # the image of each


def beside(names: Sequence[str]) -> list[Beside]:
    """What names say: `part_mask.png` beside `part.jpg` (`_label`, `_gt`, ...), and `part.png` beside `part.jpg`."""
    found: dict[str, dict[str, str]] = {}
    worded: dict[str, list[str]] = {}  # by the stem of the image
    suffixes: Counter[str] = Counter()
    for name in names:
        stem, _, suffix = name.rpartition(".")
        suffixes[suffix.lower()] += 1
        match = WORDS.match(stem)
        if match:
            worded.setdefault(match.group(1), []).append(name)
    taken = set()
    if worded:
        for name in names:
            for mask in worded.get(name.rpartition(".")[0], ()):
                word = WORDS.match(mask.rpartition(".")[0])
                assert word is not None
                if mask not in taken:
                    found.setdefault(f"_{word.group(2).lower()}", {})[mask] = name
                    taken.add(mask)
    if len(suffixes) > 1:
        common = suffixes.most_common(1)[0][0]
        ranks = {suffix: LOSSLESS.index(suffix) if suffix in LOSSLESS else len(LOSSLESS) for suffix in suffixes}
        rare: dict[str, list[str]] = {}  # no more than half of the names, whatever the others are
        for name in names:
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() != common and name not in taken:
                rare.setdefault(stem, []).append(name)
        for name in names if rare else ():
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() != common or name in taken:
                continue
            for other in rare.get(stem, ()):
                mask, image, own, its = name, other, common, other.rpartition(".")[2].lower()
                if ranks[its] < ranks[own]:
                    mask, image, own, its = other, name, its, own
                if ranks[own] < len(LOSSLESS) and own != its:
                    found.setdefault(f"{own} beside {its}", {})[mask] = image
    return [Beside(kind, found[kind]) for kind in sorted(found)]


def masks_beside(names: Sequence[str], read: Callable[[str], bytes], notes: list[str]) -> set[str]:
    """Those of `names` that are masks of others: the names say so, and `NEEDED` of the `LOOKED_AT` that are read do."""
    masks: set[str] = set()
    for kind, images in beside(names):
        ordered = sorted(images)
        places = np.linspace(0, len(ordered) - 1, min(LOOKED_AT, len(ordered))).round().astype(int)
        seen = [looks_like_mask(read, ordered[place], images[ordered[place]]) for place in places.tolist()]
        known = [each for each in seen if each is not None]
        example = f"{ordered[0]} of {images[ordered[0]]}"
        if known and sum(known) >= NEEDED * len(known):
            masks.update(ordered)
            notes.append(
                f"masks beside images: {len(ordered):,} files ({kind}: {example}) have their images' size and few "
                "values, so they are masks and not read as images; --set data.masks=images reads them"
            )
        else:
            notes.append(
                f"{len(ordered):,} files ({kind}: {example}) are named like masks and are read as images: "
                f"{sum(known)} of {len(known)} that were looked at have their images' size and the few values of a mask"
            )
    return masks


def looks_like_mask(read: Callable[[str], bytes], mask: str, image: str) -> bool | None:
    """Whether a file holds a mask of an image; None where one of them cannot be read."""
    try:
        data, shown = read(mask), read(image)
        one, other = read_header(data), read_header(shown)
        if sorted((one.height, one.width)) != sorted((other.height, other.width)):
            return False
        pixels = decode(data, channels=None)
    except (Unreadable, OSError, InputError):  # InputError of a damaged archive
        return None
    if pixels.shape[2] == 1 or (pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all()):
        values, counts = np.unique(pixels[..., 0], return_counts=True)
        if len(values) <= FEW:
            return True
        extreme = (values <= EXTREME) | (values >= 255 - EXTREME)
        return pixels.dtype == np.uint8 and counts[extreme].sum() >= EXTREMES * counts.sum()
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        return False
    packed = pixels.astype(np.uint32) @ np.array([1, 256, 65_536], np.uint32)
    return len(np.unique(packed)) <= FEW and not _same_picture(data, shown)


def _same_picture(one: bytes, other: bytes) -> bool:
    """Whether two files are the same picture saved twice, as a drawing of few colours may be."""
    small = []
    for data in (one, other):
        with Image.open(io.BytesIO(data)) as picture:
            small.append(np.asarray(picture.convert("L").resize((16, 16)), np.float32).reshape(-1))
    with np.errstate(invalid="ignore"):  # of one colour
        return bool(np.corrcoef(small)[0, 1] > SAME)
