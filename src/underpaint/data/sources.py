"""Where images come from: a folder, an archive, parquet files, Hugging Face datasets, WebDataset shards.

A source lists what there is (names, splits, labels) and reads encoded bytes; it decodes nothing.
"""

import bz2
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from underpaint.data.decode import Unreadable
from underpaint.errors import InputError
from underpaint.files import KINDS, place_of, replacing

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# What else people call them, as Hugging Face datasets reads it, and two more; a class may have such a name too.
MORE_SPLITS = {"training": "train", "learning": "train", "dev": "val"}
MORE_SPLITS |= dict.fromkeys(("testing", "eval", "evaluation", "holdout", "heldout"), "test")
NOT_IMAGES = {"masks", "annotations", "labels", "semantic"}  # folders that hold answers, not images
SIDE_SUFFIXES = {".json", ".jsonl", ".txt", ".md", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".pdf"}
SIDE_NAMES = {"license", "licence", "readme", "notice", "copying", "sha256sums", "md5sums", "thumbs.db"}
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
HOLD_OUT = 0.2
NUMBERS = ("number", "target", "value")  # what a column of numbers to be predicted is called, where there are several
TABLES = {"labels.csv", "metadata.csv"}  # beside images
NAME_COLUMNS = ("file_name", "filename", "path", "image", "name")  # of a table, the first of these names the images
IN_MEMORY = 512 * 2**20  # bytes of encoded parquet images held in memory; more is copied to a flat file once


@dataclass(frozen=True)
class Entry:
    """One image: its path as people know it (unique in the source), split, class number, and number to be predicted."""

    name: str
    split: str | None
    label: int | None
    number: float | None = None


@runtime_checkable
class Reader(Protocol):
    """The encoded bytes of the n-th entry; pickles into, and works after a fork in, worker processes."""

    def read(self, index: int) -> bytes: ...


def cache_root(cache_dir: Path | None = None) -> Path:
    """The folder of caches: the argument, else `$UNDERPAINT_CACHE`, else `~/.cache/underpaint`."""
    return cache_dir or Path(os.environ.get("UNDERPAINT_CACHE") or Path.home() / ".cache" / "underpaint")


def open_source(data: str | Path, *, groups: str | None = None) -> "Source":
    """List the images of DATA and say how it was understood.

    Args:
        data: a folder, a .zip or .tar file, parquet files or a folder of them, "hf:NAME[:SPLIT]" or "wds:PATTERN".
        groups: a regular expression searched in each name; its first group (else the whole match) names the patient,
            slide or video of an image, and a hold-out keeps each on one side.

    Raises:
        InputError: nothing there, nothing readable as a set of images, an optional package is missing, or `groups`
            is not a regular expression.
    """
    text = str(data)
    pattern = _compile(groups)
    if text.startswith("hf:"):
        listing = _list_hub(text)
    elif text.startswith("wds:"):
        listing = _list_shards(text)
    else:
        place = place_of(text)
        assert place is not None
        listing = _list_path(place, text)
    if not listing.entries:
        raise InputError(_nothing(text, listing))
    source = Source(text, listing, pattern)
    _describe(source)
    return source


