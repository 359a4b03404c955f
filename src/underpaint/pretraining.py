"""From images to a pretrained encoder: one loop on Lightning Fabric.

Everything random in a step is a function of (seed, step), so a run that was killed and started again makes exactly
the steps that it would have made. What was measured at the start is written into the recipe; a resumed run decides
nothing again.
"""

import copy
import math
import shutil
import signal
import time
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch.utils.tensorboard import SummaryWriter

from underpaint.backbones import create_arguments, from_arguments, init_from, save_encoder
from underpaint.console import Bar, say
from underpaint.data import (
    Batch,
    ImageSet,
    Source,
    copies,
    labelled_indices,
    load_images,
    open_source,
    pretraining_indices,
    same_place,
    stored_scaling,
    train_batches,
)
from underpaint.errors import InputError, NotFinite
from underpaint.evaluate.probes import ProbeSuite
from underpaint.evaluate.visualizations import write_visualizations
from underpaint.files import finite
from underpaint.methods import METHODS, Method
from underpaint.patches import Standardize
from underpaint.pictures import sheet
from underpaint.recipes.recipe import Recipe, method_options
from underpaint.recipes.request import DEFAULT_EPOCHS, FLAGS, resolve
from underpaint.report import write_report
from underpaint.signals import Interrupted, watched_signals
from underpaint.tokenize import STEPS as TOKENIZER_STEPS
from underpaint.tokenize import make_ready
from underpaint.tokenizers import Tokenizer, making_seconds, save_tokenizer, tokenizer_scaling
from underpaint.train.fit import Length
from underpaint.train.run_folder import Run, environment, restore_state, training_state
from underpaint.train.speed import measure, out_of_memory, restart_peak, warm
from underpaint.train.stepper import Session, Window, rate_at, scaler_of, session, update, warm_again

ROLL_BACK_AFTER, STOP_AFTER = 3, 10  # steps in a row without a finite gradient; such steps in all


