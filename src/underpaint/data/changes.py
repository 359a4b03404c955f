"""What a run was trained on, kept beside it, so that going on with other images is seen."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from underpaint.data.decode import Unreadable
from underpaint.data.sources.base import Source
from underpaint.errors import InputError
from underpaint.files import replacing

# the largest set whose bytes are read for it: of a larger one, that alone would take minutes
DIGESTED, DIGESTED_BYTES = 20_000, 2**30
NAMED = 2  # of each kind of change


def listing(source: Source, before: Path) -> tuple[pa.Table, str]:
    """What a source holds now, to be kept; and how that differs from what was kept in the file `before`, as text.

    A file that only has another time of change has not changed, where its set is small enough (`DIGESTED`) that
    digests are kept.
    """
    now = source.listed()
    try:
        kept = now.schema.append(pa.field("digest", pa.binary()))
        old = pq.read_table(before).cast(kept) if before.is_file() else None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{before}: damaged; what the run was trained on is not known: remove it to go on") from error
    if old is not None and old.select(["name", "stamp"]).equals(now):
        return old, ""
    now = now.append_column("digest", pa.array(_digests(source), pa.binary()))
    return now, "" if old is None else _difference(old, now)


def keep(listings: dict[str, pa.Table], folder: Path) -> None:
    """Write each listing under its name, atomically, and let go of it: of millions of images each is large, and what
    it took goes back to the system instead of into a reserve."""
    while listings:
        name, table = listings.popitem()
        with replacing(folder / name) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        del table
    pa.default_memory_pool().release_unused()


def _difference(old: pa.Table, now: pa.Table) -> str:
    places = pc.index_in(now["name"], value_set=old["name"])  # pyright: ignore[reportAttributeAccessIssue]
    here, there = np.asarray(places.is_valid()), np.asarray(places.drop_null())
    kept, was = now.filter(pa.array(here)), old.take(pa.array(there))
    same = [np.asarray(pc.equal(kept[key], was[key]).fill_null(False)) for key in ("stamp", "digest")]  # pyright: ignore[reportAttributeAccessIssue]
    gone = np.ones(len(old), bool)
    gone[there] = False
    found = {
        "added": now["name"].filter(pa.array(~here)),
        "removed": old["name"].filter(pa.array(gone)),
        "replaced": kept["name"].filter(pa.array(~(same[0] | same[1]))),
    }
    return ", ".join(f"{len(names):,} {what} ({_first(names)})" for what, names in found.items() if len(names))


def _first(names: pa.ChunkedArray) -> str:
    shown = [name.decode("utf-8", "backslashreplace") for name in names[:NAMED].to_pylist()]
    return ", ".join(shown) + (", ..." if len(names) > NAMED else "")


def _digests(source: Source) -> list[bytes | None]:
    """Of each image's bytes; none where there are too many to read them all."""
    count, found, taken = len(source.entries), [], 0
    for index in range(count if count <= DIGESTED else 0):
        try:
            data = source.read(index)
        except Unreadable:
            data = b""
        if (taken := taken + len(data)) > DIGESTED_BYTES:
            return [None] * count
        found.append(hashlib.blake2b(data, digest_size=16).digest())
    return found or [None] * count
