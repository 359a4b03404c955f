"""The rules of DATA for a tree of files, be it a folder or an archive."""

import csv
import io
import posixpath
from collections.abc import Callable
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
from underpaint.errors import InputError
from underpaint.reading import plain_json

SIDE_SUFFIXES = {".json", ".jsonl", ".txt", ".md", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".pdf"}
SIDE_NAMES = {"license", "licence", "readme", "notice", "copying", "sha256sums", "md5sums", "thumbs.db"}
TABLES = {"labels.csv", "metadata.csv"}  # beside images
NAME_COLUMNS = ("file_name", "filename", "path", "image", "name")  # of a table, the first of these names the images


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
) -> Listing:
    """Apply the rules of DATA to a tree of files; `read(name)` gives bytes, `reader(names)` the entries' reader. Files
    that are masks of images beside them are left out, unless `masks` says that they are images."""
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
    names = [file.name for file in images]
    folders = split_folders(names)
    # Side files beside the top folder (a licence, say) do not hide it; masks and annotations beside images do.
    ours = [file.name for file in files if is_annotation(file.name) and not is_hidden(file.name)] + names
    top = common_top(ours, folders)
    if top:
        notes.append(f"looked through the common top folder {top}/")
    splits, rests = zip(*(split_of(name, folders, top) for name in names), strict=True) if names else ((), ())
    annotated = coco_splits(files, names, read, notes)
    labels, classes = folder_labels(list(splits), list(rests))
    say_unlabelled(names, list(splits), labels, classes, notes)
    column, numbers = table_numbers([file.name for file in files], names, read, notes)
    listed = Names.of(names)
    entries = Entries.of(listed, [annotated.get(name) for name in names] if annotated else splits, labels, numbers)
    stamps: Any = [file.stamp for file in images]
    if stamps and not isinstance(stamps[0], str):
        stamps = np.array(stamps, np.int64)
    return Listing(
        *(kind, str(place.resolve()), entries, stamps, reader(listed), classes, notes, skipped, len(files), column)
    )


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


def table_numbers(
    files: list[str], images: list[str], read: Callable[[str], bytes], notes: list[str]
) -> tuple[str | None, list[float | None]]:
    """Numbers from the tables TABLES that lie beside images, in a row for each, named by its path from there.

    Raises:
        InputError: a table that is no CSV, or names no images.
    """
    by_name: dict[str, dict[str, str]] = {}
    known, lacking = set(images), 0
    for file in files:
        if PurePosixPath(file).name.lower() not in TABLES or is_hidden(file) or is_annotation(file):
            continue
        try:
            rows = list(csv.DictReader(io.StringIO(read(file).decode("utf-8-sig"), newline="")))
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(
                f"{file} cannot be read as CSV ({error}); expected UTF-8, names of columns first"
            ) from error
        name = next((column for column in (rows[0] if rows else {}) if column in NAME_COLUMNS), None)
        if name is None:
            notes.append(f"{file} is not read: no column is called {' or '.join(NAME_COLUMNS)}")
            continue
        for row in rows:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(file), row[name] or ""))
            lacking += path not in known
            by_name[path] = {column: value for column, value in row.items() if column not in (name, None)}
    if not by_name:
        return None, [None] * len(images)
    if lacking:
        notes.append(f"{lacking:,} of the {len(by_name):,} images that tables list are not there")
    columns = dict.fromkeys(column for row in by_name.values() for column in row)
    listed = {column: [by_name.get(image, {}).get(column) for image in images] for column in columns}
    return numbers_of(listed, len(images), notes)
