"""What people drew on their images: index masks, and boxes and outlines of objects, all in the form that COCO gives them,
beside the images of a folder or archive."""

import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, cast

import numpy as np
from PIL import ExifTags, Image, ImageOps

from underpaint.data.decode import Unreadable, _orient, read_header, read_orientation
from underpaint.data.formats import as_coco, objects_of
from underpaint.data.sources.archive import member
from underpaint.data.sources.base import Source
from underpaint.data.sources.beside import EXTREME, EXTREMES, WORDS, beside
from underpaint.data.sources.folder import walk
from underpaint.data.sources.names import coco_places, coco_split, folders_of, is_hidden, is_image, may_be_one
from underpaint.data.sources.tables import TEXTS
from underpaint.errors import InputError
from underpaint.reading import plain_json

MASK_FOLDERS = ("masks", "semantic", "labels", "segmentationclass", "ground_truth", "groundtruth")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
PHOTOMETRIC_TAG = 262
WHOLE_COCO = {"instances_default.json", "_annotations.coco.json", "coco.json", "result.json", "labels.json"}
WHOLE_COCO |= {"annotations.json", "instances.json"}
SAMPLED = 64  # masks that are looked at to know what white means


@dataclass
class AnnotationFiles:
    """The files of a data set by name, and how to read one."""

    names: list[str]
    read: Callable[[str], bytes]


def open_annotations(data: str | Path) -> AnnotationFiles:
    """Every file of a folder, .zip or .tar.

    Raises:
        InputError: data of another kind, which holds images alone.
    """
    path = Path(data).expanduser()
    if path.suffix.lower() in TEXTS and path.is_file():  # a table of images in its folder
        path = path.parent
    if path.is_dir():
        names = sorted(PurePosixPath(name).as_posix() for name, file in walk(path, []) if os.path.isfile(file))
        return AnnotationFiles(names, lambda name: (path / name).read_bytes())
    if path.is_file() and zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)

        def unpacked(name: str) -> bytes:
            try:
                return member(archive, name)
            except Unreadable as error:
                raise InputError(f"{path}: {name} {error}") from error

        return AnnotationFiles(sorted(archive.namelist()), unpacked)
    if path.is_file() and tarfile.is_tarfile(path):
        members = tarfile.open(path)  # noqa: SIM115  # open as long as it is read from

        def read(name: str) -> bytes:
            file = members.extractfile(name)
            assert file is not None
            return file.read()

        return AnnotationFiles(sorted(members.getnames()), read)
    raise InputError(f"{data}: masks and boxes are read from a folder, .zip or .tar only")


@dataclass
class Masks:
    """An index mask for some images of a source.

    Attributes:
        names: of the mask of each image that has one, by the image's number in the source.
        classes: names of the indices, as far as they are known.
        turned: the EXIF orientation of images whose masks are drawn on the stored pixels.
        notes: what a person should know of how they were found.
    """

    names: dict[int, str]
    classes: list[str]
    ignore: int | None  # as classes.json says
    read: Callable[[str], bytes]
    turned: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    white: Literal["", "exact", "blurred"] = ""  # where white is class 1: whether there is nothing but black and white

    def __getitem__(self, index: int) -> np.ndarray:
        """[height, width] whole numbers, in the orientation of the decoded image.

        Raises:
            InputError: not an index mask.
        """
        mask, _ = _index_mask(self.names[index], self.read)
        if self.white:
            other = mask[(mask != 0) & (mask != 255)] if self.white == "exact" else mask[:0]
            if len(other):
                raise InputError(
                    f"{self.names[index]} holds {int(other[0])}, and the others are black (0) and white (255) alone; "
                    "name the classes in classes.json if these are their numbers"
                )
            mask = (mask > 127).astype(np.int64)
        return np.ascontiguousarray(_orient(mask, self.turned.get(index, 1)))


