"""Images of parquet files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from underpaint.data.decode import Unreadable
from underpaint.data.sources.base import Entry, Listing, RangeReader, Reader, flat_copy, stamp_of
from underpaint.data.sources.columns import column_labels, numbers_of
from underpaint.data.sources.names import split_folders, split_of_file
from underpaint.errors import InputError

IN_MEMORY = 512 * 2**20  # bytes of encoded images held in memory; more is copied to a flat file once


class _RowReader:
    """Encoded images of parquet files held in memory, loaded on first use in each process that was not forked."""

    def __init__(self, paths: list[str], column: str, rows: list[tuple[int, int]]):
        self._paths = paths
        self._column = column
        self._rows = rows
        self._images: dict[int, pa.Array] = {}

    def read(self, index: int) -> bytes:
        number, row = self._rows[index]
        if number not in self._images:
            table = pq.ParquetFile(self._paths[number]).read(columns=[self._column])
            self._images[number] = _image_bytes(table.column(0))
        data = self._images[number][row].as_py()
        if data is None:
            raise Unreadable("the row holds no image bytes")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": {}}


def _image_bytes(column: pa.ChunkedArray | pa.Array) -> Any:
    """The bytes of an image column: binary itself, or the field `bytes` of a struct."""
    if isinstance(column, pa.ChunkedArray):
        chunks = [_image_bytes(chunk) for chunk in column.chunks]
        return pa.chunked_array(chunks) if chunks else pa.chunked_array([], pa.binary())
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(schema: pa.Schema, path: Path) -> pa.Field:
    fits = [
        field
        for field in schema
        if _is_binary(field.type)
        or (pa.types.is_struct(field.type) and any(f.name == "bytes" and _is_binary(f.type) for f in field.type))
    ]
    if not fits:
        raise InputError(
            f"{path} has no image column; expected one of struct {{bytes, path}} or binary, "
            f"its columns are {', '.join(schema.names)}"
        )
    return next((field for field in fits if field.name in ("image", "img", "jpg", "png")), fits[0])


def list_parquet(paths: list[Path], root: Path) -> Listing:
    paths = sorted(paths)
    names: list[str] = []
    fallbacks: list[str] = []
    splits: list[str | None] = []
    stamps: list[str] = []
    rows: list[tuple[int, int]] = []
    labels: list[Any] = []
    others: list[dict[str, list[Any]]] = []
    class_names: list[str] | None = None
    total = 0
    column = ""
    folders = split_folders([path.relative_to(root).as_posix() for path in paths])
    for number, path in enumerate(paths):
        try:
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
            field = _image_column(schema, path)
            if column and field.name != column:
                raise InputError(f"{path}: its image column is {field.name!r}, that of {paths[0]} is {column!r}")
            column = field.name
            wanted = [f"{column}.path"] if pa.types.is_struct(field.type) and "path" in _fields(field) else []
            wanted += ["label"] if "label" in schema.names else []
            numeric = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
            wanted += [name for name in numeric if name != "label"]
            table = file.read(columns=wanted) if wanted else None
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is not a readable parquet file: {' '.join(str(error).split())}") from error
        count = file.metadata.num_rows
        for group in range(file.metadata.num_row_groups):
            group_columns = file.metadata.row_group(group)
            total += sum(
                group_columns.column(c).total_uncompressed_size
                for c in range(group_columns.num_columns)
                if group_columns.column(c).path_in_schema.split(".")[0] == column
            )
        class_names = class_names or _class_names(schema)
        relative = path.relative_to(root)
        stem = relative.with_suffix("").as_posix()
        known = table.column(column) if table is not None and column in table.column_names else None
        given = [item["path"] if item else None for item in known.to_pylist()] if known is not None else [None] * count
        split = split_of_file(relative.as_posix(), folders)
        fallbacks += [f"{stem}/{row}" for row in range(count)]
        names += [name or f"{stem}/{row}" for row, name in enumerate(given)]
        splits += [split] * count
        stamps += [stamp_of(path)] * count
        rows += [(number, row) for row in range(count)]
        has_labels = table is not None and "label" in table.column_names
        labels += table.column("label").to_pylist() if table is not None and has_labels else [None] * count
        others.append({name: table.column(name).to_pylist() for name in numeric} if table is not None else {})
    if len(set(names)) < len(names):  # paths that repeat, in several files or in one
        names = fallbacks
    notes: list[str] = []
    classified, classes = column_labels(labels, class_names, notes)
    # a label of classes is none of the numbers; one of measured values is, if it is the only column
    shared = [name for name in others[0] if all(name in each for each in others) and not (name == "label" and classes)]
    columns = {name: [value for each in others for value in each[name]] for name in shared}
    number, numbers = numbers_of(columns, len(names), notes)
    entries = [Entry(*item) for item in zip(names, splits, classified, numbers, strict=True)]
    reader: Reader = _RowReader([str(path) for path in paths], column, rows)
    if total > IN_MEMORY:
        reader = _copy_rows(paths, column, notes)
    kind = "parquet file" if len(paths) == 1 else f"{len(paths)} parquet files"
    place = "\n".join(str(path.resolve()) for path in paths)
    return Listing(kind, place, entries, stamps, reader, classes, notes, [], len(paths), number)


def _fields(field: pa.Field) -> list[str]:
    return [each.name for each in field.type]


def _copy_rows(paths: list[Path], column: str, notes: list[str]) -> Reader:
    """Encoded images of large parquet files in one flat file: a row group must not be read again for each image."""
    sizes: list[int] = []

    def batches() -> Iterator[Any]:
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(256, columns=[column]):
                yield from _image_bytes(batch.column(0))

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
    offsets = np.concatenate([[0], stored.cumsum()]).tolist()
    notes.append("the encoded images were copied once to a flat file in the cache, for random access")
    return RangeReader([(str(flat), offsets[i], int(stored[i])) for i in range(count)], keep)


def _class_names(schema: pa.Schema) -> list[str] | None:
    """Class names of the label column, where Hugging Face's schema metadata gives them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, ValueError, TypeError):
        return None
