"""What a run needs before its first step: images, the untrained method, a tokenizer, and what the machine can do.

What is measured is written into the recipe, so that a run that goes on decides nothing again.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from pyarrow import Table

from underpaint.backbones import Backbone, create_arguments, from_arguments, init_from
from underpaint.computing import lay_out
from underpaint.config import Recipe
from underpaint.console import say
from underpaint.data import (
    Batch,
    Crops,
    ImageSet,
    Indices,
    Source,
    copies,
    labelled_indices,
    listing,
    load_images,
    near_copies,
    open_source,
    pretraining_indices,
    same_place,
    stored_scaling,
    train_batches,
)
from underpaint.errors import InputError
from underpaint.evaluation.probes import ProbeSuite, Seen
from underpaint.methods import METHODS, Method
from underpaint.methods.method import freeze, freeze_unreached
from underpaint.patches import Standardize
from underpaint.recipes.recipe import method_options
from underpaint.recipes.request import DEFAULT_EPOCHS
from underpaint.tokenize import STEPS as TOKENIZER_STEPS
from underpaint.tokenize import Making, make_ready
from underpaint.tokenizers import Tokenizer, making_seconds, save_tokenizer, tokenizer_scaling
from underpaint.train.optim import adamw, pulled
from underpaint.train.ranks import by_first, send_out
from underpaint.train.run_folder import Run
from underpaint.train.schedules import Duration, Schedule, WarmedAgain
from underpaint.train.speed import TOO_LARGE, measure, out_of_memory, restart_peak
from underpaint.train.stepper import Stepper

Shout = Callable[[str], None]


def silent(text: str) -> None:
    """In place of `say`, where it was said before."""


@dataclass
class Session:
    """What a run of pretraining works with.

    Attributes:
        suite: what it is judged by.
        standardize: from images in [0, 1] to what the method takes.
        arguments: of `timm.create_model`, kept with the encoder.
        provenance: where the encoder's weights are from (`save_encoder`), kept with it.
        matched: what `--init` matched, as text.
        clock: seconds, by which everything in the run is timed.
        shout: says what a person should know.
        last: the step at whose end the encoder is judged; None where a comparison does that.
        seen: what was seen of the encoder there.
        start: what the first probe saw of the untrained one, where it could be kept.
    """

    fabric: Fabric
    run: Run
    recipe: Recipe
    images: ImageSet
    suite: ProbeSuite
    method: Method
    standardize: Standardize
    arguments: dict[str, Any]
    provenance: dict[str, Any]
    clock: Callable[[], float] = time.perf_counter
    shout: Shout = say
    last: int | None = None
    seen: Seen | None = None
    start: Seen | None = None

    def batches(
        self, first: int, seed: int, on_skip: Callable[[dict[str, str]], None] | None = None
    ) -> Generator[Batch, None, None]:
        """The training batches of this process from step `first` on."""
        data, fabric = self.recipe.data, self.fabric
        crops = Crops(
            self.images,
            data.image_size,
            self.recipe.optimiser.batch_size,
            seed,
            crop_scale=data.crop_scale,
            flip=data.flip,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
        return train_batches(crops, first_batch=first, workers=data.workers, device=fabric.device, on_skip=on_skip)

    def first_batches(self, count: int) -> list[Batch]:
        with closing(self.batches(0, self.recipe.run.seed)) as batches:
            return list(islice(batches, count))


@dataclass(frozen=True)
class Constructed:
    """An untrained method, before an image was seen.

    Attributes:
        arguments: every one of `timm.create_model`.
        matched: what became of the weights of `--init`, as text.
        statistics: of the images that those weights are from, where they say it.
        start: where those weights are from, as plain data without paths.
    """

    method: Method
    arguments: dict[str, Any]
    matched: str
    statistics: dict[str, Any] | None
    start: dict[str, Any] | None


def construct(recipe: Recipe, run: Run | None = None) -> Constructed:
    """The untrained method of a recipe, a function of the recipe's seed; a tokenizer is taken from the run where it has
    one.

    Raises:
        InputError: encoder, method and image size do not go together.
    """
    torch.manual_seed(recipe.run.seed)
    settings = dict(recipe.encoder)
    arguments = create_arguments(
        settings.pop("name"),
        image_size=recipe.data.image_size,
        patch_size=settings.pop("patch_size", None),
        in_chans=recipe.data.channels,
        **settings,
    )
    backbone = from_arguments(arguments, recipe.data.image_size)
    statistics, start, matched = None, None, ""
    if recipe.init:
        report, statistics = init_from(backbone, recipe.init)
        start, matched = report.start, f"started from {recipe.init}: {report}"
    options = method_options(recipe, None if run is None else run.tokenizer)
    try:
        method = METHODS[recipe.method["name"]](backbone, **options)  # pyright: ignore[reportCallIssue]
        method.sample(1, *recipe.data.image_size)
        if recipe.run.recompute:
            method.recompute_blocks()
        freeze(backbone, recipe.optimiser.freeze)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # the last of sizes below 0
        raise InputError(f"method {recipe.method['name']}: {error}") from error
    return Constructed(method, arguments, matched, statistics, start)


def check_start(constructed: Constructed, recipe: Recipe) -> None:
    """That a run which is pulled to its start goes on with the start that it had; notes what that is.

    Raises:
        InputError: it is another one.
    """
    if not recipe.optimiser.pull:
        return
    found = hashlib.sha256()
    for name, value in constructed.method.encoder.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if recipe.measured.setdefault("start", found.hexdigest()) != found.hexdigest():
        raise InputError(
            f"--init {recipe.init}: these are other weights than those that the run is pulled to (optimiser.pull); "
            "put back what was there, or begin a new --out"
        )


def standardized(constructed: Constructed, images: ImageSet, shout: Shout) -> Standardize:
    """The transform of the images, which the method takes over."""
    mean, std, statistics = images.mean, images.std, constructed.statistics
    if statistics and images.scaling.same_units(statistics.get("scaling")):
        mean, std = statistics["mean"], statistics["std"]
    elif statistics:
        shout("the images of --init had another range, so mean and deviation are those of these images")
    standardize = Standardize(list(mean), list(std))
    constructed.method.prepare(standardize)
    return standardize


def build(recipe: Recipe, images: ImageSet, run: Run | None = None) -> tuple[Method, Standardize]:
    """The untrained method of a recipe, and the transform of the images."""
    constructed = construct(recipe, run)
    return constructed.method, standardized(constructed, images, silent)


class Opened(NamedTuple):
    """What is listed, before an image was decoded: the images, those that judge (the same, or others), which are pretrained
    on, and how many of these judge too."""

    source: Source
    labelled: Source
    indices: np.ndarray
    seen: int


def open_data(recipe: Recipe, shout: Any) -> Opened:
    """List the images to pretrain on and those to judge by; says what was understood.

    Raises:
        InputError: data that cannot be used; no name of a group's; no image that does not judge.
    """
    settings = recipe.data
    assert settings.path is not None
    source = open_source(settings.path, groups=settings.groups, masks=settings.masks)
    for note in source.notes:
        shout(note)
    labelled = source
    if settings.labels is not None and not same_place(settings.labels, settings.path):
        labelled = open_source(settings.labels, groups=settings.groups)
        for note in labelled.notes:
            shout(f"labels: {note}")
    if settings.groups and not labelled.matched:
        raise InputError(
            f"--groups {settings.groups!r}: no name in {labelled.location} matches, the first is "
            f"{labelled.entries.names[0]}; give a regular expression that does"
        )
    indices, seen = _chosen(source, labelled, settings.all_images, shout)
    if settings.drop_duplicates:
        indices = _without_duplicates(source, labelled, indices, shout)
    return Opened(source, labelled, indices, seen)


def check_unchanged(recipe: Recipe, run: Run, opened: Opened, shout: Any) -> dict[str, Table]:
    """The listings of what a run is trained on and judged by, to be kept as these files of its folder.

    Raises:
        InputError: they differ from those that are kept there, and `data.changed` does not accept that.
    """
    kept = {}
    for name, source in zip(("data", "labels"), dict.fromkeys((opened.source, opened.labelled)), strict=False):
        kept[f"{name}.parquet"], changed = listing(source, run.path / f"{name}.parquet")
        said = f"{source.location} changed since the run began: {changed}"
        if changed and recipe.data.changed == "refuse":
            raise InputError(f"{said}; put back what was there, or go on with --set data.changed=accept")
        if changed:
            shout(f"{said}; going on with what is there now")
    recipe.data.changed = "refuse"  # what was accepted is this change, not the next
    return kept


def load_data(recipe: Recipe, opened: Opened, shout: Any) -> tuple[ImageSet, ProbeSuite]:
    """The images to pretrain on and, where there are labels, those to judge by."""
    settings, (source, labelled, indices, seen) = recipe.data, opened
    scaling = stored_scaling(recipe.measured.get("scaling"))
    if scaling is None and recipe.method.get("tokenizer"):
        scaling = tokenizer_scaling(recipe.method["tokenizer"])

    def load(source: Source, indices: Indices) -> ImageSet:
        return load_images(
            source,
            indices,
            size=settings.image_size,
            channels=settings.channels,
            cache_limit=settings.cache_limit,
            max_pixels=settings.max_pixels,
            workers=settings.workers,
            scaling=scaling,
            nodata=settings.nodata,
            window=settings.window,
        )

    images = load(source, indices)
    scaling = images.scaling  # all that is loaded from here on means the same
    images.skipped[:0] = source.skipped
    shout(
        f"{len(images)} images to pretrain on, {'kept decoded' if images.cached else 'decoded as they are needed'}"
        + (f"; {len(images.skipped)} files skipped (skipped.jsonl)" if images.skipped else "")
    )
    for note in ([] if scaling.plain else [str(scaling)]) + images.notes:
        shout(note)
    if images.pixels is not None:
        side = int(np.median(images.pixels.shapes[:, :2].min(axis=1)))
        if 2 * side <= min(settings.image_size):
            shout(
                f"note: images are {side} px, enlarged to {min(settings.image_size)}: "
                f"--image-size {side} with a smaller --patch-size is many times faster"
            )
    judge = ProbeSuite.of(labelled, load, images, indices, settings.image_size, recipe.run.seed)
    judge.seen = seen
    for part in judge.splits or ():
        if part.images is not images and part.images.skipped:
            first = f"{part.images.skipped[0]['path']}: {part.images.skipped[0]['reason']}"
            shout(f"{len(part.images.skipped)} images to judge by are left out, the first: {first}")
    return images, judge


def _chosen(source: Source, labelled: Source, all_images: bool, shout: Any) -> tuple[np.ndarray, int]:
    """The entries to pretrain on, and how many of them are images that the run is judged by: none, unless it is asked
    for `all_images`."""
    sides = labelled_indices(labelled)
    if labelled is source:
        indices = pretraining_indices(source, all_images=all_images)
        seen = len(np.intersect1d(indices, sides[1])) if sides else 0
    else:  # it is judged by other images, so it needs no hold-out of its own
        indices, judged = pretraining_indices(source, all_images=True), sides[1] if sides else np.empty(0, np.int64)
        if len(judged):
            shout(f"looking for the {len(judged):,} test images of --labels among those to pretrain on ...")
        found = copies(source, indices, labelled, judged)
        seen = len(found) if all_images else 0
        if found:
            named = ", ".join(source.entries[i].name for i in found[:3]) + (", ..." if len(found) > 3 else "")
            shout(f"{len(found):,} images are test images of --labels too ({named})" + ("" if seen else "; left out"))
        if not all_images:
            indices = np.setdiff1d(indices, np.asarray(found, np.int64))
        if len(pretraining_indices(source)) < len(pretraining_indices(source, all_images=True)):
            shout("judged by --labels: the hold-out of the images to pretrain on is not left out")
        if not len(indices):
            raise InputError(
                f"{source.location}: every image is a test image of --labels too; none is left to train on"
            )
    if seen:
        shout(f"--all-images: the probes' test images are among those to pretrain on ({seen:,}, without their labels)")
    return indices, seen


def _without_duplicates(source: Source, labelled: Source, indices: np.ndarray, shout: Any) -> np.ndarray:
    """The entries to pretrain on that look neither like one before them nor like one that is kept apart."""
    sides = labelled_indices(labelled)
    judged = np.setdiff1d(np.arange(len(source.entries)), indices) if labelled is source else sides[1] if sides else []
    found = near_copies(source, indices, labelled, judged)
    first = f" (the first: {source.entries.names[found[0]]})" if len(found) else ""
    shout(f"--drop-duplicates: {len(found):,} of {len(indices):,} images look like another and are left out{first}")
    return np.setdiff1d(indices, found)


def passes(steps: int, batch: int, images: int) -> float:
    """How often so many steps go through the images. A pass is of whole batches (`Crops`); a set smaller than a batch goes
    on in the next pass within one."""
    return steps / (images // batch) if images >= batch else steps * batch / images


def planned_steps(recipe: Recipe, images: int, seconds_per_step: float) -> int:
    """How many steps the recipe's length comes to."""
    length = recipe.run
    if length.steps:
        return length.steps
    if length.minutes:
        return max(1, round(length.minutes * 60 / seconds_per_step))
    return max(1, round((length.epochs or DEFAULT_EPOCHS) / passes(1, recipe.optimiser.batch_size, images)))


