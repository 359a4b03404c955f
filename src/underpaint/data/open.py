"""Open DATA as a source, and say how it was understood.

A source lists what there is (names, splits, labels, numbers) and reads encoded bytes; it decodes nothing.
"""

import importlib
import re
from pathlib import Path

import numpy as np

from underpaint.data.sources.base import Listing, Source
from underpaint.data.sources.names import IMAGE_SUFFIXES
from underpaint.data.sources.path import list_path
from underpaint.data.sources.tree import MaskFiles
from underpaint.data.splits import held_out, labelled_indices, labels_judge
from underpaint.errors import InputError
from underpaint.files import SOURCES, place_of


def open_source(data: str | Path, *, groups: str | None = None, masks: MaskFiles = "aside") -> "Source":
    """List the images of DATA and say how it was understood.

    Args:
        data: a folder, a .zip or .tar file, parquet files or a folder of them, or what `SOURCES` lists.
        groups: a regular expression searched in each name; its first group (else the whole match) names the patient,
            slide or video of an image, and a hold-out keeps each on one side.
        masks: "images" reads files that are masks of images beside them as images, too.

    Raises:
        InputError: nothing there, nothing readable as a set of images, an optional package is missing, or `groups`
            is not a regular expression.
    """
    text = str(data)
    pattern = _compile(groups)
    path = place_of(text)
    if path is None:
        module, _, function = SOURCES[text.partition(":")[0]][0].partition(":")
        listing: Listing = getattr(importlib.import_module(module), function)(text)
    else:
        listing = list_path(path, text, masks)
    if not listing.entries:
        raise InputError(_nothing(text, listing))
    source = Source(text, listing, pattern)
    _describe(source)
    return source


def _compile(groups: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(groups) if groups else None
    except re.error as error:
        raise InputError(f"--groups {groups!r} is not a regular expression: {error}") from error


def _nothing(text: str, listing: Listing) -> str:
    seen = f"{listing.seen} file{'s' if listing.seen != 1 else ''} seen"
    if listing.skipped:
        first = listing.skipped[0]
        return f"{text} holds no images: {seen}, the first: {first['path']}: {first['reason']}"
    return f"{text} holds no images: {seen}; expected {', '.join(sorted(s[1:] for s in IMAGE_SUFFIXES))}"


def _describe(source: Source) -> None:
    """Say counts, splits, labels and the hold-out, before anything starts."""
    entries, notes = source.entries, source.notes
    splits = entries.counts()
    notes.insert(0, f"{source.kind}: {len(entries):,} images")
    if set(splits) == {None}:
        notes.append("splits: none")
    else:
        counts = ", ".join(f"{s} {splits[s]:,}" for s in ("train", "val", "test") if s in splits)
        outside = f"; {splits[None]:,} images belong to no split" if None in splits else ""
        reads = "; pretraining reads train" if "train" in splits else "; there is no train split"
        notes.append(f"splits: {counts}{outside}{reads}")
    sides = labelled_indices(source)
    if sides is None:
        useless = labels_judge(source)
        notes.append(f"class labels: not used, {useless}" if useless else "class labels: none")
    else:
        known = int((entries.labels >= 0).sum())
        names = source.classes or []
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        notes.append(f"class labels: {known:,} images, {len(names)} classes ({shown})")
        if len(held := held_out(source)):
            how = f"whole groups by {source.pattern.pattern!r}" if source.pattern else "stratified"
            notes.append(
                f"no labelled train and test splits: a hold-out of {len(held):,} images ({how}) judges, which pretraining "
                "leaves out unless --all-images"
            )
    if source.number is not None and entries.numbers is not None:
        numbered = len(entries) - int(np.isnan(entries.numbers).sum())
        notes.append(f"numbers: {numbered:,} images, column {source.number!r}")
    if source.pattern is not None:
        unmatched = len(entries) - source.matched
        notes.append(
            f"groups: {len(source.groups[1]):,}" + (f"; {unmatched:,} names do not match" if unmatched else "")
        )
    if source.skipped:
        notes.append(f"left out: {len(source.skipped):,} files, the first: {_one(source.skipped[0])}")


def _one(skip: dict[str, str]) -> str:
    return f"{skip['path']}: {skip['reason']}"
