"""Semantic segmentation: a linear head on the encoder's map, or UperNet, and mIoU by sliding windows."""

import copy
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from underpaint.backbones import Backbone
from underpaint.backbones.protocols import Features
from underpaint.console import say
from underpaint.data.annotations import Masks
from underpaint.errors import InputError
from underpaint.evaluate.bundle import EncoderBundle
from underpaint.evaluate.full_res import FullResImages
from underpaint.evaluate.keep import keep
from underpaint.evaluate.plots import matrix_picture
from underpaint.evaluate.pyramid import Pyramid, padded, sliding, tokens_to_map
from underpaint.evaluate.result import Measured, measured, redraw
from underpaint.patches import patchify
from underpaint.report.figures.pictures import alike, colours, legend_of, rgb, sheet, spread
from underpaint.targets import hog_pyramid
from underpaint.train.fit import Length, Schedule, fit

VOID = 255  # of masks while training, whatever the file says
LINEAR_RATE = 10.0  # of the linear head over UperNet's: one layer on normalised features takes large steps
LINEAR_SHARE = 1 / 3  # of the minutes that UperNet has: a head alone is sooner done
SHOWN = 6


@dataclass(frozen=True)
class Segmenting:
    """Settings. Crops are as large as the encoder's images; a test image is covered by such windows.

    Attributes:
        lr, encoder_lr: peaks, of what is new (ten times that for a linear head) and of the encoder (not so low that an
            encoder which has all to learn is held back); `power` of their polynomial decay, as in mmseg.
        overlap: of the windows at test, as a share of a window.
        scale: range of the random scale of a training crop.
        channels: of UperNet.
    """

    steps: int = 2_000
    batch_size: int = 16
    lr: float = 1e-3
    encoder_lr: float = 3e-4
    power: float = 0.9
    weight_decay: float = 0.05
    warmup: float = 0.1
    overlap: float = 1 / 3
    scale: tuple[float, float] = (0.5, 2.0)
    channels: int = 128


