"""Random crops as a pure function of (seed, epoch, sample), and a batched crop-and-resize with its own box an image."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn import functional

from underpaint.computing import products

# operations of the two products, for an image, above which a CPU resizes image by image: most of them are with zeros
DENSE = 2**23
TRIES = 10  # shapes drawn until one fits the image; after that the last one is shrunk until it fits


def draw_crops(
    seed: int,
    epoch: int | Sequence[int] | np.ndarray,
    samples: Sequence[int] | np.ndarray,
    sizes: Sequence[tuple[int, int]] | np.ndarray,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    target: tuple[int, int],
) -> tuple[Float[np.ndarray, "b 4"], Bool[np.ndarray, "b"]]:
    """Draw one box an image, by the rule of RandomResizedCrop, independently of which others are in the batch.

    Args:
        seed, epoch, samples: what the draws depend on; `epoch` is one number or one a sample.
        sizes: height and width of each image, in pixels.
        scale: range of the box's share of the image's area.
        ratio: range of the box's aspect (width / height) relative to the target's.
        flip: mirror half of the images.
        target: height and width of the result, in pixels.

    Returns:
        Boxes (top, left, height, width) in whole pixels inside the image, and which images are mirrored.
    """
    number = np.asarray(samples, dtype=np.int64)
    b = len(number)
    shape = np.asarray(sizes, dtype=np.float64).reshape(b, 2)
    draws = _uniform(seed, np.broadcast_to(np.asarray(epoch, dtype=np.int64), (b,)), number, 2 * TRIES + 3)
    image_height, image_width = shape[:, :1], shape[:, 1:]
    area = image_height * image_width * (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * draws[:, TRIES : 2 * TRIES]) * (target[1] / target[0])
    height, width = np.sqrt(area / aspect), np.sqrt(area * aspect)
    # half a pixel of tolerance: a box of the whole image must not be lost to rounding
    fits = (height <= image_height + 0.5) & (width <= image_width + 0.5)
    first = np.where(fits.any(1), fits.argmax(1), TRIES - 1)
    rows = np.arange(b)
    height, width = height[rows, first], width[rows, first]
    shrink = np.minimum(1, np.minimum(shape[:, 0] / height, shape[:, 1] / width))
    height = np.clip(np.rint(height * shrink), 1, shape[:, 0])
    width = np.clip(np.rint(width * shrink), 1, shape[:, 1])
    top = np.floor(draws[:, -3] * (shape[:, 0] - height + 1))
    left = np.floor(draws[:, -2] * (shape[:, 1] - width + 1))
    flips = draws[:, -1] < 0.5 if flip else np.zeros(b, dtype=bool)
    return np.stack([top, left, height, width], axis=1).astype(np.float32), flips


def centre_boxes(sizes: Sequence[tuple[int, int]] | np.ndarray, target: tuple[int, int]) -> Float[np.ndarray, "b 4"]:
    """The largest centred box of the target's aspect in each image: resize the short side, then crop the centre."""
    shape = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    wanted = np.asarray(target, dtype=np.float64)
    box = np.rint(wanted * (shape / wanted).min(axis=1, keepdims=True))
    box = np.clip(box, 1, shape)
    return np.concatenate([np.floor((shape - box) / 2), box], axis=1).astype(np.float32)


def crop_resize(
    images: Num[Tensor, "b c height width"],
    boxes: Float[Tensor, "b 4"],
    flips: Bool[Tensor, "b"],
    size: tuple[int, int],
) -> Float[Tensor, "b c h w"]:
    """Cut a box out of each image and resize it to `size`, antialiased, mirrored where `flips` says so.

    As `interpolate(mode="bilinear", antialias=True, align_corners=False)` of each cut-out. Two batched matrix
    products; pixels that do not touch the box have weight zero, so images of unlike sizes may be zero-padded to one.
    On a CPU large images (`DENSE`) go through `interpolate` itself, one by one: the same to rounding.

    Args:
        images: any number type; values keep their units.
        boxes: (top, left, height, width) in pixels, on the device of the images.

    Returns:
        float32.
    """
    b, c, height, width = images.shape
    operations = 2 * c * width * size[0] * (height + size[1])
    if images.device.type == "cpu" and operations > DENSE and torch.equal(boxes, boxes.round()):
        return _resized_each(images, boxes, flips, size)
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], height, size[0])
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], width, size[1])
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    # One pass that converts and lays out the rows to be mixed as one wide matrix an image.
    wide = torch.empty(b, height, c, width, dtype=torch.float32, device=images.device)
    wide.copy_(images.permute(0, 2, 1, 3))
    with products(exact=True):  # TensorFloat-32 would leave 3 of the 5 digits of a 16-bit pixel
        mixed = torch.bmm(rows, wide.view(b, height, c * width)).view(b, size[0] * c, width)
        resized = torch.bmm(mixed, columns.transpose(1, 2)).view(b, size[0], c, size[1])
    return resized.permute(0, 2, 1, 3).contiguous()


def _resized_each(
    images: Num[Tensor, "b c height width"],
    boxes: Float[Tensor, "b 4"],
    flips: Bool[Tensor, "b"],
    size: tuple[int, int],
) -> Float[Tensor, "b c h w"]:
    """`crop_resize` of boxes in whole pixels, image by image."""
    resized = torch.empty(*images.shape[:2], *size)
    for n, ((top, left, height, width), flip) in enumerate(zip(boxes.int().tolist(), flips.tolist(), strict=True)):
        cut = images[n : n + 1, :, top : top + height, left : left + width].float()
        found = functional.interpolate(cut, size, mode="bilinear", antialias=True)[0]
        resized[n] = found.flip(2) if flip else found
    return resized


def _resize_weights(
    start: Float[Tensor, "b"], length: Float[Tensor, "b"], pixels: int, out: int
) -> Float[Tensor, "b out pixels"]:
    """How much each pixel of a line counts for each resized one: a triangle, widened by the scale when reducing."""
    device = start.device
    scale = (length / out)[:, None, None]
    support = scale.clamp(min=1.0)
    centre = (torch.arange(out, device=device) + 0.5)[None, :, None] * scale + start[:, None, None]
    place = torch.arange(pixels, device=device, dtype=torch.float32)[None, None, :]
    weight = (1 - (place + 0.5 - centre).abs() / support).clamp(min=0)
    inside = (place >= start.floor()[:, None, None]) & (place < (start + length).ceil()[:, None, None])
    weight = weight * inside
    return weight / weight.sum(dim=2, keepdim=True)


def _uniform(seed: int, epochs: np.ndarray, samples: np.ndarray, count: int) -> np.ndarray:
    """[b, count] numbers in [0, 1), each a hash of (seed, epoch, sample, its place): splitmix64, vectorised."""
    state = _mix(np.full(len(samples), seed % 2**64, dtype=np.uint64))
    state = _mix(state + epochs.astype(np.uint64))
    state = _mix(state + samples.astype(np.uint64))
    places = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state[:, None] + places) >> np.uint64(11)) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