def build(recipe: Recipe, images: ImageSet, run: Run | None = None) -> tuple[Method, Standardize, dict[str, Any], str]:
    """The untrained method of a recipe, a function of the recipe's seed; also what `--init` matched, as text.

    A tokenizer is taken from the run where it has one.
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
    backbone = from_arguments(arguments)
    mean, std, matched = images.mean, images.std, ""
    if recipe.init:
        report, statistics = init_from(backbone, recipe.init)
        matched = f"started from {recipe.init}: {report}"
        if statistics and images.scaling.same_units(statistics.get("scaling")):
            mean, std = statistics["mean"], statistics["std"]
        elif statistics:
            matched += "; its images had another range, so mean and deviation are those of these images"
    options = method_options(recipe, None if run is None else run.tokenizer)
    try:
        method = METHODS[recipe.method["name"]](backbone, **options)  # pyright: ignore[reportCallIssue]
        method.sample(1, *recipe.data.image_size)
    except (TypeError, ValueError) as error:
        raise InputError(f"method {recipe.method['name']}: {error}") from error
    standardize = Standardize(list(mean), list(std))
    method.prepare(standardize)
    return method, standardize, arguments, matched


def pretrain(
    data: str | Path,
    out: str | Path,
    *,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
    pause: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **flags: Any,
) -> Run:
    """Pretrain an encoder on the images in `data`; where `out` holds a run, go on with it.

    Args:
        data: a folder, archive, parquet file, `hf:NAME[:SPLIT]` or `wds:PATTERN`.
        out: the run folder.
        recipe: a shipped name or a YAML file.
        settings: any values of the recipe by path, `{"method.mask_ratio": 0.6}`.
        pause: seconds of training in all after which this call ends, with a probe and a checkpoint; the next call
            goes on. A comparison trains its methods in turn so, and judges them itself. `minutes` are then minutes on
            the clock, which the schedule follows, and no number of steps.
        clock: seconds, by which a run is timed; another one makes what a clock decides repeatable.
        flags: the common ones by short name: method, encoder, patch_size, image_size, labels, groups,
            all_images, workers, batch_size, init, epochs, steps, minutes, seed, precision, devices, nodes, probe_every,
            checkpoint_every.

    Raises:
        InputError: settings or data that cannot be used, in one line.
        NotFinite: the loss stayed not finite; the last good checkpoint is kept.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    if unknown := sorted(set(flags) - set(FLAGS)):
        raise InputError(f"pretrain: no argument '{unknown[0]}'; there are: {', '.join(FLAGS)}")
    if isinstance(size := flags.get("image_size"), int):
        flags["image_size"] = (size, size)
    run = Run(out)
    chosen, resumed = resolve(data, run.path, recipe, flags, settings or {})
    if not resumed:
        for name in ("tokenizer", "steps_before", "warm_again"):  # of the run that this recipe is from
            chosen.measured.pop(name, None)
    fabric = make_fabric(chosen)
    world = fabric.world_size * chosen.optimiser.accumulation
    if chosen.optimiser.batch_size % world:
        raise InputError(
            f"optimiser.batch_size: {chosen.optimiser.batch_size} does not divide among "
            f"{fabric.world_size} processes x {chosen.optimiser.accumulation} parts"
        )
    main = fabric.is_global_zero
    shout = say if main and pause is None else _silent  # a comparison has said it once
    with fabric.rank_zero_first():  # the first one fills the cache, the others find it
        images, judge = open_data(chosen, shout)
    method, standardize, arguments, matched = build(chosen, images, run)
    if matched:
        shout(matched)
    if resumed and "scaling" not in chosen.measured and not images.scaling.plain:
        raise InputError(f"--out {run.path}: holds a run that did not record the range of its images; start another")
    chosen.measured["scaling"] = images.scaling.stored()
    if main:
        run.create(chosen)
        known = {line["path"] for line in run.lines("skipped.jsonl")}
        skipped = {line["path"]: line for line in images.skipped + judge.skipped}  # of what is held out too
        run.append("skipped.jsonl", [line for path, line in skipped.items() if path not in known])
        run.write_json("environment.json", environment())
    fabric.barrier()
    try:
        with watched_signals() as received:
            _train(fabric, run, chosen, resumed, images, judge, method, standardize, arguments, received, pause, clock)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        half = max(1, chosen.optimiser.batch_size // 2)
        raise InputError(
            f"out of memory with a batch of {chosen.optimiser.batch_size}; try --batch-size {half} in a new --out, "
            "or --set optimiser.accumulation=2"
        ) from error
    return run


def _silent(text: str) -> None:
    pass


def make_fabric(recipe: Recipe) -> Fabric:
    """Devices, precision and processes."""
    cuda = torch.cuda.is_available()
    precision = recipe.measured.get("precision") or recipe.run.precision
    if precision == "auto":
        # bfloat16 on a CPU without native support is many times slower than float32
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    recipe.measured["precision"] = precision
    if cuda:
        torch.set_float32_matmul_precision("high")
    devices: int | str = recipe.run.devices or ("auto" if cuda else 1)
    several = recipe.run.nodes > 1 or (devices if isinstance(devices, int) else torch.cuda.device_count()) > 1
    kinds: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=devices,
        num_nodes=recipe.run.nodes,
        # one process makes a tokenizer, or judges, while the others wait
        strategy=DDPStrategy(timeout=timedelta(hours=3)) if several else "auto",
        precision=kinds[precision],
    )
    fabric.launch()
    return fabric


