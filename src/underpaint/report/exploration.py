"""The page of an exploration: a map with thumbnails on hover, clusters, odd ones and near-duplicates, in one file."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup
from PIL import Image

from underpaint.files import replacing
from underpaint.report.page import TEMPLATES, environment

SIDE, ACROSS = 48, 40  # pixels of a thumbnail's longer side, and thumbnails in a row of a sheet
SHEET = ACROSS * ACROSS  # thumbnails: a picture of 1,920 px
COLOURS = 20  # classes that have one of their own


@dataclass(frozen=True)
class Tile:
    """An image of the page by its number, and what is said of it there."""

    image: int
    caption: str


@dataclass(frozen=True)
class Row:
    """Images side by side."""

    title: str
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Section:
    """What is to be seen of the set at a glance."""

    title: str
    text: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Explored:
    """Some images of a set, and what is known of them."""

    facts: Mapping[str, str]
    total: int  # images of the set
    names: Sequence[str]
    columns: Mapping[str, Sequence[str | None]]
    places: Float[np.ndarray, "n 2"]
    oddness: Float[np.ndarray, "n"]
    near: Int[np.ndarray, "n k"]
    pictures: Sequence[bytes]
    sections: Sequence[Section]
    environment: Mapping[str, object] | None = None


@dataclass(frozen=True)
class _Sheets:
    """All thumbnails as a few pictures."""

    addresses: Sequence[str]
    width: int
    height: int
    across: int = ACROSS
    each: int = SHEET

    @property
    def grown(self) -> int:
        """How many times as large small ones are shown."""
        return max(1, round(SIDE / max(self.width, self.height)))


def write_exploration(page: Explored, path: Path) -> Path:
    """Write the page, whole or not at all."""
    made = environment()
    style, script = (
        Markup((TEMPLATES / name).read_text(encoding="utf-8") + (TEMPLATES / own).read_text(encoding="utf-8"))
        for name, own in (("style.css", "explore.css"), ("script.js", "explore.js"))
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sheets = _sheets(page.pictures)
    # what could end the element that holds it is escaped, as Jinja's own filter does
    data = Markup(json.dumps(_data(page, sheets)).translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"}))
    text = made.get_template("explore.html.jinja2").render(
        page=page, sheets=sheets, data=data, style=style, script=script, digest=digest
    )
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    return path


def _sheets(pictures: Sequence[bytes]) -> _Sheets:
    with Image.open(io.BytesIO(pictures[0])) as first:
        scale = min(1.0, SIDE / max(first.size))
        width, height = (max(1, round(scale * side)) for side in first.size)
    addresses = []
    for start in range(0, len(pictures), SHEET):
        part = pictures[start : start + SHEET]
        across = min(ACROSS, len(part)) if start == 0 and len(pictures) < ACROSS else ACROSS
        sheet = Image.new("RGB", (across * width, math.ceil(len(part) / ACROSS) * height))
        for k, picture in enumerate(part):
            with Image.open(io.BytesIO(picture)) as opened:
                tile = opened.resize((width, height), Image.Resampling.BOX) if scale < 1 else opened
                sheet.paste(tile, (k % ACROSS * width, k // ACROSS * height))
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=75)
        addresses.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return _Sheets(addresses, width, height)


def _data(page: Explored, sheets: _Sheets) -> dict[str, object]:
    """What the script draws."""
    low = page.places.min(axis=0)
    width = max(float((page.places - low).max()), 1e-9)
    columns = {}
    for name, values in page.columns.items():
        # the largest first, so that they have colours of their own
        counts: dict[str, int] = {}
        for value in values:
            counts[value or "none"] = counts.get(value or "none", 0) + 1
        names = sorted(counts, key=lambda value: (-counts[value], value))
        codes = {value: code for code, value in enumerate(names)}
        columns[name] = {"names": names, "codes": [codes[value or "none"] for value in values]}
    return {
        "names": list(page.names),
        "places": ((page.places - low) / width * 10_000).round().astype(int).tolist(),
        "columns": columns,
        "oddness": [round(float(value), 4) for value in page.oddness],
        "near": page.near.tolist(),
        "tile": [sheets.width, sheets.height, sheets.across, sheets.each],
    }