class Grid(nn.Module):
    """What a linear head can make of images without a network: raw pixels, or HOG, of square cells."""

    def __init__(self, kind: str, cell: int, channels: int):
        super().__init__()
        self.kind, self.cell = kind, cell
        self.dim = channels * cell * cell if kind == "raw pixels" else channels * 4 * 9
        self.channels = channels

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.cell, width // self.cell

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        patches = patchify(images, (self.cell, self.cell))
        if self.kind == "HOG":
            patches = patchify(hog_pyramid(images, [self.cell // 2], 9)[0], (2, 2))
        return Features(patches.mean(1), patches)


class LinearSegmenter(nn.Module):
    """Batch norm and a 1x1 convolution on the encoder's last map; the encoder is frozen."""

    def __init__(self, encoder: Backbone | Grid, classes: int):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.BatchNorm2d(encoder.dim, affine=False)
        self.head = nn.Conv2d(encoder.dim, classes, 1)
        nn.init.zeros_(self.head.weight)

    def train(self, mode: bool = True) -> "LinearSegmenter":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        with torch.no_grad():
            grid = self.encoder.grid(*images.shape[-2:])
            maps = tokens_to_map(self.encoder(images).patches, grid)
        return F.interpolate(self.head(self.norm(maps)), images.shape[-2:], mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """segmentation-models-pytorch's UperNet decoder on a pyramid of strides 4 to 32."""

    def __init__(self, encoder: Backbone, classes: int, channels: int, first: int = 4):
        super().__init__()
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        self.pyramid = Pyramid(encoder, channels, depths=True, first=first)
        # its first map is looked at for its size only
        self.decoder = UPerNetDecoder(encoder_channels=(3, *[channels] * 4), encoder_depth=4, decoder_channels=channels)
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        found = self.decoder([images, *self.pyramid(images)])
        return F.interpolate(self.head(found), images.shape[-2:], mode="bilinear", align_corners=False)


Pair = tuple[Float[Tensor, "c h w"], Int[np.ndarray, "h w"]]


def crop_of(
    pair: Pair,
    size: tuple[int, int],
    scale: tuple[float, float],
    generator: np.random.Generator,
    fill: Float[Tensor, "c"],
) -> tuple[Float[Tensor, "c th tw"], Int[Tensor, "th tw"]]:
    """A randomly scaled, cut and mirrored piece of an image in [0, 1] and its mask, padded to `size` with void.

    `fill` is the colour of what is padded: the data's mean, which is 0 once standardised, as in windows at test.
    """
    image, mask = pair
    factor = float(np.exp(generator.uniform(*np.log(scale))))
    height, width = image.shape[-2:]
    tall, wide = (min(length, max(1, round(side / factor))) for length, side in zip((height, width), size, strict=True))
    top, left = int(generator.integers(0, height - tall + 1)), int(generator.integers(0, width - wide + 1))
    image = image[:, top : top + tall, left : left + wide]
    labels = torch.from_numpy(np.ascontiguousarray(mask[top : top + tall, left : left + wide]))
    target = (min(size[0], max(1, round(tall * factor))), min(size[1], max(1, round(wide * factor))))
    image = F.interpolate(image[None], target, mode="bilinear", antialias=True, align_corners=False)[0]
    labels = F.interpolate(labels[None, None].float(), target, mode="nearest-exact")[0, 0].long()
    if generator.random() < 0.5:
        image, labels = image.flip(-1), labels.flip(-1)
    whole = fill.view(-1, 1, 1).repeat(1, *size)
    whole[:, : target[0], : target[1]] = image
    return whole, F.pad(labels, (0, size[1] - target[1], 0, size[0] - target[0]), value=VOID)


@torch.no_grad()
def segmented(
    model: nn.Module, image: Float[Tensor, "c h w"], size: tuple[int, int], classes: int, overlap: float, most: int = 8
) -> Float[Tensor, "k h w"]:
    """Class probabilities of a standardised image, averaged over overlapping windows."""
    whole = padded(image[None], size)
    height, width = whole.shape[-2:]
    tops = sliding(height, size[0], max(1, round(size[0] * (1 - overlap))))
    lefts = sliding(width, size[1], max(1, round(size[1] * (1 - overlap))))
    places = [(top, left) for top in tops for left in lefts]
    total = whole.new_zeros(classes, height, width)
    times = whole.new_zeros(height, width)
    for start in range(0, len(places), most):
        some = places[start : start + most]
        windows = torch.cat([whole[..., top : top + size[0], left : left + size[1]] for top, left in some])
        for (top, left), found in zip(some, model(windows).softmax(1), strict=True):
            total[:, top : top + size[0], left : left + size[1]] += found
            times[top : top + size[0], left : left + size[1]] += 1
    return (total / times)[:, : image.shape[-2], : image.shape[-1]]


class Confusion:
    """Counts of (true, predicted) pixels an image, from which every measure follows."""

    def __init__(self, classes: int):
        self.classes = classes
        self.counts: list[np.ndarray] = []  # [k, k] an image

    def add(self, truth: Int[np.ndarray, "h w"], found: Int[np.ndarray, "h w"], ignore: int) -> None:
        known = truth != ignore
        if not known.any():  # it says nothing, and a redraw of such images alone would have no value
            return
        numbers = truth[known] * self.classes + found[known]
        self.counts.append(np.bincount(numbers, minlength=self.classes**2).reshape(self.classes, self.classes))

    def measures(self, draws: int = 200, seed: int = 0, groups: Sequence[str] | None = None) -> Measured:
        """mIoU and pixel accuracy over all pixels, with a bootstrap over images, or over their groups. Classes that never
        occur are left out of the mean."""
        each = np.stack(self.counts)
        generator = np.random.default_rng(seed)
        drawn = [_shares(each[redraw(len(each), groups, generator)].sum(0)) for _ in range(draws)]
        return measured(("miou", "pixel_accuracy"), self.shares()[:2], [found[:2] for found in drawn])

    def shares(self) -> tuple[float, float, Float[np.ndarray, "k"]]:
        """mIoU, pixel accuracy, and IoU by class (nan where it never occurs)."""
        return _shares(np.sum(self.counts, axis=0))


def _shares(counts: np.ndarray) -> tuple[float, float, np.ndarray]:
    hit = np.diag(counts).astype(float)
    union = counts.sum(0) + counts.sum(1) - hit
    iou = np.where(counts.sum(1) > 0, hit / np.maximum(union, 1), np.nan)
    return float(np.nanmean(iou)), float(hit.sum() / max(counts.sum(), 1)), iou


@dataclass
class MaskedSplit:
    """Images with masks of one part: `read(k)` is the k-th pair, ignored pixels `VOID`."""

    scenes: FullResImages
    masks: Masks
    indices: list[int]
    classes: int
    ignore: int

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, number: int) -> Pair:
        """Raises InputError where a mask has another size than its image, or holds a class that is not known."""
        index = self.indices[number]
        image, mask = self.scenes[index], self.masks[index]
        name = self.masks.names[index]
        if mask.shape != tuple(image.shape[-2:]):
            got, want = "x".join(map(str, mask.shape)), "x".join(map(str, image.shape[-2:]))
            raise InputError(f"{name} is {got} pixels and its image {want}; they must be alike")
        mask = np.where(mask == self.ignore, VOID, mask)
        wrong = mask[(mask != VOID) & ((mask < 0) | (mask >= self.classes))]
        if len(wrong):
            raise InputError(
                f"{name} holds class {int(wrong[0])}; there are 0 to {self.classes - 1} (--ignore-index leaves one out)"
            )
        return image, mask


def segment(
    bundle: EncoderBundle,
    train: MaskedSplit,
    test: MaskedSplit,
    names: list[str],
    settings: Segmenting,
    *,
    minutes: float | None,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """A linear head on the frozen encoder, and UperNet with the encoder trained along, beside the same untrained.

    Floors: the most frequent class, and linear heads on raw pixels and on HOG.

    Returns:
        What results.json holds.

    Raises:
        InputError: windows that leave gaps or never move on, or no scale; fewer than two classes in train; wrong masks.
    """
    if not 0 <= settings.overlap < 1:
        raise InputError(f"--set overlap={settings.overlap:g}: a share of a window, from 0 to below 1")
    if not 0 < settings.scale[0] <= settings.scale[1]:
        raise InputError(f"--set scale={list(settings.scale)}: from a scale above 0 to one that is no smaller")
    present = _present(train, test, names)
    rows: dict[str, Any] = {"most frequent class": _majority(test, int(present.argmax()), len(names)).numbers()}
    found_of: dict[str, Measured] = {}
    trained: dict[str, Any] = {}
    bundles = {"encoder": bundle} | ({"untrained": bundle.random_init(seed)} if bundle.trained else {})
    cell = max(4, getattr(bundle.encoder, "patch_size", (8, 8))[0])
    channels = bundle.encoder.channels
    heads: list[tuple[str, str, Any]] = [(who, "linear", one.encoder) for who, one in bundles.items()]
    if min(bundle.size) >= 2 * cell:
        heads += [(kind, "linear", Grid(kind, cell + cell % 2, channels)) for kind in ("raw pixels", "HOG")]
    heads += [(who, "upernet", one.encoder) for who, one in bundles.items()]
    drawn = set(spread(len(test), SHOWN))
    for who, head, encoder in heads:
        name = f"{who}, {head}"
        model, trained[name] = _train(bundle, encoder, head, who, train, len(names), settings, minutes, seed, folder)
        confusion = Confusion(len(names))
        shown = []
        for number in range(len(test)):
            image, mask = test.read(number)
            scores = segmented(
                model,
                bundle.standardize(image[None].to(_device(bundle)))[0],
                bundle.size,
                len(names),
                settings.overlap,
            )
            found = scores.argmax(0).cpu().numpy()
            confusion.add(mask, found, VOID)
            if number in drawn:
                shown.append((image, mask, found))
        found_of[name] = confusion.measures(seed=seed, groups=test.scenes.groups_of(test.indices))
        numbers = rows[name] = {**found_of[name].numbers(), "iou": confusion.shares()[2].tolist()}
        say(f"{name}: mIoU {numbers['miou']:.3f} +- {numbers['miou_error']:.3f}")
        if who == "encoder":
            keep(folder / head, f"segment-{head}", bundle, model, names, settings=asdict(settings))
            picture(shown, names, folder / head / "segmentations.png")
            matrix_picture(np.sum(confusion.counts, axis=0), names, folder / head / "confusion.png")
    return {
        "train": len(train),
        "test": len(test),
        "classes": len(names),
        "names": names,
        "rows": rows,
        "gains": {
            f"{head}: encoder over untrained": found_of[f"encoder, {head}"].above(found_of[f"untrained, {head}"])
            for head in ("linear", "upernet")
            if f"untrained, {head}" in found_of
        },
        "trained": trained,
        "settings": asdict(settings),
    }


def segmenter(encoder: Any, head: str, classes: int, size: tuple[int, int], settings: Segmenting) -> nn.Module:
    """An untrained head on an encoder; the finest map of UperNet's has stride 4, or 2 for small images."""
    if head == "linear":
        return LinearSegmenter(encoder, classes)
    return UperNet(encoder, classes, settings.channels, 4 if min(size) >= 128 else 2)


def _train(
    bundle: EncoderBundle,
    encoder: Any,
    head: str,
    who: str,
    train: MaskedSplit,
    classes: int,
    settings: Segmenting,
    minutes: float | None,
    seed: int,
    folder: Path,
) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(seed)
    device = _device(bundle)
    encoder = copy.deepcopy(encoder)
    model = segmenter(encoder, head, classes, bundle.size, settings).to(device)
    inside = {id(parameter) for parameter in encoder.parameters()}
    own = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    groups = [{"params": own, "lr": settings.lr * (LINEAR_RATE if head == "linear" else 1.0)}]
    if head == "upernet":
        groups.append({"params": list(encoder.parameters()), "lr": settings.encoder_lr})
    optimiser = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)

    mean = bundle.standardize.mean.flatten().cpu()

    def batches(first: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        step = first
        while True:
            generator = np.random.default_rng([seed, step])
            numbers = generator.integers(0, len(train), settings.batch_size)
            pieces = [crop_of(train.read(int(k)), bundle.size, settings.scale, generator, mean) for k in numbers]
            yield torch.stack([piece[0] for piece in pieces]), torch.stack([piece[1] for piece in pieces])
            step += 1

    def loss_of(batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        images, labels = (part.to(device) for part in batch)
        found = model(bundle.standardize(images))
        # a batch of nothing but void has no mean
        return F.cross_entropy(found, labels, ignore_index=VOID, reduction="sum") / (labels != VOID).sum().clamp_min(1)

    share = minutes if minutes is None or head == "upernet" else minutes * LINEAR_SHARE
    trained = fit(
        model,
        optimiser,
        batches,
        loss_of,
        folder=folder / f"{head}-{who.replace(' ', '-')}",
        length=Length(settings.steps, share),
        schedule=Schedule(settings.warmup, power=settings.power),
        seed=seed,
        clip=1.0,
        batch_size=settings.batch_size,
        settings={
            "encoder": bundle.name,
            "who": who,
            "head": head,
            "size": list(bundle.size),
            "seed": seed,
            "train": len(train),
            "classes": classes,
            **asdict(settings),
        },
    )
    return model, trained


def _device(bundle: EncoderBundle) -> torch.device:
    return bundle.standardize.mean.device


def _present(train: MaskedSplit, test: MaskedSplit, names: list[str]) -> np.ndarray:
    """Pixels of each class in train; every mask is read, so that a wrong one is met before anything is trained.

    Raises:
        InputError: fewer than two classes in train; a class in test that train lacks; wrong masks.
    """
    counts = []
    for part in (train, test):
        total = np.zeros(len(names), np.int64)
        for number in range(len(part)):
            mask = part.read(number)[1]
            total += np.bincount(mask[mask != VOID], minlength=len(names))
        counts.append(total)
    if (counts[0] > 0).sum() < 2:
        raise InputError(f"segmentation needs at least 2 classes in train; the masks hold {int((counts[0] > 0).sum())}")
    if not counts[1].any():
        raise InputError("no pixel of the test masks has a class; all are ignored")
    lacking = [names[k] for k in np.flatnonzero((counts[1] > 0) & (counts[0] == 0))]
    if lacking:
        say(f"note: train lacks {len(lacking)} of the classes in test ({', '.join(lacking[:3])}): counted as 0")
    return counts[0]


def _majority(test: MaskedSplit, number: int, classes: int) -> Measured:
    confusion = Confusion(classes)
    for k in range(len(test)):
        mask = test.read(k)[1]
        confusion.add(mask, np.full_like(mask, number), VOID)
    return confusion.measures(groups=test.scenes.groups_of(test.indices))


def picture(shown: list[tuple[Tensor, np.ndarray, np.ndarray]], names: list[str], path: Path) -> None:
    """A row an image: itself, the truth, what was found; void is black."""
    columns = {
        "image": alike([rgb(image) for image, _, _ in shown]),
        "truth": alike([painted(truth, len(names)) for _, truth, _ in shown], nearest=True),
        "found": alike([painted(found, len(names)) for _, _, found in shown], nearest=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(columns, path, legend=legend_of(names))


def painted(mask: Int[np.ndarray, "h w"] | UInt8[np.ndarray, "h w"], classes: int) -> Float[Tensor, "3 h w"]:
    """A mask in the colours of its classes."""
    return torch.from_numpy(colours(classes)).float()[torch.from_numpy(mask).long()].permute(2, 0, 1) / 255
