"""The images of a run: decoded once into a memory-mapped cache where they fit, else decoded as they are needed."""

import hashlib
import json
import math
import random
import signal
import zlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from io import BufferedWriter
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from underpaint.console import Going
from underpaint.data.decode import (
    MAX_PIXELS,
    SECONDS,
    Header,
    Unreadable,
    alpha_weighted_sum,
    decode_known,
    full_scale,
    read_header,
)
from underpaint.data.parallel import WorkerLost, ordered_map, spare_workers
from underpaint.data.scaling import KINDS, Scaling, robust_range, stored_scaling, told_of_channel
from underpaint.data.shuffle import Windows
from underpaint.data.sources.base import Source, cache_root
from underpaint.data.sources.index import Indices, Names
from underpaint.errors import InputError
from underpaint.files import replacing_folder

T = TypeVar("T")
CACHE_VERSION = 3
BLOCK = 2**22  # bytes of decoded pixels that have a checksum of their own
VERIFIED = (
    2_048  # blocks (8 GiB, 2 s where they are in memory) that are verified when a cache is opened; of more, a sample
)
SAMPLED_HEADERS = 512  # read to estimate sizes and to choose the data set's type
SAMPLED_IMAGES = 2_000  # decoded for mean, std and range; a quarter of it where nothing is cached
SAMPLED_PIECES = 32  # of which images are sampled where pieces are brought as a whole
CHUNK = 32  # images a worker decodes at a time, at most
HANDED = 2**23  # bytes that a worker hands over at once, but for a single image that is larger
STRIP = 2**24  # values that are resized at a time, at least a row of them
SAMPLED_PIXELS = 2_000_000  # of which a range is measured, equally many an image
STD_FLOOR = 1e-3  # of 8 bit: a quarter of a grey level
Statistics = tuple[list[float], list[float]]  # mean, std
Moments = tuple[np.ndarray, np.ndarray]  # of one image in [0, 1], per channel: means of its values and of their squares
RANKS = {"uint8": 0, "uint16": 1, "float32": 2}


@dataclass(frozen=True)
class Decoding:
    """How every image of a set is brought to one form."""

    channels: int
    max_pixels: int
    limit: int  # cached images have at most this short side, in pixels
    scaling: Scaling


@dataclass(frozen=True)
class Pending:
    """An image of which only the size is known so far; `pixels(reduce_to)` decodes it."""

    size: tuple[int, int]
    pixels: Callable[[int | None], np.ndarray]


