"""Devices and processes, and what is read from a device late."""

import json
import os
import time
from contextlib import suppress

import torch
from jaxtyping import Float
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor

from underpaint.computing import autocast, best_precision, products
from underpaint.config import Recipe
from underpaint.data.sources.base import cache_root
from underpaint.files import write_json
from underpaint.train.ranks import TIMEOUT, join, kept_by_torchrun
from underpaint.train.run_folder import processor

MEASURED, AGAIN = 0.4, 0.05  # seconds in which a matrix rate is measured: at first, and where one is kept


def make_fabric(recipe: Recipe) -> Fabric:
    """What a recipe runs on; writes the precision that it came to into the recipe."""
    cuda = torch.cuda.is_available()
    precision = recipe.measured.get("precision") or recipe.run.precision
    if precision == "auto":
        precision = best_precision(torch.device("cuda" if cuda else "cpu"))
    recipe.measured["precision"] = precision
    devices, nodes = started() or (recipe.run.devices or ("auto" if cuda else 1), recipe.run.nodes)
    several = nodes > 1 or (devices if isinstance(devices, int) else torch.cuda.device_count()) > 1
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=TIMEOUT) if several else "auto",
        precision="32-true",  # a step casts by itself, around the network alone (`Stepper`)
    )
    if several and kept_by_torchrun():
        local = int(os.environ["LOCAL_RANK"])
        if cuda:
            torch.cuda.set_device(local)
        join(torch.device("cuda", local) if cuda else torch.device("cpu"))
    fabric.launch()
    return fabric


def started() -> tuple[int, int] | None:
    """Processes on a machine, and machines, where torchrun or srun started this process; their number is then theirs, whatever
    the recipe says. None where this process starts the others itself."""
    told = os.environ
    if "TORCHELASTIC_RUN_ID" in told:
        local = int(told["LOCAL_WORLD_SIZE"])
        return local, int(told["WORLD_SIZE"]) // local
    if "SLURM_NTASKS" in told and told.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # as Fabric sees it
        return int(told.get("SLURM_NTASKS_PER_NODE", "1")), int(told.get("SLURM_NNODES", "1"))
    return None


def memory(device: torch.device) -> int:
    """Of a GPU, or of this machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def matrix_rate(fabric: Fabric, precision: str) -> float:
    """FLOP a second of a large matrix product on one device in a run's precision: the best that was measured here, since
    another program's turn in between says nothing of the machine. It is kept below the cache, by device, threads,
    precision and version of torch, and a glance shows whether it is too low."""
    kept, name = cache_root() / "matrix-rates.json", device_name(fabric.device)
    key = f"{name}, {torch.get_num_threads()} threads, {precision}, torch {torch.__version__}"
    rates: dict[str, float] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        rates = {str(each): float(rate) for each, rate in json.loads(kept.read_text()).items()}
    before = rates.get(key, 0.0)
    found = max(before, _matrix_rate(fabric, precision, AGAIN if before else MEASURED))
    if found > 1.02 * before:
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, rates | {key: round(found)})
    return found


def device_name(device: torch.device) -> str:
    """For people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _matrix_rate(fabric: Fabric, precision: str, seconds: float) -> float:
    cuda = fabric.device.type == "cuda"
    size = 8_192 if cuda else 1_024
    with (
        torch.random.fork_rng(devices=[]),
        products(exact=not cuda),
        autocast(fabric.device, precision),
        torch.no_grad(),
    ):
        left, right = (torch.randn(size, size, device=fabric.device) for _ in range(2))
        best, first = float("inf"), time.perf_counter()
        while best == float("inf") or time.perf_counter() - first < seconds:
            began = time.perf_counter()
            torch.mm(left, right)
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


class Flag:
    """A truth that a device finds out, to be read later, without waiting for what the device was asked to do since.

    On a GPU it is copied to pinned memory as soon as it is known; reading it waits for that copy alone.
    """

    def __init__(self, value: Float[Tensor, ""]):
        self.value, self.copied = value, None
        if value.device.type == "cuda":
            self.value = torch.empty_like(value, device="cpu", pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def __bool__(self) -> bool:
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.value.item())
