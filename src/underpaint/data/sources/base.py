"""What a source is: entries that are listed once, and a reader of their encoded bytes."""

import hashlib
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from underpaint.data.decode import Unreadable
from underpaint.files import replacing, write_text

LARGEST_FILE = 2**30  # bytes of one file of an archive when unpacked


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


def cache_root() -> Path:
    """The folder of caches: `$UNDERPAINT_CACHE`, else `~/.cache/underpaint`."""
    return Path(os.environ.get("UNDERPAINT_CACHE") or Path.home() / ".cache" / "underpaint")


class Source:
    """The images of one DATA argument, listed once. Safe in worker processes."""

    def __init__(self, location: str, listing: "Listing", groups: re.Pattern[str] | None = None):
        self.location = location
        self.entries = listing.entries
        self.classes = listing.classes
        self.number = listing.number  # the column that the numbers are of
        self.notes = listing.notes
        self.skipped = listing.skipped
        self.kind = listing.kind
        self._place = listing.place
        self._stamps = listing.stamps
        self._reader = listing.reader
        self.pattern = groups

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
        digest = hashlib.sha256(f"{self.kind}\0{self._place}\0".encode("utf-8", "surrogateescape"))
        for entry, stamp in zip(self.entries, self._stamps, strict=True):
            digest.update(f"{entry.name}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def group_of(self, index: int) -> str:
        """The group of an entry: the match of the `groups` expression, else its own name."""
        name = self.entries[index].name
        match = self.pattern.search(name) if self.pattern else None
        if match is None:
            return name
        return (match.group(1) if match.re.groups else match.group(0)) or name

    @property
    def grouped(self) -> bool:
        """Whether a hold-out keeps groups together."""
        return self.pattern is not None

    @property
    def matched(self) -> int:
        """How many names the `groups` expression occurs in."""
        return sum(self.pattern is not None and self.pattern.search(e.name) is not None for e in self.entries)


@dataclass
class Listing:
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


class RangeReader:
    """Entries are stretches of flat files: members of tar files, or rows copied out of large parquet files."""

    def __init__(self, ranges: list[tuple[str, int, int]], keep: Any = None):
        self._ranges = ranges
        self._keep = keep  # a temporary folder that must live as long as the reader
        self._files: dict[tuple[int, str], int] = {}

    def read(self, index: int) -> bytes:
        path, offset, size = self._ranges[index]
        if size > LARGEST_FILE:
            raise Unreadable(f"has more than {LARGEST_FILE:,} bytes")
        key = (os.getpid(), path)
        if key not in self._files:
            self._files[key] = os.open(path, os.O_RDONLY)
        data = os.pread(self._files[key], size, offset)
        if len(data) < size:
            raise Unreadable(f"truncated: its archive ends {size - len(data)} bytes too early")
        return data

    def size(self, index: int) -> int:
        return self._ranges[index][2]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}, "_keep": None}

    def __del__(self) -> None:
        for (process, _), descriptor in self._files.items():
            if process == os.getpid():
                os.close(descriptor)


def flat_copy(key: str, suffix: str, write: Any) -> tuple[Path, Any]:
    """A file under the cache folder made once by `write(path)`; in a temporary folder where that is read-only.

    It is made again where it has another size than it had, which lies in a file beside it.
    """
    name = "flat-" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32] + suffix
    keep = None
    folder = cache_root()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        keep = tempfile.TemporaryDirectory(prefix="underpaint-")
        folder = Path(keep.name)
    flat, size = folder / name, folder / f"{name}.size"
    if not (flat.is_file() and size.is_file() and size.read_text() == str(flat.stat().st_size)):
        with replacing(flat) as partial:
            write(partial)
        write_text(size, str(flat.stat().st_size))
    return flat, keep


def stamp_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"
