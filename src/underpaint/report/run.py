"""A run folder as one page: what was learned, by which signal, and a verdict with what to change."""

import math
import re
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from underpaint.report.figures.plots import Line, line_plot
from underpaint.report.page import PICTURE_BYTES, page, picture_address, plots, table_row
from underpaint.report.reading import (
    accuracy,
    column,
    number,
    probe_lines,
    read_json,
    read_lines,
    read_recipe,
    require_run,
)
from underpaint.report.verdict import MEASURABLE, ONE_RUN, PROBES, Verdict, change_sentence, changes, judge, ranks
from underpaint.report.words import (
    count_text,
    cut,
    percent_text,
    plain_text,
    points_text,
    sentence_html,
    signed,
    text_at,
    time_text,
)

PICTURES = 12  # positions of the slider: more are not looked at
RESTORATION_BYTES = PICTURE_BYTES // 2  # the rest is for what the features see
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises of broken files
SKIPPED = 50  # files named on the page; the rest are in skipped.jsonl


def report(run: Path) -> str:
    """The page as text."""
    require_run(run)
    metrics = read_lines(run / "metrics.jsonl")
    probes = read_json(run / "probes.json")
    recipe_text, recipe = read_recipe(run)
    name = escape(run.resolve().name)
    sections = (
        heading(name, metrics, recipe),
        verdict_section(judge(metrics, probes, recipe)),
        training_section(metrics),
        probe_section(metrics, probes),
        picture_section(run / "pictures"),
        looks_section(run / "pictures"),
        skipped_section(read_lines(run / "skipped.jsonl")),
        recipe_section(recipe_text),
        environment_section(read_json(run / "environment.json")),
    )
    return page(f"{name}: underpaint report", "\n".join(section for section in sections if section))


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
        ("Learning rate", "learning rate", "lr", 1.0),
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
            sentences.append(f"Under the linear probe the encoder is {points} {side} than {name} ({ONE_RUN}).")
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
    body = "".join(
        table_row(name, [percent_text(*cell) for cell in cells], "" if place else "own")
        for place, (name, cells) in enumerate(measured.items())
    )
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
    notes = probes.get("notes")
    if notes is None and number(probes, "attentive_train") < number(probes, "train"):  # of an earlier version
        caption += f" The attentive probe was fitted on {count_text(number(probes, 'attentive_train'))} images."
    caption += "".join(f" {sentence_html(str(note))}" for note in notes) if isinstance(notes, list) else ""
    return (
        f'<p class="note" id="final-probes">{caption}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="final-probes">'
        f'<table aria-labelledby="final-probes"><thead><tr><th scope="col">Features</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


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
            frames.append((step, *picture_address(paths[step], RESTORATION_BYTES // len(steps))))
        except BROKEN:
            broken += 1
    return frames, broken


def looks_section(folder: Path) -> str:
    """What the features see: patches by colour, nearest neighbours, and a map; those that are missing are left out."""
    known = read_json(folder / "looks.json")
    labelled = math.isfinite(number(known, "same_label", "pretrained"))
    bar = " A green bar marks a neighbour that has the query's label." if labelled else ""
    looks = {
        "features": (
            "Patches by colour",
            "Each square is a patch of the image. Patches of like colour in one column have like features; where the "
            "colours follow the objects, so do the features. The colours are the first three principal "
            "components of one encoder's features, so those of two columns cannot be compared.",
            "Fixed images beside their patches, coloured by the features of the untrained and the pretrained encoder",
        ),
        "neighbours": (
            "Nearest neighbours",
            "Each row begins with an image; beside it are the images whose features are most like its own, the most "
            f"alike first: after pretraining, then before.{bar}",
            "Eight images or fewer with their nearest neighbours by the pretrained and by the untrained encoder",
        ),
        "map": (
            "Map of images",
            "Images that the pretrained encoder finds alike lie beside each other (t-SNE of its features, laid out on "
            "a grid). Only who is near to whom has a meaning: not the directions, and not how far apart two groups "
            "are.",
            "Small images on a grid, like features beside each other",
        ),
    }
    figures = ""
    for name, (title, caption, description) in looks.items():
        try:
            address, width, height = picture_address(
                folder / f"{name}.png", (PICTURE_BYTES - RESTORATION_BYTES) // len(looks)
            )
        except BROKEN:
            continue
        figures += (
            f'<figure class="frame shown"><h3 style="font-size:1rem;margin:1.4rem 0 .4rem">{title}</h3>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
            f'<img src="{address}" width="{width}" height="{height}" '
            f'style="width:{width}px;min-width:min({width}px,34rem)" alt="{description}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
        if name == "neighbours":
            figures += "".join(f"<p>{sentence_html(sentence)}</p>" for sentence in neighbour_sentences(known))
    return f'<section id="looks"><h2>What the features see</h2>{figures}</section>' if figures else ""


def neighbour_sentences(known: dict) -> list[str]:
    """How often neighbours share a label, and what may be said of the change; nothing without labels."""

    def share(name: str) -> tuple[float, float]:
        return number(known, "same_label", name), number(known, "same_label", f"{name}_error")

    pretrained, untrained, chance = share("pretrained"), share("untrained"), share("chance")
    if not math.isfinite(pretrained[0]):
        return []
    count = number(known, "neighbours")
    several = f"{'five' if count == 5 else f'{count:.0f}'} " if math.isfinite(count) and count > 1 else ""
    nearest = f"{several}nearest neighbours"
    first = f"Of the {nearest}, {percent_text(*pretrained)} % share the query's label"
    if math.isfinite(untrained[0]):
        first += f"; {percent_text(*untrained)} % before training"
    if math.isfinite(chance[0]):
        first += f"; {percent_text(chance[0], math.nan)} % by chance"
    queries = count_text(number(known, "queries"))
    first = first.replace(" %", "\u00a0%")
    sentences = [f"{first} ({queries} queries)." if queries else f"{first}."]
    difference, error = share("difference")
    if math.isfinite(difference) and math.isfinite(error):
        moved = f"{signed(100 * difference)} points ± {100 * error:.1f}"
        if abs(difference) < MEASURABLE * error or difference == 0:
            sentences.append(f"The change by training is not measurable ({moved}).")
        else:
            sentences.append(f"Training changed it by {moved}.")
    return sentences


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
