"""The plan of a run that says little: a look at images and machine, what `recipes.plan` chooses, and how it is told."""

import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from timm.models import is_model_in_modules
from torch import Tensor
from torch.overrides import TorchFunctionMode

from underpaint.backbones import create_arguments, describe_encoder
from underpaint.backbones.protocols import Backbone
from underpaint.backbones.weights import is_run, network_at
from underpaint.config import Recipe
from underpaint.console import lasting
from underpaint.data.decode import Header, Unreadable, decode, read_header
from underpaint.errors import InputError
from underpaint.patches import Standardize
from underpaint.prepare import Opened, construct, parts_text, passes_text, planned_steps, rate_text
from underpaint.recipes.plan import WORDS, Looked, Machine, plan, share_of, supposed_speed
from underpaint.recipes.recipe import checked
from underpaint.recipes.request import laid_over
from underpaint.train.devices import device_name, matrix_rate, memory
from underpaint.train.speed import Cost, counted, out_of_memory

HEADERS, DECODED, LOOKING = (
    48,
    8,
    2.0,
)  # images whose headers, and whose pixels, are read, and seconds that each may take
SHORT = 60.0  # seconds of a run of which nothing need be said before it is measured
ALIKE = 1.15  # times the proportions of the tenth percentile are those of the ninetieth, or images are not alike
FEW = 1_000  # images on fewer of which five minutes of pretraining brought nothing (docs/log.md, nuclei)
PROCESS = 0.85 * 2**30  # bytes, before a step
FAMILIES = {"vit": ["vision_transformer", "deit"], "beit": ["beit"], "swin": ["swin_transformer"]}
# of `timm.create_model`, which a run says otherwise
NORMS = {"fc_norm", "use_fc_norm", "final_norm", "use_post_transformer_norm"}
ELSEWHERE = {"model_name", "drop_path_rate", "num_classes", "in_chans", "img_size", "global_pool", *NORMS}


class Planned(NamedTuple):
    """A recipe, the reasons for what was chosen in it, what it was chosen for, and seconds in which the images are read."""

    recipe: Recipe
    reasons: Mapping[str, str]
    looked: Looked
    machine: Machine
    reading: float


def planned(fabric: Fabric, opened: Opened, recipe: Recipe, said: Mapping[str, Any] | None) -> Planned:
    """A recipe around what is `said` (settings by path); the recipe as it is where that is None.

    Raises:
        InputError: no such encoder; sizes that do not go together.
    """
    looked, machine = look(opened, recipe.data.max_pixels), machine_of(fabric, recipe)
    if said is None:
        return Planned(recipe, {}, looked, machine, reading(opened, recipe, machine))
    if "init" in said:
        start = _of_start(said["init"])
        if looked.channels in (1, 3):  # which are turned into one another
            looked = replace(looked, channels=start.pop("data.channels", looked.channels))
        if said.get("encoder.name", start.get("encoder.name")) != start.get("encoder.name"):
            start = {path: value for path, value in start.items() if not path.startswith("encoder.")}
        said = start | dict(said)
    name = said.get("encoder.name")
    found = plan(said, looked, machine, "vit" if name is None else family_of(name))
    chosen = checked(laid_over(found.settings, {}, said))
    chosen.data.path, chosen.measured = recipe.data.path, recipe.measured
    return Planned(chosen, found.reasons, looked, machine, reading(opened, chosen, machine))


def look(opened: Opened, max_pixels: int) -> Looked:
    """The sizes of some images, by their headers."""
    indices, began = opened.indices, time.monotonic()
    headers: list[Header] = []
    for place in np.linspace(0, len(indices) - 1, min(HEADERS, len(indices))).round().astype(int).tolist():
        try:
            headers.append(read_header(opened.source.read(int(indices[place])), max_pixels=max_pixels))
        except Unreadable:
            continue
        if time.monotonic() - began > LOOKING:
            break
    if not headers:
        return Looked(len(indices), 224, 224, 3, False)
    sizes = np.array([(header.height, header.width) for header in headers])
    low, high = np.quantile(sizes[:, 1] / sizes[:, 0], [0.1, 0.9])
    height, width = np.median(sizes, axis=0).round().astype(int).tolist()
    channels = {header.channels for header in headers}
    return Looked(len(indices), height, width, channels.pop() if len(channels) == 1 else 3, bool(high < ALIKE * low))


