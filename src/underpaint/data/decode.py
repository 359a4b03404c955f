"""Bytes of an image file -> pixels, or a short reason why not."""

import io
import logging
import math
import multiprocessing
import os
import resource
import signal
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

MAX_PIXELS = 200_000_000
PIXEL_BYTES = (
    7  # of memory that decoding may take for each of `max_pixels`: RGB of 8 bit takes as much, wider types more
)
BLOCK_PIXELS = 2**18  # that are brought to another form at a time
SECONDS = 8  # of processor time that reading one image may take
TIFF_PAGES = 65_536
TIFF_VALUES = 2**22  # of one tag; they become Python's numbers
SPARE_BYTES = 2**28  # that reading a TIFF may take, however few pixels are allowed
# bytes of a value, by the type that a tag of TIFF has
TIFF_SIZES = np.array([1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 1, 1, 8, 8, 8])
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF")  # TIFF goes to tifffile: PIL cuts it to 8 bit
ORIENTATION_TAG = 274
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_START = b"\x89PNG\r\n\x1a\n"
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
NODATA_TAG = 42113  # of GDAL: the value of pixels that have none, as text
LARGEST = 1e38  # float values from here on (-3.4e38 is usual) stand for missing pixels too
JPEG_KINDS = (6, 7, 33007, 34892)  # compressions of TIFF whose decoder turns YCbCr into RGB
# CIE L*a*b* of print is relative to D50: to linear sRGB (D65, adapted by Bradford)
D50 = np.array([0.9642, 1.0, 0.8249], np.float32)
D50_TO_SRGB = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]],
    np.float32,
)

# A damaged TIFF is reported by our exception; without a handler, logging's last resort would also write to stderr.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Unreadable(Exception):
    """An image cannot be read; the text is the reason, one short line."""


class _TooLong(BaseException):
    """The time for an image is over; none of a decoder's own handlers takes it for damage that can be passed over."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself before its pixels are decoded.

    `height` and `width` are in pixels with the EXIF orientation applied; `channels` counts colours, without alpha;
    `dtype` is "uint8", "uint16" or "float32", what `decode` returns; `nodata`: whether it names a value for missing
    pixels.
    """

    height: int
    width: int
    channels: int
    dtype: str
    alpha: bool
    nodata: bool = False


@dataclass
class _Pixels:
    """Decoded but not yet brought to the wanted channels: [h, w, c] colours, and [h, w] alpha in their units or None."""

    colour: np.ndarray
    alpha: np.ndarray | None
    premultiplied: bool = False  # colours are already multiplied by alpha
    missing: np.ndarray | None = None  # [h, w, c], where a channel has no value; None where all have


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Size, channels and type of an image file, without decoding its pixels.

    Raises:
        Unreadable: not an image file, a damaged header, or more than `max_pixels` pixels.
    """
    with _guarded():
        if data[:4] in TIFF_STARTS:
            with _opened_tiff(data, max_pixels) as tiff:
                layout = _tiff_layout(tiff, len(data), max_pixels)
            height, width = layout.size
            if layout.orientation >= 5:
                height, width = width, height
            return Header(height, width, layout.colours, layout.dtype, layout.alpha, layout.nodata is not None)
        image = _open(data, max_pixels)
        width, height = image.size
        if _orientation(image, data) >= 5:
            height, width = width, height
        mode = _target_mode(image)
        wide = _is_wide_png(data)
        colours = 1 if mode in ("L", "LA") else 3
        alpha = mode in ("LA", "RGBA")
        if wide:
            colours, alpha = {0: (1, False), 2: (3, False), 4: (1, True), 6: (3, True)}[data[25]]
        return Header(height, width, colours, "uint16" if wide else "uint8", alpha)


def read_orientation(data: bytes) -> int:
    """The EXIF (or TIFF) orientation 1..8 that `decode` undoes, from the header; 1 where there is none.

    Raises:
        Unreadable: not an image file, or a damaged header.
    """
    with _guarded():
        if data[:4] in TIFF_STARTS:
            with _opened_tiff(data, MAX_PIXELS) as tiff:
                tag = tiff.pages.first.tags.get(ORIENTATION_TAG)
            return int(tag.value) if tag is not None and 1 <= int(tag.value) <= 8 else 1
        return _orientation(_open(data, MAX_PIXELS), data)


def decode(
    data: bytes,
    *,
    channels: int | None = 3,
    max_pixels: int = MAX_PIXELS,
    reduce_to: int | None = None,
    background: float | Sequence[float] = 0.5,
    nodata: float | None = None,
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
        nodata: a value that stands for missing pixels, as does what the tag of a TIFF names, NaN, and what is infinite
            or beyond 1e38. Each becomes the mean of the others of its channel; in 8-bit images a pixel is missing
            where all its colours have the value, since one alone may well be 0.

    Returns:
        Writable [h, w, c] of type uint8, uint16 or float32, EXIF orientation applied, in the file's own units.

    Raises:
        Unreadable: damaged, truncated, too large, not an image, of other channels than wanted, or without a value in
            any pixel of a channel.
    """
    return decode_known(
        data, channels=channels, max_pixels=max_pixels, reduce_to=reduce_to, background=background, nodata=nodata
    )[0]


