"""The listing of a large folder, kept in the cache: the next start, and every other process, maps it into memory."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from underpaint.data.sources.base import Listing, Reader, cache_root
from underpaint.data.sources.index import Entries, Names
from underpaint.files import replacing

FORMAT = 2  # of the file, and of the rules by which names become splits and labels: raised when either changes
SPOT_CHECKS = 2_000  # files looked at for a size or time that changed, evenly spread
SETTLED = 2 * 10**9  # ns: a folder that changed so shortly before it was listed may change again and show the same time


def stored_at(folder: Path) -> Path:
    key = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_root() / "listings" / f"{key[:32]}.arrow"


def store_listing(
    folder: Path, listing: Listing, folders: dict[str, tuple[int, int]], sides: list[str], masks: str
) -> None:
    """Keep what was found in a folder; nothing where the cache cannot be written or the folder is being written to.

    Args:
        folders: times of every folder below, before it was listed.
        sides: files on which the listing depends beside the images.
        masks: what masks beside images were taken for.
    """
    if max(changed for changed, _ in folders.values()) > time.time_ns() - SETTLED:
        return
    entries, stamps = listing.entries, listing.stamps
    assert isinstance(entries, Entries)
    assert isinstance(stamps, np.ndarray)
    facts = {
        "format": FORMAT,
        "place": listing.place,
        "masks": masks,
        "classes": listing.classes,
        "notes": listing.notes,
        "skipped": listing.skipped,
        "seen": listing.seen,
        "number": listing.number,
        "splits": entries.split_names,
        "folders": [[name, *times] for name, times in folders.items()],
        "sides": [[name, *_stamp(folder / name)] for name in sides],
    }
    columns = {"name": entries.names.column, "split": pa.array(entries.splits), "label": pa.array(entries.labels)}
    if entries.numbers is not None:
        columns["number"] = pa.array(entries.numbers)
    columns["stamp"] = pa.FixedSizeListArray.from_arrays(pa.array(stamps.reshape(-1)), 2)
    with suppress(OSError):
        write_index(stored_at(folder), columns, facts)


def write_index(file: Path, columns: dict[str, Any], facts: dict[str, Any]) -> None:
    """Columns of one length and what is known of all in a file that can be mapped into memory."""
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    schema = batch.schema.with_metadata({"underpaint": json.dumps(facts)})
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))


def load_listing(folder: Path, reader: Callable[[Names], Reader], masks: str) -> Listing | None:
    """The stored listing of a folder; None where there is none, or where something changed since.

    That is seen by the times of every folder below, which change where a file is added, renamed, removed or replaced by
    a new one, by sizes and times of the files that say something of the images, and by those of 2,000 images. So of
    files that are rewritten in place a few may go unseen until a folder's time changes too (`touch` does it).
    """
    file = stored_at(folder)
    try:
        with pa.memory_map(str(file)) as mapped:
            batch = pa.ipc.open_file(mapped).get_batch(0)
        batch.validate(full=True)  # offsets of a damaged file would lead anywhere
        facts = json.loads(batch.schema.metadata[b"underpaint"])
        if facts["format"] != FORMAT or facts["place"] != str(folder.resolve()) or facts["masks"] != masks:
            return None
        columns = {name: batch.column(name) for name in batch.schema.names}
        if columns["name"].type != pa.large_binary() or any(column.null_count for column in columns.values()):
            return None
        values = {name: column.to_numpy() for name, column in columns.items() if name not in ("name", "stamp")}
        labels, splits = values["label"], values["split"]
        if not len(labels) or labels.max() >= len(facts["classes"] or ()) or splits.max() >= len(facts["splits"]):
            return None
        entries = Entries(Names(columns["name"]), splits, facts["splits"], labels, values.get("number"))
        stamps = columns["stamp"].flatten().to_numpy().reshape(-1, 2)
        if not _unchanged(folder, facts, entries.names, stamps):
            return None
        return Listing(
            *("folder", facts["place"], entries, stamps, reader(entries.names), facts["classes"], facts["notes"]),
            *(facts["skipped"], facts["seen"], facts["number"]),
        )
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError):
        return None


def _unchanged(folder: Path, facts: dict[str, Any], names: Names, stamps: np.ndarray) -> bool:
    for name, *times in facts["folders"]:
        status = os.stat(folder / name)
        if [status.st_mtime_ns, status.st_ctime_ns] != times:
            return False
    if any(list(_stamp(folder / name)) != stamp for name, *stamp in facts["sides"]):
        return False
    places = np.linspace(0, len(names) - 1, min(SPOT_CHECKS, len(names))).round().astype(int).tolist()
    return all(_stamp(f"{folder}/{names[place]}") == tuple(stamps[place].tolist()) for place in places)


def _stamp(path: Path | str) -> tuple[int, ...]:
    """Size and time of a file; of one that cannot be looked at, what no file has."""
    try:
        status = os.stat(path)
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns
