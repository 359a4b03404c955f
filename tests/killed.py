"""This process ends with SIGKILL, or is told to end, at a chosen moment of the command that it runs; what its steps see."""

import functools
import importlib
import json
import os
import signal
import threading
from typing import Any

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from underpaint.evaluation.probes import ProbeSuite
from underpaint.methods.method import Method
from underpaint.train.loop import _Writing
from underpaint.train.run_folder import Run
from underpaint.train.speed import TINY_FACTOR
from underpaint.train.stepper import Stepper

seen = 0


def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch look for processes that ended after 0.2 seconds, not 5."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def dying(function: Any, count: int, before_dying: Any = None) -> Any:
    """`function`, whose `count`-th call is the last thing that this process does."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        global seen
        seen += 1
        if seen == count:
            if before_dying:
                before_dying(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return wrapped


def told(function: Any, count: int, number: int = signal.SIGTERM) -> Any:
    """`function`, at whose `count`-th call this process is told to end."""
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    return wrapped


def failing(function: Any, count: int) -> Any:
    """`function`, whose `count`-th call goes wrong."""
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise ValueError("something\nis wrong here")
        return function(*arguments, **named)

    return wrapped


def written(*_: Any) -> None:
    """Until the checkpoint that is written beside the training is there, so that a test knows which one is the last."""
    for thread in threading.enumerate():
        if type(thread) is _Writing:
            thread.join()


def half_a_checkpoint(run: Run, step: int, *_: Any) -> None:
    part = run.path / "checkpoints" / f"step-{step:09d}.0.part"
    part.mkdir()
    (part / "state.safetensors").write_bytes(b"half of a checkpoint")


def stepping(function: Any) -> Any:
    """`function` in place of a pretraining's steps; those measured before it and a tokenizer's are left as they are."""
    real = Stepper.step

    def step(current: Stepper, batch: Any, number: int, factor: float) -> Any:
        pretrains = isinstance(current.task, Method) and factor != TINY_FACTOR
        return (function if pretrains else real)(current, batch, number, factor)

    return step


def record(file: str) -> None:
    """From here on every step of pretraining is a line of a file: its number, its rank and the images it was given."""
    real = Stepper.step

    def step(current: Stepper, batch: Any, number: int, factor: float) -> Any:
        line = {"step": number, "rank": current.fabric.global_rank, "samples": [int(k) for k in batch.samples]}
        with open(file, "a") as lines:
            lines.write(json.dumps(line) + "\n")
        return real(current, batch, number, factor)

    Stepper.step = stepping(step)


def arm(moment: str, count: int) -> None:
    """From here on this process ends at the `count`-th event of that kind: step, save, probe, judge, term, usr1 or fails; or, for
    "kill MODULE:NAME" and "term MODULE:NAME", with SIGKILL or SIGTERM at the `count`-th call of that function."""
    if ":" in moment:
        how, _, function = moment.partition(" ")
        module, _, name = function.partition(":")
        *owners, last = name.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        calling = dying if how == "kill" else told
        setattr(owner, last, calling(getattr(owner, last), count))
    elif moment == "step":
        Stepper.step = stepping(dying(Stepper.step, count, written))
    elif moment == "save":
        Run.save = dying(Run.save, count, half_a_checkpoint)
    elif moment == "probe":
        ProbeSuite.quick = dying(ProbeSuite.quick, count)
    elif moment == "judge":  # trained, and the last checkpoint written
        ProbeSuite.restoration = dying(ProbeSuite.restoration, count)
    elif moment in ("term", "usr1"):
        number = {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}[moment]
        Stepper.step = stepping(told(Stepper.step, count, number))
    elif moment == "fails":
        Stepper.step = stepping(failing(Stepper.step, count))
