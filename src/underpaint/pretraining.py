"""From images to a pretrained encoder, as a page of calls: prepare, train, judge, report."""

import copy
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from underpaint.backbones import save_encoder
from underpaint.backbones.protocols import Backbone
from underpaint.computing import repeatable
from underpaint.config import Recipe
from underpaint.console import quiet, say
from underpaint.data import Batch, keep
from underpaint.errors import InputError, Stopped
from underpaint.evaluation.visualizations import write_visualizations
from underpaint.files import refuse_inside
from underpaint.judging import full_sizes, probe_every, quick_sizes
from underpaint.locking import locked
from underpaint.methods import Restores
from underpaint.planning import estimated, planned, told
from underpaint.prepare import (
    Opened,
    Session,
    check_start,
    check_unchanged,
    construct,
    decide,
    load_data,
    open_data,
    schedule_of,
    silent,
    standardized,
    warm_again,
)
from underpaint.recipes import CONTINUE
from underpaint.recipes.recipe import checked, plain
from underpaint.recipes.request import asked, planned_around, settled
from underpaint.report import write_report
from underpaint.report.figures.pictures import sheet
from underpaint.report.results import before_training
from underpaint.report.run import run_text
from underpaint.train.cadence import Due, Plan
from underpaint.train.devices import make_fabric
from underpaint.train.loggers import Loggers
from underpaint.train.loop import Training, Watch
from underpaint.train.ranks import by_first, meet, node_first, together
from underpaint.train.run_folder import Run, environment, host_copy
from underpaint.train.schedules import Duration
from underpaint.train.speed import out_of_memory, warm
from underpaint.train.stepper import Stepper

# images that are restored at each probe, and their pixels at most: the page holds all of these pictures
PICTURED, PICTURED_SIDE = 4, 160
KEPT = 5e8  # bytes of features of the untrained encoder that are kept from the first probe for the judgement
UNREPEATABLE = r"(\S+) does not have a deterministic implementation"  # torch's words