def passes_text(steps: int, batch: int, images: int) -> str:
    """How often so many steps go through the images, in words."""
    found = passes(steps, batch, images)
    return f"{found:,.0f} passes" if found >= 10 else f"{found:.3g} pass{'' if found == 1 else 'es'}"


def rate_text(recipe: Recipe) -> str:
    """The learning rate that a batch results in, by which rule."""
    settings = recipe.optimiser
    return f"peak learning rate {peak_lr(recipe):.3g} = {settings.lr:g} x {settings.batch_size} / 256"


def parts_text(local_batch: int, parts: int) -> str:
    """In how many parts, to save memory, a process computes its images of a batch, in words."""
    return "at once" if parts == 1 else f"in {parts} parts of {local_batch // parts}, whose gradients are added up"


TOKENIZER_MINUTES, TOKENIZER_BATCH = 20.0, 128


def tokenizer_length(recipe: Recipe, images: int) -> Duration:
    """Half as long as the run itself, which it comes on top of; at most 20 minutes, or 5,000 steps."""
    if recipe.run.minutes:
        return Duration(TOKENIZER_STEPS, min(TOKENIZER_MINUTES, recipe.run.minutes / 2))
    return Duration(min(TOKENIZER_STEPS, math.ceil(planned_steps(recipe, images, math.nan) / 2)))


