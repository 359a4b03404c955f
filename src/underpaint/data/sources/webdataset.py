"""Images of WebDataset shards, here or elsewhere: wds:PATTERN.

What lies where in the shards is read once, from their headers, and kept in the cache: from then on every image is a stretch
of bytes, so a set is read in pieces of shards, one after the other, and any batch's images are known without reading.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import pyarrow as pa
from filelock import FileLock

from underpaint.console import Going
from underpaint.data.sources.archive import is_tar, uncompressed
from underpaint.data.sources.base import LARGEST_FILE, Listing, RangeReader, Reader, cache_root
from underpaint.data.sources.columns import column_labels
from underpaint.data.sources.index import Entries, Names
from underpaint.data.sources.names import IMAGE_SUFFIXES, split_folders, split_of_file
from underpaint.data.sources.pieces import PieceReader, Pieces, cut
from underpaint.data.sources.remote import (
    Found,
    downloaded,
    expand,
    is_remote,
    opened,
    read_range,
    relative,
    together,
    tried,
)
from underpaint.data.sources.stored import write_index
from underpaint.errors import InputError

FORMAT = 1  # of a stored index
KEPT_FROM = 20_000  # images of local shards from which on their index is kept; below it is read in a second
LARGEST_LABEL = 2**16  # bytes of a .cls file
COLUMNS = pa.schema(
    [("name", pa.large_binary()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.large_string())]
)


class _Shard(NamedTuple):
    """What is known of a shard."""

    images: pa.RecordBatch  # `COLUMNS`; labels as JSON
    facts: dict[
        str, Any
    ]  # `place`, `stamp`, `seen` (files), `skipped`, `ranged` (whether it has random access), `cut` (short)


def list_shards(text: str) -> Listing:
    pattern = text.removeprefix("wds:")
    if pattern.startswith("pipe:"):
        raise InputError(f"{text}: no commands are run; expected a path or a URL with {{000..009}} or * in it")
    files = expand(pattern, text)
    remote = is_remote(files[0].place)
    flats, keep = [file.place for file in files], []
    if not remote:
        packed = [_flat(file) for file in files]
        flats, keep = [str(flat) for flat, _ in packed], [kept for _, kept in packed]
    shards = _index(text, files, flats, remote)
    notes = [
        f"{_name(f)} is cut short; what comes before is read"
        for f, s in zip(files, shards, strict=True)
        if s.facts["cut"]
    ]
    counts = np.array([len(shard.images) for shard in shards], np.int64)
    number = np.repeat(np.arange(len(files)), counts)
    table = pa.Table.from_batches([shard.images for shard in shards], COLUMNS)
    offsets, sizes = (table[name].to_numpy() for name in ("offset", "size"))
    labels, classes = _labels(table["label"], notes)
    places = relative([file.place for file in files])
    folders = split_folders(places)
    splits = [split_of_file(place, folders) for place in places]
    split_names = sorted({split for split in splits if split is not None})
    codes = np.array([-1 if split is None else split_names.index(split) for split in splits], np.int8)
    entries = Entries(_names(table["name"], files), codes[number], split_names, labels)
    whole = np.array([not shard.facts["ranged"] for shard in shards])
    starts, held = cut(number, offsets, sizes, whole)
    ranges = np.stack([number, offsets, sizes], axis=1)
    place = "\n".join(map(_place, files))
    reader: Reader
    if remote:
        bring = _Bring([(file.place, file.size) for file in files], ranges, starts, whole)
        reader = PieceReader(
            "\n".join([place, *(file.stamp for file in files)]), starts, bring, bring.alone, ranges[:, 2]
        )
    else:
        reader = RangeReader(flats, ranges, keep)
    stamps = _Stamps(files, counts)
    return Listing(
        *(f"WebDataset, {len(files)} shard{'s' if len(files) != 1 else ''}", place, entries, stamps, reader),
        *(classes, notes, [skip for shard in shards for skip in shard.facts["skipped"]]),
        seen=sum(shard.facts["seen"] for shard in shards),
        pieces=Pieces(starts, held, remote),
    )


class _Stamps(Sequence[str]):
    """That of its shard for each image, made when it is asked for."""

    def __init__(self, files: list[Found], counts: np.ndarray):
        self._stamps = [file.stamp for file in files]
        self._ends = counts.cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            places = np.arange(*index.indices(len(self)))
            return [self._stamps[number] for number in np.searchsorted(self._ends, places, side="right").tolist()]
        return self._stamps[int(np.searchsorted(self._ends, range(len(self))[index], side="right"))]


def _name(file: Found) -> str:
    return file.place.replace(os.sep, "/").rpartition("/")[2]


def _flat(file: Found) -> tuple[Path, Any]:
    path = Path(file.place)
    if not is_tar(path):
        raise InputError(f"{path} is not a readable tar file: damaged or cut off")
    return uncompressed(path, file.stamp)


def _names(column: pa.ChunkedArray, files: list[Found]) -> Names:
    if len({_name(file) for file in files}) < len(files):  # shards of one name in several folders
        names = list(Names(column))
        if len(set(names)) < len(names):
            return Names.of(f"{n}/{name}" for n, name in enumerate(names))
    return Names(column)


def _labels(column: pa.ChunkedArray, notes: list[str]) -> tuple[np.ndarray, list[str] | None]:
    """Class numbers of labels as JSON, -1 for none; worked out once for each class."""
    coded = column.combine_chunks().dictionary_encode()
    values = [json.loads(value) for value in coded.dictionary.to_pylist()]
    numbers, classes = column_labels(values, None, notes)
    numbered = np.array([-1 if number is None else number for number in [*numbers, None]], np.int32)
    return numbered[coded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)], classes


def _index(text: str, files: list[Found], flats: list[str], remote: bool) -> list[_Shard]:
    """What lies in each shard: as it was stored where a shard is still the same, else by its headers."""
    name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    stored = cache_root() / "listings" / f"wds-{name}.arrow"
    with _alone(stored, remote):
        known = {shard.facts["place"]: shard for shard in _load(stored)}
        shards = [known.get(_place(file)) for file in files]
        missing = [k for k, shard in enumerate(shards) if shard is None or shard.facts["stamp"] != files[k].stamp]
        asked = [(files[k], flats[k]) for k in missing]
        with Going("reading the headers of shards", len(missing)) as going:
            for k, shard in zip(missing, together(_read, asked) if remote else map(_read, asked), strict=True):
                shards[k] = shard
                going.advance()
        found = [shard for shard in shards if shard is not None]
        if missing and (remote or sum(len(shard.images) for shard in found) > KEPT_FROM):
            with suppress(OSError):
                _store(stored, found)
    return found


def _place(file: Found) -> str:
    return file.place if is_remote(file.place) else str(Path(file.place).resolve())


@contextmanager
def _alone(stored: Path, wanted: bool) -> Iterator[None]:
    """One process at a time reads remote shards for an index, as far as the file system of the cache has locks: all ranks
    start together."""
    lock = None
    if wanted:
        with suppress(OSError, NotImplementedError):
            stored.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{stored}.lock")
            lock.acquire()
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _store(stored: Path, shards: list[_Shard]) -> None:
    table = pa.Table.from_batches([shard.images for shard in shards], COLUMNS)
    columns = {name: table[name].combine_chunks() for name in COLUMNS.names}
    facts = [{**shard.facts, "count": len(shard.images)} for shard in shards]
    write_index(stored, columns, {"format": FORMAT, "shards": facts})


def _load(stored: Path) -> list[_Shard]:
    """The shards of a stored index; none where there is no such index, or it is damaged."""
    try:
        with pa.memory_map(str(stored)) as mapped:
            batch = pa.ipc.open_file(mapped).get_batch(0)
        batch.validate(full=True)
        facts = json.loads(batch.schema.metadata[b"underpaint"])
        if facts["format"] != FORMAT or not batch.schema.equals(COLUMNS):
            return []
        if any(batch.column(name).null_count for name in ("name", "offset", "size")):
            return []
        batch = pa.RecordBatch.from_arrays(batch.columns, schema=COLUMNS)
        found, start = [], 0
        for each in facts["shards"]:
            count = each.pop("count")
            found.append(_Shard(batch.slice(start, count), each))
            start += count
        return found if start == len(batch) else []
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError):
        return []


def _read(what: tuple[Found, str]) -> _Shard:
    """Go through the headers of a shard.

    Raises:
        InputError: it is no tar file, or cannot be reached.
    """
    file, flat = what
    if not is_remote(file.place):
        with open(flat, "rb") as local:
            return _walk(file, local, True, os.fstat(local.fileno()).st_size)
    if file.place.lower().rpartition(".")[2] in ("gz", "tgz", "bz2", "xz"):
        raise InputError(
            f"{file.place}: a compressed shard has no random access, and images are compressed already; use .tar"
        )

    def walk() -> _Shard:
        with opened(file.place, file.size) as (remote, ranged):
            return _walk(file, remote, ranged, file.size)

    return tried(file.place, walk)


def _walk(file: Found, opened: Any, ranged: bool, size: int | None) -> _Shard:
    images: dict[
        str, tuple[int, int, str]
    ] = {}  # offset, size and sample by name; of a name that occurs twice, the last
    labels: dict[str, str] = {}
    skipped: list[dict[str, str]] = []
    used: dict[str, str] = {}  # the image of each sample
    seen, cut_short = 0, False
    remote = is_remote(file.place)
    try:
        with tarfile.open(fileobj=opened, mode="r:" if ranged else "r|") as archive:
            for member, label in _members(archive):
                name = member.name.removeprefix("./")
                seen += 1
                key, suffix = _sample_key(name)
                if label is not None:
                    labels[key] = json.dumps(int(label) if re.fullmatch(r"-?[0-9]{1,18}", label) else label)
                if f".{suffix}" not in IMAGE_SUFFIXES:  # masks have suffixes such as mask.png
                    continue
                reason = _useless(member.size, remote)
                if reason:
                    skipped.append({"path": f"{_name(file)}/{name}", "reason": reason})
                elif used.setdefault(key, name) == name:
                    images.pop(name, None)
                    images[name] = (member.offset_data, member.size, key)
            # two empty blocks are the end of a whole one
            cut_short = size is not None and size - archive.offset < tarfile.BLOCKSIZE
    # beside TarError: ValueError of numbers, UnicodeDecodeError of names, OverflowError of sizes, ...
    except Exception as error:
        if remote and not isinstance(error, tarfile.TarError | ValueError | OverflowError | EOFError):
            raise  # what the network says
        if not seen:
            raise InputError(f"{file.place} is not a readable tar file: {' '.join(str(error).split())}") from error
        cut_short = True  # what was listed before is still there
    columns = [
        pa.array([f"{_name(file)}/{name}".encode("utf-8", "surrogateescape") for name in images], pa.large_binary()),
        pa.array([offset for offset, _, _ in images.values()], pa.int64()),
        pa.array([size for _, size, _ in images.values()], pa.int64()),
        pa.array([labels.get(key) for _, _, key in images.values()], pa.large_string()),
    ]
    facts = {
        "place": _place(file),
        "stamp": file.stamp,
        "seen": seen,
        "skipped": skipped,
        "ranged": ranged,
        "cut": cut_short,
    }
    return _Shard(pa.RecordBatch.from_arrays(columns, schema=COLUMNS), facts)


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """The files of a shard, with the text of those that are labels: of a stream it has to be read in passing."""
    for member in archive:
        if not member.isreg():
            continue
        label = None
        if _sample_key(member.name)[1] == "cls" and member.size <= LARGEST_LABEL:
            content = archive.extractfile(member)
            assert content is not None
            label = content.read().decode("utf-8", "replace").strip()
        yield member, label


def _useless(size: int, remote: bool) -> str:
    if size == 0:
        return "empty file"
    return f"has more than {LARGEST_FILE:,} bytes" if remote and size > LARGEST_FILE else ""


def _sample_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: a sample is what its files' names share up to the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    key, _, suffix = last.partition(".")
    return f"{folder}/{key}", suffix.lower()


class _Bring:
    """The encoded images of the n-th piece of remote shards; of a shard without random access, that is all of it."""

    def __init__(self, files: list[tuple[str, int | None]], ranges: np.ndarray, starts: np.ndarray, whole: np.ndarray):
        self._files = files
        self._ranges = ranges
        self._starts = starts
        self._whole = whole

    def __call__(self, piece: int) -> Iterator[bytes]:
        ranges = self._ranges[self._starts[piece] : self._starts[piece + 1]]
        number, start, _ = ranges[0].tolist()
        url, length = self._files[number]
        if self._whole[number]:
            with downloaded(url, length) as copy:
                for _, offset, size in ranges.tolist():
                    yield os.pread(copy, size, offset)
            return
        data = self._range(number, start, int(ranges[-1, 1:].sum()))
        for _, offset, size in ranges.tolist():
            yield data[offset - start : offset - start + size]

    def alone(self, index: int) -> bytes | None:
        number, offset, size = self._ranges[index].tolist()
        return None if self._whole[number] else self._range(number, offset, offset + size)

    def _range(self, number: int, start: int, end: int) -> bytes:
        url, length = self._files[number]
        end = end if length is None else min(end, length)  # of a shard that is cut short
        return read_range(url, start, end) if end > start else b""
