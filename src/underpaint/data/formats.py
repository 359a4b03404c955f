"""Boxes and outlines in the formats of Pascal VOC (xml), LabelMe (json) and YOLO (txt), as COCO has them.

A few lines each, since what reads them elsewhere (supervision, datumaro) brings OpenCV and much else, and stops at the
first file that is damaged. Each reader gives objects in pixels; from there on all formats are one.
"""

import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from underpaint.data.sources.base import Source
from underpaint.data.sources.names import folders_of, is_hidden, may_be_one
from underpaint.errors import InputError
from underpaint.reading import one_line, plain_json, plain_yaml

LARGEST_TEXT = 2**26  # bytes of a file; LabelMe's may hold their image
MOST_OBJECTS, MOST_POINTS = 100_000, 100_000  # of an image, and of an outline
FARTHEST = 1e6  # pixels from the corner
NAMES = {"classes.txt", "_classes.txt", "obj.names", "classes.names", "predefined_classes.txt"}  # of YOLO's classes
CIRCLE = 32  # corners of a circle
LOOKED_AT = 20  # text files that must be read to know that they are YOLO's

Size = tuple[int, int]  # height, width


class Drawn(NamedTuple):
    """An object of an image."""

    name: str  # of its class
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    outline: list[float] | None = None  # x, y, x, y, ...
    crowd: bool = False  # not asked for, and not wrong where it is found


@dataclass
class Parsed:
    """What a file says of an image: the size that it was drawn on, where it says one, objects, and what is none."""

    size: Size | None
    objects: list[Drawn]
    unusable: list[str] = field(default_factory=list)  # why, of each


