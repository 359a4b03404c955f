"""A run folder as one page: what was learned, by which signal, and a verdict with what to change."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from underpaint.report.figures.plots import Line, line_plot
from underpaint.report.page import PICTURE_BYTES, Picture, Seen, picture, seen
from underpaint.report.reading import (
    Lines,
    at,
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
    texts,
)
from underpaint.report.results import PROBES, Result, of_run, restoration_of
from underpaint.report.tables import table, terminal
from underpaint.report.verdict import MEASURABLE, Verdict, change_sentence, changes, judge
from underpaint.report.words import capital, count_text, cut, points_text, time_text

PICTURES = 12  # positions of the slider: more are not looked at
RESTORATION_BYTES = PICTURE_BYTES // 2  # the rest is for what the features see
TERMS = 6  # of the loss that are drawn


@dataclass(frozen=True)
class RunPage:
    """What `run.html.jinja2` shows."""

    name: str
    facts: Mapping[str, str]
    verdict: Verdict
    steps: int  # lines that were logged
    curves: tuple[Sequence[Markup], Sequence[Markup]]  # of training, large and small
    sentences: Sequence[str]  # what the features are worth
    result: Result
    probes: Sequence[Markup]  # over training
    restored: Result
    frames: Sequence[Picture]  # restorations over training
    broken: int  # pictures that could not be read
    seen: Seen
    skipped: Sequence[tuple[str, str]]  # path and reason of each file
    recipe: str
    environment: Mapping[str, object]


def run_page(run: Path) -> RunPage:
    """Everything there is to show of a run; whatever is missing or damaged is left out.

    Raises InputError where the folder holds no run.
    """
    require_run(run)
    lines = read_lines(run / "metrics.jsonl")
    written = text_of(run / "recipe.yaml")
    recipe = read_yaml(written)
    probes = read_json(run / "probes.json")
    result = of_run(probes, lines)
    frames, broken = restorations(run / "pictures")
    last = lines[-1] if lines else {}
    steps = [line for line in lines if math.isfinite(number(line, "step"))]
    known = {name: text(recipe, section, key) for name, (section, key) in FACTS.items()}
    known |= {"steps": count_text(number(last, "step")), "images seen": count_text(number(last, "images"))}
    return RunPage(
        name=run.resolve().name,
        facts=known | {"time": time_text(number(last, "seconds"))},
        verdict=judge(lines, result, recipe),
        steps=len(steps),
        curves=training_plots(steps),
        sentences=worth_sentences(result),
        result=result,
        probes=probe_plots(probe_lines(steps)),
        restored=restoration_of({text(recipe, "method", "name"): probes.get("restoration")}),
        frames=frames,
        broken=broken,
        seen=seen(run / "pictures", PICTURE_BYTES - RESTORATION_BYTES),
        skipped=[(text(one, "path") or "?", text(one, "reason")) for one in read_lines(run / "skipped.jsonl")],
        recipe=cut(written),
        environment=read_json(run / "environment.json"),
    )


def run_text(run: Path) -> list[str]:
    """What a terminal shows at the end of a run: the page's table of probes, its sentences, and notes."""
    probes = read_json(run / "probes.json")
    result = of_run(probes, read_lines(run / "metrics.jsonl"))
    said = worth_sentences(result)
    if init := at(read_yaml(text_of(run / "recipe.yaml")), "init"):
        said.insert(0, f"Untrained is the encoder that it started from, {init}.")
    if not result.row("pretrained")["linear"].known:
        return [*said, "No labels: give --labels to know what the encoder is worth.", *texts(probes, "notes")]
    return [*terminal(table(result, tuple(PROBES))), *said, *texts(probes, "notes")]


FACTS = {"method": ("method", "name"), "encoder": ("encoder", "name"), "data": ("data", "path")}  # of the recipe


def training_plots(lines: Lines) -> tuple[list[Markup], list[Markup]]:
    """The curves of training: the loss and its terms, and small ones of what tells how it went."""
    lines = [line for line in lines if number(line, "step") > 0]  # before the first step nothing is measured
    steps = column(lines, "step").tolist()

    def curve(name: str, *keys: str, scale: float = 1.0) -> Line | None:
        values = column(lines, *keys) * scale
        return Line(name, steps, values.tolist()) if np.isfinite(values).any() else None

    large, small = [], []
    if loss := curve("loss", "loss"):
        against = curve("trivial baseline", "terms", "baseline")
        title = "Loss against its trivial baseline" if against else "Loss"
        large.append(line_plot([loss], x_label="step", y_label="loss", title=title, baseline=against))
    names = dict.fromkeys(name for line in lines for name in mapping(line, "terms") if name != "baseline")
    terms = [term for name in names if (term := curve(name, "terms", name))][:TERMS]
    if len(terms) > 1:
        title = "What the loss is made of"
        large.append(line_plot(terms, x_label="step", y_label="term of the loss", title=title))
    for title, unit, key, scale in (
        ("Learning rate", "learning rate", "lr", 1.0),
        ("Gradient norm", "norm, all weights", "gradient_norm", 1.0),
        ("Waiting for data", "share of time (%)", "data_wait", 100.0),
        ("Speed", "images per second", "images_per_second", 1.0),
    ):
        if line := curve(title, key, scale=scale):
            small.append(line_plot([line], x_label="step", y_label=unit, title=title, small=True, from_zero=True))
    return large, small


def worth_sentences(result: Result) -> list[str]:
    """One sentence a probe, then one against features nobody trained, then one on rank."""
    said = [change_sentence(name, change) for name, change in changes(result).items()]
    own, before = result.row("pretrained"), result.row("untrained")
    for name in ("HOG", "raw pixels"):
        gap = own["linear"].minus(result.row(name)["linear"])
        points = f"{points_text(*gap)} points"
        if abs(gap.value) < MEASURABLE * gap.error or gap.value == 0:
            said.append(f"Under the linear probe the encoder is not measurably different from {name} ({points}).")
        elif math.isfinite(gap.error):
            side = "better" if gap.value > 0 else "worse"
            said.append(f"Under the linear probe the encoder is {points[1:]} {side} than {name}.")
    if own["rank"].known:
        of = f" of {own['dim'].value:.0f}" if own["dim"].known else ""
        since = f"; before training {before['rank'].value:.1f}" if before["rank"].known else ""
        said.append(f"The features span {own['rank'].value:.1f}{of} dimensions (effective rank){since}.")
    return said


def probe_plots(lines: Lines) -> list[Markup]:
    """Each probe over training, against the untrained encoder; of the lines at which a probe ran."""
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
    return made


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
