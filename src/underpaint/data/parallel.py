"""Apply a function to the numbers 0, 1, 2, ... in worker processes, results in order."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from multiprocessing import connection
from typing import Any, Generic, TypeVar

from underpaint.errors import InputError
from underpaint.signals import WATCHED

T = TypeVar("T")
MANY = 2_000  # images from which on it pays to start processes for one pass over them
# forked processes share the index of the images, start at once, and run no script of the user's a second time
FORK = "fork" if sys.platform == "linux" else None


class WorkerLost(InputError):
    """A worker process ended while it computed; `number` is the signal that ended it, 0 where that is not known."""

    def __init__(self, number: int):
        self.number = number
        how = f"was killed (signal {number})" if number else "ended"
        memory = ", probably for memory; fewer --workers need less" if number == signal.SIGKILL else ""
        super().__init__(f"a process that decodes images {how}{memory}")


class _Calls(Generic[T]):
    def __init__(self, function: Callable[[int], T]):
        self._function = function

    def __getitem__(self, index: int) -> T:
        return self._function(index)


def spare_workers(images: int) -> int:
    """Processes for a single pass over so many images, where nobody says how many: one for each core."""
    if FORK is None or images < MANY:
        return 0
    cores = len(os.sched_getaffinity(0))
    return cores if cores > 1 else 0


def ordered_map(
    function: Callable[[int], T], numbers: Iterable[int], workers: int, pin_memory: bool = False
) -> Generator[T, None, None]:
    """`function(n)` for each of `numbers` (which may be endless), computed ahead by `workers` processes.

    With 0 workers everything happens here, on demand. Closing the iterator ends the workers. The random state of this
    process is left alone.

    Raises:
        WorkerLost: a worker process has ended, some seconds ago.
    """
    if workers == 0:
        yield from map(function, numbers)
        return
    import torch  # here: where one process does it all, nothing needs it
    from torch.utils.data import DataLoader

    calls: Any = _Calls(function)  # as a data set: something with numbered items
    loader = DataLoader(
        calls,
        batch_size=None,
        sampler=numbers,  # type: ignore[arg-type]  # any iterable of keys serves
        num_workers=workers,
        collate_fn=_same,
        multiprocessing_context=FORK,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # else a seed for the workers is drawn from the global one
    )
    before = signal.getsignal(signal.SIGCHLD)
    iterator: Any = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)  # torch's would raise wherever this process is, as in writing a file
    try:
        yield from iterator
    except InputError as error:  # torch puts the worker's traceback before the line
        raise InputError(str(error).rstrip().rpartition("InputError: ")[2]) from error
    except (RuntimeError, ConnectionResetError, EOFError) as error:
        # a process that ends while it hands an item over breaks the connection before torch sees that it ended
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker (pid"):
            raise
        connection.wait([worker.sentinel for worker in iterator._workers], 5)  # seconds
        ended = [worker.exitcode or 0 for worker in iterator._workers if not worker.is_alive()]
        iterator._shutdown_workers()  # the error holds on to it, and so to the other processes
        raise WorkerLost(max(0, -min(ended, default=0))) from error
    finally:
        del iterator, loader  # the workers end with the last reference


def _same(value: Any) -> Any:
    return value


def _leave_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach the whole process group; the main process decides when workers end."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_IGN)
