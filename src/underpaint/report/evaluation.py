"""An evaluation as one page: what an encoder is worth, task by task, beside the same one untrained and what needs none."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from markupsafe import Markup

from underpaint.errors import InputError
from underpaint.report.figures.plots import Line as Curve
from underpaint.report.figures.plots import line_plot
from underpaint.report.page import PICTURE_BYTES, Picture, Seen, dots, picture, seen
from underpaint.report.reading import at, mapping, number, numbers, read_json, sequence, text, texts
from underpaint.report.results import Result, of_evaluation, values
from underpaint.report.tables import Line, Table, metric, shown
from underpaint.report.words import capital, count_text, cut, percent_text

TASK_BYTES = PICTURE_BYTES * 2 // 3  # of the pictures of all tasks; the rest is for what the features see
PICTURES = 12  # of a task
LEGEND = 24  # characters of a name under a plot
CLASSES = 200  # that a table names
TITLES = {
    "knn": "Nearest neighbours",
    "linear": "Linear probe",
    "attentive": "Attentive probe",
    "regression": "Regression of a number",
    "finetune": "Fine-tuning",
    "segment": "Segmentation",
    "detect": "Detection",
    "outliers": "Outliers",
}


@dataclass(frozen=True)
class TaskPart:
    """What the page shows of one task."""

    title: str
    result: Result
    percent: bool  # whether all its numbers are shares
    against: str  # the other images, of outliers
    verdict: Sequence[str]  # which encoder to take, where others stand beside it
    curves: Sequence[Markup]  # over the number of labelled images
    fewer: Table  # the same numbers
    choices: Table  # how the rate of fine-tuning was chosen
    sizes: str  # pixels of the images that each encoder takes, where these are not the same
    dots: Sequence[Markup]
    classes: Table
    pictures: Sequence[Picture]
    settings: str


@dataclass(frozen=True)
class EvaluationPage:
    """What `evaluation.html.jinja2` shows."""

    name: str
    facts: Mapping[str, str]
    notes: Sequence[str]
    tasks: Sequence[TaskPart]
    seen: Seen
    environment: Mapping[str, object]


def evaluation_page(folder: Path) -> EvaluationPage:
    """Everything there is to show of an evaluation.

    Raises InputError where the folder holds no evaluation.
    """
    found = read_json(folder / "results.json")
    results = of_evaluation(found)
    if "tasks" in found and not results:
        raise InputError(
            f"{folder}: no task of this evaluation is finished yet; the same `underpaint evaluate` goes on"
        )
    if not results:
        raise InputError(f"{folder}: results.json holds no evaluation; `underpaint evaluate` makes one")
    limit = TASK_BYTES // (PICTURES * len(results))
    known = {name: text(found, name) for name in ("encoder", "data", "groups", "seed")}
    share, own_size = number(found, "label_fraction"), " x ".join(texts(found, "image_size"))
    return EvaluationPage(
        name=Path(known["encoder"]).name or folder.resolve().name,
        facts=known
        | {
            "image size": f"{own_size} px",
            "untrained": "yes" if at(found, "untrained") else "",
        }
        | {"labels": f"{percent_text(share)} % of each class" if share < 1 else ""},
        notes=texts(found, "notes"),
        tasks=[
            task(result, at(found, "tasks", result.name), folder / result.name, limit, own_size) for result in results
        ],
        seen=seen(folder / "pictures", PICTURE_BYTES - TASK_BYTES),
        environment=mapping(found, "environment"),
    )


def task(result: Result, found: object, folder: Path, limit: int, own: str) -> TaskPart:
    """One task; `found` is what results.json holds of it, for what is no number of a row; `own`: the encoder's size."""
    files = sorted(folder.rglob("*.png"))[:PICTURES]
    pictures = [picture(file, limit, picture_name(file.relative_to(folder))) for file in files]
    chosen = {name: mapping(row, "chosen") for name, row in mapping(found, "rows").items() if mapping(row, "chosen")}
    kept = {key: mapping(found, key) for key in ("settings", "recipe", "sizes", "trained")} | {"chosen": chosen}
    kept = {key: value for key, value in kept.items() if value}
    metrics = shown(result) or ["accuracy"]
    return TaskPart(
        title=TITLES.get(result.name, result.name),
        result=result,
        percent=all(metric(name).share for name in metrics),
        against=text(found, "against"),
        verdict=texts(found, "verdict"),
        curves=curves(found, result, metrics[0]),
        fewer=fewer(found, result, metrics[0]),
        choices=choices(found),
        sizes=sizes(found, own),
        dots=dots(result, metrics[0], "Each row, ± one standard error", metric(metrics[0]).head),
        classes=classes(found),
        pictures=[one for one in pictures if one],
        settings=cut(yaml.safe_dump(kept, sort_keys=False)) if kept else "",
    )


