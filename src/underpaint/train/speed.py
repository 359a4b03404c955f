"""What this machine does with this run: seconds a step, memory, and whether compiling pays.

Measured on real batches with a throwaway copy of the state: afterwards weights and optimiser are as before.
"""

import copy
import os
import resource
import shutil
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from underpaint.console import Going
from underpaint.data import Batch
from underpaint.errors import InputError
from underpaint.masking import each_tensor
from underpaint.methods import Method
from underpaint.train.stepper import Stepper

TINY_FACTOR = 1e-3  # of the learning rate, in steps that leave no trace
TOO_LARGE = "out of memory with a batch of 1: a smaller encoder or image size is needed"
MOST_SECONDS, SHARE = 20.0, 0.05  # that steps are timed at most: seconds, and of the run
SETTLING, STEADY = 10.0, 1.1  # seconds until steps take equal times, and by what factor equal times may differ
LONG_STEP = 10.0  # seconds of a step that is not made to be timed
COMPILE_WORTH_TRYING = 20 * 60  # seconds of training below which compiling (a minute on two cores) cannot pay
# what is said when memory runs out, in small letters: by the allocators of a CPU, of CUDA (and its driver: CUDA_ERROR_OUT_OF_MEMORY)
# and of pinned memory; by cuBLAS, which has none left for its handle, too; by cuSOLVER; by cuDNN 8 and 9, and by torch where
# no algorithm of it finds room to work in; by NCCL ("Failed to CUDA calloc 4194304 bytes", "Cuda failure 2 'out of memory'");
# and by torch's allocator where a container hides NVML, which it asks for the reason
SHORT = (
    *("can't allocate memory", "not enough memory", "out of memory", "out_of_memory"),
    *("cublas_status_alloc_failed", "cublas_status_not_initialized", "cusolver_status_alloc_failed"),
    *("cudnn_status_alloc_failed", "cudnn_status_internal_error_host_allocation_failed"),
    *("cudnn_status_internal_error_device_allocation_failed", "unable to find a valid cudnn algorithm"),
    *("unable to find an engine to execute this computation", "nvml_success == r internal assert failed"),
    *("failed to cuda calloc", "failed to cuda malloc", "failed to cuda host alloc"),
)


@dataclass(frozen=True)
class Cost:
    """Of a step, for an image: `flops` of matrix products, convolutions and attention, and `made` bytes of float32 on the way
    forward, of which most are kept for the way back; `weights` is the number of those that are trained."""

    flops: float
    made: float
    weights: int

    def memory(self, images: int, half: bool) -> float:
        """Bytes that steps on so many images at once take: weights, gradients and AdamW's two, and what is kept."""
        return 16.0 * self.weights + self.made * images * (0.5 if half else 1.0)


class _Counter(TorchDispatchMode):
    """Adds up torch's own FLOP formulas, and the bytes that are held at once. (FlopCounterMode also tracks modules, and hooks
    of saved tensors see what is kept: torch.func.grad forbids both.)"""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops, self.held, self.most = 0, 0, 0
        self.storages: Any = WeakIdKeyDictionary()
        for tensor in known:
            self.storages[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.storages:
                self.storages[storage] = None
                self.held += (held := storage.nbytes())
                weakref.finalize(storage, self._free, held)
                self.most = max(self.most, self.held)
        return out

    def _free(self, held: int) -> None:
        self.held -= held


@contextmanager
def _faked(mode: FakeTensorMode, module: nn.Module) -> Iterator[None]:
    """Inside, weights and buffers are fakes, which hold no numbers."""
    holders: list[dict[str, Any]] = [held for each in module.modules() for held in (each._parameters, each._buffers)]
    places = [(held, name) for held in holders for name in held]
    before = [held[name] for held, name in places]
    fakes: dict[int, Tensor] = {}  # a weight may be in two places
    try:
        for (held, name), value in zip(places, before, strict=True):
            if value is not None:
                if id(value) not in fakes:
                    fakes[id(value)] = mode.from_tensor(value)
                held[name] = fakes[id(value)]
        yield
    finally:
        for (held, name), value in zip(places, before, strict=True):
            held[name] = value


def counted(method: Method, channels: int, size: tuple[int, int], images: int = 2) -> Cost:
    """What a step of an untrained method costs, counted by making one of noise on tensors without numbers: it takes seconds
    and no memory, whatever the size of the network and the images."""
    mode, weights = FakeTensorMode(), sum(each.numel() for each in method.parameters() if each.requires_grad)
    noise, most = method.sample(images, *size), 0
    with _faked(mode, method):
        given = [mode.from_tensor(torch.empty(images, channels, *size)), each_tensor(noise, mode.from_tensor)]
        with mode, _Counter([*method.parameters(), *method.buffers()]) as counter:
            for number, objective in enumerate(method.parts(*given)):
                if number == 0:
                    most = counter.most  # before the way back, which makes gradients
                objective.loss.backward()
    return Cost(counter.flops / images, most / images, weights)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text for sign in SHORT)