def make_words(session: "Session", tokenizer: Tokenizer) -> dict[str, Any]:
    """Make a run's tokenizer, or judge the one it was given: the first process does, and keeps it, the others take it
    over."""
    fabric, run, recipe, images = session.fabric, session.run, session.recipe, session.images
    given, scratch = recipe.method.get("tokenizer"), run.path / "tokenizer.training"
    taken = run.tokenizer if run.tokenizer.is_file() else given  # what `build` read, where it read one

    def make() -> dict[str, Any]:
        making = Making(
            images,
            recipe.data,
            batch_size=min(recipe.optimiser.batch_size, TOKENIZER_BATCH),
            seed=recipe.run.seed,
            device=fabric.device,
            folder=scratch,
            duration=tokenizer_length(recipe, len(images)),
            shout=session.shout,
            clock=session.clock,
            precision=recipe.measured.get("precision"),
        )
        found = make_ready(tokenizer, making)
        if not found["made"] and taken is not None:
            # by an earlier call that was killed, or elsewhere
            found |= {"made": given is None, "seconds": making_seconds(taken)}
        save_tokenizer(tokenizer, run.tokenizer, found["quality"], images.scaling, found["seconds"])
        if scratch.is_dir():
            shutil.rmtree(scratch)
        return found

    found = by_first(make)
    send_out(tokenizer.state_dict().values())
    tokenizer.ready = True
    tokenizer.requires_grad_(False).eval()
    return found


