"""Detection and instance segmentation: torchvision's Faster and Mask R-CNN on any encoder, measured as COCO does.

torchvision's defaults (images of 800 px, 100 detections, anchors from 32 px) are made for COCO and wrong for small
images full of small objects, so sizes, anchors and the limit of detections are taken from the training data here.
"""

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from underpaint.backbones import Backbone
from underpaint.computing import autocast, full
from underpaint.console import progress, say
from underpaint.data import Source, split_indices
from underpaint.data.annotations import (
    Coco,
    CocoAnnotations,
    CocoImage,
    CocoObject,
    Instances,
    coco_annotations,
    mask_of,
)
from underpaint.errors import InputError
from underpaint.evaluation.base import ENCODER, Context, Evaluation, Kept, Row
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.evaluation.full_res import FullResImages
from underpaint.evaluation.keep import Saved
from underpaint.evaluation.pyramid import Pyramid, patch_of
from underpaint.evaluation.results import Groups, Measured, bootstrap
from underpaint.evaluation.settings import DetectConfig
from underpaint.evaluation.sizes import fitting_batch, fitting_size, small_side
from underpaint.evaluation.trained import Learned, Task, as_tuples, sampled_batches, train, two_rates
from underpaint.evaluation.written import Places, Written, coco_file, labels_place, write_data_yaml, write_yolo
from underpaint.report.figures.pictures import alike, colours, legend_of, rgb, sheet, spread
from underpaint.train.schedules import Duration, Schedule

Kind = Literal["bbox", "segm"]  # COCO's words for boxes and masks
RATIOS = (0.5, 1.0, 2.0)
PIXELS_A_STEP, MOST_A_STEP = 4 * 448**2, 8  # of all images, and images
REDRAWS = 20  # of the test images, for standard errors
SHOWN = 6
PREDICTED = 12  # images on a picture of what was said of others
MOST_LEVELS = 4  # of a pyramid
LEAST = 0.5  # score of a detection that is drawn
FOUND = f"found\n(score {LEAST:g} and above)"


def anchor_sides(boxes: Float[np.ndarray, "n 4"], first: int) -> tuple[tuple[float, ...], ...]:
    """Sides of the anchors in pixels, two for each level that the objects need, ascending by at least a quarter.

    A side is the square root of a box's area. A level of some stride is there where one object in twenty has a side of
    four strides or more (up to four levels; the finest, of stride `first`, always); the sides are quantiles.
    """
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    large = float(np.quantile(sides, 0.95))
    levels = 1 + sum(large >= 4 * first * 2**level for level in range(1, MOST_LEVELS))
    found = [float(np.quantile(sides, (k + 0.5) / (2 * levels))) for k in range(2 * levels)]
    for k in range(1, len(found)):
        found[k] = max(found[k], 1.25 * found[k - 1])
    return tuple((found[2 * level], found[2 * level + 1]) for level in range(levels))


def detection_limit(counts: Sequence[int]) -> int:
    """As many detections as the fullest training image has objects, and half as many again; at least 100."""
    return max(100, math.ceil(1.5 * max(counts, default=0)))


class FPN(nn.Module):
    """A pyramid as torchvision wants it: maps by name. A ViT's comes from its last map alone (ViTDet); the maps of the
    others are joined top-down by torchvision's feature pyramid network.

    Only what is in here is computed in the best precision of the device: bfloat16 has 8 bits for the place of a box.
    """

    def __init__(self, encoder: Backbone, channels: int, first: int, levels: int):
        super().__init__()
        self.pyramid = Pyramid(encoder, channels, depths=False, first=first, levels=levels)
        self.out_channels = channels
        self.names = [str(level) for level in range(len(self.pyramid.strides))]
        self.join = None if self.pyramid.is_vit else FeaturePyramidNetwork([channels] * len(self.names), channels)

    def forward(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        with autocast(images.device):
            maps: Any = OrderedDict(zip(self.names, self.pyramid(images), strict=True))
            maps = maps if self.join is None else self.join(maps)
        return {name: full(made) for name, made in maps.items()}


class Untouched(GeneralizedRCNNTransform):
    """Images come standardised and in the size that the encoder takes."""

    def __init__(self, size: tuple[int, int]):
        super().__init__(min(size), max(size), [0.0], [1.0], size_divisible=1, fixed_size=(size[1], size[0]))

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: Any = None) -> Any:
        return image, target