def measure(
    current: Stepper,
    batches: Sequence[Batch],
    compiled: bool | None,
    steps_for: Callable[[float], int],
    shout: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
    exact: bool = False,
) -> dict[str, object]:
    """Seconds a step, memory in GiB, whether to compile, and in how many parts a batch fits into memory.

    It takes 20 seconds or 5 % of the run, whichever is less, and a step (of an eighth of the images where one of all would
    take longer than 10 seconds) where that is more. Compiling, where it is tried, comes on top.

    Args:
        compiled: True or False as the recipe says, None to find out.
        steps_for: how many steps the run will have at so many seconds a step.
        clock: seconds, by which steps are timed.
        exact: the length of the run follows from this, so it may take 10 seconds of any run until steps take equal times.

    Raises:
        InputError: not even one image fits.
    """
    asked, began = current.accumulation, clock()
    first, taken = _fit(current, batches[0], clock)
    first = _longest(current, first)
    if current.accumulation > asked:
        shout(
            f"a batch of {current.batch_size} does not fit into memory: it is computed in {current.accumulation} parts"
        )
    limit = min(MOST_SECONDS, max(SHARE * first * steps_for(first), SETTLING if exact else 0.0))
    seconds = _seconds(current, batches, clock, limit - _longest(current, clock() - began), first) or first
    worth = seconds * steps_for(seconds) > COMPILE_WORTH_TRYING and current.fabric.world_size == 1
    pays = False
    if compiled or (compiled is None and worth):
        if not _compiler():
            shout("no C++ compiler on this machine: not compiling")
        elif compiled:
            pays = True
        else:
            began = clock()
            other = current.compile()
            try:
                warm(other, batches[0])
                faster = _seconds(other, batches, clock, MOST_SECONDS, seconds) or seconds
                cost = clock() - began
                steps = steps_for(seconds)
                pays = faster * steps + cost < 0.98 * seconds * steps
                shout(
                    f"compiled {faster:.3f} s a step, as it is {seconds:.3f} s: {'compiling' if pays else 'not compiling'}"
                )
                seconds = faster if pays else seconds
            except TorchDynamoException as error:
                shout(f"cannot be compiled here: {str(error).splitlines()[0]}")
    return {
        "seconds_per_step": round(seconds, 6),
        "memory_gib": round(max(_memory(current), taken) / 2**30, 2),
        "compile": pays,
        "accumulation": current.accumulation,
    }


def _seconds(
    current: Stepper, batches: Sequence[Batch], clock: Callable[[], float], limit: float, expected: float
) -> float | None:
    """The time of a step, data wait not counted: the median of the last three, once they take equal times, or another one
    would end beyond the limit in seconds; None where the first would, which takes about as long as `expected`. State and
    gradients are put back.

    First steps are slow: they touch memory that a process has not had before, and kernels are chosen in them."""
    times: list[float] = []
    began = clock()
    with _throwaway(current), Going("timing steps") as going:
        while len(times) < 12:
            spent = _longest(current, clock() - began)
            last = times[-3:]
            settled = len(last) == 3 and max(last) < STEADY * min(last) and spent > 1.0
            if settled or spent + (last[-1] if last else expected) > limit:
                break
            times.append(_longest(current, _timed(current, batches[len(times) % len(batches)], clock)))
            going.advance()
    return statistics.median(times[-3:]) if times else None


def _longest(current: Stepper, seconds: float) -> float:
    """Of all processes, which make their steps together."""
    fabric = current.fabric
    if fabric.world_size == 1:
        return seconds
    return float(torch.as_tensor(fabric.all_reduce(torch.tensor(seconds, device=fabric.device), reduce_op="max")))


