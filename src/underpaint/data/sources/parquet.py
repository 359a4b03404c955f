"""Images of parquet files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from underpaint.data.decode import Unreadable
from underpaint.data.sources.base import Listing, RangeReader, Reader, flat_copy, stamp_of
from underpaint.data.sources.columns import LABELS, column_labels, numbers_of
from underpaint.data.sources.index import Entries
from underpaint.data.sources.names import split_folders, split_of_file
from underpaint.data.sources.tables import NAME_COLUMNS
from underpaint.errors import InputError

ROWS = 16  # that are read at a time
LARGEST_COUNT = 2**27  # rows
IN_MEMORY = 512 * 2**20  # bytes of encoded images held in memory; more is copied to a flat file once


# what they may become where the file says less than it holds, in memory and on disk
LARGEST_IN_MEMORY, LARGEST_COPY = 2 * IN_MEMORY, 2**40


class _RowReader:
    """Encoded images of parquet files held in memory, loaded on first use in each process that was not forked."""

    def __init__(self, paths: list[str], column: str, rows: np.ndarray):
        self._paths = paths
        self._column = column
        self._rows = rows
        self._images: dict[int, pa.Array] = {}

    def read(self, index: int) -> bytes:
        number, row = self._rows[index].tolist()
        if number not in self._images:
            self._images[number] = pa.chunked_array(list(_chunks(self._paths[number], self._column, LARGEST_IN_MEMORY)))
        data = self._images[number][row].as_py()
        if data is None:
            raise Unreadable("the row holds no image bytes")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_images": {}}


def _image_bytes(column: pa.ChunkedArray | pa.Array) -> Any:
    """The bytes of an image column: binary itself, or the field `bytes` of a struct."""
    if isinstance(column, pa.ChunkedArray):
        chunks = [_image_bytes(chunk) for chunk in column.chunks]
        return pa.chunked_array(chunks) if chunks else pa.chunked_array([], pa.binary())
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _chunks(path: str | Path, column: str, largest: int) -> Iterator[Any]:
    """The image bytes of a file, some rows at a time: a few values that many rows share may stand for terabytes.

    Raises:
        Unreadable: more than `largest` bytes.
    """
    held = 0
    for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=[column]):
        held += batch.nbytes
        if held > largest:
            raise Unreadable(f"{path} unpacks to more than {largest:,} bytes; write its images to files")
        yield _image_bytes(batch.column(0))


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_images(field: pa.Field) -> bool:
    struct = pa.types.is_struct(field.type)
    return _is_binary(field.type) or (struct and any(f.name == "bytes" and _is_binary(f.type) for f in field.type))


def _image_column(schema: pa.Schema, path: Path) -> pa.Field:
    fits = [field for field in schema if _holds_images(field)]
    if not fits:
        raise InputError(
            f"{path} has no image column; expected one of struct {{bytes, path}} or binary, "
            f"its columns are {', '.join(schema.names)}"
        )
    return next((field for field in fits if field.name in ("image", "img", "jpg", "png")), fits[0])


class _Table(NamedTuple):
    """A file without its images."""

    column: str  # of the images
    names: list[str | None]  # as the rows say
    label: str  # the column of classes
    labels: list[Any]
    numbers: dict[str, list[Any]]  # every numeric column
    classes: list[str] | None
    size: int  # bytes of the images, and of the few of other columns

    @classmethod
    def of(cls, path: Path) -> "_Table":
        """Raises InputError: it cannot be read, or has no images."""
        try:
            file = pq.ParquetFile(path)
            schema, count = file.schema_arrow, file.metadata.num_rows
            field = _image_column(schema, path)
            named = pa.types.is_struct(field.type) and "path" in _fields(field)
            numeric = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
            label = next((name for name in LABELS if name in schema.names), "label")
            wanted = [name for name in dict.fromkeys([label, *numeric]) if name in schema.names]
            wanted += [f"{field.name}.path"] if named else []
            table = file.read(columns=wanted) if wanted else None
            if count > LARGEST_COUNT or (table is not None and table.num_rows != count):
                raise ValueError(f"it claims {count:,} rows")
            read = {} if table is None else {name: table.column(name).to_pylist() for name in table.column_names}
            # of all columns: what describes a single one lets pyarrow end the process where it is damaged
            size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError of text that is none
            raise InputError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}") from error
        names = [_name(item) for item in read[field.name]] if named else [None] * count
        labels = read.get(label, [None] * count)
        numbers = {name: read[name] for name in numeric}
        return cls(field.name, names, label, labels, numbers, _class_names(schema, label), size)


def _name(item: Any) -> str | None:
    path = item and item["path"]
    return os.fsdecode(path) if isinstance(path, str | bytes) and path else None


def has_images(path: Path) -> bool:
    """Whether a file is not, as far as it can be read, a table that names its images by a path and holds none."""
    try:
        schema = pq.ParquetFile(path).schema_arrow
    except (pa.ArrowException, OSError, ValueError):
        return True
    named = any(name.lower() in NAME_COLUMNS for name in schema.names)
    return not named or any(_holds_images(field) for field in schema)


def list_parquet(paths: list[Path], root: Path) -> Listing:
    paths = sorted(paths)
    tables = [_Table.of(path) for path in paths]
    column = tables[0].column
    for path, table in zip(paths, tables, strict=True):
        if table.column != column:
            raise InputError(f"{path}: its image column is {table.column!r}, that of {paths[0]} is {column!r}")
    places = [path.relative_to(root) for path in paths]
    folders = split_folders([place.as_posix() for place in places])
    rows = [(number, row) for number, table in enumerate(tables) for row in range(len(table.names))]
    fallbacks = [f"{places[number].with_suffix('').as_posix()}/{row}" for number, row in rows]
    names = [tables[number].names[row] or name for (number, row), name in zip(rows, fallbacks, strict=True)]
    if len(set(names)) < len(names):  # paths that repeat, in several files or in one
        names = fallbacks
    notes: list[str] = []
    class_names = next((table.classes for table in tables if table.classes), None)
    labels, classes = column_labels([label for table in tables for label in table.labels], class_names, notes)
    # a label of classes is none of the numbers; one of measured values is, if it is the only column
    shared = [name for name in tables[0].numbers if all(name in table.numbers for table in tables)]
    shared = [name for name in shared if not (name == tables[0].label and classes)]
    columns = {name: [value for table in tables for value in table.numbers[name]] for name in shared}
    number, numbers = numbers_of(columns, len(names), notes)
    splits, stamps = [split_of_file(place.as_posix(), folders) for place in places], [stamp_of(path) for path in paths]
    entries = Entries.of(names, [splits[file] for file, _ in rows], labels, numbers)
    reader: Reader = _RowReader([str(path) for path in paths], column, np.asarray(rows, np.int64).reshape(-1, 2))
    if sum(table.size for table in tables) > IN_MEMORY:
        reader = _copy_rows(paths, column, notes)
    kind = "parquet file" if len(paths) == 1 else f"{len(paths)} parquet files"
    place = "\n".join(str(path.resolve()) for path in paths)
    return Listing(
        *(kind, place, entries, [stamps[file] for file, _ in rows], reader, classes, notes, [], len(paths), number)
    )


def _fields(field: pa.Field) -> list[str]:
    return [each.name for each in field.type]


def _copy_rows(paths: list[Path], column: str, notes: list[str]) -> Reader:
    """Encoded images of large parquet files in one flat file: a row group must not be read again for each image."""
    sizes: list[int] = []

    def batches() -> Iterator[Any]:
        for path in paths:
            for chunk in _chunks(path, column, LARGEST_COPY):
                yield from chunk

    def write(target: Path) -> None:
        with target.open("wb") as flat:
            for item in batches():
                data = item.as_py() or b""
                sizes.append(len(data))
                flat.write(data)
            flat.write(np.array([*sizes, len(sizes)], dtype="<u8").tobytes())

    key = " ".join(f"{path.resolve()} {stamp_of(path)}" for path in paths)
    flat, keep = flat_copy(key, ".rows", write)
    with flat.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        count = int(np.frombuffer(file.read(8), dtype="<u8")[0])
        file.seek(-8 * (count + 1), os.SEEK_END)
        stored = np.frombuffer(file.read(8 * count), dtype="<u8").astype(np.int64)
    ranges = np.stack([np.zeros_like(stored), stored.cumsum() - stored, stored], axis=1)
    notes.append("the encoded images were copied once to a flat file in the cache, for random access")
    return RangeReader([str(flat)], ranges, keep)


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Class names of the label column, or of the lists in it, where Hugging Face's schema metadata gives them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = features[label]
        return [str(name) for name in (found if "names" in found else found["feature"])["names"]]
    except (KeyError, ValueError, TypeError):
        return None
