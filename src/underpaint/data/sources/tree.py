"""The rules of DATA for a tree of files, be it a folder or an archive."""

from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from underpaint.data.sources.base import Listing
from underpaint.data.sources.beside import masks_beside
from underpaint.data.sources.columns import numbers_of
from underpaint.data.sources.index import Entries, Names
from underpaint.data.sources.names import (
    IMAGE_SUFFIXES,
    coco_places,
    coco_split,
    common_top,
    folder_labels,
    is_annotation,
    is_hidden,
    split_folders,
    split_of,
)
from underpaint.data.sources.tables import Told, labels_of, read_tables, synset_names
from underpaint.errors import InputError
from underpaint.reading import plain_json

SIDE_SUFFIXES = {
    ".parquet",
    ".ndjson",
    ".names",
    ".json",
    ".jsonl",
    ".txt",
    ".md",
    ".csv",
    ".tsv",
    ".xml",
    ".yaml",
    ".yml",
    ".html",
    ".pdf",
}
SIDE_NAMES = {"license", "licence", "readme", "notice", "copying", "sha256sums", "md5sums", "thumbs.db"}


MaskFiles: TypeAlias = Literal["aside", "images"]  # what files are taken for that are masks of images beside them


class File(NamedTuple):
    """A file of a tree."""

    name: str  # with forward slashes, relative to the data
    size: int
    stamp: str | tuple[int, int]  # a text, or size and time in ns


def list_files(
    kind: str,
    place: Path,
    files: list[File],
    skipped: list[dict[str, str]],
    read: Any,
    reader: Any,
    masks: MaskFiles = "aside",
    table: str | None = None,
) -> Listing:
    """Apply the rules of DATA to a tree of files; `read(name)` gives bytes, `reader(names)` the entries' reader. Files
    that are masks of images beside them are left out, unless `masks` says that they are images; with a `table`, so are
    images that it does not list."""
    notes: list[str] = []
    images: list[File] = []
    for file in sorted(files, key=lambda file: file.name):
        path = PurePosixPath(file.name)
        if is_hidden(file.name) or is_annotation(file.name):
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            if path.suffix.lower() not in SIDE_SUFFIXES and path.stem.lower() not in SIDE_NAMES:
                skipped.append({"path": file.name, "reason": "not an image"})
        elif file.size == 0:
            skipped.append({"path": file.name, "reason": "empty file"})
        else:
            images.append(file)
    if masks == "aside" and (found := masks_beside([file.name for file in images], read, notes)):
        images = [file for file in images if file.name not in found]
    sizes = [(file.name, file.size) for file in files]
    told = read_tables(sizes, [file.name for file in images], read, notes, table)
    if table is not None:
        if told is None:
            raise InputError(
                f"{table} names no image that lies in its folder; expected a column path, file_name or image"
            )
        images, told = _listed(images, told)
    names = [file.name for file in images]
    folders = split_folders(names)
    # Side files beside the top folder (a licence, say) do not hide it; masks and annotations beside images do.
    ours = [file.name for file in files if is_annotation(file.name) and not is_hidden(file.name)] + names
    top = common_top(ours, folders)
    if top:
        notes.append(f"looked through the common top folder {top}/")
    splits, rests = zip(*(split_of(name, folders, top) for name in names), strict=True) if names else ((), ())
    if told is not None and told.splits is not None and not any(splits):
        splits = tuple(told.splits)
        notes.append("splits by tables and lists")
    annotated = coco_splits(files, names, read, notes)
    labels, classes = folder_labels(list(splits), list(rests))
    say_unlabelled(names, list(splits), labels, classes, notes)
    if told is not None and told.labels is not None:
        labels, classes = labels_of(told, labels, classes, notes)
    if classes and (words := synset_names([file.name for file in files], read)):
        classes = [f"{words[name]} ({name})" if name in words else name for name in classes]
    column, numbers = numbers_of(told.columns if told else {}, len(names), notes)
    listed = Names.of(names)
    entries = Entries.of(listed, [annotated.get(name) for name in names] if annotated else splits, labels, numbers)
    stamps: Any = [file.stamp for file in images]
    if stamps and not isinstance(stamps[0], str):
        stamps = np.array(stamps, np.int64)
    return Listing(
        *(kind, str(place.resolve()), entries, stamps, reader(listed), classes, notes, skipped, len(files), column)
    )


def _listed(images: list[File], told: Told) -> tuple[list[File], Told]:
    """The images of which a table says something."""
    chosen = [k for k in range(len(images)) if told.named[k]]

    def of(values: list[Any]) -> list[Any]:
        return [values[k] for k in chosen]

    columns = {name: of(values) for name, values in told.columns.items()}
    labels, splits = (None if values is None else of(values) for values in (told.labels, told.splits))
    return of(images), Told(columns, labels, told.label_column, splits, of(told.named))


def say_unlabelled(
    names: list[str],
    splits: list[str | None],
    labels: list[int | None],
    classes: list[str] | None,
    notes: list[str],
) -> None:
    """Say which images of labelled splits lie beside the class folders, and which splits lack classes."""
    for split in sorted({split for split, label in zip(splits, labels, strict=True) if label is not None}, key=str):
        within = f" in {split}" if split else ""
        inside = [(name, label) for name, own, label in zip(names, splits, labels, strict=True) if own == split]
        loose = [name for name, label in inside if label is None]
        if loose:
            notes.append(
                f"{len(loose):,} of {len(inside):,} images{within} lie beside the class folders and have no label, the "
                f"first: {loose[0]}"
            )
        there = len({label for _, label in inside} - {None})
        if classes and there < len(classes):
            notes.append(f"{there} of the {len(classes)} classes occur{within}")


def coco_splits(files: list[File], names: list[str], read: Any, notes: list[str]) -> dict[str, str]:
    """Splits by COCO json: annotations/SPLIT.json or instances_SPLIT.json name the images of each split."""
    listed: dict[str, list[str]] = {}
    for name in sorted(file.name for file in files if coco_split(file.name) and not is_hidden(file.name)):
        try:
            listed[name] = [str(image["file_name"]) for image in plain_json(read(name))["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{name} is not COCO json ({type(error).__name__}: {error}); expected a list 'images' of objects "
                "with 'file_name'"
            ) from error
    found: dict[str, str] = {}
    for file, places in coco_places(listed, names).items():
        split = coco_split(file) or ""
        lacking = [name for name, place in zip(listed[file], places, strict=True) if place is None]
        for place in places:
            if place is not None and found.setdefault(place, split) != split:
                raise InputError(f"{file} and another annotation file both list {place}; a split each is needed")
        if lacking:
            notes.append(
                f"{file} lists {len(lacking):,} images that are not there, or whose name several have: "
                f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
            )
    if found:
        used = [PurePosixPath(file).name for file in listed]
        notes.append(f"splits by annotations/{{{','.join(used)}}}")
    return found
