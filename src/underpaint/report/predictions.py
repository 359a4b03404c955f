"""What a trained model says of images, as one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from underpaint.errors import InputError
from underpaint.report.page import PICTURE_BYTES, Picture, picture
from underpaint.report.reading import mapping, number, read_json, sequence, text, texts
from underpaint.report.tables import Line, Table
from underpaint.report.words import count_text

ROWS = 200  # of a table


@dataclass(frozen=True)
class PredictionsPage:
    """What `predictions.html.jinja2` shows."""

    name: str
    facts: Mapping[str, str]
    table: Table
    more: int  # rows that are left out
    picture: Picture | None
    files: Mapping[str, str]
    environment: Mapping[str, object]


def predictions_page(folder: Path) -> PredictionsPage:
    """Everything there is to show of predictions.

    Raises InputError where the folder holds none.
    """
    found = read_json(folder / "predictions.json")
    if not found:
        raise InputError(f"{folder}: holds no predictions (predictions.json); `underpaint predict` makes them")
    rows = [[str(cell) for cell in row] for row in sequence(found, "rows") if isinstance(row, list) and row]
    facts = {"task": text(found, "task"), "trained": text(found, "trained"), "images": text(found, "images")}
    files = {name: str(said) for name, said in mapping(found, "files").items()}
    shown = picture(folder / (text(found, "picture") or "picture"), PICTURE_BYTES)
    return PredictionsPage(
        name=Path(text(found, "images")).name,
        facts=facts | {"number of images": count_text(number(found, "count"))},
        table=Table(texts(found, "heads"), [Line(row[0], row[1:], "own") for row in rows[:ROWS]]),
        more=len(rows[ROWS:]),
        picture=shown,
        files=files,
        environment={},
    )


def by_count(counts: Mapping[str, Sequence[int | float]]) -> Sequence[str]:
    """The names whose first number is largest first."""
    return sorted(counts, key=lambda name: (-counts[name][0], name))
