"""A run folder as one page: what was learned, by which signal, and a verdict with what to change.

The page is one file and asks nobody for anything. Every sentence claims no more than its standard error
allows: a difference below two standard errors is said not to be measurable.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml
from PIL import Image

from underpaint.errors import InputError
from underpaint.plots import Line, line_plot

PROBES = {
    "linear": "linear probe",
    "attentive": "attentive probe",
    "knn": "kNN accuracy",
}  # the first one there heads the page
PICTURES = 12  # positions of the slider: more are not looked at
PICTURE_BYTES = 2_400_000  # all pictures together; base64 makes 3.2 MB of them, so that the page stays under 5 MB
TEXT_CHARACTERS = 60_000  # of a recipe or an environment
SKIPPED = 50  # files named on the page; the rest are in skipped.jsonl

# The verdict's thresholds.
MEASURABLE = 2.0  # standard errors: about 1 in 20 differences of nothing look larger
WAITING = 0.5  # share of time: above it, the data decide the speed, not the device
NOT_BELOW = 0.97  # of the baseline: predicting the mean of the patch comes this near without having learned anything
FALL = 0.005  # of the loss, between the last two quarters: less is noise, or too slow to wait for
FEW_SHARE = 0.05  # of the feature dimensions: an encoder that spans fewer says nearly the same of every image
FEW = 2.0  # dimensions, where the number of dimensions is not known
RANK_KEPT = 1 / 3  # of the untrained encoder's rank: chance differences between checkpoints are far smaller
SAME_RANK = 0.8  # of the untrained encoder's rank: where it was as low before, training did not make it so
NO_GRADIENT = 1e-8  # below it, no precision moves a weight
CONSTANT = 0.01  # of the loss: what differs between batches when the model no longer looks at them
OVERFLOW = 1e30  # a number beyond it is as good as infinite: single precision cannot square it
FEW_LINES = 8  # log lines: with fewer, a quarter of the run is one number


class Verdict(NamedTuple):
    """What a run came to: one word, one sentence that says by which signal, and what to change."""

    word: Literal["learning", "stalled", "collapsed", "starved"]
    sentence: str
    advice: str


class Change(NamedTuple):
    """How far a probe is above the untrained encoder, as shares of 1; `error` is None where unknown."""

    name: str
    difference: float
    error: float | None

    @property
    def standard_errors(self) -> float:
        """The difference in its own standard errors; 0 where those are unknown: nothing is claimed."""
        return self.difference / self.error if self.error else 0.0


def write_report(run: Path) -> Path:
    """Writes `run/report.html`, one page that holds all it shows, and returns its path.

    Whatever is missing from the run folder is left out of the page, or said to be missing.
    """
    page = report(run)
    path = run / "report.html"
    partial = path.with_suffix(".html.partial")
    # a file name that is not UTF-8 was read with lone surrogates, which no file can hold
    partial.write_bytes(page.encode("utf-8", errors="backslashreplace"))
    os.replace(partial, path)
    return path


def verdict(run: Path) -> Verdict:
    """Whether a run is learning, stalled, collapsed or starved of data, by which signal, and what to change."""
    require_run(run)
    return judge(read_lines(run / "metrics.jsonl"), read_json(run / "probes.json"), read_recipe(run)[1])


def judge(metrics: list[dict], probes: dict, recipe: dict) -> Verdict:
    """The rules, the gravest first; each names the signal it went by."""
    trained = [line for line in metrics if number(line, "step") > 0 or math.isfinite(number(line, "loss"))]
    loss, gradient = column(trained, "loss"), column(trained, "gradient_norm")
    rate, waiting = column(trained, "learning_rate"), column(trained, "data_wait")
    quarter = max(1, len(loss) // 4)
    if len(loss) == 0:
        return Verdict("stalled", "No training step was logged, so there is nothing to judge.", START_AGAIN)
    if not math.isfinite(loss[-1]) or np.isfinite(loss[-quarter:]).mean() <= 0.5:
        lost, late = (np.count_nonzero(~np.isfinite(part)) for part in (loss, loss[-quarter:]))
        lost = f"{lost} of {len(loss)} log lines, {late} of them in the last quarter"
        return Verdict("stalled", f"The loss was not finite in {lost}.", not_finite_advice(recipe))

    baseline = trivial_loss(trained)
    last, falling = mean(loss[-quarter:]), is_falling(loss)
    below = math.isfinite(baseline) and last < baseline - (1 - NOT_BELOW) * abs(baseline)
    story = loss_sentence(last, baseline, falling, len(loss), has_baseline(trained))
    gains = changes(metrics, probes)
    rose = any(gain.standard_errors >= MEASURABLE for gain in gains)

    rank, untrained_rank, dimensions = ranks(metrics, probes)
    few = max(FEW, FEW_SHARE * dimensions) if math.isfinite(dimensions) else FEW
    fell_to_few = rank < few and not rank >= SAME_RANK * untrained_rank
    lost_most = rank < RANK_KEPT * untrained_rank and (below or falling)
    if (fell_to_few or lost_most) and not rose:  # a probe that measurably rose has seen that features differ
        since = f", from {untrained_rank:.1f} before training" if math.isfinite(untrained_rank) else ""
        sentence = f"The features span {rank:.1f} dimensions{since}: the encoder hardly tells images apart."
        return Verdict("collapsed", sentence, collapse_advice(recipe))
    gradient_end, loss_end = gradient[-quarter:], loss[-quarter:]
    dead = not is_zero(rate) and np.isfinite(gradient_end).all() and (gradient_end <= NO_GRADIENT).all()
    if dead and np.ptp(loss_end[np.isfinite(loss_end)]) <= CONSTANT * abs(last):
        sentence = f"The loss stands still at {short(last)} and the gradient is zero: nothing can change any more."
        return Verdict("collapsed", sentence, collapse_advice(recipe))

    worth = change_sentence(gains[0]) if gains else ""
    wait = median(waiting)
    if wait > WAITING:
        return Verdict(
            "starved", f"Training waited for data {wait:.0%} of the time (median). {story} {worth}".strip(), FEED
        )
    if not below and not falling:
        return Verdict("stalled", f"{story} {worth}".strip(), stall_advice(rate, recipe))
    worth = worth or "No probe ran, so what the features are worth is not known."
    return Verdict("learning", f"{story} {worth}", learning_advice(falling, gains))


START_AGAIN = "Run the same command again; it goes on from the last checkpoint, or from the start where there is none."
FEED = (
    "Give the loader more processes (`--workers`), and keep the images cached: resized once, "
    "on a local disk or in memory."
)


def stall_advice(rate: np.ndarray, recipe: dict) -> str:
    """What to do about a loss that does not move; a learning rate of zero is named."""
    if is_zero(rate):
        return f"The learning rate was zero throughout; set it above zero{rate_setting(recipe)}."
    rates = f"Try a learning rate three times higher or lower{rate_setting(recipe)}"
    return f"{rates}, or more `--epochs` or `--steps`."


def not_finite_advice(recipe: dict) -> str:
    """What to do about a loss that left the numbers."""
    return (
        f"Lower the learning rate{rate_setting(recipe)}, and use `--precision bf16` or `32` if it was `16`; "
        "the last good checkpoint is kept."
    )


def collapse_advice(recipe: dict) -> str:
    """What to do about features that are all the same."""
    return (
        f"Lower the learning rate{rate_setting(recipe)} or warm it up longer, and start anew: "
        "a collapsed encoder does not recover."
    )


def learning_advice(falling: bool, gains: list[Change]) -> str:
    """What to do with a run that goes well, or well by its loss only."""
    longer = "The loss was still falling: more `--epochs` or `--steps` may give more." if falling else ""
    if not gains:
        advice = "Give labelled images (`--labels`) to learn whether the features are any good."
    elif gains[0].standard_errors >= MEASURABLE:
        advice = "" if longer else "Nothing needs to change."
    else:
        advice = "Compare with public weights (`--init timm:NAME`), which are often better where images are few."
    return " ".join(part for part in (longer, advice) if part)


def loss_sentence(last: float, baseline: float, falling: bool, lines: int, logged: bool) -> str:
    """Where the loss ended, against what, and where it was going."""
    against = "its trivial baseline" if logged else "where it began"
    if not math.isfinite(baseline):
        where = f"The loss ended at {short(last)}"
    elif baseline > 0:
        share = abs(1 - last / baseline)
        side = "below" if last < baseline else "above"
        at = f"{share:.1%} {side}" if share >= 0.0005 else "no different from"
        where = f"The loss ended at {short(last)}, {at} {against} ({short(baseline)})"
    else:
        where = f"The loss ended at {short(last)}, against {short(baseline)} for {against}"
    few = f" Only {lines} log lines: too early to be sure." if lines < FEW_LINES else ""
    return f"{where}, and was {'still' if falling else 'not'} falling.{few}"


def change_sentence(gain: Change) -> str:
    """What pretraining did to a probe, claimed only above two standard errors."""
    points = f"{abs(100 * gain.difference):.1f} points"
    if gain.error is None:
        moved = f"{signed(100 * gain.difference)} points from the untrained encoder, of unknown standard error"
        return f"The {gain.name} moved by {moved}, so nothing can be said."
    error = f"± {100 * gain.error:.1f}"
    if gain.standard_errors >= MEASURABLE:
        return f"The {gain.name} rose by {points} {error} over the untrained encoder."
    if gain.standard_errors <= -MEASURABLE:
        return f"The {gain.name} fell by {points} {error} below the untrained encoder."
    moved = f"{signed(100 * gain.difference)} points {error} against the untrained encoder"
    return f"Pretraining did not measurably help the {gain.name} ({moved})."


def is_zero(values: np.ndarray) -> bool:
    """Whether there are finite values and all of them are zero."""
    finite = values[np.isfinite(values)]
    return len(finite) > 0 and not finite.any()


def is_falling(loss: np.ndarray) -> bool:
    """Whether the last quarter of a run lies below the quarter before it, by more than the noise of both."""
    quarter = max(1, len(loss) // 4)
    late, before = loss[-quarter:], loss[-2 * quarter : -quarter]
    late, before = late[np.isfinite(late)], before[np.isfinite(before)]
    if len(late) == 0 or len(before) == 0:
        return False
    fall = float(before.mean() - late.mean())
    noise = math.sqrt(sum(float(part.var(ddof=1)) / len(part) for part in (late, before) if len(part) > 1))
    return fall > FALL * abs(float(before.mean())) and fall > MEASURABLE * noise


def trivial_loss(trained: list[dict]) -> float:
    """The baseline's mean over the last quarter; the loss of the first lines where no baseline was logged."""
    if has_baseline(trained):
        logged = column(trained, "terms", "baseline")
        return mean(logged[-max(1, len(logged) // 4) :]) if np.isfinite(logged[-1]) else mean(logged)
    return mean(column(trained, "loss")[: max(1, len(trained) // 20)])


def has_baseline(trained: list[dict]) -> bool:
    """Whether any line tells the loss of a trivial prediction."""
    return bool(np.isfinite(column(trained, "terms", "baseline")).any())


def changes(metrics: list[dict], probes: dict) -> list[Change]:
    """Each probe against the untrained encoder: the final probes, else the first and last during the run."""
    found = []
    during = probe_lines(metrics)
    for key, name in PROBES.items():
        difference, error = (
            number(probes, "gain", key, "difference"),
            number(probes, "gain", key, "standard_error"),
        )
        if not math.isfinite(difference):
            after, after_error = accuracy(probes, "encoder", key)
            before, before_error = accuracy(probes, "untrained", key)
            if not math.isfinite(after - before) and during and number(during[0], "step") == 0 and len(during) > 1:
                after, after_error = (
                    number(during[-1], "probe", key),
                    number(during[-1], "probe", f"{key}_error"),
                )
                before, before_error = (
                    number(during[0], "probe", key),
                    number(during[0], "probe", f"{key}_error"),
                )
            # as if the two had other test images each: never smaller than the error of the paired difference
            difference, error = after - before, math.hypot(after_error, before_error)
        if math.isfinite(difference):
            found.append(Change(name, difference, error if math.isfinite(error) and error > 0 else None))
    return found


def ranks(metrics: list[dict], probes: dict) -> tuple[float, float, float]:
    """Effective rank of the encoder, of the untrained one, and the dimensions; nan where not known."""
    during = [line for line in probe_lines(metrics) if math.isfinite(number(line, "probe", "rank"))]
    first = number(during[0], "probe", "rank") if during and number(during[0], "step") == 0 else math.nan
    last = number(during[-1], "probe", "rank") if during and number(during[-1], "step") > 0 else math.nan
    encoder, untrained = number(probes, "rank", "encoder"), number(probes, "rank", "untrained")
    return (
        encoder if math.isfinite(encoder) else last,
        untrained if math.isfinite(untrained) else first,
        number(probes, "rank", "dim"),
    )


# --- reading ------------------------------------------------------------------------------------------------


def require_run(run: Path) -> None:
    """Raises where there is no run to read."""
    if not run.is_dir():
        raise InputError(f"no run folder {run}; `underpaint pretrain DATA --out {run}` makes one")
    if not any((run / name).exists() for name in ("recipe.yaml", "metrics.jsonl")):
        raise InputError(f"{run} is not a run folder: it holds neither recipe.yaml nor metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; a line that was cut short, as by a full disk, is passed over."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty where there is no such file, or no object in it."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_recipe(run: Path) -> tuple[str, dict]:
    """The recipe as text and as a mapping; the mapping is empty where the text is none."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text, {}
    return text, value if isinstance(value, dict) else {}


def number(mapping: Any, *keys: str) -> float:
    """The number at the end of the keys, nan where there is none; a null stands for what was not finite."""
    for key in keys:
        if not isinstance(mapping, dict):
            return math.nan
        mapping = mapping.get(key)
    if isinstance(mapping, bool) or not isinstance(mapping, int | float):
        return math.nan
    return float(mapping) if abs(mapping) < OVERFLOW else math.nan


def column(metrics: list[dict], *keys: str) -> np.ndarray:
    """One number of each line, nan where there is none."""
    return np.array([number(line, *keys) for line in metrics], dtype=float)


def accuracy(probes: dict, *keys: str) -> tuple[float, float]:
    """An accuracy and its standard error, whether they were stored together or the accuracy alone."""
    alone = number(probes, *keys)
    if math.isfinite(alone):
        return alone, math.nan
    return number(probes, *keys, "accuracy"), number(probes, *keys, "standard_error")


def probe_lines(metrics: list[dict]) -> list[dict]:
    """The lines at which a probe ran."""
    return [line for line in metrics if isinstance(line.get("probe"), dict) and line["probe"]]


def mean(values: np.ndarray) -> float:
    """The mean of the finite values, nan where there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def median(values: np.ndarray) -> float:
    """The median of the finite values, nan where there are none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def setting(recipe: Any, names: Sequence[str], at: str = "") -> tuple[str, Any] | None:
    """The first setting of one of these names, with its path: what `--set` would change."""
    if not isinstance(recipe, dict):
        return None
    for key, value in recipe.items():
        path = f"{at}.{key}" if at else str(key)
        if key in names and not isinstance(value, dict):
            return path, value
        deeper = setting(value, names, path) if key != "measured" else None
        if deeper is not None:
            return deeper
    return None


def rate_setting(recipe: dict) -> str:
    """How to set the learning rate of this run, in parentheses; nothing where the recipe does not tell."""
    found = setting(recipe, ("learning_rate", "rate", "lr"))
    return f" (`--set {found[0]}=...`, it was {found[1]})" if found else ""


# --- writing ------------------------------------------------------------------------------------------------


def report(run: Path) -> str:
    """The page as text."""
    require_run(run)
    metrics = read_lines(run / "metrics.jsonl")
    probes = read_json(run / "probes.json")
    recipe_text, recipe = read_recipe(run)
    sections = (
        training_section(metrics),
        probe_section(metrics, probes),
        picture_section(run / "pictures"),
        skipped_section(read_lines(run / "skipped.jsonl")),
        recipe_section(recipe_text),
        environment_section(read_json(run / "environment.json")),
    )
    name = escape(run.resolve().name)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # the browser itself keeps the promise that no request leaves the page
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\">\n"
        f'<link rel="icon" href="data:,">\n<title>{name}: underpaint report</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<main>\n{heading(name, metrics, recipe)}\n"
        f"{verdict_section(judge(metrics, probes, recipe))}\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def heading(name: str, metrics: list[dict], recipe: dict) -> str:
    """The run's name, and the facts one asks for first."""
    last = metrics[-1] if metrics else {}
    facts = {
        "method": text_at(recipe, "method", "name"),
        "encoder": text_at(recipe, "encoder", "name"),
        "data": text_at(recipe, "data", "path"),
        "steps": count_text(number(last, "step")),
        "images seen": count_text(number(last, "images")),
        "time": time_text(number(last, "seconds")),
    }
    items = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items() if value)
    return f'<header><p class="kind">underpaint report</p><h1>{name}</h1><dl class="facts">{items}</dl></header>'


def verdict_section(found: Verdict) -> str:
    """The verdict, on top of everything."""
    return (
        f'<section class="verdict {found.word}" aria-label="Verdict">'
        f'<p><strong class="word">{VERDICT_NAMES[found.word]}</strong> {sentence_html(found.sentence)}</p>'
        f"<p><b>What to change:</b> {sentence_html(found.advice)}</p></section>"
    )


VERDICT_NAMES = {
    "learning": "Learning",
    "stalled": "Stalled",
    "collapsed": "Collapsed",
    "starved": "Starved of data",
}


def training_section(metrics: list[dict]) -> str:
    """The curves of training."""
    trained = [line for line in metrics if math.isfinite(number(line, "step"))]
    if not trained:
        return '<section><h2>Training</h2><p class="note">No steps were logged.</p></section>'
    steps = column(trained, "step").tolist()

    def curve(name: str, *keys: str, scale: float = 1.0) -> Line | None:
        values = column(trained, *keys) * scale
        return Line(name, steps, values.tolist()) if np.isfinite(values).any() else None

    large, small = [], []
    loss, baseline = curve("loss", "loss"), curve("trivial baseline", "terms", "baseline")
    if loss is not None:
        large.append(
            line_plot(
                [loss],
                x_label="step",
                y_label="loss",
                title="Loss against its trivial baseline",
                baseline=baseline,
            )
        )
    names = {name: None for line in trained if isinstance(line.get("terms"), dict) for name in line["terms"]}
    terms = [curve(str(name), "terms", name) for name in names if name != "baseline"]
    terms = [term for term in terms if term is not None][:6]
    if len(terms) > 1:
        large.append(line_plot(terms, x_label="step", y_label="term of the loss", title="What the loss is made of"))
    for title, unit, key, scale in (
        ("Learning rate", "learning rate", "learning_rate", 1.0),
        ("Gradient norm", "norm, all weights", "gradient_norm", 1.0),
        ("Waiting for data", "share of time (%)", "data_wait", 100.0),
        ("Speed", "images per second", "images_per_second", 1.0),
    ):
        line = curve(title, key, scale=scale)
        if line is not None:
            small.append(line_plot([line], x_label="step", y_label=unit, title=title, small=True, from_zero=True))
    beside = f'<div class="plots small">{"".join(f"<div>{plot}</div>" for plot in small)}</div>' if small else ""
    both = plots([*large, beside] if beside else large)
    absent = '<p class="note">No finite loss was logged.</p>' if loss is None else ""
    meaning = (
        "<p>The trivial baseline is the loss of a prediction that has learned nothing of the images.</p>"
        if baseline is not None and loss is not None
        else ""
    )
    return f"<section><h2>Training</h2>{absent}{meaning}{both}</section>"


def probe_section(metrics: list[dict], probes: dict) -> str:
    """What the features are worth: probes over training, and the table at its end."""
    body = probe_sentences(metrics, probes) + probe_table(probes) + probe_plots(metrics)
    if not body:
        body = '<p class="note">No probe ran; with labelled images (<code>--labels</code>) there are some.</p>'
    return f"<section><h2>What the features are worth</h2>{body}</section>"


def probe_sentences(metrics: list[dict], probes: dict) -> str:
    """One sentence a probe, then one against features nobody trained, then one on rank."""
    sentences = [change_sentence(gain) for gain in changes(metrics, probes)]
    encoder, encoder_error = accuracy(probes, "encoder", "linear")
    for key, name in (("hog", "HOG"), ("raw_pixels", "raw pixels")):
        other, other_error = accuracy(probes, key, "linear")
        difference, error = encoder - other, math.hypot(encoder_error, other_error)
        if not math.isfinite(difference) or not math.isfinite(error):
            continue
        points = f"{abs(100 * difference):.1f} points ± {100 * error:.1f}"
        moved = f"{signed(100 * difference)} points ± {100 * error:.1f}"
        if abs(difference) < MEASURABLE * error or difference == 0:
            sentences.append(f"Under the linear probe the encoder is not measurably different from {name} ({moved}).")
        else:
            side = "better" if difference > 0 else "worse"
            sentences.append(f"Under the linear probe the encoder is {points} {side} than {name}.")
    rank, untrained, dimensions = ranks(metrics, probes)
    if math.isfinite(rank):
        of = f" of {dimensions:.0f}" if math.isfinite(dimensions) else ""
        before = f"; before training {untrained:.1f}" if math.isfinite(untrained) else ""
        sentences.append(f"The features span {rank:.1f}{of} dimensions (effective rank){before}.")
    return f"<ul>{''.join(f'<li>{sentence_html(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""


def probe_table(probes: dict) -> str:
    """The final probes of the encoder and of everything it has to beat."""
    rows = {
        "pretrained": "encoder",
        "untrained": "untrained",
        "raw pixels": "raw_pixels",
        "HOG": "hog",
    }
    measured = {name: [accuracy(probes, key, probe) for probe in PROBES] for name, key in rows.items()}
    measured = {name: cells for name, cells in measured.items() if any(math.isfinite(value) for value, _ in cells)}
    if not measured:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Linear", "Attentive", "kNN"))
    body = "".join(table_row(name, [percent_text(*cell) for cell in cells]) for name, cells in measured.items())
    gains = [
        (number(probes, "gain", key, "difference"), number(probes, "gain", key, "standard_error")) for key in PROBES
    ]
    if any(math.isfinite(value) for value, _ in gains):
        body += table_row("gain", [points_text(*gain) for gain in gains], "gain")
    for name, pair in (
        ("majority", accuracy(probes, "majority")),
        ("chance", (number(probes, "chance"), math.nan)),
    ):
        if math.isfinite(pair[0]):
            body += table_row(name, [percent_text(*pair)] * len(PROBES), "floor")
    counts = [
        f"{count_text(number(probes, key))} {words}"
        for key, words in (("train", "images to fit"), ("test", "images to test"), ("classes", "classes"))
        if math.isfinite(number(probes, key))
    ]
    caption = "Accuracy in percent ± one standard error; the gain, in points, is over the untrained encoder. "
    caption += f"{', '.join(counts)}." if counts else ""
    if number(probes, "attentive_train") < number(probes, "train"):
        caption += f" The attentive probe was fitted on {count_text(number(probes, 'attentive_train'))} images."
    return (
        f'<p class="note" id="final-probes">{caption}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="final-probes">'
        f'<table aria-labelledby="final-probes"><thead><tr><th scope="col">Features</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def table_row(name: str, cells: Sequence[str], kind: str = "") -> str:
    """One row, headed by its name."""
    values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr{f" class={kind!r}" if kind else ""}><th scope="row">{escape(name)}</th>{values}</tr>'.replace("'", '"')


def probe_plots(metrics: list[dict]) -> str:
    """Each probe over training, against the untrained encoder."""
    lines = [line for line in probe_lines(metrics) if math.isfinite(number(line, "step"))]
    steps = column(lines, "step").tolist()
    drawn = []
    for key, name in (*PROBES.items(), ("rank", "effective rank")):
        scale = 1.0 if key == "rank" else 100.0
        values, errors = column(lines, "probe", key) * scale, column(lines, "probe", f"{key}_error") * scale
        if not np.isfinite(values).any():
            continue
        has_error = bool(np.isfinite(errors).any())
        untrained = None
        if steps[0] == 0 and math.isfinite(values[0]):
            untrained = Line("untrained", [0], [float(values[0])], [float(errors[0])] if has_error else None)
        drawn.append(
            line_plot(
                [Line("pretrained", steps, values.tolist(), errors.tolist() if has_error else None)],
                x_label="step",
                y_label="dimensions" if key == "rank" else "accuracy (%)",
                title=f"{name if key == 'knn' else name.capitalize()} over training",
                baseline=untrained,
            )
        )
    if not drawn:
        return ""
    return f'<p class="note">Bands are one standard error to each side.</p>{plots(drawn)}'


def picture_section(folder: Path) -> str:
    """Restorations over training, behind a slider; without a script the last one is shown."""
    frames, broken = read_pictures(folder)
    if not frames:
        return ""
    figures = "".join(
        f'<figure class="frame{" shown" if step == frames[-1][0] else ""}" data-label="step {step}">'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Picture, step {step}">'
        f'<img src="{address}" width="{width}" height="{height}" '
        f'style="width:{width}px;min-width:min({width}px,34rem)" '
        f'alt="Restorations of fixed images after {step} steps: see the captions of its columns"></div>'
        f"<figcaption>After {step} steps</figcaption></figure>"
        for step, address, width, height in frames
    )
    slider = ""
    if len(frames) > 1:
        last = len(frames) - 1
        slider = (
            '<div class="slider" hidden><label for="moment">Moment in training</label>'
            f'<input id="moment" type="range" min="0" max="{last}" value="{last}" step="1">'
            f'<output for="moment">step {frames[last][0]}</output></div>'
        )
    note = f'<p class="note">{broken} pictures could not be read.</p>' if broken else ""
    return f'<section id="pictures"><h2>Restorations</h2>{slider}{figures}{note}</section>'


def read_pictures(folder: Path) -> tuple[list[tuple[int, str, int, int]], int]:
    """Up to `PICTURES` of a run, evenly spaced, the first and the last among them.

    **Returns** step, data address, width and height of each, and the number of those that could not be read.
    """
    paths = {}
    for path in sorted(folder.glob("restore-*.png")) if folder.is_dir() else []:
        match = re.fullmatch(r"restore-(\d+)", path.stem)
        if match:
            paths[int(match[1])] = path
    steps = sorted(paths)
    if len(steps) > PICTURES:
        steps = [steps[round(index * (len(steps) - 1) / (PICTURES - 1))] for index in range(PICTURES)]
    frames, broken = [], 0
    for step in steps:
        try:
            frames.append((step, *picture_address(paths[step], PICTURE_BYTES // len(steps))))
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ):  # what Pillow raises of broken files
            broken += 1
    return frames, broken


def picture_address(path: Path, limit: int) -> tuple[str, int, int]:
    """A picture as a data address of at most `limit` bytes before base64, its width and its height."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    width, height, kind = *picture.size, "png"
    while len(content) > limit:
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=85)
        content, kind = buffer.getvalue(), "webp"
        picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width, height


def skipped_section(skipped: list[dict]) -> str:
    """The files that could not be read."""
    if not skipped:
        return ""
    items = "".join(
        f"<li><code>{escape(str(line.get('path', '?'))[:400])}</code> {escape(str(line.get('reason', ''))[:400])}</li>"
        for line in skipped[:SKIPPED]
    )
    count = "1 file" if len(skipped) == 1 else f"{count_text(len(skipped))} files"
    rest = f'<p class="note">The first {SKIPPED}; all are in skipped.jsonl.</p>' if len(skipped) > SKIPPED else ""
    return (
        f"<section><h2>Skipped files</h2><p>{count} could not be read and took no part.</p>"
        f'<details><summary>Which, and why</summary><ul class="files">{items}</ul>{rest}</details></section>'
    )


def recipe_section(text: str) -> str:
    """Every setting, as it stands in recipe.yaml."""
    if not text:
        return ""
    return (
        "<section><h2>Recipe</h2>"
        "<p><code>underpaint pretrain DATA --recipe recipe.yaml</code> repeats this run.</p>"
        '<details><summary>All settings</summary><pre class="scroll" tabindex="0" role="region" '
        f'aria-label="Recipe">{escape(cut(text))}</pre></details></section>'
    )


def environment_section(environment: dict) -> str:
    """Versions, device and command line."""
    if not environment:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(cut(plain_text(value), 2000))}</td></tr>'
        for key, value in list(environment.items())[:200]
    )
    return (
        "<section><h2>Environment</h2><details><summary>Versions, device, command line</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Environment"><table class="facts-table">'
        f"<tbody>{rows}</tbody></table></div></details></section>"
    )


# --- words and numbers --------------------------------------------------------------------------------------


def plots(drawn: Sequence[str]) -> str:
    """Plots two abreast where there is room."""
    return f'<div class="plots large">{"".join(f"<div>{plot}</div>" for plot in drawn)}</div>' if drawn else ""


def sentence_html(text: str) -> str:
    """An escaped sentence, what stood in backticks as code, no line broken within a number and its error."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text)).replace(" ± ", "\u00a0±\u00a0")


def text_at(mapping: dict, section: str, key: str) -> str:
    """A setting of a section as text; a section may also be its own name."""
    value = mapping.get(section)
    value = value.get(key) if isinstance(value, dict) else value
    return "" if value is None else str(value)


def plain_text(value: Any) -> str:
    """A value as one would write it: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def cut(text: str, length: int = TEXT_CHARACTERS) -> str:
    """The text, or its beginning where it is too long for a page."""
    return text if len(text) <= length else f"{text[:length]}\n... ({len(text) - length} more characters)"


def short(value: float) -> str:
    """A loss in three digits."""
    return (f"{value:#.3g}".rstrip(".") if 1e-3 <= abs(value) < 1e3 else f"{value:.3g}").replace("-", "−")


def signed(value: float) -> str:
    """A number with its sign, to one decimal."""
    return f"{value:+.1f}".replace("-", "−")


def percent_text(value: float, error: float) -> str:
    """A share as percent, with its standard error where it is known."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")


def points_text(value: float, error: float) -> str:
    """A difference of shares in percentage points, with its standard error where it is known."""
    if not math.isfinite(value):
        return "–"
    return signed(100 * value) + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")


def count_text(value: float | int) -> str:
    """A count with its thousands apart; nothing where it is not known."""
    return f"{value:,.0f}".replace(",", "\u202f") if math.isfinite(value) else ""


def time_text(seconds: float) -> str:
    """A duration in its two largest units."""
    if not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1d21; --quiet: #5a6068; --line: #d5d9de;
  --raised: #f4f6f8; --good: #00694c; --bad: #a33f00; --focus: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --text: #e6e8ea; --quiet: #a3abb4;
  --line: #3a4047; --raised: #1f2327; --good: #38c796; --bad: #ff9a57; --focus: #56b4e9;
  --blue: #45a3e0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 46rem; }
.kind, .note, figcaption { color: var(--quiet); font-size: .9rem; }
.kind { margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0 0 1.2rem; }
.facts dt { color: var(--quiet); font-size: .8rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts div { min-width: 0; }
.verdict { background: var(--raised); border-left: 6px solid var(--bad); border-radius: 4px;
  padding: .7rem 1rem; }
.verdict.learning { border-left-color: var(--good); }
.verdict p { max-width: none; overflow-wrap: anywhere; }
.word { color: var(--bad); font-size: 1.15rem; margin-right: .4em; }
.learning .word { color: var(--good); }
.plots { display: grid; gap: 1rem 1.5rem; margin: .8rem 0; }
.plots.large { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.plots.large > div { max-width: 34rem; }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); margin: 0; }
.plots.small > div { max-width: 19rem; }
.plot { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 400; white-space: normal; }
thead th { vertical-align: bottom; white-space: normal; }
tbody tr:first-child th, .gain th, .gain td { font-weight: 700; }
.floor { color: var(--quiet); }
.facts-table th, .facts-table td { text-align: left; vertical-align: top; white-space: normal;
  overflow-wrap: anywhere; }
.facts-table tbody tr:first-child th { font-weight: 400; }
.facts-table th[scope=row] { color: var(--quiet); overflow-wrap: normal; }
code, pre { font-family: ui-monospace, monospace; font-size: .88em; overflow-wrap: anywhere; }
pre { background: var(--raised); border-radius: 4px; padding: .8rem 1rem; max-height: 32rem; overflow: auto; }
ul { padding-left: 1.2rem; max-width: 46rem; }
.files { overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .3rem 0; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
figure { margin: .6rem 0; }
.frame { display: none; }
.frame.shown { display: block; }
.frame img { display: block; max-width: 100%; height: auto; }
.slider:not([hidden]) { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .8rem; }
.slider input { flex: 1 1 12rem; max-width: 28rem; accent-color: var(--focus); min-height: 1.8rem; }
.slider output { min-width: 8rem; }
@media (max-width: 30rem) {
  table { font-size: .87rem; }
  th, td { padding-right: .5rem; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --text: #000; --quiet: #444; --line: #bbb; --raised: #f4f4f4;
    --good: #00694c; --bad: #a33f00; --blue: #0072b2; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .slider, .slider:not([hidden]) { display: none; }
  .plots.large { grid-template-columns: 1fr 1fr; }
  .plots.small { grid-template-columns: 1fr 1fr; }
  .plots > div, .verdict, .frame, table, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll, pre { overflow: visible; max-height: none; }
  pre { white-space: pre-wrap; }
  .frame img { min-width: 0 !important; }
  details::details-content { content-visibility: visible; display: block; }
}
"""

SCRIPT = """
(function () {
  var section = document.getElementById('pictures');
  var slider = section && section.querySelector('.slider');
  if (slider) {
    var input = slider.querySelector('input'), output = slider.querySelector('output');
    var frames = section.querySelectorAll('.frame');
    slider.hidden = false;
    var show = function () {
      frames.forEach(function (frame, index) {
        frame.classList.toggle('shown', index === Number(input.value));
      });
      var label = frames[Number(input.value)].dataset.label;
      output.textContent = label;
      input.setAttribute('aria-valuetext', label);
    };
    input.addEventListener('input', show);
    show();
  }
  var opened = [];
  window.addEventListener('beforeprint', function () {
    opened = Array.from(document.querySelectorAll('details:not([open])'));
    opened.forEach(function (details) { details.open = true; });
  });
  window.addEventListener('afterprint', function () {
    opened.forEach(function (details) { details.open = false; });
  });
})();
"""
