"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2: an answer at once, or between two steps of a training.

A command is left at once wherever it is: files are whole or not there (`files.py`). A training that is told to end makes its
step and a checkpoint first; told twice, it leaves at once, too. SIGUSR1 and SIGUSR2 are what schedulers are asked to send some
time before a job's end (SLURM: `--signal=USR1@300`). After SIGUSR1 a job of SLURM is queued again.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REQUEUES = getattr(signal, "SIGUSR1", None)
WATCHED = (
    signal.SIGINT,
    signal.SIGTERM,
    *(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)),
)


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 came. As KeyboardInterrupt, it is none of the errors that are caught and gone on
    from.

    Attributes:
        kept: what an equal call finds, for the person who interrupted.
        requeued: whether SLURM was asked to queue the job again.
    """

    def __init__(self, signal_number: int, kept: str = ""):
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number, self.kept, self.requeued = signal_number, kept, False


def requeue(interruption: Interrupted) -> None:
    """Have a job of SLURM queued again where SIGUSR1 came, once, by its first process; `kept` says what became of it."""
    job, rank = os.environ.get("SLURM_JOB_ID"), os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if interruption.signal_number != REQUEUES or job is None or rank != "0" or interruption.requeued:
        return
    interruption.requeued = True
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        wrong = " ".join(done.stderr.split()) or f"status {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        wrong = str(error)
    said = f"job {job} " + (f"could not be queued again ({wrong})" if wrong else "is queued again")
    interruption.kept = f"{interruption.kept}; {said}" if interruption.kept else said


@contextmanager
def answered_signals() -> Iterator[None]:
    """Inside, each of the signals raises `Interrupted` at once; another one while that is under way ends the process."""

    def leave(number: int, _: Any) -> None:
        for each in WATCHED:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    with _handled(leave):
        yield


@contextmanager
def watched_signals(told: str = "") -> Iterator[list[int]]:
    """Inside, the first of the signals fills a list, and is answered with a line on standard error; the next one raises
    `Interrupted`. Threads other than the main one are told nothing."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)
        if told:
            os.write(2, f"underpaint: {told}\n".encode())  # print() may be interrupted in the middle of itself

    with _handled(note):
        yield received


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in WATCHED}
    try:
        for number in WATCHED:
            signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
