"""The loop of everything that is trained beside pretraining: a classifier, a segmenter, a detector, a tokenizer.

One process on one device. What is random in a step is a function of (seed, step), so a loop that was killed goes on
from its last checkpoint as if nothing had happened. It is as long as steps say, or as minutes on the clock: the
schedule then follows the clock too, so the loop ends in time where the machine slows down.
"""

import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.console import Bar, say
from underpaint.errors import InputError, NotFinite
from underpaint.files import write_json
from underpaint.signals import Interrupted, watched_signals
from underpaint.train.run_folder import Run, restore_state, training_state
from underpaint.train.stepper import step_seed

CHECKPOINT_SECONDS = 120.0
LINES = 200  # of metrics, about
STOP_AFTER = 10  # steps in all without a finite loss
LAST = 50  # steps over which the last loss is averaged
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Length:
    """How long to train: minutes where they are given, else steps."""

    steps: int
    minutes: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """The share that is done."""
        return step / self.steps if self.minutes is None else seconds / (60 * self.minutes)


@dataclass(frozen=True)
class Schedule:
    """Of the learning rate: linear warm-up, then a cosine, or a polynomial of `power`, to `smallest` of the peak."""

    warmup: float
    smallest: float = 0.0
    power: float | None = None

    def factor(self, progress: float) -> float:
        """The rate over its peak, where `progress` (0 to 1) of the training is done."""
        if progress < self.warmup:
            return progress / self.warmup
        done = min(1.0, (progress - self.warmup) / max(1e-12, 1 - self.warmup))
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.power is None else (1 - done) ** self.power
        return self.smallest + (1 - self.smallest) * left


Settings = TypeVar("Settings")


