"""A source of one's own, in one file: encoded images by key, as LMDB holds them.

`SOURCES["lmdb"] = ("key_value_source:list_pairs", "lmdb:PATH")` makes it known. What opens a database is passed in, so that
another one with keys and values can stand in where the package lmdb is not installed.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from underpaint.data.sources.base import Entry, Listing, stamp_of
from underpaint.errors import InputError

Pairs = Mapping[bytes, bytes]


@contextmanager
def open_lmdb(path: str) -> Generator[Pairs, None, None]:
    """All pairs of an LMDB environment, read as they are asked for."""
    import lmdb  # pyright: ignore[reportMissingImports]

    with lmdb.open(path, readonly=True, lock=False) as opened, opened.begin() as transaction:

        class Opened(Mapping[bytes, bytes]):
            def __getitem__(self, key: bytes) -> bytes:
                return transaction.get(key)

            def __iter__(self):
                return iter(transaction.cursor().iternext(values=False))

            def __len__(self) -> int:
                return transaction.stat()["entries"]

        yield Opened()


opener: Callable[[str], AbstractContextManager[Pairs]] = open_lmdb


@dataclass
class PairReader:
    """Opens the database for each image: an open one must not be carried through a fork, nor be opened twice."""

    path: str
    keys: list[bytes]

    def read(self, index: int) -> bytes:
        with opener(self.path) as pairs:
            return pairs[self.keys[index]]


def list_pairs(text: str) -> Listing:
    """The images of lmdb:PATH, by their keys; what stands before the first slash of a key is its class."""
    path = Path(text.removeprefix("lmdb:"))
    if not path.exists():
        raise InputError(f"{text}: no such database")
    with opener(str(path)) as pairs:
        keys = sorted(pairs)
    names = [key.decode() for key in keys]
    classes = sorted({name.partition("/")[0] for name in names if "/" in name})
    entries = [Entry(name, None, classes.index(name.partition("/")[0]) if "/" in name else None) for name in names]
    stamps = [stamp_of(path)] * len(keys)
    return Listing(
        *("LMDB", str(path.resolve()), entries, stamps, PairReader(str(path), keys), classes, [], [], len(keys))
    )
