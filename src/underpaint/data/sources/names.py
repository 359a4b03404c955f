"""What names of files and folders say: splits, classes, annotations."""

import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# What else people call them, as Hugging Face datasets reads it, and two more; a class may have such a name too.
MORE_SPLITS = {"training": "train", "learning": "train", "dev": "val"}
MORE_SPLITS |= dict.fromkeys(("testing", "eval", "evaluation", "holdout", "heldout"), "test")
# folders that hold annotations, not images; those of Pascal VOC and MVTec AD among them
NOT_IMAGES = {"masks", "annotations", "labels", "semantic", "segmentationclass", "segmentationobject", "ground_truth"}
NOT_IMAGES |= {"groundtruth"}
IMAGE_FOLDERS = {"images", "imgs", "img", "image", "jpegimages"}  # folders that say nothing of what is in them


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def is_annotation(name: str) -> bool:
    """Whether a file lies in a folder of masks or annotations."""
    return any(part.lower() in NOT_IMAGES for part in PurePosixPath(name).parts[:-1])


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name) and not is_annotation(name)


def common_top(names: Sequence[str], folders: dict[str, str]) -> str:
    """The one folder that holds everything, unless its name already says something (a split, masks)."""
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in names}
    top = tops.pop() if len(tops) == 1 else ""
    return "" if top in folders or top.lower() in SPLITS or top.lower() in NOT_IMAGES else top


def split_word(word: str) -> str | None:
    """The split that a word names, in either case, a number behind it or not: train, Training, val2017, test_1."""
    known = re.fullmatch(r"([a-z]+?)[-_ ]?\d*", re.sub(r"^(hold|held)[-_ ]out", r"\1out", word.lower()))
    return {**SPLITS, **MORE_SPLITS}.get(known.group(1)) if known else None


def split_folders(names: Sequence[str]) -> dict[str, str]:
    """The folders that are splits, by path.

    Those that are called exactly as in SPLITS always are. The other words, and numbers behind them, are what classes
    may be called too (running, training; test1, test2): they count beside a folder of another split, or where every
    image lies in that folder and there are no splits below it.
    """
    beside: dict[str, set[str]] = {}
    for folder in {name.rpartition("/")[0] for name in names} - {""}:
        parts = folder.split("/")
        for depth, part in enumerate(parts):
            beside.setdefault("/".join(parts[:depth]), set()).add(part)
    found: dict[str, str] = {}
    for parent in sorted(beside, key=lambda path: -path.count("/") - bool(path)):  # the deepest first
        splits = {part: split for part in beside[parent] if (split := split_word(part))}
        for part, split in splits.items():
            path = f"{parent}/{part}" if parent else part
            alone = all(name.startswith(path + "/") for name in names)
            alone = alone and not any(below.startswith(path + "/") for below in found)
            if part.lower() in SPLITS or len(set(splits.values())) > 1 or alone:
                found[path] = split
    return found


def split_of(name: str, folders: dict[str, str], top: str = "") -> tuple[str | None, str]:
    """The split that the first such folder on the path names, and the path below it (or below `top`)."""
    parts = name.split("/")
    for depth in range(1, len(parts)):
        split = folders.get("/".join(parts[:depth]))
        if split is not None:
            return split, "/".join(parts[depth:])
    return None, name[len(top) + 1 :] if top else name


def split_of_file(name: str, folders: dict[str, str]) -> str | None:
    """The split that a file's name begins with (train-00000-of-00002.parquet), or that one of its folders has."""
    return first_word(PurePosixPath(name).name) or split_of(name, folders)[0]


def first_word(name: str) -> str | None:
    """The split that a name begins with: train-00000-of-00002, test_other, Holdout.3"""
    word = re.match(r"(hold|held)[-_ ]out(?![a-z])|[a-z]+", name.lower())
    return split_word(word.group()) if word else None