@dataclass(frozen=True)
class AnchorConfig:
    """What the training data says: sides of the anchors in pixels, by level, detections an image, and the finest stride."""

    anchors: tuple[tuple[float, ...], ...]
    limit: int
    stride: int | None = None  # of the finest level; None in what an earlier version wrote


def detector(
    encoder: Backbone, size: tuple[int, int], classes: int, masks: bool, sizes: AnchorConfig, settings: DetectConfig
) -> nn.Module:
    """Faster R-CNN, or Mask R-CNN, for `classes` kinds of objects (background not counted)."""
    first, width, limit = sizes.stride or finest(size), settings.channels, sizes.limit
    levels = FPN(encoder, width, first, len(sizes.anchors))
    names = levels.names
    # where a region is pooled from (Lin et al. 2017, equation 1, with level 4 for 224 px): from the second level on
    # where its anchors begin
    second = sizes.anchors[1][0] if len(names) > 1 else 2 * sizes.anchors[0][-1]
    place: dict[str, Any] = {"canonical_scale": max(1, round(second)), "canonical_level": round(math.log2(first)) + 1}
    shared: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(sizes.anchors, (RATIOS,) * len(names)),
        "box_roi_pool": MultiScaleRoIAlign(names, 7, 2, **place),
        "box_head": TwoMLPHead(width * 7 * 7, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, classes + 1),
        "box_detections_per_img": limit,
        "rpn_pre_nms_top_n_train": max(1000, 2 * limit),
        "rpn_post_nms_top_n_train": max(500, 2 * limit),
        "rpn_pre_nms_top_n_test": max(1000, 2 * limit),
        "rpn_post_nms_top_n_test": max(500, 2 * limit),
        "box_batch_size_per_image": settings.regions,
    }
    if masks:
        shared["mask_roi_pool"] = MultiScaleRoIAlign(names, 14, 2, **place)
        shared["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1)
        shared["mask_predictor"] = MaskRCNNPredictor(width, width, classes + 1)
        model: Any = MaskRCNN(levels, **shared)
    else:
        model = FasterRCNN(levels, **shared)
    model.transform = Untouched(size)
    return model


def finest(size: tuple[int, int], small: float = math.inf) -> int:
    """Stride in pixels of the finest level: 4, or 2 for images of at most 64 px, and for images of at most 256 px with a
    tenth of the objects smaller than 8 px (`small`), which a stride of 4 would hardly see."""
    return 2 if min(size) <= 64 or (small < 8 and max(size) <= 256) else 4


def anchor_config(train: "Boxed", size: tuple[int, int], stride: int | None = None) -> AnchorConfig:
    """Measured on the training images as the detector sees them: fitted into `size`; the stride too, where it is None.

    Raises:
        InputError: no object in train.
    """
    boxes, counts = [], []
    for index, objects in zip(train.indices, train.instances(), strict=True):
        height, width = train.images[index].shape[-2:]
        scale = min(1.0, size[0] / height, size[1] / width)
        boxes.append(objects.boxes[~objects.crowd] * scale)
        counts.append(int((~objects.crowd).sum()))
    together = np.concatenate(boxes) if boxes else np.zeros((0, 4))
    if not len(together):
        raise InputError("no image of train has an object; detection needs some")
    sides = np.sqrt((together[:, 2] - together[:, 0]) * (together[:, 3] - together[:, 1]))
    first = stride or finest(size, float(np.quantile(sides, 0.1)))
    return AnchorConfig(anchor_sides(together, first), detection_limit(counts), first)


def letterbox(
    image: Float[Tensor, "c h w"],
    objects: Instances,
    size: tuple[int, int],
    masks: bool,
    generator: np.random.Generator | None,
) -> tuple[Float[Tensor, "c th tw"], dict[str, Tensor], float]:
    """An image and its objects in the encoder's size: the whole image, shrunk to fit and padded (or, with a
    generator, a random crop of that size where the image is larger, mirrored half of the times).

    Returns:
        image, target, and the scale of the image.
    """
    height, width = image.shape[-2:]
    boxes = torch.from_numpy(objects.boxes).float()
    keep = torch.from_numpy(~objects.crowd)
    left = top = 0
    mirrored = False
    if generator is None:
        scale = min(1.0, size[0] / height, size[1] / width)
    else:
        # from the scale at which it is judged to twice that
        low = min(1.0, size[0] / height, size[1] / width)
        scale = float(np.exp(generator.uniform(math.log(low), math.log(min(1.0, 2 * low)))))
        mirrored = bool(generator.random() < 0.5)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    drawn = _masks_of(objects, height, width) if masks else None
    if scale != 1:
        image = F.interpolate(image[None], (tall, wide), mode="bilinear", antialias=True, align_corners=False)[0]
        boxes = boxes * torch.tensor([wide / width, tall / height] * 2)
        if drawn is not None and len(drawn):
            drawn = F.interpolate(drawn[None].float(), (tall, wide), mode="nearest-exact")[0].to(torch.uint8)
    if generator is not None:
        top = int(generator.integers(0, max(0, tall - size[0]) + 1))
        left = int(generator.integers(0, max(0, wide - size[1]) + 1))
    image = image[:, top : top + size[0], left : left + size[1]]
    seen_tall, seen_wide = image.shape[1:]
    boxes = boxes - torch.tensor([left, top, left, top]).float()
    before = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, seen_wide)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, seen_tall)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # what a crop cut down to less than a third is not asked for
    keep &= (area > before / 3) & ((boxes[:, 2] - boxes[:, 0]) > 1) & ((boxes[:, 3] - boxes[:, 1]) > 1)
    target: dict[str, Tensor] = {"boxes": boxes[keep], "labels": torch.from_numpy(objects.labels)[keep]}
    if drawn is not None:
        drawn = drawn[:, top : top + size[0], left : left + size[1]]
        target["masks"] = F.pad(drawn, (0, size[1] - seen_wide, 0, size[0] - seen_tall))[keep]
    if mirrored:
        image = image.flip(-1)
        flipped = target["boxes"].clone()
        flipped[:, 0], flipped[:, 2] = seen_wide - target["boxes"][:, 2], seen_wide - target["boxes"][:, 0]
        target["boxes"] = flipped
        if "masks" in target:
            target["masks"] = torch.cat(
                [target["masks"][..., :seen_wide].flip(-1), target["masks"][..., seen_wide:]], dim=-1
            )
    image = F.pad(image, (0, size[1] - seen_wide, 0, size[0] - seen_tall))
    return image, target, scale


