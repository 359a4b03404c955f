"""Images of a .zip or .tar file."""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from underpaint.data.decode import Unreadable
from underpaint.data.sources.base import LARGEST_FILE, Listing, RangeReader, Reader, flat_copy, stamp_of
from underpaint.data.sources.index import Names
from underpaint.data.sources.tree import File, MaskFiles, list_files
from underpaint.errors import InputError

# bytes that a compressed tar file may become: as much as images can, and four times the file where that is more
LARGEST_UNPACKED, UNPACKED_RATIO = 64 * 2**30, 4
FREE_AFTERWARDS = 2**30  # bytes of disk that unpacking leaves to others
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


class _ZipReader:
    """Opens the archive once a process: a file position shared after a fork would mix up two readers."""

    def __init__(self, path: str, names: Names):
        self._path = path
        self._names = names
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def read(self, index: int) -> bytes:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), zipfile.ZipFile(self._path))
        return member(self._opened[1], self._names[index])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}


def member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a file, whatever the archive says of its size.

    Raises:
        Unreadable: more than `LARGEST_FILE`.
    """
    with archive.open(name) as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise Unreadable(f"unpacks to more than {LARGEST_FILE:,} bytes; unpack the archive and give the folder")
    return data


def list_zip(path: Path, masks: MaskFiles = "aside") -> Listing:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    # beside BadZipFile: OSError, ValueError, NotImplementedError, IndexError of an empty name, ...
    except Exception as error:
        raise InputError(f"{path} is not a readable zip file: {error}") from error
    stamp = stamp_of(path)
    files = [File(name, info.file_size, f"{stamp} {info.CRC}") for name, info in members.items()]

    def read(name: str) -> bytes:
        try:
            with zipfile.ZipFile(path) as archive:
                return member(archive, name)
        # BadZipFile, zlib.error, RuntimeError for encryption, NotImplementedError for a compression, ...
        except Exception as error:
            raise InputError(f"{path}: {name} cannot be read: {error}") from error

    return list_files("zip file", path, files, [], read, lambda names: _ZipReader(str(path), names), masks)


def list_tar(path: Path, masks: MaskFiles = "aside") -> Listing:
    stamp = stamp_of(path)
    flat, keep = uncompressed(path, stamp)
    members = tar_members(flat, path)
    files = [File(name, size, f"{stamp} {size}") for name, (_, size) in members.items()]

    def read(name: str) -> bytes:
        offset, size = members[name]
        if size > LARGEST_FILE:
            raise InputError(f"{path}: {name} has more than {LARGEST_FILE:,} bytes")
        with flat.open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def reader(names: Names) -> Reader:
        return RangeReader([str(flat)], [(0, *members[name]) for name in names], keep)

    return list_files("tar file", path, files, [], read, reader, masks)


def tar_members(flat: Path, shown: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each regular file of an uncompressed tar file; of a name that occurs twice, the last."""
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(flat, "r:") as archive:
            for member in archive:
                if member.isreg():
                    members[member.name.removeprefix("./")] = (member.offset_data, member.size)
    # beside TarError: ValueError of numbers, UnicodeDecodeError of names, OverflowError of sizes, ...
    except Exception as error:
        if not members:
            raise InputError(f"{shown} is not a readable tar file: {error}") from error
        # cut off in the middle: what was listed before is still there
    return members


def uncompressed(path: Path, stamp: str) -> tuple[Path, Any]:
    """The tar file itself, or a flat copy of a compressed one: compressed streams have no random access."""
    with path.open("rb") as file:
        opener = COMPRESSIONS.get(file.read(2))
    if opener is None:
        return path, None

    def write(target: Path) -> None:
        try:
            with opener(path, "rb") as packed, target.open("wb") as flat:
                _copy(packed, flat, path)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path} is not a readable tar file: {error}") from error

    return flat_copy(f"{path.resolve()} {stamp}", ".tar", write)


def _copy(packed: Any, flat: Any, path: Path) -> None:
    """Unpack into a file.

    Raises:
        InputError: it becomes too large, or fills the disk.
    """
    largest = max(LARGEST_UNPACKED, UNPACKED_RATIO * path.stat().st_size)
    advice = "unpack it where there is room and give the folder"
    while block := packed.read(2**20):
        if flat.tell() + len(block) > largest:
            raise InputError(f"{path} unpacks to more than {largest:,} bytes; if that is right, {advice}")
        if flat.tell() % 2**26 == 0 and shutil.disk_usage(flat.name).free < FREE_AFTERWARDS:
            raise InputError(
                f"{path} would fill the disk of the cache ({flat.tell():,} bytes unpacked so far); {advice}"
            )
        flat.write(block)


def is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # a damaged compressed stream, or what only looks like a tar file
        return False
