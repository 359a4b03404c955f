"""What people drew on their images: index masks and COCO annotations, beside the images of a folder or archive."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from underpaint.data.sources import Source
from underpaint.errors import InputError

MASK_FOLDERS = ("masks", "semantic", "labels")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")


@dataclass
class Answers:
    """The files of a data set by name, and how to read one."""

    names: list[str]
    read: Callable[[str], bytes]


def open_answers(data: str | Path) -> Answers:
    """Every file of a folder, .zip or .tar.

    Raises:
        InputError: data of another kind, which holds images alone.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        return Answers(names, lambda name: (path / name).read_bytes())
    if path.is_file() and zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        return Answers(sorted(archive.namelist()), archive.read)
    if path.is_file() and tarfile.is_tarfile(path):
        members = tarfile.open(path)  # noqa: SIM115  # open as long as it is read from

        def read(name: str) -> bytes:
            file = members.extractfile(name)
            assert file is not None
            return file.read()

        return Answers(sorted(members.getnames()), read)
    raise InputError(f"{data}: masks and boxes are read from a folder, .zip or .tar only")


@dataclass
class Masks:
    """An index mask for some images of a source.

    Attributes:
        names: of the mask of each image that has one, by the image's number in the source.
        classes: names of the indices, as far as they are known.
    """

    names: dict[int, str]
    classes: list[str]
    ignore: int | None  # as classes.json says
    read: Callable[[str], bytes]

    def __getitem__(self, index: int) -> np.ndarray:
        """[height, width] whole numbers.

        Raises:
            InputError: not an index mask.
        """
        name = self.names[index]
        with Image.open(io.BytesIO(self.read(name))) as picture:
            if picture.mode not in ("L", "P", "1", "I", "I;16"):
                raise InputError(f"{name} is {picture.mode}, not an index mask: one channel of class numbers (PNG)")
            return np.array(picture).astype(np.int64)


def masks_of(data: str | Path, source: Source) -> Masks:
    """Masks below masks/ (or semantic/), with the split folders of images/ or without, by equal stems.

    Raises:
        InputError: there are none.
    """
    answers = open_answers(data)
    by_place: dict[str, str] = {}
    for name in answers.names:
        path = PurePosixPath(name)
        folders = [part.lower() for part in path.parts[:-1]]
        kind = next((folder for folder in MASK_FOLDERS if folder in folders), None)
        if kind is None or path.suffix.lower() not in MASK_SUFFIXES or path.name.startswith("."):
            continue
        rest = path.parts[folders.index(kind) + 1 : -1]
        by_place.setdefault("/".join((*rest, path.stem)), name)
    found: dict[int, str] = {}
    for index, entry in enumerate(source.entries):
        path = PurePosixPath(entry.name)
        parts = list(path.parts[:-1])
        below = (
            parts[[part.lower() for part in parts].index("images") + 1 :] if "images" in map(str.lower, parts) else []
        )
        name = by_place.get("/".join((*below, path.stem))) or by_place.get(path.stem)
        if name is not None:
            found[index] = name
    if not found:
        raise InputError(f"{data}: no masks; expected index PNGs below masks/ with the names of the images")
    classes, ignore = _classes(answers)
    return Masks(found, classes, ignore, answers.read)


def _classes(answers: Answers) -> tuple[list[str], int | None]:
    """Names by index, and the index to be ignored where it is said, from classes.json: a list of names or of objects
    with a name (and an index), or a mapping from one to the other; or an object with these under `classes`.

    Raises:
        InputError: it is something else.
    """
    for wanted in ("classes.json", "semantic_classes.json"):
        file = next((name for name in answers.names if PurePosixPath(name).name == wanted), None)
        if file is None:
            continue
        try:
            known: Any = json.loads(answers.read(file))
            ignore = known.pop("ignore_index", None) if isinstance(known, dict) else None
            known = known.get("classes", known) if isinstance(known, dict) else known
            if isinstance(known, dict):
                pairs = [(int(k), str(v)) if str(k).isdigit() else (int(v), str(k)) for k, v in known.items()]
            else:
                named = [item if isinstance(item, dict) else {"name": item} for item in known]
                pairs = [(int(item.get("index", k)), str(item["name"])) for k, item in enumerate(named)]
            names = dict(pairs)
            return [names.get(k, str(k)) for k in range(max(names) + 1)], None if ignore is None else int(ignore)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file} does not name classes ({type(error).__name__}: {error}); expected a list of names, by index"
            ) from error
    return [], None


