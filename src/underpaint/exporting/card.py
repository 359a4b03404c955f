"""The model card of an export: where the network is from, what it was trained on and how, what it is worth, and its limits.

Everything is from the files of the run and of the evaluation; what they do not say, the card does not say either. Paths stay at
home: data and files have their last names alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from underpaint import __version__
from underpaint.backbones.build import describe_encoder
from underpaint.backbones.weights import is_run, read_start
from underpaint.exporting.subject import Subject, Written
from underpaint.methods import LISTED
from underpaint.report.reading import at, mapping, number, read_json, read_lines, read_yaml, text, text_of
from underpaint.report.results import of_evaluation
from underpaint.report.run import run_text, started_text
from underpaint.report.tables import markdown, table
from underpaint.report.words import count_text, short

CURVE = 8  # rows
LIBRARIES = {"timm": "timm", "transformers": "transformers", "onnx": "onnx", "torchscript": "pytorch"}
TASKS = {
    "encoder": "image-feature-extraction",
    "finetune": "image-classification",
    "linear": "image-classification",
    "attentive": "image-classification",
    "segment": "image-segmentation",
    "detect": "object-detection",
}
PATHS = (("data", "path"), ("data", "labels"), ("init",), ("method", "tokenizer"))  # of a recipe
FILLED = "FILL IN"


def card(subject: Subject, to: str, made: Written, facts: Mapping[str, Any]) -> str:
    """README.md, with the head that Hugging Face reads."""
    run = _run_of(subject)
    recipe = {} if run is None else read_yaml(text_of(run / "recipe.yaml"))
    described = _described(subject, run)
    parts = [_head(subject, to), *_what(subject, described), "## Use", *_use(made), *_agreement(facts)]
    parts += [*_data(described), *_start(described), *_recipe(recipe), *_curve(run), *_worth(subject, run)]
    parts += [*_limits(subject, described), *_ending(described)]
    written = "\n\n".join(part for part in parts if part) + "\n"
    return _without_paths(written, _paths(subject, recipe))


def _run_of(subject: Subject) -> Path | None:
    """The run that the encoder is of, where it is still there."""
    asked = Path(subject.bundle.name if subject.saved is not None else subject.name)
    folder = asked if asked.is_dir() else asked.parent
    return folder if (folder / "recipe.yaml").is_file() else None


def _described(subject: Subject, run: Path | None) -> dict[str, Any]:
    """What is known of where the weights are from: `start` and `trained_on`."""
    if run is not None:
        return describe_encoder(run)
    if is_run(Path(subject.bundle.name)):
        return describe_encoder(subject.bundle.name)
    if subject.saved is not None or not subject.bundle.trained:
        return {}
    return {"start": read_start(subject.name).start}


def _head(subject: Subject, to: str) -> str:
    kind = subject.task.partition("-")[0]
    front: dict[str, Any] = {"library_name": LIBRARIES.get(to, "underpaint")}
    if kind in TASKS:
        front["pipeline_tag"] = TASKS[kind]
    front["tags"] = ["underpaint", "self-supervised", subject.bundle.arguments["model_name"]]
    said = yaml.safe_dump(front, sort_keys=False)
    return f"---\n# license: {FILLED}, which is the owner's to choose; see Start and Data below\n{said}---"


def _what(subject: Subject, described: Mapping[str, Any]) -> list[str]:
    name, (height, width) = subject.bundle.arguments["model_name"], subject.size
    count = sum(each.numel() for each in subject.network.parameters())
    method = text(described, "trained_on", "method")
    listed = LISTED.get(method)
    how = f", pretrained without labels by {method}: {listed[1]}" if listed else ""
    if subject.task == "encoder":
        title, what = f"{name}, an encoder", f"An encoder of images ({name}{how})"
        feature = (
            f"Its feature of an image, {subject.bundle.encoder.dim} numbers, is the {subject.bundle.encoder.pooling}."
        )
    else:
        title, what = f"{name}, {subject.task}", f"What `{subject.task}` trained on an encoder of images ({name}{how})"
        shown = ", ".join(subject.classes[:20]) + (", ..." if len(subject.classes) > 20 else "")
        feature = f"Classes: {shown}." if subject.classes else ""
    images = (
        f"Images of {height}x{width} px, {len(subject.mean)} channel{'s' if len(subject.mean) > 1 else ''}, "
        f"in [0, 1], with mean {_numbers(subject.mean)} and deviation {_numbers(subject.std)}."
    )
    scaling = "" if subject.scaling.plain else f" How they come to lie in [0, 1]: {subject.scaling}."
    return [f"# {title}", f"{what}; {count_text(count)} parameters. {feature}".strip(), images + scaling]


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _use(made: Written) -> list[str]:
    return [f"```python\n{made.usage}```", *made.notes]


def _agreement(facts: Mapping[str, Any]) -> list[str]:
    found = ", ".join(f"{name} {value:.1e}" for name, value in facts["differences"].items())
    return [
        f"Compared with the original on {facts['images']} {facts['compared_on']}, the largest difference as a share of the "
        f"largest value: {found} (tolerance {facts['tolerance']:g})."
    ]


def _data(described: Mapping[str, Any]) -> list[str]:
    found = mapping(described, "trained_on")
    if not found:
        return []
    count = number(found, "images")
    said = f"{count_text(int(count)) if count == count else 'An unknown number of'} images, {text(found, 'channels')} channels"
    labels = text(found, "labels")
    rest = f" The probes' labels: {labels}." if labels else ""
    return ["## Data", f"{said}, read from a {text(found, 'source')}; no labels were used in pretraining.{rest}"]


def _start(described: Mapping[str, Any]) -> list[str]:
    said = started_text(described.get("start"))
    return ["## Start", f"Weights started from {said}." if said else "Weights started from random numbers."] * bool(
        described
    )


def _recipe(recipe: Mapping[str, Any]) -> list[str]:
    if not recipe:
        return []
    kept = {name: mapping(recipe, name) for name in ("method", "encoder", "optimiser")}
    run = mapping(recipe, "run")
    kept["run"] = {name: run[name] for name in ("epochs", "steps", "minutes", "seed") if run.get(name) is not None}
    images = mapping(recipe, "data")
    kept["data"] = {name: images[name] for name in ("image_size", "channels", "crop_scale", "flip") if name in images}
    steps = at(recipe, "measured", "steps")
    kept["run"] |= {"steps": steps} if isinstance(steps, int) else {}
    said = {
        name: {key: value for key, value in part.items() if value is not None and (name, key) not in PATHS}
        for name, part in kept.items()
    }
    return ["## Recipe", f"```yaml\n{yaml.safe_dump(said, sort_keys=False, default_flow_style=None)}```"]


def _curve(run: Path | None) -> list[str]:
    """Some of the lines of a run's metrics: the loss, its trivial baseline, and the linear probe where one ran."""
    lines = (
        []
        if run is None
        else [line for line in read_lines(run / "metrics.jsonl") if number(line, "loss") == number(line, "loss")]
    )
    if not lines:
        return []
    last = len(lines) - 1
    chosen = sorted({round(k * last / (CURVE - 1)) for k in range(CURVE)})
    rows = ["| step | images | loss | trivial | linear probe |", "|---|---|---|---|---|"]
    for k in chosen:
        line = lines[k]
        probe, error = number(line, "probe", "linear"), number(line, "probe", "linear_error")
        shown = f"{100 * probe:.1f} ± {100 * error:.1f}" if probe == probe else ""
        trivial = number(line, "terms", "baseline")
        rows.append(
            f"| {count_text(int(number(line, 'step')))} | {count_text(int(number(line, 'images')))} | "
            f"{short(number(line, 'loss'))} | {short(trivial) if trivial == trivial else ''} | {shown} |"
        )
    return ["## Curve", "\n".join(rows)]


