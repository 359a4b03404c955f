"""Files and folders that are either whole or not there, and JSON that any reader takes.

What is written gets a temporary name beside its own and is renamed when it is complete and on disk, so a kill at any
moment leaves what was there before.
"""

import glob
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from underpaint.errors import InputError

# data that is no path, by what stands before the colon: the function from DATA to a listing, and how it is written
SOURCES = {
    "hf": ("underpaint.data.sources.hub:list_hub", "hf:NAME[:SPLIT]"),
    "parquet": ("underpaint.data.sources.parquet:list_pattern", "parquet:PATTERN"),
    "wds": ("underpaint.data.sources.webdataset:list_shards", "wds:PATTERN"),
}
KINDS = f"a folder, .zip, .tar, .parquet, {' or '.join(form for _, form in SOURCES.values())}"  # of data
AS_IT_IS = "surrogateescape"  # for names of files in a table: bytes that are no UTF-8 are written as they are
FORGOTTEN = 86_400  # seconds after which what is half made belongs to nobody


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """A path to write a file to: it becomes `path` when the block ends, and goes away where the block raises."""
    _forget(path)
    temporary = path.with_name(f"{path.name}.{token_hex(4)}.part")  # two processes may write the same file
    try:
        yield temporary
        _share(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path, durable: bool = True) -> Generator[Path, None, None]:
    """A folder to write into: it becomes `folder`, in place of one that is there, when the block ends.

    Several processes may make the same folder; the last one's stays. A cache, which can be made again, need not be
    `durable`: flushing gigabytes would hold up the run.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _forget(folder)
    token = token_hex(4)  # two processes may make the same folder
    temporary, before = (folder.with_name(f"{folder.name}.{token}{kind}.part") for kind in ("", ".before"))
    temporary.mkdir()  # not mkdtemp, whose folders nobody else may read
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _share(file)
        if durable:
            for file in (*temporary.rglob("*"), temporary):
                sync(file)
        with suppress(FileNotFoundError):  # whoever reads there now goes on with what was moved away
            folder.rename(before)
        temporary.rename(folder)
        if durable:
            sync(folder.parent)
    finally:
        for left in (temporary, before):
            shutil.rmtree(left, ignore_errors=True)


def _share(path: Path) -> None:
    """Give a file the rights that a new one has by the user's umask: safetensors lets only its owner read what it writes."""
    if path.is_file():
        umask = os.umask(0)  # there is no other way to read it
        os.umask(umask)
        with suppress(OSError):  # of file systems without rights
            path.chmod(0o666 & ~umask)


def _forget(path: Path) -> None:
    """Remove what was left beside a file or folder by those who were killed while they made it."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if time.time() - left.stat().st_mtime > FORGOTTEN:
            shutil.rmtree(left, ignore_errors=True)
            left.unlink(missing_ok=True)


def place_of(data: str | Path) -> Path | None:
    """Where a DATA argument lies; None for what is no path (`SOURCES`).

    Raises:
        InputError: nothing is there.
    """
    text = str(data)
    if text.partition(":")[0] in SOURCES:
        return None
    path = Path(text).expanduser()
    if not path.exists():
        raise InputError(f"no such data: {text}; expected {KINDS}")
    return path


def refuse_inside(out: str | Path, *data: str | Path | None) -> None:
    """Complain of an output that lies in a folder of images, where its pictures would be read as images.

    Raises:
        InputError: it does.
    """
    try:
        target = Path(os.path.realpath(Path(out).expanduser()))  # which a link to itself does not end
    except ValueError as error:
        raise InputError(f"--out {str(out)!r}: no path: {error}") from error
    for each in data:
        folder = None if each is None else place_of(each)
        if folder is not None and folder.is_dir() and target.is_relative_to(folder.resolve()):
            raise InputError(
                f"--out {out}: lies inside {each}, where its pictures would be read as images; choose another path"
            )


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(utf8(text))


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write plain data as JSON, atomically; numbers that JSON cannot hold become null."""
    write_text(path, json.dumps(finite(value), indent=indent) + "\n")


def check_writable(out: Path, file: bool = False) -> None:
    """That a folder, or a file, can be made and written, without making it.

    Raises:
        InputError: it cannot.
    """
    try:
        if file and out.is_dir():
            raise InputError(f"--out {out}: is a folder; give a file")
        folder = out.absolute().parent if file else out.absolute()
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error


def utf8(name: str) -> str:
    """A name in which bytes that are no UTF-8 are written as escapes, as `\\xe9` is `\\udce9`: for files of text, which hold
    nothing else."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def append_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Add lines to a .jsonl file, flushed to disk."""
    text = "".join(json.dumps(finite(line)) + "\n" for line in lines)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # cut off by a kill
                file.write(b"\n")
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, object]]:
    """The lines of a .jsonl file, none where there is no file; a last line cut off by a kill is left out, and so is a
    damaged one, which is said."""
    if not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], start=1):
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError
            lines.append(found)
        except ValueError:
            print(f"{path}: line {number} is damaged and left out; the others are as they were", file=sys.stderr)
    return lines


def finite(value: Any) -> Any:
    """Plain data with numbers that JSON cannot hold (not finite) as None."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
