"""A comparison as one page: which method, by how much, how sure, and what each of them sees."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from underpaint.errors import InputError
from underpaint.report.figures.plots import Dot, Line, dot_plot, line_plot
from underpaint.report.page import PICTURE_BYTES, page, picture_address, plots, table_row
from underpaint.report.reading import accuracy, number, read_json
from underpaint.report.run import environment_section
from underpaint.report.words import count_text, percent_text, points_text, sentence_html, span_text, time_text

PROBES = {
    "linear": "Linear",
    "attentive": "Attentive",
    "knn": "kNN",
    "few_linear": "Linear, few labels",
    "few_attentive": "Attentive, few labels",
}


TASKS = {
    "mask": "Hidden cells",
    "shuffle": "Patches out of order",
    "downsample": "Lost resolution",
    "noise": "Noise",
    "gray": "Lost colour",
    "words": "Hidden words",
    "generator": "Generator's words",
    "pixels": "All pixels",
    "detect": "Replaced words",
}


def comparison(folder: Path) -> str:
    """The page as text."""
    result = read_json(folder / "compare.json")
    if not isinstance(result.get("rows"), list) or not result["rows"]:
        raise InputError(f"{folder}: holds no finished comparison (compare.json); `underpaint compare` makes one")
    sections = (
        heading(result),
        verdict_section(result),
        table_section(result),
        restoration_section(result),
        curve_section(result),
        picture_section(folder / "pictures" / "restorations.png", result),
        settings_section(result),
        environment_section(result.get("environment") or {}),
    )
    return page("Which method? underpaint comparison", "\n".join(section for section in sections if section))


def heading(result: Mapping[str, Any]) -> str:
    """What was compared on what."""
    encoder = dict(result.get("encoder") or {})
    size = result.get("image_size") or []
    facts = {
        "data": Path(str(result.get("data", ""))).name,
        "images": count_text(number(result, "images")),
        "encoder": encoder_text(encoder),
        "image size": " x ".join(str(side) for side in size) + " px" if size else "",
        "training": training_text(result),
        "seeds": str(len(result.get("seeds") or [])),
        "started from": str(result.get("init") or "random weights"),
    }
    items = "".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items() if value)
    return (
        '<header><p class="kind">underpaint comparison</p><h1>Which method for these images?</h1>'
        f'<dl class="facts">{items}</dl></header>'
    )


def training_text(result: Mapping[str, Any]) -> str:
    """The minutes of all methods, or from the least to the most that one had where these differ by more than 5 %."""
    planned = number(result, "minutes")
    had = [number(row, "minutes") for row in result["rows"] if isinstance(row, dict)]
    had = [planned, *(minutes for minutes in had if math.isfinite(minutes))]
    if max(had) > 1.05 * min(had):
        return f"{span_text(had[1:], lambda minutes: f'{minutes:.1f}')} min, of {planned:g} planned"
    return f"{planned:g} min each"


def encoder_text(encoder: dict[str, Any]) -> str:
    """An encoder's name and what was changed of it."""
    name = str(encoder.pop("name", ""))
    changed = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in encoder.items() if value is not None)
    return f"{name} ({changed})" if changed else name


def verdict_section(result: Mapping[str, Any]) -> str:
    """The verdict, on top of everything: the advice, then each reason."""
    first, *others = [str(sentence) for sentence in result.get("verdict") or ["No method was judged."]]
    reasons = "".join(f"<li>{sentence_html(sentence)}</li>" for sentence in others)
    good = " learning" if first.startswith("Take ") and not first.startswith("Take none") else ""
    return (
        f'<section class="verdict{good}" aria-label="Verdict"><p><strong class="word">{sentence_html(first)}</strong></p>'
        + (f"<ul>{reasons}</ul>" if reasons else "")
        + "</section>"
    )