def _worth(subject: Subject, run: Path | None) -> list[str]:
    """The probes and the verdict of the run, and the numbers of the evaluation, with their errors."""
    said: list[str] = []
    if run is not None and (run / "probes.json").is_file():
        lines = run_text(run, markdown)
        rows = [line for line in lines if line.startswith("|")]
        rest = [line for line in lines if not line.startswith("|")]
        said += ["## Probes and verdict", "\n".join(rows), "\n".join(f"- {line}" for line in rest)]
    if subject.saved is not None and subject.folder is not None:
        task = subject.task.partition("-")[0]
        places = (subject.folder, *list(subject.folder.absolute().parents)[:2])
        file = next((place / "results.json" for place in places if (place / "results.json").is_file()), None)
        for result in of_evaluation(read_json(file)) if file else []:
            if result.name == task:
                said += [f"## What `{task}` came to", "\n".join(markdown(table(result)))]
    return said


def _limits(subject: Subject, described: Mapping[str, Any]) -> list[str]:
    said = [
        "It was tried on images like those that it was trained on; what it is worth on others is not known.",
        "Errors are those of the test images of one run; another seed would give other numbers.",
    ]
    if subject.task == "encoder":
        said.append("It says nothing of images by itself: something is to be trained on its features, with labels.")
    if not described.get("trained_on"):
        said.append("On which images its weights were trained is not known here.")
    return ["## Limits", "\n".join(f"- {line}" for line in said)]


def _ending(described: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in mapping(described, "versions").items())
    made = f"; the weights by {versions}" if versions else ""
    return [f"Written by underpaint {__version__}{made}."]


def _paths(subject: Subject, recipe: Mapping[str, Any]) -> list[str]:
    found = [text(recipe, *place) for place in PATHS if isinstance(at(recipe, *place), str)]
    found += [subject.name, subject.bundle.name]
    return sorted({each for each in found if "/" in each}, key=len, reverse=True)


def _without_paths(said: str, paths: Sequence[str]) -> str:
    """Each path as its last name."""
    for path in paths:
        said = re.sub(re.escape(path), lambda match: Path(match[0]).name or "data", said)
    return said
