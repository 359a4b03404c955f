"""The same image in two sources: an image to judge by that lies among those to train on."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from underpaint.data.decode import Unreadable
from underpaint.data.sources.base import Source, cache_root
from underpaint.data.sources.index import Indices
from underpaint.files import write_json


def same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two DATA arguments name the same images."""
    return str(one) == str(other) or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def copies(source: Source, indices: Indices, other: Source, judged: Indices) -> list[int]:
    """Which entries `indices` of `source` hold the same bytes as one of the entries `judged` of `other`.

    Nothing is decoded, and only files of the size of one of `judged` are read. What was found is kept in the cache, by
    the fingerprints of both, so that going on with a run reads nothing again. What cannot be read is no copy.
    """
    key = hashlib.sha256(f"{source.fingerprint()} {other.fingerprint()} ".encode())
    for numbers in (indices, judged):
        key.update(np.asarray([len(numbers), *numbers], dtype="<i8").tobytes())
    file = cache_root() / "copies" / f"{key.hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return json.loads(file.read_text())
    wanted: dict[int, set[bytes]] = {}
    for i in np.asarray(judged).tolist():
        with suppress(Unreadable):
            data = other.read(i)
            wanted.setdefault(len(data), set()).add(hashlib.blake2b(data, digest_size=16).digest())
    found = []
    for i in np.asarray(indices).tolist():
        with suppress(Unreadable):
            same = wanted.get(source.size(i))
            if same and hashlib.blake2b(source.read(i), digest_size=16).digest() in same:
                found.append(i)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found, indent=None)
    return found
