"""What is not said of a run (method, encoder, sizes, batch, length), chosen for its images, the machine and the time.

The figures are from the tables of docs/log.md; decision 18 says which of them are measured and which are carried over.
Whatever is said is kept, and the rest is chosen around it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from underpaint.config import AnyEncoder, AnyMethod, Recipe
from underpaint.errors import InputError
from underpaint.recipes import CONTINUE, RECIPES, SMALL, TINY
from underpaint.recipes.recipe import plain

CPU_MINUTES, GPU_HOURS = 20.0, 24.0  # without a length: what a CPU is given, and the most that a GPU is
PASSES = 800  # through the images, as is usual on ImageNet
FEW_SHOWN, MOST_PASSES = (
    5_000_000,
    5_000,
)  # few images are passed through more often: until so many were shown, or so often
HOG_MINUTES = 6.0  # of a CPU, from which on LocalMIM with HOG was ahead of MAE; before, it was behind
FEW_IMAGES = 5_000  # below which half the rate was better with small patches
STEPS = 1_000  # that a run should have at least: batches are halved for it
BATCHES = (32, 1024)  # the smallest that is chosen for it; and what large networks on a GPU start from
GENTLY = 0.25  # of the rate from random weights, where weights are good already: not tuned
GPU_SHARE = 0.3  # of the matrix rate that a step reaches on a GPU: not measured
OTHER_FLOPS = 1e10  # of an image of 224 px in a network that is none of ours: between a ResNet-18's and a ResNet-50's
# times the cost of LocalMIM with the same encoder; ViT-S/16 at 224 px, counted, and CIM by time
COSTS = {"mae": 1.0, "localmim": 1.0, "conditional-energy": 1.2, "simmim": 3.5, "beit": 3.5, "cae": 3.6}
COSTS |= {"cim": 4.5, "energy": 7.0}
SIDES = {224: 16, 128: 8, 96: 8, 64: 8, 48: 6, 32: 4, 28: 4, 24: 4, 16: 2, 8: 2}  # and patches, pixels
SMALLEST = 32  # pixels: smaller than that are only images that are so
WIDTHS = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}
WORDS = ("beit", "cae", "cim")  # whose small recipes have patches of a quarter of the image


@dataclass(frozen=True)
class Network:
    """A plain ViT that a plan may choose.

    Attributes:
        encoder: of a recipe.
        needs: images to be shown to it, or it is too large for the time.
        share: of the rate of a large matrix product that its steps reach on a CPU.
        lr: per 256 images where no recipe was tuned.
        side: pixels, up to which a smaller one will do.
        scale: what a shipped recipe of its size is called, after the method.
    """

    encoder: Mapping[str, Any]
    width: int
    depth: int
    needs: int
    share: float
    lr: float
    side: int
    scale: str = ""


NETWORKS = (
    Network({"name": "vit_base_patch16_224"}, 768, 12, 100_000_000, 0.82, 5e-4, 10**6, "vit-base-in1k"),
    Network({"name": "vit_small_patch16_224"}, 384, 12, 5_000_000, 0.77, 5e-4, 10**6, "vit-small-in1k"),
    Network({"name": "vit_tiny_patch16_224"}, 192, 12, 1_000_000, 0.59, 5e-4, 10**6),
    Network(SMALL, 192, 8, 500_000, 0.58, 2e-3, 160, "small-64"),
    Network(TINY, 128, 4, 100_000, 0.56, 2e-3, 64, "tiny-32"),
)
LARGE = NETWORKS[:2]


@dataclass(frozen=True)
class Looked:
    """What the headers of some images say; sizes in pixels.

    Attributes:
        images: to pretrain on.
        height, width: medians.
        channels: 3 where they are not all alike.
        alike: whether all have about the same proportions.
    """

    images: int
    height: int
    width: int
    channels: int
    alike: bool


@dataclass(frozen=True)
class Machine:
    """What a run computes on: `flops` a second of a large matrix product, in the run's precision, on all devices together;
    `memory` of one of them in bytes; `name` is for people."""

    kind: str  # "cpu" or "cuda"
    name: str
    cores: int
    processes: int
    flops: float
    memory: int


@dataclass(frozen=True)
class Plan:
    """Plain settings of a recipe, and the reason for each of method, encoder, images, batch and length."""

    settings: dict[str, Any]
    reasons: dict[str, str]


@dataclass(frozen=True)
class _Choice:
    """A network at an image and patch size; images it is shown a second, and why it was taken."""

    network: Network
    size: tuple[int, int]
    patch: int | None
    speed: float
    why: str = ""


def plan(said: Mapping[str, Any], looked: Looked, machine: Machine, family: str = "vit") -> Plan:
    """Choose what is not said.

    Args:
        said: settings by path, as `FLAGS` has them.
        family: of the encoder that is said: "vit", "beit", "swin", or "maps" for all others.

    Raises:
        InputError: no patch size divides what is said of the image size.
    """
    method = said.get("method.name") or _method_of(said, family)
    choice = _choose(said, looked, machine, method or AnyMethod.name, family)
    shown, length, why_length = _length(said, looked, machine, choice.speed)
    why_method = "as asked"
    if method is None:
        method, why_method = _method(machine, shown / choice.speed / 60, min(choice.size), family)
    base = _base(method, choice.network, family, choice.patch)
    batch, why_batch = _batch(said, looked, machine, shown, base, choice.network)
    settings = plain(base)
    settings["encoder"] = {**choice.network.encoder}
    if choice.patch is not None:
        settings["encoder"]["patch_size"] = choice.patch
    if tuned := base.encoder.get("init_values"):  # CAE's
        settings["encoder"]["init_values"] = tuned
    settings["data"] |= {"image_size": list(choice.size), "channels": looked.channels}
    rate = _rate(looked, choice.network, batch, base)
    settings["optimiser"] |= {"batch_size": batch, "lr": rate}
    if "init" in said:
        gently = RECIPES[CONTINUE]()
        settings["optimiser"] |= {"lr": GENTLY * rate, "warmup": gently.optimiser.warmup}
        settings["optimiser"]["layer_decay"] = gently.optimiser.layer_decay
        if family != "maps":  # which do not all have such a setting
            settings["encoder"].setdefault("drop_path_rate", gently.encoder["drop_path_rate"])
    settings["run"] = plain(Recipe())["run"] | length
    reasons = {"method": why_method, "encoder": choice.why, "batch": why_batch, "length": why_length}
    reasons["images"] = _why_size(said, looked, choice)
    return Plan(settings, reasons)


def _method_of(said: Mapping[str, Any], family: str) -> str | None:
    """The method whose settings are said without its name; none where all methods have them."""
    own = any(path.startswith("method.") and path[7:] not in AnyMethod.__dataclass_fields__ for path in said)
    return AnyMethod.name if own and family in ("vit", "swin") else None


def _method(machine: Machine, minutes: float, side: int, family: str) -> tuple[str, str]:
    if family == "maps":
        return "cim", "the one that taught a small ResNet most"
    if family == "beit":
        return "beit", "made for this network"
    if family == "swin":
        return "localmim", "of those that take a Swin the best on a ViT"
    if side < 24 or (machine.kind == "cpu" and minutes < HOG_MINUTES):
        return "mae", "ahead in short runs" if side >= 24 else "small patches have no orientations"
    return "localmim", f"the best probes for their time, from {HOG_MINUTES:.0f} minutes on"


def _choose(said: Mapping[str, Any], looked: Looked, machine: Machine, method: str, family: str) -> _Choice:
    """The largest images, and of these the largest network, that the time is enough for."""
    seconds = _seconds(said, machine)
    wanted = _images_said(said, looked)
    choices = _choices(said, looked, machine, method, family)
    if not choices:
        raise InputError("--patch-size: no image of a size that it divides fits these images; give --image-size too")
    fixed = _encoder_said(said)
    for choice in choices:
        shown = choice.speed * seconds if "run.minutes" in said else min(choice.speed * seconds, _most(looked))
        if shown >= choice.network.needs and (wanted is None or wanted / choice.speed <= seconds):
            why = f"the largest that has the time to see {count_text(float(choice.network.needs))} images"
            return replace(choice, why="as asked" if fixed else why)
    fastest = max(each.speed for each in choices)
    choice = next(each for each in choices if each.speed > 0.99 * fastest)
    few = "run.minutes" not in said and _most(looked) < choice.network.needs
    return replace(
        choice, why="as asked" if fixed else f"the smallest, for {'so few images' if few else 'a short time'}"
    )


def _choices(said: Mapping[str, Any], looked: Looked, machine: Machine, method: str, family: str) -> list[_Choice]:
    """Images from large to small, and for each size networks from large to small."""
    found = []
    networks = [_network_said(said)] if _encoder_said(said) else NETWORKS
    # weights that exist are used to larger images than these may be
    sized, short = said.get("data.image_size"), max(SIDES) if "init" in said else min(looked.height, looked.width)
    sides: list[tuple[tuple[int, int], int, int]] = []
    if sized is not None:
        size = (sized, sized) if isinstance(sized, int) else (int(sized[0]), int(sized[1]))
        sides = [(size, min(size), _patch(said, size, method))]
    else:
        fitting = [side for side in SIDES if side <= 1.1 * short] or [min(SIDES)]
        for side in [side for side in fitting if side >= SMALLEST] or fitting[:1]:
            patch = _patch(said, (side, side), method)
            if (size := _proportioned(looked, side, patch, family, "init" in said)) is not None:
                sides.append((size, side, patch))
    for size, side, patch in sides:
        for network in networks:
            if sized is None and len(networks) > 1 and network.side < side:
                continue
            speed = _speed(network, size, patch, looked, machine, method, family)
            found.append(_Choice(network, size, patch if family in ("vit", "beit") else None, speed))
    return found


def _patch(said: Mapping[str, Any], size: tuple[int, int], method: str) -> int:
    """The side of a patch: an eighth of a small image, 8 px up to 160, else 16; one that divides the image."""
    if (patch := said.get("encoder.patch_size")) is not None:
        return int(patch)
    side = min(size)
    wanted = SIDES.get(side) or (max(2, side // 8) if side <= 64 else 8 if side <= 160 else 16)
    if method == "cim":
        wanted = 16 if side > 160 else 8 if side >= 24 else 4  # its tokenizer halves an image some times
    elif method in WORDS and side <= 56:
        wanted = side // 4
    divisors = [each for each in range(2, min(size) + 1) if size[0] % each == 0 and size[1] % each == 0]
    return min(divisors, key=lambda each: abs(math.log(each / wanted)), default=wanted)


def _proportioned(looked: Looked, side: int, patch: int, family: str, enlarged: bool) -> tuple[int, int] | None:
    """Height and width of about `side` squared pixels in the proportions of the images, an even number of patches each:
    what is coarser than a patch fits, too. None where the patch is too large for it."""
    if family in ("maps", "swin"):
        multiple = 224 if family == "swin" else 64
        size = max(multiple, side // multiple * multiple)
        return size, size
    square = round(side / patch) * patch
    if not looked.alike or 0.9 < looked.width / looked.height < 1.1:
        return (square, square) if square > patch else None
    ratio = min(3.0, max(1 / 3, looked.width / looked.height))
    steps = range(2 * patch, int(2.2 * side) + 1, 2 * patch)
    sizes = [(h, w) for h in steps for w in steps if max(h / looked.height, w / looked.width) <= 1.1 or enlarged]

    def unlike(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] * size[1] / side**2)) + 2 * abs(math.log(size[1] / size[0] / ratio))

    return min(sizes, key=unlike, default=None)


def _speed(
    network: Network,
    size: tuple[int, int],
    patch: int,
    looked: Looked,
    machine: Machine,
    method: str,
    family: str,
) -> float:
    """Images a second."""
    if family in ("vit", "beit"):
        flops = vit_flops(network.width, network.depth, size, patch, looked.channels) * COSTS.get(method, 1.0)
    else:
        flops = OTHER_FLOPS * size[0] * size[1] / 224**2
    return machine.flops * share_of(machine, network.width) / flops


def supposed_speed(recipe: Recipe, machine: Machine, family: str) -> float:
    """Images a second of a recipe, by its encoder's name alone."""
    said = {f"encoder.{name}": value for name, value in recipe.encoder.items()}
    size = recipe.data.image_size
    patch = int(recipe.encoder.get("patch_size") or max(SIDES.values()))
    looked = Looked(1, *size, recipe.data.channels, True)
    return _speed(_network_said(said), size, patch, looked, machine, str(recipe.method["name"]), family)


