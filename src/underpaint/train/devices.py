"""Devices, precision and processes."""

import os
import time
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from underpaint.config import Recipe
from underpaint.train.ranks import TIMEOUT, join, kept_by_torchrun

PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def make_fabric(recipe: Recipe) -> Fabric:
    """What a recipe runs on; writes the precision that it came to into the recipe."""
    cuda = torch.cuda.is_available()
    precision = recipe.measured.get("precision") or recipe.run.precision
    if precision == "auto":
        # bfloat16 on a CPU without native support is many times slower than float32
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    recipe.measured["precision"] = precision
    if cuda:
        torch.set_float32_matmul_precision("high")
    devices, nodes = started() or (recipe.run.devices or ("auto" if cuda else 1), recipe.run.nodes)
    several = nodes > 1 or (devices if isinstance(devices, int) else torch.cuda.device_count()) > 1
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(timeout=TIMEOUT) if several else "auto",
        precision=PRECISIONS[precision],
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


def matrix_rate(fabric: Fabric) -> float:
    """FLOP a second of a large matrix product on one device in the run's precision: the best within 0.4 seconds, since
    another program's turn in between says nothing of the machine."""
    cuda, precision = fabric.device.type == "cuda", fabric.strategy.precision
    size = 8_192 if cuda else 1_024
    with torch.random.fork_rng(devices=[]), precision.forward_context(), torch.no_grad():
        left, right = (torch.randn(size, size, device=fabric.device) for _ in range(2))
        best, first = float("inf"), time.perf_counter()
        while best == float("inf") or time.perf_counter() - first < 0.4:
            began = time.perf_counter()
            torch.mm(left, right)
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
