"""What the processes of one run tell each other beside their gradients, and how they end together.

Plain data goes as JSON through the store in which torch.distributed's processes met, numbers by reductions on the CPU that
wait for no GPU; nothing is pickled. Who waits for what one process does looks at the store again and again, as long as that
process gives signs of life; a collective has a limit (`TIMEOUT`). A process that fails says why in the store. The others
find it there, when a collective fails or while they wait, and end with that line.
"""

import atexit
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from secrets import token_hex
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor

from underpaint.errors import InputError, Stopped
from underpaint.signals import Interrupted, requeue, watched_signals

TIMEOUT = timedelta(minutes=10)  # of a collective
BEAT, SILENT = 2.0, 120.0  # seconds between signs of life; without one after which a process is given up
ROLL_CALL, GRACE, LINGER = 6.0, 5.0, 60.0  # seconds: see `_Meeting`
BUCKET = 2**27  # numbers that are reduced or sent at once
FAILED = "failed"
T = TypeVar("T")
_meetings = itertools.count()


class _Ended(Stopped):
    """Another process ended, or it is not known which."""


class _Meeting:
    """The processes of a run, from one of them.

    A process that sees others gone waits `ROLL_CALL` seconds for a word of theirs; one that hangs in a collective after
    another failed is ended after `GRACE`; the first one, in which the store may live, waits `LINGER` for the others to leave.
    """

    def __init__(self, fabric: Fabric):
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self.node, self.local = fabric.node_rank, fabric.local_rank
        store: Any = dist.distributed_c10d._get_default_store()
        self.store = dist.PrefixStore(f"underpaint/{next(_meetings)}", store)
        self.control: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.numbers = itertools.count()
        self.alone = False  # while one process works for all
        self.ended = threading.Event()
        threading.Thread(target=self._live, daemon=True).start()

    # --- signs of life ---------------------------------------------------------------------------------------------

    def _live(self) -> None:
        """Beat; and end this process where another one failed and a collective keeps it from seeing that."""
        beat = 0
        while not self.ended.wait(BEAT):
            beat += 1
            line = "rank 0 ended without a word"
            with suppress(RuntimeError):  # the store is gone with the process in which it lived
                self.store.set(f"beat/{self.rank}", str(beat))
                if not self.store.check([FAILED]):
                    continue
                line = self.failure()
            if self.ended.wait(GRACE):
                return
            os.write(2, f"underpaint: {line}\n".encode())
            with suppress(RuntimeError):
                self.store.set(f"left/{self.rank}", "")
            os._exit(3)

    def beat(self, rank: int) -> bytes:
        key = f"beat/{rank}"
        return self.store.get(key) if self.store.check([key]) else b""

    def wait(self, awaited: Mapping[str, int]) -> None:
        """Until all these keys are there, each of which a process, by its rank, sets.

        Raises:
            Stopped: a process failed, or gives no sign of life.
        """
        keys, pause, looked = list(awaited), 0.005, time.monotonic()
        heard: dict[int, tuple[bytes, float]] = {}
        try:
            while not self.store.check(keys):
                if self.store.check([FAILED]):
                    raise _Ended(self.failure())
                if (now := time.monotonic()) - looked > 5 * BEAT:
                    looked = now
                    for rank in {awaited[key] for key in keys if not self.store.check([key])}:
                        beat = self.beat(rank)
                        if heard.get(rank, (None, 0.0))[0] != beat:
                            heard[rank] = beat, now
                        elif now - heard[rank][1] > SILENT:
                            self.announce(rank, f"has given no sign of life for {SILENT:.0f} seconds")
                time.sleep(pause)
                pause = min(0.5, 1.5 * pause)
        except RuntimeError as error:
            raise _Ended("rank 0 ended without a word") from error

    # --- the end ---------------------------------------------------------------------------------------------------

    def announce(self, rank: int, line: str) -> None:
        """That a process failed, and why; the first such word stays."""
        with suppress(RuntimeError):
            self.store.compare_set(FAILED, "", json.dumps({"rank": rank, "line": line}))

    def failure(self) -> str:
        told = json.loads(self.store.get(FAILED))
        return f"rank {told['rank']}: {told['line']}"

    def blame(self, error: BaseException) -> str:
        """Which process ended, and why, after a collective failed: its own word, else who does not answer a roll-call."""
        try:
            self.store.set(f"here/{self.rank}", "")
            others = [rank for rank in range(self.world) if rank != self.rank]
            beats, began = {rank: self.beat(rank) for rank in others}, time.monotonic()
            while not self.store.check([FAILED]):
                missing = [rank for rank in others if not self.store.check([f"here/{rank}"])]
                if not missing:
                    return f"the processes lost touch with each other: {_line(error)}"
                if time.monotonic() - began > ROLL_CALL:
                    silent = [rank for rank in missing if self.beat(rank) == beats[rank]]
                    late = f"did not come to where the others waited ({_line(error)})"
                    self.announce((silent or missing)[0], "ended without a word: it was killed" if silent else late)
                time.sleep(0.1)
            return self.failure()
        except RuntimeError:
            return "rank 0 ended without a word"

    def left(self, ranks: Iterable[int]) -> None:
        """Say that this process leaves, and wait for others to do so, though not long."""
        began, keys = time.monotonic(), [f"left/{rank}" for rank in ranks]
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            while keys and not self.store.check(keys) and time.monotonic() - began < LINGER:
                time.sleep(0.05)

    def leave(self, error: BaseException | None) -> BaseException | None:
        """What this process is to raise in place of what it met."""
        self.ended.set()
        with watched_signals():  # torchrun tells the others to end, too
            gone: list[int] = []
            if error is not None and _of_others(error):
                error = error if isinstance(error, _Ended) else _Ended(self.blame(error))
                with suppress(RuntimeError):
                    gone = [json.loads(self.store.get(FAILED))["rank"]] if self.store.check([FAILED]) else []
            elif isinstance(error, Interrupted):
                requeue(error)
                self.announce(self.rank, f"was told to end (signal {error.signal_number})")
            elif error is not None:
                known = isinstance(error, InputError | Stopped)
                self.announce(self.rank, _line(error) if known else f"{type(error).__name__}: {_line(error)}")
            if self.rank == 0 and not kept_by_torchrun():
                self.left(rank for rank in range(1, self.world) if rank not in gone)
            else:  # who starts processes may end them all with the first that ends: a checkpoint is written, a job queued
                self.left([0] if self.rank and isinstance(error, Interrupted) else [])
        return error