def _masks_of(objects: Instances, height: int, width: int) -> UInt8[Tensor, "k h w"]:
    """Of all objects, 0 and 1; of one without a mask, nothing."""
    masks = np.zeros((len(objects.segments), height, width), np.uint8)
    for mask, segment in zip(masks, objects.segments, strict=True):
        if segment is not None:
            mask[:] = mask_of(segment, height, width)
    return torch.from_numpy(masks)


@torch.no_grad()
def detected(
    model: nn.Module,
    bundle: EncoderBundle,
    image: Float[Tensor, "c h w"],
    image_id: int,
    categories: dict[int, int],
    masks: bool,
) -> list[CocoObject]:
    """COCO results of one image in [0, 1], in its own pixels; `categories` maps 1..classes to category ids."""
    from faster_coco_eval import mask as coding

    height, width = image.shape[-2:]
    device = bundle.standardize.mean.device
    nothing = Instances(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool), [])
    made, _, scale = letterbox(image, nothing, bundle.size, False, None)
    found = model([bundle.standardize(made[None].to(device))[0]])[0]
    results: list[CocoObject] = []
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    for k in range(len(found["scores"])):
        box = found["boxes"][k].cpu() / torch.tensor([wide / width, tall / height] * 2)
        left, top, right, bottom = torch.minimum(box, torch.tensor([width, height] * 2)).tolist()
        if right <= left or bottom <= top:  # found in what was padded
            continue
        one: CocoObject = {
            "image_id": image_id,
            "category_id": categories[int(found["labels"][k])],
            "bbox": [left, top, right - left, bottom - top],
            "score": float(found["scores"][k]),
        }
        if masks:
            soft = found["masks"][k, 0, :tall, :wide]
            if scale != 1:
                soft = F.interpolate(soft[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
            code = coding.encode(np.asfortranarray((soft > 0.5).cpu().numpy().astype(np.uint8)))
            one["segmentation"] = {
                "size": code["size"],
                "counts": code["counts"].decode() if isinstance(code["counts"], bytes) else code["counts"],
            }
        results.append(one)
    return results


def average_precision(
    coco: Coco,
    results: Sequence[CocoObject],
    kinds: Sequence[Kind],
    limit: int,
    images: Sequence[int],
    seed: int = 0,
    groups: Groups = None,
) -> Measured:
    """COCO's AP (mean over IoU 0.5 to 0.95), AP50 and AP75 with as many detections an image as were allowed, crowds as
    COCO treats them, with a bootstrap over images, or over their groups.

    Args:
        kinds: "bbox", "segm", or both.
        images: ids of the images that are judged.
        groups: of each of them (patient, slide, video), where they have some.
    """
    ids = np.asarray(images)

    def aggregate(chosen: Int[np.ndarray, "k"]) -> dict[str, float]:
        truth, found = _chosen(coco, results, ids[chosen])
        numbers: dict[str, float] = {}
        for kind in kinds:
            part = {"bbox": "box", "segm": "mask"}[kind]
            three = _precision(truth, found, kind, limit)
            numbers |= dict(zip((f"{part}_ap", f"{part}_ap50", f"{part}_ap75"), three, strict=True))
        return numbers

    return bootstrap(aggregate, [(len(ids), groups)], REDRAWS, seed)


def _chosen(coco: Coco, results: Sequence[CocoObject], chosen: np.ndarray) -> tuple[Coco, list[CocoObject]]:
    """The same with the images `chosen`, some of them several times, under new ids."""
    truth_of: dict[int, list[CocoObject]] = {}
    found_of: dict[int, list[CocoObject]] = {}
    for one in coco["annotations"]:
        truth_of.setdefault(one["image_id"], []).append(one)
    for one in results:
        found_of.setdefault(one["image_id"], []).append(one)
    listed = {image["id"]: image for image in coco["images"]}
    images, annotations, found = [], [], []
    for number, image_id in enumerate(chosen.tolist(), start=1):
        images.append({**listed[image_id], "id": number})
        for one in truth_of.get(image_id, []):
            annotations.append({**one, "image_id": number, "id": len(annotations) + 1})
        found += [{**one, "image_id": number} for one in found_of.get(image_id, [])]
    return {**coco, "images": images, "annotations": annotations}, found


def _precision(coco: Coco, results: list[CocoObject], kind: Kind, limit: int) -> tuple[float, float, float]:
    from faster_coco_eval import COCO, COCOeval_faster

    if not results:
        nothing = 0.0 if any(not one.get("iscrowd") for one in coco["annotations"]) else float("nan")
        return nothing, nothing, nothing
    dataset: Any = copy.deepcopy(coco)
    truth, measure = COCO(dataset), COCOeval_faster
    run = measure(truth, truth.loadRes(copy.deepcopy(results)), kind, print_function=lambda *_: None)
    run.params.maxDets = [1, 10, max(limit, 100)]
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])[:, :, :, 0, -1]  # [iou, recall, class], all areas, the last limit

    def mean(values: np.ndarray) -> float:
        known = values[values > -1]
        return float(known.mean()) if len(known) else float("nan")

    return mean(precision), mean(precision[0]), mean(precision[5])