def decode_known(
    data: bytes,
    *,
    channels: int | None = 3,
    max_pixels: int = MAX_PIXELS,
    reduce_to: int | None = None,
    background: float | Sequence[float] = 0.5,
    nodata: float | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `decode` returns, and which of it has no value in the file: [h, w, c], or None where all has."""
    with _guarded():
        pixels = _decode_pixels(data, max_pixels, reduce_to, nodata)
        return _to_channels(pixels, channels, background), _missing_channels(pixels, channels)


def alpha_weighted_sum(data: bytes, *, channels: int, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, float]:
    """Sum over pixels of colour times alpha (fractions of full range, [channels]), and the sum of alpha, at 1/8 size.

    Their ratio over a data set is the colour on which transparent images are composed.
    """
    total, weight = np.zeros(channels), 0.0
    with _guarded():
        pixels = _decode_pixels(data, max_pixels, 64)
        for rows in _blocks(pixels.colour):
            colour = _to_channels(_Pixels(pixels.colour[rows], None), channels, 0.5).astype(np.float64)
            colour /= full_scale(pixels.colour.dtype)
            if pixels.alpha is None:
                alpha = np.ones(colour.shape[:2], np.float32)
            else:
                alpha = _opacity(pixels.alpha[rows])
            total += (colour if pixels.premultiplied else colour * alpha[..., None]).sum((0, 1))
            weight += float(alpha.sum())
    return total, weight


def full_scale(dtype: Any) -> float:
    """The value that white has in a type: 255, 65535, or 1 for float."""
    return {"uint8": 255.0, "uint16": 65535.0}.get(np.dtype(dtype).name, 1.0)


@contextmanager
def _guarded() -> Iterator[None]:
    """Silence decoders' warnings and PIL's own size limit (ours stands in), bound the time, and turn errors into
    Unreadable."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata is no reason to refuse an image that decodes
        Image.MAX_IMAGE_PIXELS = None
        try:
            with _time_limit():
                yield
        except Unreadable:
            raise
        except _TooLong as error:
            raise Unreadable(f"takes longer than {SECONDS} s of processor time to read") from error
        # Decoders raise OSError, SyntaxError, struct.error, KeyError, zlib.error, ... on damaged files.
        except Exception as error:
            raise Unreadable(_reason(error)) from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise _TooLong in the block after `SECONDS` of processor time, where signals can be used: in the main thread.

    Code in C is interrupted only where it returns to Python. In a worker process, which others replace, the system ends
    the process itself after twice the time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    worker = multiprocessing.parent_process() is not None
    if worker:
        signal.setitimer(signal.ITIMER_VIRTUAL, 2 * SECONDS)  # whose signal ends a process that does not handle it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        if worker:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


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
    if width <= 0 or height <= 0:
        raise Unreadable(f"claims {width} x {height} pixels")
    if width * height > max_pixels:
        raise Unreadable(f"claims {width} x {height} pixels, more than data.max_pixels={max_pixels}")


def _check_memory(width: int, height: int, pixel_bytes: int, length: int, max_pixels: int) -> None:
    """Refuse what would take more memory, with the file's own `length`, than images of 8-bit RGB within `max_pixels`, but
    for small images."""
    needed = math.ceil((width * height * pixel_bytes + length) / PIXEL_BYTES)
    if needed > max(max_pixels, BLOCK_PIXELS):
        raise Unreadable(
            f"claims {width} x {height} pixels that take {pixel_bytes} bytes each to decode, more than "
            f"data.max_pixels={max_pixels} allows; {needed} would do"
        )


def _blocks(array: np.ndarray) -> Iterator[slice]:
    """Stretches of rows of [h, w, ...] with some `BLOCK_PIXELS` each."""
    rows = max(1, BLOCK_PIXELS // array.shape[1])
    return (slice(top, top + rows) for top in range(0, array.shape[0], rows))


def _by_blocks(function: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> np.ndarray:
    """`function`, which takes each pixel of [h, w, c] by itself, in little memory."""
    result: np.ndarray | None = None
    for rows in _blocks(array):
        part = function(array[rows])
        if len(part) == len(array):
            return part
        if result is None:
            result = np.empty((len(array), *part.shape[1:]), part.dtype)
        result[rows] = part
    return function(array) if result is None else result


def _is_wide_png(data: bytes) -> bool:
    """Whether this is a PNG of 16 bits a sample, which PIL would silently cut to 8 where it has colour."""
    return data[:8] == PNG_START and len(data) > 25 and data[24] == 16


def _orientation(image: Image.Image, data: bytes) -> int:
    # a PNG may say it behind its pixels, so PIL decodes them to look there, and finds that one is cut off
    whole = image.format == "PNG" and b"IEND" in data[-64:]
    if whole and not any(word in data for word in (b"eXIf", b"exif", b"xmp")):
        return 1
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


def _decode_pixels(data: bytes, max_pixels: int, reduce_to: int | None, nodata: float | None = None) -> _Pixels:
    if data[:4] in TIFF_STARTS:
        return _decode_tiff(data, max_pixels, nodata)
    image = _open(data, max_pixels)
    if reduce_to is not None and image.format in ("JPEG", "MPO"):
        image.draft(None, (reduce_to, reduce_to))
    mode = _target_mode(image)
    pixel_bytes = _pixel_bytes(image, len(mode), _is_wide_png(data), nodata is not None)
    _check_memory(*image.size, pixel_bytes, len(data), max_pixels)
    orientation = _orientation(image, data)
    if _is_wide_png(data):
        array = imagecodecs.png_decode(data)
        array = array.reshape(*array.shape[:2], -1)
        has_alpha = array.shape[2] in (2, 4)
    else:
        array = _array_of(image, mode)
        has_alpha = mode in ("LA", "RGBA")
    del image
    array = _orient(array, orientation)
    return _with_alpha(array, has_alpha, _missing(array[..., : array.shape[2] - has_alpha], [nodata]))


def _pixel_bytes(image: Image.Image, channels: int, wide: bool, nodata: bool) -> int:
    """Memory that decoding takes at its peak, in bytes a pixel: what PIL and its decoder hold, and the array beside it; or
    two arrays. As measured; the tests hold it."""
    held = 0  # imagecodecs decodes into the array
    if not wide:
        held = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}.get(image.mode, 4)
        if "progressive" in image.info:  # coefficients of two bytes
            held += 2 * len(image.getbands())
        held += {"WEBP": 12, "GIF": 4}.get(image.format or "", 0)
    after = channels + (6 if channels == 2 else 3)  # grey is copied to RGB, and that composed
    return max(held + channels * (1 + wide), after * (1 + wide)) + 5 * nodata * (1 + wide)


def _array_of(image: Image.Image, mode: str) -> np.ndarray:
    """[h, w, c] of a mode; PIL converts and hands out whole images twice."""
    width, height = image.size
    image.load()
    array = np.empty((height, width, len(mode)), np.uint8)
    for rows in _blocks(array):
        whole = rows.stop >= height and rows.start == 0
        part = image if whole else image.crop((0, rows.start, width, min(rows.stop, height)))
        part = part if part.mode == mode else part.convert(mode)
        array[rows] = np.asarray(part).reshape(part.height, width, -1)
    return array


def _with_alpha(array: np.ndarray, has_alpha: bool, missing: np.ndarray | None, premultiplied: bool = False) -> _Pixels:
    if not has_alpha:
        return _Pixels(_filled(array, missing), None, missing=missing)
    return _Pixels(_filled(array[..., :-1], missing), array[..., -1], premultiplied, missing)


def _opacity(alpha: np.ndarray) -> np.ndarray:
    """Alpha in [0, 1] from the file's own units."""
    return np.clip(alpha.astype(np.float32) / full_scale(alpha.dtype), 0, 1)


def _missing(array: np.ndarray, values: Sequence[float | None]) -> np.ndarray | None:
    """Where [h, w, c] has no value: it is one of `values` there, or no finite number. None where all has."""
    if not np.issubdtype(array.dtype, np.floating) and all(value is None for value in values):
        return None
    missing = _by_blocks(lambda part: _missing_of(part, values), array)
    return missing if missing.any() else None


def _missing_of(array: np.ndarray, values: Sequence[float | None]) -> np.ndarray:
    floating = np.issubdtype(array.dtype, np.floating)
    missing: np.ndarray = np.zeros(array.shape, dtype=bool)
    if floating:
        missing |= np.asarray(~((array > -LARGEST) & (array < LARGEST)))  # NaN is not inside
    for value in values:
        if value is None:
            continue
        if floating:
            with np.errstate(over="ignore"):  # a double's lowest value in a float file is infinite
                missing |= np.asarray(array == array.dtype.type(value))
        elif float(value).is_integer() and np.iinfo(array.dtype).min <= value <= np.iinfo(array.dtype).max:
            same = array == int(value)
            missing |= np.asarray(same.all(axis=2, keepdims=True) if array.dtype == np.uint8 else same)
    return missing


def _filled(array: np.ndarray, missing: np.ndarray | None) -> np.ndarray:
    """[h, w, c] with the mean of the others of a channel where it has no value."""
    if missing is None:
        return array
    array = array if array.flags.writeable else array.copy()
    for channel in range(array.shape[2]):
        known = array[..., channel][~missing[..., channel]]
        if known.size == 0:
            raise Unreadable(f"no pixel of channel {channel + 1} has a value")
        mean = known.mean(dtype=np.float64)
        array[..., channel][missing[..., channel]] = mean if known.dtype.kind == "f" else np.rint(mean)
    return array


def _missing_channels(pixels: _Pixels, channels: int | None) -> np.ndarray | None:
    """`missing` as `_to_channels` brings colours to the wanted channels."""
    missing = pixels.missing
    if missing is None or channels is None or channels == missing.shape[2]:
        return missing
    if pixels.alpha is not None and channels == missing.shape[2] + 1 and channels != 3:  # alpha is a channel
        return np.concatenate([missing, np.zeros((*missing.shape[:2], 1), dtype=bool)], axis=2)
    return np.asarray(missing.any(axis=2, keepdims=True)) if channels == 1 else np.repeat(missing, channels, axis=2)


def _to_channels(pixels: _Pixels, channels: int | None, background: float | Sequence[float]) -> np.ndarray:
    colour, alpha = pixels.colour, pixels.alpha
    own = colour.shape[2]
    wanted = own if channels is None else channels
    if alpha is not None and wanted == own + 1 and wanted != 3:
        return np.ascontiguousarray(np.concatenate([colour, alpha[..., None]], axis=2))
    if wanted == 1 and own == 3:
        colour = _by_blocks(lambda part: _like(part.astype(np.float32) @ LUMA, part.dtype)[..., None], colour)
    elif wanted == 3 and own == 1:
        colour = np.repeat(colour, 3, axis=2)
    elif wanted != own:
        raise Unreadable(f"has {own} channels, expected {wanted}")
    if alpha is not None and alpha.min() < full_scale(alpha.dtype):
        behind = np.asarray(background, dtype=np.float32) * full_scale(colour.dtype)
        result = np.empty(colour.shape, colour.dtype)
        for rows in _blocks(colour):
            part, opacity = colour[rows], _opacity(alpha[rows])[..., None]
            shown = part.astype(np.float32) if pixels.premultiplied else part * opacity
            result[rows] = _like(shown + behind * (1 - opacity), part.dtype)
        colour = result
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
    premultiplied: bool
    bits: int  # of a sample, as it lies in the file
    nodata: float | None


@contextmanager
def _opened_tiff(data: bytes, max_pixels: int) -> Iterator[tifffile.TiffFile]:
    """A TIFF file that is no trap. Codecs inside of it say sizes of their own, so the system bounds their memory."""
    _check_directories(data)
    with _memory_limit(max(PIXEL_BYTES * max_pixels, SPARE_BYTES)), tifffile.TiffFile(io.BytesIO(data)) as tiff:
        yield tiff


def _check_directories(data: bytes) -> None:
    """Refuse pages that go round in a circle, or whose tags claim more than there is."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    link, counted, skip = (f"{order}Q", f"{order}Q", 8) if big else (f"{order}I", f"{order}H", 4)
    width = 8 if big else 4
    entry = np.dtype(
        [("code", f"{order}u2"), ("kind", f"{order}u2"), ("count", f"{order}u{width}"), ("at", f"V{width}")]
    )
    (place,) = struct.unpack_from(link, data, skip)
    seen: set[int] = set()
    claimed = 0
    while place:
        if place in seen:
            raise Unreadable("damaged: its pages go round in a circle")
        if len(seen) >= TIFF_PAGES:
            raise Unreadable(f"has more than {TIFF_PAGES} pages")
        seen.add(place)
        if place + struct.calcsize(counted) > len(data):
            raise Unreadable("truncated: a page lies behind its end")
        (tags,) = struct.unpack_from(counted, data, place)
        end = place + struct.calcsize(counted) + tags * entry.itemsize
        if end + width > len(data):
            raise Unreadable("truncated: the tags of a page lie behind its end")
        listed = np.frombuffer(data, entry, tags, place + struct.calcsize(counted))
        kinds, counts = np.minimum(listed["kind"], len(TIFF_SIZES) - 1), listed["count"].astype(np.float64)
        sizes = counts * TIFF_SIZES[kinds]
        claimed += float(sizes[sizes > 4_096].sum())  # small ones may be shared
        if claimed > len(data) or (counts[TIFF_SIZES[kinds] > 1] > TIFF_VALUES).any():
            raise Unreadable("damaged: its tags claim more values than there are")
        (place,) = struct.unpack_from(link, data, end)


@contextmanager
def _memory_limit(more: int) -> Iterator[None]:
    """Let this process take so many bytes more, where the system can bound them; beyond, it is a MemoryError."""
    try:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + more
    if before[0] != resource.RLIM_INFINITY and before[0] <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _tiff_layout(tiff: tifffile.TiffFile, length: int, max_pixels: int, nodata: float | None = None) -> _TiffLayout:
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
    samples = math.prod(shape) // (page.imagewidth * page.imagelength)
    itemsize = np.dtype(page.dtype or np.uint8).itemsize
    # what is read, and beside it what its codec returns or what it becomes: RGB or more, and where there is no value
    becomes = max(samples, 3) * min(itemsize, 4) * (2 if samples == 2 else 1)
    if itemsize > 2 or nodata is not None or NODATA_TAG in page.tags:
        becomes += 2 * max(samples, 3)
    pixel_bytes = samples * itemsize + max(samples * itemsize, becomes)
    _check_memory(page.imagewidth, page.imagelength, pixel_bytes, length, max_pixels)
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
    size, premultiplied = (page.imagelength, page.imagewidth), alpha and 1 in map(int, page.extrasamples)
    bits = int(page.bitspersample)
    return _TiffLayout(
        whole, size, place, colours, alpha, orientation, photometric, dtype, premultiplied, bits, _nodata_of(page)
    )


def _nodata_of(page: Any) -> float | None:
    """What GDAL's tag says."""
    tag = page.tags.get(NODATA_TAG)
    try:
        return None if tag is None else float(str(tag.value).strip(" \0"))
    except ValueError:
        return None


def _check_lzw(data: bytes, page: Any) -> None:
    """Decode each strip or tile by libtiff first: imagecodecs' decoder, which tifffile uses, writes beyond its memory where
    one is damaged."""
    if page is None:  # of a series that lacks one
        return
    key = page.keyframe
    samples = key.samplesperpixel if key.planarconfig == tifffile.PLANARCONFIG.CONTIG else 1
    width = key.tilewidth if key.is_tiled else key.imagewidth
    rows = key.tilelength * key.tiledepth if key.is_tiled else min(key.rowsperstrip, key.imagelength)
    stripes = math.ceil(key.imagelength / rows)
    for number, (offset, count) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=False)):
        height = rows if key.is_tiled else min(rows, key.imagelength - number % stripes * rows)
        if count:
            stretch = (math.ceil(width * samples * key.bitspersample / 8), height)
            packed = io.BytesIO(_grey_lzw(data[offset : offset + count], *stretch, key.fillorder))
            with Image.open(packed) as image, _silenced():
                image.load()


