"""Ctrl-C, SIGTERM and SIGUSR2: an answer at once, or between two steps of a training.

A command is left at once wherever it is: files are whole or not there (`files.py`). A training that is told to end makes its
step and a checkpoint first; told twice, it leaves at once, too. SIGUSR2 is what schedulers are asked to send some time
before a job's end (SLURM: `--signal=B:USR2@120`).
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else []))


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGUSR2 came. As KeyboardInterrupt, it is none of the errors that are caught and gone on from.

    Attributes:
        kept: what an equal call finds, for the person who interrupted.
    """

    def __init__(self, signal_number: int, kept: str = ""):
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number, self.kept = signal_number, kept


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