_met: _Meeting | None = None


def kept_by_torchrun() -> bool:
    """Whether the store lives in torchrun, and not in the first process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _of_others(error: BaseException) -> bool:
    """Whether an error is the end of another process, as this one meets it."""
    text = str(error).lower()
    if not isinstance(error, RuntimeError) or "out of memory" in text:
        return isinstance(error, _Ended)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "nccl", "by peer", "process group")
    )


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Inside, the processes of a run may work for each other, and end together.

    Raises:
        Stopped: another process ended: which one, and why.
    """
    global _met
    if fabric.world_size == 1:
        yield
        return
    met = _met = _Meeting(fabric)
    try:
        yield
    except BaseException as error:
        found = met.leave(error)
        if found is not error and found is not None:
            raise found from error
        raise
    else:
        met.leave(None)
    finally:
        _met = None


# --- one works for all ------------------------------------------------------------------------------------------------


def join(device: torch.device) -> None:
    """Make the process group of processes that torchrun started, so that it may start them again.

    torchrun has one store for all its starts, in which the addresses of processes that are gone still stand: whoever reads
    one before it is written anew waits for a process that never answers. So the processes of each start meet in a part of
    the store that has a name of its own. The first one makes it up; it takes away what others left, and tells it to those
    who say again that they are here.
    """
    found: Any = dist.rendezvous("env://", timeout=TIMEOUT)
    store, rank, world = next(found)
    mine, began = token_hex(8), time.monotonic()
    keys = [f"underpaint/here/{other}" for other in range(1, world)] if rank == 0 else [f"underpaint/start/{mine}"]
    for key in keys:
        store.delete_key(key)
    while not store.check(keys):
        if rank:
            store.set(f"underpaint/here/{rank}", mine)
        if time.monotonic() - began > TIMEOUT.total_seconds():
            raise Stopped(f"rank {rank}: the other processes did not come within {TIMEOUT}")
        time.sleep(0.05)
    for key in keys if rank == 0 else []:
        store.set(f"underpaint/start/{store.get(key).decode()}", mine)
    name = mine if rank == 0 else store.get(keys[0]).decode()
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
        device_id=device if cuda else None,
    )
    if cuda:
        atexit.register(dist.destroy_process_group)


def several() -> bool:
    """Whether this process shares its work with others just now."""
    return _met is not None and not _met.alone


def first() -> bool:
    """Whether this is the first process of a run, or the only one."""
    return _met is None or _met.rank == 0


def by_first(work: Callable[[], T]) -> T:
    """What the first process makes, as plain data (JSON), for all; the others wait, however long it takes.

    Raises:
        InputError, Stopped: what it raised there, in all.
    """
    met: Any = _met
    if met is None or met.alone:
        return work()
    key = f"first/{next(met.numbers)}"
    if met.rank:
        met.wait({key: 0})
        told = json.loads(met.store.get(key))
        if "error" in told:
            raise {"InputError": InputError, "Stopped": Stopped}[told["error"]](told["text"])
        return told["value"]
    met.alone = True
    try:
        told = json.dumps({"value": work()})
    except (InputError, Stopped) as error:
        kind = "InputError" if isinstance(error, InputError) else "Stopped"
        met.store.set(key, json.dumps({"error": kind, "text": str(error)}))
        raise
    finally:
        met.alone = False
    met.store.set(key, told)
    return json.loads(told)["value"]


