"""`underpaint evaluate`: what an encoder is worth, task by task, beside the same one untrained and what needs none."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
from torch import Tensor

from underpaint.backbones.norms import batch_norms, settled
from underpaint.config import Recipe
from underpaint.console import lasting, say
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
from underpaint.evaluation import EVALUATIONS, evaluation
from underpaint.evaluation.base import ENCODER, PIXELS, UNTRAINED, AnyEvaluation, Context, Evaluation, Row
from underpaint.evaluation.beside import ONCE, Arm, advice, needed, shares_of
from underpaint.evaluation.bundle import EncoderBundle, open_bundle
from underpaint.evaluation.classify import MAJORITY
from underpaint.evaluation.keep import keep
from underpaint.evaluation.options import Options
from underpaint.evaluation.probes import SETTLING
from underpaint.evaluation.results import Measured
from underpaint.evaluation.settings import SETTINGS, foresee
from underpaint.evaluation.trained import Learned, too_short
from underpaint.files import write_json, write_text
from underpaint.locking import locked
from underpaint.reading import read_object
from underpaint.report import write_report
from underpaint.report.results import of_evaluation
from underpaint.report.tables import METRICS, markdown, metric, summary, terminal
from underpaint.report.words import capital, count_text
from underpaint.signals import Interrupted
from underpaint.train.run_folder import Run, environment

FREQUENT = "most frequent class"  # of a segmentation, which is imported where one is asked for
FORMAT = 2  # 1 did not say of which weights and images it is
Numbers = dict[str, Any]  # of a row: each number, its error ("..._error"), and what stands beside them


class TaskResults(TypedDict):
    """What results.json holds of a task, and what the task adds."""

    train: int
    test: int
    rows: dict[str, Numbers]
    gains: dict[str, Numbers]
    fewer: NotRequired[list[dict[str, Any]]]  # with shares of the labels: fraction, train, rows, gains
    verdict: NotRequired[list[str]]  # which to take, where others were asked for
    asked: NotRequired[dict[str, Any]]  # what it was asked for with, so that another call knows whether it is the same


class Results(TypedDict):
    """What results.json holds."""

    format: int
    encoder: str
    untrained: bool
    weights: str
    data: str
    images: str
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
        encoder: a run, a file of weights, a Hugging Face folder, or `timm:NAME`.
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
    foresee(tasks, options, folder, data)
    with locked(folder):
        return _evaluated(encoder, data, tasks, folder, options)


def _evaluated(encoder: str, data: str | Path, tasks: Sequence[str], folder: Path, options: Options) -> Results:
    run = run_of(encoder)
    options = replace(options, groups=_groups(run, data, options.groups))
    source = open_source(data, groups=options.groups)
    for note in source.notes:
        say(note)
    if options.groups and not source.matched:
        raise InputError(
            f"--groups {options.groups!r}: no name in {data} matches, the first is {source.entries.names[0]}; give a "
            "regular expression that does, or '' for none"
        )
    kinds = {name: evaluation(name) for name in EVALUATIONS if name in tasks}
    found = {kind.annotation: kind.annotated(source) for kind in kinds.values()}
    bundle = _opened(encoder, source, options)
    results = _earlier(folder, encoder, bundle, source, options)
    with_patches = any(kind.input == "tokens" for kind in kinds.values())
    fraction = options.label_fraction or 1.0
    context = Context(bundle, source, options, folder, with_patches, fraction, found=found)
    trained = replace(options, untrained=False)
    others = {name: _opened(name, source, trained, bundle.encoder.channels) for name in options.beside}
    beside = {
        name: replace(context, bundle=other, folder=folder / "beside" / _folder_of(name), alone=True)
        for name, other in others.items()
    }
    configs = {name: kind.configure(context) for name, kind in kinds.items()}
    asked = {name: _asked(kind, configs[name], options) for name, kind in kinds.items()}
    for each in asked.values():
        if others:
            weights = {name: other.fingerprint for name, other in others.items()}
            each |= {"beside": weights, "curve": options.label_fraction is None}
    finished = _finished(results, asked, folder)
    if finished:
        say(f"finished before, and kept: {', '.join(finished)}")
    if others and options.minutes is not None and any(name in SETTINGS for name in kinds):
        networks, shares = len(context.encoders) + len(others), 3 if options.label_fraction is None else 1
        spent = lasting(60 * options.minutes * networks * shares)
        say(
            f"each task that trains: {networks} networks x {shares} shares of the labels x {options.minutes:g} min = {spent}"
            f"{' (`--label-fraction 1` leaves out the curve)' if shares > 1 else ''}"
        )
    results["notes"] = [*bundle.notes, *_seen(run, source)] if bundle.trained else []
    for name, other in others.items():
        results["notes"] += [*other.notes, *(f"{name}: {note}" for note in _seen(run_of(name), source))]
    write_json(folder / "results.json", results)  # from here on the folder is known as an evaluation
    try:
        for name, kind in kinds.items():
            if name in finished:
                continue
            results["tasks"][name] = {**_judged(name, kind, context, beside), "asked": asked[name]}
            write_json(folder / "results.json", results)
            tables = of_evaluation(results)
            write_text(folder / "table.md", "\n".join(summary(tables, _notes(results), markdown)) + "\n")
        for line in summary(of_evaluation(results), _notes(results), terminal):
            say(line)
        say(f"done: {folder / 'results.json'}, {write_report(folder)}")
    except (KeyboardInterrupt, Interrupted):
        say(f"interrupted; kept in {folder}: {_kept_so_far(results, folder)}; the same command goes on")
        raise
    return results


def _folder_of(encoder: str) -> str:
    """The name of a folder for what another encoder is trained to."""
    word = re.sub(r"[^\w.-]+", "-", encoder).strip("-.")[-60:]
    return word if encoder.startswith("timm:") else f"{word}-{hashlib.sha256(encoder.encode()).hexdigest()[:6]}"


def _notes(results: Results) -> list[str]:
    """What stands under the tables: notes, and which encoder to take, task by task."""
    told = [f"{name}: {said}" for name, task in results["tasks"].items() for said in task.get("verdict", ())]
    return [*results["notes"], *told]


def _asked(kind: AnyEvaluation, config: Any, options: Options) -> dict[str, Any]:
    """What the numbers of a task depend on beside what all tasks of an evaluation share, as JSON gives it back."""
    asked = {name: getattr(options, name) for name in kind.asks}
    return json.loads(json.dumps({**asked, **asdict(config)}, default=str))


def _finished(results: Results, asked: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    """The tasks that an earlier call has finished.

    Raises:
        InputError: one of them was asked for with other settings.
    """
    finished = []
    for name in [name for name in asked if name in results["tasks"]]:
        before = results["tasks"][name].get("asked", {})
        weights, known = asked[name].get("beside", {}), before.get("beside", {})
        if other := [each for each in weights if known.get(each, weights[each]) != weights[each]]:
            raise InputError(f"--out {folder}: the weights of {other[0]} have changed since; choose another path")
        if set(weights) <= set(known) and before.get("curve", False) >= asked[name].get("curve", False):
            finished.append(name)  # what is asked beside it anew is found with what was trained before
        keys = {**before, **asked[name]}.keys() - {"beside", "curve"}
        if differ := sorted(key for key in keys if before.get(key) != asked[name].get(key)):
            shown = "; ".join(f"{key} {before.get(key)} there, {asked[name].get(key)} here" for key in differ[:3])
            raise InputError(f"--out {folder}: holds {name} with other settings ({shown}); choose another path")
    return finished


def _kept_so_far(results: Results, folder: Path) -> str:
    """The finished tasks, and the trainings that have a checkpoint."""
    begun = {
        part
        for file in folder.glob("**/checkpoints/step-*[0-9]")
        for part in file.relative_to(folder).parts
        if part in EVALUATIONS
    }
    begun = sorted(begun - set(results["tasks"]))
    return ", ".join([*results["tasks"], *(f"the checkpoints of {name}" for name in begun)]) or "no finished task yet"


@dataclass
class Judged:
    """What was found with one share of the labels: by the names of rows, and by who and variant."""

    rows: dict[str, Numbers] = field(default_factory=dict)
    gains: dict[str, Numbers] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Learned] = field(default_factory=dict)
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)

    def add(self, task: Evaluation[Any, Any, Any, Any], row: Row, name: str, who: str) -> Any:
        """Fit, predict and measure a row, under a name; what was fitted."""
        model = task.fit(row)
        if (trained := getattr(task, "trained", {}).get(row.name)) is not None:
            self.trained[name] = trained
        self.found[name] = task.predict(row, model)
        measured = self.measured[who, row.variant] = task.measure(self.found[name])
        numbers = measured.numbers()
        self.rows[name] = {**numbers, **task.beside(row, self.found[name])}
        told = ", ".join(
            f"{metric(n).head} {metric(n).text(numbers[n], numbers[f'{n}_error'])}" for n in measured.values
        )
        share = task.context.fraction
        say(f"{task.name}{f', {100 * share:.3g} % of the labels' if share < 1 else ''}: {name}: {told}")
        return model

    def compare(self, others: Sequence[str]) -> None:
        """The gains of the encoder over each of the others."""
        for (who, variant), measured in self.measured.items():
            for other in others if who == ENCODER else ():
                if (before := self.measured.get((other, variant))) is not None:
                    told = f"{ENCODER} over {other}"
                    self.gains[f"{variant}: {told}" if variant else told] = measured.above(before)


Made = Callable[[], Evaluation[Any, Any, Any, Any]]


def judge(task: Evaluation[Any, Any, Any, Any]) -> TaskResults:
    """Every row of an evaluation: fitted, measured, drawn, and kept where it can be used; and the gains."""
    judged = _rows(task, {}, task.rows())
    result: Any = {**task.facts(), "rows": judged.rows, "gains": judged.gains, **task.details(judged.found)}
    return result


def _rows(
    task: Evaluation[Any, Any, Any, Any], beside: Mapping[str, Made], rows: Sequence[Row], used: bool = True
) -> Judged:
    """Rows of an evaluation, each followed by what else is asked the same.

    Args:
        beside: makes the same evaluation of other encoders, by their names.
        used: whether what was trained is drawn, and kept for use.
    """
    judged = Judged()
    for row in rows:
        model = judged.add(task, row, row.name, row.who)
        if used:
            task.visualize(row, judged.found[row.name], task.folder / row.variant)
            _keep(task, row, model)
    found = dict(judged.found)  # of the evaluation's own rows
    for name, made in beside.items():
        other = made()
        for row in [row for row in other.rows() if row.who == ENCODER]:
            model = judged.add(other, row, row.name.replace(ENCODER, name, 1), name)
            if used:
                _keep(other, row, model)
    order = []
    for row in rows:
        others = beside if row.who == ENCODER else ()
        order += [row.name, *(row.name.replace(ENCODER, name, 1) for name in others)]
    judged.rows = {name: judged.rows[name] for name in order}
    judged.found = found
    judged.compare([UNTRAINED, *beside])
    return judged


def _keep(task: Evaluation[Any, Any, Any, Any], row: Row, model: Any) -> None:
    """What an encoder's row trained, where it can be used."""
    if row.who == ENCODER and (kept := task.kept(row, model)) is not None:
        name = f"{task.name}-{row.variant}" if row.variant else task.name
        keep(task.folder / row.variant, name, task.context.bundle, kept.network, kept.classes, kept.facts)


