"""Large sets in pieces: stretches of images that lie together and are read in one go.

What is far away (a shard in a bucket), or packed together (a row group of parquet), is brought to
this machine's disk, by one process, and read there by all; only the pieces used last stay there.
"""

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

import numpy as np
from filelock import FileLock

from underpaint.data.decode import Unreadable
from underpaint.errors import InputError
from underpaint.files import FORGOTTEN

PIECE = 2**23  # bytes: stores of objects are asked best for 8 to 16 MB at a time
KEPT = 2**33  # bytes of pieces on this machine's disk, where nobody says how many
OPEN = 64  # files of pieces that a process holds open
LOCKS = 64  # files of locks, for all pieces


@dataclass(frozen=True)
class Pieces:
    """Stretches of consecutive entries that lie together.

    Attributes:
        starts: [p + 1] the first entry of each piece; the last number is that of all entries.
        sizes: [p] bytes of each.
        brought: whether a piece has to be brought as a whole, so that one image of it costs as much as all.
    """

    starts: np.ndarray
    sizes: np.ndarray
    brought: bool


def cut(files: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Pieces.starts` and `Pieces.sizes` of entries that lie in files one after the other: at most about `PIECE` bytes,
    of one file.

    Args:
        files, offsets, sizes: [n] the number of the file that an entry lies in, and where in it, in bytes.
        whole: [f] whether a file cannot be cut.
    """
    blocks = np.where(whole[files], 0, offsets // PIECE)
    new = (np.diff(files, prepend=-1) != 0) | (np.diff(blocks, prepend=-1) != 0)
    starts = np.flatnonzero(new)
    return np.append(starts, len(files)), np.add.reduceat(sizes, starts) if len(starts) else np.empty(0, np.int64)


class PieceReader:
    """Entries of pieces that are brought to this machine's disk ($TMPDIR) and read there by all its processes.

    No more than `limit` bytes stay there (and a piece for each process beyond): those that nobody opened for longest go.

    Args:
        key: tells the set, and its version, from all others.
        starts: as of `Pieces`.
        bring: `bring(piece)` gives the encoded bytes of each entry of a piece in order, empty for one that has none.
        alone: `alone(index)` reads a single entry where that is much less than to bring its piece; None where it is not.
        sizes: [n] of the entries, where they are known; one that comes out shorter is unreadable.
    """

    def __init__(
        self,
        key: str,
        starts: np.ndarray,
        bring: Callable[[int], Iterable[bytes]],
        alone: Callable[[int], bytes | None] | None = None,
        sizes: np.ndarray | None = None,
    ):
        self._key = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._starts = starts
        self._bring = bring
        self._alone = alone
        self._sizes = sizes
        self.limit = KEPT
        self._asked: set[int] = set()  # pieces of which this process read a single entry
        self._files: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()  # descriptor, and where each entry ends
        self._since = 0  # bytes brought since the folder was last looked through
        self._made: Path | None = None

    def read(self, index: int) -> bytes:
        piece = int(np.searchsorted(self._starts, index, side="right")) - 1
        found = self._held(piece)
        if found is None and self._alone is not None and piece not in self._asked:
            self._asked.add(piece)  # the second entry that is asked for brings them all
            data = self._alone(index)
            if data is not None:
                return self._whole(index, data)
        descriptor, ends = self._brought(piece) if found is None else found
        place = index - int(self._starts[piece])
        start, end = int(ends[place - 1]) if place else 0, int(ends[place])
        return self._whole(index, os.pread(descriptor, end - start, start))

    def size(self, index: int) -> int:
        return len(self.read(index)) if self._sizes is None else int(self._sizes[index])

    def ahead(self, first: int, stop: int) -> None:
        """Bring the piece of the entries from `first` to `stop`, unless it is there."""
        piece = int(np.searchsorted(self._starts, first, side="right")) - 1
        if self._held(piece) is None:
            self._brought(piece)

    def _whole(self, index: int, data: bytes) -> bytes:
        if self._sizes is not None and (short := int(self._sizes[index]) - len(data)) > 0:
            raise Unreadable(f"truncated: its archive ends {short} bytes too early")
        if not data:
            raise Unreadable("the row holds no image bytes")
        return data

    def _held(self, piece: int) -> tuple[int, np.ndarray] | None:
        """A piece that is on the disk, opened."""
        if piece in self._files:
            self._files.move_to_end(piece)
            return self._files[piece]
        path = self._folder() / f"{piece}.piece"
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        count = int(self._starts[piece + 1] - self._starts[piece])
        size = os.fstat(descriptor).st_size
        ends = np.frombuffer(os.pread(descriptor, 8 * count, max(0, size - 8 * count)), "<i8")
        if len(ends) < count or ends[-1] != size - 8 * count:  # cut off where the machine went down
            os.close(descriptor)
            return None
        with suppress(OSError):  # removed by another process in this moment
            os.utime(path)
        return self._keep(piece, descriptor, ends)

    def _keep(self, piece: int, descriptor: int, ends: np.ndarray) -> tuple[int, np.ndarray]:
        self._files[piece] = descriptor, ends
        while len(self._files) > OPEN:
            os.close(self._files.popitem(last=False)[1][0])
        return descriptor, ends

    def _brought(self, piece: int) -> tuple[int, np.ndarray]:
        folder = self._folder()
        with FileLock(folder / f"{piece % LOCKS}.lock"):
            found = self._held(piece)  # another process may have brought it meanwhile
            return self._write(piece, folder) if found is None else found

    def _write(self, piece: int, folder: Path) -> tuple[int, np.ndarray]:
        count = int(self._starts[piece + 1] - self._starts[piece])
        part = folder / f"{piece}.{token_hex(4)}.part"
        ends: list[int] = []
        held = 0
        try:
            with part.open("wb") as file:
                for data in self._bring(piece):
                    held += len(data)
                    ends.append(held)
                    file.write(data)
                ends = [*ends, *[held] * (count - len(ends))][:count]
                file.write(np.asarray(ends, "<i8").tobytes())
            descriptor = os.open(part, os.O_RDONLY)  # before others can remove it
            part.replace(folder / f"{piece}.piece")
        except OSError as error:
            raise InputError(
                f"{folder}: pieces of the data cannot be written there ({error.strerror or error}); "
                "set TMPDIR to a folder with more room, or data.window to less"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        self._since += held
        if self._since > self.limit // 32:
            self._since = 0
            self._trim(folder)
        return self._keep(piece, descriptor, np.asarray(ends, np.int64))

    def _trim(self, folder: Path) -> None:
        """Remove what was not opened for longest, down to the limit."""
        files = []
        with os.scandir(folder) as scan:
            for entry in scan:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name.endswith(".piece"):
                        files.append((status.st_mtime_ns, status.st_size, entry.path))
                    elif entry.name.endswith(".part") and time.time() - status.st_mtime > FORGOTTEN:
                        os.unlink(entry)  # of a process that was killed
        over = sum(size for _, size, _ in files) - self.limit
        for _, size, path in sorted(files):
            if over <= 0:
                break
            Path(path).unlink(missing_ok=True)
            over -= size

    def _folder(self) -> Path:
        if self._made is None:
            self._made = _folder(self._key)
        return self._made

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_made": None}

    def __del__(self) -> None:
        for descriptor, _ in self.__dict__.get("_files", {}).values():
            os.close(descriptor)


def _folder(key: str) -> Path:
    """A folder for the pieces of a set; those of sets that nobody brought anything of for a day go."""
    owner = os.getuid() if hasattr(os, "getuid") else 0
    root = Path(tempfile.gettempdir()) / f"underpaint-{owner}"
    folder = root / key
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        status = root.lstat()
        if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != owner):
            raise InputError(f"{root} belongs to somebody else; set TMPDIR to a folder of your own")
        folder.mkdir(exist_ok=True)
        os.utime(folder)
        for other in root.iterdir():
            if other != folder and time.time() - other.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(other, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); set TMPDIR to a folder with room") from error
    return folder
