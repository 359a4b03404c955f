"""What columns of a table say of images: classes, and numbers to be predicted."""

import re
from collections import Counter
from typing import Any

import numpy as np

NUMBERS = ("number", "target", "value")  # what a column of numbers to be predicted is called, where there are several
# what a column of classes is called: the first of these
LABELS = ("label", "labels", "class", "class_name", "category", "fine_label", "predictionstring")
SEVERAL = "|"  # between the classes of an image that has several


def several_labels(values: list[Any], notes: list[str]) -> list[Any]:
    """One label an image: of images with several (a list, or words with | or ; between) none is taken, and that is said."""
    parts = [_parts(value) for value in values]
    if all(value is None or parts[k] == [value] for k, value in enumerate(values)):
        return values
    counts = Counter(part for found in parts for part in found)
    one = [found[0] if len(found) == 1 else None for found in parts]
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.most_common(5)) + (
        ", ..." if len(counts) > 5 else ""
    )
    notes.append(
        f"several labels an image: {len(counts)} classes ({shown}); no task takes several, so the "
        f"{sum(value is not None for value in one):,} images with exactly one label have one"
    )
    return one


def _parts(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [item for item in value if isinstance(item, int | str)]
    if isinstance(value, str):
        return [part.strip() for part in re.split(r"[|;]", value) if part.strip()]
    return [] if value is None else [value]


def column_labels(
    values: list[Any], names: list[str] | None, notes: list[str]
) -> tuple[list[int | None], list[str] | None]:
    """Class numbers from a label column: numbers that index `names`, or any values, numbered in sorted order."""
    if any(isinstance(value, list) for value in values):
        values = several_labels(values, notes)
    known = {value for value in values if value is not None}
    if names is not None:
        known -= {-1}  # Hugging Face's sign for unlabelled
        if known and not all(isinstance(value, int) and 0 <= value < len(names) for value in known):
            notes.append("the label column does not fit its class names; labels are not used")
            return [None] * len(values), None
        return [None if value in (None, -1) else int(value) for value in values], names if known else None
    if not known:
        return [None] * len(values), None
    if not all(isinstance(value, int | str) for value in known):
        notes.append("the label column holds neither numbers of classes nor names; labels are not used")
        return [None] * len(values), None
    ordered = sorted(known, key=lambda value: (isinstance(value, str), value))
    number = {value: n for n, value in enumerate(ordered)}
    return [None if value is None else number[value] for value in values], [str(value) for value in ordered]


def numbers_of(columns: dict[str, list[Any]], images: int, notes: list[str]) -> tuple[str | None, list[float | None]]:
    """The column to be predicted, by name, and its numbers: one called as in NUMBERS, else the only one of numbers."""
    found = {name: numbers for name, values in columns.items() if (numbers := _as_numbers(values)) is not None}
    named = [name for name in NUMBERS if name in found] or list(found)
    if len(named) != 1 and not any(name in NUMBERS for name in named):
        if named:
            notes.append(
                f"columns of numbers: {', '.join(named)}; one is read where it is called {' or '.join(NUMBERS)}"
            )
        return None, [None] * images
    return named[0], found[named[0]]


def _as_numbers(values: list[Any]) -> list[float | None] | None:
    """Finite numbers, None where a value is missing; None where they are no numbers."""
    try:
        numbers = [None if value in (None, "") else float(value) for value in values]
    except (TypeError, ValueError):
        return None
    known = [None if number is None or not np.isfinite(number) else number for number in numbers]
    return known if any(number is not None for number in known) else None
