"""Images of a folder."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from underpaint.data.sources.base import Listing, Reader
from underpaint.data.sources.names import IMAGE_SUFFIXES, is_hidden, is_image
from underpaint.data.sources.parquet import list_parquet
from underpaint.data.sources.tree import File, list_files
from underpaint.errors import InputError


class _FolderReader:
    def __init__(self, paths: list[str]):
        self._paths = paths

    def read(self, index: int) -> bytes:
        with open(self._paths[index], "rb") as file:
            return file.read()

    def size(self, index: int) -> int:
        return os.path.getsize(self._paths[index])


def list_folder(path: Path, text: str) -> Listing:
    files: list[File] = []
    skipped: list[dict[str, str]] = []
    for relative, entry in walk(path, skipped):
        name = relative.replace(os.sep, "/")
        try:
            if entry.is_file():
                status = entry.stat()
                files.append(File(name, status.st_size, f"{status.st_size} {status.st_mtime_ns}"))
            elif PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                skipped.append({"path": name, "reason": "not a regular file (a broken link, a pipe or a device)"})
        except OSError as error:
            skipped.append({"path": name, "reason": f"cannot be read: {error.strerror}"})
    tables = [file for file in files if file.name.lower().endswith(".parquet") and not is_hidden(file.name)]
    if tables and not any(is_image(file.name) for file in files):
        return list_parquet([path / file.name for file in tables], path)

    def read(name: str) -> bytes:
        return (path / name).read_bytes()

    def reader(names: list[str]) -> Reader:
        return _FolderReader([f"{path}/{name}" for name in names])

    listing = list_files("folder", path, files, skipped, read, reader)
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
