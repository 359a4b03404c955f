"""Detection and instance segmentation: torchvision's Faster and Mask R-CNN on any encoder, measured as COCO does.

torchvision's defaults (images of 800 px, 100 detections, anchors from 32 px) are made for COCO and wrong for small
images full of small objects, so sizes, anchors and the limit of detections are taken from the training data here.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
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
from underpaint.console import say
from underpaint.data.annotations import CocoAnnotations, Instances, mask_of
from underpaint.errors import InputError
from underpaint.evaluate.bundle import EncoderBundle
from underpaint.evaluate.full_res import FullResImages
from underpaint.evaluate.keep import keep
from underpaint.evaluate.pyramid import Pyramid
from underpaint.evaluate.result import Measured, measured, redraw
from underpaint.report.figures.pictures import alike, colours, legend_of, rgb, sheet, spread
from underpaint.train.fit import Length, Schedule, fit

RATIOS = (0.5, 1.0, 2.0)
DRAWS = 20  # of the test images, for standard errors
SHOWN = 6
MOST_LEVELS = 4  # of a pyramid
LEAST = 0.5  # score of a detection that is drawn
FOUND = f"found\n(score {LEAST:g} and above)"


@dataclass(frozen=True)
class Detecting:
    """Settings. What torchvision would fix for COCO is measured on the training data: see `sizes_of`.

    Attributes:
        lr, encoder_lr: peaks, of what is new and of the encoder; alike, so that an encoder that has all to learn is
            not held back.
        channels: of the pyramid; the heads are as wide (at 256 they are torchvision's).
        regions: of an image that the heads are trained on.
    """

    steps: int = 3_000
    batch_size: int = 4
    lr: float = 3e-4
    encoder_lr: float = 3e-4
    weight_decay: float = 0.05
    warmup: float = 0.1
    channels: int = 128
    regions: int = 64


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


class Levels(nn.Module):
    """A pyramid as torchvision wants it: maps by name. A ViT's comes from its last map alone (ViTDet); the maps of the
    others are joined top-down by torchvision's feature pyramid network."""

    def __init__(self, encoder: Backbone, channels: int, first: int, levels: int):
        super().__init__()
        self.pyramid = Pyramid(encoder, channels, depths=False, first=first, levels=levels)
        self.out_channels = channels
        self.names = [str(level) for level in range(len(self.pyramid.strides))]
        self.join = None if self.pyramid.is_vit else FeaturePyramidNetwork([channels] * len(self.names), channels)

    def forward(self, images: Float[Tensor, "b c h w"]) -> dict[str, Tensor]:
        maps = OrderedDict(zip(self.names, self.pyramid(images), strict=True))
        return maps if self.join is None else self.join(maps)


class AsTheyAre(GeneralizedRCNNTransform):
    """Images come standardised and in the size that the encoder takes."""

    def __init__(self, size: tuple[int, int]):
        super().__init__(min(size), max(size), [0.0], [1.0], size_divisible=1, fixed_size=(size[1], size[0]))

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: Any = None) -> Any:
        return image, target


@dataclass(frozen=True)
class Sizes:
    """What the training data says: sides of the anchors in pixels, by level, and detections an image."""

    anchors: tuple[tuple[float, ...], ...]
    limit: int


def detector(
    encoder: Backbone, size: tuple[int, int], classes: int, masks: bool, sizes: Sizes, settings: Detecting
) -> nn.Module:
    """Faster R-CNN, or Mask R-CNN, for `classes` kinds of objects (background not counted)."""
    first, width, limit = finest(size), settings.channels, sizes.limit
    levels = Levels(encoder, width, first, len(sizes.anchors))
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
    model.transform = AsTheyAre(size)
    return model


def finest(size: tuple[int, int]) -> int:
    """Stride in pixels of the finest level: 4, or 2 for images of at most 64 px."""
    return 4 if min(size) > 64 else 2