class Boxed(NamedTuple):
    """Images of a split with their annotations."""

    images: FullResImages
    annotations: CocoAnnotations
    indices: list[int]  # numbers in the source

    def instances(self) -> list[Instances]:
        return [self.annotations.objects(index) for index in self.indices]


def boxed(context: Context) -> tuple[Boxed, Boxed]:
    """Images with boxes, to train on and to test on; where only one split is annotated, some of it are held out.

    Raises:
        InputError: there are no boxes; images that annotations list are not there.
    """
    source = context.source
    by_split: dict[str, CocoAnnotations] = context.found.get(Detect.annotation) or Detect.annotated(source)
    for note in dict.fromkeys(note for found in by_split.values() for note in found.notes):
        say(f"note: {note}")
    tested = next((split for split in ("test", "val") if split in by_split), None)
    if "train" in by_split and tested is not None:
        parts = [(by_split[split], sorted(by_split[split].images)) for split in ("train", tested)]
    else:
        tested, only = next(iter(by_split.items()))
        parts = [(only, indices.tolist()) for indices in split_indices(source, sorted(only.images))]
    parts[0] = (parts[0][0], np.asarray(context.fewer(parts[0][1])).tolist())
    bundle = context.bundle
    images = FullResImages(source, [*parts[0][1], *parts[1][1]], bundle.encoder.channels, bundle.scaling)
    train, test = (Boxed(images, found, [k for k in indices if k in images]) for found, indices in parts)
    if not train.indices or not test.indices:
        lacking = "train" if not train.indices else tested
        raise InputError(f"{source.location}: none of the annotated images of {lacking} is there")
    say(f"boxes: {len(train.indices)} images to train on, {len(test.indices)} to test on")
    return train, test


