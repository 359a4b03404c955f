"""A comparison as one page: which method, by how much, how sure, and what each of them sees."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from markupsafe import Markup

from underpaint.errors import InputError
from underpaint.report.figures.plots import Line, line_plot
from underpaint.report.page import PICTURE_BYTES, Picture, dots, picture
from underpaint.report.reading import at, mapping, number, numbers, read_json, sequence, text, texts
from underpaint.report.results import COLUMNS, Result, Tokenizer, of_comparison, restoration_of, rows_of, tokenizers_of
from underpaint.report.tables import Table, table
from underpaint.report.words import NONE, UNEQUAL, count_text, cut, span_text, time_text


@dataclass(frozen=True)
class ComparisonPage:
    """What `comparison.html.jinja2` shows."""

    facts: Mapping[str, str]
    verdict: Sequence[str]
    taken: Sequence[str]  # the methods that are advised
    result: Result
    table: Table
    start: str
    dots: Sequence[Markup]
    restored: Result
    curves: Sequence[Markup]
    picture: Picture | None
    broken: bool  # whether there is a picture that cannot be read
    normalised: Sequence[str]  # methods that predict patches without their mean and contrast
    settings: Mapping[str, str]
    environment: Mapping[str, object]


def comparison_page(folder: Path) -> ComparisonPage:
    """Everything there is to show of a comparison.

    Raises InputError where the folder holds no finished comparison.
    """
    found = read_json(folder / "compare.json")
    rows = rows_of(found)
    if not rows:
        raise InputError(f"{folder}: holds no finished comparison (compare.json); `underpaint compare` makes one")
    result = of_comparison(found)
    made = table(result, COLUMNS)
    tokenizers = {name: tokenizer_text(tokenizers_of(row.get("tokenizers"))) for name, row in rows.items()}
    verdict = texts(found, "verdict") or ["No method was judged."]
    recipes = {name: mapping(row, "recipe") for name, row in rows.items() if mapping(row, "recipe")}
    drawing = folder / "pictures" / "restorations.png"
    shown = picture(drawing, PICTURE_BYTES)
    return ComparisonPage(
        facts=comparison_facts(found, [number(row, "minutes") for row in rows.values()]),
        verdict=verdict,
        taken=[name for name in rows if name in advised(verdict[0])],
        result=result,
        table=made.with_column("Tokenizer", [tokenizers.get(line.name, NONE) for line in made.lines]),
        start=text(found, "start") or "untrained encoder",
        dots=dots(result, "linear", "Linear probe, ± one standard error", "accuracy (%)"),
        restored=restoration_of({name: row.get("restoration") for name, row in rows.items()}),
        curves=curves(mapping(found, "curves")),
        picture=shown,
        broken=shown is None and drawing.is_file(),
        normalised=[name for name, recipe in recipes.items() if at(recipe, "method", "norm_pix_loss")],
        settings={name: settings_text(recipe) for name, recipe in recipes.items()},
        environment=mapping(found, "environment"),
    )


def advised(sentence: str) -> list[str]:
    """The methods that the first sentence of a verdict says to take."""
    found = re.match(r"Take (?!none of them)(.+?)(?:, (?:which|though|not) .*|; .*|\.)$", sentence)
    return re.split(", | or ", found[1]) if found else []


def comparison_facts(found: object, minutes: Sequence[float]) -> dict[str, str]:
    """What was compared on what; `minutes` are those that each row had, nan where it had none."""
    encoder = mapping(found, "encoder")
    name = text(encoder.pop("name", None))
    changed = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in encoder.items() if value is not None)
    return {
        "data": Path(text(found, "data")).name,
        "images": count_text(number(found, "images")),
        "encoder": f"{name} ({changed})" if changed else name,
        "image size": " x ".join(texts(found, "image_size")) + " px",
        "training": training_text(number(found, "minutes"), minutes),
        "seeds": str(len(sequence(found, "seeds"))),
        "started from": text(found, "init") or "random weights",
    }


def training_text(planned: float, minutes: Sequence[float]) -> str:
    """The minutes of all methods, or from the least to the most that one had where these differ by more than 5 %."""
    had = [one for one in minutes if math.isfinite(one)]
    if max([planned, *had]) > UNEQUAL * min([planned, *had]):
        return f"{span_text(had, lambda one: f'{one:.1f}')} min, of {planned:g} planned"
    return f"{planned:g} min each"


def tokenizer_text(made: Sequence[Tokenizer] | None) -> str:
    """How long making a method's tokenizer took, over its seeds, which came before its minutes."""
    if not made:
        return NONE if made is None else "none"
    times = [one.seconds for one in made if one.seconds is not None]
    told = span_text(times, time_text) if times else ""
    if all(one.made for one in made):
        return told
    return f"given, made elsewhere in {told}" if told else "given, made elsewhere"


MINUTES, ACCURACY = "minutes of training", "accuracy (%)"
CURVES = (  # of a plot: its title, where its x and y stand in the curve of a method, and what they are
    ("Linear probe against minutes", ("minutes",), ("probes", "linear", "value"), MINUTES, ACCURACY),
    ("Attentive probe against minutes", ("minutes",), ("probes", "attentive", "value"), MINUTES, ACCURACY),
    ("Linear probe against images", ("images",), ("probes", "linear", "value"), "images seen", ACCURACY),
    ("Effective rank of the features", ("minutes",), ("probes", "rank", "value"), MINUTES, "dimensions"),
    ("Each method's own loss", ("loss", "minutes"), ("loss", "share"), MINUTES, "loss / that of a trivial prediction"),
)


def curves(found: Mapping[str, object]) -> list[Markup]:
    """What the probes said after every turn, against minutes and against images, and each method's own loss."""
    made = []
    for title, x_keys, y_keys, x_label, y_label in CURVES:
        scale = 100.0 if y_label == ACCURACY else 1.0
        lines = []
        for name, curve in found.items():
            x, y, errors = (numbers(curve, *keys) for keys in (x_keys, y_keys, (*y_keys[:-1], "error")))
            if y and len(x) == len(y):
                band = [scale * (error or math.nan) for error in errors] if len(errors) == len(y) else None
                lines.append(Line(name, x, [scale * value for value in y], band))
        if lines:
            made.append(line_plot(lines, x_label=x_label, y_label=y_label, title=title))
    return made


def settings_text(recipe: Mapping[str, object]) -> str:
    """What a method was trained with."""
    return cut(yaml.safe_dump({key: recipe.get(key) for key in ("method", "optimiser", "measured")}, sort_keys=False))