def share_of(machine: Machine, width: int) -> float:
    """Of the rate of a large matrix product that steps of a network so wide reach."""
    if machine.kind == "cuda":
        return GPU_SHARE
    return next((each.share for each in NETWORKS if each.width <= width), NETWORKS[-1].share)


def vit_flops(width: int, depth: int, size: tuple[int, int], patch: int, channels: int) -> float:
    """Of a step of LocalMIM for an image: a quarter of the patches through a ViT, then its decoders.

    Within a tenth of what `benchmarks/step.py` counts for the four ViTs of docs/log.md.
    """
    tokens = max(1.0, size[0] * size[1] / patch**2)
    seen, narrow, decoders = tokens / 4, max(64, width // 3), 2 if depth <= 4 else 4
    encoder = 72 * width**2 * depth * seen + 12 * seen**2 * width * depth + 6 * seen * patch**2 * channels * width
    return encoder + decoders * (72 * narrow**2 * tokens + 12 * tokens**2 * narrow)


def _encoder_said(said: Mapping[str, Any]) -> bool:
    return any(path.startswith("encoder.") and path != "encoder.patch_size" for path in said)


def _network_said(said: Mapping[str, Any]) -> Network:
    """The encoder that is said, as large as its name says it is."""
    encoder = {
        path[8:]: value for path, value in said.items() if path.startswith("encoder.") and path[8:] != "patch_size"
    }
    name = encoder.setdefault("name", AnyEncoder.name)
    width, depth = next((sizes for word, sizes in WIDTHS.items() if word in name), WIDTHS["small"])
    width, depth = (
        own if isinstance(own := encoder.get(setting), int) and own > 0 else known
        for setting, known in (("embed_dim", width), ("depth", depth))
    )
    like = next((each for each in NETWORKS if each.width <= width and each.depth <= depth), NETWORKS[-1])
    return replace(like, encoder=encoder, width=width, depth=depth, needs=NETWORKS[-1].needs)


def _seconds(said: Mapping[str, Any], machine: Machine) -> float:
    """That training may take."""
    if (minutes := said.get("run.minutes")) is not None:
        return 60 * float(minutes)
    return 60 * CPU_MINUTES if machine.kind == "cpu" else 3600 * GPU_HOURS


def _images_said(said: Mapping[str, Any], looked: Looked) -> float | None:
    """Images that are shown where a length other than time is said."""
    if (epochs := said.get("run.epochs")) is not None:
        return float(epochs) * looked.images
    if (steps := said.get("run.steps")) is not None:
        return float(steps) * said.get("optimiser.batch_size", 256)
    return None


def _most(looked: Looked) -> float:
    """Images that are shown at most where no length is said."""
    return float(max(PASSES * looked.images, min(FEW_SHOWN, MOST_PASSES * looked.images)))


def _length(
    said: Mapping[str, Any], looked: Looked, machine: Machine, speed: float
) -> tuple[float, dict[str, Any], str]:
    """Images shown, the settings of the length, and why."""
    if (wanted := _images_said(said, looked)) is not None:
        return wanted, {}, "as asked"
    shown, most = speed * _seconds(said, machine), _most(looked)
    if "run.minutes" in said:
        return shown, {}, "as asked"
    if most < shown:
        why = "as is usual" if most <= PASSES * looked.images else "few images are passed through more often"
        return most, {"epochs": most / looked.images}, why
    if machine.kind == "cuda":
        why = f"a day at most: {PASSES} passes, as is usual, would take {most / speed / 3600:.0f} hours"
        return shown, {"minutes": 60 * GPU_HOURS}, why
    return shown, {"minutes": CPU_MINUTES}, "a first answer on a CPU"


def _base(method: str, network: Network, family: str, patch: int | None) -> Recipe:
    """The shipped recipe for a method and a network of this size, else one of its neighbours', else defaults."""
    scales = [network.scale, *(["tiny-32"] if network.scale == "small-64" else [])] if family == "vit" else []
    for scale in scales:
        if (found := RECIPES.get(f"{method}-{scale}")) is not None:
            recipe = found()
            # settings of the method were tuned for this network, not for any of about its size
            own = scale == network.scale and any(_alike(each.encoder, network.encoder) for each in NETWORKS)
            fits = own and (patch or 0) % recipe.method.get("stride", 1) == 0  # CIM's words
            return recipe if fits else replace(recipe, method={"name": method}, encoder={})
    recipe = Recipe(method={"name": method}, encoder={})
    if family != "vit" and method == "cim":
        recipe.optimiser = RECIPES["cim-resnet-32"]().optimiser
    else:
        recipe.optimiser.lr = network.lr
    return recipe


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return {**one, "patch_size": 0} == {**other, "patch_size": 0}


def _rate(looked: Looked, network: Network, batch: int, base: Recipe) -> float:
    """Of 256 images: tuned for small networks; published for large ones with large batches."""
    if network.width >= LARGE[-1].width:
        return base.optimiser.lr if batch >= BATCHES[1] else network.lr
    if network.scale and looked.images < FEW_IMAGES and batch >= base.optimiser.batch_size:
        return base.optimiser.lr / 2
    return base.optimiser.lr


def _batch(
    said: Mapping[str, Any], looked: Looked, machine: Machine, shown: float, base: Recipe, network: Network
) -> tuple[int, str]:
    parts = machine.processes * int(said.get("optimiser.accumulation", 1))
    if "optimiser.batch_size" in said:
        return int(said["optimiser.batch_size"]), "as asked"
    large = network.width >= LARGE[-1].width
    batch = started = (BATCHES[1] if machine.kind == "cuda" else 256) if large else base.optimiser.batch_size
    why = "what it was measured with" if network.scale else "as for smaller ones"
    if large:
        why = "published recipes have 2,048 and more" if batch == BATCHES[1] else "as for smaller ones"
    short = 0 if "run.steps" in said else STEPS
    while batch > 4 and (batch > looked.images or (batch > BATCHES[0] and shown < short * batch)):
        batch //= 2
    if batch < started:
        why = f"small, for about {STEPS:,} steps" if 2 * batch <= looked.images else "there are no more images"
    return -(-batch // parts) * parts, why


def _why_size(said: Mapping[str, Any], looked: Looked, choice: _Choice) -> str:
    if "data.image_size" in said:
        return "as asked"
    have = f"they are {looked.height}x{looked.width} px" + (
        "" if looked.alike else " in the median, of various proportions"
    )
    if choice.size[0] * choice.size[1] >= 0.8 * looked.height * looked.width:
        return have
    hint = ""
    if min(looked.height, looked.width) >= 8 * min(choice.size):
        hint = "; --set data.crop_scale=[0.02,0.2] cuts out small parts in place of reducing them"
    return f"{have}; larger ones would be shown too seldom{hint}"


def count_text(images: float) -> str:
    """About so many: "320,000", "12 million"."""
    if images >= 1e6:
        return f"{images / 1e6:.3g} million"
    digits = max(0, math.floor(math.log10(max(1, images))) - 1)
    return f"{round(images, -digits):,.0f}"