def _index_mask(name: str, read: Callable[[str], bytes]) -> tuple[np.ndarray, bool]:
    """[height, width] whole numbers with the mask's own orientation applied, and whether it has one.

    Raises:
        InputError: not an index mask.
    """
    try:
        with Image.open(io.BytesIO(read(name))) as picture:
            own = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            if picture.mode in ("RGB", "RGBA", "LA"):
                bands = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
                if (bands == bands[..., :1]).all():  # grey, saved as colour
                    return bands[..., 0].astype(np.int64), own
            if picture.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
                raise InputError(f"{name} is {picture.mode}, not an index mask: one channel of class numbers (PNG)")
            # PIL shows a TIFF whose white is 0 turned round, where it has up to 8 bits; a class is the number that is stored
            inverted = getattr(picture, "tag_v2", {}).get(PHOTOMETRIC_TAG) == 0 and picture.mode in ("L", "1")
            mask = np.array(ImageOps.exif_transpose(picture)).astype(np.int64)
            return (255 if picture.mode == "L" else 1) - mask if inverted else mask, own
    except (OSError, SyntaxError, ValueError) as error:  # PIL's of damaged files
        raise InputError(f"{name} cannot be read ({error}); expected an index mask (PNG)") from error


def masks_of(data: str | Path, source: Source, objects: "dict[str, CocoAnnotations] | None" = None) -> Masks:
    """Masks below masks/ (or else semantic/, labels/, ...) for the images of equal stems, by the folders before and after
    masks/ and images/: all alike, or else those of one side among those of the other (split folders, say, where
    images have some and masks have not). Else masks that lie beside their images (`beside`), or else those that the
    outlines of objects draw (`drawn_masks`). The notes say what was turned by an EXIF orientation.

    Args:
        objects: what `coco_annotations` found, where it was asked already.

    Raises:
        InputError: there are none; two masks for an image, or two images for a mask.
    """
    answers = open_annotations(data)
    kinds: dict[str, list[str]] = {}
    for name in answers.names:
        path = PurePosixPath(name)
        folders = [part.lower() for part in path.parts[:-1]]
        kind = next((folder for folder in MASK_FOLDERS if folder in folders), None)
        if kind is not None and path.suffix.lower() in MASK_SUFFIXES and not is_hidden(name):
            kinds.setdefault(kind, []).append(name)
    found: dict[int, str] = {}
    used = next((kind for kind in MASK_FOLDERS if kind in kinds and (found := _pairs(source, kinds[kind]))), None)
    notes = []
    if not found:
        found = _beside(source, answers.names, notes)
    if not found:
        if (drawn := drawn_masks(data, source, objects)) is not None:
            return drawn
        raise InputError(
            f"{data}: no masks; expected index PNGs below masks/ with the names of the images, or beside them "
            "(part.png or part_mask.png of part.jpg)"
        )
    if used is not None and (aside := sorted(kinds.keys() - {used})):
        notes.append(f"masks are those in {used}/; what is in {', '.join(f'{kind}/' for kind in aside)} is not read")
    classes, ignore = _classes(answers)
    turned = _turned_masks(source, found, answers.read, notes)
    white: Literal["", "exact", "blurred"] = "" if classes else _black_and_white(found, answers.read)
    if white:
        notes.append("masks are black and white: white is class 1, object")
        classes = ["background", "object"]
    return Masks(found, classes, ignore, answers.read, turned, notes, white)


def _black_and_white(names: dict[int, str], read: Callable[[str], bytes]) -> Literal["", "exact", "blurred"]:
    """Whether 0 and 255 are all that a sample of masks holds, both of them, or what a JPEG or a resize made of them."""
    counts, order = np.zeros(256, np.int64), sorted(names)
    for position in np.linspace(0, len(names) - 1, min(SAMPLED, len(names))).round().astype(int).tolist():
        try:
            mask, _ = _index_mask(names[order[position]], read)
        except InputError:  # said where it is used
            continue
        if mask.min() < 0 or mask.max() > 255:
            return ""
        counts += np.bincount(mask.reshape(-1), minlength=256)
    if np.flatnonzero(counts).tolist() == [0, 255]:
        return "exact"
    extreme = counts[: EXTREME + 1].sum() + counts[255 - EXTREME :].sum()
    # class numbers lie near black, too, and 255 is none of them; but none of them is a light grey
    blurred = counts[128:255].any() and counts[255 - EXTREME :].any() and extreme >= EXTREMES * counts.sum()
    return "blurred" if blurred else ""