@contextmanager
def node_first() -> Iterator[None]:
    """The first process of each machine goes first; the others there follow when it is done, however long it takes."""
    met = _met
    if met is None or met.alone:
        yield
        return
    key = f"node/{next(met.numbers)}/{met.node}"
    if met.local:
        met.wait({key: met.rank - met.local})
    yield
    if not met.local:
        met.store.set(key, "")


def meet() -> None:
    """Wait until all processes are here, however long it takes."""
    met = _met
    if met is None or met.alone:
        return
    place = f"met/{next(met.numbers)}"
    met.store.set(f"{place}/{met.rank}", "")
    met.wait({f"{place}/{rank}": rank for rank in range(met.world)})


# --- numbers and tensors -----------------------------------------------------------------------------------------------


class Agreement:
    """What all processes know after each step: whether any was told to end, and the first one's clock. One process knows
    its own at once; several know what was true a step ago, by a reduction on the CPU that goes on beside the step."""

    def __init__(self) -> None:
        self.sent: tuple[Any, Tensor] | None = None

    def __call__(self, told: int, seconds: float) -> tuple[int, float]:
        """The number of a signal (0: none) and seconds, of all, from those of this process."""
        met = _met
        if met is None or met.alone:
            return told, seconds
        known = 0, 0.0
        if self.sent is not None:
            work, numbers = self.sent
            work.wait()
            known = int(numbers[0]), float(numbers[1])
        mine = torch.tensor([float(told), seconds if met.rank == 0 else 0.0], dtype=torch.float64)
        self.sent = dist.all_reduce(mine, dist.ReduceOp.MAX, met.control, async_op=True), mine
        return known


def share(rank: int, world: int, count: int) -> tuple[int, int]:
    """Which of `count` things in a row are those of a process: from, to."""
    whole, more = divmod(count, world)
    begin = rank * whole + min(rank, more)
    return begin, begin + whole + (rank < more)


def my_share(count: int) -> tuple[int, int]:
    """The same of this process; all where it works alone."""
    return share(_met.rank, _met.world, count) if _met is not None and not _met.alone else (0, count)


def gathered(rows: Tensor) -> list[Tensor] | None:
    """The rows of each process, on the CPU and in their order, in the first one; None in the others. All have as many
    dimensions; a process may have no rows, and floats of another precision."""
    met = _met
    assert met is not None
    meet()
    kinds = (torch.float32, torch.float16, torch.int64)
    mine = torch.tensor([kinds.index(rows.dtype), *rows.shape])
    shapes = [torch.zeros_like(mine) for _ in range(met.world)]
    dist.all_gather(shapes, mine, group=met.control)
    if met.rank:
        for part in rows.contiguous().view(-1).split(BUCKET):
            if len(part):
                dist.send(part, 0, met.control)
        return None
    found = [rows]
    for rank in range(1, met.world):
        kind, *shape = shapes[rank].tolist()
        made = torch.empty(shape, dtype=kinds[kind])
        for part in made.view(-1).split(BUCKET):
            if len(part):
                dist.recv(part, rank, met.control)
        found.append(made)
    return found


def same(number: int) -> bool:
    """Whether all processes have the same number."""
    if _met is None or _met.alone:
        return True
    both = torch.tensor([number, -number])
    dist.all_reduce(both, dist.ReduceOp.MAX, _met.control)
    return int(both[0]) == -int(both[1])


@torch.no_grad()
def send_out(tensors: Iterable[Tensor]) -> None:
    """Fill tensors, on the device of the run, with those of the first process."""
    if _met is None or _met.alone:
        return
    for tensor in tensors:
        whole = tensor.contiguous()
        dist.broadcast(whole, 0)
        if whole is not tensor:
            tensor.copy_(whole)


@torch.no_grad()
def mean_over_ranks(tensors: Iterable[Tensor]) -> None:
    """In place, the means over the processes, of a few large messages."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for alike in kinds.values():
        begin, count = 0, 0
        for end, tensor in enumerate(alike, start=1):
            count += tensor.numel()
            if count >= BUCKET or end == len(alike):
                some = alike[begin:end]
                flat = torch.cat([each.reshape(-1) for each in some])
                dist.all_reduce(flat)
                flat /= dist.get_world_size()
                parts = flat.split([each.numel() for each in some])
                for each, part in zip(some, parts, strict=True):
                    each.copy_(part.view_as(each))
                begin, count = end, 0
