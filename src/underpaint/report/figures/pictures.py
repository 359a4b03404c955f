"""Sheets of small pictures with captions."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from underpaint.files import replacing


def to_rgb(images: Float[Tensor, "b c height width"]) -> np.ndarray:
    """Images in [0, 1] to uint8 [b, height, width, 3]; of many channels the first three are shown."""
    return (rgb(images).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sheet(
    columns: dict[str, Float[Tensor, "b c height width"]],
    path: Path,
    smallest: int = 96,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
    largest: int | None = None,
) -> None:
    """Write one picture, PNG or WebP by its name: a row an image, a column a frame, with a caption of one line or more;
    below, what the colours of `legend` mean. Small images are enlarged to `smallest` px, large ones reduced to `largest`."""
    frames = {caption: to_rgb(images) for caption, images in columns.items()}
    count, height, width, _ = next(iter(frames.values())).shape
    scale = max(1, -(-smallest // min(height, width)))
    lines = max(caption.count("\n") for caption in frames) + 1
    how = Image.Resampling.NEAREST
    height, width, gap, top = height * scale, width * scale, 6, 5 + 17 * lines
    if largest is not None and (longer := max(height, width)) > max(largest, smallest):
        height, width = (max(1, round(side * largest / longer)) for side in (height, width))
        how = Image.Resampling.BOX
    canvas = Image.new("RGB", (len(frames) * (width + gap) + gap, top + count * (height + gap)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for column, (caption, pictures) in enumerate(frames.items()):
        left = gap + column * (width + gap)
        pen.text((left, 2), caption, fill="black", font=font)
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width, height), how)
            canvas.paste(tile, (left, top + row * (height + gap)))
    if legend:
        canvas = _with_legend(canvas, legend)
    kind = {"format": "WEBP", "quality": 85} if path.suffix == ".webp" else {"format": "PNG"}
    with replacing(path) as temporary:
        canvas.save(temporary, **kind)


def _with_legend(canvas: Image.Image, legend: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    font, line, box = ImageFont.load_default(13), 20, 12
    corners, x, y = [], 6, canvas.height + 4
    for name, _ in legend:
        wide = box + 6 + round(font.getlength(name)) + 16
        if x + wide > canvas.width and x > 6:
            x, y = 6, y + line
        corners.append((x, y))
        x += wide
    made = Image.new("RGB", (canvas.width, y + line + 2), "white")
    made.paste(canvas, (0, 0))
    pen = ImageDraw.Draw(made)
    for (name, colour), (left, top) in zip(legend, corners, strict=True):
        pen.rectangle((left, top + 2, left + box, top + 2 + box), fill=colour)
        pen.text((left + box + 6, top), name, fill="black", font=font)
    return made


def alike(
    frames: list[Float[Tensor, "c _h _w"]], side: int = 256, nearest: bool = False
) -> Float[Tensor, "n c height width"]:
    """Pictures of any sizes made alike for a sheet: the longer side `side` px, white where one is shorter than another."""
    made = []
    for frame in frames:
        scale = side / max(frame.shape[-2:])
        size = (max(1, round(frame.shape[-2] * scale)), max(1, round(frame.shape[-1] * scale)))
        mode = "nearest-exact" if nearest else "bilinear"
        made.append(F.interpolate(frame[None], size, mode=mode, antialias=not nearest)[0])
    height, width = max(m.shape[-2] for m in made), max(m.shape[-1] for m in made)
    return torch.stack([F.pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2]), value=1.0) for m in made])


def spread(count: int, shown: int) -> list[int]:
    """At most `shown` numbers below `count`, evenly apart: images that lie side by side are often alike."""
    return np.linspace(0, count - 1, min(shown, count)).round().astype(int).tolist()


def colours(classes: int) -> UInt8[np.ndarray, "k three"]:
    """A colour a class, far from each other: hues by the golden angle in three shades; void is black."""
    made = [
        colorsys.hsv_to_rgb((0.618034 * k) % 1, (0.85, 0.55)[k % 2], (0.95, 0.75, 0.55)[k % 3]) for k in range(classes)
    ]
    return np.array([*(np.array(made) * 255), *[(0, 0, 0)] * (256 - classes)]).astype(np.uint8)


def rgb(images: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Three channels to be looked at."""
    first = images[..., :1, :, :].expand(*images.shape[:-3], 3, -1, -1)
    return images[..., :3, :, :] if images.shape[-3] >= 3 else first


def legend_of(names: list[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """The colour of each class; of the first two dozen, where there are many."""
    return [(name, tuple(colour)) for name, colour in zip(names, colours(len(names)).tolist(), strict=False)][:24]