def _judged(name: str, kind: AnyEvaluation, context: Context, beside: Mapping[str, Context]) -> TaskResults:
    """A task with the encoder; with others beside it where some are asked for, also with shares of the labels, and in words
    which of them to take."""

    def made(at: Context) -> Evaluation[Any, Any, Any, Any]:
        return kind(name, at, kind.load(at), kind.configure(at))

    context, beside = _sized(name, kind, context), {other: _sized(name, kind, at) for other, at in beside.items()}
    task = made(context)
    judged = _rows(task, {other: partial(made, at) for other, at in beside.items()}, task.rows())
    result: Any = {**task.facts(), "rows": judged.rows, "gains": judged.gains, **task.details(judged.found)}
    short = _too_short(judged)
    if judged.trained:
        result["trained"] = judged.trained
    if short:
        say(f"{name}: {short}")
        result["verdict"] = [capital(short)]
    result["image_sizes"] = {ENCODER: context.bundle.size, **{other: at.bundle.size for other, at in beside.items()}}
    if not beside:
        return result
    parts, note = {1.0: judged}, ""
    counts = {1.0: result["train"]}
    if context.options.label_fraction is None and kind.annotation != "none":
        shares, note = shares_of(result["train"], task.least())
        for share in shares:
            few = made(_with(context, share))
            asked = {other: partial(made, _with(at, share)) for other, at in beside.items()}
            parts[share] = _rows(few, asked, [row for row in few.rows() if row.who in (ENCODER, UNTRAINED)], used=False)
            counts[share] = few.facts()["train"]
    result["fewer"] = [
        {"fraction": share, "train": counts[share], "rows": parts[share].rows, "gains": parts[share].gains}
        for share in sorted(parts)
        if share < 1
    ]
    if not short:
        once = [ONCE] if judged.trained else []
        result["verdict"] = [*_verdict(parts, counts, list(beside)), *([note] if note else []), *once]
    return result


