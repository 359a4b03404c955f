"""`underpaint evaluate`: what an encoder is worth, task by task, beside the same one untrained and what needs none."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from underpaint.backbones.norms import batch_norms, settled
from underpaint.config import Recipe, check_bounds
from underpaint.console import say
from underpaint.data import (
    Source,
    fair_batches,
    labelled_indices,
    open_source,
    pretraining_indices,
    same_place,
    split_indices,
)
from underpaint.errors import InputError
from underpaint.evaluation import EVALUATIONS, evaluation, known
from underpaint.evaluation.base import ENCODER, UNTRAINED, Context, Evaluation
from underpaint.evaluation.bundle import EncoderBundle, open_bundle
from underpaint.evaluation.keep import keep
from underpaint.evaluation.options import Options
from underpaint.evaluation.probes import SETTLING
from underpaint.evaluation.results import Measured
from underpaint.files import write_json, write_text
from underpaint.report import write_report
from underpaint.report.results import of_evaluation
from underpaint.report.tables import markdown, metric, summary, terminal
from underpaint.train.run_folder import Run, environment

FORMAT = 1
Numbers = dict[str, Any]  # of a row: each number, its error ("..._error"), and what stands beside them


class TaskResults(TypedDict):
    """What results.json holds of a task, and what the task adds."""

    train: int
    test: int
    rows: dict[str, Numbers]
    gains: dict[str, Numbers]


class Results(TypedDict):
    """What results.json holds."""

    format: int
    encoder: str
    untrained: bool
    data: str
    image_size: list[int]
    seed: int
    label_fraction: float
    groups: str | None
    environment: dict[str, Any]
    notes: list[str]
    tasks: dict[str, TaskResults]


def evaluate(
    encoder: str | Path, data: str | Path, tasks: Sequence[str], out: str | Path, options: Options | None = None
) -> Results:
    """Judge an encoder on annotated images; where `out` holds an earlier evaluation of it, go on with it.

    `out` gets results.json, table.md, report.html, and a folder a task with pictures and what was trained (`underpaint
    predict`).

    Args:
        encoder: a run, an exported file, or `timm:NAME`.
        data: images with class labels, numbers, masks or boxes, as for pretraining.
        tasks: of `EVALUATIONS`.
        options: what else can be asked for.

    Returns:
        What results.json holds.

    Raises:
        InputError: an encoder, data or a task that cannot be used, in one line.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    encoder, options, folder = str(encoder), options or Options(), Path(out)
    _checked(tasks, options, folder)
    run = run_of(encoder)
    options = replace(options, groups=_groups(run, data, options.groups))
    source = open_source(data, groups=options.groups)
    for note in source.notes:
        say(note)
    if options.groups and not source.matched:
        raise InputError(
            f"--groups {options.groups!r}: no name in {data} matches, the first is {source.entries[0].name}; give a "
            "regular expression that does, or '' for none"
        )
    bundle = _opened(encoder, source, options)
    results = _earlier(folder, encoder, bundle, source, options)
    results["notes"] = [*bundle.notes, *_seen(run, source)] if bundle.trained else []
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)  # who is interrupted in the first task goes on, too
    kinds = {name: evaluation(name) for name in EVALUATIONS if name in tasks}
    with_patches = any(kind.input == "tokens" for kind in kinds.values())
    context = Context(bundle, source, options, folder, with_patches)
    for name, kind in kinds.items():
        results["tasks"][name] = judge(kind(name, context, kind.load(context), kind.configure(context)))
        write_json(folder / "results.json", results)
        tables = of_evaluation(results)
        write_text(folder / "table.md", "\n".join(summary(tables, results["notes"], markdown)) + "\n")
    for line in summary(of_evaluation(results), results["notes"], terminal):
        say(line)
    say(f"done: {folder / 'results.json'}, {write_report(folder)}")
    return results


def judge(task: Evaluation[Any, Any, Any, Any]) -> TaskResults:
    """Every row of an evaluation: fitted, measured, drawn, and kept where it can be used; and the gains."""
    measured: dict[str, Measured] = {}
    found: dict[str, Any] = {}
    rows: dict[str, Numbers] = {}
    for row in task.rows():
        model = task.fit(row)
        found[row.name] = task.predict(row, model)
        measured[row.name] = task.measure(found[row.name])
        numbers = measured[row.name].numbers()
        rows[row.name] = {**numbers, **task.beside(row, found[row.name])}
        told = ", ".join(
            f"{metric(n).head} {metric(n).text(numbers[n], numbers[f'{n}_error'])}" for n in measured[row.name].values
        )
        say(f"{task.name}: {row.name}: {told}")
        folder = task.folder / row.variant
        task.visualize(row, found[row.name], folder)
        if row.who == ENCODER and (kept := task.kept(row, model)) is not None:
            name = f"{task.name}-{row.variant}" if row.variant else task.name
            keep(folder, name, task.context.bundle, kept.network, kept.classes, kept.facts)
    gains: dict[str, Numbers] = {}
    names = {(row.who, row.variant): row.name for row in task.rows()}
    for (who, variant), name in names.items():
        if who == ENCODER and (before := names.get((UNTRAINED, variant))) is not None:
            told = f"{ENCODER} over {UNTRAINED}"
            gains[f"{variant}: {told}" if variant else told] = measured[name].above(measured[before])
    result: Any = {**task.facts(), "rows": rows, "gains": gains, **task.details(found)}
    return result


