"""A result as a table: on a page, on a terminal, in Markdown."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from underpaint.report.results import Result, Row, Value
from underpaint.report.words import NONE, capital, count_text, decimal_text, figure_text, percent_text, points_text

Written = Callable[[float, float], str]  # of a number and its standard error


@dataclass(frozen=True)
class Metric:
    """How a number is headed and written, and how a difference of two is; shares are told in percent and in points."""

    head: str
    text: Written = percent_text
    change: Written = points_text

    @property
    def share(self) -> bool:
        return self.change is points_text


def _figures(head: str) -> Metric:
    return Metric(head, figure_text, partial(figure_text, sign="+"))


def _decimals(head: str, digits: int) -> Metric:
    return Metric(head, partial(decimal_text, digits=digits), partial(decimal_text, digits=digits, sign="+"))


METRICS = {
    "linear": Metric("Linear"),
    "attentive": Metric("Attentive"),
    "knn": Metric("kNN"),
    "few_linear": Metric("Linear, few labels"),
    "few_attentive": Metric("Attentive, few labels"),
    "gain": Metric("Gain", points_text),
    "accuracy": Metric("Accuracy, %"),
    "miou": Metric("mIoU, %"),
    "pixel_accuracy": Metric("Pixel accuracy, %"),
    "box_ap": Metric("Box AP"),
    "box_ap50": Metric("Box AP50"),
    "box_ap75": Metric("Box AP75"),
    "mask_ap": Metric("Mask AP"),
    "mask_ap50": Metric("Mask AP50"),
    "mask_ap75": Metric("Mask AP75"),
    "auroc": Metric("AUROC, %"),
    "aupr": Metric("AUPR, %"),
    "fpr95": Metric("FPR at 95 %, %"),
    "mae": _figures("Mean absolute error"),
    "r2": _figures("R²"),
    "rank": _decimals("Rank", 1),
    "loss_over_baseline": _decimals("Loss / baseline", 3),
    "images_per_second": Metric("Images / s", lambda value, _: count_text(value) or NONE),
    "memory_gib": _decimals("Memory (GiB)", 2),
    "minutes": _decimals("Minutes", 1),
    # of a restoration: the error over that of the trivial one
    "mask": _decimals("Hidden cells", 3),
    "shuffle": _decimals("Patches out of order", 3),
    "downsample": _decimals("Lost resolution", 3),
    "noise": _decimals("Noise", 3),
    "gray": _decimals("Lost colour", 3),
    "words": _decimals("Hidden words", 3),
    "generator": _decimals("Generator's words", 3),
    "pixels": _decimals("All pixels", 3),
    "detect": _decimals("Replaced words", 3),
    "placed": Metric("Patches placed right (%)"),
}


def metric(name: str) -> Metric:
    """How a number of that name is written; one that is not listed is told in figures under its own name."""
    return METRICS.get(name) or _figures(capital(name.replace("_", " ")))


@dataclass(frozen=True)
class Line:
    """A row of a table as text; `kind` is how it looks: own, start, baseline or gain."""

    name: str
    cells: Sequence[str]
    kind: str


@dataclass(frozen=True)
class Table:
    """Heads, that of the names first, and rows as text."""

    heads: Sequence[str]
    lines: Sequence[Line]

    def with_column(self, head: str, cells: Sequence[str]) -> "Table":
        """The same with one more column."""
        lines = [Line(line.name, [*line.cells, cell], line.kind) for line, cell in zip(self.lines, cells, strict=True)]
        return Table([*self.heads, head], lines)


def shown(result: Result, metrics: Sequence[str] = ()) -> list[str]:
    """Of `metrics`, or of all there are, those that any row has."""
    listed = metrics or dict.fromkeys([*METRICS, *(name for row in result.rows for name in row.values)])
    return [name for name in listed if any(value_of(result, row, name).known for row in result.rows)]


def value_of(result: Result, row: Row, metric: str) -> Value:
    """A number of a row; "gain" is what the row has gained in the linear probe."""
    return result.gain(row.name, "linear") if metric == "gain" else row[metric]


def table(result: Result, metrics: Sequence[str] = ()) -> Table:
    """A row each that has a number, of the metrics that are `shown`; then the gains, unless "gain" is a column."""
    names = shown(result, metrics)
    lines = []
    for row in result.rows:
        values = [value_of(result, row, name) for name in names]
        if any(one.known for one in values):
            lines.append(Line(row.name, [metric(n).text(*one) for n, one in zip(names, values, strict=True)], row.kind))
    for gain in () if "gain" in names else result.gains:
        values = [gain.values.get(name, Value()) for name in names]
        if any(one.known for one in values):
            unit = ", points" if all(metric(name).share for name in names) else ""
            cells = [metric(name).change(*one) for name, one in zip(names, values, strict=True)]
            lines.append(Line(f"{gain.name}{unit}", cells, "gain"))
    return Table([result.name, *(metric(name).head for name in names)], lines)


def markdown(made: Table) -> list[str]:
    """The lines of a Markdown table."""
    rows = [made.heads, ["---"] * len(made.heads), *([line.name, *line.cells] for line in made.lines)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


HEAD = 12  # characters of a head in a line, or as many as its cells have


def terminal(made: Table) -> list[str]:
    """The lines of a table for a terminal."""
    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for position, head in enumerate(made.heads):
        cells = [line.cells[position - 1] if position else line.name for line in made.lines]
        widest = max(map(len, [*cells, "-" * HEAD]))  # a longer head is broken at its spaces
        drawn.add_column(Text(head), justify="right" if position else "left", max_width=widest)
    for line in made.lines:
        drawn.add_row(*(Text(cell) for cell in (line.name, *line.cells)))
    written = io.StringIO()
    Console(file=written, width=1000, color_system=None).print(drawn)
    return [line.rstrip() for line in written.getvalue().splitlines()]


def sizes_text(result: Result) -> str:
    """How many images were fitted and tested, and how many classes there are."""
    names = {"train": "images to fit", "test": "images to test", "classes": "classes"}
    return ", ".join(f"{count_text(result.counts[key])} {name}" for key, name in names.items() if key in result.counts)


def summary(results: Sequence[Result], notes: Sequence[str], form: Callable[[Table], list[str]]) -> list[str]:
    """All tables of an evaluation in one form, each with how many images it is of; then the notes."""
    said: list[str] = []
    bullet = "- " if form is markdown else ""
    for result in results:
        said += [*form(table(result)), "", *([f"{sizes_text(result)}."] if result.counts else []), ""]
    return said + [f"{bullet}{note}" for note in notes]
