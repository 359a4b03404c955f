"""Bytes of an image file -> pixels, or a short reason why not."""

import io
import logging
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

MAX_PIXELS = 200_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF")  # TIFF goes to tifffile: PIL cuts it to 8 bit
ORIENTATION_TAG = 274
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_START = b"\x89PNG\r\n\x1a\n"
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

# A damaged TIFF is reported by our exception; without a handler, logging's last resort would also write to stderr.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Unreadable(Exception):
    """An image cannot be read; the text is the reason, one short line."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its pixels are decoded.

    `height` and `width` are in pixels with the EXIF orientation applied; `channels` counts colours, without alpha;
    `dtype` is "uint8", "uint16" or "float32", what `decode` returns.
    """

    height: int
    width: int
    channels: int
    dtype: str
    alpha: bool


@dataclass
class _Pixels:
    """Decoded but not yet brought to the wanted channels: [h, w, c] colours, and [h, w] alpha in [0, 1] or None."""

    colour: np.ndarray
    alpha: np.ndarray | None
    raw_alpha: np.ndarray | None  # in the file's own units, for those who want it as a channel


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Size, channels and type of an image file, without decoding its pixels.

    Raises:
        Unreadable: not an image file, a damaged header, or more than `max_pixels` pixels.
    """
    with _guarded():
        if data[:4] in TIFF_STARTS:
            with tifffile.TiffFile(io.BytesIO(data)) as tiff:
                layout = _tiff_layout(tiff, len(data), max_pixels)
            height, width = layout.size
            if layout.orientation >= 5:
                height, width = width, height
            return Header(height, width, layout.colours, layout.dtype, layout.alpha)
        image = _open(data, max_pixels)
        width, height = image.size
        if _orientation(image) >= 5:
            height, width = width, height
        mode = _target_mode(image)
        wide = _is_wide_png(data)
        colours = 1 if mode in ("L", "LA") else 3
        alpha = mode in ("LA", "RGBA")
        if wide:
            colours, alpha = {0: (1, False), 2: (3, False), 4: (1, True), 6: (3, True)}[data[25]]
        return Header(height, width, colours, "uint16" if wide else "uint8", alpha)


def decode(
    data: bytes,
    *,
    channels: int | None = 3,
    max_pixels: int = MAX_PIXELS,
    reduce_to: int | None = None,
    background: float | Sequence[float] = 0.5,
) -> np.ndarray:
    """Decode an image file.

    Args:
        data: the encoded bytes of one file.
        channels: 1 turns colour into luma, 3 copies grey; any other number must be the file's own; None keeps the
            file's own colours. Alpha is composed on `background`, except where `channels` is exactly the number of
            colours plus alpha and not 1 or 3: then all are kept as they are (four-band images saved as RGBA).
        max_pixels: larger images are refused from their header.
        reduce_to: the short side wanted, in pixels. A JPEG is decoded at 1/2, 1/4 or 1/8 where that is not below it;
            other formats ignore it.
        background: what shows through alpha, per channel or one number, as a fraction of the type's full range
            (for float images in the image's own units).

    Returns:
        Writable [h, w, c] of type uint8, uint16 or float32, EXIF orientation applied, in the file's own units.

    Raises:
        Unreadable: damaged, truncated, too large, not an image, or of other channels than wanted.
    """
    pixels = _decode_pixels(data, max_pixels, reduce_to)
    return _to_channels(pixels, channels, background)


def alpha_weighted_sum(data: bytes, *, channels: int, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, float]:
    """Sum over pixels of colour times alpha (fractions of full range, [channels]), and the sum of alpha, at 1/8 size.

    Their ratio over a data set is the colour on which transparent images are composed.
    """
    pixels = _decode_pixels(data, max_pixels, 64)
    alpha = np.ones(pixels.colour.shape[:2], np.float32) if pixels.alpha is None else pixels.alpha
    opaque = _Pixels(pixels.colour, None, None)
    colour = _to_channels(opaque, channels, 0.5).astype(np.float64) / full_scale(pixels.colour.dtype)
    return (colour * alpha[..., None]).sum((0, 1)), float(alpha.sum())


def full_scale(dtype: Any) -> float:
    """The value that white has in a type: 255, 65535, or 1 for float."""
    return {"uint8": 255.0, "uint16": 65535.0}.get(np.dtype(dtype).name, 1.0)


@contextmanager
def _guarded() -> Iterator[None]:
    """Silence decoders' warnings and PIL's own size limit (ours stands in), and turn errors into Unreadable."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata is no reason to refuse an image that decodes
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        except Unreadable:
            raise
        # Decoders raise OSError, SyntaxError, struct.error, KeyError, zlib.error, ... on damaged files.
        except Exception as error:
            raise Unreadable(_reason(error)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "does not fit in memory"
    text = " ".join(str(error).split())[:160]
    if "truncated" in text or "input stream too small" in text or isinstance(error, EOFError):
        return f"truncated: {text}" if text else "truncated"
    return f"damaged: {text or type(error).__name__}"


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise Unreadable("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        kinds = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"BM": "BMP", b"GI": "GIF", b"RI": "WebP"}
        if kind := kinds.get(data[:2]):
            raise Unreadable(f"damaged {kind} header") from None
        start = data[:8].decode("ascii", "replace").encode("ascii", "backslashreplace").decode()
        start = "".join(c if c.isprintable() else "." for c in start)
        raise Unreadable(f"not a JPEG, PNG, WebP, BMP, GIF or TIFF file (it begins with '{start}')") from None
    _check_size(*image.size, max_pixels)
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Unreadable(f"claims {width} x {height} pixels, more than max_pixels {max_pixels}")
    if width <= 0 or height <= 0:
        raise Unreadable(f"claims {width} x {height} pixels")


def _is_wide_png(data: bytes) -> bool:
    """Whether this is a PNG of 16 bits a sample, which PIL would silently cut to 8 where it has colour."""
    return data[:8] == PNG_START and len(data) > 25 and data[24] == 16


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except (
        SyntaxError,
        struct.error,
        ValueError,
        TypeError,
        KeyError,
    ):  # damaged metadata beside sound pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _target_mode(image: Image.Image) -> str:
    transparent = "transparency" in image.info
    if image.mode in ("1", "L", "I;16", "I;16B", "I;16L", "I"):
        return "LA" if transparent and image.mode == "L" else "L"
    if image.mode in ("LA", "La"):
        return "LA"
    if image.mode in ("RGBA", "RGBa", "PA") or (transparent and image.mode in ("P", "RGB")):
        return "RGBA"
    return "RGB"  # palette, CMYK, YCbCr, LAB, RGBX


def _orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the EXIF orientation 1..8 of an [h, w, ...] array."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def _decode_pixels(data: bytes, max_pixels: int, reduce_to: int | None) -> _Pixels:
    with _guarded():
        if data[:4] in TIFF_STARTS:
            return _decode_tiff(data, max_pixels)
        image = _open(data, max_pixels)
        if _is_wide_png(data):
            array = imagecodecs.png_decode(data)
            array = array.reshape(*array.shape[:2], -1)
            has_alpha = array.shape[2] in (2, 4)
        else:
            if reduce_to is not None and image.format in ("JPEG", "MPO"):
                image.draft(None, (reduce_to, reduce_to))
            mode = _target_mode(image)
            array = np.asarray(image if image.mode == mode else image.convert(mode))
            array = array.reshape(*array.shape[:2], -1)
            has_alpha = mode in ("LA", "RGBA")
        array = _orient(array, _orientation(image))
        return _with_alpha(array, has_alpha)


def _with_alpha(array: np.ndarray, has_alpha: bool) -> _Pixels:
    if not has_alpha:
        return _Pixels(array, None, None)
    raw = array[..., -1]
    alpha = raw.astype(np.float32) / full_scale(array.dtype)
    return _Pixels(array[..., :-1], np.clip(alpha, 0, 1), raw)


def _to_channels(pixels: _Pixels, channels: int | None, background: float | Sequence[float]) -> np.ndarray:
    colour, alpha = pixels.colour, pixels.alpha
    own = colour.shape[2]
    wanted = own if channels is None else channels
    if pixels.raw_alpha is not None and wanted == own + 1 and wanted != 3:
        return np.ascontiguousarray(np.concatenate([colour, pixels.raw_alpha[..., None]], axis=2))
    if wanted == 1 and own == 3:
        colour = _like(colour.astype(np.float32) @ LUMA, colour.dtype)[..., None]
    elif wanted == 3 and own == 1:
        colour = np.repeat(colour, 3, axis=2)
    elif wanted != own:
        raise Unreadable(f"has {own} channels, expected {wanted}")
    if alpha is not None and alpha.min() < 1:
        behind = np.asarray(background, dtype=np.float32) * full_scale(colour.dtype)
        mixed = colour * alpha[..., None] + behind * (1 - alpha[..., None])
        colour = _like(mixed, colour.dtype)
    return np.require(colour, requirements=["C", "W"])  # PIL hands out read-only views


def _like(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Float values back in the units of `dtype`, rounded where it is an integer type."""
    if np.issubdtype(dtype, np.floating):
        return values.astype(np.float32)
    return np.clip(np.rint(values), 0, np.iinfo(dtype).max).astype(dtype)


@dataclass(frozen=True)
class _TiffLayout:
    """How the first image of a TIFF file lies: `channel_axis` is its place in the array that is read, or None."""

    whole_series: bool  # channels are spread over pages; otherwise the first page alone is read
    size: tuple[int, int]
    channel_axis: int | None
    colours: int
    alpha: bool
    orientation: int
    photometric: int
    dtype: str


def _tiff_layout(tiff: tifffile.TiffFile, length: int, max_pixels: int) -> _TiffLayout:
    page = tiff.pages.first
    _check_size(page.imagewidth, page.imagelength, max_pixels)
    series = tiff.series[0]
    # Channels may be written as pages (ImageJ's C, numpy [c, h, w] written by tifffile: Q); time and depth are not
    # channels: there the first page is the image.
    extra = [
        (axis, size) for axis, size in zip(series.axes, series.shape, strict=True) if axis not in "YX" and size > 1
    ]
    whole = len(extra) == 1 and extra[0][0] in "CSQ" and series.shape != page.shape
    shape, axes = (series.shape, series.axes) if whole else (page.shape, page.axes)
    if math.prod(shape) * np.dtype(page.dtype or np.uint8).itemsize > 16 * max_pixels:
        raise Unreadable(f"claims an array of {shape}, more than max_pixels {max_pixels} allows")
    used = list(series.pages) if whole else [page]
    for each in used:
        for offset, count in zip(each.dataoffsets, each.databytecounts, strict=False) if each else ():
            if offset + count > length:
                raise Unreadable(f"truncated: {offset + count - length} bytes are missing")
    if page.dtype is None or page.dtype.kind not in "buif":
        raise Unreadable(f"a TIFF of type {page.dtype} is not read; integers and floats are")
    channel = [place for place, axis in enumerate(axes) if axis not in "YX" and shape[place] > 1]
    if len(channel) > 1:
        raise Unreadable(f"a TIFF page of axes {axes} and shape {shape} is not read")
    samples = shape[channel[0]] if channel else 1
    photometric = int(page.photometric)
    alpha = not whole and samples in (2, 4) and any(int(e) in (1, 2) for e in page.extrasamples)
    colours = samples - alpha
    if photometric == tifffile.PHOTOMETRIC.PALETTE or (photometric == tifffile.PHOTOMETRIC.SEPARATED and samples == 4):
        colours, alpha = 3, False
    orientation_tag = page.tags.get(ORIENTATION_TAG)
    orientation = int(orientation_tag.value) if orientation_tag is not None else 1
    kind = page.dtype
    narrow = kind in (np.uint8, np.bool_) or photometric == tifffile.PHOTOMETRIC.PALETTE
    dtype = "uint8" if narrow else "uint16" if kind == np.uint16 else "float32"
    place = channel[0] if channel else None
    return _TiffLayout(
        whole, (page.imagelength, page.imagewidth), place, colours, alpha, orientation, photometric, dtype
    )


def _decode_tiff(data: bytes, max_pixels: int) -> _Pixels:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        layout = _tiff_layout(tiff, len(data), max_pixels)
        page = tiff.pages.first
        array = np.asarray(tiff.series[0].asarray() if layout.whole_series else page.asarray())
        colormap = getattr(page, "colormap", None)
    if layout.channel_axis is not None:
        array = np.moveaxis(array, layout.channel_axis, -1).reshape(*layout.size, -1)
    else:
        array = array.reshape(*layout.size, 1)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if layout.photometric == tifffile.PHOTOMETRIC.PALETTE:
        if colormap is None:
            raise Unreadable("damaged: a palette TIFF without its palette")
        array = (colormap.T[array[..., 0]] >> 8).astype(np.uint8)
    elif layout.dtype == "float32":
        array = _finite(array.astype(np.float32))
    if layout.photometric == tifffile.PHOTOMETRIC.MINISWHITE and layout.dtype != "float32":
        array = np.iinfo(array.dtype).max - array
    elif layout.photometric == tifffile.PHOTOMETRIC.SEPARATED and array.shape[2] == 4:
        full = full_scale(array.dtype)
        light = 1 - array.astype(np.float32) / full
        array = _like(light[..., :3] * light[..., 3:] * full, array.dtype)
    return _with_alpha(_orient(array, layout.orientation), layout.alpha)


def _finite(array: np.ndarray) -> np.ndarray:
    """Pixels without a value (NaN, infinite: "no data" in remote sensing) get the mean of the others."""
    good = np.isfinite(array)
    if good.all():
        return array
    if not good.any():
        raise Unreadable("no pixel has a finite value")
    return np.where(good, array, array[good].mean(dtype=np.float64)).astype(np.float32)