def read_voc(data: bytes) -> Parsed:
    """Pascal VOC: corners count from 1, both ends included; an object that is `difficult` is not asked for.

    Raises:
        ValueError: it is something else.
    """
    text = data.decode("utf-8-sig")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # a few lines of these stand for gigabytes, or for other files
        raise ValueError("has a document type, which is not read")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"not xml: {one_line(error)}") from error
    if root.tag != "annotation":
        raise ValueError(f"not of Pascal VOC: it begins with <{root.tag[:40]}>, not <annotation>")
    height, width = (_number(root.findtext(f"size/{side}") or 0) for side in ("height", "width"))
    parsed = Parsed((int(height), int(width)) if height > 0 and width > 0 else None, [])
    for item in root.iterfind("object"):
        try:
            corners = [_number(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            name = (item.findtext("name") or "").strip()
            if not name:
                raise ValueError("an object without a name")
        except ValueError as error:
            parsed.unusable.append(one_line(error))
            continue
        crowd = (item.findtext("difficult") or "").strip() == "1"
        parsed.objects.append(Drawn(name, (corners[0] - 1, corners[1] - 1, corners[2], corners[3]), None, crowd))
    return parsed


def read_labelme(data: bytes) -> Parsed:
    """LabelMe: polygons, rectangles and circles; points and lines are no objects.

    Raises:
        ValueError: it is something else.
    """
    found = plain_json(data)
    if not isinstance(found, dict) or not isinstance(found.get("shapes"), list):
        raise ValueError("not of LabelMe: no list 'shapes'")
    height, width = (found.get(f"image{side}") for side in ("Height", "Width"))
    sized = isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0
    parsed = Parsed((height, width) if sized else None, [])  # type: ignore[arg-type]
    for shape in found["shapes"]:
        try:
            kind, name = str(shape.get("shape_type") or "polygon"), str(shape["label"])
            points = np.array([[_number(x), _number(y)] for x, y in shape["points"][:MOST_POINTS]], float).reshape(
                -1, 2
            )
            if kind == "circle" and len(points) == 2:
                turns = np.linspace(0, 2 * np.pi, CIRCLE, endpoint=False)
                radius = math.dist(*points.tolist())
                points = points[0] + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)
            elif kind == "rectangle" and len(points) >= 2:
                (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
                points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
            elif kind != "polygon" or len(points) < 3:
                raise ValueError(f"a shape of kind {kind!r} with {len(points)} points is no object with an area")
            parsed.objects.append(_outlined(name, points))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            parsed.unusable.append(one_line(error) or type(error).__name__)
    return parsed


def read_yolo(data: bytes, size: Size, names: Sequence[str]) -> Parsed:
    """YOLO: a line an object, of its class number and centre, width and height (or the corners of its outline), as shares
    of the image.

    Raises:
        ValueError: it is something else.
    """
    parsed = Parsed(size, [])
    scale = np.array([size[1], size[0]], float)
    lines = [line.split() for line in data.decode("utf-8-sig").splitlines()]
    for words in lines:
        if not words:
            continue
        try:
            number, values = int(words[0]), [_number(word) for word in words[1 : 2 * MOST_POINTS + 1]]
            if not 0 <= number < 100_000:
                raise ValueError(f"class {number}")
            if max(map(abs, values), default=0) > 100:
                raise ValueError("numbers that are no shares of an image")
            name = names[number] if number < len(names) else str(number)
            if len(values) in (4, 5):  # five: the score of a detection comes last
                centre, sides = np.array(values[:2]) * scale, np.array(values[2:4]) * scale
                (left, top), (right, bottom) = (centre - sides / 2).tolist(), (centre + sides / 2).tolist()
                parsed.objects.append(Drawn(name, (left, top, right, bottom)))
            elif len(values) >= 6 and len(values) % 2 == 0:
                parsed.objects.append(_outlined(name, np.array(values).reshape(-1, 2) * scale))
            else:
                raise ValueError(f"{len(values)} numbers after the class")
        except ValueError as error:
            parsed.unusable.append(one_line(error))
    if parsed.unusable and not parsed.objects:
        raise ValueError(f"not of YOLO: {parsed.unusable[0]}")
    return parsed


def _outlined(name: str, points: np.ndarray) -> Drawn:
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return Drawn(name, (left, top, right, bottom), points.reshape(-1).tolist())


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{str(value)[:40]!r} is no number") from error
    if not abs(number) <= FARTHEST:  # NaN, too
        raise ValueError(f"{number} is no place in an image")
    return number


@dataclass
class Objects:
    """The objects of a data set, in one of the formats.

    Attributes:
        kind: of the format, for people.
        files: of each image that has one, by its number in the source.
        images: what they say, of those that can be used.
        classes: in the order of their numbers.
        outside: objects that reached out of their image by more than a pixel, and were cut off there.
        shown: whether all are drawn on the image as it is shown, with its orientation applied.
    """

    kind: str
    files: dict[int, str]
    images: dict[int, Parsed]
    classes: list[str]
    notes: list[str]
    outside: int = 0
    shown: bool = False


def objects_of(
    names: Sequence[str], read: Callable[[str], bytes], source: Source, sizes: Callable[[list[int]], dict[int, Size]]
) -> Objects | None:
    """Objects in the first of the formats that there is; None where there is none.

    Args:
        names, read: of all files of the data.
        sizes: of images as they are shown; of those that can be read.
    """
    stems = _Stems(source)
    for kind, suffix in (("Pascal VOC xml", ".xml"), ("LabelMe json", ".json"), ("YOLO txt", ".txt")):
        wanted = [name for name in names if name.lower().endswith(suffix) and not is_hidden(name)]
        files = stems.files(wanted)
        if not files:
            continue
        known = sizes(sorted(files))
        yolo = _yolo_names(names, read) if suffix == ".txt" else []

        def parse(index: int, suffix: str = suffix, files: Any = files, known: Any = known, yolo: Any = yolo) -> Parsed:
            data = read(files[index])
            if len(data) > LARGEST_TEXT:
                raise ValueError(f"more than {LARGEST_TEXT:,} bytes")
            if suffix == ".xml":
                return read_voc(data)
            return read_labelme(data) if suffix == ".json" else read_yolo(data, known[index], yolo)

        if found := _read_all(kind, files, known, parse, source):
            found.classes = _classes(found, yolo)
            found.shown = suffix == ".txt"
            return found
    return None


def _read_all(
    kind: str, files: dict[int, str], sizes: dict[int, Size], parse: Callable[[int], Parsed], source: Source
) -> Objects | None:
    """None where fewer than half of the first files with something in them are of the format."""
    images: dict[int, Parsed] = {}
    wrong: dict[int, str] = {}
    notes: list[str] = []
    for index in sorted(files):
        if index not in sizes:
            continue  # an image that cannot be read, which others say
        try:
            images[index] = _fitted(parse(index), sizes[index])
            if len(images[index].objects) > MOST_OBJECTS:
                raise ValueError(f"more than {MOST_OBJECTS:,} objects")
        except (ValueError, OSError, InputError) as error:
            images.pop(index, None)
            wrong[index] = one_line(error) or type(error).__name__
        if len(images) + len(wrong) == LOOKED_AT and len(wrong) > LOOKED_AT / 2:
            return None
    if not any(parsed.objects for parsed in images.values()) or len(wrong) > len(images):
        return None
    found = Objects(kind, files, images, [], notes)
    count = sum(len(parsed.objects) for parsed in images.values())
    notes.append(f"{kind}: {len(images):,} of {len(source.entries):,} images, {count:,} objects")
    if wrong:
        first = min(wrong)
        notes.append(f"{len(wrong):,} files cannot be used, the first: {files[first]}: {wrong[first]}")
    unusable = [(index, why) for index, parsed in images.items() for why in parsed.unusable]
    if unusable:
        first, why = unusable[0]
        notes.append(f"{len(unusable):,} objects cannot be used, the first: {files[first]}: {why}")
    _cut_off(found, sizes)
    if found.outside:
        notes.append(f"{found.outside:,} objects reach out of their image and are cut off at its border")
    return found


def _fitted(parsed: Parsed, size: Size) -> Parsed:
    """Raises ValueError where it was drawn on an image of another size."""
    if parsed.size is not None and sorted(parsed.size) != sorted(size):
        got, want = (f"{width}x{height}" for height, width in (parsed.size, size))
        raise ValueError(f"is drawn on an image of {got}, and the file is {want}")
    return parsed


def _cut_off(found: Objects, sizes: dict[int, Size]) -> None:
    """Keep boxes and outlines within their images; files whose corners count from 0 are met by a 0 among them."""
    voc = found.kind.startswith("Pascal")
    boxes = [one.box for parsed in found.images.values() for one in parsed.objects]
    shift = 1.0 if voc and min(min(box[:2]) for box in boxes) < 0 else 0.0
    for index, parsed in found.images.items():
        height, width = parsed.size or sizes[index]
        kept = []
        for one in parsed.objects:
            left, top, right, bottom = (one.box[0] + shift, one.box[1] + shift, *one.box[2:])
            found.outside += left < -1 or top < -1 or right > width + 1 or bottom > height + 1
            box = (max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom))
            outline = one.outline
            if outline is not None:
                points = np.array(outline).reshape(-1, 2).clip(0, [width, height])
                outline = points.reshape(-1).tolist()
            kept.append(one._replace(box=box, outline=outline))
        parsed.objects = kept


def _classes(found: Objects, names: list[str]) -> list[str]:
    used = {one.name for parsed in found.images.values() for one in parsed.objects}
    rest = used - set(names)
    numbers = all(name.isdigit() for name in rest)
    return [*names, *sorted(rest, key=lambda name: (int(name) if numbers else 0, name))]


def _yolo_names(files: Sequence[str], read: Callable[[str], bytes]) -> list[str]:
    """Names of classes by number: `names` of a yaml file (data.yaml), or a list of lines (classes.txt, obj.names)."""
    for file in sorted(files, key=lambda name: (name.count("/"), name)):
        path = PurePosixPath(file)
        try:
            if path.suffix.lower() in (".yaml", ".yml") and not is_hidden(file):
                known = plain_yaml(read(file).decode("utf-8-sig"))
                names = known.get("names") if isinstance(known, dict) else None
                if isinstance(names, dict) and all(isinstance(key, int) and 0 <= key < 100_000 for key in names):
                    names = [names.get(key, str(key)) for key in range(max(names, default=-1) + 1)]
                if isinstance(names, list) and names:
                    return [str(name) for name in names]
            elif path.name.lower() in NAMES:
                lines = read(file)[:LARGEST_TEXT].decode("utf-8-sig").splitlines()
                if names := [line.strip() for line in lines if line.strip()]:
                    return names
        except (ValueError, OSError, InputError):
            continue
    return []


class _Stems:
    """Which file is of which image: that of its stem, whose folders say the same place."""

    def __init__(self, source: Source):
        self._images: dict[str, list[int]] = {}
        self._names = source.entries.names
        for index, name in enumerate(self._names):
            self._images.setdefault(PurePosixPath(name).stem, []).append(index)

    def files(self, names: Sequence[str]) -> dict[int, str]:
        """One file an image, and one image a file."""
        found: dict[int, str] = {}
        for alike in (lambda one, other: Counter(one) == Counter(other), may_be_one):
            taken = set(found.values())
            for name in names:
                if name in taken:
                    continue
                place = folders_of(name)
                fitting = [
                    index
                    for index in self._images.get(PurePosixPath(name).stem, ())
                    if index not in found and alike(folders_of(self._names[index]), place)
                ]
                if len(fitting) == 1:
                    found[fitting[0]] = name
        return found


def as_coco(found: Objects, source: Source) -> Iterator[tuple[str, dict[str, Any], dict[int, int]]]:
    """A COCO file for each split, and the COCO image id of each entry."""
    number = {name: k for k, name in enumerate(found.classes, start=1)}
    categories = [{"id": k, "name": name} for name, k in number.items()]
    parts: dict[str, list[int]] = {}
    for index in found.images:
        code = int(source.entries.splits[index])
        parts.setdefault("all" if code < 0 else source.entries.split_names[code], []).append(index)
    for split, indices in sorted(parts.items()):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in indices:
            parsed = found.images[index]
            images.append({"id": index + 1, "file_name": source.entries.names[index]})
            if parsed.size is not None:
                images[-1] |= {"height": parsed.size[0], "width": parsed.size[1]}
            for one in parsed.objects:
                left, top, right, bottom = one.box
                made: dict[str, Any] = {"id": len(annotations) + 1, "image_id": index + 1}
                made |= {"category_id": number[one.name], "iscrowd": int(one.crowd)}
                made |= {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
                if one.outline is not None:
                    made["segmentation"] = [one.outline]
                annotations.append(made)
        coco = {"images": images, "annotations": annotations, "categories": [dict(each) for each in categories]}
        yield split, coco, {index: index + 1 for index in indices}
