"""The shell of every page: one file that holds its style, its script and its pictures, and asks nobody for anything."""

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from underpaint.files import replacing
from underpaint.report.figures.plots import Dot, dot_plot
from underpaint.report.reading import at, number, read_json
from underpaint.report.results import Result, Value, values
from underpaint.report.tables import metric, sizes_text, table
from underpaint.report.verdict import MEASURABLE
from underpaint.report.words import count_text, percent_text, plain_text, points_text

TEMPLATES = Path(__file__).parent / "templates"
PICTURE_BYTES = 2_400_000  # all pictures together; base64 makes 3.2 MB of them, so that the page stays under 5 MB
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises of broken files


@cache
def environment() -> Environment:
    """The templates, which escape whatever they are given; the style sheet and the script are the package's own."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals |= {"style": Markup(style), "script": Markup(script), "digest": digest}
    made.filters |= {
        "sentence": sentence,
        "count": count_text,
        "plain": plain_text,
        "table": table,
        "sizes": sizes_text,
    }
    return made


def sentence(text: str) -> Markup:
    """An escaped sentence, what stood in backticks as code, no line broken within a number and its error."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(marked.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%"))


def write_page(path: Path, template: str, page: object) -> Path:
    """Write what a template makes of a page, whole or not at all."""
    text = environment().get_template(template).render(page=page)
    # a file name that is not UTF-8 was read with lone surrogates, which no file can hold
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    return path


def dots(result: Result, name: str, title: str, x_label: str) -> list[Markup]:
    """One number of every row but chance, which is a line across, as a plot, shares in percent; none where no row has it."""
    scale = 100.0 if metric(name).share else 1.0
    chance = result.row("chance")[name]
    made = [
        Dot(
            row.name,
            scale * row[name].value,
            scale * row[name].error if row[name].error >= 0 else 0.0,
            row.kind == "own",
        )
        for row in result.rows
        if row[name].known and row.name != "chance"
    ]
    line = scale * chance.value if chance.known else None
    return [dot_plot(made, x_label=x_label, title=title, baseline=line)] if made else []


# -- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture that the page itself holds, in pixels of its file."""

    name: str
    address: str
    width: int
    height: int


def picture(path: Path, limit: int, name: str = "") -> Picture | None:
    """A picture of at most `limit` bytes before base64; None where it is missing or broken."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            image, kind = opened.convert("RGB"), str(opened.format).lower()
    except BROKEN:
        return None
    width, height = image.size
    while len(content) > limit:
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=85)
        content, kind = buffer.getvalue(), "webp"
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))
    return Picture(name, f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height)


@dataclass(frozen=True)
class Seen:
    """What the features see: patches by colour, nearest neighbours and a map, those that there are."""

    features: Picture | None = None
    neighbours: Picture | None = None
    map: Picture | None = None
    labelled: bool = False  # whether neighbours of the same label are marked
    sentences: Sequence[str] = ()

    def __bool__(self) -> bool:
        return any((self.features, self.neighbours, self.map))


def seen(folder: Path, limit: int) -> Seen:
    """The pictures in a folder, of at most `limit` bytes together, and what is known of them."""
    known = read_json(folder / "looks.json")
    features, neighbours, of_all = (
        picture(folder / f"{name}.png", limit // 3) for name in ("features", "neighbours", "map")
    )
    sentences = neighbour_sentences(known)
    return Seen(features, neighbours, of_all, bool(sentences), sentences)


def neighbour_sentences(known: object) -> list[str]:
    """How often neighbours share a label, and what may be said of the change; nothing without labels."""
    shares = values(at(known, "same_label"))
    if "pretrained" not in shares:
        return []
    count = number(known, "neighbours")
    several = f"{'five' if count == 5 else f'{count:.0f}'} " if count > 1 else ""
    first = f"Of the {several}nearest neighbours, {percent_text(*shares['pretrained'])} % share the query's label"
    for name, when in (("untrained", "before training"), ("chance", "by chance")):
        first += f"; {percent_text(*shares[name])} % {when}" if name in shares else ""
    queries = count_text(number(known, "queries"))
    said = [f"{first} ({queries} queries)." if queries else f"{first}."]
    change = shares.get("difference", Value())
    if change.error >= 0:
        moved = f"{points_text(*change)} points"
        measured = abs(change.sigmas) >= MEASURABLE
        said.append(
            f"Training changed it by {moved}." if measured else f"The change by training is not measurable ({moved})."
        )
    return said
