"""Images of Hugging Face datasets: hf:NAME[:SPLIT], which is downloaded, and hf://datasets/NAME, which is streamed."""

from pathlib import Path
from typing import Any

import numpy as np

from underpaint.data.decode import Unreadable
from underpaint.data.sources.base import Listing
from underpaint.data.sources.columns import LABELS, column_labels
from underpaint.data.sources.index import Entries
from underpaint.data.sources.names import first_word
from underpaint.data.sources.parquet import list_pattern
from underpaint.errors import InputError


class _HubReader:
    def __init__(self, tables: list[Any], rows: np.ndarray, column: str):
        self._tables = tables
        self._rows = rows
        self._column = column

    def read(self, index: int) -> bytes:
        number, row = self._rows[index].tolist()
        item = self._tables[number][row][self._column]
        if item is None or (item["bytes"] is None and item["path"] is None):
            raise Unreadable("the row holds no image bytes")
        return item["bytes"] if item["bytes"] is not None else Path(item["path"]).read_bytes()


def list_hub(text: str) -> Listing:
    if text.startswith("hf://"):
        return list_pattern(text)
    name, _, split = text.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{text} needs the package datasets: pip install underpaint[hub]") from error
    if not name:
        raise InputError(f"{text} names no data set; expected hf:NAME[:SPLIT]")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    # The package raises its own, the hub's and the network's errors; to the caller they are one: no such data.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{text} cannot be loaded: {reason or type(error).__name__}") from error
    tables = {split or "": loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
    first = next(iter(tables.values()))
    column = next((c for c, kind in first.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise InputError(f"{text} has no image column; its columns are {', '.join(first.features)}")
    label = next((name for name in LABELS if name in first.features), "label")
    listed: list[str] = []
    splits: list[str | None] = []
    labels: list[Any] = []
    rows: list[tuple[int, int]] = []
    stamps: list[str] = []
    plain = []
    for number, (table_name, table) in enumerate(tables.items()):
        table = table.cast_column(column, datasets.Image(decode=False))
        plain.append(table.select_columns([column]))
        table_split = first_word(str(table_name))
        listed += [f"{table_name or 'all'}/{row}" for row in range(len(table))]
        splits += [table_split] * len(table)
        labels += list(table[label]) if label in table.features else [None] * len(table)
        rows += [(number, row) for row in range(len(table))]
        stamps += [str(table._fingerprint)] * len(table)
    notes: list[str] = []
    kind = first.features.get(label)
    names = getattr(getattr(kind, "feature", kind), "names", None)  # of each class of a list
    numbers, classes = column_labels(labels, names, notes)
    reader = _HubReader(plain, np.asarray(rows, np.int64).reshape(-1, 2), column)
    return Listing(
        *("Hugging Face data set", "", Entries.of(listed, splits, numbers), stamps, reader),
        *(classes, notes, [], len(listed)),
    )
