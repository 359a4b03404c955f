"""Devices, precision and processes."""

from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from underpaint.config import Recipe

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
    devices: int | str = recipe.run.devices or ("auto" if cuda else 1)
    several = recipe.run.nodes > 1 or (devices if isinstance(devices, int) else torch.cuda.device_count()) > 1
    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=devices,
        num_nodes=recipe.run.nodes,
        # one process makes a tokenizer, or judges, while the others wait
        strategy=DDPStrategy(timeout=timedelta(hours=3)) if several else "auto",
        precision=PRECISIONS[precision],
    )
    fabric.launch()
    return fabric