def changed(settings: Settings, given: Mapping[str, Any], what: str) -> Settings:
    """A dataclass of settings with some changed, as `--set NAME=VALUE` gave them, checked by its annotations.

    Raises:
        InputError: no such setting, or a value of another kind.
    """
    kind: Any = type(settings)
    names = [field.name for field in fields(kind)]
    for name in given:
        if name not in names:
            raise InputError(f"--set {name}: a setting of {what} is one of {', '.join(sorted(names))}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "set")
    try:
        parsed = parser.parse_object({"set": dict(given)}, defaults=True).as_dict()["set"]
    except Exception as error:
        raise InputError(" ".join(str(error).split())[:400]) from error
    return replace(settings, **{name: parsed[name] for name in given})  # pyright: ignore[reportArgumentType, reportCallIssue]


def fit(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Callable[[int], Generator[Batch, None, None]],
    loss_of: Callable[[Batch, int], Float[Tensor, ""]],
    *,
    folder: Path,
    length: Length,
    schedule: Schedule,
    seed: int,
    clip: float | None,
    batch_size: int,
    settings: Mapping[str, Any],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Train `model` in place, or go on where `folder` holds a checkpoint; it is in eval mode at the end.

    Args:
        optimiser: the rates of its groups are the peaks (times `lr_scale`, where timm set one).
        batches: gives the batches from a step on.
        loss_of: of a batch at a step.
        clip: largest norm of the gradient; none where None.
        settings: plain data; what differs from those in `folder` is refused.
        clock: seconds, by which training is timed.

    Returns:
        steps, minutes, and the mean loss of the last steps.

    Raises:
        InputError: `folder` holds training with other settings.
        NotFinite: the loss was not finite too often.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(folder, settings)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "bad": 0, "loss": None}
    found = run.load()
    if found is not None:
        restore_state(model, optimiser, found[0])
        state = {name: found[1][name] for name in state}
        for group, step in zip(optimiser.param_groups, found[1]["group_steps"], strict=True):
            if step is not None:  # timm's LAMB counts there, in a tensor
                group["step"] = torch.tensor(step)
        say(f"{folder.name}: going on from step {state['step']}")
    run.drop_after("metrics.jsonl", state["step"])
    peaks = [group["lr"] * group.get("lr_scale", 1.0) for group in optimiser.param_groups]
    recent: deque[float] = deque(maxlen=LAST)
    pending: list[Tensor] = []
    bar = Bar(length.steps, state["step"])
    saved = logged = state["seconds"]
    steps_since, waited = 0, 0.0

    def save() -> None:
        steps = [float(group["step"]) if "step" in group else None for group in optimiser.param_groups]
        run.save(state["step"], training_state(model, optimiser), {**state, "group_steps": steps}, [])

    model.train()
    try:
        with watched_signals() as received, closing(batches(state["step"])) as source:
            while (progress := length.progress(state["step"], state["seconds"])) < 1:
                began = clock()
                batch = next(source)
                waited += clock() - began
                step = state["step"]
                _seed_everything(seed, step)
                for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                    group["lr"] = peak * schedule.factor(progress)
                optimiser.zero_grad(set_to_none=True)
                loss = loss_of(batch, step)
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                _drop_unless(torch.isfinite(loss.detach()), model)
                optimiser.step()
                pending.append(loss.detach())
                state["step"] = step + 1
                state["seconds"] += clock() - began
                steps_since += 1
                done = length.progress(state["step"], state["seconds"])
                bar.expect(round(state["step"] / done))
                bar.step(state["step"])
                every = (60 * length.minutes if length.minutes else state["seconds"] / done) / LINES
                logging = state["seconds"] - logged >= every or done >= 1
                stopping = bool(received) and done < 1
                saving = stopping or done >= 1 or state["seconds"] - saved >= CHECKPOINT_SECONDS
                # losses are read a step late, so that a GPU never waits for Python, unless the step ends here
                while len(pending) > (0 if logging or saving else 1):
                    value = float(pending.pop(0))
                    if math.isfinite(value):
                        recent.append(value)
                        state["loss"] = sum(recent) / len(recent)
                        continue
                    state["bad"] += 1
                    if state["bad"] >= STOP_AFTER:
                        raise NotFinite(f"{folder}: the loss was not finite in {STOP_AFTER} steps; try a lower rate")
                if logging:
                    spent = max(state["seconds"] - logged, 1e-9)
                    line = {"step": state["step"], "seconds": round(state["seconds"], 3), "loss": state["loss"]}
                    line |= {
                        "images_per_second": round(steps_since * batch_size / spent, 2),
                        "data_wait": round(waited / spent, 4),
                    }
                    run.append("metrics.jsonl", [line])
                    bar.line({**line, "terms": {}})
                    logged, steps_since, waited = state["seconds"], 0, 0.0
                if saving:
                    save()
                    saved = state["seconds"]
                if stopping:
                    raise Interrupted(received[0])
    finally:
        bar.close()
    model.eval()
    return {"steps": state["step"], "minutes": state["seconds"] / 60, "loss": state["loss"]}


def _drop_unless(finite: Tensor, model: nn.Module) -> None:
    """Set every gradient to zero where the loss was not finite; nothing here waits for the device.

    Weights then move by what the optimiser still holds (momentum, decay), and no further.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = torch.where(finite, parameter.grad, 0.0)


def _seed_everything(seed: int, step: int) -> None:
    """torch for drop path and sampling, numpy for timm's mixup, Python's for timm's RandAugment."""
    drawn = step_seed(seed, step, 0)
    torch.manual_seed(drawn)
    np.random.seed(drawn % 2**32)
    random.seed(drawn)


def _same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    file, wanted = folder / "settings.json", json.loads(json.dumps(settings))
    if file.is_file():
        stored = json.loads(file.read_text())
        differ = sorted(name for name in stored | wanted if stored.get(name) != wanted.get(name))
        if differ:
            shown = "; ".join(f"{name} {stored.get(name)} there, {wanted.get(name)} here" for name in differ[:3])
            raise InputError(f"--out: {folder} holds training with other settings ({shown}); choose another path")
    else:
        write_json(file, wanted)