def reading(opened: Opened, recipe: Recipe, machine: Machine) -> float:
    """Seconds in which the images are decoded, by a few of them; which is done once for a cache, else in every pass."""
    indices, began, tried = opened.indices, time.monotonic(), 0
    for place in np.linspace(0, len(indices) - 1, DECODED).round().astype(int).tolist():
        with suppress(Unreadable):
            data = opened.source.read(int(indices[place]))
            decode(data, channels=None, max_pixels=recipe.data.max_pixels, reduce_to=2 * min(recipe.data.image_size))
        tried += 1
        if time.monotonic() - began > LOOKING:
            break
    return (time.monotonic() - began) / tried * len(indices) / machine.cores


def machine_of(fabric: Fabric, recipe: Recipe) -> Machine:
    """What a run computes on, with the rate of matrix products in its precision measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    kind = "cuda" if fabric.device.type == "cuda" else "cpu"
    name = device_name(fabric.device) + (f", {cores} cores" if kind == "cpu" else "")
    rate = matrix_rate(fabric, recipe.measured.get("precision", "32"))
    return Machine(kind, name, cores, fabric.world_size, rate * fabric.world_size, memory(fabric.device))


def family_of(name: str) -> str:
    """The kind of a timm model, by what methods ask of it.

    Raises:
        InputError: timm has no such model.
    """
    create_arguments(name)
    return next((family for family, modules in FAMILIES.items() if is_model_in_modules(name, modules)), "maps")


def _of_start(init: str) -> dict[str, Any]:
    """What the weights of `--init` say of the encoder that they are for, as settings by path."""
    if init.startswith("timm:"):
        name = init.removeprefix("timm:").partition(".")[0]
        patch = re.search(r"_patch(\d+)", name)
        return {"encoder.name": name, "data.channels": 3} | ({"encoder.patch_size": int(patch[1])} if patch else {})
    if not is_run(Path(init)):
        network = network_at(init) or {}
        said = {f"encoder.{name}": value for name, value in network.items() if name != "image_size"}
        return said | ({"data.channels": 3} if said else {})
    made = describe_encoder(init)["create_model"]
    said = {f"encoder.{name}": value for name, value in made.items() if name not in ELSEWHERE}
    size = {"data.image_size": tuple(made["img_size"])} if made.get("img_size") else {}
    return {"encoder.name": made["model_name"], "data.channels": made["in_chans"], **said, **size}


def cost_of(recipe: Recipe) -> tuple[Cost, Backbone]:
    """What a step of a recipe costs, and its untrained encoder.

    Raises:
        InputError: encoder, method and image size do not go together.
    """
    channels = recipe.data.channels
    try:
        with torch.random.fork_rng(devices=[]):
            with _Unfilled():
                method = construct(replace(recipe, init=None, measured=dict(recipe.measured))).method
            if (words := method.prepare(Standardize([0.0] * channels, [1.0] * channels))) is not None:
                words.ready = True  # random words cost as much as fitted ones
            return counted(method, channels, recipe.data.image_size), method.encoder
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        height, width = recipe.data.image_size
        raise InputError(
            f"out of memory with two images of {height}x{width} px; a smaller encoder or image size is needed"
        ) from error


class _Unfilled(TorchFunctionMode):
    """Tensors are not filled with random numbers, which takes most of the time in which a large network is made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.uniform_, Tensor.normal_, Tensor.erfinv_):
            return args[0]
        return func(*args, **(kwargs or {}))