def _beside(source: Source, names: list[str], notes: list[str]) -> dict[int, str]:
    """The mask of each entry that has one beside it; of one that has several, none."""
    number = {name: index for index, name in enumerate(source.entries.names)}
    found: dict[int, str] = {}
    several: set[int] = set()
    for _, images in beside([name for name in names if is_image(name)]):
        for mask, image in sorted(images.items()):
            if image not in number or mask in number:  # which was looked at when the images were listed
                continue
            if found.setdefault(number[image], mask) != mask:
                several.add(number[image])
    if several:
        notes.append(
            f"{len(several):,} images have several masks ({source.entries.names[min(several)]}) and are left out"
        )
    return {index: mask for index, mask in found.items() if index not in several}


def _pairs(source: Source, masks: list[str]) -> dict[int, str]:
    """The mask of each entry that has one."""
    where: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for name in masks:
        stem = PurePosixPath(name).stem
        word = WORDS.match(stem)  # 000_mask.png
        for each in dict.fromkeys((stem, word.group(1) if word else stem)):
            where.setdefault(each, []).append((folders_of(name), name))
    places = {k: folders_of(entry.name) for k, entry in enumerate(source.entries)}
    found: dict[int, str] = {}
    owner: dict[str, int] = {}
    for alike in (lambda one, other: Counter(one) == Counter(other), may_be_one):
        taken = set(owner)
        for index, place in places.items():
            if index in found:
                continue
            stem = PurePosixPath(source.entries[index].name).stem
            fitting = [name for other, name in where.get(stem, []) if name not in taken and alike(place, other)]
            if len(fitting) > 1:
                raise InputError(
                    f"{source.entries[index].name} may have the mask {fitting[0]} or {fitting[1]}; keep one, or give "
                    "images and masks the same folders"
                )
            if not fitting:
                continue
            if fitting[0] in owner:
                raise InputError(
                    f"{fitting[0]} may be the mask of {source.entries[owner[fitting[0]]].name} or of "
                    f"{source.entries[index].name}; give images and masks the same folders"
                )
            found[index], owner[fitting[0]] = fitting[0], index
    return found


Seen = tuple[int, tuple[int, int]]  # orientation 1..8, and [height, width] of the pixels as stored


def _seen(source: Source, indices: Sequence[int]) -> dict[int, Seen]:
    """What the headers of images say; those that cannot be read are left out here, as they are elsewhere."""
    found = {}
    for index in indices:
        with suppress(Unreadable):
            encoded = source.read(index)
            orientation, header = read_orientation(encoded), read_header(encoded)
            size = (header.height, header.width)
            found[index] = (orientation, size if orientation < 5 else size[::-1])
    return found


def _drawn_on_stored(turns: dict[Any, Seen], sizes: dict[Any, tuple[int, ...]]) -> set[Any]:
    """Of turned images, those whose answers are drawn on the pixels as stored and not on the image as it is shown.

    An answer's size tells it where an image stands upright instead of lying. Where it cannot tell (a square, a half
    turn or a mirror image, no size), the answer is like those of the set where it can; as stored, where there are none
    or they differ.

    Args:
        turns: of images with an orientation above 1.
        sizes: [height, width] of the answers, where they are known.
    """
    stored, shown, open_ones = set(), set(), set()
    for key, (orientation, size) in turns.items():
        if orientation >= 5 and size[0] != size[1] and sizes.get(key) in (size, size[::-1]):
            (stored if sizes.get(key) == size else shown).add(key)
        else:
            open_ones.add(key)
    if stored or not shown:
        stored |= open_ones
    return stored


def _exif_note(what: str, images: int, turned: int) -> list[str]:
    if not images:
        return []
    return [
        f"{images:,} images have an EXIF orientation; the {what} of {turned:,} are drawn on the pixels as stored and are "
        f"turned with them, those of {images - turned:,} fit the image as shown"
    ]


def _turned_masks(
    source: Source, names: dict[int, str], read: Callable[[str], bytes], notes: list[str]
) -> dict[int, int]:
    """The orientation of images by which their masks are to be turned; a mask with an orientation of its own is not."""
    turns = {index: seen for index, seen in _seen(source, sorted(names)).items() if seen[0] > 1}
    drawn = {index: _index_mask(names[index], read) for index in turns}
    open_ones = {index: seen for index, seen in turns.items() if not drawn[index][1]}
    stored = _drawn_on_stored(open_ones, {index: mask.shape for index, (mask, _) in drawn.items()})
    notes += _exif_note("masks", len(turns), len(stored))
    return {index: turns[index][0] for index in stored}