def table_section(result: Mapping[str, Any]) -> str:
    """One row each: methods, what they started from, what needs no network."""
    rows = [row for row in result["rows"] if isinstance(row, dict)]
    probes = [key for key in PROBES if any(key in row.get("probes", {}) for row in rows)]
    heads = [PROBES[key] for key in probes]
    heads += ["Gain"] if "linear" in probes else []
    heads += ["Rank", "Loss / baseline", "Images / s", "Memory (GiB)", "Tokenizer", "Minutes"]
    first = str((result.get("verdict") or [""])[0])
    body = ""
    for row in rows:
        cells = [percent_text(*accuracy(row, "probes", key)) for key in probes]
        if "linear" in probes:
            gain = (number(row, "gain", "linear", "difference"), number(row, "gain", "linear", "standard_error"))
            cells.append(points_text(*gain))
        cells += [
            plain_number(number(row, "rank"), 1),
            plain_number(number(row, "loss_over_baseline"), 3),
            count_text(number(row, "images_per_second")) or "–",
            plain_number(number(row, "memory_gib"), 2),
            tokenizer_text(row),
            plain_number(number(row, "minutes"), 1),
        ]
        name = str(row.get("name"))
        taken = first.startswith((f"Take {name}.", f"Take {name};"))
        body += table_row(name, cells, "own" if taken else "" if row.get("kind") == "method" else "floor")
    if math.isfinite(chance := number(result, "chance")):
        body += table_row(
            "chance", [percent_text(chance, math.nan)] * len(probes) + ["–"] * (len(heads) - len(probes)), "floor"
        )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    dots = [
        Dot(str(row["name"]), 100 * value, 100 * error if math.isfinite(error) else 0.0, row.get("kind") == "method")
        for row in rows
        for value, error in [accuracy(row, "probes", "linear")]
        if math.isfinite(value)
    ]
    drawn = ""
    if dots:
        chance_line = 100 * chance if math.isfinite(chance) else None
        drawn = plots(
            [dot_plot(dots, x_label="accuracy (%)", title="Linear probe, ± one standard error", baseline=chance_line)]
        )
    return (
        f'<section><h2>The table</h2><p class="note" id="rows">{caption(result, probes)}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="rows"><table class="wide" '
        f'aria-labelledby="rows"><thead><tr><th scope="col">Row</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{drawn}</section>"
    )