Example = tuple[Float[Tensor, "c h w"], dict[str, Tensor]]  # an image, and its boxes, labels and masks


class DetectionTask(Task[list[Example]]):
    """Faster or Mask R-CNN on an encoder."""

    clip = 5.0
    precision = "32"  # `FPN` knows better

    def __init__(self, bundle: EncoderBundle, data: Boxed, found: "Found", config: DetectConfig, context: Context):
        encoder = copy.deepcopy(bundle.encoder)
        network = detector(encoder, bundle.size, len(found.categories), found.masks, found.anchors, config)
        duration = Duration(config.steps, context.options.minutes)
        batch = config.batch_size or fitting_batch(bundle.size, PIXELS_A_STEP, MOST_A_STEP)
        super().__init__(network.to(context.device), batch, duration, Schedule(config.warmup))
        self.own, self.bundle, self.data, self.config = [encoder], bundle, data, config  # a list: it is in the network
        self.masks = found.masks
        self.numbers = {category: number for number, category in enumerate(found.categories, start=1)}
        self.annotated = [k for k in data.indices if (~data.annotations.objects(k).crowd).any()]

    def optimiser(self) -> torch.optim.Optimizer:
        config = self.config
        return two_rates(self.network, self.own[0], config.lr, config.encoder_lr, config.weight_decay)

    def batches(self, first: int, seed: int) -> Generator[list[Example], None, None]:
        def sample(generator: np.random.Generator) -> list[Example]:
            batch = []
            for index in generator.choice(self.annotated, self.size).tolist():
                objects = self.data.annotations.objects(index)
                objects.labels = np.array([self.numbers.get(k, 0) for k in objects.labels.tolist()], np.int64)
                image, target, _ = letterbox(self.data.images[index], objects, self.bundle.size, self.masks, generator)
                batch.append((image, target))
            return batch

        return sampled_batches(sample, seed, first, self.bundle.standardize.mean.device)

    def loss(self, batch: list[Example], step: int) -> Float[Tensor, ""]:
        device = self.bundle.standardize.mean.device
        images = [self.bundle.standardize(image[None].to(device))[0] for image, _ in batch]
        targets = [{name: value.to(device) for name, value in target.items()} for _, target in batch]
        losses: dict[str, Tensor] = self.network(images, targets)
        return torch.stack(list(losses.values())).sum()