def estimated(fabric: Fabric, recipe: Recipe, images: int) -> str | None:
    """How long a run on so many images will take, in a line, by a count of its operations; None where it takes no minute
    by a rough one, or its minutes were said.

    Raises:
        InputError: encoder, method and image size do not go together.
    """
    if recipe.run.minutes:
        return None
    machine, batch = machine_of(fabric, recipe), recipe.optimiser.batch_size
    family = family_of(str(recipe.encoder["name"]))
    rough = supposed_speed(recipe, machine, family)
    steps = planned_steps(recipe, images, math.nan)
    if steps * batch / rough < SHORT:
        return None
    cost, encoder = cost_of(recipe)
    speed = machine.flops * share_of(machine, encoder.dim) / cost.flops
    return (
        f"about {lasting(steps * batch / speed)} by a count: {steps:,} steps of {batch}, {speed:,.0f} images/s "
        f"({cost.flops / 1e9:.2g} GFLOP an image, {machine.flops / 1e9:,.0f} GFLOP/s)"
    )


def told(found: Planned) -> list[str]:
    """A plan in five lines, with the reason for each choice and the flag that changes it, and what it will take."""
    recipe, looked, machine = found.recipe, found.looked, found.machine
    cost, encoder = cost_of(recipe)
    batch, (height, width) = recipe.optimiser.batch_size, recipe.data.image_size
    speed = machine.flops * share_of(machine, encoder.dim) / cost.flops
    steps = planned_steps(recipe, looked.images, batch / speed)
    seconds = steps * batch / speed
    patch = recipe.encoder.get("patch_size")
    depth = f", {recipe.encoder['depth']} blocks" if "depth" in recipe.encoder else ""
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
    parts, held = _parts(found, cost)
    values = {
        "method": (str(recipe.method["name"]), "--method"),
        "encoder": (f"{recipe.encoder['name']}, {encoder.dim} wide{depth}", "--encoder"),
        "images": (
            f"{height}x{width} px" + (f", patches of {patch}" if patch else "") + f", {recipe.data.channels} channels",
            "--image-size, --patch-size",
        ),
        "batch": (f"{batch} {parts}, {rate_text(recipe)}", "--batch-size, --lr"),
        "length": (
            f"{lasting(seconds)}, to about {end}, {steps:,} steps, {passes_text(steps, batch, looked.images)}",
            "--minutes, --epochs, --steps",
        ),
    }
    lines = [f"plan for {looked.images:,} images on {machine.name} ({machine.flops / 1e9:,.0f} GFLOP/s):"]
    lines += [
        f"  {name:<8} {value}" + (f": {found.reasons[name]}" if name in found.reasons else "") + f"  [{flags}]"
        for name, (value, flags) in values.items()
    ]
    words = "; a tokenizer is made first, for half as long at most" if recipe.method["name"] in WORDS else ""
    lines.append(
        f"  about {held / 2**30:.1f} GiB and {speed:,.0f} images/s by a count ({cost.flops / 1e9:.2g} GFLOP an image); measured "
        f"before the first step. Reading the images (about {lasting(found.reading)}) and judging come on top{words}"
    )
    if looked.images < FEW and recipe.init is None:
        lines.append(
            f"  note: {looked.images:,} images are few; public weights may be the better start (--init timm:NAME), or "
            "compare with them (docs/evaluate.md)"
        )
    return lines


def _parts(found: Planned, cost: Cost) -> tuple[str, float]:
    """In how many parts a batch will fit into memory, in words, and the bytes that this takes."""
    recipe, machine = found.recipe, found.machine
    half = recipe.measured.get("precision") in ("bf16", "16")
    local = recipe.optimiser.batch_size // machine.processes
    parts = recipe.optimiser.accumulation
    start = PROCESS if machine.kind == "cpu" else 0.0
    while local // parts > 1 and start + cost.memory(local // parts, half) > 0.9 * machine.memory:
        parts = next((more for more in range(2 * parts, local + 1) if local % more == 0), local)
    held = start + cost.memory(local // parts, half)
    return parts_text(local, parts), held
