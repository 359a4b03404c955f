"""Images of a folder."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from underpaint.data.sources.base import Listing, Reader
from underpaint.data.sources.index import Names
from underpaint.data.sources.names import IMAGE_SUFFIXES, is_hidden, is_image
from underpaint.data.sources.parquet import list_parquet
from underpaint.data.sources.stored import load_listing, store_listing
from underpaint.data.sources.tables import is_side
from underpaint.data.sources.tree import File, MaskFiles, coco_split, list_files
from underpaint.errors import InputError

LISTED_ANEW = 20_000  # images up to which a folder is listed each time, in a fraction of a second


class FolderReader:
    """Reads files below a folder by their names."""

    def __init__(self, root: str, names: Names):
        self._root = root
        self._names = names

    def read(self, index: int) -> bytes:
        with open(f"{self._root}/{self._names[index]}", "rb") as file:
            return file.read()

    def size(self, index: int) -> int:
        return os.path.getsize(f"{self._root}/{self._names[index]}")


def list_folder(path: Path, text: str, masks: MaskFiles = "aside", table: str | None = None) -> Listing:
    """What lies in a folder: as it was stored where nothing seems to have changed since (`load_listing`), else listed.

    Args:
        table: a file in it that names the images that are meant.

    Raises:
        InputError: the folder holds no images but an archive; as `list_files`.
    """

    def reader(names: Names) -> Reader:
        return FolderReader(str(path), names)

    listing = load_listing(path, reader, masks) if table is None else None
    if listing is not None:
        return listing
    files: list[File] = []
    skipped: list[dict[str, str]] = []
    folders: dict[str, tuple[int, int]] = {}
    for relative, entry in walk(path, skipped, folders):
        name = relative.replace(os.sep, "/")
        try:
            if entry.is_file():
                status = entry.stat()
                files.append(File(name, status.st_size, (status.st_size, status.st_mtime_ns)))
            elif PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                skipped.append({"path": name, "reason": "not a regular file (a broken link, a pipe or a device)"})
        except OSError as error:
            skipped.append({"path": name, "reason": f"cannot be read: {error.strerror}"})
    tables = [file for file in files if file.name.lower().endswith(".parquet") and not is_hidden(file.name)]
    if table is None and tables and not any(is_image(file.name) for file in files):
        return list_parquet([path / file.name for file in tables], path)

    def read(name: str) -> bytes:
        return (path / name).read_bytes()

    listing = list_files("folder", path, files, skipped, read, reader, masks, table)
    if not listing.entries:
        archives = [f.name for f in files if f.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))]
        if archives:
            raise InputError(f"{text} holds no images but an archive; give that instead: {path / archives[0]}")
    if len(listing.entries) > LISTED_ANEW and table is None:
        # what says something of the images, and images that may yet be written or be made readable
        sides = [f.name for f in files if coco_split(f.name) or is_side(f.name)]
        sides += [skip["path"] for skip in skipped if skip["reason"] != "not an image"]
        store_listing(path, listing, folders, sides, masks)
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def walk(
    root: Path, skipped: list[dict[str, str]], folders: dict[str, tuple[int, int]] | None = None
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files below a folder in sorted order, links followed, each real folder once.

    Args:
        skipped: gets {"path", "reason"} of what cannot be listed.
        folders: gets the times (in ns, of contents and of status) of each folder from before it was listed.
    """
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
            if folders is not None:
                status = os.stat(folder)
                folders[relative] = (status.st_mtime_ns, status.st_ctime_ns)
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            skipped.append({"path": relative or ".", "reason": f"folder cannot be listed: {error.strerror}"})
            continue
        below = []
        for entry in entries:
            name = os.path.join(relative, entry.name)
            if _is_folder(entry):
                if not entry.name.startswith("."):
                    below.append(name)
                    if PurePosixPath(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                        skipped.append({"path": name, "reason": "a folder with the name of an image"})
            else:
                yield name, entry
        stack += reversed(below)