def stepper_for(
    fabric: Fabric, recipe: Recipe, method: Method, standardize: Standardize, compiled: bool = False
) -> Stepper:
    """What makes the steps of a recipe, on Fabric's device."""
    settings = recipe.optimiser
    standardize, method = standardize.to(fabric.device), method.to(fabric.device)
    for part in method.modules():
        if isinstance(part, Backbone | Tokenizer):
            lay_out(part, fabric.device)
    try:
        groups = method.param_groups(peak_lr(recipe), settings.weight_decay, settings.layer_decay)
    except ValueError as error:
        raise InputError(str(error)) from error
    if settings.pull:
        groups = pulled(groups, method.encoder.parameters(), settings.pull)
    return Stepper(
        fabric,
        method,
        adamw(groups, betas=settings.betas),
        lambda batch: standardize(batch.images),
        settings.batch_size,
        _parts(recipe, fabric.world_size),
        settings.clip,
        recipe.run.seed,
        precision=recipe.measured.get("precision", "32"),
        compiled=compiled,
    )


def _parts(recipe: Recipe, processes: int) -> int:
    """In how many parts a process computes its images of a batch: so many that it computes no more at once than when memory
    was measured, which may have been with another number of processes."""
    measured, local_batch = recipe.measured, recipe.optimiser.batch_size // processes
    wanted = recipe.optimiser.accumulation
    if "accumulation" in measured:
        wanted = max(1, math.ceil(measured["accumulation"] * measured.get("processes", processes) / processes))
    return next((parts for parts in range(wanted, local_batch) if local_batch % parts == 0), local_batch)


def peak_lr(recipe: Recipe) -> float:
    """The learning rate at its highest, for the batch size of the recipe."""
    return recipe.optimiser.lr * recipe.optimiser.batch_size / 256