class Found(NamedTuple):
    """What the annotations say a detector must be like."""

    categories: list[int]  # those of train, ascending
    masks: bool  # whether all objects have one
    anchors: AnchorConfig


class Detect(Evaluation[DetectConfig, tuple[Boxed, Boxed], nn.Module, list[CocoObject]]):
    """Faster R-CNN, or Mask R-CNN where all annotated objects have masks, on the encoder and on the same one untrained."""

    annotation = "boxes"
    input = "images"
    Config = DetectConfig
    what = "detection"
    asks = ("minutes",)

    def __init__(self, name: str, context: Context, data: tuple[Boxed, Boxed], config: DetectConfig):
        """Raises InputError: no object in train, or in test."""
        super().__init__(name, context, data, config)
        if config.stride not in (None, 2, 4, 8):
            raise InputError(f"--set stride={config.stride}: it is 2, 4 or 8")
        train, test = data
        if all(one.crowd.all() for one in test.instances()):
            raise InputError("no image of test has an object; detection needs some to judge by")
        used, wanted = ({int(label) for one in part.instances() for label in one.labels} for part in data)
        lacking = [test.annotations.categories[k] for k in sorted(wanted - used)]
        if lacking:
            say(f"note: train lacks {len(lacking)} of the classes in test ({', '.join(lacking[:3])}): counted as 0")
        segments = [segment for part in data for one in part.instances() for segment in one.segments]
        without = sum(segment is None for segment in segments)
        if 0 < without < len(segments):  # COCO's measure needs all, and an empty mask would be learned as one
            say(f"note: {without} of {len(segments)} objects have no mask: boxes alone")
        size, masks = context.bundle.size, without == 0 and len(segments) > 0
        batch = config.batch_size or fitting_batch(size, PIXELS_A_STEP, MOST_A_STEP)
        self.config = replace(config, batch_size=batch)
        anchors = anchor_config(train, size, config.stride)
        self.found = Found(sorted(used), masks, anchors)
        self.trained: dict[str, Learned] = {}
        sides = "; ".join(", ".join(f"{side:.0f}" for side in level) for level in anchors.anchors)
        say(
            f"{'Mask' if masks else 'Faster'} R-CNN at {size[0]}x{size[1]} px: {batch} images a step, maps from stride "
            f"{anchors.stride} on, anchors of {sides} px, at most {anchors.limit} detections an image, all by the objects "
            "of train (`--image-size`, `--set batch_size` and `--set stride` change them)"
        )

    @classmethod
    def fitting_size(cls, context: Context) -> tuple[tuple[int, int], str] | None:
        by_split: dict[str, CocoAnnotations] = context.found[cls.annotation]
        coco = by_split.get("train", next(iter(by_split.values()))).coco
        objects = [one for one in coco["annotations"] if not one.get("iscrowd")]
        sides = np.array([math.sqrt(one["bbox"][2] * one["bbox"][3]) for one in objects], float)
        small = small_side(sides, np.array([one["category_id"] for one in objects], int))
        shapes = [(image["height"], image["width"]) for image in coco["images"]]
        return fitting_size(shapes, small, patch_of(context.bundle.encoder)) if shapes else None

    @classmethod
    def annotated(cls, source: Source) -> dict[str, CocoAnnotations]:
        return coco_annotations(source.location, source)

    @classmethod
    def load(cls, context: Context) -> tuple[Boxed, Boxed]:
        return boxed(context)

    def rows(self) -> list[Row]:
        return [Row(who, who) for who in self.context.encoders]

    def fit(self, row: Row) -> nn.Module:
        bundle = self.context.encoders[row.who]
        torch.manual_seed(self.context.options.seed)
        task = DetectionTask(bundle, self.data[0], self.found, self.config, self.context)
        settings = {"trained": bundle.trained, "train": len(self.data[0].indices), "masks": self.found.masks}
        settings |= {**asdict(self.found.anchors), **asdict(self.config)}
        self.trained[row.name] = train(task, self.context, self.folder / row.who, settings)
        return task.network

    def predict(self, row: Row, model: nn.Module) -> list[CocoObject]:
        test, bundle = self.data[1], self.context.encoders[row.who]
        back = dict(enumerate(self.found.categories, start=1))
        found: list[CocoObject] = []
        for index in progress(test.indices, "testing"):
            number = test.annotations.images[index]
            found += detected(model, bundle, test.images[index], number, back, self.found.masks)
        return found

    def measure(self, found: list[CocoObject]) -> Measured:
        test, seed = self.data[1], self.context.options.seed
        kinds: Sequence[Kind] = ("bbox", "segm") if self.found.masks else ("bbox",)
        ids = [test.annotations.images[index] for index in test.indices]
        groups = test.images.groups_of(test.indices)
        return average_precision(test.annotations.coco, found, kinds, self.found.anchors.limit, ids, seed, groups)

    def facts(self) -> dict[str, object]:
        train, test = self.data
        names = self._names()
        return {"train": len(train.indices), "test": len(test.indices), "classes": len(names), "names": names}

    def _names(self) -> list[str]:
        return [self.data[0].annotations.categories[k] for k in self.found.categories]

    def details(self, found: Mapping[str, list[CocoObject]]) -> dict[str, object]:
        return {"trained": self.trained, "sizes": asdict(self.found.anchors), "settings": asdict(self.config)}

    def kept(self, row: Row, model: nn.Module) -> Kept:
        facts = {"masks": self.found.masks, "sizes": asdict(self.found.anchors), "settings": asdict(self.config)}
        return Kept(model, self._names(), {**facts, "categories": self.found.categories})

    def visualize(self, row: Row, found: list[CocoObject], folder: Path) -> None:
        if row.who == ENCODER:
            picture(self.data[1], found, self.found.categories, folder / "detections.png")

    @classmethod
    def rebuild(cls, saved: Saved, bundle: EncoderBundle) -> nn.Module:
        sizes = saved["sizes"]
        anchors = AnchorConfig(tuple(map(tuple, sizes["anchors"])), sizes["limit"], sizes.get("stride"))
        config, classes = DetectConfig(**as_tuples(saved["settings"])), len(saved["classes"])
        return detector(bundle.encoder, bundle.size, classes, saved["masks"], anchors, config)

    @classmethod
    def write(cls, model: nn.Module, saved: Saved, bundle: EncoderBundle, source: Source, folder: Path) -> Written:
        """detections.json (COCO, all with their scores); labels/ and data.yaml (YOLO, the sure ones); detections.png."""
        names, numbers = saved["classes"], saved["categories"]
        columns: dict[str, list[Tensor]] = {"image": [], FOUND: []}
        wanted = set(spread(len(source.entries), PREDICTED))
        places = Places(source.entries.names, ".txt")
        objects, seen = Counter[int](), Counter[int]()
        count = 0
        with coco_file(folder / "detections.json", dict(zip(numbers, names, strict=True))) as add:
            for index, image in FullResImages.readable(source, bundle):
                count += 1
                height, width = (int(side) for side in image.shape[-2:])
                name = source.entries[index].name
                listed: CocoImage = {"id": count, "file_name": name, "width": width, "height": height}
                found = detected(model, bundle, image, count, dict(enumerate(numbers, start=1)), saved["masks"])
                add(listed, found)
                sure = [one for one in found if one.get("score", 0.0) >= LEAST]
                by_number = {category: number for number, category in enumerate(numbers)}
                write_yolo(folder / labels_place(places(name)), sure, by_number, listed)
                objects.update(one["category_id"] for one in sure)
                seen.update({one["category_id"] for one in sure})
                if index in wanted:
                    columns["image"] += alike([rgb(image)])
                    columns[FOUND] += alike([found_frame(image, found, numbers)])
        write_data_yaml(folder / "data.yaml", names)
        shown = {name: alike(frames) for name, frames in columns.items()}
        sheet(shown, folder / "detections.png", legend=legend_of(names) if len(names) > 1 else ())
        say(
            f"{folder / 'detections.json'}: {sum(objects.values())} objects of score {LEAST:g} and above on {count} images"
        )
        rows = [[name, f"{objects[k]:,}", f"{seen[k]:,}"] for k, name in zip(numbers, names, strict=True)]
        what = "outlines" if saved["masks"] else "boxes"
        files = {
            "detections.json": f"COCO json: boxes{' and masks' if saved['masks'] else ''} of every object, with scores",
            "labels/": f"YOLO txt, by the image's path: {what} of the objects of score {LEAST:g} and above",
            "data.yaml": "the names of YOLO's classes",
        }
        return Written(
            count, ["Class", f"Objects (score {LEAST:g})", "Images with some"], rows, files, "detections.png"
        )