@dataclass
class Objects:
    """The annotated objects of an image: boxes in pixels (left, top, right, bottom)."""

    boxes: np.ndarray  # [k, 4] float
    labels: np.ndarray  # [k] category ids, as in the file
    crowd: np.ndarray  # [k] bool
    segments: list[Any]  # polygons, or either RLE form, as in the file; None where there is no mask


@dataclass
class Detections:
    """COCO annotations of a split.

    Attributes:
        coco: the file as it is, for the COCO measure.
        images: COCO image id of each entry of the source that it lists.
        categories: names by category id.
    """

    coco: dict[str, Any]
    images: dict[int, int]
    categories: dict[int, str]

    def objects(self, index: int) -> Objects:
        found = self._by_image.get(self.images[index], [])
        boxes = np.array([a["bbox"] for a in found], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return Objects(
            boxes,
            np.array([a["category_id"] for a in found], int),
            np.array([bool(a.get("iscrowd", 0)) for a in found], bool),
            [a.get("segmentation") or None for a in found],
        )

    def __post_init__(self) -> None:
        self._by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in self.coco["annotations"]:
            self._by_image.setdefault(annotation["image_id"], []).append(annotation)


def detections_of(data: str | Path, source: Source) -> dict[str, Detections]:
    """By split, the COCO annotations below annotations/.

    Raises:
        InputError: there are none; a box outside its image, or without area; an object of no known category.
    """
    answers = open_answers(data)
    entries: dict[tuple[str | None, str], int] = {}
    for index, entry in enumerate(source.entries):
        entries[(entry.split, PurePosixPath(entry.name).name)] = index
    found: dict[str, Detections] = {}
    for name in answers.names:
        path = PurePosixPath(name)
        stem = path.stem.lower().removeprefix("instances_").rstrip("0123456789")
        split = {"valid": "val", "validation": "val"}.get(stem, stem)
        if (
            path.parent.name.lower() != "annotations"
            or path.suffix.lower() != ".json"
            or split not in ("train", "val", "test")
        ):
            continue
        try:
            coco = json.loads(answers.read(name))
            categories = {int(c["id"]): str(c["name"]) for c in coco["categories"]}
            listed = {int(image["id"]): image for image in coco["images"]}
            annotations = coco["annotations"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{name} is not COCO json ({type(error).__name__}: {error})") from error
        for annotation in annotations:
            _check(annotation, listed, categories, name)
        places = {}
        for number, image in listed.items():
            index = entries.get((split, PurePosixPath(image["file_name"]).name))
            if index is not None:
                places[index] = number
        found[split] = Detections(coco, places, categories)
    if not found:
        raise InputError(f"{data}: no boxes; expected COCO json: annotations/train.json and val.json or test.json")
    return found


def _check(annotation: dict[str, Any], images: dict[int, Any], categories: dict[int, str], name: str) -> None:
    image = images.get(annotation.get("image_id", -1))
    where = f"{name}: annotation {annotation.get('id')}"
    if image is None:
        raise InputError(f"{where} belongs to image {annotation.get('image_id')}, which is not listed")
    if annotation.get("category_id") not in categories:
        raise InputError(f"{where} has category {annotation.get('category_id')}, which is not listed")
    left, top, width, height = annotation["bbox"]
    if width <= 0 or height <= 0:
        raise InputError(f"{where} ({image['file_name']}) has a box of {width} x {height} px; both must be above 0")
    if left < -1 or top < -1 or left + width > image["width"] + 1 or top + height > image["height"] + 1:
        raise InputError(
            f"{where} ({image['file_name']}) has a box that reaches ({left + width:g}, {top + height:g}), outside the "
            f"image of {image['width']}x{image['height']}"
        )
