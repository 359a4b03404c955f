"""An evaluation as one page: what an encoder is worth, task by task, beside the same one untrained and what needs none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from markupsafe import Markup

from underpaint.errors import InputError
from underpaint.report.page import PICTURE_BYTES, Picture, Seen, dots, picture, seen
from underpaint.report.reading import at, mapping, number, numbers, read_json, text, texts
from underpaint.report.results import Result, of_evaluation
from underpaint.report.tables import Line, Table, metric, shown
from underpaint.report.words import capital, cut, percent_text

TASK_BYTES = PICTURE_BYTES * 2 // 3  # of the pictures of all tasks; the rest is for what the features see
PICTURES = 12  # of a task
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
    share = number(found, "label_fraction")
    return EvaluationPage(
        name=Path(known["encoder"]).name or folder.resolve().name,
        facts=known
        | {
            "image size": " x ".join(texts(found, "image_size")) + " px",
            "untrained": "yes" if at(found, "untrained") else "",
        }
        | {"labels": f"{percent_text(share)} % of each class" if share < 1 else ""},
        notes=texts(found, "notes"),
        tasks=[task(result, at(found, "tasks", result.name), folder / result.name, limit) for result in results],
        seen=seen(folder / "pictures", PICTURE_BYTES - TASK_BYTES),
        environment=mapping(found, "environment"),
    )


def task(result: Result, found: object, folder: Path, limit: int) -> TaskPart:
    """One task; `found` is what results.json holds of it, for what is no number of a row."""
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
        dots=dots(result, metrics[0], "Each row, ± one standard error", metric(metrics[0]).head),
        classes=classes(found),
        pictures=[one for one in pictures if one],
        settings=cut(yaml.safe_dump(kept, sort_keys=False)) if kept else "",
    )


def picture_name(file: Path) -> str:
    """What a picture is called under it: upernet/confusion.png is "Upernet: confusion"."""
    return capital(": ".join([*file.parent.parts, file.stem.replace("-", " ")]))


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