def _checked(tasks: Sequence[str], options: Options, out: Path) -> None:
    known(tasks)
    check_bounds(options, Options, "--{}")
    if "outliers" in tasks and options.against is None:
        raise InputError("--task outliers: give the other images with --against DATA")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "results.json").is_file()):
        raise InputError(f"--out {out}: exists and holds no evaluation; choose another path")


def _opened(encoder: str, source: Source, options: Options) -> EncoderBundle:
    """The encoder, with a scaling for all images of the evaluation (its own, else that of those it trains on) and, where
    it has batch norms, clean images from which those of a random-init network take their statistics."""
    bundle = open_bundle(encoder, image_size=options.image_size, untrained=options.untrained, seed=options.seed)
    train, _ = labelled_indices(source) or split_indices(source, list(range(len(source.entries))))
    bundle = bundle.scaled(source, train)
    for note in bundle.notes:
        say(f"note: {note}")
    if batch_norms(bundle.encoder):
        bundle = replace(bundle, clean=partial(_clean, source, bundle, options.seed))
        if options.untrained and bundle.clean is not None:
            bundle = replace(bundle, encoder=settled(bundle.encoder, bundle.clean))
    return bundle


def _clean(source: Source, bundle: EncoderBundle, seed: int) -> Iterator[Tensor]:
    """Training images for the batch norms of a random-init network."""
    train, _ = split_indices(source, list(range(len(source.entries))))
    images, device = bundle.images(source, train), bundle.standardize.mean.device
    for batch in fair_batches(images, size=bundle.size, count=SETTLING, seed=seed, device=device):
        yield bundle.standardize(batch.images)


def run_of(encoder: str) -> Recipe | None:
    """The recipe of the run that an encoder is from; None for public weights and for files without one."""
    folder = Path(encoder) if Path(encoder).is_dir() else Path(encoder).parent
    if encoder.startswith("timm:") or not (folder / "recipe.yaml").is_file():
        return None
    return Run(folder).recipe()


def _groups(run: Recipe | None, data: str | Path, given: str | None) -> str | None:
    """The pattern by which images are grouped: the one given, else that of the run.

    Raises:
        InputError: on the run's own images another one than the run's, which would part its groups.
    """
    if run is None or not run.data.groups:
        return given
    if given is None:
        say(f"groups are those of the run: {run.data.groups!r}")
        return run.data.groups
    own = any(path is not None and same_place(path, data) for path in (run.data.path, run.data.labels))
    if own and given != run.data.groups:
        raise InputError(
            f"--groups {given!r}: the run kept groups by {run.data.groups!r} on one side of {data}; leave --groups away"
        )
    return given


def _seen(run: Recipe | None, source: Source) -> list[str]:
    """A sentence where a run was pretrained on images that judge here."""
    if run is None or run.data.path is None or not same_place(run.data.path, source.location):
        return []
    apart = run.data.labels is not None and not same_place(run.data.labels, run.data.path)
    own = open_source(source.location, groups=run.data.groups)
    trained = pretraining_indices(own, all_images=run.data.all_images or apart)
    sides = labelled_indices(source) or split_indices(source, list(range(len(source.entries))))
    shared = len(set(trained) & set(sides[1]))
    if not shared:
        return []
    return [f"{shared:,} of the {len(sides[1]):,} images held out to test on were pretrained on, without their labels."]


# -- results -----------------------------------------------------------------------------------------------------------


def _earlier(folder: Path, encoder: str, bundle: EncoderBundle, source: Source, options: Options) -> Results:
    """The results that a folder holds already.

    Raises:
        InputError: they are of something else.
    """
    described: Results = {
        "format": FORMAT,
        "encoder": encoder,
        "untrained": options.untrained,
        "data": source.location,
        "image_size": list(bundle.size),
        "seed": options.seed,
        "label_fraction": options.label_fraction,
        "groups": options.groups,
        "environment": environment(),
        "notes": [],
        "tasks": {},
    }
    file = folder / "results.json"
    if not file.is_file():
        return described
    stored = json.loads(file.read_text())
    wanted = {name: value for name, value in described.items() if name not in ("environment", "notes", "tasks")}
    differ = [name for name, value in wanted.items() if stored.get(name) != value]
    if differ:
        shown = "; ".join(f"{name} {stored.get(name)} there, {wanted[name]} here" for name in differ[:3])
        raise InputError(f"--out {folder}: holds another evaluation ({shown}); choose another path")
    return stored
