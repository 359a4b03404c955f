"""Images of local WebDataset shards: wds:PATTERN."""

import glob
import itertools
import os
from pathlib import Path
from typing import Any

from underpaint.data.sources.archive import is_tar, tar_members, uncompressed
from underpaint.data.sources.base import Listing, RangeReader, stamp_of
from underpaint.data.sources.columns import column_labels
from underpaint.data.sources.index import Entries
from underpaint.data.sources.names import IMAGE_SUFFIXES, split_folders, split_of_file
from underpaint.errors import InputError

LARGEST_PATTERN = 1_000_000  # shards that braces may stand for


def list_shards(text: str) -> Listing:
    pattern = text.removeprefix("wds:")
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(f"{text}: only local shards are read; expected a path with {{000..009}} or * in it")
    shards = _expand(pattern, text)
    notes: list[str] = []
    skipped: list[dict[str, str]] = []
    found: list[str] = []
    splits: list[str | None] = []
    stamps: list[str] = []
    ranges: list[tuple[int, int, int]] = []
    labels: list[Any] = []
    flats: list[str] = []
    keep = []
    seen = 0
    root = os.path.commonpath([shard.parent for shard in shards])
    places = {shard: os.path.relpath(shard, root).replace(os.sep, "/") for shard in shards}
    folders = split_folders(list(places.values()))
    for shard in shards:
        if not is_tar(shard):
            raise InputError(f"{shard} is not a readable tar file: damaged or cut off")
        flat, kept = uncompressed(shard, stamp_of(shard))
        keep.append(kept)
        flats.append(str(flat))
        stamp, split = stamp_of(shard), split_of_file(places[shard], folders)
        members = tar_members(flat, shard)
        seen += len(members)
        classes = _shard_labels(flat, members)
        used: set[str] = set()
        for name, (offset, size) in members.items():
            key, suffix = _sample_key(name)
            if f".{suffix}" not in IMAGE_SUFFIXES or key in used:  # masks have suffixes such as mask.png
                continue
            if size == 0:
                skipped.append({"path": f"{shard.name}/{name}", "reason": "empty file"})
                continue
            used.add(key)
            found.append(f"{shard.name}/{name}")
            splits.append(split)
            stamps.append(stamp)
            ranges.append((len(flats) - 1, offset, size))
            labels.append(classes.get(key))
    if len(set(found)) < len(found):  # shards of one name in several folders
        found = [f"{n}/{name}" for n, name in enumerate(found)]
    numbers, names = column_labels(labels, None, notes)
    entries = Entries.of(found, splits, numbers)
    reader = RangeReader(flats, ranges, keep)
    kind = f"WebDataset, {len(shards)} shard{'s' if len(shards) != 1 else ''}"
    place = "\n".join(str(shard.resolve()) for shard in shards)
    return Listing(kind, place, entries, stamps, reader, names, notes, skipped, seen)


def _expand(pattern: str, text: str) -> list[Path]:
    patterns = [pattern]
    if "{" in pattern:
        try:
            import braceexpand
        except ImportError as error:
            raise InputError(f"{text} needs the package webdataset: pip install underpaint[webdataset]") from error
        try:
            patterns = list(itertools.islice(braceexpand.braceexpand(pattern), LARGEST_PATTERN + 1))
        except ValueError as error:
            raise InputError(f"{text}: {error}") from error
        if len(patterns) > LARGEST_PATTERN:
            raise InputError(f"{text}: stands for more than {LARGEST_PATTERN:,} shards")
    shards: list[Path] = []
    for each in patterns:
        matches = sorted(glob.glob(os.path.expanduser(each), recursive=True))
        if not matches:
            raise InputError(f"{text}: no such shard: {each}")
        shards += [Path(match) for match in matches]
    return shards


def _sample_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: a sample is what its files' names share up to the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    key, _, suffix = last.partition(".")
    return f"{folder}/{key}", suffix.lower()


def _shard_labels(flat: Path, members: dict[str, tuple[int, int]]) -> dict[str, int | str]:
    labels: dict[str, int | str] = {}
    with flat.open("rb") as file:
        for name, (offset, size) in members.items():
            key, suffix = _sample_key(name)
            if suffix == "cls":
                text = os.pread(file.fileno(), size, offset).decode("utf-8", "replace").strip()
                labels[key] = int(text) if text.lstrip("-").isdigit() else text
    return labels
