"""Sheets of small pictures of images as they lie: with what is drawn on them, and pairs that look alike."""

import colorsys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from underpaint.data.annotations import CocoAnnotations, Masks, mask_of
from underpaint.data.decode import Unreadable, decode, read_header
from underpaint.data.sources.base import Source
from underpaint.errors import InputError
from underpaint.files import replacing, utf8

SIDE, GAP, LINE = 256, 8, 16  # pixels: of a picture, between two, of a line of text
COLUMNS, LEGEND = 4, 40
NOTHING = ([], ["background"], ["0"])  # what the first class is called where it is left without colour
Colour = tuple[int, int, int]


def picture_of(source: Source, index: int, limit: int = SIDE) -> tuple[Image.Image, tuple[int, int]]:
    """A small picture, and the height and width of the image.

    Raises:
        Unreadable: as `decode`.
    """
    data = source.read(index)
    header = read_header(data)
    pixels = decode(data, channels=None, reduce_to=limit)
    if pixels.dtype != np.uint8:
        low, high = np.quantile(pixels, (0.01, 0.99))
        pixels = ((pixels - low) / max(high - low, 1e-9) * 255).clip(0, 255).astype(np.uint8)
    shown = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    scale = limit / max(header.height, header.width)
    size = (max(1, round(header.width * scale)), max(1, round(header.height * scale)))
    method = Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST
    return Image.fromarray(shown).resize(size, method), (header.height, header.width)


def colour_of(number: int) -> Colour:
    """Of a class: hues by the golden angle."""
    red, green, blue = colorsys.hsv_to_rgb((0.618034 * number) % 1, (0.9, 0.6)[number % 2], 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def sheet(pictures: Sequence[tuple[str, Image.Image]], path: Path, legend: dict[int, str], columns: int) -> None:
    """Pictures with a caption each, in rows; below, the names that the colours of classes stand for."""
    font = ImageFont.load_default(12)
    rows = -(-len(pictures) // columns)
    height = max(picture.height for _, picture in pictures)
    cell = (SIDE + GAP, height + LINE + GAP)
    lines: list[list[tuple[int, int, str]]] = [[]]
    x = GAP
    for number, name in legend.items():
        wide = 24 + round(font.getlength(name))
        if x + wide > columns * cell[0] and lines[-1]:
            lines.append([])
            x = GAP
        lines[-1].append((x, number, name))
        x += wide
    below = rows * cell[1] + GAP
    canvas = Image.new("RGB", (columns * cell[0] + GAP, below + (LINE + 2) * len(lines) * bool(legend)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (caption, picture) in enumerate(pictures):
        left, top = GAP + k % columns * cell[0], GAP + k // columns * cell[1]
        canvas.paste(picture, (left, top + LINE))
        pen.text((left, top), _fitting(caption, font, SIDE), fill="black", font=font)
    for k, line in enumerate(lines):
        for x, number, name in line:
            top = below + k * (LINE + 2)
            pen.rectangle((x, top + 2, x + 10, top + 12), fill=colour_of(number))
            pen.text((x + 14, top), name, fill="black", font=font)
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The end of a name, which tells it apart, where it is too long."""
    shown = text = utf8(text)
    while font.getlength(shown) > width and len(text) > 1:
        text = text[1:]
        shown = f"...{text}"
    return shown


def annotated_sheet(
    source: Source, boxes: dict[str, CocoAnnotations], masks: Masks | None, indices: Sequence[int], path: Path
) -> None:
    """Images with their boxes, outlines and masks drawn on them, coloured by class."""
    owner = {index: each for each in boxes.values() for index in each.images}
    found = next(iter(boxes.values()), None)
    categories = sorted(found.categories) if found else []
    place = {category: number for number, category in enumerate(categories)}
    names = [found.categories[k] for k in categories] if found else list(masks.classes if masks else ())
    pictures: list[tuple[str, Image.Image]] = []
    used: set[int] = set()
    for index in indices:
        try:
            picture, size = picture_of(source, index)
            if masks is not None and index in masks.names and not boxes:
                mask = masks[index]
                painted = (mask >= 0) & (mask < (len(names) or 255)) & ((mask > 0) | (names[:1] not in NOTHING))
                used.update(np.unique(mask[painted]).tolist())
                picture = _painted(picture, mask, painted)
            if index in owner:
                used.update(place[label] for label in owner[index].objects(index).labels.tolist())
                picture = _with_objects(picture, size, owner[index], index, place)
        except (Unreadable, InputError):
            continue
        pictures.append((source.entries.names[index], picture))
    if pictures:
        shown = {k: utf8(names[k]) if k < len(names) else str(k) for k in sorted(used)[:LEGEND]}
        sheet(pictures, path, shown, COLUMNS)


def _painted(picture: Image.Image, mask: np.ndarray, painted: np.ndarray) -> Image.Image:
    colours = np.array([colour_of(k) for k in range(256)], np.uint8)
    small = [
        Image.fromarray(values.astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
        for values in (mask % 256, painted * 128)
    ]
    picture.paste(Image.fromarray(colours[np.asarray(small[0])]), (0, 0), small[1])
    return picture


def _with_objects(
    picture: Image.Image, size: tuple[int, int], annotations: CocoAnnotations, index: int, place: dict[int, int]
) -> Image.Image:
    objects = annotations.objects(index)
    scale = picture.width / size[1]
    for segment, label in zip(objects.segments, objects.labels.tolist(), strict=True):
        if segment is not None:
            shape = Image.fromarray((mask_of(segment, *size) * 110).astype(np.uint8)).resize(picture.size)
            picture.paste(Image.new("RGB", picture.size, colour_of(place.get(label, 0))), (0, 0), shape)
    pen = ImageDraw.Draw(picture)
    for box, label in zip(objects.boxes * scale, objects.labels.tolist(), strict=True):
        left, top, right, bottom = box.tolist()
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour_of(place.get(label, 0)))
    return picture


def alike_sheet(
    source: Source, groups: Sequence[Sequence[int]], path: Path, split_of: Callable[[int], str], shown: int = 4
) -> None:
    """Images that look alike, a group a row, each with its split and name."""
    pictures: list[tuple[str, Image.Image]] = []
    for group in groups:
        row: list[tuple[str, Image.Image]] = []
        for index in group[:shown]:
            try:
                row.append((f"{split_of(index)}: {source.entries.names[index]}", picture_of(source, index, SIDE)[0]))
            except Unreadable:
                continue
        blank = Image.new("RGB", (SIDE, 1), "white")
        pictures += [*row, *[("", blank)] * (shown - len(row))] if row else []
    if pictures:
        sheet(pictures, path, {}, shown)
