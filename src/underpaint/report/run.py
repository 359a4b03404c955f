"""A run folder as one page: what to do with it, what was learned, by which signal, and what to change."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from underpaint.report.figures.plots import Line, line_plot
from underpaint.report.page import PICTURE_BYTES, Picture, Seen, picture, seen
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
    texts,
)
from underpaint.report.results import PROBES, Result, of_run, restoration_of
from underpaint.report.standing import Standing, probes_of, standing
from underpaint.report.tables import Table, table, terminal
from underpaint.report.verdict import MEASURABLE, Decision, Verdict, change_sentence, changes, decide, judge
from underpaint.report.words import capital, count_text, cut, points_text, short, time_text

PICTURES = 12  # positions of the slider: more are not looked at
RESTORATION_BYTES = PICTURE_BYTES * 5 // 8  # the rest is for what the features see
CHAIN = 4  # starts that are named
TERMS = 6  # of the loss that are drawn


@dataclass(frozen=True)
class RunPage:
    """What `run.html.jinja2` shows."""

    name: str
    facts: Mapping[str, str]
    stands: Standing
    left: str  # of training, while it goes on
    written: int | None  # seconds since 1970, while it goes on
    decision: Decision
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


def run_page(run: Path, going: bool | None = None) -> RunPage:
    """Everything there is to show of a run; whatever is missing or damaged is left out. `going` says whether a process works
    on it, where that is known.

    Raises InputError where the folder holds no run.
    """
    require_run(run)
    lines = read_lines(run / "metrics.jsonl")
    written = text_of(run / "recipe.yaml")
    recipe = read_yaml(written)
    stands = standing(run, lines, recipe, going)
    probes = probes_of(run, stands)
    result = of_run(probes, lines, text(mapping(recipe), "init"))
    found = judge(lines, result, recipe)
    moment = moments(lines)
    frames, broken = restorations(run / "pictures", lines, moment)
    last = lines[-1] if lines else {}
    steps = [line for line in lines if math.isfinite(number(line, "step"))]
    known = {name: text(recipe, section, key) for name, (section, key) in FACTS.items()}
    known["started from"] = started_text(read_json(run / "encoder.json").get("start"))
    known |= {"steps": count_text(number(last, "step")), "images seen": count_text(number(last, "images"))}
    return RunPage(
        name=run.resolve().name,
        facts=known | {"time": time_text(number(last, "seconds"))},
        stands=stands,
        left=time_text(stands.left),
        written=round(time.time()) if stands.word == "going" else None,
        decision=decide(found, lines, result, stands),
        verdict=found,
        steps=len(steps),
        curves=training_plots(steps, moment),
        sentences=worth_sentences(result),
        result=result,
        probes=probe_plots(probe_lines(steps), moment, result.before),
        restored=restoration_of({text(recipe, "method", "name"): probes.get("restoration")}),
        frames=frames,
        broken=broken,
        # of the end: what another run's end, or that of a shorter one, looked like is not shown
        seen=seen(run / "pictures", PICTURE_BYTES - RESTORATION_BYTES) if stands.word == "finished" else Seen(),
        skipped=[(text(one, "path") or "?", text(one, "reason")) for one in read_lines(run / "skipped.jsonl")],
        recipe=cut(written),
        environment=read_json(run / "environment.json"),
    )


def run_text(run: Path, form: Callable[[Table], list[str]] = terminal) -> list[str]:
    """What a terminal shows at the end of a run: the page's table of probes, its sentences, what to do, and notes."""
    probes, lines, recipe = (
        read_json(run / "probes.json"),
        read_lines(run / "metrics.jsonl"),
        read_yaml(text_of(run / "recipe.yaml")),
    )
    result = of_run(probes, lines, text(mapping(recipe), "init"))
    decision = decide(judge(lines, result, recipe), lines, result, standing(run, lines, recipe))
    said = [*worth_sentences(result), f"{decision.headline}. {decision.sentence}"]
    if result.start:
        said.insert(0, f"The start is {result.start}.")
    if not result.row("pretrained")["linear"].known:
        return [*said, "No labels: give --labels to know what the encoder is worth.", *texts(probes, "notes")]
    return [*form(table(result, tuple(PROBES))), *said, *texts(probes, "notes")]


FACTS = {"method": ("method", "name"), "encoder": ("encoder", "name"), "data": ("data", "path")}  # of the recipe