def folder_labels(splits: list[str | None], rests: list[str]) -> tuple[list[int | None], list[str] | None]:
    """Class labels: first-level folders below a split, where at least two hold most of its images and none is named
    images, imgs or the like; or where all of them (one, say) are classes of a split where this is so."""
    folders = [rest.split("/", 1)[0] if "/" in rest else "" for rest in rests]
    tops: dict[str | None, Counter[str]] = {}
    for split, folder in zip(splits, folders, strict=True):
        tops.setdefault(split, Counter())[folder] += 1
    candidates = {
        split: set(counts) - {""}
        for split, counts in tops.items()
        if 2 * counts[""] < counts.total() and not IMAGE_FOLDERS & {name.lower() for name in counts}
    }
    known = set().union(*(names for names in candidates.values() if len(names) >= 2))
    labelled = {split for split, names in candidates.items() if len(names) >= 2 or names <= known}
    if not known:
        return [None] * len(rests), None
    classes = sorted(known)
    number = {name: n for n, name in enumerate(classes)}
    return [
        number.get(folder) if split in labelled else None for split, folder in zip(splits, folders, strict=True)
    ], classes


def folders_of(name: str) -> tuple[str, ...]:
    """The folders of a path by which a file is told apart, in lower case: without images, masks and the like, and
    words for a split made one."""
    parts = (part.lower() for part in PurePosixPath(name.replace("\\", "/")).parts[:-1])
    alike = {**SPLITS, **MORE_SPLITS}
    return tuple(alike.get(part, part) for part in parts if part not in IMAGE_FOLDERS and part not in NOT_IMAGES)


def may_be_one(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether folders may say the same place: those of one path are all among those of the other."""
    return Counter(one) <= Counter(other) or Counter(other) <= Counter(one)


def coco_split(name: str) -> str | None:
    """The split of a file annotations/SPLIT.json, annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json; None
    for any other file."""
    path = PurePosixPath(name)
    if path.name.lower() == "_annotations.coco.json":
        return split_word(path.parent.name)
    if path.parent.name.lower() != "annotations" or path.suffix.lower() != ".json":
        return None
    return split_word(path.stem.lower().removeprefix("instances_"))


def coco_places(listed: dict[str, list[str]], names: Sequence[str]) -> dict[str, list[str | None]]:
    """The image that each `file_name` of COCO files means, or None.

    That is the image at the whole relative path, from the folder of annotations/ or from the folders of images and
    splits below it; else, among what no path names, the only image of that name, if it is listed once and no folder
    speaks against it.

    Args:
        listed: `file_name`s by COCO file.
        names: of the images.
    """
    known = set(names)
    found: dict[str, list[str | None]] = {}
    for file, wanted in listed.items():
        path = PurePosixPath(file)
        stem = path.stem.removeprefix("instances_")
        words = list(dict.fromkeys([stem, coco_split(file) or stem]))
        below = ["images", *(f"images/{word}" for word in words), *(f"{word}/images" for word in words), "", *words]
        places = [(path.parent.parent / place).as_posix() for place in below]
        starts = ["" if place == "." else f"{place}/" for place in places]
        plain = [posixpath.normpath(name.replace("\\", "/")) for name in wanted]
        found[file] = [next((s + name for s in starts if s + name in known), None) for name in plain]
    taken = {place for places in found.values() for place in places if place is not None}
    by_name: dict[str, list[str]] = {}
    for name in sorted(known - taken):
        by_name.setdefault(name.rpartition("/")[2], []).append(name)
    open_ones = [
        (file, number, PurePosixPath(listed[file][number].replace("\\", "/")).name)
        for file, places in found.items()
        for number, place in enumerate(places)
        if place is None
    ]
    times = Counter(name for _, _, name in open_ones)
    for file, number, name in open_ones:
        files = by_name.get(name, [])
        if times[name] == len(files) == 1:
            root = PurePosixPath(file).parent.parent.as_posix()
            sides = (listed[file][number], files[0].removeprefix(f"{root}/"))
            one, other = ([word for word in folders_of(side) if word != coco_split(file)] for side in sides)
            found[file][number] = files[0] if may_be_one(one, other) else None
    return found