def _classes(answers: AnnotationFiles) -> tuple[list[str], int | None]:
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


class RunLengths(TypedDict):
    """A mask as COCO packs it."""

    size: list[int]  # height, width
    counts: str | list[int]


Segment: TypeAlias = list[list[float | int]] | RunLengths  # polygons (x, y, x, y, ...), or either form of run lengths


class CocoImage(TypedDict):
    """An image of a COCO file."""

    id: int
    file_name: str
    height: int
    width: int


class CocoObject(TypedDict):
    """An annotated object of a COCO file, or a detection, which has a score."""

    id: NotRequired[int]
    image_id: int
    category_id: int
    bbox: list[float]  # left, top, width, height in pixels
    area: NotRequired[float]
    iscrowd: NotRequired[int]
    segmentation: NotRequired[Segment]
    score: NotRequired[float]


class CocoCategory(TypedDict):
    """A class of objects of a COCO file."""

    id: int
    name: str


class Coco(TypedDict):
    """A COCO file."""

    images: list[CocoImage]
    annotations: list[CocoObject]
    categories: list[CocoCategory]


@dataclass
class Instances:
    """The annotated objects of an image: boxes in pixels (left, top, right, bottom)."""

    boxes: np.ndarray  # [k, 4] float
    labels: np.ndarray  # [k] category ids, as in the file
    crowd: np.ndarray  # [k] bool
    segments: list[Segment | None]  # as in the file; None where there is no mask