def picture(test: Boxed, results: Sequence[CocoObject], categories: list[int], path: Path) -> None:
    """A row for each of some images: itself, the annotated objects, those found."""
    columns: dict[str, list[Tensor]] = {"image": [], "annotated": [], FOUND: []}
    for position in spread(len(test.indices), SHOWN):
        index = test.indices[position]
        image, objects = test.images[index], test.annotations.objects(index)
        height, width = image.shape[-2:]
        truth = [mask_of(s, height, width) if s is not None else None for s in objects.segments]
        found = [one for one in results if one["image_id"] == test.annotations.images[index]]
        columns["image"].append(rgb(image))
        columns["annotated"].append(drawn(image, objects.boxes, truth, objects.labels.tolist(), categories))
        columns[FOUND].append(found_frame(image, found, categories))
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [test.annotations.categories[k] for k in categories]
    legend = legend_of(names) if len(names) > 1 else ()
    sheet({name: alike(frames) for name, frames in columns.items()}, path, legend=legend)


def found_frame(
    image: Float[Tensor, "c h w"], found: Sequence[CocoObject], categories: list[int]
) -> Float[Tensor, "3 th tw"]:
    """The sure detections of an image (COCO results), drawn on it."""
    sure = [one for one in found if one.get("score", 0.0) >= LEAST]
    boxes = np.array([one["bbox"] for one in sure], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    height, width = image.shape[-2:]
    masks = [mask_of(one["segmentation"], height, width) if "segmentation" in one else None for one in sure]
    return drawn(image, boxes, masks, [one["category_id"] for one in sure], categories)


def drawn(
    image: Float[Tensor, "c h w"],
    boxes: Float[np.ndarray, "k 4"],
    masks: Sequence[np.ndarray | None],
    labels: Sequence[int],
    categories: list[int],
) -> Float[Tensor, "3 th tw"]:
    """Instances as coloured masks where there are some, and boxes; a colour a class, or an object where there is one
    class. Small images are enlarged, and lines of large ones are thicker, for a picture of 256 px."""
    side = max(image.shape[-2:])
    times = max(1, -(-256 // side))
    shown = rgb(image).mul(255).round().byte().repeat_interleave(times, 1).repeat_interleave(times, 2)
    count = len(categories) if len(categories) > 1 else 12
    palette: list[Any] = [tuple(colour) for colour in colours(count)[:count].tolist()]
    place = {category: number for number, category in enumerate(categories)}
    if len(categories) > 1:  # one that train lacks is white
        chosen = [palette[place[label]] if label in place else (255, 255, 255) for label in labels]
    else:
        chosen = [palette[k % count] for k in range(len(boxes))]
    for mask, colour in zip(masks, chosen, strict=True):  # one by one: together, torchvision blackens overlaps
        if mask is not None:
            whole = torch.from_numpy(mask > 0).repeat_interleave(times, 0).repeat_interleave(times, 1)
            shown = draw_segmentation_masks(shown, whole, alpha=0.45, colors=[colour])
    if len(boxes):
        shown = draw_bounding_boxes(
            shown, torch.from_numpy(boxes * times), colors=chosen, width=max(1, round(side / 256))
        )
    return shown.float() / 255