def _timed(current: Stepper, batch: Batch, clock: Callable[[], float]) -> float:
    began = clock()
    current.step(batch, 0, TINY_FACTOR)
    if current.fabric.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def warm(current: Stepper, batch: Batch) -> None:
    """A step that leaves no trace, for what the first one alone costs: compiling is no part of any run's time."""
    with _throwaway(current):
        current.step(batch, 0, TINY_FACTOR)


class _throwaway:
    """Steps inside leave no trace in weights, optimiser or gradients."""

    def __init__(self, current: Stepper):
        self.current = current

    def __enter__(self) -> None:
        self.weights = copy.deepcopy(self.current.task.state_dict())
        self.scale = None if self.current.scaler is None else self.current.scaler.state_dict()

    def __exit__(self, *_: Any) -> None:
        self.current.task.load_state_dict(self.weights)
        self.current.optimiser.state.clear()
        self.current.optimiser.zero_grad(set_to_none=True)
        self.current.renew_scaler(self.scale)


def _fit(current: Stepper, batch: Batch, clock: Callable[[], float]) -> tuple[float, float]:
    """Divide batches into as many parts as memory asks for; all processes come to the same.

    A CPU's memory is not refused, it ends the process: so an eighth of a part is tried first, and the whole is
    extrapolated from what it took.

    Returns:
        Seconds that a step took; and where only a part of one was made, the bytes that this process would hold in a whole one,
        else 0.

    Raises:
        InputError: not even one image fits.
    """
    while (took := _fits(current, batch, clock)) is None:
        if (parts := current.finer) is None:
            raise InputError(TOO_LARGE)
        current.accumulation = parts
    fabric = current.fabric
    most = fabric.all_reduce(torch.tensor(float(current.accumulation), device=fabric.device), reduce_op="max")
    current.accumulation = int(torch.as_tensor(most))
    return took


def _fits(current: Stepper, batch: Batch, clock: Callable[[], float]) -> tuple[float, float] | None:
    """What `_fit` says of a step on this batch, in the parts that it is computed in; None where it does not fit into memory."""
    part = current.local_batch // current.accumulation
    began = clock()
    if current.fabric.device.type == "cpu" and part >= 64:
        before = restart_peak()
        runs = _runs(current, _rows(batch, part // 8), 1)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _cached()
        if not runs or (before and (peak() - before) * part / (part // 8) > 0.9 * free):
            return None
        if before and (seconds := (clock() - began) * current.local_batch / (part // 8)) > LONG_STEP:
            still = 16.0 * sum(each.numel() for each in current.task.parameters() if each.requires_grad)
            grown = max(0.0, peak() - before - still)  # what grows with the images
            return seconds, before + still + grown * part / (part // 8)
        began = clock()
    return (clock() - began, 0.0) if _runs(current, batch, current.accumulation) else None


def _rows(batch: Batch, count: int) -> Batch:
    return Batch(batch.images[:count], batch.samples[:count])


def _runs(current: Stepper, batch: Batch, parts: int) -> bool:
    """Whether a step on these images, in so many parts, fits into the memory of this process."""
    whole, asked = current.batch_size, current.accumulation
    try:
        current.batch_size, current.accumulation = len(batch.images) * current.fabric.world_size, parts
        current.alone = True
        with _throwaway(current):
            current.step(batch, 0, TINY_FACTOR)
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    finally:
        current.batch_size, current.accumulation, current.alone = whole, asked, False
    if current.fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def _memory(current: Stepper) -> int:
    """Peak memory of this process in bytes: the GPU's where there is one."""
    return torch.cuda.max_memory_allocated() if current.fabric.device.type == "cuda" else peak()


def peak() -> int:
    """The most memory that this process held, in bytes, since the last `restart_peak` where the system allows one."""
    if found := _status("VmHWM:"):
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def restart_peak() -> int:
    """Forget the peak so far, a GPU's too; returns the memory held now in bytes, or 0 where the system cannot do this."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS:")


def _status(name: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _cached() -> int:
    """File cache that the system would give back, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("Cached:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _compiler() -> bool:
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return any(name and shutil.which(name) for name in names)
