"""One process at a time works in a folder."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from underpaint.errors import InputError
from underpaint.files import write_json

LOCK, HOLDER = ".lock", ".holder.json"
LETTING_GO = 15.0  # seconds in which the workers of a process that was killed notice it, and end


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made; the system takes the lock back from a process that ends, however
    it ends. A folder in which nothing came to be is removed again.

    Raises:
        InputError: another process works in it; it cannot be made, or not written to.
    """
    made = not folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _taken(folder)
        write_json(folder / HOLDER, {"process": os.getpid(), "host": socket.gethostname()}, indent=None)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink()
        if lock is not None:
            lock.release()
        if made and folder.is_dir() and not holds_anything(folder):
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()


def at_work(folder: Path) -> bool:
    """Whether a process works in a folder, as far as its file system tells."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # nobody's to write to, or without locks
        return _lives(_holder(folder)["process"]) if (folder / HOLDER).is_file() else False


def holds_anything(folder: Path) -> bool:
    """Whether there is anything in a folder but what keeps others out of it."""
    return any(each.name not in (LOCK, HOLDER) for each in folder.iterdir())


def _taken(folder: Path) -> FileLock | None:
    """The lock of a folder; None where its file system knows none, which is said."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:
        print(
            f"note: {folder} is on a file system without locks: see to it that one process works there", file=sys.stderr
        )
        return None
    except Timeout:
        holder = _holder(folder)
        if holder["host"] != socket.gethostname() or _lives(holder["process"]):
            raise InputError(_refusal(folder, holder)) from None
        try:
            lock.acquire(timeout=LETTING_GO)
        except Timeout:
            raise InputError(_refusal(folder, holder)) from None
    return lock


def _refusal(folder: Path, holder: dict[str, object]) -> str:
    return (
        f"--out {folder}: process {holder['process']} on {holder['host']} is at work there; wait for it, end it, or choose "
        "another path"
    )


def _holder(folder: Path) -> dict[str, object]:
    try:
        found = json.loads((folder / HOLDER).read_text())
        return {"process": found["process"], "host": str(found["host"])}
    except (OSError, ValueError, TypeError, KeyError):  # it has not said yet, or not whole
        return {"process": "unknown", "host": "an unknown machine"}


def _lives(process: object) -> bool:
    """Whether a process of this machine is there."""
    if not isinstance(process, int):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
