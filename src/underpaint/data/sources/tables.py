"""What tables and lists beside images say of them: classes, numbers, splits."""

import csv
import io
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from underpaint.data.sources.columns import LABELS, SEVERAL, several_labels
from underpaint.data.sources.names import first_word, is_annotation, is_hidden, split_word
from underpaint.errors import InputError
from underpaint.reading import one_line, plain_json

TABLES = {"labels.csv", "metadata.csv"}  # always read, and complained of
STEMS = {"labels", "metadata", "annotations", "classes", "data", "dataset", "index", "images"}  # of tables, or a split
TEXTS = (".csv", ".tsv", ".jsonl", ".ndjson")
SUFFIXES = (*TEXTS, ".parquet")
# of a table, the first of these names the images
NAME_COLUMNS = ("file_name", "filename", "path", "image", "name", "file", "filepath", "file_path", "image_path")
NAME_COLUMNS += ("image_name", "image_id", "imageid", "img", "id", "id_code")
LARGEST_TABLE = 2**28  # bytes, as they are stored and of what a parquet file unpacks to
LARGEST_ROWS = 2**25
SYNSET = re.compile(r"(n\d{8})[ \t]+(\S.*)")
LISTS = re.compile(r"(?:.*_)?(train|val|valid|validation|test|annotations|labels)(_(?:list|annotations|labels))?\.txt")

Row = dict[str, Any]
Read = Callable[[str], bytes]


class Told(NamedTuple):
    """What tables say, an item an image; splits and labels are None where they say nothing of them."""

    columns: dict[str, list[Any]]
    labels: list[Any] | None
    label_column: str
    splits: list[str | None] | None
    named: list[bool]  # whether a table names the image at all


def is_table(name: str) -> bool:
    """Whether a file may be a table of images, by its name."""
    path = PurePosixPath(name)
    if is_hidden(name) or is_annotation(name):
        return False
    stem = path.stem.lower()
    if path.suffix.lower() in SUFFIXES:
        return stem in STEMS or split_word(stem) is not None or stem.endswith(("_labels", "_metadata", "_val_solution"))
    return path.suffix == ".txt" and bool(LISTS.fullmatch(path.name.lower()) or "ImageSets" in path.parts)


def is_side(name: str) -> bool:
    """Whether what a file says may change how images are understood."""
    return is_table(name) or _names_synsets(name)


def _names_synsets(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".txt" and ("synset" in path.stem.lower() or path.name == "words.txt") and not is_hidden(name)


def read_tables(
    files: Sequence[tuple[str, int]], images: Sequence[str], read: Read, notes: list[str], only: str | None = None
) -> Told | None:
    """What the tables among files (names and sizes) say of images; None where none names any.

    Args:
        only: the one table that is read, whatever it is called.

    Raises:
        InputError: a table called as in TABLES, or `only`, cannot be read.
    """
    tables = [
        name for name, size in files if (only is None and is_table(name) and size <= LARGEST_TABLE) or name == only
    ]
    if not tables:
        return None
    finder = _Finder(images)
    by_name: dict[str, Row] = {}
    splits: dict[str, str] = {}
    lacking = 0
    for table in tables:
        needed = table == only or PurePosixPath(table).name.lower() in TABLES
        try:
            rows = _list_rows(table, read) if table.lower().endswith(".txt") else _rows(table, read)
        except (ValueError, OSError, InputError) as error:  # InputError of a damaged archive
            if needed:
                kind = PurePosixPath(table).suffix[1:].upper()
                raise InputError(
                    f"{table} cannot be read as {kind} ({one_line(error)}); expected UTF-8, names of columns first"
                ) from error
            continue
        name = next((column for column in NAME_COLUMNS for given in (rows[:1]) if _column(given, column)), None)
        column = _column(rows[0], name) if name and rows else None
        if column is None:
            if needed:
                notes.append(f"{table} is not read: no column is called {' or '.join(NAME_COLUMNS[:5])}")
            continue
        found = [(finder.find(table, row.get(column)), row) for row in rows]
        named = sum(image is not None for image, _ in found)
        if not needed and named < len(found) / 2:
            continue  # a table of something else
        lacking += len(found) - named
        stem = PurePosixPath(table).stem
        of_split = None if only else split_word(stem) or first_word(stem)
        for image, row in found:
            if image is not None:
                by_name.setdefault(image, {}).update(
                    {key: value for key, value in row.items() if key not in (column, None)}
                )
                if of_split:
                    splits.setdefault(image, of_split)
    if not by_name:
        return None
    if lacking:
        notes.append(f"{lacking:,} of the {len(by_name) + lacking:,} images that tables list are not there")
    names = dict.fromkeys(key for row in by_name.values() for key in row)
    columns: dict[str, list[Any]] = {key: [by_name.get(image, {}).get(key) for image in images] for key in names}
    own = next((key for key in columns if key.lower() in ("split", "subset", "partition")), None)
    if own is not None:
        said = columns.pop(own)
        known = [split_word(str(value)) if value is not None else None for value in said]
    else:
        known = [splits.get(image) for image in images]
    label = next((key for wanted in LABELS for key in columns if key.lower() == wanted), None)
    labels = columns.pop(label) if label is not None else _flags(columns)
    if labels is not None and label is not None and _measured(labels):
        columns[label], labels = labels, None
    return Told(
        columns,
        labels,
        label or "columns of 0 and 1",
        known if any(known) else None,
        [image in by_name for image in images],
    )


def _column(row: Row, wanted: str) -> str | None:
    return next((key for key in row if isinstance(key, str) and key.strip().lower() == wanted), None)


def _measured(values: list[Any]) -> bool:
    """Whether a column called as labels are holds numbers with fractions, or hardly one twice: no classes."""
    known = [value for value in values if value not in (None, "")]
    try:
        numbers = [float(value) for value in known]
    except (TypeError, ValueError):
        return False
    return any(not number.is_integer() for number in numbers) or 2 * len(set(numbers)) > len(numbers)


def _flags(columns: dict[str, list[Any]]) -> list[Any] | None:
    """Labels from columns that hold 0 and 1 alone, one a class, where there are two or more; they are taken out."""
    yes_no = [
        key for key, values in columns.items() if {str(value) for value in values if value is not None} == {"0", "1"}
    ]
    if len(yes_no) < 2:
        return None
    rows = zip(*(columns.pop(key) for key in yes_no), strict=True)
    return [
        None
        if any(value is None for value in row)
        else SEVERAL.join(key for key, value in zip(yes_no, row, strict=True) if str(value) == "1")
        for row in rows
    ]


class _Finder:
    """The image that a cell of a table names: by its path from the table, from the top, or by its own name alone."""

    def __init__(self, images: Sequence[str]):
        self._known = set(images)
        times: Counter[str] = Counter()
        last: dict[str, str] = {}
        for image in images:
            base = posixpath.basename(image)
            for key in (base, base.rpartition(".")[0]):
                times[key] += 1
                last[key] = image
        self._alone = {key: image for key, image in last.items() if times[key] == 1}

    def find(self, table: str, cell: Any) -> str | None:
        if not isinstance(cell, str | int) or cell == "":
            return None
        path = posixpath.normpath(str(cell).replace("\\", "/"))
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(table), path))
        for each in (beside, path):
            if each in self._known:
                return each
        base = posixpath.basename(path)
        return self._alone.get(base)