def _too_short(judged: Judged) -> str:
    """Why what was trained cannot be compared yet, in a sentence; nothing where it can."""
    if not judged.trained:
        return ""
    name = next(each for each in METRICS if any(each in one.values for one in judged.measured.values()))
    floor = max(
        (one.values[name] for (who, _), one in judged.measured.items() if who in (MAJORITY, FREQUENT)), default=0
    )
    networks = {row: one for row, one in judged.trained.items() if row.split(", ")[0] not in PIXELS}
    best = max(
        one.values[name] for (who, _), one in judged.measured.items() if who not in (MAJORITY, FREQUENT, *PIXELS)
    )
    return too_short(networks, best - floor)


def _sized(name: str, kind: AnyEvaluation, context: Context) -> Context:
    """The same with an encoder of images of the size that suits the task, where none is given."""
    found = kind.fitting_size(context) if context.options.image_size is None else None
    if found is None or found[0] == context.bundle.size:
        return context
    size, why = found
    say(f"{name}: {context.bundle.name} takes images of {size[0]}x{size[1]} px: {why} (`--image-size` changes it)")
    untrained = context.options.untrained and not context.alone
    options = replace(context.options, image_size=size, untrained=untrained)
    bundle = _opened(context.bundle.name, context.source, options, context.bundle.encoder.channels)
    return replace(context, bundle=bundle)


