"""Apply a function to the numbers 0, 1, 2, ... in worker processes, results in order."""

import signal
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from underpaint.signals import WATCHED

T = TypeVar("T")


class _Calls(Dataset[T], Generic[T]):
    def __init__(self, function: Callable[[int], T]):
        self._function = function

    def __getitem__(self, index: int) -> T:
        return self._function(index)


def ordered_map(
    function: Callable[[int], T], numbers: Iterable[int], workers: int, pin_memory: bool = False
) -> Generator[T, None, None]:
    """`function(n)` for each of `numbers` (which may be endless), computed ahead by `workers` processes.

    With 0 workers everything happens here, on demand. Closing the iterator ends the workers. The random state of this
    process is left alone.
    """
    if workers == 0:
        yield from map(function, numbers)
        return
    loader = DataLoader(
        _Calls(function),
        batch_size=None,
        sampler=numbers,  # type: ignore[arg-type]  # any iterable of keys serves
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # else a seed for the workers is drawn from the global one
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        del iterator, loader  # the workers end with the last reference


def _same(value: Any) -> Any:
    return value


def _leave_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach the whole process group; the main process decides when workers end."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_IGN)