@contextmanager
def _silenced() -> Iterator[None]:
    """libtiff says what is damaged to the terminal, which our exception says too."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no terminal
        yield
        return
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _grey_lzw(packed: bytes, width: int, height: int, fillorder: int) -> bytes:
    """A TIFF file of one grey byte a pixel around bytes that are packed already."""
    tags = {
        256: width,
        257: height,
        258: 8,
        259: 5,
        262: 1,
        266: fillorder,
        273: 0,
        277: 1,
        278: height,
        279: len(packed),
    }
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + packed


def _decode_tiff(data: bytes, max_pixels: int, nodata: float | None) -> _Pixels:
    with _opened_tiff(data, max_pixels) as tiff:
        layout = _tiff_layout(tiff, len(data), max_pixels, nodata)
        page = tiff.pages.first
        if page.compression == tifffile.COMPRESSION.LZW:
            for each in tiff.series[0].pages if layout.whole_series else [page]:
                _check_lzw(data, each)
        array = np.asarray(tiff.series[0].asarray() if layout.whole_series else page.asarray())
        colormap = getattr(page, "colormap", None)
        compression = int(page.compression)
    if layout.channel_axis is not None:
        array = np.moveaxis(array, layout.channel_axis, -1).reshape(*layout.size, -1)
    else:
        array = array.reshape(*layout.size, 1)
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
        np.multiply(array, 255, out=array)  # in place: a copy of a large image is much
    missing = _missing(array[..., : array.shape[2] - layout.alpha], [layout.nodata, nodata])
    if layout.dtype == "float32":
        array = array.astype(np.float32, copy=False)
    array = _by_blocks(lambda part: _colours(part, layout, colormap, compression), array)
    if missing is not None and array.shape[2] != missing.shape[2] + layout.alpha:  # of palette, or of four inks
        missing = np.repeat(missing.any(axis=2, keepdims=True), array.shape[2], axis=2)
    missing = None if missing is None else _orient(missing, layout.orientation)
    return _with_alpha(_orient(array, layout.orientation), layout.alpha, missing, layout.premultiplied)


def _colours(array: np.ndarray, layout: _TiffLayout, colormap: np.ndarray | None, compression: int) -> np.ndarray:
    """Samples [h, w, c] as they lie in a TIFF to grey, RGB or bands; alpha stays last."""
    kind, colours = tifffile.PHOTOMETRIC(layout.photometric), array.shape[2] - layout.alpha
    if kind == tifffile.PHOTOMETRIC.PALETTE:
        if colormap is None:
            raise Unreadable("damaged: a palette TIFF without its palette")
        return (colormap >> 8).astype(np.uint8).T[array[..., 0]]
    if layout.dtype == "float32":
        return array
    if 1 < layout.bits < 8:  # 2 and 4 bit, in bytes
        array = (array * (255 // (2**layout.bits - 1))).astype(np.uint8)
    if kind == tifffile.PHOTOMETRIC.MINISWHITE:
        return (2**layout.bits - 1 if layout.bits > 8 else 255) - array  # 12 bit lie in 16
    if kind == tifffile.PHOTOMETRIC.SEPARATED and array.shape[2] == 4:
        full = full_scale(array.dtype)
        light = 1 - array.astype(np.float32) / full
        return _like(light[..., :3] * light[..., 3:] * full, array.dtype)
    convert = {
        tifffile.PHOTOMETRIC.YCBCR: None if compression in JPEG_KINDS else _rgb_of_ycbcr,
        tifffile.PHOTOMETRIC.CIELAB: _rgb_of_cielab,
        tifffile.PHOTOMETRIC.ICCLAB: _rgb_of_icclab,
    }.get(kind)
    if convert is None or colours != 3:
        return array
    if array.dtype != np.uint8:
        raise Unreadable(f"a {kind.name} TIFF of type {array.dtype} is not read; 8 bit is")
    rgb = _like(convert(array[..., :3].astype(np.float64)) * 255, array.dtype)
    return np.concatenate([rgb, array[..., 3:]], axis=2)


def _rgb_of_ycbcr(values: np.ndarray) -> np.ndarray:
    """Bytes of YCbCr as JPEG has it (ITU-R BT.601, full range) to RGB in [0, 1]."""
    y, cb, cr = values[..., 0], values[..., 1] - 128, values[..., 2] - 128
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1) / 255


def _rgb_of_cielab(values: np.ndarray) -> np.ndarray:
    """Bytes of L*, and of signed a* and b*, to sRGB in [0, 1]."""
    signed = values[..., 1:] - np.where(values[..., 1:] > 127, 256, 0)
    return _rgb_of_icclab(np.concatenate([values[..., :1], signed + 128], axis=-1))


def _rgb_of_icclab(values: np.ndarray) -> np.ndarray:
    """Bytes of L* (255 for 100), and of a* and b* above their zero of 128, to sRGB in [0, 1]."""
    values = values.astype(np.float32)
    lightness = (values[..., 0] * np.float32(100 / 255) + 16) / 116
    a, b = values[..., 1] - 128, values[..., 2] - 128
    roots = np.stack([lightness + a / 500, lightness, lightness - b / 200], axis=-1)
    xyz = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * D50
    linear = np.clip(xyz @ D50_TO_SRGB.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
