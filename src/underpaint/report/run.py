"""A run folder as one page: what was learned, by which signal, and a verdict with what to change."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from underpaint.report.figures.plots import Line, line_plot
from underpaint.report.page import PICTURE_BYTES, Picture, Seen, drawn, environment_facts, facts, picture, seen
from underpaint.report.reading import (
    Lines,
    column,
    mapping,
    number,
    probe_lines,
    read_json,
    read_lines,
    read_yaml,
    require_run,
    text,
    text_of,
)
from underpaint.report.results import PROBES, Result, Value, of_run
from underpaint.report.tables import Table, sizes_text, table
from underpaint.report.verdict import MEASURABLE, Verdict, change_sentence, changes, judge, ranks
from underpaint.report.words import capital, count_text, cut, points_text, time_text

PICTURES = 12  # positions of the slider: more are not looked at
RESTORATION_BYTES = PICTURE_BYTES // 2  # the rest is for what the features see
SKIPPED = 50  # files named on the page; the rest are in skipped.jsonl
TERMS = 6  # of the loss that are drawn


@dataclass(frozen=True)
class Training:
    """The curves of training, and which of them there are."""

    steps: int
    loss: bool
    baseline: bool
    large: Sequence[Markup]
    small: Sequence[Markup]


@dataclass(frozen=True)
class RunPage:
    """What `run.html.jinja2` shows."""

    name: str
    facts: Mapping[str, str]
    verdict: Verdict
    training: Training
    sentences: Sequence[str]  # what the features are worth
    table: Table
    sizes: str
    notes: Sequence[str]
    probes: Sequence[Markup]  # over training
    frames: Sequence[Picture]  # restorations over training
    broken: int  # pictures that could not be read
    seen: Seen
    skipped: Sequence[tuple[str, str]]  # path and reason of the first
    skipped_count: int
    recipe: str
    environment: Mapping[str, str]


def run_page(run: Path) -> RunPage:
    """Everything there is to show of a run; whatever is missing or damaged is left out.

    Raises InputError where the folder holds no run.
    """
    require_run(run)
    lines = read_lines(run / "metrics.jsonl")
    written = text_of(run / "recipe.yaml")
    recipe = read_yaml(written)
    result = of_run(read_json(run / "probes.json"))
    frames, broken = restorations(run / "pictures")
    skipped = read_lines(run / "skipped.jsonl")
    last = lines[-1] if lines else {}
    return RunPage(
        name=run.resolve().name,
        facts=facts(
            {
                "method": text(recipe, "method", "name"),
                "encoder": text(recipe, "encoder", "name"),
                "data": text(recipe, "data", "path"),
                "steps": count_text(number(last, "step")),
                "images seen": count_text(number(last, "images")),
                "time": time_text(number(last, "seconds")),
            }
        ),
        verdict=judge(lines, result, recipe),
        training=training(lines),
        sentences=worth_sentences(lines, result),
        table=table(result, tuple(PROBES)),
        sizes=sizes_text(result),
        notes=result.notes,
        probes=probe_plots(lines),
        frames=frames,
        broken=broken,
        seen=seen(run / "pictures", PICTURE_BYTES - RESTORATION_BYTES),
        skipped=[(text(one, "path")[:400] or "?", text(one, "reason")[:400]) for one in skipped[:SKIPPED]],
        skipped_count=len(skipped),
        recipe=cut(written),
        environment=environment_facts(read_json(run / "environment.json")),
    )


def training(lines: Lines) -> Training:
    """The curves of training."""
    lines = [line for line in lines if math.isfinite(number(line, "step"))]
    steps = column(lines, "step").tolist()

    def curve(name: str, *keys: str, scale: float = 1.0) -> Line | None:
        values = column(lines, *keys) * scale
        return Line(name, steps, values.tolist()) if np.isfinite(values).any() else None

    large, small = [], []
    loss, baseline = curve("loss", "loss"), curve("trivial baseline", "terms", "baseline")
    if loss is not None:
        title = "Loss against its trivial baseline" if baseline else "Loss"
        large.append(line_plot([loss], x_label="step", y_label="loss", title=title, baseline=baseline))
    names = dict.fromkeys(name for line in lines for name in mapping(line, "terms") if name != "baseline")
    terms = [term for name in names if (term := curve(name, "terms", name))]
    if len(terms) > 1:
        title = "What the loss is made of"
        large.append(line_plot(terms[:TERMS], x_label="step", y_label="term of the loss", title=title))
    for title, unit, key, scale in (
        ("Learning rate", "learning rate", "lr", 1.0),
        ("Gradient norm", "norm, all weights", "gradient_norm", 1.0),
        ("Waiting for data", "share of time (%)", "data_wait", 100.0),
        ("Speed", "images per second", "images_per_second", 1.0),
    ):
        if line := curve(title, key, scale=scale):
            small.append(line_plot([line], x_label="step", y_label=unit, title=title, small=True, from_zero=True))
    return Training(len(steps), loss is not None, baseline is not None, drawn(large), drawn(small))


def worth_sentences(lines: Lines, result: Result) -> list[str]:
    """One sentence a probe, then one against features nobody trained, then one on rank."""
    said = [change_sentence(name, change) for name, change in changes(lines, result).items()]
    own = result.row("pretrained")["linear"]
    for name in ("HOG", "raw pixels"):
        other = result.row(name)["linear"]
        gap = Value(own.value - other.value, math.hypot(own.error, other.error))
        if not gap.known or not math.isfinite(gap.error):
            continue
        points = f"{points_text(*gap)} points"
        if abs(gap.value) < MEASURABLE * gap.error or gap.value == 0:
            said.append(f"Under the linear probe the encoder is not measurably different from {name} ({points}).")
        else:
            side = "better" if gap.value > 0 else "worse"
            said.append(f"Under the linear probe the encoder is {points[1:]} {side} than {name}.")
    rank = ranks(lines, result)
    if math.isfinite(rank.encoder):
        of = f" of {rank.dimensions:.0f}" if math.isfinite(rank.dimensions) else ""
        before = f"; before training {rank.untrained:.1f}" if math.isfinite(rank.untrained) else ""
        said.append(f"The features span {rank.encoder:.1f}{of} dimensions (effective rank){before}.")
    return said


def probe_plots(lines: Lines) -> list[Markup]:
    """Each probe over training, against the untrained encoder."""
    lines = [line for line in probe_lines(lines) if math.isfinite(number(line, "step"))]
    steps = column(lines, "step").tolist()
    made = []
    for key, name in (*PROBES.items(), ("rank", "effective rank")):
        scale = 1.0 if key == "rank" else 100.0
        values, errors = column(lines, "probe", key) * scale, column(lines, "probe", f"{key}_error") * scale
        if not np.isfinite(values).any():
            continue
        told = errors.tolist() if np.isfinite(errors).any() else None
        untrained = None
        if steps[0] == 0 and math.isfinite(values[0]):
            untrained = Line("untrained", [0], [float(values[0])], told and told[:1])
        made.append(
            line_plot(
                [Line("pretrained", steps, values.tolist(), told)],
                x_label="step",
                y_label="dimensions" if key == "rank" else "accuracy (%)",
                title=f"{name if key == 'knn' else capital(name)} over training",
                baseline=untrained,
            )
        )
    return drawn(made)


def restorations(folder: Path) -> tuple[list[Picture], int]:
    """Up to `PICTURES` of a run by step, evenly spaced, the first and the last among them; and how many are broken."""
    paths = {
        int(match[1]): path for path in folder.glob("restore-*.png") if (match := re.search(r"-(\d+)$", path.stem))
    }
    steps = sorted(paths)
    if len(steps) > PICTURES:
        steps = [steps[round(index * (len(steps) - 1) / (PICTURES - 1))] for index in range(PICTURES)]
    found = [picture(paths[step], RESTORATION_BYTES // len(steps), str(step)) for step in steps]
    frames = [one for one in found if one]
    return frames, len(found) - len(frames)