def _with(context: Context, share: float) -> Context:
    """The same with a share of the labels."""
    return replace(context, fraction=share, folder=context.folder / f"labels-{share:g}", whole=context)


def _verdict(parts: Mapping[float, Judged], counts: Mapping[float, Any], others: Sequence[str]) -> list[str]:
    """Which encoder to take with all labels and with shares of them, and how many labels each needs; by variant."""
    said: list[str] = []
    known = {ENCODER, UNTRAINED, *others}
    variants = dict.fromkeys(variant for who, variant in parts[1.0].measured if who == ENCODER)
    for variant in variants:
        prefix = f"{variant}: " if variant else ""
        curves: dict[str, list[tuple[int, float]]] = {}
        for share in sorted(parts, reverse=True):
            measured = parts[share].measured
            name = next(each for each in METRICS if each in measured[ENCODER, variant].values)
            arms = [Arm(ENCODER, "own", measured[ENCODER, variant])]
            arms += [Arm(UNTRAINED, "scratch", found) for found in [measured.get((UNTRAINED, variant))] if found]
            arms += [Arm(other, "other", measured[other, variant]) for other in others if (other, variant) in measured]
            for arm in arms:
                curves.setdefault(arm.said, []).insert(0, (counts[share], arm.measured.values[name]))
            floors = {who: found for (who, v), found in measured.items() if v == variant and who not in known}
            told = advice(arms, name, floors)
            if told and share < 1:
                told = f"with {100 * share:.3g} % of the labels ({count_text(counts[share])} images): {told}"
            said += [f"{prefix}{told}"] if told else []
        said += [f"{prefix}{told}" for told in [needed(curves, name)] if told]
    return [told if told.startswith(tuple(others)) else capital(told) for told in said]


def _opened(encoder: str, source: Source, options: Options, channels: int = 3) -> EncoderBundle:
    """The encoder (of images of so many channels, where its weights are public), with a scaling for all images of the evaluation (its own, else that of those it trains on) and, where
    it has batch norms, clean images from which those of a random-init network take their statistics."""
    bundle = open_bundle(
        encoder, image_size=options.image_size, untrained=options.untrained, channels=channels, seed=options.seed
    )
    train, _ = labelled_indices(source) or split_indices(source, range(len(source.entries)))
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
    train, _ = split_indices(source, range(len(source.entries)))
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
    sides = labelled_indices(source) or split_indices(source, range(len(source.entries)))
    shared = len(np.intersect1d(trained, sides[1]))
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
        "weights": bundle.fingerprint,
        "untrained": options.untrained,
        "data": source.location,
        "images": source.fingerprint()[:32],
        "image_size": list(bundle.size),
        "seed": options.seed,
        "label_fraction": options.label_fraction or 1.0,
        "groups": options.groups,
        "environment": environment(),
        "notes": [],
        "tasks": {},
    }
    file = folder / "results.json"
    if not file.is_file():
        return described
    stored = read_object(file)
    wanted = {name: value for name, value in described.items() if name not in ("environment", "notes", "tasks")}
    differ = [name for name, value in wanted.items() if stored.get(name) != value]
    if stored.get("format") == FORMAT and not differ and not _whole(stored):
        raise InputError(f"{file}: is damaged; restore it, or choose another path")
    if differ[:1] == ["weights"]:
        raise InputError(f"--out {folder}: the weights of {encoder} have changed since; choose another path")
    if differ == ["images"]:
        raise InputError(f"--out {folder}: the images of {source.location} have changed since; choose another path")
    if differ:
        shown = "; ".join(f"{name} {stored.get(name)} there, {wanted[name]} here" for name in differ[:3])
        raise InputError(f"--out {folder}: holds another evaluation ({shown}); choose another path")
    return cast(Results, stored)


def _whole(stored: Mapping[str, Any]) -> bool:
    """Whether a file of results has what one has."""
    tasks = stored.get("tasks")
    return isinstance(tasks, dict) and all(isinstance(task, dict) and "asked" in task for task in tasks.values())
