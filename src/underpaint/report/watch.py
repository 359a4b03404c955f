"""A run in one line, while it goes on and afterwards."""

import math
from pathlib import Path

from underpaint.errors import InputError
from underpaint.report.reading import (
    Lines,
    at,
    mapping,
    number,
    probe_lines,
    read_lines,
    read_yaml,
    require_run,
    text,
    text_of,
)
from underpaint.report.results import Result, Value, of_run, values
from underpaint.report.standing import Standing, probes_of, standing
from underpaint.report.verdict import decide, judge
from underpaint.report.words import percent_text, short, time_text


def watch(run: Path) -> str:
    """Step, speed, loss against its trivial baseline, probe, rank, the verdict so far and the time left, in one line.

    Nothing of a run is touched, and nothing heavy is imported, so it answers at once.

    Raises:
        InputError: there is no run; a comparison, which has several.
    """
    if runs := sorted(path.parent for path in run.glob("runs/*/recipe.yaml")):
        raise InputError(f"{run}: a comparison; watch one of its runs: {', '.join(map(str, runs))}")
    require_run(run)
    lines, recipe = read_lines(run / "metrics.jsonl"), read_yaml(text_of(run / "recipe.yaml"))
    stands = standing(run, lines, recipe)
    result = of_run(probes_of(run, stands), lines, text(mapping(recipe), "init"))
    decision = decide(judge(lines, result, recipe), lines, result, stands)
    trained = [line for line in lines if number(line, "step") > 0]
    if not trained:
        begins = "preparing its first step" if stands.word == "going" else f"{stands.word} before its first step"
        return f"{run}: {begins}"
    parts = [place_text(stands, trained), *numbers_texts(trained), *probe_texts(result, lines, stands)]
    sofar = "so far: " if stands.word == "going" else ""
    said = f"{run}: {', '.join(parts)}; {sofar}{decision.headline.lower()}: {decision.sentence}"
    left = time_text(stands.left) if stands.word == "going" else ""
    return f"{said} About {left} of training left." if left else said


def place_text(stands: Standing, trained: Lines) -> str:
    """How far a run is, and whether it goes on."""
    how = {"going": "", "finished": "finished, ", "stopped": "stopped, "}[stands.word]
    of = f" of {stands.steps:,.0f} ({stands.share:.0%})" if stands.word != "finished" and stands.share < 1 else ""
    spent = time_text(number(trained[-1], "seconds"))
    return f"{how}step {stands.step:,.0f}{of}" + (f" after {spent}" if spent else "")


def numbers_texts(trained: Lines) -> list[str]:
    """Speed, and the loss against its trivial baseline, of the last line."""
    last, said = trained[-1], []
    if math.isfinite(speed := number(last, "images_per_second")):
        said.append(f"{speed:,.0f} images/s")
    loss, baseline = number(last, "loss"), number(last, "terms", "baseline")
    trivial = f" (trivial {short(baseline)})" if math.isfinite(baseline) else ""
    return [*said, (f"loss {short(loss)}" if math.isfinite(loss) else "loss not finite") + trivial]


def probe_texts(result: Result, lines: Lines, stands: Standing) -> list[str]:
    """The linear probe and the rank, with what they were before training, and of which step they are."""
    own, before = result.row("pretrained").values, result.row(result.before).values
    during, said, when = probe_lines(lines), [], ""
    if during and not own.get("linear", Value()).known:  # the probes at the end are not there, or had no labels
        own, before = (values(at(line, "probe")) for line in (during[-1], during[0]))
        step = number(during[-1], "step")
        when = f" at step {step:,.0f}" if step < stands.step else ""
    if "linear" in own:
        was = f" ({result.before} {percent_text(before['linear'].value)})" if "linear" in before else ""
        said.append(f"linear probe {percent_text(*own['linear'])} %{was}{when}")
    if own.get("rank", Value()).known:
        was = f" ({result.before} {before['rank'].value:.1f})" if before.get("rank", Value()).known else ""
        said.append(f"rank {own['rank'].value:.1f}{was}{when}")
    return said
