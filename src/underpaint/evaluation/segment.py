"""Semantic segmentation: a linear head on the encoder's map, or UperNet, and mIoU by sliding windows."""

import copy
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from underpaint.backbones import Backbone, Features, TokenBackbone
from underpaint.computing import autocast, full, in_full, output
from underpaint.console import progress, say
from underpaint.data import Source, split_indices
from underpaint.data.annotations import Masks, masks_of
from underpaint.errors import InputError
from underpaint.evaluation.base import ENCODER, PIXELS, Context, Evaluation, Kept, Row
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.evaluation.full_res import FullResImages
from underpaint.evaluation.keep import Saved
from underpaint.evaluation.plots import matrix_picture
from underpaint.evaluation.pyramid import Pyramid, padded, patch_of, sliding, tokens_to_map
from underpaint.evaluation.results import Groups, Measured, bootstrap
from underpaint.evaluation.settings import SegmentConfig
from underpaint.evaluation.sizes import fitting_batch, fitting_size
from underpaint.evaluation.splits import evenly
from underpaint.evaluation.trained import Learned, Task, as_tuples, sampled_batches, train, two_rates
from underpaint.evaluation.written import Places, Written
from underpaint.files import replacing, write_json
from underpaint.patches import patchify
from underpaint.report.figures.pictures import alike, colours, legend_of, rgb, sheet, spread
from underpaint.targets import hog_pyramid
from underpaint.train.schedules import Duration, Schedule

VOID = 255  # of masks while training, whatever the file says
IGNORE = 255  # of masks in files, where nothing is said
LINEAR, UPERNET, FREQUENT = "linear", "upernet", "most frequent class"
REDRAWS = 200
PIXELS_A_STEP, MOST_A_STEP = 16 * 224**2, 16  # of all crops, and crops
LOOKED_AT = 50  # masks, to see how large images are
LINEAR_RATE = 10.0  # of the linear head over UperNet's: one layer on normalised features takes large steps
LINEAR_SHARE = 1 / 3  # of the minutes that UperNet has: a head alone is sooner done
SHOWN = 6
PREDICTED = 12  # images on a picture of what was said of others


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
            with autocast(images.device):
                maps = tokens_to_map(full(self.encoder(images).patches), grid)
        with in_full(maps):
            scores = self.head(self.norm(maps))
        return F.interpolate(scores, images.shape[-2:], mode="bilinear", align_corners=False)


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
def sliding_window_inference(
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
        for (top, left), found in zip(some, output(model, windows).softmax(1), strict=True):
            total[:, top : top + size[0], left : left + size[1]] += found
            times[top : top + size[0], left : left + size[1]] += 1
    return (total / times)[:, : image.shape[-2], : image.shape[-1]]


def confusion_of(truth: Int[np.ndarray, "h w"], found: Int[np.ndarray, "h w"], classes: int) -> Int[np.ndarray, "k k"]:
    """Counts of (true, predicted) pixels, from which every measure follows; ignored pixels are in none."""
    known = truth != VOID
    return np.bincount(truth[known] * classes + found[known], minlength=classes**2).reshape(classes, classes)


def measures(
    confusions: Int[np.ndarray, "n k k"], groups: Groups = None, redraws: int = REDRAWS, seed: int = 0
) -> Measured:
    """mIoU and pixel accuracy over all pixels. Classes that never occur are left out of the mean."""
    # an image of void alone says nothing, and a redrawn set of such images alone would have no value
    known = np.flatnonzero(confusions.any((1, 2)))
    each = confusions[known]

    def aggregate(chosen: Int[np.ndarray, "k"]) -> dict[str, float]:
        return dict(zip(("miou", "pixel_accuracy"), shares(each[chosen].sum(0))[:2], strict=True))

    within = None if groups is None else np.asarray(groups)[known]
    return bootstrap(aggregate, [(len(each), within)], redraws, seed)


def shares(counts: Int[np.ndarray, "k k"]) -> tuple[float, float, Float[np.ndarray, "k"]]:
    """mIoU, pixel accuracy, and IoU by class (nan where it never occurs) of summed confusions."""
    hit = np.diag(counts).astype(float)
    union = counts.sum(0) + counts.sum(1) - hit
    iou = np.where(counts.sum(1) > 0, hit / np.maximum(union, 1), np.nan)
    return float(np.nanmean(iou)), float(hit.sum() / max(counts.sum(), 1)), iou


@dataclass
class MaskedSplit:
    """Images with masks of one part: `read(k)` is the k-th pair, ignored pixels `VOID`."""

    images: FullResImages
    masks: Masks
    indices: list[int]
    classes: int
    ignore: int

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, number: int) -> Pair:
        """Raises InputError where a mask has another size than its image, or holds a class that is not known."""
        index = self.indices[number]
        image, mask = self.images[index], self.masks[index]
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


