"""Images of parquet files, here or elsewhere: a file, a folder, parquet:PATTERN, hf://datasets/NAME.

Of small sets on this machine the encoded images are held in memory. Of all others row groups are read as they are needed, and
what is unpacked stays on the disk for a while (`pieces`).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from underpaint.console import Going
from underpaint.data.decode import Unreadable
from underpaint.data.sources.base import Listing, stamp_of
from underpaint.data.sources.columns import LABELS, column_labels, numbers_of
from underpaint.data.sources.index import Entries
from underpaint.data.sources.names import split_folders, split_of_file
from underpaint.data.sources.pieces import PieceReader, Pieces
from underpaint.data.sources.remote import Found, expand, failed, is_remote, opened, relative, together, tried
from underpaint.data.sources.tables import NAME_COLUMNS
from underpaint.errors import InputError

ROWS = 16  # that are read at a time
BUFFER = 2**20  # bytes of a column that are read at a time, in place of all that a row group has of it
LARGEST_COUNT = 2**27  # rows
IN_MEMORY = 512 * 2**20  # bytes of encoded images held in memory; of more row groups are unpacked as they are needed


# bytes that they may become where the file says less than it holds: a file in memory, or a row group, times what it says
LARGEST_IN_MEMORY, RATIO = 2 * IN_MEMORY, 8


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
            path = self._paths[number]
            with _parquet(path) as file:
                self._images[number] = pa.chunked_array(list(_chunks(file, self._column, LARGEST_IN_MEMORY, path)))
        data = self._images[number][row].as_py()
        if data is None:
            raise Unreadable("the row holds no image bytes")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_images": {}}


class _Bring:
    """The encoded images of the n-th of some row groups.

    Args:
        groups: [p, 3] the number of the file, of the row group in it, and its bytes by what the file says.
    """

    def __init__(self, files: list[Found], column: str, groups: np.ndarray):
        self._files = files
        self._column = column
        self._groups = groups

    def __call__(self, piece: int) -> Iterator[bytes]:
        number, group, size = self._groups[piece].tolist()
        place, length, _ = self._files[number]
        try:
            with _parquet(place, length) as file:
                largest = max(LARGEST_IN_MEMORY, RATIO * size)
                for chunk in _chunks(file, self._column, largest, place, [group]):
                    for item in chunk:
                        yield item.as_py() or b""
        except (Unreadable, InputError):
            raise
        except Exception as error:  # of pyarrow, or of the network
            if is_remote(place) and not isinstance(error, pa.ArrowException):
                raise failed(place, error) from error
            raise Unreadable(f"cannot be read: {' '.join(str(error).split())[:160]}") from error


@contextmanager
def _parquet(place: str, size: int | None = None) -> Iterator[pq.ParquetFile]:
    """A parquet file, wherever it lies.

    Raises:
        InputError: it is far away, and cannot be reached or not read in parts.
    """
    if not is_remote(place):
        with pq.ParquetFile(place, buffer_size=BUFFER) as file:
            yield file
        return
    with opened(place, size) as (remote, ranged):
        if not ranged:
            raise InputError(f"{place}: its server sends whole files alone, and parquet is read in parts; download it")
        with pq.ParquetFile(remote, buffer_size=BUFFER) as file:
            yield file


def _image_bytes(column: pa.ChunkedArray | pa.Array) -> Any:
    """The bytes of an image column: binary itself, or the field `bytes` of a struct."""
    if isinstance(column, pa.ChunkedArray):
        chunks = [_image_bytes(chunk) for chunk in column.chunks]
        return pa.chunked_array(chunks) if chunks else pa.chunked_array([], pa.binary())
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _chunks(
    file: pq.ParquetFile, column: str, largest: int, place: str, groups: list[int] | None = None
) -> Iterator[Any]:
    """The image bytes of a file, or of some row groups, some rows at a time: a few values that many rows share may stand for
    terabytes.

    Raises:
        Unreadable: more than `largest` bytes.
    """
    held = 0
    for batch in file.iter_batches(ROWS, row_groups=groups, columns=[column]):
        held += batch.nbytes
        if held > largest:
            raise Unreadable(f"{place} unpacks to more than {largest:,} bytes; write its images to files")
        yield _image_bytes(batch.column(0))


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_images(field: pa.Field) -> bool:
    struct = pa.types.is_struct(field.type)
    return _is_binary(field.type) or (struct and any(f.name == "bytes" and _is_binary(f.type) for f in field.type))


def _image_column(schema: pa.Schema, path: str) -> pa.Field:
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
    groups: list[tuple[int, int]]  # rows of each row group, and bytes of its images and of the few of other columns

    @classmethod
    def of(cls, found: Found) -> "_Table":
        """Raises InputError: it cannot be read, or has no images."""
        return tried(found.place, lambda: cls._of(found)) if is_remote(found.place) else cls._of(found)

    @classmethod
    def _of(cls, found: Found) -> "_Table":
        try:
            with _parquet(found.place, found.size) as file:
                schema, count = file.schema_arrow, file.metadata.num_rows
                field = _image_column(schema, found.place)
                named = pa.types.is_struct(field.type) and "path" in _fields(field)
                numeric = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
                label = next((name for name in LABELS if name in schema.names), "label")
                wanted = [name for name in dict.fromkeys([label, *numeric]) if name in schema.names]
                wanted += [f"{field.name}.path"] if named else []
                table = file.read(columns=wanted) if wanted else None
                groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
                if count > LARGEST_COUNT or (table is not None and table.num_rows != count):
                    raise ValueError(f"it claims {count:,} rows")
                # bytes of all columns: what describes a single one lets pyarrow end the process where it is damaged
                sizes = [(group.num_rows, group.total_byte_size) for group in groups]
                if sum(rows for rows, _ in sizes) != count or any(min(pair) < 0 for pair in sizes):
                    raise ValueError(f"it claims {count:,} rows, and its row groups others")
            read = {} if table is None else {name: table.column(name).to_pylist() for name in table.column_names}
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError of text that is none
            if is_remote(found.place) and not isinstance(error, pa.ArrowException | ValueError):
                raise  # what the network says
            raise InputError(f"{found.place} is not a readable parquet file: {' '.join(str(error).split())}") from error
        names = [_name(item) for item in read[field.name]] if named else [None] * count
        labels = read.get(label, [None] * count)
        numbers = {name: read[name] for name in numeric}
        return cls(field.name, names, label, labels, numbers, _class_names(schema, label), sizes)


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


def list_pattern(text: str) -> Listing:
    """Parquet files by a path or URL with braces and stars, or all of a data set of the Hugging Face hub."""
    pattern = text.removeprefix("parquet:")
    if pattern.startswith("hf://") and not pattern.endswith(".parquet"):
        pattern = f"{pattern.rstrip('/')}/**/*.parquet"
    files = expand(pattern, text, "parquet file")
    return _list(files, relative([file.place for file in files]))


def list_parquet(paths: list[Path], root: Path) -> Listing:
    paths = sorted(paths)
    files = [Found(str(path), path.stat().st_size, stamp_of(path)) for path in paths]
    return _list(files, [path.relative_to(root).as_posix() for path in paths])


def _list(files: list[Found], places: list[str]) -> Listing:
    """What the files hold; `places` are their names, below the folder that all of them lie in."""
    remote = is_remote(files[0].place)
    with Going("reading what the files say of their images", len(files)) as going:
        tables = []
        for table in together(_Table.of, files) if remote else map(_Table.of, files):
            tables.append(table)
            going.advance()
    column = tables[0].column
    for file, table in zip(files, tables, strict=True):
        if table.column != column:
            raise InputError(
                f"{file.place}: its image column is {table.column!r}, that of {files[0].place} is {column!r}"
            )
    folders = split_folders(places)
    rows = [(number, row) for number, table in enumerate(tables) for row in range(len(table.names))]
    fallbacks = [f"{PurePosixPath(places[number]).with_suffix('')}/{row}" for number, row in rows]
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
    splits = [split_of_file(place, folders) for place in places]
    entries = Entries.of(names, [splits[file] for file, _ in rows], labels, numbers)
    place = "\n".join(file.place if remote else str(Path(file.place).resolve()) for file in files)
    groups = [
        (file, n, *group) for file, table in enumerate(tables) for n, group in enumerate(table.groups) if group[0]
    ]
    known = np.asarray(groups, np.int64).reshape(-1, 4)
    pieces, reader = None, None
    if remote or known[:, 3].sum() > IN_MEMORY:
        pieces = Pieces(np.append(0, known[:, 2].cumsum()), known[:, 3], True)
        bring = _Bring(files, column, known[:, [0, 1, 3]])
        reader = PieceReader("\n".join([place, *(file.stamp for file in files), column]), pieces.starts, bring)
    else:
        reader = _RowReader([file.place for file in files], column, np.asarray(rows, np.int64).reshape(-1, 2))
    kind = "parquet file" if len(files) == 1 else f"{len(files)} parquet files"
    stamps = [files[file].stamp for file, _ in rows]
    return Listing(*(kind, place, entries, stamps, reader, classes, notes, [], len(files), number, pieces))


def _fields(field: pa.Field) -> list[str]:
    return [each.name for each in field.type]


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Class names of the label column, or of the lists in it, where Hugging Face's schema metadata gives them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = features[label]
        return [str(name) for name in (found if "names" in found else found["feature"])["names"]]
    except (KeyError, ValueError, TypeError):
        return None