@dataclass
class CocoAnnotations:
    """COCO annotations of a split.

    Attributes:
        coco: the file, in the orientation of the decoded images and with new ids of annotations, for the COCO measure.
        images: COCO image id of each entry of the source that it lists.
        categories: names by category id.
        notes: what a person should know of how they were read.
        kind: of the files, for people.
        outside: how many boxes reached out of their image by more than a pixel, and were cut off there.
    """

    coco: Coco
    images: dict[int, int]
    categories: dict[int, str]
    notes: list[str] = field(default_factory=list)
    kind: str = "COCO json"
    outside: int = 0

    def objects(self, index: int) -> Instances:
        found = self._by_image.get(self.images[index], [])
        boxes = np.array([a["bbox"] for a in found], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return Instances(
            boxes,
            np.array([a["category_id"] for a in found], int),
            np.array([bool(a.get("iscrowd", 0)) for a in found], bool),
            [a.get("segmentation") or None for a in found],
        )

    def __post_init__(self) -> None:
        self.sizes = {each["id"]: (each.get("height", 0), each.get("width", 0)) for each in self.coco["images"]}
        self._by_image: dict[int, list[CocoObject]] = {}
        for annotation in self.coco["annotations"]:
            self._by_image.setdefault(annotation["image_id"], []).append(annotation)


def coco_annotations(data: str | Path, source: Source, *, lenient: bool = False) -> dict[str, CocoAnnotations]:
    """By split ("all" for none), the annotated objects in the orientation of the decoded images: those of COCO json below
    annotations/ (or SPLIT/_annotations.coco.json), else of Pascal VOC, LabelMe or YOLO files of the images' stems. The
    notes say which boxes were left out, as they have no area, and which were turned by an EXIF orientation.

    Args:
        lenient: boxes of COCO json that reach out of their image are cut off and counted, not refused.

    Raises:
        InputError: there are none; two files for a split; an image listed twice or in another size than it has; a box
            outside its image; an object of no known category.
    """
    answers = open_annotations(data)
    files: dict[str, str] = {}
    for name in answers.names:
        split = coco_split(name)
        if split is None or is_hidden(name):
            continue
        if split in files:
            raise InputError(f"{files[split]} and {name} both annotate {split}; one file a split is needed")
        files[split] = name
    if not files and (whole := _whole_coco(answers)):
        files["all"] = whole
    if not files:
        return _other_formats(data, answers, source)
    cocos = {name: _coco(answers, name) for name in files.values()}
    listed = {name: [image["file_name"] for image in coco["images"]] for name, coco in cocos.items()}
    places = coco_places(listed, [entry.name for entry in source.entries])
    numbers = {entry.name: index for index, entry in enumerate(source.entries)}
    images: dict[str, dict[int, int]] = {}
    for name, coco in cocos.items():
        known = images[name] = {}
        for image, place in zip(coco["images"], places[name], strict=True):
            if place is not None and known.setdefault(numbers[place], image["id"]) != image["id"]:
                raise InputError(f"{name} lists {place} twice, as images {known[numbers[place]]} and {image['id']}")
    outside = _cut_off(cocos) if lenient else {}
    notes = _as_decoded(cocos, images, source)
    return {
        split: _annotations(cocos[name], images[name], notes[name], outside=outside.get(name, 0))
        for split, name in files.items()
    }


def _annotations(coco: Coco, images: dict[int, int], notes: list[str], **more: Any) -> CocoAnnotations:
    return CocoAnnotations(coco, images, {each["id"]: each["name"] for each in coco["categories"]}, notes, **more)


def _whole_coco(answers: AnnotationFiles) -> str | None:
    """A COCO file of all images, as CVAT, Label Studio, FiftyOne and Roboflow call it."""
    for name in sorted(answers.names, key=lambda name: (name.count("/"), name)):
        if PurePosixPath(name).name.lower() in WHOLE_COCO and not is_hidden(name):
            with suppress(ValueError, OSError, InputError):
                found = plain_json(answers.read(name))
                if isinstance(found, dict) and {"images", "annotations", "categories"} <= found.keys():
                    return name
    return None


def _other_formats(data: str | Path, answers: AnnotationFiles, source: Source) -> dict[str, CocoAnnotations]:
    seen: dict[int, Seen] = {}

    def sizes(indices: list[int]) -> dict[int, tuple[int, int]]:
        seen.update(_seen(source, [index for index in indices if index not in seen]))
        known = {index: seen[index] for index in indices if index in seen}
        return {index: size if turn < 5 else (size[1], size[0]) for index, (turn, size) in known.items()}

    found = objects_of(answers.names, answers.read, source, sizes)
    if found is None:
        raise InputError(
            f"{data}: no boxes; expected COCO json (annotations/train.json and val.json or test.json), or files of the "
            "images' names in the formats of Pascal VOC (xml), LabelMe (json) or YOLO (txt, in labels/ for images/)"
        )
    parts = {split: (cast(Coco, coco), images) for split, coco, images in as_coco(found, source)}
    cocos, images = ({split: coco for split, (coco, _) in parts.items()}, {s: known for s, (_, known) in parts.items()})
    notes = _as_decoded(cocos, images, source, seen, shown=found.shown)
    return {
        split: _annotations(
            coco, images, [*found.notes, *notes[split]], kind=found.kind, outside=found.outside if k == 0 else 0
        )
        for k, (split, (coco, images)) in enumerate(parts.items())
    }


def _cut_off(cocos: dict[str, Coco]) -> dict[str, int]:
    """Cut boxes off at the border of their image, where its size is listed; how many reached out, by file."""
    counts = {}
    for name, coco in cocos.items():
        sizes = {image["id"]: (image.get("width"), image.get("height")) for image in coco["images"]}
        counts[name] = 0
        for annotation in coco["annotations"]:
            width, height = sizes.get(annotation.get("image_id", -1), (None, None))
            with suppress(KeyError, TypeError, ValueError):  # which is said later
                left, top, wide, tall = (float(value) for value in annotation["bbox"])
                if width and height and min(wide, tall) > 0:
                    right, bottom = min(left + wide, width), min(top + tall, height)
                    if left < -1 or top < -1 or left + wide > width + 1 or top + tall > height + 1:
                        counts[name] += 1
                        left, top = max(0.0, left), max(0.0, top)
                        annotation["bbox"] = [left, top, right - left, bottom - top]
    return counts


@dataclass
class DrawnMasks(Masks):
    """Index masks that outlines of objects draw: 0 is what lies beside them, smaller objects lie on larger ones."""

    objects: dict[int, CocoAnnotations] = field(default_factory=dict)

    def __getitem__(self, index: int) -> np.ndarray:
        annotations = self.objects[index]
        height, width = annotations.sizes[annotations.images[index]]
        mask = np.zeros((height, width), np.int64)
        found = annotations.objects(index)
        sides = found.boxes[:, 2:] - found.boxes[:, :2]
        place = {category: k for k, category in enumerate(sorted(annotations.categories), start=1)}
        for k in np.argsort(-sides.prod(axis=1), kind="stable").tolist():
            segment = found.segments[k]
            if segment is not None and not found.crowd[k]:
                mask[mask_of(segment, height, width) > 0] = place[int(found.labels[k])]
        return mask


def drawn_masks(
    data: str | Path, source: Source, objects: dict[str, CocoAnnotations] | None = None
) -> DrawnMasks | None:
    """The masks that outlines of objects draw; None where there are none, or not all objects have one."""
    try:
        by_split = coco_annotations(data, source) if objects is None else objects
    except InputError:
        return None
    segments = [a.get("segmentation") for each in by_split.values() for a in each.coco["annotations"]]
    if not segments or not all(segments):
        return None
    owner = {index: each for each in by_split.values() for index in each.images}
    first = next(iter(by_split.values()))
    classes = ["background", *(first.categories[k] for k in sorted(first.categories))]
    notes = list(dict.fromkeys(note for each in by_split.values() for note in each.notes))
    notes.append("masks are drawn from the outlines of objects; what has none is class 0, background")
    names = {index: source.entries.names[index] for index in owner}
    return DrawnMasks(names, classes, None, lambda name: b"", {}, notes, "", owner)


def _coco(files: AnnotationFiles, name: str) -> Coco:
    """A COCO file, with new lists of images and annotations, so that these can be changed."""
    try:
        coco = json.loads(files.read(name))
        coco["categories"] = [{**each, "id": int(each["id"]), "name": str(each["name"])} for each in coco["categories"]]
        coco["images"] = [{**i, "id": int(i["id"]), "file_name": str(i["file_name"])} for i in coco["images"]]
        coco["annotations"] = [dict(annotation) for annotation in coco["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name} is not COCO json ({type(error).__name__}: {error})") from error
    twice = [number for number, times in Counter(image["id"] for image in coco["images"]).items() if times > 1]
    if twice:
        raise InputError(f"{name} lists two images of id {twice[0]}; an id each is needed")
    return coco


def _as_decoded(
    cocos: dict[str, Coco],
    images: dict[str, dict[int, int]],
    source: Source,
    known: dict[int, Seen] | None = None,
    *,
    shown: bool = False,
) -> dict[str, list[str]]:
    """Check annotations, leave out those without area, and turn what is drawn on the stored pixels of turned images; none
    of them are where all are drawn on images as they are `shown`. `known`: what headers say, where they were read already.

    Returns:
        Notes, by file.
    """
    notes: dict[str, list[str]] = {}
    seen: dict[tuple[str, int], Seen] = {}
    sizes: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, coco in cocos.items():
        found = _seen(source, sorted(images[name])) if known is None else {k: known[k] for k in images[name]}
        seen |= {(name, images[name][index]): what for index, what in found.items()}
        for image in coco["images"]:
            key = (name, image["id"])
            if not image.get("height") or not image.get("width"):
                continue
            sizes[key] = (int(image["height"]), int(image["width"]))
            orientation, (height, width) = seen.get(key, (1, sizes[key]))
            if sizes[key] != (height, width) and (orientation < 5 or sizes[key] != (width, height)):
                raise InputError(
                    f"{name} lists {image['file_name']} as {sizes[key][1]}x{sizes[key][0]}, and the file is "
                    f"{width}x{height}; boxes need the size that they are drawn on"
                )
    turns = {key: what for key, what in seen.items() if what[0] > 1}
    turned = set() if shown else _drawn_on_stored(turns, sizes)
    for name, coco in cocos.items():
        notes[name] = _exif_note("boxes", *(sum(file == name for file, _ in keys) for keys in (turns, turned)))
        listed = {image["id"]: image for image in coco["images"]}
        categories = {category["id"] for category in coco["categories"]}
        for number, image in listed.items():  # the size that boxes are drawn on
            orientation, size = seen.get((name, number), (1, sizes.get((name, number))))
            if size is not None:
                upright = orientation < 5 or (name, number) in turned
                image["height"], image["width"] = size if upright else size[::-1]
        without = [a for a in coco["annotations"] if not _has_area(a, listed, categories, name)]
        if without:
            first = without[0]
            notes[name].append(
                f"{name}: {len(without):,} boxes without area are left out, the first: annotation {first.get('id')} "
                f"({listed[first['image_id']]['file_name']}) of {first['bbox'][2]} x {first['bbox'][3]} px"
            )
        gone = {id(annotation) for annotation in without}
        coco["annotations"] = [a for a in coco["annotations"] if id(a) not in gone]
        for annotation in coco["annotations"]:
            if (name, annotation["image_id"]) in turned:
                _turn(annotation, *seen[name, annotation["image_id"]])
        for number, annotation in enumerate(coco["annotations"], start=1):
            annotation["id"] = number  # COCO's measure takes an id of 0, or one that occurs twice, for no match
        for number, image in listed.items():
            if (name, number) in turned and seen[name, number][0] >= 5:
                image["height"], image["width"] = image["width"], image["height"]
    return notes


def _has_area(annotation: CocoObject, images: dict[int, CocoImage], categories: set[int], name: str) -> bool:
    """Whether a box has an area.

    Raises:
        InputError: the annotation is of no known image or category, or reaches out of its image.
    """
    image = images.get(annotation.get("image_id", -1))
    where = f"{name}: annotation {annotation.get('id')}"
    if image is None:
        raise InputError(f"{where} belongs to image {annotation.get('image_id')}, which is not listed")
    if annotation.get("category_id") not in categories:
        raise InputError(f"{where} has category {annotation.get('category_id')}, which is not listed")
    where = f"{where} ({image['file_name']})"
    try:
        left, top, width, height = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} has no bbox of four numbers (left, top, width, height)") from error
    if not (width > 0 and height > 0):
        return False
    if not image.get("width"):  # neither listed nor there
        return True
    if not (left >= -1 and top >= -1 and left + width <= image["width"] + 1 and top + height <= image["height"] + 1):
        raise InputError(
            f"{where} has a box that reaches ({left + width:g}, {top + height:g}), outside the "
            f"image of {image['width']}x{image['height']}"
        )
    segment = annotation.get("segmentation")
    if isinstance(segment, dict) and list(segment.get("size", ())) != [image["height"], image["width"]]:
        raise InputError(
            f"{where} has run lengths of size {segment.get('size')}; expected that of its image, "
            f"[{image['height']}, {image['width']}]"
        )
    return True


def _turn(annotation: CocoObject, orientation: int, size: tuple[int, int]) -> None:
    """Turn box, polygons or run lengths, drawn on stored pixels [height, width], with the image by its orientation."""
    left, top, width, height = annotation["bbox"]
    x0, y0, x1, y1 = _turned_points([left, top, left + width, top + height], orientation, size)
    annotation["bbox"] = [min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0)]
    segment = annotation.get("segmentation")
    if isinstance(segment, list):
        annotation["segmentation"] = [_turned_points(polygon, orientation, size) for polygon in segment]
    elif segment:
        from faster_coco_eval import mask

        coding: Any = mask
        turned = coding.encode(np.asfortranarray(_orient(mask_of(segment, *size), orientation)))
        annotation["segmentation"] = {"size": list(turned["size"]), "counts": turned["counts"].decode()}


def _turned_points(points: Sequence[int | float], orientation: int, size: tuple[int, int]) -> list[float]:
    """x, y, x, y, ... in pixels of an image [height, width], turned as `decode` turns the image."""
    x, y = np.array(points, float).reshape(-1, 2).T
    height, width = size
    if orientation in (5, 6, 7, 8):
        x, y, height, width = y, x, width, height
    if orientation in (3, 4, 7, 8):
        y = height - y
    if orientation in (2, 3, 6, 7):
        x = width - x
    return np.stack([x, y], axis=1).reshape(-1).tolist()


def mask_of(segment: Segment, height: int, width: int) -> np.ndarray:
    """Polygons or either RLE form as [height, width] of 0 and 1."""
    from faster_coco_eval import mask

    coding: Any = mask  # its annotations are narrower than what it takes
    if isinstance(segment, list):
        coded = coding.merge(coding.frPyObjects(segment, height, width))
    elif isinstance(segment["counts"], list):
        coded = coding.frPyObjects(segment, height, width)
    else:
        coded = segment
    return coding.decode(coded)
