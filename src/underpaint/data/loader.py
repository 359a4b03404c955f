"""Batches: which images and which crops batch k holds is a pure function of (seed, k)."""

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from underpaint.data.crop import centre_boxes, crop_resize, draw_crops
from underpaint.data.decode import Unreadable
from underpaint.data.images import ImageSet, Pending, resize
from underpaint.data.parallel import ordered_map, reading_workers, within_memory
from underpaint.data.shuffle import LARGE, shuffled
from underpaint.data.sources.index import Indices
from underpaint.errors import InputError

REPLACEMENTS = 100  # other samples tried in place of one that cannot be decoded
# a cut-out of more than this times the target is reduced before it is padded into the batch; JPEGs are decoded at no
# less, so that a box, which is rounded to what was decoded, is at most a quarter of a pixel of the target off
OVERSIZE = 2
# the longer side of a crop is up to a third longer than the shorter one, in sides of the target; what is longer all the same
# is reduced to this many sides, so that no cut-out, and no batch that is padded to it, is larger
LONGEST = 2.75
# bytes of cut-outs that are handed over at once, at most: a batch of more comes in parts. More would be too much where many
# are read ahead, fewer would be too many small copies
PART = 2**25

# images of a streamed set whose boxes are drawn together, which takes little longer than for one; their files are held
DRAWN = 8
Draw = Callable[[slice | np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

# of a batch: its number, its first image and the one behind its last, and whether nothing of it follows
Part = tuple[int, int, int, bool]


class Batch(NamedTuple):
    """Images [b, c, h, w] in [0, 1] on the device, and their numbers in the `ImageSet`."""

    images: Float[Tensor, "b c h w"]
    samples: list[int]


class _Cutouts(NamedTuple):
    """What a worker hands over: stretches of images padded to one size, and the boxes still to be cut from them."""

    pixels: Tensor  # [b, height, width, c] in the data set's type
    boxes: Float[
        np.ndarray, "b 4"
    ]  # within `pixels`; small, and so no tensors, each of which would be handed over by itself
    flips: Bool[np.ndarray, "b"]
    samples: list[int]
    skipped: list[dict[str, str]]
    last: bool = True  # of its batch


def steps_per_epoch(images: ImageSet, batch_size: int) -> int:
    """Whole batches in one pass over the images; at least 1."""
    return max(1, len(images) // batch_size)


def train_batches(
    crops: "Crops",
    *,
    first_batch: int = 0,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    on_skip: Callable[[dict[str, str]], None] | None = None,
) -> Generator[Batch, None, None]:
    """Endless batches of random crops. Close the iterator to end the workers.

    Args:
        first_batch: the number of the first batch given; a resumed run starts here, nothing is replayed.
        workers: processes that read ahead, by the cores where None (`parallel.reading_workers`); fewer where
            the memory that is shared with them does not suffice. The batches do not depend on it.
        on_skip: told {"path", "reason"} once for each file of a streamed set that cannot be decoded; another sample,
            drawn by (seed, epoch, sample), stands in for it.
    """
    each, device = crops.batch_size // crops.world, torch.device(device)
    if workers is None:
        workers = reading_workers(device.type, crops.images.cached)
    sizes = ((number, each) for number in itertools.count(first_batch))
    return _batches(crops, sizes, each, crops.images, crops.size, workers, device, on_skip)


def fair_batches(
    images: ImageSet,
    *,
    size: tuple[int, int],
    count: int,
    seed: int,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Generator[Batch, None, None]:
    """At most `count` images in random order, so that each batch is a fair draw of all; batches of equal size, or one."""
    order = np.random.default_rng(seed).permutation(len(images))[:count].tolist()
    whole = order[: max(len(order) // batch_size * batch_size, min(len(order), batch_size))]
    yield from eval_batches(images, size=size, indices=whole, batch_size=batch_size, device=device)


def eval_batches(
    images: ImageSet,
    *,
    size: tuple[int, int],
    batch_size: int = 256,
    indices: Indices | None = None,
    device: str | torch.device = "cpu",
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Each image once, in order: the short side resized so that the target fits, then the centre.

    `Batch.samples` tells which images a batch holds: those of a streamed set that cannot be decoded are left out.

    Args:
        indices: which images; default all.
        workers: as for `train_batches`; where None, fewer for few images.
    """
    chosen, device = np.arange(len(images)) if indices is None else np.asarray(indices, np.int64), torch.device(device)
    prepare = _EvalRows(images, size, batch_size, chosen)
    counts = [min(batch_size, len(chosen) - first) for first in range(0, len(chosen), batch_size)]
    if workers is None:
        parts = sum(1 for _ in _parts(enumerate(counts), part_rows(images, size)))
        workers = reading_workers(device.type, images.cached, parts)
    return _batches(prepare, enumerate(counts), batch_size, images, size, workers, device, None)


def part_rows(images: ImageSet, size: tuple[int, int]) -> int:
    """How many cut-outs are handed over at once. It depends on nothing but the images: cut-outs are padded to the largest of
    a part, and the same parts are the same bits, whoever makes them."""
    return max(1, PART // cutout_bytes(images, size))


def cutout_bytes(images: ImageSet, size: tuple[int, int]) -> int:
    """What a cut-out takes at most."""
    height, width = longest(size)
    if images.pixels is not None:
        tall, wide = images.pixels.shapes[:, :2].max(axis=0).tolist()
        # images of one size are handed over whole
        height, width = (tall, wide) if images.pixels.uniform else (min(height, tall), min(width, wide))
    return height * width * images.channels * np.dtype(images.dtype).itemsize


def _parts(sizes: Iterable[tuple[int, int]], most: int) -> Iterator[Part]:
    """Batches, given by number and size, in about equal parts of at most so many images."""
    for batch, count in sizes:
        pieces = -(-count // most)
        edges = [count * piece // pieces for piece in range(pieces + 1)]
        for start, stop in itertools.pairwise(edges):
            yield batch, start, stop, stop == count


@dataclass
class _OnePart:
    """What a worker is asked for."""

    prepare: Callable[[int, slice], _Cutouts]

    def __call__(self, part: Part) -> _Cutouts:
        batch, start, stop, last = part
        return self.prepare(batch, slice(start, stop))._replace(last=last)


def _batches(
    prepare: Callable[[int, slice], _Cutouts],
    sizes: Iterable[tuple[int, int]],
    largest: int,
    images: ImageSet,
    size: tuple[int, int],
    workers: int,
    device: torch.device,
    on_skip: Callable[[dict[str, str]], None] | None,
) -> Generator[Batch, None, None]:
    """Batches by number and size, of at most `largest` images each."""
    told: set[str] = set()
    most = min(part_rows(images, size), largest)
    workers, prefetch = within_memory(workers, most * cutout_bytes(images, size))
    pin = device.type == "cuda" and workers > 0
    made: list[Tensor] = []
    samples: list[int] = []
    with closing(ordered_map(_OnePart(prepare), _parts(sizes, most), workers, pin, prefetch)) as prepared:
        for cutouts in prepared:
            for skip in cutouts.skipped:
                if on_skip is not None and skip["path"] not in told:
                    on_skip(skip)
                told.add(skip["path"])
            if cutouts.samples:
                parts = (cutouts.pixels, torch.from_numpy(cutouts.boxes), torch.from_numpy(cutouts.flips))
                pixels, boxes, flips = (part.to(device, non_blocking=True) for part in parts)
                cropped = crop_resize(pixels.permute(0, 3, 1, 2), boxes, flips, size)
                made.append(images.scaling.unit(cropped))
                samples += cutouts.samples
                del pixels, cropped
            if cutouts.last and made:
                yield Batch(_joined(made), samples)
                samples = []


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor of its parts, which are let go."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    parts.clear()
    return whole


@dataclass
class Crops:
    """Which crops of which images a batch holds, a function of its number; called with it, what this process reads: all of its
    rows of the batch, or some of these.

    Each epoch is a permutation by (seed, epoch) cut into whole batches, the rest dropped; a set smaller than the
    batch goes on in the next epoch's permutation within a batch. Of more than `LARGE` images no permutation is held in
    memory.

    Attributes:
        size: height and width, in pixels.
        batch_size: of the global batch, over all ranks.
        indices: which images; default all.
        crop_scale: range of a crop's share of the image's area.
        flip: whether half of the crops are mirrored.
        rank, world: this process gets rows rank * batch_size / world and on of each batch.

    Raises:
        ValueError: `batch_size` is not a multiple of `world`.
    """

    images: ImageSet
    size: tuple[int, int]
    batch_size: int
    seed: int
    indices: Indices | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world or self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of the {self.world} processes")
        self._chosen = np.arange(len(self.images)) if self.indices is None else np.asarray(self.indices)
        each = self.batch_size // self.world
        self._rows = slice(self.rank * each, (self.rank + 1) * each)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._windows = self.images.windows(self._chosen, self.batch_size, self.seed)

    def __call__(self, batch: int, rows: slice = slice(None)) -> _Cutouts:
        epochs, samples = (each[rows] for each in self._samples(batch))
        if self._windows is not None:
            self.images.ahead(self._windows.ahead(batch, self._rows))

        def draw(rows: slice | np.ndarray, chosen: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return draw_crops(
                self.seed, epochs[rows], chosen, sizes, scale=self.crop_scale, flip=self.flip, target=self.size
            )

        def stand_ins(row: int) -> Iterator[int]:
            return self._stand_ins(int(epochs[row]), int(samples[row]))

        return _cut(self.images, samples, self.size, draw, stand_ins)

    def _stand_ins(self, epoch: int, sample: int) -> Iterator[int]:
        """What is tried in place of a sample: others in each epoch, so that no image counts for two throughout."""
        generator = np.random.default_rng([self.seed % 2**64, epoch, sample])
        for _ in range(REPLACEMENTS):
            yield int(self._chosen[generator.integers(len(self._chosen))])
        raise InputError(f"{self.images.names[sample]} and {REPLACEMENTS} images drawn in its place cannot be read")

    def _samples(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample of each of this rank's rows."""
        count, size = len(self._chosen), self.batch_size
        if count >= size:
            epoch, step = divmod(batch, count // size)
            places = np.arange(step * size, (step + 1) * size)[self._rows]
            return np.full(len(places), epoch), self._permuted(epoch, places)
        places = np.arange(batch * size, (batch + 1) * size)[self._rows]
        epochs = places // count
        parts = [self._permuted(epoch, places[epochs == epoch] % count) for epoch in np.unique(epochs).tolist()]
        return epochs, np.concatenate(parts)

    def _permuted(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The samples at some places of an epoch's order."""
        if self._windows is not None:
            return self._windows(epoch, places)
        if len(self._chosen) > LARGE:
            return self._chosen[shuffled(places, len(self._chosen), self.seed, epoch)]
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, epoch]))
            self._order = (epoch, self._chosen[generator.permutation(len(self._chosen))])
        return self._order[1][places]


class _EvalRows:
    """The centres of the n-th stretch of the chosen images, or of some of it."""

    def __init__(self, images: ImageSet, size: tuple[int, int], batch_size: int, indices: np.ndarray):
        self._images = images
        self._size = size
        self._batch_size = batch_size
        self._indices = indices

    def __call__(self, batch: int, rows: slice = slice(None)) -> _Cutouts:
        def draw(rows: slice | np.ndarray, chosen: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return centre_boxes(sizes, self._size), np.zeros(len(sizes), dtype=bool)

        samples = self._indices[batch * self._batch_size : (batch + 1) * self._batch_size][rows]
        return _cut(self._images, samples, self._size, draw, lambda row: iter(()))


class _Drawn(NamedTuple):
    """A row's image with its box, before it is decoded."""

    row: int
    sample: int
    pending: Pending
    box: np.ndarray
    flip: bool


def _cut(
    images: ImageSet,
    samples: np.ndarray,
    target: tuple[int, int],
    draw: Draw,
    stand_ins: Callable[[int], Iterator[int]],
) -> _Cutouts:
    """The stretches of the images that their boxes need; `draw(rows, samples, sizes)` gives boxes and flips, and
    `stand_ins(row)` the samples to try where that of a row cannot be decoded."""
    pixels = images.pixels
    if pixels is not None:
        boxes, flips = draw(slice(None), samples, pixels.shapes[samples, :2])
        if pixels.uniform:
            whole = torch.from_numpy(pixels.gather(samples))
            return _Cutouts(whole, boxes, flips, samples.tolist(), [])
        pieces = [_piece(pixels[int(s)], box, None, target) for s, box in zip(samples, boxes, strict=True)]
        return _padded(pieces, flips, samples.tolist(), [])
    pieces, mirrored, used, skipped = [], [], [], []

    def opened(sample: int) -> Pending | None:
        try:
            return images.pending(sample)
        except Unreadable as error:
            skipped.append({"path": images.names[sample], "reason": str(error)})
            return None

    def drawn(rows: np.ndarray, chosen: np.ndarray, found: list[Pending | None]) -> list[_Drawn]:
        """With their boxes, those that could be opened."""
        there = [(row, each) for row, each in enumerate(found) if each is not None]
        if not there:
            return []
        which = [row for row, _ in there]
        boxes, flips = draw(rows[which], chosen[which], np.asarray([each.size for _, each in there]))
        return [
            _Drawn(int(rows[row]), int(chosen[row]), each, box, flip)
            for (row, each), box, flip in zip(there, boxes, flips, strict=True)
        ]

    for start in range(0, len(samples), DRAWN):
        rows = np.arange(start, min(start + DRAWN, len(samples)))
        firsts = {each.row: each for each in drawn(rows, samples[rows], [opened(s) for s in samples[rows].tolist()])}
        for row in rows.tolist():
            others = (
                each
                for sample in stand_ins(row)
                for each in drawn(np.asarray([row]), np.asarray([sample]), [opened(sample)])
            )
            first = [firsts.pop(row)] if row in firsts else []
            for each in itertools.chain(first, others):
                box, size = each.box, each.pending.size
                reduction = min(box[2] / target[0], box[3] / target[1]) / OVERSIZE
                reduce_to = math.ceil(min(size) / reduction) if reduction > 1 else None
                try:
                    pieces.append(_piece(each.pending.pixels(reduce_to), box, size, target))
                except Unreadable as error:
                    skipped.append({"path": images.names[each.sample], "reason": str(error)})
                    continue
                mirrored.append(each.flip)
                used.append(each.sample)
                break
    return _padded(pieces, np.asarray(mirrored, dtype=bool), used, skipped)


def longest(target: tuple[int, int]) -> tuple[int, int]:
    """Height and width that no cut-out is beyond."""
    return math.ceil(LONGEST * target[0]), math.ceil(LONGEST * target[1])


def _piece(
    array: np.ndarray, box: np.ndarray, full_size: tuple[int, int] | None, target: tuple[int, int]
) -> np.ndarray:
    """The part of `array` in a box, which is given in pixels of the full size; not much larger than the target, and no side
    more than LONGEST times as long."""
    height, width, _ = array.shape
    scale = (height / full_size[0], width / full_size[1]) if full_size else (1.0, 1.0)
    top, left = round(box[0] * scale[0]), round(box[1] * scale[1])
    bottom = min(height, max(top + 1, round((box[0] + box[2]) * scale[0])))
    right = min(width, max(left + 1, round((box[1] + box[3]) * scale[1])))
    piece = array[min(top, bottom - 1) : bottom, min(left, right - 1) : right]
    reduction = max(1.0, min(piece.shape[0] / target[0], piece.shape[1] / target[1]) / OVERSIZE)
    height, width = (min(math.ceil(a / reduction), b) for a, b in zip(piece.shape[:2], longest(target), strict=True))
    return piece if (height, width) == piece.shape[:2] else resize(piece, (height, width))


def _padded(pieces: list[np.ndarray], flips: np.ndarray, samples: list[int], skipped: list[dict[str, str]]) -> _Cutouts:
    """Pieces of unlike sizes in one zero-padded array; the boxes say how far each one goes."""
    if not pieces:
        return _Cutouts(torch.empty(0), np.empty((0, 4), np.float32), flips, [], skipped)
    sizes = np.asarray([piece.shape[:2] for piece in pieces])
    height, width = sizes.max(axis=0)
    padded = np.zeros((len(pieces), height, width, pieces[0].shape[2]), dtype=pieces[0].dtype)
    for row, piece in enumerate(pieces):
        padded[row, : piece.shape[0], : piece.shape[1]] = piece
    boxes = np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.float32)
    return _Cutouts(torch.from_numpy(padded), boxes, flips, samples, skipped)