def open_data(recipe: Recipe, shout: Any) -> tuple[ImageSet, ProbeSuite]:
    """The images to pretrain on and, where there are labels, those to judge by; says what was understood."""
    settings = recipe.data
    assert settings.path is not None
    source = open_source(settings.path, groups=settings.groups)
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
            f"{labelled.entries[0].name}; give a regular expression that does"
        )
    scaling = stored_scaling(recipe.measured.get("scaling"))
    if scaling is None and recipe.method.get("tokenizer"):
        scaling = tokenizer_scaling(recipe.method["tokenizer"])

    def load(opened: Any, indices: list[int]) -> ImageSet:
        return load_images(
            opened,
            indices,
            size=settings.image_size,
            channels=settings.channels,
            cache_limit=settings.cache_limit,
            max_pixels=settings.max_pixels,
            workers=settings.workers,
            scaling=scaling,
            nodata=settings.nodata,
        )

    indices, seen = _chosen(source, labelled, settings.all_images, shout)
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


def _chosen(source: Source, labelled: Source, all_images: bool, shout: Any) -> tuple[list[int], int]:
    """The entries to pretrain on, and how many of them are images that the run is judged by: none, unless it is asked
    for `all_images`."""
    sides = labelled_indices(labelled)
    if labelled is source:
        indices = pretraining_indices(source, all_images=all_images)
        seen = len(set(indices) & set(sides[1])) if sides else 0
    else:  # it is judged by other images, so it needs no hold-out of its own
        indices, judged = pretraining_indices(source, all_images=True), sides[1] if sides else []
        if judged:
            shout(f"looking for the {len(judged):,} test images of --labels among those to pretrain on ...")
        found = copies(source, indices, labelled, judged)
        seen = len(found) if all_images else 0
        if found:
            named = ", ".join(source.entries[i].name for i in found[:3]) + (", ..." if len(found) > 3 else "")
            shout(f"{len(found):,} images are test images of --labels too ({named})" + ("" if seen else "; left out"))
        if not all_images:
            indices = sorted(set(indices) - set(found))
        if len(pretraining_indices(source)) < len(pretraining_indices(source, all_images=True)):
            shout("judged by --labels: the hold-out of the images to pretrain on is not left out")
        if not indices:
            raise InputError(
                f"{source.location}: every image is a test image of --labels too; none is left to train on"
            )
    if seen:
        shout(f"--all-images: the probes' test images are among those to pretrain on ({seen:,}, without their labels)")
    return indices, seen


def planned_steps(recipe: Recipe, images: int, seconds_per_step: float) -> int:
    """How many steps the recipe's length comes to."""
    length = recipe.run
    if length.steps:
        return length.steps
    if length.minutes:
        return max(1, round(length.minutes * 60 / seconds_per_step))
    return max(1, round((length.epochs or DEFAULT_EPOCHS) * images / recipe.optimiser.batch_size))


TOKENIZER_MINUTES, TOKENIZER_BATCH = 20.0, 128


def tokenizer_length(recipe: Recipe, images: int) -> Length:
    """Half as long as the run itself, which it comes on top of; at most 20 minutes, or 5,000 steps."""
    if recipe.run.minutes:
        return Length(TOKENIZER_STEPS, min(TOKENIZER_MINUTES, recipe.run.minutes / 2))
    return Length(min(TOKENIZER_STEPS, math.ceil(planned_steps(recipe, images, math.nan) / 2)))


def _words(
    fabric: Fabric,
    run: Run,
    recipe: Recipe,
    images: ImageSet,
    tokenizer: Tokenizer,
    clock: Callable[[], float],
    shout: Any,
) -> dict[str, Any]:
    """Make a run's tokenizer, or judge the one it was given: the first process does, and keeps it, the others take it
    over."""
    given, scratch = recipe.method.get("tokenizer"), run.path / "tokenizer.training"
    taken = run.tokenizer if run.tokenizer.is_file() else given  # what `build` read, where it read one
    found: Any = None
    if fabric.is_global_zero:
        try:
            found = make_ready(
                tokenizer,
                images,
                recipe.data,
                batch_size=min(recipe.optimiser.batch_size, TOKENIZER_BATCH),
                seed=recipe.run.seed,
                device=fabric.device,
                folder=scratch,
                length=tokenizer_length(recipe, len(images)),
                shout=shout,
                clock=clock,
            )
            if not found["made"] and taken is not None:
                # by an earlier call that was killed, or elsewhere
                found |= {"made": given is None, "seconds": making_seconds(taken)}
            save_tokenizer(tokenizer, run.tokenizer, found["quality"], images.scaling, found["seconds"])
            if scratch.is_dir():
                shutil.rmtree(scratch)
        except (InputError, NotFinite) as error:
            found = error
    found = fabric.broadcast(found)
    if isinstance(found, Exception):
        raise found
    for tensor in tokenizer.state_dict().values():
        tensor.copy_(fabric.broadcast(tensor))
    tokenizer.ready = True
    tokenizer.requires_grad_(False).eval()
    return found


