"""Predictions in the formats that other tools read back, written as they come."""

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import yaml
from jaxtyping import UInt8
from skimage.measure import approximate_polygon, find_contours

from underpaint.data.annotations import CocoImage, CocoObject, mask_of
from underpaint.files import replacing, utf8, write_text

TOLERANCE = 0.5  # pixels by which an outline may leave the border of its mask


@dataclass
class Written:
    """What was said of images, for the page beside it.

    Attributes:
        images: that there were.
        heads, rows: of a table that sums it up.
        files: what was written, and what it holds.
        picture: of some of the images, a file beside.
    """

    images: int
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    files: Mapping[str, str]
    picture: str


class Places:
    """Where the file of an image goes: its own path with another suffix. Images that differ by their suffix alone keep it,
    so that none is written over."""

    def __init__(self, names: Iterable[str], suffix: str):
        self.suffix = suffix
        self.stems = Counter(str(_inside(name).with_suffix("")) for name in names)

    def __call__(self, name: str) -> Path:
        path = _inside(name)
        alone = self.stems[str(path.with_suffix(""))] < 2
        return path.with_suffix(self.suffix) if alone else path.with_name(path.name + self.suffix)


def _inside(name: str) -> Path:
    """A path of an archive without a way out of the folder."""
    return Path(*[part for part in PurePosixPath(name).parts if part not in ("..", "/", ".")])


def labels_place(path: Path) -> Path:
    """Where YOLO looks for the labels of images: labels/ in place of the last images/, or else above."""
    parts = list(path.parts)
    if "images" not in parts[:-1]:
        return Path("labels", path)
    last = len(parts) - 2 - parts[-2::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :])


@contextmanager
def coco_file(
    path: Path, categories: Mapping[int, str]
) -> Generator[Callable[[CocoImage, Sequence[CocoObject]], None], None, None]:
    """What adds an image and its objects to a COCO file, which is there when all of them are. Objects are written as they
    come; only the list of images is held."""
    listed: list[CocoImage] = []
    count = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"annotations": [')

        def add(image: CocoImage, objects: Sequence[CocoObject]) -> None:
            nonlocal count
            listed.append(image)
            for one in objects:
                count += 1
                file.write(
                    f"{',' if count > 1 else ''}\n{json.dumps({'id': count, 'iscrowd': 0, 'area': area(one), **one})}"
                )

        yield add
        named = [{"id": number, "name": name} for number, name in categories.items()]
        file.write(f'\n], "images": {json.dumps(listed)}, "categories": {json.dumps(named)}}}\n')


def area(one: CocoObject) -> float:
    """Pixels of an object's mask, or of its box."""
    if "segmentation" not in one:
        return one["bbox"][2] * one["bbox"][3]
    from faster_coco_eval import mask  # it is slow to import

    return float(mask.area(one["segmentation"]))  # pyright: ignore[reportArgumentType] -- narrower than what it takes


def write_yolo(path: Path, objects: Sequence[CocoObject], numbers: Mapping[int, int], image: CocoImage) -> None:
    """A line an object: the number of its class, then centre, width and height of its box, or the corners of the outline of
    its mask, as shares of the image. An image without objects has an empty file, as it is meant.

    Args:
        numbers: of the classes from 0 on, by COCO's categories.
    """
    height, width = image["height"], image["width"]
    lines = []
    for one in objects:
        left, top, wide, tall = one["bbox"]
        if "segmentation" in one:
            mask = mask_of(one["segmentation"], height, width)
            corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * [wide, tall] + [left, top]
            shares = (outline(mask) if mask.any() else corners) / [width, height]
        else:
            shares = np.array([left + wide / 2, top + tall / 2, wide, tall]) / [width, height, width, height]
        said = " ".join(f"{share:.6g}" for share in shares.clip(0, 1).reshape(-1).tolist())
        lines.append(f"{numbers[one['category_id']]} {said}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))


def outline(mask: UInt8[np.ndarray, "h w"]) -> np.ndarray:
    """The corners [n, 2] (x, y in pixels) of the longest border of a mask that is not empty: YOLO has one a line."""
    longest = max(find_contours(np.pad(mask, 1).astype(float), 0.5), key=len)
    points = approximate_polygon(longest, TOLERANCE)[:-1, ::-1] - 0.5  # of padded pixels, from their centres
    return points if len(points) >= 3 else longest[:-1, ::-1] - 0.5


def write_data_yaml(path: Path, names: Sequence[str]) -> None:
    """The names of YOLO's classes, beside labels/."""
    told = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(map(utf8, names)))}
    write_text(path, yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
