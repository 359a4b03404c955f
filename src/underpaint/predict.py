"""Using what `underpaint evaluate` trained on images without answers, and features for use elsewhere."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from underpaint.backbones import from_arguments
from underpaint.console import say
from underpaint.data import (
    ImageSet,
    Source,
    Unreadable,
    eval_batches,
    load_images,
    open_source,
    settle_scaling,
    stored_scaling,
)
from underpaint.errors import InputError
from underpaint.evaluate.attentive import AttentiveHead
from underpaint.evaluate.bundle import EncoderBundle, open_bundle
from underpaint.evaluate.detect import FOUND, Detecting, Sizes, detected, detector, found_frame
from underpaint.evaluate.frozen import Classifier, LinearHead
from underpaint.evaluate.full_res import FullResImages
from underpaint.evaluate.keep import kept
from underpaint.evaluate.segment import Segmenting, painted, segmented, segmenter
from underpaint.files import replacing, write_json
from underpaint.patches import Standardize
from underpaint.report.figures.pictures import alike, legend_of, rgb, sheet, to_rgb

SHOWN = 24  # images on a picture of classes
SHOWN_DENSE = 6
TILE = 96  # pixels


def predict(trained: str | Path, images: str | Path, out: str | Path) -> None:
    """Run a trained classifier, segmenter or detector over images.

    `out` gets predictions.csv (path, class, probability), masks/ (an index PNG an image, and classes.json), or
    detections.json (COCO, with scores); and a picture of the first images.

    Args:
        trained: a folder of `underpaint evaluate`, or that of one of its tasks.
        images: as for pretraining.
        out: a folder.

    Raises:
        InputError: nothing trained there; no images.
    """
    described, weights = kept(Path(trained))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bundle = EncoderBundle(
        described["encoder"],
        from_arguments(dict(described["create_model"])),
        described["create_model"],
        Standardize(described["mean"], described["std"]).to(device),
        (described["image_size"][0], described["image_size"][1]),
        True,
        scaling=stored_scaling(described.get("scaling")),
    )
    model = _rebuilt(described, bundle)
    model.load_state_dict(weights)
    model = model.to(device).eval()
    source = open_source(images)
    bundle = _scaled(bundle, source)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    task, names = described["task"], described["classes"]
    if task.startswith("segment"):
        _masks(model, bundle, source, names, described, folder)
    elif task == "detect":
        _boxes(model, bundle, source, names, described, folder)
    else:
        _classes(model, bundle, source, names, folder)


def _scaled(bundle: EncoderBundle, source: Source) -> EncoderBundle:
    """With a scaling for all images: its own, else one measured on them."""
    every, channels = range(len(source.entries)), bundle.encoder.channels
    found = settle_scaling(bundle.scaling, source, every, size=bundle.size, channels=channels, tell=say)
    return replace(bundle, scaling=found)


def _rebuilt(described: dict[str, Any], bundle: EncoderBundle) -> nn.Module:
    """The network that was trained, untrained."""
    task, classes = described["task"], len(described["classes"])
    if task == "linear":
        return Classifier(bundle.encoder, LinearHead(bundle.encoder.dim, classes), False)
    if task == "attentive":
        return Classifier(bundle.encoder, AttentiveHead.untrained(bundle.encoder.dim, classes), True)
    if task == "finetune":
        return timm.create_model(**{**described["create_model"], "num_classes": classes})
    if task.startswith("segment-"):
        head = task.removeprefix("segment-")
        return segmenter(bundle.encoder, head, classes, bundle.size, Segmenting(**_tuples(described["settings"])))
    if task == "detect":
        sizes = Sizes(tuple(map(tuple, described["sizes"]["anchors"])), described["sizes"]["limit"])
        settings = Detecting(**_tuples(described["settings"]))
        return detector(bundle.encoder, bundle.size, classes, described["masks"], sizes, settings)
    raise InputError(f"a model of task '{task}'; this version does not know it")


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


@torch.no_grad()
def _classes(model: nn.Module, bundle: EncoderBundle, source: Source, names: list[str], folder: Path) -> None:
    images = _load(source, bundle)
    rows: list[tuple[str, str, str]] = []
    tiles: list[tuple[np.ndarray, str]] = []
    for batch in eval_batches(images, size=bundle.size, device=bundle.standardize.mean.device):
        best = model(bundle.standardize(batch.images)).softmax(1).max(1)
        shown = to_rgb(batch.images[: SHOWN - len(tiles)]) if len(tiles) < SHOWN else []
        for place, sample in enumerate(batch.samples):
            name, probability = names[int(best.indices[place])], float(best.values[place])
            rows.append((images.names[sample], name, f"{probability:.4f}"))
            if place < len(shown):
                tiles.append((shown[place], f"{name} {100 * probability:.0f} %"))
    with replacing(folder / "predictions.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "probability"])
        writer.writerows(rows)
    _contact_sheet(tiles, folder / "predictions.png")
    say(f"{folder / 'predictions.csv'}: {len(rows)} images")


def _contact_sheet(tiles: list[tuple[np.ndarray, str]], path: Path, columns: int = 6) -> None:
    """Small pictures, each with a line below."""
    gap, line = 8, 18
    wide, tall = TILE + 24, TILE + line
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (wide + gap) + gap, rows * (tall + gap) + gap), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, (tile, text) in enumerate(tiles):
        x, y = gap + number % columns * (wide + gap), gap + number // columns * (tall + gap)
        scale = TILE / max(tile.shape[:2])
        size = (max(1, round(tile.shape[1] * scale)), max(1, round(tile.shape[0] * scale)))
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        canvas.paste(Image.fromarray(tile).resize(size, resample), (x, y))
        while text and font.getlength(text) > wide:
            text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-2] + "…"
        pen.text((x, y + TILE + 2), text, fill="black", font=font)
    canvas.save(path, format="PNG", optimize=True)


def _load(source: Source, bundle: EncoderBundle) -> ImageSet:
    every, channels = range(len(source.entries)), bundle.encoder.channels
    return load_images(source, every, size=bundle.size, channels=channels, scaling=bundle.scaling)


def _readable(scenes: FullResImages, source: Source) -> Iterator[tuple[int, Tensor]]:
    for index in range(len(source.entries)):
        if index in scenes:
            try:
                yield index, scenes[index]
            except Unreadable as error:
                say(f"left out: {source.entries[index].name}: {error}")


def _masks(
    model: nn.Module, bundle: EncoderBundle, source: Source, names: list[str], described: dict[str, Any], folder: Path
) -> None:
    scenes = FullResImages(source, range(len(source.entries)), bundle.encoder.channels, bundle.scaling)
    columns: dict[str, list[Tensor]] = {"image": [], "found": []}
    count = 0
    for index, image in _readable(scenes, source):
        device = bundle.standardize.mean.device
        standard = bundle.standardize(image[None].to(device))[0]
        found = segmented(model, standard, bundle.size, len(names), described["settings"]["overlap"]).argmax(0)
        mask = found.to(torch.uint8).cpu().numpy()
        path = folder / "masks" / _safe(source.entries[index].name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
        count += 1
        if len(columns["image"]) < SHOWN_DENSE:
            columns["image"].append(rgb(image))
            columns["found"].append(painted(mask, len(names)))
    if not count:
        raise InputError(f"{source.location}: no image could be read")
    write_json(folder / "classes.json", names, indent=None)
    frames = {name: alike(shown, nearest=name == "found") for name, shown in columns.items()}
    sheet(frames, folder / "segmentations.png", legend=legend_of(names))
    say(f"{folder / 'masks'}: {count} masks; classes.json names their numbers")


def _boxes(
    model: nn.Module, bundle: EncoderBundle, source: Source, names: list[str], described: dict[str, Any], folder: Path
) -> None:
    scenes = FullResImages(source, range(len(source.entries)), bundle.encoder.channels, bundle.scaling)
    back = dict(enumerate(described["categories"], start=1))
    listed, results = [], []
    columns: dict[str, list[Tensor]] = {"image": [], FOUND: []}
    for index, image in _readable(scenes, source):
        number = len(listed) + 1
        height, width = (int(side) for side in image.shape[-2:])
        listed.append({"id": number, "file_name": source.entries[index].name, "width": width, "height": height})
        found = detected(model, bundle, image, number, back, described["masks"])
        results += found
        if number <= SHOWN_DENSE:
            for column, frame in zip(
                columns.values(), (rgb(image), found_frame(image, found, described["categories"])), strict=True
            ):
                column.append(frame)
    if not listed:
        raise InputError(f"{source.location}: no image could be read")
    categories = [{"id": k, "name": name} for k, name in zip(described["categories"], names, strict=True)]
    annotations = [{"id": k, "iscrowd": 0, "area": _area(one), **one} for k, one in enumerate(results, start=1)]
    found = {"images": listed, "annotations": annotations, "categories": categories}
    write_json(folder / "detections.json", found, indent=None)
    shown = {name: alike(frames) for name, frames in columns.items()}
    sheet(shown, folder / "detections.png", legend=legend_of(names) if len(names) > 1 else ())
    say(f"{folder / 'detections.json'}: {len(results)} objects on {len(listed)} images")


def _area(one: dict[str, Any]) -> float:
    from faster_coco_eval import mask

    return float(mask.area(one["segmentation"])) if "segmentation" in one else one["bbox"][2] * one["bbox"][3]


def _safe(name: str) -> Path:
    """A path of an archive without a way out of the folder."""
    return Path(*[part for part in PurePosixPath(name).parts if part not in ("..", "/", ".")])


@torch.no_grad()
def embed(encoder: str, data: str | Path, out: str | Path, *, image_size: tuple[int, int] | None = None) -> int:
    """Write path and pooled feature vector of every image to a parquet file; how many there are.

    Raises:
        InputError: an encoder or data that cannot be used.
    """
    bundle = open_bundle(encoder, image_size=image_size)
    source = open_source(data)
    bundle = _scaled(bundle, source)
    images = _load(source, bundle)
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = pa.list_(pa.float32(), bundle.encoder.dim)
        schema = pa.schema([("path", pa.string()), ("vector", kind)])
        with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for batch in eval_batches(images, size=bundle.size, device=bundle.standardize.mean.device):
                pooled = bundle.encoder(bundle.standardize(batch.images)).pooled.float().cpu().numpy()
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(pooled.reshape(-1)), bundle.encoder.dim)
                names = pa.array([images.names[k] for k in batch.samples])
                writer.write_table(pa.Table.from_arrays([names, vectors], schema=schema))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
    return len(images)