def started_text(start: object) -> str:
    """Where an encoder's weights started from, and under what licence, the first of a chain of runs last; empty for a start
    from random weights."""
    said = []
    while isinstance(start, dict) and len(said) < CHAIN:
        what = " ".join(
            dict.fromkeys(filter(None, (text(start, "layout"), text(start, "name") or text(start, "file"))))
        )
        licence = text(start, "licence") or "not known"
        said.append(cut(f"{text(start, 'from')} {what}".strip() + f" (licence: {licence})"))
        start = start.get("start")
    return ", which started from ".join(said)


def moments(lines: Lines) -> Callable[[float | int], str]:
    """What is said of a step: its number, and the time of training until then."""
    known = [line for line in lines if math.isfinite(number(line, "step") + number(line, "seconds"))]
    steps, seconds = column(known, "step"), column(known, "seconds")

    def moment(step: float | int) -> str:
        spent = time_text(float(np.interp(step, steps, seconds))) if len(steps) else ""
        return f"step {count_text(step)}" + (f", {spent}" if spent else "")

    return moment


def training_plots(lines: Lines, moment: Callable[[float | int], str]) -> tuple[list[Markup], list[Markup]]:
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
        large.append(line_plot([loss], x_label="step", y_label="loss", title=title, baseline=against, moment=moment))
    names = dict.fromkeys(name for line in lines for name in mapping(line, "terms") if name != "baseline")
    terms = [term for name in names if (term := curve(name, "terms", name))][:TERMS]
    if len(terms) > 1:
        title = "What the loss is made of"
        large.append(line_plot(terms, x_label="step", y_label="term of the loss", title=title, moment=moment))
    for title, unit, key, scale in (
        ("Learning rate", "learning rate", "lr", 1.0),
        ("Gradient norm", "norm, all weights", "gradient_norm", 1.0),
        ("Waiting for data", "share of time (%)", "data_wait", 100.0),
        ("Speed", "images per second", "images_per_second", 1.0),
    ):
        if line := curve(title, key, scale=scale):
            how = {"small": True, "from_zero": True, "moment": moment}
            small.append(line_plot([line], x_label="step", y_label=unit, title=title, **how))
    return large, small


def worth_sentences(result: Result) -> list[str]:
    """One sentence a probe, then one against features nobody trained, then one on rank."""
    said = [change_sentence(name, change, origin=result.origin) for name, change in changes(result).items()]
    own, before = result.row("pretrained"), result.row(result.before)
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


def probe_plots(lines: Lines, moment: Callable[[float | int], str], before: str) -> list[Markup]:
    """Each probe over training, against the encoder `before`; of the lines at which a probe ran."""
    steps = column(lines, "step").tolist()
    made = []
    for key, name in (*PROBES.items(), ("rank", "effective rank")):
        scale = 1.0 if key == "rank" else 100.0
        values, errors = column(lines, "probe", key) * scale, column(lines, "probe", f"{key}_error") * scale
        if not np.isfinite(values).any():
            continue
        told = errors.tolist() if np.isfinite(errors).any() else None
        first = None
        if steps[0] == 0 and math.isfinite(values[0]):
            first = Line(before, [0], [float(values[0])], told and told[:1])
        made.append(
            line_plot(
                [Line("pretrained", steps, values.tolist(), told)],
                x_label="step",
                y_label="dimensions" if key == "rank" else "accuracy (%)",
                title=f"{name if key == 'knn' else capital(name)} over training",
                baseline=first,
                moment=moment,
            )
        )
    return made


def restorations(folder: Path, lines: Lines, moment: Callable[[float | int], str]) -> tuple[list[Picture], int]:
    """Up to `PICTURES` of a run by step, evenly spaced, the first and the last among them, each named by its step, time and
    loss; and how many are broken."""
    paths = {int(match[1]): path for path in folder.glob("restore-*.*") if (match := re.search(r"-(\d+)$", path.stem))}
    losses = {number(line, "step"): number(line, "loss") for line in lines}
    steps = sorted(paths)
    if len(steps) > PICTURES:
        steps = [steps[round(index * (len(steps) - 1) / (PICTURES - 1))] for index in range(PICTURES)]
    found = []
    for step in steps:
        loss = losses.get(step, math.nan)
        name = moment(step) + (f", loss {short(loss)}" if math.isfinite(loss) else "")
        found.append(picture(paths[step], RESTORATION_BYTES // len(steps), name))
    frames = [one for one in found if one]
    return frames, len(found) - len(frames)
