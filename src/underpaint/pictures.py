"""Sheets of small pictures with captions, as PNG."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_rgb(images: Float[Tensor, "b c height width"]) -> np.ndarray:
    """Images in [0, 1] to uint8 [b, height, width, 3]; of many channels the first three are shown."""
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (shown.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sheet(columns: dict[str, Float[Tensor, "b c height width"]], path: Path, smallest: int = 96) -> None:
    """Write one picture: a row an image, a column a frame, with a caption of one line or more. Small images are
    enlarged to `smallest` px."""
    frames = {caption: to_rgb(images) for caption, images in columns.items()}
    count, height, width, _ = next(iter(frames.values())).shape
    scale = max(1, -(-smallest // min(height, width)))
    lines = max(caption.count("\n") for caption in frames) + 1
    height, width, gap, top = height * scale, width * scale, 6, 5 + 17 * lines
    canvas = Image.new("RGB", (len(frames) * (width + gap) + gap, top + count * (height + gap)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for column, (caption, pictures) in enumerate(frames.items()):
        left = gap + column * (width + gap)
        pen.text((left, 2), caption, fill="black", font=font)
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, top + row * (height + gap)))
    temporary = path.with_name(path.name + ".part")
    canvas.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