class Masked(NamedTuple):
    """Images with masks, to train on and to test on, and the classes by name."""

    train: MaskedSplit
    test: MaskedSplit
    names: list[str]


def masked(context: Context) -> Masked:
    """The masks that lie beside the images of DATA.

    Raises:
        InputError: there are no masks; all of one part's images lack theirs; more classes than 255.
    """
    source, options = context.source, context.options
    masks: Masks = context.found.get(Segment.annotation) or Segment.annotated(source)
    for note in masks.notes:
        say(f"note: {note}")
    lacking = len(source.entries) - len(masks.names)
    if lacking:
        say(f"{lacking} of {len(source.entries)} images have no mask and are left out")
    train, test = (part.tolist() for part in split_indices(source, sorted(masks.names)))
    if not train or not test:
        raise InputError(
            f"{source.location}: masks are needed for train and for test images; there are {len(train)} and {len(test)}"
        )
    train = np.asarray(context.fewer(train)).tolist()
    given = options.ignore_index if options.ignore_index is not None else masks.ignore
    ignore = IGNORE if given is None else given
    names = list(masks.classes)
    if not names:
        highest = max(int(mask[mask != ignore].max(initial=0)) for mask in (masks[index] for index in train))
        names = [str(k) for k in range(highest + 1)]
    elif ignore == len(names) - 1 and masks.ignore is None:
        names = names[:-1]  # the ignored class may be named too
    if len(names) > VOID:
        raise InputError(f"{source.location}: masks of {len(names)} classes; segmentation takes up to {VOID}")
    images = FullResImages(source, [*train, *test], context.bundle.encoder.channels, context.bundle.scaling)
    parts = [
        MaskedSplit(images, masks, [k for k in indices if k in images], len(names), ignore) for indices in (train, test)
    ]
    say(f"masks: {len(parts[0])} images to train on, {len(parts[1])} to test on, {len(names)} classes")
    return Masked(parts[0], parts[1], names)


Drawing = tuple[Tensor, np.ndarray, np.ndarray]  # an image, its mask, and what was found


class Segmented(NamedTuple):
    """What is kept of the test images: a confusion each, and a few with what was found."""

    confusions: Int[np.ndarray, "n k k"]
    shown: list[Drawing]


