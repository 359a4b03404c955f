"""Apply a function to keys (the numbers 0, 1, 2, ..., say) in worker processes, results in order."""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import connection
from typing import Any, Generic, NamedTuple, TypeVar

from underpaint.errors import InputError
from underpaint.signals import WATCHED

log = logging.getLogger(__name__)
T = TypeVar("T")
K = TypeVar("K")
BUS_ERROR = getattr(signal, "SIGBUS", 7)
MANY = 2_000  # images from which on it pays to start processes for one pass over them,
MANY_PIXELS = 2**26  # or pixels: about half a second of decoding, ten times what starting them takes
MOST = 8  # processes that read ahead, where nobody says how many
EACH = 4  # results of one pass that a process must have to make, or starting it does not pay
IN_FLIGHT = 2**30  # bytes of results that a process's workers may be ahead, with their pinned copies
SHARED_MEMORY = "/dev/shm"  # through which results travel
LONGEST = 75  # bytes of a path below which Python puts sockets, whose own paths may have 107
SHARE = 4  # all local processes together take at most a quarter of it: others of the same run read, too
# forked processes share the index of the images, start at once, and run no script of the user's a second time; they must
# not touch the GPU, which a forked process cannot
FORK = "fork" if sys.platform == "linux" else None


class WorkerLost(InputError):
    """A worker process ended while it computed; `number` is the signal that ended it, 0 where that is not known."""

    def __init__(self, number: int):
        self.number = number
        how = f"was killed (signal {number})" if number else "ended"
        reasons = {signal.SIGKILL: "memory", BUS_ERROR: f"want of shared memory ({SHARED_MEMORY})"}
        why = f", probably for {reasons[number]}; fewer --workers need less" if number in reasons else ""
        super().__init__(f"a process that decodes images {how}{why}")


class _Failed(NamedTuple):
    """What a worker hands over where it cannot: the text of an input error, or None where shared memory did not suffice."""

    text: str | None


class _Calls(Generic[K, T]):
    def __init__(self, function: Callable[[K], T]):
        self._function = function

    def __getitem__(self, key: K) -> T | _Failed:
        try:
            return _shared(self._function(key))
        except InputError as error:
            return _Failed(str(error))  # torch would wrap it into its traceback
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return _Failed(None)


def _shared(value: Any) -> Any:
    """Tensors into shared memory here, where what goes wrong can be said; else a thread that nobody hears does it."""
    for tensor in _tensors(value):
        if tensor.numel():
            tensor.share_memory_()
    return value


def size_of(value: Any) -> int:
    """Bytes of the tensors in lists, tuples and dicts."""
    return sum(tensor.nbytes for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def local_processes() -> int:
    """Processes of this run on this machine."""
    if said := _count("LOCAL_WORLD_SIZE"):  # torchrun's
        return said
    torch: Any = sys.modules.get("torch")  # who has not imported it is alone
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return max(1, torch.distributed.get_world_size() // (_count("SLURM_NNODES") or 1))


def own_cores() -> int:
    """The cores for this process: those that it may run on, shared with the processes of its run beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (said := _count("SLURM_CPUS_PER_TASK")) and not _count("LOCAL_WORLD_SIZE"):
        return min(cores, said)  # a task of SLURM is a process, and its cores may be bound to it already
    return max(1, cores // local_processes())


def _count(variable: str) -> int:
    """A number that the environment says; 0 where it does not."""
    said = os.environ.get(variable, "")
    return int(said) if said.isdigit() else 0


def reading_workers(device: str, cached: bool, results: int | None = None) -> int:
    """Processes that read ahead, where nobody says how many.

    Ahead of a GPU one for each core but one, up to `MOST`: whatever images are cut from, a step waits for no more than its
    own work. On a CPU a step takes all cores itself, so none where images are cached, which are cut out in no time; where
    they are decoded, which is the work of one core, half of the cores, so that the others do not wait for it.

    Args:
        device: its type, "cuda" or "cpu".
        cached: whether images are kept decoded.
        results: that a single pass asks for; one that does not end where None.
    """
    if FORK is None or (device != "cuda" and cached):
        return 0
    cores = own_cores()
    workers = max(1, min(MOST, cores - 1)) if device == "cuda" else min(MOST, cores // 2)
    return workers if results is None else min(workers, results // EACH)


def results_ahead(size: int) -> int:
    """How many results of so many bytes workers may be ahead, beside the one that is used and one that is being pinned:
    all are below `IN_FLIGHT` and within their share of the shared memory; below 1 where not even one has room."""
    room = IN_FLIGHT
    try:
        found = os.statvfs(SHARED_MEMORY)
        room = min(room, found.f_frsize * found.f_blocks // SHARE // local_processes())
    except OSError:  # another system, which shares by other ways
        pass
    return room // max(1, size) - 2


def within_memory(workers: int, size: int) -> tuple[int, int]:
    """So many workers or fewer, and how many results each may be ahead (1 or 2), for results of at most so many bytes."""
    if workers == 0:
        return 0, 1
    ahead = results_ahead(size)
    if ahead < 1:
        log.warning(
            "%s is too small for processes that decode (results of %d MiB): images are decoded between steps; "
            "containers have more with --shm-size, as in docker run --shm-size=4g",
            SHARED_MEMORY,
            -(-size // 2**20),
        )
        return 0, 1
    workers = min(workers, ahead)
    return workers, min(2, ahead // workers)


def spare_workers(images: int, pixels: float = 0.0) -> int:
    """Processes for a single pass over so many images, with so many pixels in all, where nobody says how many: one for
    each core."""
    if FORK is None or (images < MANY and pixels < MANY_PIXELS):
        return 0
    cores = len(os.sched_getaffinity(0))
    return cores if cores > 1 else 0


def ordered_map(
    function: Callable[[K], T], keys: Iterable[K], workers: int, pin_memory: bool = False, prefetch: int = 2
) -> Generator[T, None, None]:
    """`function(key)` for each of `keys` (which may be endless), computed ahead by `workers` processes.

    With 0 workers everything happens here, on demand. Closing the iterator ends the workers. The random state of this
    process is left alone.

    Args:
        pin_memory: results are copied to where a GPU takes them from without waiting.
        prefetch: results that each worker is ahead; so many times `workers` are in flight at most.

    Raises:
        WorkerLost: a worker process has ended, some seconds ago, or shared memory did not suffice.
        InputError: the folder of temporary files has too long a path.
    """
    if workers == 0:
        yield from map(function, keys)
        return
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST:  # else results are lost in a thread, and nobody hears of it
        raise InputError(
            f"TMPDIR: {folder} is too long a path for the sockets of processes that decode; at most {LONGEST} bytes "
            "serve, or --workers 0"
        )
    import torch  # here: where one process does it all, nothing needs it
    from torch.utils.data import DataLoader

    calls: Any = _Calls(function)  # as a data set: something with items
    loader = DataLoader(
        calls,
        batch_size=None,
        sampler=keys,  # type: ignore[arg-type]  # any iterable of keys serves
        num_workers=workers,
        prefetch_factor=prefetch,
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
        for result in iterator:
            if isinstance(result, _Failed):
                raise WorkerLost(BUS_ERROR) if result.text is None else InputError(result.text)
            yield result
            del result  # not held while the next one is waited for
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