def _rows(table: str, read: Read) -> list[Row]:
    """Raises ValueError where it cannot be read."""
    data = read(table)
    if len(data) > LARGEST_TABLE:
        raise ValueError(f"more than {LARGEST_TABLE:,} bytes")
    suffix = PurePosixPath(table).suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(data)
    text = data.decode("utf-8-sig")
    if suffix in (".jsonl", ".ndjson"):
        rows = [plain_json(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line holds no object")
        return rows
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ","))
    except csv.Error as error:
        raise ValueError(one_line(error)) from error


def _parquet_rows(data: bytes) -> list[Row]:
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        groups = range(file.metadata.num_row_groups)
        size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
        if size > LARGEST_TABLE or file.metadata.num_rows > LARGEST_ROWS:
            raise ValueError("it unpacks to too much for a table")
        plain = [
            each.name
            for each in file.schema_arrow
            if not (
                pa.types.is_binary(each.type) or pa.types.is_large_binary(each.type) or pa.types.is_struct(each.type)
            )
        ]
        table = file.read(columns=plain)
        if table.nbytes > LARGEST_TABLE:
            raise ValueError("it unpacks to too much for a table")
        return table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(one_line(error)) from error


def _list_rows(table: str, read: Read) -> list[Row]:
    """Lines of a name and a class (ImageNet's val.txt, Tiny ImageNet's val_annotations.txt), or of a name (VOC's lists).

    Raises:
        ValueError: it is something else.
    """
    rows: list[Row] = []
    for line in read(table)[:LARGEST_TABLE].decode("utf-8-sig").splitlines():
        words = line.split("\t") if "\t" in line else line.split()
        if not words:
            continue
        if len(words) == 1 or "ImageSets" in PurePosixPath(table).parts:
            rows.append({"name": words[0]})
        else:
            rows.append({"name": words[0], "label": words[1]})
    return rows


def synset_names(files: Sequence[str], read: Read) -> dict[str, str]:
    """What ImageNet's lists (synset_words.txt, LOC_synset_mapping.txt, words.txt) call each synset: its first word."""
    for name in sorted(files):
        if not _names_synsets(name):
            continue
        try:
            lines = read(name)[:LARGEST_TABLE].decode().splitlines()
        except (UnicodeDecodeError, OSError, InputError):
            continue
        found = {
            match.group(1): match.group(2).split(",")[0].strip() for line in lines if (match := SYNSET.match(line))
        }
        if found:
            return found
    return {}


def labels_of(
    told: Told, labels: list[int | None], classes: list[str] | None, notes: list[str]
) -> tuple[list[int | None], list[str] | None]:
    """Class numbers by tables, and by folders where tables say nothing."""
    assert told.labels is not None
    values = several_labels([_plain(value) for value in told.labels], notes)
    named = sum(value is not None for value in values)
    if not named:
        return labels, classes
    if classes and all(isinstance(value, int) and 0 <= value < len(classes) for value in values if value is not None):
        values = [None if value is None else classes[value] for value in values]  # numbers of the folders, in order
    values = [value if value is None else str(value) for value in values]
    known = set(classes or ()) & {classes[label] for label in labels if label is not None} if classes else set()
    folders = [None if label is None or classes is None else classes[label] for label in labels]
    if known and not known & set(values):
        folders = [None] * len(values)  # the folders are something else
    both = [value if value is not None else folder for value, folder in zip(values, folders, strict=True)]
    ordered = sorted(
        {value for value in both if value is not None}, key=lambda v: (0, int(v), "") if v.isdecimal() else (1, 0, v)
    )
    number = {value: k for k, value in enumerate(ordered)}
    notes.append(f"class labels of {named:,} images by a table, column {told.label_column!r}")
    return [None if value is None else number[value] for value in both], ordered


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        value = value.strip()
        if re.fullmatch(r"n\d{8}( \d+)+", value):  # ImageNet's solutions: a synset and boxes
            value = value.split()[0]
        return int(value) if re.fullmatch(r"\d{1,9}", value) and str(int(value)) == value else value or None
    return int(value) if isinstance(value, float) and value.is_integer() else value