def restoration_section(result: Mapping[str, Any]) -> str:
    """How well each method restores images that it was not trained on, task by task."""
    found = {
        str(row.get("name")): row["restoration"]
        for row in result["rows"]
        if isinstance(row, dict) and isinstance(row.get("restoration"), dict) and row["restoration"]
    }
    tasks = list(dict.fromkeys(task for tasks in found.values() for task in tasks if task != "placed"))
    if not tasks:
        return ""
    heads = [str(TASKS.get(task, task)) for task in tasks]
    placed = any("placed" in tasks for tasks in found.values())
    heads += ["Patches placed right (%)"] if placed else []
    body = ""
    for name, errors in found.items():
        cells = []
        for task in tasks:
            value, error = number(errors, task, "error"), number(errors, task, "standard_error")
            cells.append(f"{value:.3f} ± {error:.3f}" if math.isfinite(value) else "–")
        if placed:
            cells.append(percent_text(number(errors, "placed", "error"), number(errors, "placed", "standard_error")))
        body += table_row(name, cells)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    note = (
        "Squared error on what was corrupted over that of the trivial restoration (doing nothing; for mae the mean of "
        "each hidden patch), ± one standard error, on test images where there are some. 1 has restored nothing. Words: "
        "cross-entropy over that of saying words by their frequency. CIM: what its enhancer is trained on, at every pixel "
        "or word, over every pixel the mean of its window, or every word replaced with the share that is."
    )
    return (
        f'<section><h2>How well they restore</h2><p class="note" id="restored">{note}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="restored">'
        f'<table aria-labelledby="restored"><thead><tr><th scope="col">Method</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def caption(result: Mapping[str, Any], probes: Sequence[str]) -> str:
    """How the numbers of the table came to be."""
    text = (
        "Rank: how many directions the features use (effective rank). Loss / baseline: the method's own loss over that "
        "of a trivial prediction, which cannot be compared between methods. Memory: the peak of the whole process. "
        "Tokenizer: the time that making one took, which is not part of the minutes."
    )
    if not probes:
        return text
    seeds = len(result.get("seeds") or [])
    start = escape(str(result.get("start", "untrained encoder")))
    if "notes" not in result and "shots" in result:  # of an earlier version
        few = f"few labels are {count_text(number(result, 'shots'))} a class, drawn {count_text(number(result, 'draws'))} times; "
    else:
        few = ""
    notes = "".join(f" {sentence_html(str(note))}" for note in result.get("notes") or [])
    return (
        f"Accuracy in percent ± one standard error over test images{', seeds' if seeds > 1 else ''} and drawn labels: "
        f"{count_text(number(result, 'train'))} images to fit, {count_text(number(result, 'test'))} to test, "
        f"{count_text(number(result, 'classes'))} classes; {few}the gain is that of the linear probe over the {start}.{notes} {text}"
    )


def tokenizer_text(row: Mapping[str, Any]) -> str:
    """How long making a method's tokenizer took, over its seeds, which came before its minutes."""
    if row.get("kind") != "method":
        return "–"
    found = row.get("tokenizers")
    if found is None:  # of an earlier version, which timed a given file's judging
        one = (((row.get("recipe") or {}).get("measured") or {}).get("tokenizer")) or {}
        found = [{"made": one["made"], "seconds": one.get("seconds") if one["made"] else None}] if "made" in one else []
    if not found:
        return "none"
    times = [one["seconds"] for one in found if one["seconds"] is not None]
    told = span_text(times, time_text) if times else ""
    if all(one["made"] for one in found):
        return told
    return f"given, made elsewhere in {told}" if told else "given, made elsewhere"


def curve_section(result: Mapping[str, Any]) -> str:
    """What the probes said after every turn, against minutes and against images."""
    curves = {str(name): curve for name, curve in (result.get("curves") or {}).items() if isinstance(curve, dict)}
    drawn = []
    for key, axis in (
        ("minutes", "minutes of training"),
        ("images", "images seen"),
    ):
        for probe, title in (("linear", "Linear probe"), ("attentive", "Attentive probe")):
            lines = curve_lines(curves, key, probe, 100.0)
            if lines and not (key == "images" and probe == "attentive"):
                drawn.append(line_plot(lines, x_label=axis, y_label="accuracy (%)", title=f"{title} against {key}"))
    ranks = curve_lines(curves, "minutes", "rank", 1.0)
    if ranks:
        drawn.append(
            line_plot(
                ranks, x_label="minutes of training", y_label="dimensions", title="Effective rank of the features"
            )
        )
    losses = [
        Line(name, curve["loss"]["minutes"], curve["loss"]["share"])
        for name, curve in curves.items()
        if isinstance(curve.get("loss"), dict) and curve["loss"].get("minutes")
    ]
    if losses:
        drawn.append(
            line_plot(
                losses,
                x_label="minutes of training",
                y_label="loss / that of a trivial prediction",
                title="Each method's own loss",
            )
        )
    if not drawn:
        return ""
    note = (
        "Points are quick probes after every turn (5 000 images to fit, 2 000 to test), so they lie below the table; "
        "bands are one standard error to each side. Own losses measure different things and do not rank methods."
    )
    return f'<section><h2>On the way</h2><p class="note">{note}</p>{plots(drawn)}</section>'


def curve_lines(curves: Mapping[str, dict], key: str, probe: str, scale: float) -> list[Line]:
    """One line a method."""
    lines = []
    for name, curve in curves.items():
        found = (curve.get("probes") or {}).get(probe)
        if isinstance(found, dict) and found.get("value"):
            errors = [scale * (error or math.nan) for error in found["error"]] if found.get("error") else None
            lines.append(Line(name, curve[key], [scale * value for value in found["value"]], errors))
    return lines


def picture_section(path: Path, result: Mapping[str, Any]) -> str:
    """The same images restored by every method."""
    if not path.is_file():
        return ""
    try:
        address, width, height = picture_address(path, PICTURE_BYTES)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises of broken files
        return '<section><h2>Restorations</h2><p class="note">The picture could not be read.</p></section>'
    given = [
        str(row.get("name"))
        for row in result["rows"]
        if isinstance(row, dict) and ((row.get("recipe") or {}).get("method") or {}).get("norm_pix_loss")
    ]
    note = "The same images, each corrupted as the method does it, and restored."
    if given:
        note += (
            f" {', '.join(given)} predicts patches without their mean and contrast, so these two are taken from the "
            "original: its pictures look better than its restoration is."
        )
    return (
        f'<section><h2>Restorations</h2><p class="note">{escape(note)}</p><figure>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Restorations">'
        f'<img src="{address}" width="{width}" height="{height}" style="width:{width}px;max-width:none;height:auto" '
        'alt="A row an image: the original, then for each method the corrupted image and its restoration"></div>'
        "</figure></section>"
    )


def settings_section(result: Mapping[str, Any]) -> str:
    """What each method was trained with."""
    items = ""
    for row in result["rows"]:
        recipe = row.get("recipe") if isinstance(row, dict) else None
        if isinstance(recipe, dict):
            kept = {key: recipe.get(key) for key in ("method", "optimiser", "measured")}
            text = yaml.safe_dump(kept, sort_keys=False)
            items += (
                f"<details><summary>{escape(str(row.get('name')))}</summary>"
                f'<pre class="scroll" tabindex="0" role="region" aria-label="Settings of {escape(str(row.get("name")))}">'
                f"{escape(text)}</pre></details>"
            )
    return f"<section><h2>Settings of each method</h2>{items}</section>" if items else ""


def plain_number(value: float, digits: int) -> str:
    """A number, or a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def markdown_table(result: Mapping[str, Any]) -> str:
    """The table as Markdown, for a README."""
    probes = [key for key in PROBES if any(key in row["probes"] for row in result["rows"])]
    heads = ["", *(PROBES[key] for key in probes), "Images / s", "GiB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in result["rows"]:
        cells = [row["name"], *(percent_text(*accuracy(row, "probes", key)) for key in probes)]
        cells += [count_text(number(row, "images_per_second")) or "–", plain_number(number(row, "memory_gib"), 2)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