def schedule_of(recipe: Recipe) -> Schedule:
    """The schedule of a run, with a second warm-up where it was made longer."""
    warmup, again = recipe.optimiser.warmup, recipe.measured.get("warm_again")
    if again is None:
        return Schedule(warmup)
    return WarmedAgain(
        warmup, first=again["step"], had=again["rate"] / max(1e-30, peak_lr(recipe)), steps=recipe.measured["steps"]
    )


def warm_again(step: int, steps_before: int, recipe: Recipe) -> str | None:
    """Note in the recipe that its run, which was to end after `steps_before`, has another length from this step on.

    Where the new schedule has a higher rate here than the old one, it warms up again, from the rate that it had.

    Returns:
        What to say of it; None where the rate does not rise.
    """
    steps, peak = recipe.measured["steps"], peak_lr(recipe)
    old = replace(recipe, measured={**recipe.measured, "steps": steps_before})
    had = peak * schedule_of(old).factor(step, step / steps_before)
    recipe.measured.pop("warm_again", None)
    rate = peak * schedule_of(recipe).factor(step, step / steps)
    if rate <= had:
        return None
    recipe.measured["warm_again"] = {"step": step, "rate": had}
    return (
        f"note: {steps} steps in place of {steps_before}: the learning rate was {had:.3g} at step {step}, where the new "
        f"schedule has {rate:.3g}; it warms up again, over {math.ceil(recipe.optimiser.warmup * (steps - step))} steps"
    )


def decide(session: Session) -> Stepper:
    """Make the tokenizer, measure what the machine can do, and write what follows from it into the recipe."""
    recipe, measured, length, fabric = session.recipe, session.recipe.measured, session.recipe.run, session.fabric
    session.standardize.to(fabric.device)
    session.method.to(fabric.device)
    words = session.method.prepare(session.standardize)
    if words is not None and ("tokenizer" not in measured or not words.ready):
        measured["tokenizer"] = make_words(session, words)
        restart_peak()  # what it took is not the run's
    try:
        still = freeze_unreached(session.method, recipe.data.channels, recipe.data.image_size)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(TOO_LARGE) from error
    if still:
        measured["without_gradient"] = still
    stepper = stepper_for(fabric, recipe, session.method, session.standardize, bool(measured.get("compile")))
    machine = {"processes": fabric.world_size, "recompute": recipe.run.recompute}
    if "seconds_per_step" not in measured:
        _measure(session, stepper, session.method.calibrate)
    elif any(measured.get(name, now) != now for name, now in machine.items()):
        _measure(session, stepper)
    measured |= machine
    if "steps" not in measured:
        steps = planned_steps(recipe, len(session.images), measured["seconds_per_step"])
        measured |= {
            "steps": steps,
            "log_every": length.log_every or max(1, steps // 200),
            "probe_every": length.probe_every or max(1, -(-steps // 4)),
            "checkpoint_every": length.checkpoint_every or max(1, round(120 / measured["seconds_per_step"])),
        }
    seconds = measured["seconds_per_step"] * measured["steps"]
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
    batch, local = recipe.optimiser.batch_size, stepper.local_batch
    session.shout(
        f"{batch / measured['seconds_per_step']:.0f} images/s, {measured['memory_gib']:.1f} GiB; "
        f"{measured['steps']} steps of {batch} ({passes_text(measured['steps'], batch, len(session.images))}) take "
        f"{seconds / 60:.1f} min, probes not counted; it would end about {end}"
    )
    session.shout(f"{rate_text(recipe)}; a batch is computed {parts_text(local, stepper.accumulation)}")
    return stepper.compile() if measured["compile"] and not stepper.compiled else stepper


def _measure(session: Session, stepper: Stepper, calibrate: Callable[..., dict[str, Any]] | None = None) -> None:
    """Calibrate the method, at its start, and time its steps, on real batches."""
    fabric, recipe = session.fabric, session.recipe
    session.shout(f"timing a few steps of {recipe.optimiser.batch_size} images ...")
    seen = session.first_batches(4)
    wanted, calibrated = recipe.measured.get("compile"), {}
    if calibrate is not None:
        images = stepper.transform(seen[0])
        calibrated = calibrate(
            images,
            stepper.noise(images, 0),
            lambda number: torch.as_tensor(fabric.all_reduce(number, reduce_op="mean")),
        )
        wanted = {"on": True, "off": False, "auto": None}[recipe.run.compile]
    found = measure(
        stepper,
        seen,
        wanted,
        lambda seconds: planned_steps(recipe, len(session.images), seconds),
        session.shout,
        session.clock,
        exact=bool(recipe.run.minutes),
    )
    recipe.measured |= by_first(lambda: {**calibrated, **found})