def _decide(fabric: Fabric, run: Run, recipe: Recipe, images: ImageSet, current: Session, shout: Any) -> Session:
    """Measure what the machine can do, and write what follows from it into the recipe."""
    measured, length = recipe.measured, recipe.run
    words = current.method.prepare(current.standardize)
    if words is not None and ("tokenizer" not in measured or not words.ready):
        measured["tokenizer"] = _words(fabric, run, recipe, images, words, current.clock, shout)
        restart_peak()  # what it took is not the run's
    if "seconds_per_step" not in measured:
        batches = _batches(current, images, 0, None)
        seen = [next(batches) for _ in range(4)]
        batches.close()
        calibrated = current.method.calibrate(
            current.standardize(seen[0].images),
            current.noise(seen[0], 0),
            lambda number: torch.as_tensor(fabric.all_reduce(number, reduce_op="mean")),
        )
        wanted = {"on": True, "off": False, "auto": None}[length.compile]
        found = measure(current, seen, wanted, lambda seconds: planned_steps(recipe, len(images), seconds), shout)
        measured |= fabric.broadcast({**calibrated, **found})
    if "steps" not in measured:
        steps = planned_steps(recipe, len(images), measured["seconds_per_step"])
        measured |= {
            "steps": steps,
            "log_every": length.log_every or max(1, steps // 200),
            "probe_every": length.probe_every or max(1, -(-steps // 4)),
            "checkpoint_every": length.checkpoint_every or max(1, round(120 / measured["seconds_per_step"])),
        }
    seconds = measured["seconds_per_step"] * measured["steps"]
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
    shout(
        f"{recipe.optimiser.batch_size / measured['seconds_per_step']:.0f} images/s, {measured['memory_gib']:.1f} GiB; "
        f"{measured['steps']} steps of {recipe.optimiser.batch_size} take {seconds / 60:.1f} min, "
        f"probes not counted; it would end about {end}"
    )
    if measured["compile"] and not current.compiled:
        return session(fabric, recipe, current.method, current.standardize, True, current.clock)
    return current


def _batches(current: Session, images: ImageSet, first: int, on_skip: Any) -> Generator[Batch, None, None]:
    recipe, fabric = current.recipe, current.fabric
    return train_batches(
        images,
        size=recipe.data.image_size,
        batch_size=recipe.optimiser.batch_size,
        seed=current.seed,
        first_batch=first,
        workers=recipe.data.workers,
        crop_scale=recipe.data.crop_scale,
        flip=recipe.data.flip,
        rank=fabric.global_rank,
        world=fabric.world_size,
        device=fabric.device,
        on_skip=on_skip,
    )


def _train(
    fabric: Fabric,
    run: Run,
    recipe: Recipe,
    resumed: bool,
    images: ImageSet,
    judge: ProbeSuite,
    method: Method,
    standardize: Standardize,
    arguments: dict[str, Any],
    received: list[int],
    pause: float | None,
    clock: Callable[[], float],
) -> None:
    """The loop, from the start or the last checkpoint to the end of the run or to `pause` seconds of training."""
    main = fabric.is_global_zero
    shout = say if main and pause is None else _silent
    untrained = copy.deepcopy(method.encoder)
    current = session(fabric, recipe, method, standardize, bool(recipe.measured.get("compile")), clock)
    current = _decide(fabric, run, recipe, images, current, shout)
    if current.compiled:
        batches = _batches(current, images, 0, None)
        warm(current, next(batches))
        batches.close()
    measured, window, scaler = recipe.measured, Window(), scaler_of(fabric)
    total, batch_size = measured["steps"], recipe.optimiser.batch_size
    # in turns by the clock: a plan in steps is as good as the moment in which a step was timed
    length = Length(total, None if pause is None else recipe.run.minutes)
    state: dict[str, Any] = {
        "step": 0,
        "seconds": 0.0,
        "passed": 0.0,  # of them when last looked at: on the first process, whose clock is that of all
        "bad": 0,
        "in_a_row": 0,
        "rollbacks": 0,
        "best": None,
        "best_step": None,
    }
    if main:
        run.write_recipe(recipe)

    def load() -> bool:
        """Take up the last checkpoint, if there is one."""
        found = run.load()
        if found is None:
            return False
        tensors, numbers = found
        restore_state(method, current.optimiser, tensors)
        window.load(tensors, numbers, fabric.device)
        # an earlier version's checkpoints do not have all of it
        state.update(passed=numbers["seconds"], in_a_row=0)
        state.update({key: numbers[key] for key in state if key in numbers})
        if scaler is not None and numbers.get("scaler"):
            scaler.load_state_dict(numbers["scaler"])
        if main:
            run.drop_after("metrics.jsonl", state["step"])
        return True

    going_on = load() if resumed else False
    fabric.barrier()
    if main and not going_on:
        run.drop_after("metrics.jsonl", -1)
    if going_on:
        shout(f"going on from step {state['step']} of {total}")
    if (before := measured.pop("steps_before", None)) is not None:
        if going_on and (note := warm_again(state["step"], before, recipe)):
            shout(note)
        if main:
            run.write_recipe(recipe)
    board = Boards(run, recipe, state["step"] if going_on else None) if main else None
    reported = {line["path"] for line in run.lines("skipped.jsonl")} if main else set()

    def note_skip(line: dict[str, Any]) -> None:
        if main and line["path"] not in reported:
            reported.add(line["path"])
            run.append("skipped.jsonl", [line])
            bar.above(f"skipped {line['path']}: {line['reason']}")

    def save() -> None:
        if main:
            tensors = training_state(method, current.optimiser) | window.state()
            keep = [k for k in (state["best_step"],) if k is not None]
            scale = None if scaler is None else scaler.state_dict()
            run.save(state["step"], tensors, {**state, "window": window.names, "scaler": scale}, keep)
            save_encoder(
                run.path,
                judge.recalibrate_bn(method.encoder, current.standardize),
                arguments,
                standardize,
                images.scaling,
            )
        fabric.barrier()

    def rate(step: int) -> float:
        return rate_at(step, recipe, None if length.minutes is None else length.progress(step, state["passed"]))

    def log(step: int, waited: float, since: float, steps: int, probe: dict[str, float] | None) -> None:
        """One line of metrics; the window's means, or nothing but the probe at step 0."""
        means = window.means(fabric)
        window.reset()
        if not main:
            return
        spent = max(since, 1e-9)
        line = {
            "step": step,
            "images": step * batch_size,
            "seconds": round(state["seconds"], 3),
            "loss": means.pop("loss", None),
            "gradient_norm": means.pop("gradient_norm", None),
            "terms": means,
            "lr": rate(step),
            "images_per_second": round(steps * batch_size / spent, 1),
            "data_wait": round(waited / spent, 4),
        }
        if probe:
            line["probe"] = probe
            value = probe.get("linear", -(line["loss"] or float("inf")))  # the loss where there are no labels
            if math.isfinite(value) and (state["best"] is None or value > state["best"]):
                state.update(best=value, best_step=step)
        run.append("metrics.jsonl", [line])
        assert board is not None
        board.write(finite(line))
        bar.line(line)

    bar = Bar(total, state["step"], enabled=main)
    try:
        if not going_on:
            log(0, 0.0, 0.0, 0, _look(run, judge, current, 0, main))
            save()
        ended = length.progress(state["step"], state["passed"]) >= 1
        while not ended:  # once, and again after every roll-back
            current.seed = recipe.run.seed + 1_000_003 * state["rollbacks"]  # other batches than those that failed
            pending, waited, since, steps = [], 0.0, 0.0, 0
            batches = _batches(current, images, state["step"], note_skip)
            rolled = False
            try:
                while not (ended or rolled):
                    began = clock()
                    batch = next(batches)
                    waited += clock() - began
                    step = state["step"]
                    numbers, bad = update(current, batch, step, rate(step))
                    window.add(numbers, bad)
                    state["step"] = step = step + 1
                    pending.append((step, bad, batch.samples))
                    due = fabric.world_size == 1 or step % measured["log_every"] == 0
                    if due:  # several processes ask each other now and then
                        state["passed"] = fabric.broadcast(state["seconds"] + clock() - began)
                    progress = length.progress(step, state["passed"])
                    ended = progress >= 1
                    pausing = due and not ended and pause is not None and state["passed"] >= pause
                    probing = step % measured["probe_every"] == 0 or ended or pausing
                    logging = step % measured["log_every"] == 0 or probing
                    stopping = due and not ended and _agreed(fabric, bool(received))
                    saving = step % measured["checkpoint_every"] == 0 or probing or stopping
                    # flags are read a step late, so that a GPU never waits for Python, unless the step ends here
                    while len(pending) > (0 if logging or saving else 1):
                        _count_bad(run, images, pending.pop(0), state, bar)
                        rolled = rolled or state["in_a_row"] >= ROLL_BACK_AFTER
                    spent = clock() - began
                    state["seconds"] += spent
                    since, steps = since + spent, steps + 1
                    if length.minutes and due:
                        bar.expect(max(step, round(step / progress)))
                    bar.step(step)
                    if rolled:
                        break
                    if logging:
                        log(
                            step,
                            waited,
                            since,
                            steps,
                            _look(run, judge, current, step, main) if probing else None,
                        )
                        waited, since, steps = 0.0, 0.0, 0
                    if saving:
                        save()
                    if stopping:
                        raise Interrupted(received[0] if received else signal.SIGTERM)
                    if length.minutes and (ended or pausing):
                        # as many as there were, or will be where the machine stays as it is
                        measured["steps"] = step if ended else max(step + 1, round(step / progress))
                        if main:
                            run.write_recipe(recipe)
                    if pausing:
                        return
            finally:
                batches.close()
            if rolled:
                # the time is spent, whatever became of it
                failed = {key: state[key] for key in ("seconds", "passed", "bad")}
                failed["rollbacks"] = state["rollbacks"] + 1
                step, ended = state["step"], False
                if not load():
                    raise NotFinite("the loss is not finite from the first step on; try a lower --set optimiser.lr")
                state.update(failed, in_a_row=0)
                if board is not None:
                    board.back_to(state["step"])
                bar.above(f"step {step}: {ROLL_BACK_AFTER} steps in a row not finite; back to step {state['step']}")
                fabric.barrier()  # the others read the checkpoint that is written anew now
                save()  # so that a kill from here on does not forget that the data moved on
    finally:
        bar.close()
        if board is not None:
            board.close()
    if main and pause is None:
        start = f"start ({recipe.init})" if recipe.init else "untrained encoder"
        report = {"restoration": judge.restoration(method, current.standardize)}
        report |= judge.final(method.encoder, untrained.to(fabric.device), current.standardize, start, shout)
        run.write_json("probes.json", report)
        mine, other = (judge.recalibrate_bn(encoder, current.standardize) for encoder in (method.encoder, untrained))
        write_visualizations(mine, other, judge, current.standardize, run.path / "pictures")
        write_report(run.path)
        shout(f"done: {run.path / 'encoder.safetensors'}, {run.path / 'report.html'}")
    fabric.barrier()


def _agreed(fabric: Fabric, wanted: bool) -> bool:
    """Whether any process wants it."""
    if fabric.world_size == 1:
        return wanted
    flag = fabric.all_reduce(torch.tensor(float(wanted), device=fabric.device), reduce_op="sum")
    return bool(torch.as_tensor(flag) > 0)


def _count_bad(run: Run, images: ImageSet, seen: Any, state: dict[str, Any], bar: Bar) -> None:
    """Count the steps, and those in a row, without a finite gradient; names the images of such a step."""
    step, bad, samples = seen
    if not bad.item():
        state["in_a_row"] = 0
        return
    state["bad"] += 1
    state["in_a_row"] += 1
    names = [images.names[k] for k in samples]
    line = {"step": step, "paths": names}
    if line not in run.lines("not-finite.jsonl"):  # a step that is made again after a kill
        run.append("not-finite.jsonl", [line])
    bar.above(f"step {step}: not finite, batch left out ({', '.join(names[:3])}, ...; all in not-finite.jsonl)")
    if state["bad"] >= STOP_AFTER:
        raise NotFinite(
            f"the loss stayed not finite ({state['bad']} batches, the last at step {step}); the last good checkpoint is "
            f"kept in {run.path / 'checkpoints'}; try a lower --set optimiser.lr"
        )


def _look(run: Run, judge: ProbeSuite, current: Session, step: int, main: bool) -> dict[str, float] | None:
    """A probe and a picture of where the run stands; training's randomness is not touched."""
    if not main:
        return None
    images = current.standardize(judge.shown(current.fabric.device))
    was = current.method.training
    current.method.eval()
    frames = current.method.restore(images)
    current.method.train(was)
    sheet(
        {caption: current.standardize.inverse(frame) for caption, frame in frames.items()},
        run.path / "pictures" / f"restore-{step:08d}.png",
    )
    return judge.quick(current.method.encoder, current.standardize)


class Boards:
    """TensorBoard always; Weights & Biases and MLflow where the recipe asks for them."""

    def __init__(self, run: Run, recipe: Recipe, resumed_at: int | None):
        purge = None if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge)
        self.others: list[Any] = []
        for name in recipe.run.loggers:
            try:
                from lightning.pytorch import loggers

                kinds = {"wandb": loggers.WandbLogger, "mlflow": loggers.MLFlowLogger}
                if name not in kinds:
                    raise InputError(f"run.loggers: no logger '{name}'; there are: {', '.join(kinds)}")
                self.others.append(kinds[name](save_dir=str(run.path), name=run.path.name))
            except ImportError as error:
                raise InputError(f"run.loggers: {name} is not installed; pip install underpaint[{name}]") from error

    def write(self, line: dict[str, Any]) -> None:
        flat = {key: line[key] for key in ("loss", "lr", "gradient_norm", "images_per_second", "data_wait")}
        flat |= {f"terms/{key}": value for key, value in line["terms"].items()}
        flat |= {f"probe/{key}": value for key, value in line.get("probe", {}).items()}
        numbers = {key: value for key, value in flat.items() if value is not None}
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, line["step"])
        for other in self.others:
            other.log_metrics(numbers, step=line["step"])

    def back_to(self, step: int) -> None:
        """Forget what TensorBoard was told of later steps, which are made again."""
        self.writer.close()
        self.writer = SummaryWriter(self.writer.log_dir, purge_step=step + 1)

    def close(self) -> None:
        self.writer.close()
        for other in self.others:
            other.finalize("success")