def pretrain(
    data: str | Path,
    out: str | Path,
    recipe: str | Recipe | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    stop_at: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Pretrain an encoder on the images in `data`; where `out` holds a run, go on with it.

    Args:
        data: a folder, archive, parquet file, `hf:NAME[:SPLIT]`, `parquet:PATTERN` or `wds:PATTERN`.
        out: the run folder.
        recipe: every setting, as `underpaint.recipe` gives them to be changed; the name of a shipped recipe, or a YAML
            file (that of a run repeats it). That of the run where None, else one that is planned for these images,
            this machine and the time; the plan is said, and the recipe holds it (decision 18). So it is where `settings`
            say an `init`, with or without the recipe "continue" (docs/continue.md).
        settings: by path, laid over the recipe; or what is planned around: {"run.minutes": 30.0}.
        stop_at: seconds of training in all after which this call ends, with a probe and a checkpoint; the next call
            goes on. A comparison trains its methods in turn so, and judges them itself. `minutes` are then minutes on
            the clock, which the schedule follows, and no number of steps.
        clock: seconds, by which a run is timed; another one makes what a clock decides repeatable.

    Raises:
        InputError: settings or data that cannot be used, in one line.
        Stopped: what was begun could not go on: a full disk, say, or a loss that stays not finite.
        Interrupted: told to end while it trained; a checkpoint was written.
    """
    run = Run(out)
    open_to = planned_around(recipe, settings or {}, run.exists)
    if recipe == CONTINUE:  # as it was planned
        recipe = None
    chosen, resumed = settled(data, run.path, asked(run.path, recipe, {}, settings or {}))
    refuse_inside(out, data, chosen.data.labels)
    run.refuse_other()
    with (
        repeatable(chosen.run.deterministic),
        together(fabric := make_fabric(chosen)),
        locked(run.path) if fabric.is_global_zero else nullcontext(),
    ):
        opened = None
        if open_to is not None:
            chosen, opened = _planned(fabric, chosen, open_to)
        session = _session(fabric, run, chosen, opened, stop_at, clock)
        untrained = copy.deepcopy(session.method.encoder)
        with _advice(chosen):
            stepper = decide(session)
            if stepper.compiled:
                warm(stepper, session.first_batches(1)[0])
            try:
                _train(session, stepper, resumed, stop_at)
                if stop_at is None:
                    _judge(session, untrained.to(fabric.device))
            finally:
                _write_page(session, going=False)
    return run


def preview(
    data: str | Path, out: str | Path, recipe: str | Recipe | None = None, settings: Mapping[str, Any] | None = None
) -> Recipe:
    """Say how the images are understood, and the plan of a run on them with its memory and time. Nothing is decoded, and
    nothing written into `out`.

    Args:
        data, out, recipe, settings: as for `pretrain`.

    Returns:
        The recipe of that run.

    Raises:
        InputError: settings or data that cannot be used, in one line.
    """
    run = Run(out)
    open_to = planned_around(recipe, settings or {}, run.exists)
    if recipe == CONTINUE:  # as it was planned
        recipe = None
    chosen, _ = settled(data, run.path, asked(run.path, recipe, {}, settings or {}))
    refuse_inside(out, data, chosen.data.labels)
    run.refuse_other()
    fabric = make_fabric(chosen)
    shout = say if fabric.is_global_zero else silent
    found = planned(fabric, open_data(chosen, shout), chosen, open_to)
    for line in told(found):
        shout(line)
    return found.recipe


def _planned(fabric: Fabric, recipe: Recipe, around: Mapping[str, Any]) -> tuple[Recipe, Opened | None]:
    """The recipe that is planned around some settings: by the first process, for all. What it listed is listed once."""
    made, opened = None, None

    def plan() -> dict[str, Any]:
        nonlocal made, opened
        opened = open_data(recipe, say)
        found = planned(fabric, opened, recipe, around)
        for line in told(found):
            say(line)
        made = found.recipe
        return plain(made)

    answer = by_first(plan)
    return checked(answer) if made is None else made, opened


def _session(
    fabric: Fabric,
    run: Run,
    recipe: Recipe,
    opened: Opened | None,
    stop_at: float | None,
    clock: Callable[[], float],
) -> Session:
    """Images, what they are judged by, and the untrained method; makes the run folder. What needs no image comes first, so
    that a mistake is answered before any is decoded."""
    parts = (
        1 if "accumulation" in recipe.measured else recipe.optimiser.accumulation
    )  # measured ones follow the processes
    if recipe.optimiser.batch_size % (fabric.world_size * parts):
        raise InputError(
            f"optimiser.batch_size: {recipe.optimiser.batch_size} does not divide among "
            f"{fabric.world_size} processes" + (f" x {parts} parts" if parts > 1 else "")
        )
    main = fabric.is_global_zero
    shout = say if main and stop_at is None else silent  # a comparison has said it once
    constructed = construct(recipe, run)
    check_start(constructed, recipe)
    if constructed.matched:
        shout(constructed.matched)
    if opened is None:
        opened = open_data(recipe, shout)
        if (
            shout is say
            and "steps" not in recipe.measured
            and (told_first := estimated(fabric, recipe, len(opened.indices)))
        ):
            shout(told_first)
    kept = check_unchanged(recipe, run, opened, shout) if main else {}
    # the first one of a machine fills the cache there, the others find it
    with node_first(), quiet(shout is silent):
        images, suite = load_data(recipe, opened, shout)
    # of the start, whatever changed: the encoder goes on to see images as it did
    statistics = recipe.measured.setdefault("statistics", {"mean": list(images.mean), "std": list(images.std)})
    images.mean, images.std = statistics["mean"], statistics["std"]
    method, arguments = constructed.method, constructed.arguments
    standardize = standardized(constructed, images, shout)
    recipe.measured["scaling"] = images.scaling.stored()
    if main:
        run.create(recipe)
        keep(kept, run.path)
        known = {line["path"] for line in run.lines("skipped.jsonl")}
        skipped = {line["path"]: line for line in images.skipped + suite.skipped}  # of what is held out too
        run.append("skipped.jsonl", [line for path, line in skipped.items() if path not in known])
        run.write_json("environment.json", environment())
    meet()
    trained_on = {
        "images": len(images),
        "channels": images.channels,
        "source": opened.source.kind,
        "labels": None,  # no loss of pretraining sees any
        "method": recipe.method["name"],
    }
    provenance = {"start": constructed.start, "trained_on": trained_on}
    return Session(fabric, run, recipe, images, suite, method, standardize, arguments, provenance, clock, shout)


@contextmanager
def _advice(recipe: Recipe) -> Iterator[None]:
    """Where memory runs out, or a kernel that repeats itself is lacking, one line that says what would be right."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if recipe.run.deterministic and (lacking := re.match(UNREPEATABLE, str(error))):
            raise InputError(
                f"run.deterministic: {lacking[1]} has no deterministic kernel on this device; leave the setting out, or take "
                "another encoder or method"
            ) from error
        if not out_of_memory(error):
            raise
        half = max(1, recipe.optimiser.batch_size // 2)
        raise Stopped(
            f"out of memory beside the training's steps; try --batch-size {half} in a new --out, or a smaller encoder"
        ) from error


def _train(session: Session, stepper: Stepper, resumed: bool, stop_at: float | None) -> None:
    """From the start or the last checkpoint to the end of the run, or to `stop_at` seconds of training."""
    run, recipe, measured = session.run, session.recipe, session.recipe.measured
    # in turns by the clock: a plan in steps is as good as the moment in which a step was timed
    duration = Duration(measured["steps"], None if stop_at is None else recipe.run.minutes)
    if session.fabric.is_global_zero:
        run.write_recipe(recipe)
    session.last = measured["steps"] if stop_at is None else None
    if stop_at is None:
        session.suite.quick_sizes = tuple(measured.setdefault("quick_probe", list(quick_sizes(recipe))))
        if "judgement" in measured:
            session.suite.full_sizes = tuple(measured["judgement"])
    every = (measured["log_every"], measured["probe_every"], measured["checkpoint_every"])
    plan = Plan(duration, schedule_of(recipe), *every, stop_at)
    training = Training(stepper, plan, run, _watch(session, plan), session.clock)
    going_on = training.resume() if resumed else training.start_anew()
    if going_on:
        session.shout(f"going on from step {training.at.step} of {measured['steps']}")
        _write_page(session)
    if (before := measured.pop("steps_before", None)) is not None:
        if going_on and (note := warm_again(training.at.step, before, recipe)):
            session.shout(note)
        plan.schedule = schedule_of(recipe)
        if training.main:
            run.write_recipe(recipe)
    due = training.train(_batches(session, training), going_on)
    if due is not None and duration.minutes:
        _note_steps(session, training, due)


def _note_steps(session: Session, training: Training, due: Due) -> None:
    """By the clock there were as many steps as there were, or will be where the machine stays as it is."""
    step, share = training.at.step, training.plan.share(training.at)
    session.recipe.measured["steps"] = step if due.ended else max(step + 1, round(step / share))
    if training.main:
        session.run.write_recipe(session.recipe)


def _batches(session: Session, training: Training) -> Callable[[int, int], Generator[Batch, None, None]]:
    """Batches from a step on, by a seed; files that turn out to be unreadable are noted once."""
    reported = {line["path"] for line in session.run.lines("skipped.jsonl")} if training.main else set()

    def note_skip(line: dict[str, str]) -> None:
        if training.main and line["path"] not in reported:
            reported.add(line["path"])
            session.run.append("skipped.jsonl", [line])
            training.bar.above(f"skipped {line['path']}: {line['reason']}")

    return lambda first, seed: session.batches(first, seed, note_skip)


def _write_page(session: Session, going: bool = True) -> None:
    """The page of where the run stands; no mistake in it costs the run anything."""
    if session.fabric.is_global_zero:
        try:
            write_report(session.run.path, going)
        except Exception as error:
            say(f"note: report.html could not be written ({type(error).__name__}: {error})")


def _watch(session: Session, plan: Plan) -> Watch:
    """What looks at a run while it trains: probe and picture, exported encoder, loggers."""

    def export() -> Callable[[], None]:
        encoder = recalibrated(session, session.method.encoder)
        weights = host_copy(encoder.model.state_dict())

        def write() -> None:
            save_encoder(
                session.run.path,
                encoder,
                session.arguments,
                session.standardize,
                session.images.scaling,
                session.provenance,
                weights,
            )
            _write_page(session)

        return write

    def probe(step: int) -> dict[str, float]:
        began = session.clock()
        found = _look(session, step)
        if not step and session.last is not None and "judgement" not in session.recipe.measured:
            _spend(session, plan, session.clock() - began)
        return found

    def divided(parts: int) -> None:
        session.recipe.measured["accumulation"] = parts
        session.run.write_recipe(session.recipe)

    return Watch(
        names=lambda batch: [session.images.names[k] for k in batch.samples],
        probe=probe,
        export=export,
        divided=divided,
        resume_loggers=lambda step: Loggers(session.run, session.recipe.run.loggers, step),
    )


def _spend(session: Session, plan: Plan, seconds: float) -> None:
    """By what the first probe took: how often there is another one, and how many images judge at the end."""
    recipe, suite, judges = session.recipe, session.suite, session.suite.splits
    seconds = by_first(lambda: max(seconds, 1e-6))
    if judges is not None:
        seen = sum(min(most, len(part.indices)) for most, part in zip(suite.quick_sizes, judges, strict=True))
        suite.full_sizes = full_sizes(recipe, suite.quick_sizes, seen, seconds)
    if recipe.run.probe_every is None:
        plan.probe_every = recipe.measured["probe_every"] = probe_every(recipe, seconds)
    recipe.measured["judgement"] = list(suite.full_sizes)
    if session.fabric.is_global_zero:
        session.run.write_recipe(recipe)


def recalibrated(session: Session, encoder: Backbone) -> Backbone:
    """What is judged and kept of an encoder: batch norms have the statistics of clean images."""
    return session.suite.recalibrate_bn(encoder, session.standardize)


def _look(session: Session, step: int) -> dict[str, float]:
    """A probe, by all processes, and a picture of where the run stands; training's randomness is not touched."""
    method, standardize = session.method, session.standardize
    if isinstance(method, Restores) and session.fabric.is_global_zero:
        images = standardize(session.suite.shown(session.fabric.device)[:PICTURED])
        was = method.training
        method.eval()
        frames = method.restore(images)
        method.train(was)
        sheet(
            {caption: standardize.inverse(frame) for caption, frame in frames.items()},
            session.run.path / "pictures" / f"restore-{step:08d}.webp",
            largest=PICTURED_SIDE,
        )
    suite = session.suite
    if step == session.last:
        seen = session.seen = suite.see(method.encoder, standardize)
    else:
        seen = suite.glance(method.encoder, standardize)
        if not step and session.last is not None and seen.bytes <= KEPT:
            session.start = seen
    return suite.quick(method.encoder, standardize, seen)


def _judge(session: Session, untrained: Backbone) -> None:
    """Probes in full, by all processes; pictures and the page by the first."""
    run, suite, standardize = session.run, session.suite, session.standardize
    encoder, before = session.method.encoder, before_training(session.recipe.init or "")
    if suite.splits is not None:
        session.shout(
            f"judging the encoder, {'what it started from' if session.recipe.init else 'the untrained one'}, raw pixels and HOG ..."
        )
    report = {"restoration": by_first(lambda: suite.restoration(session.method, standardize))}
    seen, start = session.seen or suite.see(encoder, standardize), suite.see(untrained, standardize, session.start)
    report |= suite.final(seen, start, standardize)

    def write() -> None:
        run.write_json("probes.json", report)
        known = seen.known(suite), start.known(suite)
        write_visualizations(seen.encoder, start.encoder, suite, standardize, run.path / "pictures", before, known)
        for line in run_text(run.path):
            session.shout(line)

    by_first(write)
    session.shout(f"done: {run.path / 'encoder.safetensors'}, {run.path / 'report.html'}")
    for line in next_commands(session.recipe, run, suite.splits is not None):
        session.shout(line)


def next_commands(recipe: Recipe, run: Run, labelled: bool) -> list[str]:
    """What comes after a run, as three commands for a shell: look at its page, judge it or choose what to label, use it in Python."""
    python = Path(sys.executable).name
    if shutil.which(python) != sys.executable:
        python = shlex.quote(sys.executable)
    page, name = (run.path / "report.html").absolute().as_uri(), shlex.quote(str(run.path))
    data = shlex.quote(str(recipe.data.labels or recipe.data.path))
    if labelled:
        groups = f" --groups {shlex.quote(recipe.data.groups)}" if recipe.data.groups else ""
        use = f"evaluate {name} --data {data} --task knn,linear{groups} --out {shlex.quote(f'{run.path}-worth')}"
    else:
        use = f"suggest {name} {data} --out {shlex.quote(f'{run.path}-label.csv')}"
    shape = (1, recipe.data.channels, *recipe.data.image_size)
    code = (
        f"import torch, underpaint; run = {json.dumps(str(run.path))}; encoder, transform = underpaint.load_encoder(run), "
        f"underpaint.standardize_for(run); print(encoder(transform(torch.rand{shape})).pooled.shape)"
    )
    return [
        f"next: look at the page, {'judge it by all labels' if labelled else 'choose which images to label'}, use it in Python:",
        f"  {python} -m webbrowser {shlex.quote(page)}",
        f"  underpaint {use}",
        f"  {python} -c {shlex.quote(code)}",
    ]