class Pixels:
    """Decoded images of unlike sizes, one after the other in a flat file (or array) with offsets and shapes."""

    def __init__(self, flat: Path | np.ndarray, dtype: str, shapes: np.ndarray):
        self._flat = flat
        self._dtype = dtype
        self.shapes = shapes  # [n, 3]: height, width, channels
        self._offsets = np.concatenate([[0], shapes.astype(np.int64).prod(axis=1).cumsum()])
        self._opened: np.ndarray | None = None
        self.uniform = len(shapes) > 0 and bool((shapes == shapes[0]).all())

    def _values(self) -> np.ndarray:
        if self._opened is None:
            flat = self._flat
            self._opened = flat if isinstance(flat, np.ndarray) else np.memmap(flat, dtype=self._dtype, mode="r")
        return self._opened

    def __getitem__(self, index: int) -> np.ndarray:
        """A view [h, w, c]."""
        return self._values()[self._offsets[index] : self._offsets[index + 1]].reshape(self.shapes[index])

    def gather(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """[b, h, w, c], where all images have one shape."""
        return self._values().reshape(-1, *self.shapes[0])[np.asarray(indices)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # a memory map would be pickled as its whole content


class ImageSet:
    """Images by number, cached or streamed; made by `load_images`.

    Attributes:
        names, labels, numbers, classes: of the images, in order, label -1 and number NaN for one that has none, `numbers`
            None where none has one; images that could not be read are left out of a cached set.
        groups: of each image (patient, slide, video), where the source was opened with `groups`, else None.
        channels: of every image.
        skipped: {"path", "reason"} of the images that could not be read.
        cached: whether images come from the cache; a streamed set finds unreadable images only as it meets them.
        scaling: the type of every image, and the values that become 0 and 1.
        mean, std: per channel of images in [0, 1], each image counting the same, pixels without a value left out; std
            is at least 1e-3 (beyond 8 bit, where a range is measured: 1 for a constant channel).
        notes: what was decided, one line each.
    """

    def __init__(
        self,
        source: Source,
        indices: Indices,
        decoding: Decoding,
        pixels: Pixels | None,
        skipped: list[dict[str, str]],
        statistics: Statistics,
        notes: list[str],
    ):
        self._indices = np.asarray(indices, np.int64)
        entries = source.entries
        self.names = Names(entries.names.column, self._indices)
        self.labels = entries.labels[self._indices]
        self.numbers = None if entries.numbers is None else entries.numbers[self._indices]
        self.classes = source.classes
        self.groups = [source.groups[1][k] for k in source.groups[0][self._indices]] if source.grouped else None
        self.channels = decoding.channels
        self.skipped = skipped
        self.cached = pixels is not None
        self.scaling = decoding.scaling
        self.mean, self.std = statistics
        self.notes = [*notes, *_flat_channels(self.std, decoding.scaling)]
        self.pixels = pixels
        self._source = source
        self._decoding = decoding
        if (size := self._encoded(len(self))) is not None:
            self.notes.append(
                f"read in windows of about {source.window / size:,.0f} images ({source.window / 2**30:.3g} GiB, data.window), "
                "each shuffled by itself; their pieces come in another order in each pass"
            )

    def __len__(self) -> int:
        return len(self._indices)

    def fingerprint(self) -> str:
        """Tells these images, as they are decoded, from all others."""
        settings = f"{CACHE_VERSION} {self._source.fingerprint()} {self._decoding} {self.cached} "
        return hashlib.sha256(settings.encode() + np.asarray(self._indices, dtype="<i8").tobytes()).hexdigest()

    @property
    def dtype(self) -> str:
        """Type of every image: "uint8", "uint16" or "float32"."""
        return self.scaling.dtype

    def raw(self, index: int, reduce_to: int | None = None) -> np.ndarray:
        """Pixels [h, w, c] in the data set's type and units, from the cache or decoded now.

        `reduce_to` is the short side wanted; a streamed JPEG is decoded at a fraction of its size not below it.

        Raises:
            Unreadable: a streamed image cannot be decoded.
        """
        if self.pixels is not None:
            return np.array(self.pixels[index])
        return decode_as(self._source.read(int(self._indices[index])), self._decoding, reduce_to)

    def pending(self, index: int) -> Pending:
        """An image's size now and its pixels later: a crop chosen in between decides how far a JPEG is reduced.

        Raises:
            Unreadable: the header is damaged. `Pending.pixels` raises it for the rest.
        """
        pixels = self.pixels
        if pixels is not None:
            height, width, _ = pixels.shapes[index]
            return Pending((int(height), int(width)), lambda reduce_to: pixels[index])
        data = self._source.read(int(self._indices[index]))
        header = read_header(data, max_pixels=self._decoding.max_pixels)
        decoding = self._decoding
        return Pending((header.height, header.width), lambda reduce_to: decode_as(data, decoding, reduce_to))

    def _encoded(self, count: int) -> float | None:
        """Bytes of an encoded image where `count` of them are more than one window has room for; None where they are not, or
        lie in no pieces."""
        pieces = self._source.pieces
        if self.cached or pieces is None:
            return None
        size = float(pieces.sizes.sum() / pieces.starts[-1])
        return size if size * count > self._source.window else None

    def windows(self, chosen: np.ndarray, batch_size: int, seed: int) -> Windows | None:
        """The order in which training goes over the images `chosen` where they are read in windows; None where they are
        permuted all together."""
        size = self._encoded(len(chosen))
        if size is None or len(chosen) < batch_size:
            return None
        pieces = self._source.pieces
        assert pieces is not None
        entries = self._indices[chosen]
        if (np.diff(entries) < 0).any():
            order = np.argsort(entries, kind="stable")
            chosen, entries = chosen[order], entries[order]
        counts = np.diff(np.searchsorted(entries, pieces.starts))
        held = np.flatnonzero(counts)
        batches = max(1, round(self._source.window / (size * batch_size)))
        return Windows(chosen, held, counts[held], batch_size, batches, seed)

    def ahead(self, pieces: Sequence[int]) -> None:
        """Have pieces of the source read before their images are asked for."""
        for piece in pieces:
            self._source.ahead(piece)


def load_images(
    source: Source,
    indices: Indices,
    *,
    size: tuple[int, int],
    channels: int = 3,
    cache_limit: float = 2.0,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    scaling: Scaling | None = None,
    nodata: float | None = None,
    window: float | None = None,
) -> ImageSet:
    """Make the entries `indices` of a source ready for training and evaluation at `size`.

    Args:
        size: height and width of the images wanted, in pixels; cached images keep at most twice its short side.
        channels: of every image: 1 and 3 convert between grey and colour, other numbers must be the files' own.
        cache_limit: GiB; a set estimated to be larger is streamed.
        max_pixels: larger images are refused.
        workers: processes that decode; one for each core where None or 0 and there are many images, or large ones.
        scaling: that of the images that an encoder was pretrained on, for all that it meets later; measured on these
            images where None.
        nodata: where it is measured, a value that stands for missing pixels.
        window: GiB of encoded images that are shuffled together, where they are streamed from pieces; 2 where None.

    Raises:
        InputError: no image at all could be read.
    """
    if not len(indices):
        raise InputError(f"{source.location}: no images to load")
    indices = np.asarray(indices, np.int64)
    if window is not None:
        source.set_window(window * 2**30)
    limit = 2 * min(size)
    root = cache_root()
    key = _key(source, indices, channels, limit, max_pixels, scaling or nodata)
    allowed = cache_limit * 2**30
    damage = None
    # the same images may be there with a scaling that was measured on them
    for each in (key, _key(source, indices, channels, limit, max_pixels, None if scaling is None else scaling.nodata)):
        for folder in (root / each, root / f"{each}-streamed"):
            stored = _stored(folder)
            if isinstance(stored, str):
                damage = f"the cache {folder} is damaged ({stored}) and is made again"
                continue
            if stored is None or (stored["estimate"] > allowed) != stored["streamed"]:
                continue
            if each == key or stored_scaling(stored["decoding"]["scaling"]) == scaling:
                return _from_store(source, indices, folder, stored)
    headers = _headers(source, indices, max_pixels)

    def processes(images: int) -> int:
        return workers or spare_workers(images, images * _mean_pixels(headers))

    if scaling is None:
        decoding, sample, notes = _measure(source, indices, headers, channels, max_pixels, limit, nodata, processes)
    else:
        if len(scaling.low) != channels:
            raise InputError(f"{source.location}: wanted with {channels} channels; the encoder has {len(scaling.low)}")
        decoding, sample, notes = Decoding(channels, max_pixels, limit, scaling), None, []
    sizes = [_cached_bytes(header, decoding) for header in headers]
    estimate = float(np.mean(sizes)) * len(indices) if sizes else 0.0
    statistics = None
    if not decoding.scaling.plain or any(header.nodata for header in headers):  # measured without missing pixels
        statistics = _statistics_of_pixels(
            sample or _pixel_sample(source, indices, decoding, processes), decoding.scaling
        )
    if estimate > allowed:
        made = _stream(source, indices, decoding, root / f"{key}-streamed", estimate, statistics, notes, processes)
    else:
        made = _build(source, indices, decoding, root / key, estimate, statistics, notes, processes)
    made.notes = [*([damage] if damage else []), *made.notes]  # which the cache does not keep
    return made


def measure_scaling(
    source: Source,
    indices: Indices,
    *,
    size: tuple[int, int],
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    nodata: float | None = None,
) -> tuple[Scaling, list[str]]:
    """The scaling that `load_images` would measure on these images, and what a user should know of it."""
    indices = np.asarray(indices, np.int64)
    headers = _headers(source, indices, max_pixels)
    decoding, _, notes = _measure(
        source,
        indices,
        headers,
        channels,
        max_pixels,
        2 * min(size),
        nodata,
        lambda images: spare_workers(images, images * _mean_pixels(headers)),
    )
    return decoding.scaling, notes


def settle_scaling(
    scaling: Scaling | None,
    source: Source,
    indices: Indices,
    *,
    size: tuple[int, int],
    channels: int,
    tell: Callable[[str], None],
) -> Scaling:
    """The scaling that an encoder brings with it, else one measured on these images, which is told unless all is as
    ever with 8 bit."""
    if scaling is not None:
        return scaling
    found, notes = measure_scaling(source, indices, size=size, channels=channels)
    if not found.plain:
        tell(f"the encoder does not say in which range its images are, so it is measured on these: {found}")
        for note in notes:
            tell(note)
    return found


def decode_as(data: bytes, decoding: Decoding, reduce_to: int | None) -> np.ndarray:
    """Decode an image and bring it to the channels and the type of its data set.

    Raises:
        Unreadable: as `decode`; a type that the set's scaling was not measured on.
    """
    return _decode_known(data, decoding, reduce_to)[0]


def _decode_known(data: bytes, decoding: Decoding, reduce_to: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """What `decode_as` returns, and which of it has no value in the file (None where all has)."""
    scaling = decoding.scaling
    array, missing = decode_known(
        data,
        channels=decoding.channels,
        max_pixels=decoding.max_pixels,
        reduce_to=reduce_to,
        background=scaling.background,
        nodata=scaling.nodata,
    )
    if array.dtype.name not in scaling.types:
        known = " and ".join(KINDS[name] for name in scaling.types)
        raise Unreadable(
            f"a {KINDS[array.dtype.name]} image where values were measured on {known} images; save it as those are"
        )
    if array.dtype != scaling.dtype:
        # 8 and 16 bit in one set meet at full scale: 255 becomes 65535
        values = array.astype(np.float32) * (full_scale(scaling.dtype) / full_scale(array.dtype))
        array = (values if scaling.dtype == "float32" else np.rint(values)).astype(scaling.dtype)
    return array, missing


def _reduced(array: np.ndarray, limit: int) -> np.ndarray:
    """[h, w, c] with a short side of at most `limit`, antialiased."""
    height, width, _ = array.shape
    scale = limit / min(height, width)
    if scale >= 1:
        return array
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return resize(array, size)


def resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, c] resized with antialiasing, in its own type and within its own range.

    Bicubic: what is cut from the result is resized once more, by a triangle, and two triangles blur more than one.
    """
    height, width, channels = array.shape
    rows = max(1, STRIP // (width * channels))
    narrowed = array
    if height > rows and width > size[1]:  # the same in two steps: torch narrows rows first, too
        strips = [array[top : top + rows] for top in range(0, height, rows)]
        narrowed = np.concatenate([_interpolated(strip, (len(strip), size[1])) for strip in strips])
    resized = _interpolated(narrowed, size)
    if array.dtype != np.uint8:  # there torch stays within the type's range; here it may overshoot
        resized = resized.clip(*(edge.reduce(array, axis=(0, 1)) for edge in (np.fmin, np.fmax)))
    if array.dtype == np.uint16:
        resized = np.rint(resized)
    return np.ascontiguousarray(resized.astype(array.dtype))


def _interpolated(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, c] resized by torch: as bytes, or as floats which may overshoot."""
    kind = np.uint8 if array.dtype == np.uint8 else np.float32
    # copied where it has to be: torch takes no read-only array, and the cache is mapped read-only
    values = array if array.flags.writeable and array.dtype == kind else np.array(array, dtype=kind)
    tensor = torch.from_numpy(values).permute(2, 0, 1)[None]
    return functional.interpolate(tensor, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _key(source: Source, indices: np.ndarray, channels: int, limit: int, max_pixels: int, scaling: Any) -> str:
    """`scaling` is the one given, or the `nodata` with which it is measured on these images."""
    settings = f"{CACHE_VERSION} {source.fingerprint()} {channels} {limit} {max_pixels} {scaling!r} "
    return hashlib.sha256(settings.encode() + np.asarray(indices, dtype="<i8").tobytes()).hexdigest()[:32]


def _spread(indices: Indices, count: int) -> list[int]:
    """At most `count` of the indices, evenly spaced."""
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return np.asarray(indices)[places].tolist()


def _sampled(source: Source, indices: np.ndarray, count: int) -> list[int]:
    """At most `count` of the indices, evenly spaced; of no more than `SAMPLED_PIECES` pieces where each is brought as a whole."""
    if source.pieces is None or not source.pieces.brought:
        return _spread(indices, count)
    numbers = np.searchsorted(source.pieces.starts, indices, side="right") - 1
    pieces = np.unique(numbers)
    if len(pieces) <= SAMPLED_PIECES:
        return _spread(indices, count)
    chosen = (np.flatnonzero(numbers == piece) for piece in _spread(pieces, SAMPLED_PIECES))
    return [i for within in chosen for i in _spread(indices[within], max(1, count // SAMPLED_PIECES))]


def _headers(source: Source, indices: np.ndarray, max_pixels: int) -> list[Header]:
    """Of a sample of the images, those that can be read."""
    headers: list[Header] = []
    for i in _sampled(source, indices, SAMPLED_HEADERS):
        try:
            headers.append(read_header(source.read(i), max_pixels=max_pixels))
        except Unreadable:
            continue
    return headers


def _mean_pixels(headers: list[Header]) -> float:
    """Pixels of an image on average; 0 where no header can be read."""
    return float(np.mean([header.height * header.width for header in headers])) if headers else 0.0


def _measure(
    source: Source,
    indices: np.ndarray,
    headers: list[Header],
    channels: int,
    max_pixels: int,
    limit: int,
    nodata: float | None,
    processes: Callable[[int], int],
) -> tuple[Decoding, list[np.ndarray] | None, list[str]]:
    """Type, colour behind alpha and range of a set; the pixels that a range was measured on; and notes for the user.
    `processes` decode so many images."""
    total, weight = np.zeros(channels), 0.0
    if any(header.alpha for header in headers):
        for i in _sampled(source, indices, SAMPLED_HEADERS // 4):
            try:
                part, alpha = alpha_weighted_sum(source.read(i), channels=channels, max_pixels=max_pixels)
            except Unreadable:
                continue
            total, weight = total + part, weight + alpha
    background = tuple((total / weight).tolist()) if weight > 0 else (0.5,) * channels
    types = sorted({header.dtype for header in headers}, key=RANKS.__getitem__) or ["uint8"]
    full = Scaling(types[-1], tuple(types), (0.0,) * channels, (full_scale(types[-1]),) * channels, background, nodata)
    decoding = Decoding(channels, max_pixels, limit, full)
    if types[-1] == "uint8":
        return decoding, None, []
    sample = _pixel_sample(source, indices, decoding, processes)
    if not sample:  # none can be read: said by those who try
        return decoding, None, []
    ranges, notes = [], []
    for channel in range(channels):
        values, weights = _channel(sample, channel)
        ranges.append(robust_range(values, weights))
        if len(values):
            low, high = ranges[-1]
            notes += told_of_channel(values, weights, low, high, _named(channel, channels))
    if len(set(ranges)) == 1:
        notes = [note.replace(f"{_named(0, channels)}: ", "") for note in notes[: len(notes) // channels]]
    lows, highs = zip(*ranges, strict=True)
    return replace(decoding, scaling=replace(full, low=lows, high=highs)), sample, notes


def _named(channel: int, channels: int) -> str:
    return f"channel {channel + 1} of {channels}"


def _pixel_sample(
    source: Source, indices: np.ndarray, decoding: Decoding, processes: Callable[[int], int]
) -> list[np.ndarray]:
    """Pixels [k, c] drawn from each of some images, NaN where there is no value; the same at every call."""
    chosen = np.asarray(_sampled(source, indices, SAMPLED_IMAGES // 4))
    generator = np.random.default_rng(0)
    sample = []
    image_bytes = 2.0 * decoding.limit**2 * decoding.channels * np.dtype(decoding.scaling.dtype).itemsize
    for found in _decoded(_Known(source, chosen, decoding), len(chosen), processes(len(chosen)), image_bytes):
        if isinstance(found, str):
            continue
        array, missing = found
        pixels = array.astype(np.float32)
        if missing is not None:
            pixels[missing] = np.nan
        pixels = pixels.reshape(-1, pixels.shape[2])
        count = SAMPLED_PIXELS // len(chosen)
        sample.append(pixels if len(pixels) <= count else pixels[generator.integers(len(pixels), size=count)])
    return sample


def _channel(sample: list[np.ndarray], channel: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of one channel that there are, and weights by which each image counts the same."""
    parts = [pixels[:, channel][np.isfinite(pixels[:, channel])] for pixels in sample]
    return np.concatenate(parts), np.concatenate([np.full(len(part), 1 / max(1, len(part))) for part in parts])


def _statistics_of_pixels(sample: list[np.ndarray], scaling: Scaling) -> Statistics | None:
    """Mean and std of a sample in [0, 1], what is beyond the range clipped; None for an empty sample."""
    if not sample:
        return None
    means, stds = [], []
    for channel, (low, high) in enumerate(zip(scaling.low, scaling.high, strict=True)):
        values, weights = _channel(sample, channel)
        if len(values) == 0:
            values, weights = np.asarray([low]), np.ones(1)
        unit = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
        mean = float(np.average(unit, weights=weights))
        std = float(np.average((unit - mean) ** 2, weights=weights)) ** 0.5
        means.append(mean)
        stds.append(max(std, STD_FLOOR) if scaling.dtype == "uint8" else std if std > 0 else 1.0)
    return means, stds


def _cached_bytes(header: Header, decoding: Decoding) -> float:
    scale = min(1.0, decoding.limit / min(header.height, header.width))
    itemsize = np.dtype(decoding.scaling.dtype).itemsize
    return header.height * header.width * scale**2 * decoding.channels * itemsize


@dataclass(frozen=True)
class _Known:
    """Decodes the image at a place among some entries; classes of their own, so that they pickle into workers."""

    source: Source
    indices: np.ndarray
    decoding: Decoding

    def __call__(self, place: int) -> tuple[np.ndarray, np.ndarray | None] | str:
        """An image as it is kept, and where it has no value (None where all has one); or the reason why there is none."""
        limit = self.decoding.limit
        try:
            array, missing = _decode_known(self.source.read(int(self.indices[place])), self.decoding, limit)
        except Unreadable as error:
            return str(error)
        if missing is not None:
            missing = _reduced(missing.astype(np.float32), limit) > 0
        return _reduced(array, limit), missing


@dataclass(frozen=True)
class _Kept:
    """Decodes as `_Known`, and gives the moments of the images at the places `measured`."""

    known: _Known
    measured: Collection[int]
    pixels: bool = True  # whether images are wanted too

    def __call__(self, place: int) -> tuple[np.ndarray | None, Moments | None] | str:
        found = self.known(place)
        if isinstance(found, str):
            return found
        array, _ = found
        return array if self.pixels else None, _moments(array) if place in self.measured else None


@dataclass(frozen=True)
class _Chunk(Generic[T]):
    """The results of the n-th chunk of places."""

    one: Callable[[int], T | str]
    count: int
    size: int

    def __call__(self, chunk: int) -> list[T | str]:
        return [self.one(place) for place in self.places(chunk)]

    def places(self, chunk: int) -> range:
        return range(chunk * self.size, min((chunk + 1) * self.size, self.count))


def _decoded(
    one: Callable[[int], T | str], count: int, workers: int, image_bytes: float = 0.0
) -> Generator[T | str, None, None]:
    """The result of each place, in order, or the reason why there is none. Where a worker is lost, each image of the chunk
    gets a process of its own, and the one that ends that, too, is left out.

    Args:
        image_bytes: of a result, so that workers hand over little at once.
    """
    even = math.ceil(count / (4 * max(1, workers)))  # so that no worker is left with much at the end
    decode = _Chunk(one, count, max(1, min(CHUNK, even, int(HANDED / max(1.0, image_bytes)))))
    done, chunks = 0, math.ceil(count / decode.size)
    while done < chunks:
        try:
            with closing(ordered_map(decode, range(done, chunks), min(workers, chunks - done))) as found:
                for results in found:
                    yield from results
                    done += 1
        except WorkerLost:
            yield from [_alone(one, place) for place in decode.places(done)]
            done += 1


def _alone(decode: Callable[[int], T | str], place: int) -> T | str:
    try:
        return next(ordered_map(decode, [place], 1))
    except WorkerLost as error:
        if error.number == signal.SIGVTALRM:
            return f"takes longer than {2 * SECONDS} s of processor time to read"
        return f"its decoding was killed (signal {error.number})"


def _build(
    source: Source,
    indices: np.ndarray,
    decoding: Decoding,
    folder: Path,
    estimate: float,
    statistics: Statistics | None,
    notes: list[str],
    processes: Callable[[int], int],
) -> ImageSet:
    """Decode every image once, into a file where the cache folder can be written, else into memory."""
    # measured while they are decoded: those of `_cached_statistics` where all can be read
    measured = set() if statistics else set(_spread(range(len(indices)), SAMPLED_IMAGES))
    one = _Kept(_Known(source, indices, decoding), measured)
    image_bytes, moments = estimate / len(indices), dict[int, Moments]()

    def decode_into(write: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
        results = _decoded(one, len(indices), processes(len(indices)), image_bytes)
        return _decode_all(source, indices, results, write, moments)

    try:
        with replacing_folder(folder, durable=False) as partial:
            with (partial / "pixels.bin").open("wb") as file:
                written = _Summed(file)
                shapes, kept, skipped = decode_into(written.write)
            pixels = Pixels(partial / "pixels.bin", decoding.scaling.dtype, shapes)
            stored = _to_store(
                decoding, estimate, statistics or _cached_statistics(pixels, kept, moments), skipped, notes
            )
            np.savez(partial / "index.npz", shapes=shapes, kept=np.asarray(kept), sums=written.sums())
            _write_set(partial, stored)
        return _from_store(source, indices, folder, stored)
    except OSError as error:
        notes = [*notes, f"the cache folder cannot be written ({error.strerror}); decoded images are held in memory"]
    chunks: list[np.ndarray] = []
    shapes, kept, skipped = decode_into(lambda array: chunks.append(array.reshape(-1)))
    pixels = Pixels(np.concatenate(chunks), decoding.scaling.dtype, shapes)
    statistics = statistics or _cached_statistics(pixels, kept, moments)
    return ImageSet(source, indices[kept], decoding, pixels, skipped, statistics, notes)


def _stream(
    source: Source,
    indices: np.ndarray,
    decoding: Decoding,
    folder: Path,
    estimate: float,
    statistics: Statistics | None,
    notes: list[str],
    processes: Callable[[int], int],
) -> ImageSet:
    """Measure a sample; its statistics are kept, so that a second run starts at once."""
    skipped: list[dict[str, str]] = []
    moments: list[Moments | None] = []
    sample = np.asarray(_sampled(source, indices, SAMPLED_IMAGES // 4))
    one = _Kept(_Known(source, sample, decoding), () if statistics else range(len(sample)), pixels=False)
    for place, result in enumerate(_decoded(one, len(sample), processes(len(sample)))):
        if isinstance(result, str):
            skipped.append({"path": source.entries[sample[place]].name, "reason": result})
        else:
            moments.append(result[1])
    if not moments:
        raise _none_readable(source, skipped)
    notes = [*notes, f"streamed: about {estimate / 2**30:.2f} GiB decoded, more than the limit of the cache"]
    stored = _to_store(
        decoding, estimate, statistics or _statistics([each for each in moments if each]), skipped, notes
    )
    stored["streamed"] = True
    try:
        with replacing_folder(folder, durable=False) as partial:
            _write_set(partial, stored)
    except OSError as error:
        notes.append(f"the cache folder cannot be written ({error.strerror}); a second run measures again")
    return _from_store(source, indices, folder, stored)


def _decode_all(
    source: Source,
    indices: np.ndarray,
    results: Generator[tuple[np.ndarray | None, Moments | None] | str, None, None],
    write: Callable[[np.ndarray], Any],
    moments: dict[int, Moments],
) -> tuple[np.ndarray, list[int], list[dict[str, str]]]:
    """Give every readable image to `write`, in order, and note its moments by its place; shapes [n, 3], places among
    `indices`, and what was skipped."""
    shapes: list[tuple[int, ...]] = []
    kept: list[int] = []
    skipped: list[dict[str, str]] = []
    with Going("decoding", len(indices)) as going, closing(results):
        for place, result in enumerate(results):
            if isinstance(result, str):
                skipped.append({"path": source.entries[indices[place]].name, "reason": result})
            else:
                array, found = result
                assert array is not None
                write(array)
                shapes.append(array.shape)
                kept.append(place)
                if found is not None:
                    moments[place] = found
            going.advance()
    if not kept:
        raise _none_readable(source, skipped)
    return np.asarray(shapes, dtype=np.int64), kept, skipped


def _none_readable(source: Source, skipped: list[dict[str, str]]) -> InputError:
    first = f"{skipped[0]['path']}: {skipped[0]['reason']}"
    return InputError(f"{source.location}: none of {len(skipped)} images could be read, the first: {first}")


def _cached_statistics(pixels: Pixels, kept: Sequence[int], moments: Mapping[int, Moments]) -> Statistics:
    """Mean and std of evenly spaced images, of which `kept` says the places; `moments` has those of most, by place."""
    chosen = _spread(range(len(pixels.shapes)), SAMPLED_IMAGES)
    return _statistics([moments.get(kept[i]) or _moments(pixels[i]) for i in chosen])


UNIT = np.arange(256, dtype=np.float32) / 255
SQUARES = UNIT**2


def _moments(array: np.ndarray) -> Moments:
    """Of an 8-bit image [h, w, c]: by its histogram, since there are but 256 values."""
    channels = array.shape[2]
    if channels == 3:
        counts = np.asarray(Image.fromarray(array).histogram()).reshape(3, 256)
    else:
        counts = np.stack([np.bincount(array[..., channel].reshape(-1), minlength=256) for channel in range(channels)])
    shares = counts / (array.shape[0] * array.shape[1])
    return shares @ UNIT.astype(np.float64), shares @ SQUARES.astype(np.float64)


def _statistics(moments: list[Moments]) -> Statistics:
    """Mean and std of images; they count the same whatever their size, as crops of them do."""
    mean, squares = (np.mean([each[k] for each in moments], axis=0) for k in (0, 1))
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    return mean.tolist(), np.maximum(std, STD_FLOOR).tolist()


def _flat_channels(std: list[float], scaling: Scaling) -> list[str]:
    """A note where channels of 8 bit hardly vary; that of others is written where their range is measured."""
    flat = [str(channel + 1) for channel, value in enumerate(std) if value <= STD_FLOOR]
    if scaling.dtype != "uint8" or not flat:
        return []
    return [f"nearly constant over all images: channel {', '.join(flat)} of {len(std)}"]


def _to_store(
    decoding: Decoding, estimate: float, statistics: Statistics, skipped: list[dict[str, str]], notes: list[str]
) -> dict[str, Any]:
    return {
        "streamed": False,
        "estimate": estimate,
        "decoding": asdict(decoding),
        "statistics": statistics,
        "skipped": skipped,
        "notes": notes,
    }


def _write_set(folder: Path, stored: dict[str, Any]) -> None:
    """Write what a cache says about its set, after everything else in its folder: with a checksum of the index and one
    of itself."""
    index = folder / "index.npz"
    text = json.dumps({**stored, "index": zlib.crc32(index.read_bytes()) if index.is_file() else None})
    (folder / "set.json").write_text(f"{zlib.crc32(text.encode()):08x} {text}")


def _stored(folder: Path) -> dict[str, Any] | str | None:
    """What a cache folder says about its set; None where there is none, and what is wrong where it is damaged."""
    if not folder.is_dir():
        return None
    try:
        written, _, text = (folder / "set.json").read_text().partition(" ")
        if f"{zlib.crc32(text.encode()):08x}" != written:
            return "set.json has another checksum"
        stored: dict[str, Any] = json.loads(text)
        if not stored["streamed"]:
            if zlib.crc32((folder / "index.npz").read_bytes()) != stored["index"]:
                return "index.npz has another checksum"
            with np.load(folder / "index.npz") as index:
                values, sums = int(index["shapes"].prod(axis=1).sum()), index["sums"]
            expected = values * np.dtype(stored["decoding"]["scaling"]["dtype"]).itemsize
            if (found := (folder / "pixels.bin").stat().st_size) != expected:
                return f"pixels.bin has {found:,} of {expected:,} bytes"
            if (place := _damaged_block(folder / "pixels.bin", sums)) is not None:
                return f"pixels.bin has another checksum from byte {place:,} on"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError as error:  # of a set.json that is no text
        return f"set.json: {error}"
    return stored


class _Summed:
    """Writes images into a file, with the CRC-32 of each block of it, so that nothing is read again for them."""

    def __init__(self, file: BufferedWriter):
        self._file = file
        self._sums: list[int] = []  # of whole blocks
        self._sum, self._room = 0, BLOCK  # of the last one, and the bytes that it still has room for

    def write(self, array: np.ndarray) -> None:
        left = memoryview(np.ascontiguousarray(array).data).cast("B")
        self._file.write(left)
        while len(left):
            part, left = left[: self._room], left[self._room :]
            self._sum, self._room = zlib.crc32(part, self._sum), self._room - len(part)
            if not self._room:
                self._sums.append(self._sum)
                self._sum, self._room = 0, BLOCK

    def sums(self) -> np.ndarray:
        """Of every block, the last one too, which is shorter."""
        return np.asarray([*self._sums, *([self._sum] if self._room < BLOCK else [])], dtype="<u4")


def _damaged_block(file: Path, sums: np.ndarray) -> int | None:
    """The first byte of a block whose checksum is another than it was."""
    blocks: Sequence[int] = range(len(sums))
    if len(blocks) > VERIFIED:
        blocks = sorted(random.Random().sample(blocks, VERIFIED))
    with file.open("rb") as opened:
        for number in blocks:
            opened.seek(number * BLOCK)
            if zlib.crc32(opened.read(BLOCK)) != sums[number]:
                return number * BLOCK
    return None


def _from_store(source: Source, indices: np.ndarray, folder: Path, stored: dict[str, Any]) -> ImageSet:
    scaling = stored_scaling(stored["decoding"]["scaling"])
    assert scaling is not None
    decoding = Decoding(**{**stored["decoding"], "scaling": scaling})
    pixels = None
    if not stored["streamed"]:
        with np.load(folder / "index.npz") as index:
            shapes, kept = index["shapes"], index["kept"]
        pixels = Pixels(folder / "pixels.bin", scaling.dtype, shapes)
        indices = indices[kept]
    mean, std = stored["statistics"]
    return ImageSet(source, indices, decoding, pixels, stored["skipped"], (mean, std), stored["notes"])