def sizes_of(
    annotated: CocoAnnotations, indices: Sequence[int], size: tuple[int, int], shapes: dict[int, tuple[int, int]]
) -> Sizes:
    """Measured on the training images as the detector sees them: fitted into `size`.

    Raises:
        InputError: no object in train.
    """
    boxes, counts = [], []
    for index in indices:
        objects = annotated.objects(index)
        height, width = shapes[index]
        scale = min(1.0, size[0] / height, size[1] / width)
        boxes.append(objects.boxes[~objects.crowd] * scale)
        counts.append(int((~objects.crowd).sum()))
    together = np.concatenate(boxes) if boxes else np.zeros((0, 4))
    if not len(together):
        raise InputError("no image of train has an object; detection needs some")
    return Sizes(anchor_sides(together, finest(size)), detection_limit(counts))


def placed(
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
    drawn = None
    if masks:
        empty = np.zeros((height, width), np.uint8)
        drawn = torch.from_numpy(
            np.stack([mask_of(s, height, width) if s is not None else empty for s in objects.segments])
            if objects.segments
            else np.zeros((0, height, width), np.uint8)
        )
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


@torch.no_grad()
def detected(
    model: nn.Module,
    bundle: EncoderBundle,
    image: Float[Tensor, "c h w"],
    image_id: int,
    categories: dict[int, int],
    masks: bool,
) -> list[dict[str, Any]]:
    """COCO results of one image in [0, 1], in its own pixels; `categories` maps 1..classes to category ids."""
    from faster_coco_eval import mask as coding

    height, width = image.shape[-2:]
    device = bundle.standardize.mean.device
    nothing = Instances(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool), [])
    made, _, scale = placed(image, nothing, bundle.size, False, None)
    found = model([bundle.standardize(made[None].to(device))[0]])[0]
    results = []
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    for k in range(len(found["scores"])):
        box = found["boxes"][k].cpu() / torch.tensor([wide / width, tall / height] * 2)
        left, top, right, bottom = torch.minimum(box, torch.tensor([width, height] * 2)).tolist()
        if right <= left or bottom <= top:  # found in what was padded
            continue
        one: dict[str, Any] = {
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
    coco: dict[str, Any],
    results: list[dict[str, Any]],
    kind: str,
    limit: int,
    images: Sequence[int],
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Measured:
    """COCO's AP (mean over IoU 0.5 to 0.95), AP50 and AP75 with as many detections an image as were allowed, crowds as
    COCO treats them, with a bootstrap over images, or over their groups.

    Args:
        kind: "bbox" or "segm".
        images: ids of the images that are judged.
        groups: of each of them (patient, slide, video), where they have some.
    """
    found = _precision(coco, results, kind, limit, images)
    generator = np.random.default_rng(seed)
    draws = [
        _precision(*_redrawn(coco, results, np.asarray(images)[redraw(len(images), groups, generator)]), kind, limit)
        for _ in range(DRAWS)
    ]
    place = {"bbox": "box", "segm": "mask"}[kind]
    return measured([f"{place}_ap", f"{place}_ap50", f"{place}_ap75"], found, draws)


def _redrawn(
    coco: dict[str, Any], results: list[dict[str, Any]], chosen: np.ndarray
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same with the images `chosen`, some of them several times, under new ids."""
    truth_of: dict[int, list[Any]] = {}
    found_of: dict[int, list[Any]] = {}
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


def _precision(
    coco: dict[str, Any],
    results: list[dict[str, Any]],
    kind: str,
    limit: int,
    images: Sequence[int] | None = None,
) -> tuple[float, float, float]:
    from faster_coco_eval import COCO, COCOeval_faster

    if not results:
        wanted = any(
            not one.get("iscrowd") and (images is None or one["image_id"] in images) for one in coco["annotations"]
        )
        nothing = 0.0 if wanted else float("nan")
        return nothing, nothing, nothing
    truth = COCO(copy.deepcopy(coco))
    measure: Any = COCOeval_faster
    run = measure(truth, truth.loadRes(copy.deepcopy(results)), kind, print_function=lambda *_: None)
    if images is not None:
        run.params.imgIds = list(images)
    run.params.maxDets = [1, 10, max(limit, 100)]
    run.evaluate()
    run.accumulate()
    precision = np.asarray(run.eval["precision"])[:, :, :, 0, -1]  # [iou, recall, class], all areas, the last limit

    def mean(values: np.ndarray) -> float:
        known = values[values > -1]
        return float(known.mean()) if len(known) else float("nan")

    return mean(precision), mean(precision[0]), mean(precision[5])


def detect(
    bundle: EncoderBundle,
    scenes: FullResImages,
    train: tuple[CocoAnnotations, list[int]],
    test: tuple[CocoAnnotations, list[int]],
    settings: Detecting,
    *,
    minutes: float | None,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Faster R-CNN, or Mask R-CNN where all annotated objects have masks, on the encoder and on the same one untrained.

    Returns:
        What results.json holds.

    Raises:
        InputError: no object in train, or in test.
    """
    annotated, indices = train
    judged, test_indices = test
    if all(judged.objects(index).crowd.all() for index in test_indices):
        raise InputError("no image of test has an object; detection needs some to judge by")
    used = {int(label) for index in indices for label in annotated.objects(index).labels}
    wanted = {int(label) for index in test_indices for label in judged.objects(index).labels}
    lacking = [judged.categories[k] for k in sorted(wanted - used)]
    if lacking:
        say(f"note: train lacks {len(lacking)} of the classes in test ({', '.join(lacking[:3])}): counted as 0")
    categories = sorted(used)
    names = [annotated.categories[k] for k in categories]
    segments = [s for index in indices for s in annotated.objects(index).segments]
    segments += [s for index in test_indices for s in judged.objects(index).segments]
    without = sum(s is None for s in segments)
    masks = without == 0 and len(segments) > 0
    if 0 < without < len(segments):  # COCO's measure needs all, and an empty mask would be learned as one
        say(f"note: {without} of {len(segments)} objects have no mask: boxes alone")
    shapes: dict[int, Any] = {index: tuple(scenes[index].shape[-2:]) for index in indices}
    sizes = sizes_of(annotated, indices, bundle.size, shapes)
    say(
        f"{'Mask' if masks else 'Faster'} R-CNN at {bundle.size[0]}x{bundle.size[1]} px: anchors of "
        f"{'; '.join(', '.join(f'{side:.0f}' for side in level) for level in sizes.anchors)} px, at most {sizes.limit} detections an image"
    )
    bundles = {"encoder": bundle} | ({"untrained": bundle.random_init(seed)} if bundle.trained else {})
    rows: dict[str, Any] = {}
    found: dict[str, list[Measured]] = {}
    trained: dict[str, Any] = {}
    for who, one in bundles.items():
        model, trained[who] = _train(
            one, scenes, annotated, indices, categories, masks, sizes, settings, minutes, seed, folder / who
        )
        results: list[dict[str, Any]] = []
        back = dict(enumerate(categories, start=1))
        for index in test_indices:
            results += detected(model, one, scenes[index], judged.images[index], back, masks)
        ids = [judged.images[index] for index in test_indices]
        kinds = ("bbox", "segm") if masks else ("bbox",)
        groups = scenes.groups_of(test_indices)
        found[who] = [average_precision(judged.coco, results, kind, sizes.limit, ids, seed, groups) for kind in kinds]
        numbers = rows[who] = {key: value for part in found[who] for key, value in part.numbers().items()}
        told = ", ".join(
            f"{name} AP50 {numbers[f'{name}_ap50']:.3f} +- {numbers[f'{name}_ap50_error']:.3f}"
            for name in ("box", "mask")
            if f"{name}_ap50" in numbers
        )
        say(f"{who}: {told}")
        if who == "encoder":
            facts = {"masks": masks, "sizes": asdict(sizes), "settings": asdict(settings), "categories": categories}
            keep(folder, "detect", one, model, names, **facts)
            picture(
                scenes,
                judged,
                [test_indices[k] for k in spread(len(test_indices), SHOWN)],
                results,
                categories,
                folder / "detections.png",
            )
    gains: dict[str, Any] = {}
    if "untrained" in found:
        pairs = zip(found["encoder"], found["untrained"], strict=True)
        gains["encoder over untrained"] = {
            key: value for after, before in pairs for key, value in after.above(before).items()
        }
    return {
        "train": len(indices),
        "test": len(test_indices),
        "classes": len(names),
        "names": names,
        "rows": rows,
        "gains": gains,
        "trained": trained,
        "sizes": asdict(sizes),
        "settings": asdict(settings),
    }


def _train(
    bundle: EncoderBundle,
    scenes: FullResImages,
    annotated: CocoAnnotations,
    indices: list[int],
    categories: list[int],
    masks: bool,
    sizes: Sizes,
    settings: Detecting,
    minutes: float | None,
    seed: int,
    folder: Path,
) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(seed)
    device = bundle.standardize.mean.device
    encoder = copy.deepcopy(bundle.encoder)
    model = detector(encoder, bundle.size, len(categories), masks, sizes, settings).to(device)
    inside = {id(parameter) for parameter in encoder.parameters()}
    own = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    optimiser = torch.optim.AdamW(
        [
            {"params": own, "lr": settings.lr},
            {"params": [p for p in encoder.parameters() if p.requires_grad], "lr": settings.encoder_lr},
        ],
        weight_decay=settings.weight_decay,
    )
    numbers = {category: number for number, category in enumerate(categories, start=1)}
    with_objects = [index for index in indices if (~annotated.objects(index).crowd).any()]

    def batches(first: int) -> Generator[list[tuple[Tensor, dict[str, Tensor]]], None, None]:
        step = first
        while True:
            generator = np.random.default_rng([seed, step])
            batch = []
            for index in generator.choice(with_objects, settings.batch_size).tolist():
                objects = annotated.objects(index)
                objects.labels = np.array([numbers.get(k, 0) for k in objects.labels.tolist()], np.int64)
                image, target, _ = placed(scenes[index], objects, bundle.size, masks, generator)
                batch.append((image, target))
            yield batch
            step += 1

    def loss_of(batch: list[tuple[Tensor, dict[str, Tensor]]], step: int) -> Tensor:
        images = [bundle.standardize(image[None].to(device))[0] for image, _ in batch]
        targets = [{name: value.to(device) for name, value in target.items()} for _, target in batch]
        losses: dict[str, Tensor] = model(images, targets)
        return torch.stack(list(losses.values())).sum()

    trained = fit(
        model,
        optimiser,
        batches,
        loss_of,
        folder=folder,
        length=Length(settings.steps, minutes),
        schedule=Schedule(settings.warmup),
        seed=seed,
        clip=5.0,
        batch_size=settings.batch_size,
        settings={
            "encoder": bundle.name,
            "trained": bundle.trained,
            "size": list(bundle.size),
            "seed": seed,
            "train": len(indices),
            "masks": masks,
            **asdict(sizes),
            **asdict(settings),
        },
    )
    return model, trained


def picture(
    scenes: FullResImages,
    judged: CocoAnnotations,
    indices: Sequence[int],
    results: list[dict[str, Any]],
    categories: list[int],
    path: Path,
) -> None:
    """A row an image: itself, the annotated objects, those found."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for one in results:
        by_image.setdefault(one["image_id"], []).append(one)
    columns: dict[str, list[Tensor]] = {"image": [], "annotated": [], FOUND: []}
    for index in indices:
        image = scenes[index]
        objects = judged.objects(index)
        height, width = image.shape[-2:]
        truth = [mask_of(s, height, width) if s is not None else None for s in objects.segments]
        frames = (
            rgb(image),
            drawn(image, objects.boxes, truth, objects.labels.tolist(), categories),
            found_frame(image, by_image.get(judged.images[index], []), categories),
        )
        for frame, kept_frames in zip(frames, columns.values(), strict=True):
            kept_frames.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [judged.categories[k] for k in categories]
    sheet(
        {name: alike(frames) for name, frames in columns.items()},
        path,
        legend=legend_of(names) if len(names) > 1 else (),
    )


def found_frame(
    image: Float[Tensor, "c h w"], found: list[dict[str, Any]], categories: list[int]
) -> Float[Tensor, "3 th tw"]:
    """The sure detections of an image (COCO results), drawn on it."""
    sure = [one for one in found if one["score"] >= LEAST]
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