class Source:
    """The images of one DATA argument, listed once. Safe in worker processes."""

    def __init__(self, location: str, listing: "_Listing", groups: re.Pattern[str] | None = None):
        self.location = location
        self.entries = listing.entries
        self.classes = listing.classes
        self.number = listing.number  # the column that the numbers are of
        self.notes = listing.notes
        self.skipped = listing.skipped
        self._kind = listing.kind
        self._place = listing.place
        self._stamps = listing.stamps
        self._reader = listing.reader
        self._groups = groups

    def read(self, index: int) -> bytes:
        """The encoded bytes of an entry.

        Raises:
            Unreadable: the file has gone, is locked away, or its archive is damaged there.
        """
        try:
            return self._reader.read(index)
        except Unreadable:
            raise
        # Archives and file systems fail in many ways (OSError, BadZipFile, RuntimeError for encryption, zlib.error).
        except Exception as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise Unreadable(f"cannot be read: {' '.join(text.split())[:160] or type(error).__name__}") from error

    def size(self, index: int) -> int:
        """Bytes of an entry as it is stored, without reading it where its kind of source knows.

        Raises:
            Unreadable: as `read`.
        """
        measure = getattr(self._reader, "size", None)
        try:
            return measure(index) if measure is not None else len(self.read(index))
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error

    def fingerprint(self) -> str:
        """sha256 over the kind, the resolved place, and the names, sizes and modification times of the files."""
        digest = hashlib.sha256(f"{self._kind}\0{self._place}\0".encode("utf-8", "surrogateescape"))
        for entry, stamp in zip(self.entries, self._stamps, strict=True):
            digest.update(f"{entry.name}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def group_of(self, index: int) -> str:
        """The group of an entry: the match of the `groups` expression, else its own name."""
        name = self.entries[index].name
        match = self._groups.search(name) if self._groups else None
        if match is None:
            return name
        return (match.group(1) if match.re.groups else match.group(0)) or name

    @property
    def grouped(self) -> bool:
        """Whether a hold-out keeps groups together."""
        return self._groups is not None

    @property
    def matched(self) -> int:
        """How many names the `groups` expression occurs in."""
        return sum(self._groups is not None and self._groups.search(e.name) is not None for e in self.entries)


def pretraining_indices(source: Source, *, all_images: bool = False) -> list[int]:
    """The entries of the train split where there is one, else all; without those that `labelled_indices` holds out to
    judge by, and what is of their groups, unless `all_images`."""
    train = [i for i, entry in enumerate(source.entries) if entry.split == "train"]
    chosen = train or list(range(len(source.entries)))
    if all_images or not (held := _held_out(source)):
        return chosen
    groups = {source.group_of(i) for i in held}
    return [i for i in chosen if source.group_of(i) not in groups]


def _held_out(source: Source) -> list[int]:
    """The labelled test part where it is no split of the source's own."""
    sides = labelled_indices(source)
    if sides is None or not sides[1]:
        return []
    fitted = {source.entries[i].split for i in sides[0]}
    return sides[1] if fitted & {source.entries[i].split for i in sides[1]} or fitted != {"train"} else []


def labelled_indices(source: Source) -> tuple[list[int], list[int]] | None:
    """Which labelled entries to fit on and which to judge by.

    The test split judges if it is labelled, else the val split, else a stratified hold-out of 20 % (whole groups,
    where the source was opened with `groups`), which depends on names, labels and groups alone. None where there are
    no labels.
    """
    labelled = [i for i, entry in enumerate(source.entries) if entry.label is not None]
    return split_indices(source, labelled) if labelled else None


def split_indices(source: Source, indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Some entries in two: to fit on and to judge by, as `labelled_indices` does it."""
    by_split: dict[str | None, list[int]] = {}
    for i in indices:
        by_split.setdefault(source.entries[i].split, []).append(i)
    if "train" not in by_split:
        return _hold_out(source, list(indices))
    for judge in ("test", "val"):
        if judge in by_split:
            return by_split["train"], by_split[judge]
    return _hold_out(source, by_split["train"])


def _hold_out(source: Source, indices: list[int]) -> tuple[list[int], list[int]]:
    """Groups go to the test side one by one where that brings its class counts nearer to 20 %.

    They come in the order of their names' hashes: no seed moves them, and images that are added later move few others.
    """
    labels = [source.entries[i].label for i in indices]
    place = {label: n for n, label in enumerate(sorted(set(labels), key=str))}
    members: dict[str, list[int]] = {}
    for position, i in enumerate(indices):
        members.setdefault(source.group_of(i), []).append(position)
    sizes = Counter(labels)
    wanted = np.zeros(len(place))
    for label, size in sizes.items():
        wanted[place[label]] = min(max(1, round(HOLD_OUT * size)), size - 1)
    held = np.zeros(len(place))
    test: list[int] = []
    for name in sorted(members, key=_order):
        group = members[name]
        touched, counts = np.unique([place[labels[p]] for p in group], return_counts=True)
        after = held[touched] + counts
        if ((after - wanted[touched]) ** 2).sum() < ((held[touched] - wanted[touched]) ** 2).sum():
            held[touched] = after
            test += group
    chosen = set(test)
    return [i for p, i in enumerate(indices) if p not in chosen], [indices[p] for p in sorted(chosen)]


def _order(name: str) -> tuple[bytes, str]:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), name


@dataclass
class _Listing:
    """What a kind of source found; `stamps` tell apart versions of each entry's file, `place` (resolved, empty where
    the stamps say it) sets that have equal ones."""

    kind: str
    place: str
    entries: list[Entry]
    stamps: list[str]
    reader: Reader
    classes: list[str] | None
    notes: list[str]
    skipped: list[dict[str, str]]
    seen: int = 0
    number: str | None = None


def _compile(groups: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(groups) if groups else None
    except re.error as error:
        raise InputError(f"--groups {groups!r} is not a regular expression: {error}") from error


def _nothing(text: str, listing: _Listing) -> str:
    seen = f"{listing.seen} file{'s' if listing.seen != 1 else ''} seen"
    if listing.skipped:
        first = listing.skipped[0]
        return f"{text} holds no images: {seen}, the first: {first['path']}: {first['reason']}"
    return f"{text} holds no images: {seen}; expected {', '.join(sorted(s[1:] for s in IMAGE_SUFFIXES))}"


def _describe(source: Source) -> None:
    """Say counts, splits, labels and the hold-out, before anything starts."""
    entries, notes = source.entries, source.notes
    splits = Counter(entry.split for entry in entries)
    notes.insert(0, f"{source._kind}: {len(entries):,} images")
    if set(splits) == {None}:
        notes.append("splits: none")
    else:
        counts = ", ".join(f"{s} {splits[s]:,}" for s in ("train", "val", "test") if s in splits)
        outside = f"; {splits[None]:,} images belong to no split" if None in splits else ""
        reads = "; pretraining reads train" if "train" in splits else "; there is no train split"
        notes.append(f"splits: {counts}{outside}{reads}")
    sides = labelled_indices(source)
    if sides is None:
        notes.append("class labels: none")
    else:
        known = sum(entry.label is not None for entry in entries)
        names = source.classes or []
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        notes.append(f"class labels: {known:,} images, {len(names)} classes ({shown})")
        if held := _held_out(source):
            how = f"whole groups by {source._groups.pattern!r}" if source._groups else "stratified"
            notes.append(
                f"no labelled train and test splits: a hold-out of {len(held):,} images ({how}) judges, which pretraining "
                "leaves out unless --all-images"
            )
    if source.number is not None:
        numbered = sum(entry.number is not None for entry in entries)
        notes.append(f"numbers: {numbered:,} images, column {source.number!r}")
    if source._groups is not None:
        unmatched = len(entries) - source.matched
        groups = len({source.group_of(i) for i in range(len(entries))})
        notes.append(f"groups: {groups:,}" + (f"; {unmatched:,} names do not match" if unmatched else ""))
    if source.skipped:
        notes.append(f"left out: {len(source.skipped):,} files, the first: {_one(source.skipped[0])}")


def _one(skip: dict[str, str]) -> str:
    return f"{skip['path']}: {skip['reason']}"


# Files: folders and archives


@dataclass(frozen=True)
class _File:
    name: str  # with forward slashes, relative to the data
    size: int
    stamp: str


def _list_path(path: Path, text: str) -> _Listing:
    if path.is_dir():
        return _list_folder(path, text)
    if not path.is_file():
        raise InputError(f"{text} is neither a file nor a folder; expected {KINDS}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {text}: {error.strerror}") from error
    if path.suffix.lower() == ".parquet" or start == b"PAR1":
        return _list_parquet([path], path.parent)
    if zipfile.is_zipfile(path):
        return _list_zip(path)
    if path.suffix.lower() == ".zip":
        raise InputError(f"{text} is not a readable zip file: damaged or cut off")
    if _is_tar(path):
        return _list_tar(path)
    if ".tar" in path.name.lower() or path.suffix.lower() == ".tgz":
        raise InputError(f"{text} is not a readable tar file: damaged or cut off")
    raise InputError(f"{text} is not a kind of data that is read; expected {KINDS}")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (OSError, EOFError, lzma.LZMAError):  # a damaged compressed stream
        return False


class _FolderReader:
    def __init__(self, paths: list[str]):
        self._paths = paths

    def read(self, index: int) -> bytes:
        with open(self._paths[index], "rb") as file:
            return file.read()

    def size(self, index: int) -> int:
        return os.path.getsize(self._paths[index])


class _ZipReader:
    """Opens the archive once a process: a file position shared after a fork would mix up two readers."""

    def __init__(self, path: str, names: list[str]):
        self._path = path
        self._names = names
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def read(self, index: int) -> bytes:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self._path))
        return self._opened[1].read(self._names[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class _RangeReader:
    """Entries are stretches of flat files: members of tar files, or rows copied out of large parquet files."""

    def __init__(self, ranges: list[tuple[str, int, int]], keep: Any = None):
        self._ranges = ranges
        self._keep = keep  # a temporary folder that must live as long as the reader
        self._files: dict[tuple[int, str], int] = {}

    def read(self, index: int) -> bytes:
        path, offset, size = self._ranges[index]
        key = (os.getpid(), path)
        if key not in self._files:
            self._files[key] = os.open(path, os.O_RDONLY)
        data = os.pread(self._files[key], size, offset)
        if len(data) < size:
            raise Unreadable(f"truncated: its archive ends {size - len(data)} bytes too early")
        return data

    def size(self, index: int) -> int:
        return self._ranges[index][2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_keep": None}

    def __del__(self) -> None:
        for (process, _), descriptor in self._files.items():
            if process == os.getpid():
                os.close(descriptor)


def _list_folder(path: Path, text: str) -> _Listing:
    files: list[_File] = []
    skipped: list[dict[str, str]] = []
    for relative, entry in walk(path, skipped):
        name = relative.replace(os.sep, "/")
        try:
            if entry.is_file():
                status = entry.stat()
                files.append(_File(name, status.st_size, f"{status.st_size} {status.st_mtime_ns}"))
            elif PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                skipped.append({"path": name, "reason": "not a regular file (a broken link, a pipe or a device)"})
        except OSError as error:
            skipped.append({"path": name, "reason": f"cannot be read: {error.strerror}"})
    tables = [file for file in files if file.name.lower().endswith(".parquet") and not is_hidden(file.name)]
    if tables and not any(_is_image(file.name) for file in files):
        return _list_parquet([path / file.name for file in tables], path)

    def read(name: str) -> bytes:
        return (path / name).read_bytes()

    def reader(names: list[str]) -> Reader:
        return _FolderReader([f"{path}/{name}" for name in names])

    listing = _list_files("folder", path, files, skipped, read, reader)
    archives = [f.name for f in files if f.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))]
    if not listing.entries and archives:
        raise InputError(f"{text} holds no images but an archive; give that instead: {path / archives[0]}")
    return listing


def walk(root: Path, skipped: list[dict[str, str]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files below a folder in sorted order, links followed, each real folder once."""
    seen: set[str] = set()
    stack = [""]
    while stack:
        relative = stack.pop()
        folder = os.path.join(root, relative)
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            continue
        seen.add(real)
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            skipped.append({"path": relative or ".", "reason": f"folder cannot be listed: {error.strerror}"})
            continue
        below = []
        for entry in entries:
            name = os.path.join(relative, entry.name)
            if entry.is_dir():
                if not entry.name.startswith("."):
                    below.append(name)
                    if PurePosixPath(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                        skipped.append({"path": name, "reason": "a folder with the name of an image"})
            else:
                yield name, entry
        stack += reversed(below)


def _list_zip(path: Path) -> _Listing:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is not a readable zip file: {error}") from error
    stamp = _stamp(path)
    files = [_File(name, info.file_size, f"{stamp} {info.CRC}") for name, info in members.items()]

    def read(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)

    return _list_files("zip file", path, files, [], read, lambda names: _ZipReader(str(path), names))


def _list_tar(path: Path) -> _Listing:
    stamp = _stamp(path)
    flat, keep = _uncompressed(path, stamp)
    members = _tar_members(flat, path)
    files = [_File(name, size, f"{stamp} {size}") for name, (_, size) in members.items()]

    def read(name: str) -> bytes:
        offset, size = members[name]
        with flat.open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def reader(names: list[str]) -> Reader:
        return _RangeReader([(str(flat), *members[name]) for name in names], keep)

    return _list_files("tar file", path, files, [], read, reader)


def _tar_members(flat: Path, shown: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each regular file of an uncompressed tar file; of a name that occurs twice, the last."""
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(flat, "r:") as archive:
            for member in archive:
                if member.isreg():
                    members[member.name.removeprefix("./")] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not members:
            raise InputError(f"{shown} is not a readable tar file: {error}") from error
        # cut off in the middle: what was listed before is still there
    return members


def _uncompressed(path: Path, stamp: str) -> tuple[Path, Any]:
    """The tar file itself, or a flat copy of a compressed one: compressed streams have no random access."""
    with path.open("rb") as file:
        opener = COMPRESSIONS.get(file.read(2))
    if opener is None:
        return path, None

    def write(target: Path) -> None:
        try:
            with opener(path, "rb") as packed, target.open("wb") as flat:
                shutil.copyfileobj(packed, flat, 2**20)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise InputError(f"{path} is not a readable tar file: {error}") from error

    return _flat_copy(f"{path.resolve()} {stamp}", ".tar", write)


def _flat_copy(key: str, suffix: str, write: Any) -> tuple[Path, Any]:
    """A file under the cache folder made once by `write(path)`; in a temporary folder where that is read-only."""
    name = "flat-" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32] + suffix
    keep = None
    folder = cache_root()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        keep = tempfile.TemporaryDirectory(prefix="underpaint-")
        folder = Path(keep.name)
    if not (folder / name).exists():
        with replacing(folder / name) as partial:
            write(partial)
    return folder / name, keep


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _is_answer(name: str) -> bool:
    """Whether a file lies in a folder of masks or annotations."""
    return any(part.lower() in NOT_IMAGES for part in PurePosixPath(name).parts[:-1])


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name) and not _is_answer(name)


def _list_files(
    kind: str, place: Path, files: list[_File], skipped: list[dict[str, str]], read: Any, reader: Any
) -> _Listing:
    """Apply the rules of DATA to a tree of files; `read(name)` gives bytes, `reader(names)` the entries' reader."""
    notes: list[str] = []
    images: list[_File] = []
    for file in sorted(files, key=lambda file: file.name):
        path = PurePosixPath(file.name)
        if is_hidden(file.name) or _is_answer(file.name):
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            if path.suffix.lower() not in SIDE_SUFFIXES and path.stem.lower() not in SIDE_NAMES:
                skipped.append({"path": file.name, "reason": "not an image"})
        elif file.size == 0:
            skipped.append({"path": file.name, "reason": "empty file"})
        else:
            images.append(file)
    names = [file.name for file in images]
    folders = _split_folders(names)
    # Side files beside the top folder (a licence, say) do not hide it; masks and annotations beside images do.
    ours = [file.name for file in files if _is_answer(file.name) and not is_hidden(file.name)] + names
    top = _common_top(ours, folders)
    if top:
        notes.append(f"looked through the common top folder {top}/")
    splits, rests = zip(*(_split_of(name, folders, top) for name in names), strict=True) if names else ((), ())
    annotated = _coco_splits(files, names, read, notes)
    labels, classes = _folder_labels(list(splits), list(rests))
    _say_unlabelled(names, list(splits), labels, classes, notes)
    column, numbers = _table_numbers([file.name for file in files], names, read, notes)
    entries = [
        Entry(name, annotated.get(name) if annotated else split, label, number)
        for name, split, label, number in zip(names, splits, labels, numbers, strict=True)
    ]
    stamps = [file.stamp for file in images]
    return _Listing(
        *(kind, str(place.resolve()), entries, stamps, reader(names), classes, notes, skipped, len(files), column)
    )


def _common_top(names: Sequence[str], folders: dict[str, str]) -> str:
    """The one folder that holds everything, unless its name already says something (a split, masks)."""
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in names}
    top = tops.pop() if len(tops) == 1 else ""
    return "" if top in folders or top.lower() in SPLITS or top.lower() in NOT_IMAGES else top


def split_word(word: str) -> str | None:
    """The split that a word names, in either case, a number behind it or not: train, Training, val2017, test_1."""
    known = re.fullmatch(r"([a-z]+?)[-_ ]?\d*", re.sub(r"^(hold|held)[-_ ]out", r"\1out", word.lower()))
    return {**SPLITS, **MORE_SPLITS}.get(known.group(1)) if known else None


def _split_folders(names: Sequence[str]) -> dict[str, str]:
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


def _split_of(name: str, folders: dict[str, str], top: str = "") -> tuple[str | None, str]:
    """The split that the first such folder on the path names, and the path below it (or below `top`)."""
    parts = name.split("/")
    for depth in range(1, len(parts)):
        split = folders.get("/".join(parts[:depth]))
        if split is not None:
            return split, "/".join(parts[depth:])
    return None, name[len(top) + 1 :] if top else name


def _folder_labels(splits: list[str | None], rests: list[str]) -> tuple[list[int | None], list[str] | None]:
    """Class labels: first-level folders below a split, where at least two hold most of its images and none is named
    images; or where all of them (one, say) are classes of a split where this is so."""
    folders = [rest.split("/", 1)[0] if "/" in rest else "" for rest in rests]
    tops: dict[str | None, Counter[str]] = {}
    for split, folder in zip(splits, folders, strict=True):
        tops.setdefault(split, Counter())[folder] += 1
    candidates = {
        split: set(counts) - {""}
        for split, counts in tops.items()
        if 2 * counts[""] < counts.total() and "images" not in {name.lower() for name in counts}
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


def _say_unlabelled(
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


def folders_of(name: str) -> tuple[str, ...]:
    """The folders of a path by which a file is told apart, in lower case: without images, masks and the like, and
    words for a split made one."""
    parts = (part.lower() for part in PurePosixPath(name.replace("\\", "/")).parts[:-1])
    alike = {**SPLITS, **MORE_SPLITS}
    return tuple(alike.get(part, part) for part in parts if part != "images" and part not in NOT_IMAGES)


def may_be_one(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether folders may say the same place: those of one path are all among those of the other."""
    return Counter(one) <= Counter(other) or Counter(other) <= Counter(one)


def coco_split(name: str) -> str | None:
    """The split of a file annotations/SPLIT.json or annotations/instances_SPLIT.json; None for any other file."""
    path = PurePosixPath(name)
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


def _coco_splits(files: list[_File], names: list[str], read: Any, notes: list[str]) -> dict[str, str]:
    """Splits by COCO json: annotations/SPLIT.json or instances_SPLIT.json name the images of each split."""
    listed: dict[str, list[str]] = {}
    for name in sorted(file.name for file in files if coco_split(file.name) and not is_hidden(file.name)):
        try:
            listed[name] = [str(image["file_name"]) for image in json.loads(read(name))["images"]]
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


# Parquet files


class _RowReader:
    """Encoded images of parquet files held in memory, loaded on first use in each process that was not forked."""

    def __init__(self, paths: list[str], column: str, rows: list[tuple[int, int]]):
        self._paths = paths
        self._column = column
        self._rows = rows
        self._images: dict[int, pa.Array] = {}

    def read(self, index: int) -> bytes:
        number, row = self._rows[index]
        if number not in self._images:
            table = pq.ParquetFile(self._paths[number]).read(columns=[self._column])
            self._images[number] = _image_bytes(table.column(0))
        data = self._images[number][row].as_py()
        if data is None:
            raise Unreadable("the row holds no image bytes")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": {}}


def _image_bytes(column: pa.ChunkedArray | pa.Array) -> Any:
    """The bytes of an image column: binary itself, or the field `bytes` of a struct."""
    if isinstance(column, pa.ChunkedArray):
        chunks = [_image_bytes(chunk) for chunk in column.chunks]
        return pa.chunked_array(chunks) if chunks else pa.chunked_array([], pa.binary())
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(schema: pa.Schema, path: Path) -> pa.Field:
    fits = [
        field
        for field in schema
        if _is_binary(field.type)
        or (pa.types.is_struct(field.type) and any(f.name == "bytes" and _is_binary(f.type) for f in field.type))
    ]
    if not fits:
        raise InputError(
            f"{path} has no image column; expected one of struct {{bytes, path}} or binary, "
            f"its columns are {', '.join(schema.names)}"
        )
    return next((field for field in fits if field.name in ("image", "img", "jpg", "png")), fits[0])


def _list_parquet(paths: list[Path], root: Path) -> _Listing:
    paths = sorted(paths)
    names: list[str] = []
    fallbacks: list[str] = []
    splits: list[str | None] = []
    stamps: list[str] = []
    rows: list[tuple[int, int]] = []
    labels: list[Any] = []
    others: list[dict[str, list[Any]]] = []
    class_names: list[str] | None = None
    total = 0
    column = ""
    folders = _split_folders([path.relative_to(root).as_posix() for path in paths])
    for number, path in enumerate(paths):
        try:
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
            field = _image_column(schema, path)
            if column and field.name != column:
                raise InputError(f"{path}: its image column is {field.name!r}, that of {paths[0]} is {column!r}")
            column = field.name
            wanted = [f"{column}.path"] if pa.types.is_struct(field.type) and "path" in _fields(field) else []
            wanted += ["label"] if "label" in schema.names else []
            numeric = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
            wanted += [name for name in numeric if name != "label"]
            table = file.read(columns=wanted) if wanted else None
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}") from error
        count = file.metadata.num_rows
        for group in range(file.metadata.num_row_groups):
            group_columns = file.metadata.row_group(group)
            total += sum(
                group_columns.column(c).total_uncompressed_size
                for c in range(group_columns.num_columns)
                if group_columns.column(c).path_in_schema.split(".")[0] == column
            )
        class_names = class_names or _class_names(schema)
        relative = path.relative_to(root)
        stem = relative.with_suffix("").as_posix()
        known = table.column(column) if table is not None and column in table.column_names else None
        given = [item["path"] if item else None for item in known.to_pylist()] if known is not None else [None] * count
        split = _split_of_file(relative.as_posix(), folders)
        fallbacks += [f"{stem}/{row}" for row in range(count)]
        names += [name or f"{stem}/{row}" for row, name in enumerate(given)]
        splits += [split] * count
        stamps += [_stamp(path)] * count
        rows += [(number, row) for row in range(count)]
        has_labels = table is not None and "label" in table.column_names
        labels += table.column("label").to_pylist() if table is not None and has_labels else [None] * count
        others.append({name: table.column(name).to_pylist() for name in numeric} if table is not None else {})
    if len(set(names)) < len(names):  # paths that repeat, in several files or in one
        names = fallbacks
    notes: list[str] = []
    classified, classes = _column_labels(labels, class_names, notes)
    # a label of classes is none of the numbers; one of measured values is, if it is the only column
    shared = [name for name in others[0] if all(name in each for each in others) and not (name == "label" and classes)]
    columns = {name: [value for each in others for value in each[name]] for name in shared}
    number, numbers = numbers_of(columns, len(names), notes)
    entries = [Entry(*item) for item in zip(names, splits, classified, numbers, strict=True)]
    reader: Reader = _RowReader([str(path) for path in paths], column, rows)
    if total > IN_MEMORY:
        reader = _copy_rows(paths, column, notes)
    kind = "parquet file" if len(paths) == 1 else f"{len(paths)} parquet files"
    place = "\n".join(str(path.resolve()) for path in paths)
    return _Listing(kind, place, entries, stamps, reader, classes, notes, [], len(paths), number)


def _fields(field: pa.Field) -> list[str]:
    return [each.name for each in field.type]


def _copy_rows(paths: list[Path], column: str, notes: list[str]) -> Reader:
    """Encoded images of large parquet files in one flat file: a row group must not be read again for each image."""
    sizes: list[int] = []

    def batches() -> Iterator[Any]:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(256, columns=[column]):
                yield from _image_bytes(batch.column(0))

    def write(target: Path) -> None:
        with target.open("wb") as flat:
            for item in batches():
                data = item.as_py() or b""
                sizes.append(len(data))
                flat.write(data)
            flat.write(np.array([*sizes, len(sizes)], dtype="<u8").tobytes())

    key = " ".join(f"{path.resolve()} {_stamp(path)}" for path in paths)
    flat, keep = _flat_copy(key, ".rows", write)
    with flat.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        count = int(np.frombuffer(file.read(8), dtype="<u8")[0])
        file.seek(-8 * (count + 1), os.SEEK_END)
        stored = np.frombuffer(file.read(8 * count), dtype="<u8").astype(np.int64)
    offsets = np.concatenate([[0], stored.cumsum()]).tolist()
    notes.append("the encoded images were copied once to a flat file in the cache, for random access")
    return _RangeReader([(str(flat), offsets[i], int(stored[i])) for i in range(count)], keep)


def _split_of_file(name: str, folders: dict[str, str]) -> str | None:
    """The split that a file's name begins with (train-00000-of-00002.parquet), or that one of its folders has."""
    return _first_word(PurePosixPath(name).name) or _split_of(name, folders)[0]


def _first_word(name: str) -> str | None:
    """The split that a name begins with: train-00000-of-00002, test_other, Holdout.3"""
    word = re.match(r"(hold|held)[-_ ]out(?![a-z])|[a-z]+", name.lower())
    return split_word(word.group()) if word else None


def _class_names(schema: pa.Schema) -> list[str] | None:
    """Class names of the label column, where Hugging Face's schema metadata gives them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, ValueError, TypeError):
        return None


def _column_labels(
    values: list[Any], names: list[str] | None, notes: list[str]
) -> tuple[list[int | None], list[str] | None]:
    """Class numbers from a label column: numbers that index `names`, or any values, numbered in sorted order."""
    known = {value for value in values if value is not None}
    if names is not None:
        known -= {-1}  # Hugging Face's sign for unlabelled
        if known and not all(isinstance(value, int) and 0 <= value < len(names) for value in known):
            notes.append("the label column does not fit its class names; labels are not used")
            return [None] * len(values), None
        return [None if value in (None, -1) else int(value) for value in values], names if known else None
    if not known:
        return [None] * len(values), None
    if not all(isinstance(value, int | str) for value in known):
        notes.append("the label column holds neither numbers of classes nor names; labels are not used")
        return [None] * len(values), None
    ordered = sorted(known, key=lambda value: (isinstance(value, str), value))
    number = {value: n for n, value in enumerate(ordered)}
    return [None if value is None else number[value] for value in values], [str(value) for value in ordered]


def numbers_of(columns: dict[str, list[Any]], images: int, notes: list[str]) -> tuple[str | None, list[float | None]]:
    """The column to be predicted, by name, and its numbers: one called as in NUMBERS, else the only one of numbers."""
    found = {name: numbers for name, values in columns.items() if (numbers := _as_numbers(values)) is not None}
    named = [name for name in NUMBERS if name in found] or list(found)
    if len(named) != 1 and not any(name in NUMBERS for name in named):
        if named:
            notes.append(
                f"columns of numbers: {', '.join(named)}; one is read where it is called {' or '.join(NUMBERS)}"
            )
        return None, [None] * images
    return named[0], found[named[0]]


def _as_numbers(values: list[Any]) -> list[float | None] | None:
    """Finite numbers, None where a value is missing; None where they are no numbers."""
    try:
        numbers = [None if value in (None, "") else float(value) for value in values]
    except (TypeError, ValueError):
        return None
    known = [None if number is None or not np.isfinite(number) else number for number in numbers]
    return known if any(number is not None for number in known) else None


def _table_numbers(
    files: list[str], images: list[str], read: Callable[[str], bytes], notes: list[str]
) -> tuple[str | None, list[float | None]]:
    """Numbers from the tables TABLES that lie beside images, in a row for each, named by its path from there.

    Raises:
        InputError: a table that is no CSV, or names no images.
    """
    by_name: dict[str, dict[str, str]] = {}
    known, lacking = set(images), 0
    for file in files:
        if PurePosixPath(file).name.lower() not in TABLES or is_hidden(file) or _is_answer(file):
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


# Hugging Face datasets and WebDataset


class _HubReader:
    def __init__(self, tables: list[Any], rows: list[tuple[int, int]], column: str):
        self._tables = tables
        self._rows = rows
        self._column = column

    def read(self, index: int) -> bytes:
        number, row = self._rows[index]
        item = self._tables[number][row][self._column]
        if item is None or (item["bytes"] is None and item["path"] is None):
            raise Unreadable("the row holds no image bytes")
        return item["bytes"] if item["bytes"] is not None else Path(item["path"]).read_bytes()


def _list_hub(text: str) -> _Listing:
    name, _, split = text.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{text} needs the package datasets: pip install underpaint[hub]") from error
    if not name:
        raise InputError(f"{text} names no data set; expected hf:NAME[:SPLIT]")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    # The package raises its own, the hub's and the network's errors; to the caller they are one: no such data.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{text} cannot be loaded: {reason or type(error).__name__}") from error
    tables = {split or "": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    first = next(iter(tables.values()))
    column = next((c for c, kind in first.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise InputError(f"{text} has no image column; its columns are {', '.join(first.features)}")
    entries: list[tuple[str, str | None]] = []
    labels: list[Any] = []
    rows: list[tuple[int, int]] = []
    stamps: list[str] = []
    plain = []
    for number, (table_name, table) in enumerate(tables.items()):
        table = table.cast_column(column, datasets.Image(decode=False))
        plain.append(table.select_columns([column]))
        table_split = _first_word(str(table_name))
        entries += [(f"{table_name or 'all'}/{row}", table_split) for row in range(len(table))]
        labels += list(table["label"]) if "label" in table.features else [None] * len(table)
        rows += [(number, row) for row in range(len(table))]
        stamps += [str(table._fingerprint)] * len(table)
    notes: list[str] = []
    names = getattr(first.features.get("label"), "names", None)
    numbers, classes = _column_labels(labels, names, notes)
    listed = [Entry(entry, split, label) for (entry, split), label in zip(entries, numbers, strict=True)]
    return _Listing(
        "Hugging Face data set", "", listed, stamps, _HubReader(plain, rows, column), classes, notes, [], len(listed)
    )


def _list_shards(text: str) -> _Listing:
    pattern = text.removeprefix("wds:")
    if "://" in pattern or pattern.startswith("pipe:"):
        raise InputError(f"{text}: only local shards are read; expected a path with {{000..009}} or * in it")
    shards = _expand(pattern, text)
    notes: list[str] = []
    skipped: list[dict[str, str]] = []
    found: list[tuple[Entry, str, tuple[str, int, int]]] = []
    labels: list[Any] = []
    keep = []
    seen = 0
    root = os.path.commonpath([shard.parent for shard in shards])
    places = {shard: os.path.relpath(shard, root).replace(os.sep, "/") for shard in shards}
    folders = _split_folders(list(places.values()))
    for shard in shards:
        if not _is_tar(shard):
            raise InputError(f"{shard} is not a readable tar file: damaged or cut off")
        flat, kept = _uncompressed(shard, _stamp(shard))
        keep.append(kept)
        members = _tar_members(flat, shard)
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
            entry = Entry(f"{shard.name}/{name}", _split_of_file(places[shard], folders), None)
            found.append((entry, _stamp(shard), (str(flat), offset, size)))
            labels.append(classes.get(key))
    if len({entry.name for entry, _, _ in found}) < len(found):  # shards of one name in several folders
        found = [(replace(e, name=f"{n}/{e.name}"), stamp, where) for n, (e, stamp, where) in enumerate(found)]
    numbers, names = _column_labels(labels, None, notes)
    entries = [replace(entry, label=label) for (entry, _, _), label in zip(found, numbers, strict=True)]
    reader = _RangeReader([where for _, _, where in found], keep)
    kind = f"WebDataset, {len(shards)} shard{'s' if len(shards) != 1 else ''}"
    place = "\n".join(str(shard.resolve()) for shard in shards)
    return _Listing(kind, place, entries, [s for _, s, _ in found], reader, names, notes, skipped, seen)


def _expand(pattern: str, text: str) -> list[Path]:
    patterns = [pattern]
    if "{" in pattern:
        try:
            import braceexpand
        except ImportError as error:
            raise InputError(f"{text} needs the package webdataset: pip install underpaint[webdataset]") from error
        patterns = list(braceexpand.braceexpand(pattern))
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
