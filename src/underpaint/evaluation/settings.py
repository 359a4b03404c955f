"""What the evaluations that train can be told by `--set`, each setting once; without torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import jsonargparse

from underpaint.config import check_bounds, setting
from underpaint.errors import InputError
from underpaint.evaluation import known
from underpaint.evaluation.options import Options
from underpaint.files import check_writable, place_of, refuse_inside
from underpaint.locking import holds_anything

MOST = 10**9  # that anything is counted to
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class NoSettings:
    """Of an evaluation that has none."""


@dataclass
class FineTuning:
    """A recipe. Defaults are MAE's for ViT-B (arXiv 2111.06377, table 9), which fit most ViTs."""

    epochs: float = setting(100.0, "passes over the images", above=0, high=1_000_000)
    batch_size: int = setting(1024, "of a step", unit="images", low=1, high=1_000_000)
    lr: float = setting(5e-4, "peak learning rate", unit="per 256 images", low=0, high=1_000)
    optimiser: str = setting("adamw", "timm's name of one")
    betas: tuple[float, float] = setting((0.9, 0.999), "of AdamW", low=0, below=1)
    weight_decay: float = setting(0.05, "of the optimiser", low=0, high=100)
    layer_decay: float = setting(0.65, "rate of a layer over that of the layer above it; 1 for none", above=0, high=1)
    warmup: float = setting(0.05, "linear warm-up", unit="share of the run", low=0, high=1)
    min_lr_ratio: float = setting(5e-4, "rate at the end, over the peak", low=0, high=1)
    clip: float | None = setting(None, "largest norm of the gradient", unset="none", above=0)
    drop_path: float = setting(0.1, "share of the blocks that a step leaves out", low=0, below=1)
    mixup: float = setting(0.8, "both parameters of the beta distribution; 0 for none", low=0, high=1_000)
    cutmix: float = setting(1.0, "both parameters of the beta distribution; 0 for none", low=0, high=1_000)
    smoothing: float = setting(0.1, "of labels", low=0, below=1)
    erasing: float = setting(0.25, "share of the images of which a part is erased", low=0, high=1)
    augment: str | None = setting(
        "rand-m9-mstd0.5-inc1", "timm's name of a RandAugment policy; 8-bit RGB images only", unset="none"
    )
    ema_decay: float = setting(0.0, "of the moving average of the weights that is judged; none where 0", low=0, below=1)
    binary: bool = setting(False, "one binary loss a class in place of one softmax (RSB)")
    head_scale: float = setting(
        2e-5, "deviation of the head's first weights; 1 leaves them as timm made them", low=0, high=1
    )
    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0), "share of the area that a random crop covers", above=0, high=1
    )


# the four papers' and RSB's; batch sizes are the papers', `batch_size` given by the user scales the rate
FINE_TUNING: dict[str, Callable[[], FineTuning]] = {
    "mae-vit-base": FineTuning,
    "energy": lambda: FineTuning(lr=1e-3, layer_decay=0.75, cutmix=0.0, erasing=0.0, augment="rand-m9-mstd0.5"),
    "cae-vit-base": lambda: FineTuning(batch_size=4096, lr=5e-4, warmup=0.05, min_lr_ratio=1.25e-4),
    "localmim-vit-base": lambda: FineTuning(lr=5e-4, layer_decay=0.65, warmup=0.2, min_lr_ratio=5e-3),
    "localmim-swin-base": lambda: FineTuning(lr=1e-3, layer_decay=0.9, warmup=0.2, min_lr_ratio=6.25e-5),
    "rsb-a2": lambda: _rsb(300.0, 5e-3, 0.05, "rand-m7-mstd0.5-inc1"),
    "rsb-a3": lambda: _rsb(100.0, 8e-3, 0.0, "rand-m6-mstd0.5-inc1"),
    # ours, for small images on a laptop; no rate serves all (docs/evaluate.md)
    "small": lambda: FineTuning(
        batch_size=128,
        lr=1e-3,
        mixup=0.0,
        cutmix=0.0,
        erasing=0.0,
        augment=None,
        crop_scale=(0.4, 1.0),
        drop_path=0.0,
    ),
}


def _rsb(epochs: float, rate: float, drop_path: float, augment: str) -> FineTuning:
    """ResNet strikes back (arXiv 2110.00476, tables 2 and 3)."""
    return FineTuning(
        epochs=epochs,
        batch_size=2048,
        lr=rate / 8,
        optimiser="lamb",
        weight_decay=0.02,
        layer_decay=1.0,
        warmup=5 / epochs,
        min_lr_ratio=1e-6 / rate,
        drop_path=drop_path,
        mixup=0.1,
        smoothing=0.0,
        erasing=0.0,
        augment=augment,
        binary=True,
        head_scale=1.0,
    )


def fine_tuning(name: str) -> FineTuning:
    """A published recipe, or ours for small images.

    Raises:
        InputError: there is none of that name.
    """
    if name not in FINE_TUNING:
        raise InputError(f"--recipe {name}: for fine-tuning there are {', '.join(FINE_TUNING)}")
    return FINE_TUNING[name]()


