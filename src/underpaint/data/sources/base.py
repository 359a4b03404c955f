"""What a source is: entries that are listed once, and a reader of their encoded bytes."""

import hashlib
import operator
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from underpaint.data.decode import Unreadable
from underpaint.data.sources.index import STRETCH, Entries, Entry
from underpaint.data.sources.pieces import Pieces
from underpaint.errors import InputError
from underpaint.files import replacing, write_text

LARGEST_FILE = 2**30  # bytes of one file of an archive when unpacked
WINDOW = 2.0 * 2**30  # bytes of images that are shuffled together, of a set that is read in pieces
OPEN = 256  # files that a process holds open
AHEAD = 2**19  # bytes that the system is asked to read ahead at a time; of more it takes a part alone


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
        found = listing.entries
        self.entries = found if isinstance(found, Entries) else _columns(found)
        self.classes = listing.classes
        self.number = listing.number  # the column that the numbers are of
        self.notes = listing.notes
        self.skipped = listing.skipped
        self.kind = listing.kind
        self.pieces = listing.pieces  # how it is read best, where it may be large
        self.window: float = WINDOW
        self._place = listing.place
        self._stamps: Any = listing.stamps
        self._fingerprint = ""
        self._reader = listing.reader
        self.pattern = groups

    def read(self, index: SupportsIndex) -> bytes:
        """The encoded bytes of an entry.

        Raises:
            Unreadable: the file has gone, is locked away, or its archive is damaged there.
        """
        try:
            return self._reader.read(operator.index(index))
        except (Unreadable, InputError):  # the latter where going on without the image would be wrong
            raise
        # Archives and file systems fail in many ways (OSError, BadZipFile, RuntimeError for encryption, zlib.error).
        except Exception as error:
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise Unreadable(f"cannot be read: {' '.join(text.split())[:160] or type(error).__name__}") from error

    def size(self, index: SupportsIndex) -> int:
        """Bytes of an entry as it is stored, without reading it where its kind of source knows.

        Raises:
            Unreadable: as `read`.
        """
        measure = getattr(self._reader, "size", None)
        try:
            return measure(operator.index(index)) if measure is not None else len(self.read(index))
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error

    def ahead(self, piece: int) -> None:
        """Have a piece read (`pieces`) before its images are asked for.

        Raises:
            InputError: it is far away and cannot be reached.
        """
        assert self.pieces is not None
        read = getattr(self._reader, "ahead", None)
        if read is not None:
            with suppress(Unreadable, OSError):  # said of each image, when it is read
                read(*self.pieces.starts[piece : piece + 2].tolist())

    def set_window(self, size: float) -> None:
        """Read the set in windows of so many bytes where it is larger than one, and let four of them stay on this machine's
        disk where its pieces are brought there."""
        self.window = size
        if self.pieces is not None and self.pieces.brought:
            self._reader.limit = int(4 * size)  # type: ignore[attr-defined]

    def fingerprint(self) -> str:
        """sha256 over the kind, the resolved place, and the names, sizes and modification times of the files."""
        if not self._fingerprint:
            digest = hashlib.sha256(f"{self.kind}\0{self._place}\0".encode("utf-8", "surrogateescape"))
            zero, line, empty = (pa.scalar(part, pa.large_binary()) for part in (b"\0", b"\n", b""))
            for start in range(0, len(self.entries), STRETCH):
                stamps = self._stamped(start)
                names = self.entries.names.column.slice(start, STRETCH)
                lines: Any = pc.binary_join_element_wise(names, zero, stamps, line, empty)  # type: ignore[attr-defined]
                digest.update(b"".join(lines.to_pylist()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def listed(self) -> pa.Table:
        """Name and stamp (size, time of change) of every entry, in order, as bytes: names may be no text."""
        parts = [self._stamped(start) for start in range(0, len(self.entries), STRETCH)]
        return pa.table({"name": self.entries.names.column, "stamp": pa.chunked_array(parts, pa.large_binary())})

    def _stamped(self, start: int) -> Any:
        return _text(self._stamps[start : start + STRETCH])

    def group_of(self, index: SupportsIndex) -> str:
        """The group of an entry: the match of the `groups` expression, else its own name."""
        return self._group(self.entries.names[index])[0]

    def _group(self, name: str) -> tuple[str, bool]:
        """The group of a name, and whether the expression matches."""
        match = self.pattern.search(name) if self.pattern else None
        if match is None:
            return name, False
        return (match.group(1) if match.re.groups else match.group(0)) or name, True

    @cached_property
    def _grouped(self) -> tuple[np.ndarray, list[str], int]:
        numbers: dict[str, int] = {}
        found = np.empty(len(self.entries), np.int32)
        matched = 0
        for index, name in enumerate(self.entries.names):
            group, fits = self._group(name)
            found[index] = numbers.setdefault(group, len(numbers))
            matched += fits
        return found, list(numbers), matched

    @property
    def groups(self) -> tuple[np.ndarray, list[str]]:
        """The number of each entry's group, and the groups' names."""
        return self._grouped[:2]

    @cached_property
    def order(self) -> np.ndarray:
        """The groups, or the entries where each is by itself, in the order of the hashes of their names, in which a
        hold-out takes them: no seed moves it, and images that are added later move few others."""
        names: Sequence[str] = self.groups[1] if self.grouped else self.entries.names
        hashes = np.fromiter((_hash(name) for name in names), ">u8", len(names)).astype(np.uint64)
        order = np.argsort(hashes, kind="stable")
        if (np.diff(hashes[order]) == 0).any():  # one hash for two names, which then decide
            order = np.asarray(sorted(order.tolist(), key=lambda k: (int(hashes[k]), names[k])))
        return order

    @property
    def grouped(self) -> bool:
        """Whether a hold-out keeps groups together."""
        return self.pattern is not None

    @property
    def matched(self) -> int:
        """How many names the `groups` expression occurs in."""
        return self._grouped[2] if self.grouped else 0


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


def _columns(entries: Sequence[Entry]) -> Entries:
    return Entries.of(*([getattr(entry, name) for entry in entries] for name in ("name", "split", "label", "number")))


def _text(stamps: Any) -> Any:
    """Stamps as bytes: strings, or rows of a size and a time."""
    if not isinstance(stamps, np.ndarray):
        return pa.array([stamp.encode("utf-8", "surrogateescape") for stamp in stamps], pa.large_binary())
    columns = [pa.array(column).cast(pa.large_string()).cast(pa.large_binary()) for column in stamps.T]
    return pc.binary_join_element_wise(*columns, pa.scalar(b" ", pa.large_binary()))  # type: ignore[attr-defined]


@dataclass
class Listing:
    """What a kind of source found; `stamps` (texts, or [n, 2] of size and time in ns) tell apart versions of each
    entry's file, `place` (resolved, empty where the stamps say it) sets that have equal ones."""

    kind: str
    place: str
    entries: Sequence[Entry]  # `Entries` where there may be millions
    stamps: Sequence[str] | np.ndarray
    reader: Reader
    classes: list[str] | None
    notes: list[str]
    skipped: list[dict[str, str]]
    seen: int = 0
    number: str | None = None
    pieces: Pieces | None = None


class RangeReader:
    """Entries are stretches of flat files: members of tar files.

    Args:
        paths: of the files.
        ranges: [n, 3] whole numbers: position in `paths`, offset and size in bytes.
    """

    def __init__(self, paths: list[str], ranges: Sequence[tuple[int, int, int]] | np.ndarray, keep: Any = None):
        self._paths = paths
        self._ranges = np.asarray(ranges, np.int64).reshape(-1, 3)
        self._keep = keep  # a temporary folder that must live as long as the reader
        self._files: OrderedDict[int, int] = OrderedDict()  # descriptors, which a forked process may use too

    def read(self, index: int) -> bytes:
        number, offset, size = self._ranges[index].tolist()
        if size > LARGEST_FILE:
            raise Unreadable(f"has more than {LARGEST_FILE:,} bytes")
        data = os.pread(self._descriptor(number), size, offset)
        if len(data) < size:
            raise Unreadable(f"truncated: its archive ends {size - len(data)} bytes too early")
        return data

    def ahead(self, first: int, stop: int) -> None:
        """Have the system read the entries from `first` to `stop`, of one file, in one go; nobody waits for it."""
        if hasattr(os, "posix_fadvise"):
            number, start, _ = self._ranges[first].tolist()
            end = int(self._ranges[stop - 1, 1:].sum())
            for offset in range(start, end, AHEAD):
                os.posix_fadvise(self._descriptor(number), offset, min(AHEAD, end - offset), os.POSIX_FADV_WILLNEED)

    def _descriptor(self, number: int) -> int:
        if number not in self._files:
            self._files[number] = os.open(self._paths[number], os.O_RDONLY)
        self._files.move_to_end(number)
        while len(self._files) > OPEN:
            os.close(self._files.popitem(last=False)[1])
        return self._files[number]

    def size(self, index: int) -> int:
        return int(self._ranges[index, 2])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_keep": None}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
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
