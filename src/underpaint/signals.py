"""Ctrl-C and SIGTERM, met between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; a checkpoint was written."""

    def __init__(self, signal_number: int):
        super().__init__(f"interrupted by signal {signal_number}")
        self.signal_number = signal_number


_watching: list[int] | None = None


@contextmanager
def watched_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM fill a list instead of ending the process; a second one ends it as usual. Inside of another watch
    the list is the same."""
    global _watching
    if _watching is not None:
        yield _watching
        return
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    watched = (signal.SIGINT, signal.SIGTERM)
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in watched}

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in watched:
        signal.signal(number, note)
    _watching = received
    try:
        yield received
    finally:
        _watching = None
        for number in watched:
            signal.signal(number, previous[number])
