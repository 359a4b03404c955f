"""An index of images as columns: what would be millions of Python objects in every process is a few stretches of
memory, which forked processes share, and all processes of a machine where it is mapped from a stored listing."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias, overload

import numpy as np
import pyarrow as pa

Indices: TypeAlias = Sequence[int] | np.ndarray  # numbers of images in a source
STRETCH = 65_536  # names made at a time, where all are walked through


@dataclass(frozen=True)
class Entry:
    """One image: its path as people know it (unique in the source), split, class number, and number to be predicted."""

    name: str
    split: str | None
    label: int | None
    number: float | None = None


class Names(Sequence[str]):
    """Names, each made when it is asked for.

    Args:
        column: the names as the file system encodes them, which need not be UTF-8.
        chosen: which of them, in which order; default all.
    """

    def __init__(self, column: Any, chosen: np.ndarray | None = None):
        self.column = column
        self._chosen = chosen

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        return names if isinstance(names, Names) else cls(pa.array(map(_encoded, names), pa.large_binary()))

    def __len__(self) -> int:
        return len(self.column) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        place = range(len(self))[index] if self._chosen is None else int(self._chosen[operator.index(index)])
        return _decoded(self.column[place].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), STRETCH):
            if self._chosen is None:
                part = self.column.slice(start, STRETCH)
            else:
                part = self.column.take(pa.array(self._chosen[start : start + STRETCH]))
            yield from map(_decoded, part.to_pylist())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # as a list


class Entries(Sequence[Entry]):
    """The images of a source in columns; an `Entry` is made when it is asked for.

    Attributes:
        names: of the files.
        split_names: the splits that occur.
        splits: int8, position in `split_names`, -1 for none.
        labels: int32, -1 for none.
        numbers: float64, NaN for none; None where no image has one.
    """

    def __init__(
        self,
        names: Names,
        splits: np.ndarray,
        split_names: list[str],
        labels: np.ndarray,
        numbers: np.ndarray | None = None,
    ):
        self.names = names
        self.splits = splits
        self.split_names = split_names
        self.labels = labels
        self.numbers = numbers

    @classmethod
    def of(
        cls,
        names: Iterable[str],
        splits: Sequence[str | None],
        labels: Sequence[int | None],
        numbers: Sequence[float | None] | None = None,
    ) -> "Entries":
        """From lists with None for what is not known."""
        split_names = sorted({split for split in splits if split is not None})
        codes = {None: -1, **{split: code for code, split in enumerate(split_names)}}
        known = numbers is not None and any(number is not None for number in numbers)
        return cls(
            Names.of(names),
            np.fromiter((codes[split] for split in splits), np.int8, len(splits)),
            split_names,
            np.fromiter((-1 if label is None else label for label in labels), np.int32, len(labels)),
            np.array(numbers, np.float64) if known else None,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return self._entry(self.names[index], operator.index(index))

    def __iter__(self) -> Iterator[Entry]:
        return (self._entry(name, index) for index, name in enumerate(self.names))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # as a list

    def _entry(self, name: str, index: int) -> Entry:
        split, label = int(self.splits[index]), int(self.labels[index])
        number = None if self.numbers is None or np.isnan(self.numbers[index]) else float(self.numbers[index])
        return Entry(name, None if split < 0 else self.split_names[split], None if label < 0 else label, number)

    def within(self, split: str) -> np.ndarray:
        """Whether each image is of a split."""
        return self.splits == (self.split_names.index(split) if split in self.split_names else -2)

    def counts(self) -> dict[str | None, int]:
        """Images by split, those of no split under None; a split without images is left out."""
        found = {split: int((self.splits == n - 1).sum()) for n, split in enumerate([None, *self.split_names])}
        return {split: count for split, count in found.items() if count}


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