@dataclass(frozen=True)
class SegmentConfig:
    """Settings. Crops are as large as the images that the encoder takes; a test image is covered by such windows."""

    steps: int = setting(2_000, "of the training of each network", low=1, high=MOST)
    # two at least: UperNet has a batch norm behind a mean over the image
    batch_size: int | None = setting(
        None, "of a step", unit="images", unset="16, fewer of large images", low=2, high=1_000_000
    )
    lr: float = setting(1e-3, "peak, of what is new; ten times that for a linear head", low=0, high=1_000)
    # not so low that an encoder which has all to learn is held back
    encoder_lr: float = setting(3e-4, "peak, of the encoder under UperNet", low=0, high=1_000)
    power: float = setting(0.9, "of the polynomial decay of the rates, as in mmseg", low=0, high=100)
    weight_decay: float = setting(0.05, "of AdamW", low=0, high=100)
    warmup: float = setting(0.1, "linear warm-up", unit="share of the run", low=0, high=1)
    overlap: float = setting(1 / 3, "of the windows at test", unit="share of a window", low=0, below=1)
    scale: tuple[float, float] = setting((0.5, 2.0), "range of the random scale of a crop", above=0, high=100)
    channels: int = setting(128, "of UperNet", low=1, high=4_096)


@dataclass(frozen=True)
class DetectConfig:
    """Settings. What torchvision would fix for COCO is measured on the training data: `detect.anchor_config`."""

    steps: int = setting(3_000, "of the training of each network", low=1, high=MOST)
    batch_size: int | None = setting(
        None, "of a step", unit="images", unset="8 small images, 4, or 2 large ones", low=1, high=1_000_000
    )
    stride: int | None = setting(
        None, "of the finest map: 2, 4 or 8", unit="pixels", unset="4, or 2 for small objects", low=2, high=8
    )
    # alike, so that an encoder that has all to learn is not held back
    lr: float = setting(3e-4, "peak, of what is new", low=0, high=1_000)
    encoder_lr: float = setting(3e-4, "peak, of the encoder", low=0, high=1_000)
    weight_decay: float = setting(0.05, "of AdamW", low=0, high=100)
    warmup: float = setting(0.1, "linear warm-up", unit="share of the run", low=0, high=1)
    channels: int = setting(
        128, "of the pyramid; the heads are as wide (at 256 they are torchvision's)", low=1, high=4_096
    )
    regions: int = setting(64, "of an image that the heads are trained on", low=1, high=100_000)


SETTINGS: dict[str, type] = {"finetune": FineTuning, "segment": SegmentConfig, "detect": DetectConfig}  # by task
WHAT = {"finetune": "fine-tuning", "segment": "segmentation", "detect": "detection"}


def foresee(tasks: Sequence[str], options: Options, out: Path, data: str | Path) -> None:
    """Complain of what needs no image and no network to be known wrong.

    Raises:
        InputError: no such task or setting, a number out of bounds, a folder that is something else or cannot be written.
    """
    known(tasks)
    check_bounds(options, Options, "--{}")
    if "outliers" in tasks:
        if options.against is None:
            raise InputError("--task outliers: give the other images with --against DATA")
        place_of(options.against)
    if again := [name for name in options.beside if options.beside.count(name) > 1]:
        raise InputError(f"--beside {again[0]}: is given twice")
    kinds = {task: SETTINGS[task] for task in tasks if task in SETTINGS}
    if options.settings and not kinds:
        name = next(iter(options.settings))
        raise InputError(f"--set {name}: {', '.join(tasks)} has no settings; {', '.join(SETTINGS)} have some")
    if options.recipe is not None and "finetune" in kinds:
        fine_tuning(options.recipe)
    for task, kind in kinds.items():
        recipe = fine_tuning(options.recipe) if task == "finetune" and options.recipe is not None else kind()
        changed(recipe, options.settings, WHAT[task])
    refuse_inside(out, data, options.against)
    check_writable(out)
    if out.is_dir() and holds_anything(out) and not (out / "results.json").is_file():
        raise InputError(f"--out {out}: exists and holds no evaluation; choose another path")


def changed(settings: Settings, given: Mapping[str, object], what: str) -> Settings:
    """A dataclass of settings with some changed, as `--set NAME=VALUE` gave them, checked by its annotations and bounds.

    Raises:
        InputError: no such setting, a value of another kind, or one out of bounds.
    """
    kind: Any = type(settings)
    types = {field.name: field.type for field in fields(kind)}
    made = settings
    for name, value in given.items():
        if name not in types:
            raise InputError(f"--set {name}: a setting of {what} is one of {', '.join(sorted(types))}")
        try:
            parsed = _parser(kind).parse_object({"set": {name: value}}, defaults=True).as_dict()["set"]
        except Exception as error:  # jsonargparse's, of several kinds
            raise InputError(f"--set {name}={value}: it must be {_words(types[name])}") from error
        if value is None and type(None) not in get_args(types[name]):  # which jsonargparse takes for anything
            raise InputError(f"--set {name}=null: it must be {_words(types[name])}")
        made = replace(made, **{name: parsed[name]})  # pyright: ignore[reportArgumentType, reportCallIssue]
    check_bounds(made, kind, "--set {}")
    return made


@cache
def _parser(kind: type) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "set")
    return parser


def _words(kind: Any) -> str:
    """A type, as a person says it."""
    if get_origin(kind) is tuple:
        return "two numbers, [A, B]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "null"}
    return " or ".join(words[each] for each in (get_args(kind) or (kind,)))
