"""Files that lie elsewhere: s3://, gs://, https://, hf:// and what else fsspec knows. Nothing is asked for before it is used."""

import glob
import itertools
import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from underpaint.data.sources.base import stamp_of
from underpaint.errors import InputError

LARGEST_PATTERN = 1_000_000  # files that braces may stand for
TOGETHER = 16  # requests at a time: each waits for the network, not for a processor
TRIES, PAUSE = 4, 1.0  # of what fails on the way; seconds before the second try, doubled before each further one
BLOCK = 2**22  # bytes that are asked for at a time where a file is gone through
EXTRAS = {"hf": "hub"}  # that install what a scheme needs; of all others `webdataset`
# what file systems call the version of a file, the surest first
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "blob_id",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
)
T = TypeVar("T")
U = TypeVar("U")


class Found(NamedTuple):
    """A file: its URL, or its path where it lies on this machine; bytes (None where nobody says); what changes with it."""

    place: str
    size: int | None
    stamp: str


def is_remote(place: str) -> bool:
    return "://" in place


def located(url: str) -> tuple[Any, str]:
    """The file system of a URL, one a process (they do not survive a fork), and the path on it."""
    extra = EXTRAS.get(url.partition(":")[0], "webdataset")
    try:
        import fsspec.core
    except ImportError as error:
        raise InputError(f"{url} needs the package fsspec: pip install underpaint[{extra}]") from error
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:  # of what fsspec needs for this scheme; its text names the package
        raise InputError(f"{url}: {_line(error)} (pip install underpaint[{extra}] brings https and hf)") from error
    except Exception as error:  # a scheme that is not known, credentials that make no sense
        raise InputError(f"{url}: {_line(error)}") from error


def failed(url: str, error: Exception) -> InputError:
    """What a file system says of a file, in one line; each raises errors of its own, of the network, of its library."""
    cause = error.__cause__
    status = getattr(cause, "status", getattr(error, "status", None))  # of an answer by HTTP
    if isinstance(error, PermissionError) or status in (401, 403):
        return InputError(f"{url}: no permission to read it")
    if isinstance(error, FileNotFoundError) and (status == 404 or not isinstance(cause, OSError)):
        return InputError(f"{url}: no such file, or no such bucket")
    return InputError(f"{url} cannot be read: {_line(cause or error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def expand(pattern: str, text: str, what: str = "shard") -> list[Found]:
    """The files that a path or URL with braces and stars stands for, in order.

    Args:
        text: the DATA argument, for messages.
        what: one of them is called.

    Raises:
        InputError: one of them is not there, or may not be read; a package is missing.
    """
    pattern = pattern.removeprefix("file://")
    patterns = _braces(pattern, text)
    if not is_remote(pattern):
        paths: list[str] = []
        for each in patterns:
            matches = sorted(glob.glob(os.path.expanduser(each), recursive=True))
            if not matches:
                raise InputError(f"{text}: no such {what}: {each}")
            paths += matches
        return [Found(path, os.path.getsize(path), stamp_of(Path(path))) for path in paths]
    found: list[Found] = []
    for magic, group in itertools.groupby(patterns, lambda each: "*" in each):
        if magic:
            for each in group:
                matches = _globbed(each)
                if not matches:
                    raise InputError(f"{text}: no such {what}: {each}")
                found += matches
        else:
            found += together(_looked_at, list(group))
    return found


def _braces(pattern: str, text: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
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
    return patterns


def _globbed(url: str) -> list[Found]:
    system, path = located(url)
    try:
        matches = system.glob(path, detail=True)
        return [_found(system.unstrip_protocol(name), matches[name]) for name in sorted(matches)]
    except Exception as error:
        raise failed(url, error) from error


def _looked_at(url: str) -> Found:
    system, path = located(url)
    try:
        return _found(url, system.info(path))
    except Exception as error:
        raise failed(url, error) from error


def _found(url: str, info: dict[str, Any]) -> Found:
    size = info.get("size")
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return Found(url, size, f"{size} {version}".strip())


def together(function: Callable[[T], U], values: Sequence[T]) -> Iterator[U]:
    """`function` of each value, several at a time, in order; where this process is told to end, nobody waits for them."""
    threads = ThreadPool(min(TOGETHER, max(1, len(values))))
    try:
        yield from threads.imap(function, values)
    finally:
        threads.terminate()


def relative(places: Sequence[str]) -> list[str]:
    """Places as paths below the folder that all of them lie in, with forward slashes."""
    plain = [place.partition("://")[2] or place.replace(os.sep, "/") for place in places]
    root = posixpath.commonpath([posixpath.dirname(each) for each in plain])
    return [posixpath.relpath(each, root or ".") for each in plain]


@contextmanager
def opened(url: str, size: int | None = None) -> Iterator[tuple[Any, bool]]:
    """A file to be gone through, and whether it has random access: else it is a stream from its beginning.

    Raises:
        InputError: it is not there, or may not be read.
    """
    system, path = located(url)
    ranged = _has_ranges(system, path, url, size)
    try:
        file = system.open(path, "rb", block_size=BLOCK if ranged else 0, cache_type="readahead" if ranged else "none")
    except Exception as error:
        raise failed(url, error) from error
    try:
        yield file, ranged
    finally:
        file.close()


def _has_ranges(system: Any, path: str, url: str, size: int | None) -> bool:
    if not size:
        return False
    try:
        with system.open(path, "rb", block_size=BLOCK, cache_type="readahead") as file:
            file.seek(size - 1)
            return len(file.read(1)) == 1
    except ValueError:  # of a web server that sends the whole file whatever it is asked for
        return False
    except Exception as error:
        raise failed(url, error) from error


def read_range(url: str, start: int, end: int) -> bytes:
    """Some bytes of a file; fewer where it ends before.

    Raises:
        InputError: after several tries; the run ends, since other images in place of these would go unnoticed.
    """

    def ask() -> bytes:
        system, path = located(url)
        data = system.cat_file(path, start=start, end=end)
        return data[start:end] if len(data) > end - start else data  # of a server that knows no ranges

    return tried(url, ask)


@contextmanager
def downloaded(url: str, size: int | None) -> Iterator[int]:
    """The descriptor of a copy of a file, which goes away when the block ends."""
    with tempfile.TemporaryFile(prefix="underpaint-") as copy:

        def ask() -> None:
            copy.seek(0)
            copy.truncate()
            system, path = located(url)
            with system.open(path, "rb", block_size=0, cache_type="none") as file:
                while block := file.read(BLOCK):
                    copy.write(block)
            if size is not None and copy.tell() < size:
                raise OSError(f"the connection ended {size - copy.tell():,} bytes too early")

        tried(url, ask)
        copy.flush()
        yield copy.fileno()


def tried(url: str, ask: Callable[[], T]) -> T:
    """What `ask` returns, which may fail on the way now and then; what is not there, or forbidden, is not asked for again."""
    for number in range(TRIES):
        try:
            return ask()
        except InputError:
            raise
        except Exception as error:
            if number == TRIES - 1 or isinstance(error, FileNotFoundError | PermissionError):
                raise failed(url, error) from error
            time.sleep(PAUSE * 2**number)
    raise AssertionError