def picture_name(file: Path) -> str:
    """What a picture is called under it: upernet/confusion.png is "Upernet: confusion"."""
    return capital(": ".join([*file.parent.parts, file.stem.replace("-", " ")]))


def shares(found: object, result: Result, name: str) -> dict[str, list[tuple[float, float, float]]]:
    """By encoder, or encoder and variant: images, number and error with each share of the labels, then with all."""
    parts = [(number(part, "train"), values_of(part)) for part in sequence(found, "fewer")]
    parts.append((result.counts.get("train", 0.0), values_of(found)))
    names = parts[0][1] if len(parts) > 1 else {}
    return {
        row: [(count, *rows[row][name]) for count, rows in parts if row in rows and name in rows[row]] for row in names
    }


def values_of(part: object) -> dict[str, dict]:
    """The numbers of the rows of a part of the results."""
    return {row: values(one) for row, one in mapping(part, "rows").items()}


def curves(found: object, result: Result, name: str) -> list[Markup]:
    """A number over the labelled images that it was reached with; a plot a variant. None where there is one share alone."""
    scale = 100.0 if metric(name).share else 1.0
    by_variant: dict[str, list[Curve]] = {}
    for row, points in shares(found, result, name).items():
        who, _, variant = row.rpartition(", ") if ", " in row else (row, "", "")
        counts, reached, errors = zip(*points, strict=True)
        line = Curve(
            who if len(who) <= LEGEND else f"...{who[3 - LEGEND :]}",
            counts,
            [scale * value for value in reached],
            [scale * error for error in errors],
        )
        by_variant.setdefault(variant, []).append(line)
    head = re.sub(", %$", "", metric(name).head)
    return [
        line_plot(
            lines,
            x_label="labelled images",
            y_label=metric(name).head,
            title=f"{capital(f'{variant}: ') if variant else ''}{head} by the number of labels",
            log=True,
        )
        for variant, lines in by_variant.items()
    ]


def fewer(found: object, result: Result, name: str) -> Table:
    """The numbers of the curves."""
    by_row = shares(found, result, name)
    longest = max(by_row.values(), key=len, default=[])
    heads = [f"{count_text(count)} images" for count, _, _ in longest]
    lines = [
        Line(row, [metric(name).text(value, error) for _, value, error in points], "bold" if row == "encoder" else "")
        for row, points in by_row.items()
        if len(points) == len(longest)
    ]
    return Table([metric(name).head, *heads], lines)


def choices(found: object) -> Table:
    """What was tried before a network was fine-tuned, the best of each round first."""
    lines = []
    for name, row in mapping(found, "rows").items():
        tried = sorted(sequence(row, "tried"), key=lambda one: (number(one, "round"), -number(one, "accuracy")))
        for one in tried:
            taken = [number(one, key) for key in ("lr", "layer_decay")]
            cells = [
                f"{number(one, 'round'):.0f}",
                *(f"{value:g}" for value in taken),
                count_text(number(one, "steps")),
            ]
            cells.append(percent_text(number(one, "accuracy")))
            chosen = taken == [number(row, "chosen", key) for key in ("lr", "layer_decay")]
            lines.append(Line(name, cells, "bold" if chosen else ""))
    return Table(["Network", "Round", "Rate per 256 images", "Layer decay", "Steps", "Held-out labels, %"], lines)


def sizes(found: object, own: str) -> str:
    """The images that each encoder takes; nothing where they are alike."""
    known = {name: " x ".join(texts(size)) for name, size in mapping(found, "image_sizes").items()}
    if set(known.values()) <= {own}:
        return ""
    return ", ".join(f"{name} {size} px" for name, size in known.items())


def classes(found: object) -> Table:
    """Accuracy by class, or the overlap (IoU) of each class by row; no lines where neither is known."""
    by_class = mapping(found, "by_class")
    if by_class:
        lines = [Line(name, [percent_text(number(value))], "") for name, value in by_class.items()]
        return Table(["Class", "Accuracy, %"], lines[:CLASSES])
    columns = {name: iou for name, row in mapping(found, "rows").items() if (iou := numbers(row, "iou"))}
    lines = [
        Line(name, [percent_text(column[k]) if k < len(column) else "" for column in columns.values()], "")
        for k, name in enumerate(texts(found, "names"))
    ]
    return Table(["Class", *(f"{name}: IoU, %" for name in columns)], lines[:CLASSES] if columns else [])