class SegmentationTask(Task[tuple[Tensor, Tensor]]):
    """A linear head on the frozen encoder, or UperNet with the encoder trained along."""

    clip = 1.0

    def __init__(self, encoder: Backbone | Grid, head: str, data: Masked, config: SegmentConfig, context: Context):
        own = copy.deepcopy(encoder)
        bundle, minutes = context.bundle, context.options.minutes
        network = segmenter(own, head, len(data.names), bundle.size, config).to(context.device)
        share = minutes if minutes is None or head == UPERNET else minutes * LINEAR_SHARE
        schedule = Schedule(config.warmup, power=config.power)
        batch = config.batch_size or fitting_batch(bundle.size, PIXELS_A_STEP, MOST_A_STEP)
        super().__init__(network, batch, Duration(config.steps, share), schedule)
        self.own, self.head, self.config, self.bundle = [own], head, config, bundle  # a list: it is part of the network
        self.split = data.train
        self.mean = bundle.standardize.mean.flatten().cpu()

    def optimiser(self) -> torch.optim.Optimizer:
        config = self.config
        if self.head == UPERNET:
            return two_rates(self.network, self.own[0], config.lr, config.encoder_lr, config.weight_decay)
        return two_rates(self.network, self.own[0], config.lr * LINEAR_RATE, None, config.weight_decay)

    def batches(self, first: int, seed: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        def sample(generator: np.random.Generator) -> tuple[Tensor, Tensor]:
            pairs = [self.split.read(int(k)) for k in generator.integers(0, len(self.split), self.size)]
            pieces = [crop_of(pair, self.bundle.size, self.config.scale, generator, self.mean) for pair in pairs]
            return torch.stack([piece[0] for piece in pieces]), torch.stack([piece[1] for piece in pieces])

        return sampled_batches(sample, seed, first, self.bundle.standardize.mean.device)

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> Float[Tensor, ""]:
        images, labels = (part.to(self.bundle.standardize.mean.device) for part in batch)
        found = full(self.network(self.bundle.standardize(images)))
        # a batch of nothing but void has no mean
        return F.cross_entropy(found, labels, ignore_index=VOID, reduction="sum") / (labels != VOID).sum().clamp_min(1)


class Segment(Evaluation[SegmentConfig, Masked, nn.Module | int, Segmented]):
    """A linear head on the frozen encoder, and UperNet with the encoder trained along, beside the same untrained; the most
    frequent class, and linear heads on raw pixels and on HOG."""

    annotation = "mask"
    input = "images"
    Config = SegmentConfig
    what = "segmentation"
    asks = ("minutes", "ignore_index")

    def __init__(self, name: str, context: Context, data: Masked, config: SegmentConfig):
        """Raises InputError: windows that leave gaps or never move on, or no scale; fewer than two classes in train; wrong
        masks."""
        size = context.bundle.size
        batch = config.batch_size or fitting_batch(size, PIXELS_A_STEP, MOST_A_STEP)
        config = replace(config, batch_size=batch)
        super().__init__(name, context, data, config)
        say(
            f"crops and windows of {size[0]}x{size[1]} px, {batch} a step (`--image-size` and `--set batch_size` change them)"
        )
        if config.scale[0] > config.scale[1]:
            raise InputError(f"--set scale={list(config.scale)}: the lower scale comes first")
        self.frequent = int(pixels_of_classes(*data).argmax())
        self.trained: dict[str, Learned] = {}

    @classmethod
    def annotated(cls, source: Source) -> Masks:
        return masks_of(source.location, source)

    @classmethod
    def fitting_size(cls, context: Context) -> tuple[tuple[int, int], str] | None:
        masks: Masks = context.found[cls.annotation]
        names = sorted(masks.names)
        shapes = [masks[names[k]].shape for k in evenly(len(names), LOOKED_AT)]
        return fitting_size([(shape[0], shape[1]) for shape in shapes], None, patch_of(context.bundle.encoder))

    @classmethod
    def load(cls, context: Context) -> Masked:
        return masked(context)

    def rows(self) -> list[Row]:
        encoders, size = [*self.context.encoders], self.context.bundle.size
        pixels = PIXELS if min(size) >= 2 * self._cell() else ()
        heads = [(who, LINEAR) for who in (*encoders, *pixels)] + [(who, UPERNET) for who in encoders]
        return [Row(FREQUENT, FREQUENT), *(Row(f"{who}, {head}", who, head) for who, head in heads)]

    def _cell(self) -> int:
        """Pixels of a side of what is one place for a head without a network."""
        encoder = self.context.bundle.encoder
        return max(4, encoder.patch_size[0] if isinstance(encoder, TokenBackbone) else 8)

    def fit(self, row: Row) -> nn.Module | int:
        if row.who == FREQUENT:
            return self.frequent
        cell, channels = self._cell(), self.context.bundle.encoder.channels
        encoder = (
            Grid(row.who, cell + cell % 2, channels) if row.who in PIXELS else self.context.encoders[row.who].encoder
        )
        torch.manual_seed(self.context.options.seed)
        task = SegmentationTask(encoder, row.variant, self.data, self.config, self.context)
        folder = self.folder / f"{row.variant}-{row.who.replace(' ', '-')}"
        settings = {"who": row.who, "head": row.variant, "train": len(self.data.train)}
        settings |= {"classes": len(self.data.names), **asdict(self.config)}
        self.trained[row.name] = train(task, self.context, folder, settings)
        return task.network

    def predict(self, row: Row, model: nn.Module | int) -> Segmented:
        test, classes, bundle = self.data.test, len(self.data.names), self.context.bundle
        drawn = set(spread(len(test), SHOWN))
        confusions, shown = [], []
        for number in progress(range(len(test)), "testing"):
            image, mask = test.read(number)
            if isinstance(model, int):
                found = np.full_like(mask, model)
            else:
                standard = bundle.standardize(image[None].to(self.context.device))[0]
                scores = sliding_window_inference(model, standard, bundle.size, classes, self.config.overlap)
                found = scores.argmax(0).cpu().numpy()
            confusions.append(confusion_of(mask, found, classes))
            if number in drawn:
                shown.append((image, mask, found))
        return Segmented(np.stack(confusions), shown)

    def measure(self, found: Segmented) -> Measured:
        test = self.data.test
        return measures(found.confusions, test.images.groups_of(test.indices), seed=self.context.options.seed)

    def facts(self) -> dict[str, object]:
        train, test, names = self.data
        return {"train": len(train), "test": len(test), "classes": len(names), "names": names}

    def beside(self, row: Row, found: Segmented) -> dict[str, object]:
        return {} if row.who == FREQUENT else {"iou": shares(found.confusions.sum(0))[2].tolist()}

    def details(self, found: Mapping[str, Segmented]) -> dict[str, object]:
        return {"trained": self.trained, "settings": asdict(self.config)}

    def kept(self, row: Row, model: nn.Module | int) -> Kept | None:
        return None if isinstance(model, int) else Kept(model, self.data.names, {"settings": asdict(self.config)})

    def visualize(self, row: Row, found: Segmented, folder: Path) -> None:
        if row.who == ENCODER:
            picture(found.shown, self.data.names, folder / "segmentations.png")
            matrix_picture(found.confusions.sum(0), self.data.names, folder / "confusion.png")

    @classmethod
    def rebuild(cls, saved: Saved, bundle: EncoderBundle) -> nn.Module:
        head = saved["task"].removeprefix("segment-")
        config = SegmentConfig(**as_tuples(saved["settings"]))
        return segmenter(bundle.encoder, head, len(saved["classes"]), bundle.size, config)

    @classmethod
    def write(cls, model: nn.Module, saved: Saved, bundle: EncoderBundle, source: Source, folder: Path) -> Written:
        """masks/, an indexed PNG an image in the colours of its classes; classes.json; segmentations.png."""
        names, overlap = saved["classes"], saved["settings"]["overlap"]
        columns: dict[str, list[Tensor]] = {"image": [], "found": []}
        wanted = set(spread(len(source.entries), PREDICTED))
        places, palette = Places(source.entries.names, ".png"), colours(len(names)).reshape(-1).tolist()
        pixels, seen, count = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64), 0
        for index, image in FullResImages.readable(source, bundle):
            standard = bundle.standardize(image[None].to(bundle.standardize.mean.device))[0]
            scores = sliding_window_inference(model, standard, bundle.size, len(names), overlap)
            mask = scores.argmax(0).to(torch.uint8).cpu().numpy()
            path = folder / "masks" / places(source.entries[index].name)
            path.parent.mkdir(parents=True, exist_ok=True)
            indexed = Image.fromarray(mask)
            indexed.putpalette(palette)
            with replacing(path) as temporary:
                indexed.save(temporary, format="PNG")
            each = np.bincount(mask.reshape(-1), minlength=len(names))
            pixels, seen, count = pixels + each, seen + (each > 0), count + 1
            if index in wanted:
                columns["image"] += alike([rgb(image)])
                columns["found"] += alike([painted(mask, len(names))], nearest=True)
        write_json(folder / "classes.json", names, indent=None)
        frames = {name: alike(shown, nearest=name == "found") for name, shown in columns.items()}
        sheet(frames, folder / "segmentations.png", legend=legend_of(names))
        say(f"{folder / 'masks'}: {count} masks; classes.json names their numbers")
        rows = [
            [name, f"{share:.1%}", f"{times:,}"]
            for name, share, times in zip(names, (pixels / pixels.sum()).tolist(), seen.tolist(), strict=True)
        ]
        files = {
            "masks/": "an indexed PNG an image, by the image's path: the value of a pixel is the number of its class",
            "classes.json": "the names of the classes by number",
        }
        return Written(count, ["Class", "Pixels", "Images with it"], rows, files, "segmentations.png")


def segmenter(
    encoder: Backbone | Grid, head: str, classes: int, size: tuple[int, int], config: SegmentConfig
) -> nn.Module:
    """An untrained head on an encoder; the finest map of UperNet's has stride 4, or 2 for small images."""
    if isinstance(encoder, Grid) or head == LINEAR:
        return LinearSegmenter(encoder, classes)
    return UperNet(encoder, classes, config.channels, 4 if min(size) >= 128 else 2)


def pixels_of_classes(train: MaskedSplit, test: MaskedSplit, names: list[str]) -> Int[np.ndarray, "k"]:
    """Pixels of each class in train; every mask is read, so that a wrong one is met before anything is trained.

    Raises:
        InputError: fewer than two classes in train; a class in test that train lacks; wrong masks.
    """
    counts = []
    for part in (train, test):
        total = np.zeros(len(names), np.int64)
        for number in progress(range(len(part)), "reading masks"):
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
