"""Every setting of a run, declared once: type, default, unit, bounds and a line of help. Imports nothing heavy."""

import math
import operator
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from underpaint.errors import InputError

FORMAT = 2  # of a recipe
# bounds that several declarations have: pixels of a side, channels of an image, length, seed
SIDE, CHANNELS, MINUTES, SEEDS = 16_384, 4_096, 1_000_000, 2**32


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    unset: str = "",
    low: int | float | None = None,
    above: int | float | None = None,
    high: int | float | None = None,
    below: int | float | None = None,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: taken where nothing is said.
        help: what it is.
        unit: what it is counted in.
        unset: what is meant where the default is None.
        low, above, high, below: at least, above, at most, below: bounds of the number, or of each of several.
    """
    bounds = {"at least": low, "above": above, "at most": high, "below": below}
    said = {"help": help, "unit": unit, "unset": unset, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    return field(default=default, metadata=said)


@dataclass
class AnyMethod:
    """What many methods have alike; their other settings are the arguments of their classes."""

    name: str = setting("localmim", "of pretraining; 'underpaint methods' lists them")
    mask_ratio: float | None = setting(None, "share that is hidden", unset="the method's own", above=0, below=1)
    mask_patch_size: int | None = setting(
        None, "side of what a mask hides whole", unit="pixels", unset="the method's own", low=1, high=SIDE
    )


@dataclass
class AnyEncoder:
    """What the flags say of an encoder; its other settings are those of `timm.create_model`."""

    name: str = setting("vit_small_patch16_224", "any timm name")
    patch_size: int | None = setting(
        None, "side of a patch", unit="pixels", unset="the encoder's own", low=1, high=SIDE
    )


@dataclass(slots=True)
class Data:
    """What is read, and how it is cut."""

    path: str | None = setting(None, "the images")
    labels: str | None = setting(None, "labelled images for the probes, where they lie apart", unset="the images")
    groups: str | None = setting(
        None, "regular expression; images of one group (patient, slide) stay on one side of a hold-out", unset="none"
    )
    all_images: bool = setting(False, "also train on the images that are held out to judge by, without their labels")
    image_size: tuple[int, int] = setting((224, 224), "height and width, N or HxW", unit="pixels", low=4, high=SIDE)
    channels: int = setting(3, "of the images", low=1, high=CHANNELS)
    crop_scale: tuple[float, float] = setting(
        (0.2, 1.0), "share of the area that a random crop covers", above=0, high=1
    )
    flip: bool = setting(True, "mirror half of the crops")
    cache_limit: float = setting(2.0, "up to which a set is kept decoded", unit="GiB", low=0)
    window: float = setting(
        2.0,
        "of encoded images that are shuffled together, where a large set lies in shards or row groups",
        unit="GiB",
        above=0,
    )
    max_pixels: int = setting(200_000_000, "larger images are skipped", unit="pixels", low=1)
    nodata: float | None = setting(None, "value of missing pixels, beside NaN and what files say themselves")
    workers: int | None = setting(
        None, "processes that read ahead", unset="by cores, device and cache", low=0, high=1_024
    )
    masks: Literal["aside", "images"] = setting(
        "aside", "what masks that lie beside images of their names are taken for"
    )
    drop_duplicates: bool = setting(False, "leave out images that look like another, or like one that judges")
    changed: Literal["refuse", "accept"] = setting("refuse", "what to do where images changed since a run began")


@dataclass(slots=True)
class Optimiser:
    """AdamW, warm-up and cosine."""

    lr: float = setting(1.5e-4, "peak learning rate", unit="per 256 images", low=0)
    weight_decay: float = setting(0.05, "of AdamW, on what is no bias, norm or position", low=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "of AdamW", low=0, below=1)
    warmup: float = setting(0.05, "linear warm-up", unit="share of the run", low=0, high=1)
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    layer_decay: float = setting(
        1.0, "rate of a layer of the encoder, times that of the layer above it; 1: the same for all", above=0, high=1
    )
    freeze: int = setting(0, "first blocks of the encoder that stay as they are, with what is below them", low=0)
    pull: float = setting(
        0.0, "of the encoder's weights towards their start (L2-SP), in place of their weight decay", low=0
    )
    batch_size: int = setting(256, "of a step, over all devices", unit="images", low=1, high=1_000_000)
    accumulation: int = setting(1, "parts that a batch is computed in, to save memory", low=1)


@dataclass(slots=True)
class Length:
    """How long, and what happens on the way. One of epochs, steps and minutes."""

    epochs: float | None = setting(None, "passes over the images", unset="100", above=0, high=1_000_000)
    steps: int | None = setting(None, "optimiser steps", unset="by the epochs", above=0, high=10**10)
    minutes: float | None = setting(
        None,
        "of training, probes not counted; turned into steps by measuring first",
        unset="by the epochs",
        above=0,
        high=MINUTES,
    )
    seed: int = setting(0, "of everything random", low=0, below=SEEDS)
    precision: Literal["auto", "32", "bf16", "16"] = setting(
        "auto", "of a network's products; auto is bf16 on a GPU that has it, else 32"
    )
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile")
    deterministic: bool = setting(
        False, "on a GPU, only kernels that give the same numbers each time, which are slower; a CPU's always do"
    )
    recompute: bool = setting(
        False,
        "keep what is between blocks alone and compute their inside again on the way back: less memory, more time",
    )
    devices: int | None = setting(None, "GPUs, or processes on a CPU", unset="all GPUs, or 1", low=1, high=1_024)
    nodes: int = setting(1, "machines", low=1, high=65_536)
    probe_every: int | None = setting(None, "between probes", unit="steps", unset="a quarter of the run", low=1)
    probe_share: float = setting(
        0.1, "of the training's time that judging it may take, on the way and at the end together", low=0, high=100
    )
    checkpoint_every: int | None = setting(None, "between checkpoints", unit="steps", unset="about two minutes", low=1)
    log_every: int | None = setting(None, "between log lines", unit="steps", unset="about 200 lines a run", low=1)
    loggers: list[str] = field(
        default_factory=list, metadata={"help": "wandb, mlflow beside TensorBoard", "bounds": {}}
    )


@dataclass(slots=True)
class Recipe:
    """A named run. `method` and `encoder` hold a `name` and the settings that go to its constructor."""

    method: dict[str, Any] = field(default_factory=lambda: {"name": AnyMethod.name})
    encoder: dict[str, Any] = field(default_factory=lambda: {"name": AnyEncoder.name})
    init: str | None = setting(
        None, "weights to start from: timm:NAME, a run, a Hugging Face folder or a file", unset="random"
    )
    data: Data = field(default_factory=Data)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: Length = field(default_factory=Length)
    measured: dict[str, Any] = field(default_factory=dict)  # decided at the start of the run
    format: int = FORMAT


SECTIONS: dict[str, type] = {"data": Data, "optimiser": Optimiser, "run": Length}
DECLARED: dict[str, type] = {"method": AnyMethod, "encoder": AnyEncoder, **SECTIONS}
LENGTHS = ("epochs", "steps", "minutes")
HUGE = 10**9  # what no number of a method or an encoder is beyond
TESTS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}

# flag of the command line -> path in the recipe; all else by --set
FLAGS = {
    "method": "method.name",
    "mask_ratio": "method.mask_ratio",
    "encoder": "encoder.name",
    "patch_size": "encoder.patch_size",
    "image_size": "data.image_size",
    "labels": "data.labels",
    "groups": "data.groups",
    "all_images": "data.all_images",
    "drop_duplicates": "data.drop_duplicates",
    "workers": "data.workers",
    "lr": "optimiser.lr",
    "weight_decay": "optimiser.weight_decay",
    "warmup": "optimiser.warmup",
    "batch_size": "optimiser.batch_size",
    "init": "init",
    "epochs": "run.epochs",
    "steps": "run.steps",
    "minutes": "run.minutes",
    "seed": "run.seed",
    "precision": "run.precision",
    "devices": "run.devices",
    "nodes": "run.nodes",
    "probe_every": "run.probe_every",
    "checkpoint_every": "run.checkpoint_every",
}
# those that `pretrain` chooses for images, machine and time where no recipe is given (decision 18)
PLANNED = ("method", "encoder", "patch_size", "image_size", "lr", "batch_size", *LENGTHS)
# those of `compare`, which decides the others itself
COMPARED = [name for name in FLAGS if name not in ("method", *LENGTHS, "seed", "probe_every")]


def declaration(path: str) -> Field[Any]:
    """The field that declares a setting: `declaration("optimiser.lr")`."""
    section, _, name = path.rpartition(".")
    return next(each for each in fields(DECLARED[section] if section else Recipe) if each.name == name)


def check(recipe: Recipe) -> None:
    """Every bound that is declared, and what settings must keep to together.

    Raises:
        InputError: a value outside, by its path.
    """
    for section, kind in SECTIONS.items():
        check_bounds(getattr(recipe, section), kind, f"{section}.{{}}")
    check_bounds(recipe.method, AnyMethod, "method.{}")
    check_bounds(recipe.encoder, AnyEncoder, "encoder.{}")
    if not isinstance(patch := recipe.encoder.get("patch_size"), int | None):
        raise InputError(f"encoder.patch_size: {patch!r}; it must be a whole number of pixels")
    for section, settings in (("method", recipe.method), ("encoder", recipe.encoder)):
        for name, value in settings.items():  # a class says what else it takes; so much is true of each
            if isinstance(value, int | float) and (wrong := outside(value, {"at least": -HUGE, "at most": HUGE})):
                raise InputError(f"{section}.{name}: {wrong}")
    if len(lengths := [name for name in LENGTHS if getattr(recipe.run, name) is not None]) > 1:
        raise InputError(f"give one of --epochs, --steps and --minutes, not {' and '.join(lengths)}")
    batch, parts = recipe.optimiser.batch_size, recipe.optimiser.accumulation
    if batch % parts:
        raise InputError(f"optimiser.accumulation: {parts} does not divide the batch of {batch}")
    if recipe.data.crop_scale[0] > recipe.data.crop_scale[1]:
        raise InputError(f"data.crop_scale: {list(recipe.data.crop_scale)}; the lower share comes first")


def check_bounds(settings: object, kind: type, path: str) -> None:
    """That numbers are finite and within the bounds that the fields of `kind` declare.

    Args:
        settings: an object of that kind, or a mapping of its names.
        path: how a setting is called, with `{}` for its name.

    Raises:
        InputError: a number that is not.
    """
    for declared in fields(kind):
        name = declared.name
        value = settings.get(name) if isinstance(settings, dict) else getattr(settings, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                wrong = outside(number, declared.metadata.get("bounds", {}))
                if wrong:
                    raise InputError(f"{path.format(name.replace('_', '-') if path == '--{}' else name)}: {wrong}")


def bounds_of(path: str) -> dict[str, int | float]:
    """The bounds that a setting is declared with: `bounds_of("run.minutes")`."""
    return declaration(path).metadata["bounds"]


def outside(number: int | float, bounds: Mapping[str, int | float]) -> str:
    """What is wrong with a number, and what would be right; nothing where it is within its bounds."""
    # a whole number may be too large to be a float
    if (isinstance(number, int) or math.isfinite(number)) and all(
        TESTS[word](number, limit) for word, limit in bounds.items()
    ):
        return ""
    wanted = " and ".join(f"{word} {limit:,}" for word, limit in bounds.items()) or "a finite number"
    return f"{number if isinstance(number, int) else format(number, 'g')}; it must be {wanted}"
