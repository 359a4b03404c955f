"""Features of a frozen encoder: one passage for probes while training, for `evaluate` and for pictures.

They are held in memory, or, where it is asked for, kept on disk and memory-mapped: probes of any number of images in the
memory of a few.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from underpaint.backbones import protocols as backbones
from underpaint.computing import autocast, best_precision
from underpaint.console import Going, quiet, say
from underpaint.data import Batch, ImageSet, eval_batches
from underpaint.data.sources.base import cache_root
from underpaint.errors import InputError
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.evaluation.splits import Split
from underpaint.files import replacing_folder
from underpaint.patches import Standardize
from underpaint.train.ranks import first, gathered, my_share, several

AT_ONCE = 256  # images
FULL_PRECISION_BYTES = 1e9  # patch tokens beyond this are kept in half precision
HALF_LIMIT = torch.finfo(torch.float16).max
STORE_VERSION = 3


@runtime_checkable
class Encoded(Protocol):
    """What an encoder makes of a batch."""

    @property
    def pooled(self) -> Tensor: ...  # [b, d]
    @property
    def patches(self) -> Tensor: ...  # [b, t, d]


@runtime_checkable
class Images(Protocol):
    """Some images [b, c, height, width] in [0, 1]."""

    @property
    def images(self) -> Tensor: ...


# of which images the patch tokens are kept: all, none, or those with these numbers in their set
Chosen = bool | Int[np.ndarray, "k"]


class Features(NamedTuple):
    """One vector an image, and one a location of its grid; on the CPU."""

    pooled: Float[Tensor, "n d"]  # float32
    # of all, or of those that were asked for; float32; float16 on disk and beyond 1 GB; t is 0 where none were asked for
    patches: Float[Tensor, "k t d"]
    samples: Int[np.ndarray, "n"]  # numbers in the image set of those that could be read


def extract(
    encoder: Callable[[Tensor], Encoded],
    batches: Iterable[Images],
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    with_patches: Chosen = True,
    folder: Path | None = None,
) -> Features:
    """Run `encoder` over `batches`, in eval mode and without gradients.

    The training flag of every module, and the global random state of the CPU, are as before when it returns.

    Args:
        batches: with `samples`, the numbers of their images, where they have some.
        transform: standardises images.
        with_patches: of which images the patch tokens are kept: all, none, or those with these numbers.
        folder: where features are kept, in place of memory; to be read by `stored`.

    Raises:
        InputError: there are no batches.
    """
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    training = [module.training for module in modules]
    pooled: list[Tensor] = []
    tokens = _Tokens(folder)
    samples: list[int] = []
    try:
        for module in modules:
            module.training = False
        # a loader draws a seed for its workers from the global generator
        with torch.no_grad(), torch.random.fork_rng(devices=[]), tokens.opened():
            for batch in batches:
                images = batch.images if transform is None else transform(batch.images)
                with autocast(images.device):  # what comes out is kept in float32, and probed in it
                    found = encoder(images)
                pooled.append(found.pooled.float().cpu())
                samples += getattr(batch, "samples", ())
                if isinstance(with_patches, np.ndarray):
                    rows = np.flatnonzero(np.isin(np.asarray(getattr(batch, "samples", ())), with_patches))
                    tokens.add(found.patches[torch.from_numpy(rows).to(found.patches.device)])
                elif with_patches:
                    tokens.add(found.patches)
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
    if not pooled:
        raise InputError("there are no images to extract features from, or none can be read")
    vectors, numbers = torch.cat(pooled), np.asarray(samples, np.int64)
    if folder is None:
        return Features(vectors, tokens.joined(vectors), numbers)
    np.save(folder / "pooled.npy", vectors.numpy())
    np.save(folder / "samples.npy", numbers)
    np.save(folder / "tokens.npy", np.asarray(tokens.count))
    return stored(folder)


def counted(batches: Iterable[Batch], what: str, total: int) -> Generator[Batch, None, None]:
    """The same batches, with progress in images (`console.progress`)."""
    with Going(what, total) as going:
        for batch in batches:
            yield batch
            going.advance(len(batch.samples))


class Known(NamedTuple):
    """Features that an encoder made of some images of a set."""

    images: ImageSet
    features: Features

    def pooled(self, images: ImageSet, samples: Sequence[int]) -> Float[Tensor, "n d"] | None:
        """Of the images with these numbers; None where they are not all known."""
        rows = self._rows(images, samples)
        return None if rows is None else self.features.pooled[rows]

    def patches(self, images: ImageSet, samples: Sequence[int]) -> Float[Tensor, "n t d"] | None:
        """The same, of their patch tokens."""
        tokens = self.features.patches
        rows = self._rows(images, samples) if tokens.shape[1] and len(tokens) == len(self.features.samples) else None
        return None if rows is None else tokens[rows]

    def without_patches(self) -> "Known":
        features = self.features
        none = features.pooled.new_empty(len(features.pooled), 0, features.pooled.shape[1])
        return self._replace(features=features._replace(patches=none))

    def _rows(self, images: ImageSet, samples: Sequence[int]) -> list[int] | None:
        places = {sample: row for row, sample in enumerate(self.features.samples.tolist())}
        known = images is self.images and all(sample in places for sample in samples)
        return [places[sample] for sample in samples] if known else None


class _Tokens:
    """Patch tokens as they come: in memory, or in a file."""

    def __init__(self, folder: Path | None):
        self.path = None if folder is None else folder / "patches.bin"
        self.parts: list[Tensor] = []
        self.precision = torch.float32 if folder is None else torch.float16
        self.held = 0  # bytes in full precision
        self.count = 0  # of an image

    @contextmanager
    def opened(self) -> Generator[None, None, None]:
        if self.path is None:
            yield
            return
        with self.path.open("wb") as self.file:
            yield

    def add(self, tokens: Float[Tensor, "b t d"]) -> None:
        kept = _kept(tokens.float(), self.precision)
        self.count = tokens.shape[1]
        if self.path is not None:
            self.file.write(kept.numpy().tobytes())
            return
        self.parts.append(kept)
        self.held += 4 * kept.numel()
        if self.precision == torch.float32 and self.held > FULL_PRECISION_BYTES:
            self.precision = torch.float16
            self.parts = [_kept(part, self.precision) for part in self.parts]

    def joined(self, pooled: Float[Tensor, "n e"]) -> Float[Tensor, "k t d"]:
        return torch.cat(self.parts) if self.parts else pooled.new_empty(len(pooled), 0, pooled.shape[1])


def _kept(tokens: Float[Tensor, "b t d"], precision: torch.dtype) -> Float[Tensor, "b t d"]:
    if precision == torch.float16:
        tokens = tokens.clamp(-HALF_LIMIT, HALF_LIMIT)  # an overflow would make every later number infinite
    return tokens.to("cpu", precision)


def stored(folder: Path) -> Features:
    """What `extract` kept in a folder, memory-mapped; copied on write, so that nobody can spoil the files.

    Raises:
        OSError, ValueError: files that are missing or damaged.
    """
    pooled, samples = np.load(folder / "pooled.npy", mmap_mode="c"), np.load(folder / "samples.npy")
    (count, dim), tokens = pooled.shape, int(np.load(folder / "tokens.npy"))
    if len(samples) != count or (folder / "patches.bin").stat().st_size != 2 * count * tokens * dim:
        raise ValueError(f"{folder}: its files do not fit each other")
    patches = np.zeros((count, 0, dim), np.float16)
    if tokens:
        patches = np.memmap(folder / "patches.bin", np.float16, "c").reshape(count, tokens, dim)
    return Features(torch.from_numpy(pooled), torch.from_numpy(patches), samples)


def features_of(
    encoder: Callable[[Tensor], Encoded],
    standardize: Standardize,
    split: Split,
    size: tuple[int, int],
    *,
    with_patches: Chosen,
    folder: Path | None = None,
) -> Features:
    """The features of a split's images, whole and in order, at a size in pixels.

    Raises:
        InputError: none of the images can be read.
    """
    device, indices = standardize.mean.device, split.indices
    batches = eval_batches(split.images, size=size, batch_size=AT_ONCE, indices=indices, device=device)
    batches = counted(batches, "features", len(split.indices))
    return extract(encoder, batches, transform=standardize, with_patches=with_patches, folder=folder)


def shared_features(
    encoder: Callable[[Tensor], Encoded],
    standardize: Standardize,
    split: Split,
    size: tuple[int, int],
    *,
    with_patches: Chosen,
) -> Features | None:
    """The same, in the first process of several, which extract them together, in the batches that one would make; None in
    the others.

    Raises:
        InputError: none of the images can be read.
    """
    if not several():
        return features_of(encoder, standardize, split, size, with_patches=with_patches)
    begin, end = (AT_ONCE * edge for edge in my_share(-(-len(split.indices) // AT_ONCE)))
    mine = Split(split.images, split.indices[begin:end])
    try:
        with quiet(not first()):
            found = features_of(encoder, standardize, mine, size, with_patches=with_patches)
    except InputError:  # none of these
        found = Features(torch.empty(0, 0), torch.empty(0, 0, 0), np.empty(0, np.int64))
    parts = [gathered(each) for each in (found.pooled, found.patches, torch.from_numpy(found.samples))]
    pooled, patches, samples = ([] if part is None else [one for one in part if len(one)] for part in parts)
    if not first():
        return None
    if not pooled:
        raise InputError("there are no images to extract features from, or none can be read")
    return Features(torch.cat(pooled), _together(patches), torch.cat(samples).numpy())


def _together(patches: Sequence[Float[Tensor, "_ t d"]]) -> Float[Tensor, "k t d"]:
    """In full precision where all are, and fit."""
    half = any(part.dtype == torch.float16 for part in patches)
    half = half or 4 * sum(part.numel() for part in patches) > FULL_PRECISION_BYTES
    return torch.cat([_kept(part, torch.float16 if half else torch.float32) for part in patches])


def completed_features(
    encoder: Callable[[Tensor], Encoded],
    standardize: Standardize,
    split: Split,
    size: tuple[int, int],
    *,
    with_patches: Chosen,
    known: Features | None,
) -> Features | None:
    """The same as `shared_features` of a split whose indices ascend; what is `known` of the encoder, each image with its patch
    tokens where these are asked for, is not extracted again.

    Raises:
        InputError: none of the images can be read.
    """
    indices = np.asarray(split.indices, np.int64)
    if known is None or several():  # what the first process knows, the others do not
        return shared_features(encoder, standardize, split, size, with_patches=with_patches)
    whole = np.isin(known.samples, indices)
    rest = indices[~np.isin(indices, known.samples)]
    parts, wanted = (
        [],
        indices if with_patches is True else with_patches if isinstance(with_patches, np.ndarray) else rest[:0],
    )
    if whole.any():
        rows, tokens = np.flatnonzero(whole), np.flatnonzero(whole & np.isin(known.samples, wanted))
        patches = known.patches[torch.from_numpy(tokens)] if len(wanted) else known.patches[:0, :0]
        parts.append(Features(known.pooled[torch.from_numpy(rows)], patches, known.samples[rows]))
    if len(rest):
        try:
            left = Split(split.images, rest)
            parts.append(features_of(encoder, standardize, left, size, with_patches=with_patches))
        except InputError:  # none of these
            if not parts:
                raise
    samples = np.concatenate([part.samples for part in parts])
    order = np.argsort(samples)
    pooled = torch.cat([part.pooled for part in parts])[torch.from_numpy(order)]
    if not len(wanted):
        return Features(pooled, pooled.new_empty(len(pooled), 0, pooled.shape[1]), samples[order])
    held = np.concatenate([part.samples[np.isin(part.samples, wanted)] for part in parts])
    patches = _together([part.patches for part in parts if len(part.patches)])
    return Features(pooled, patches[torch.from_numpy(np.argsort(held))], samples[order])


def pixel_features(
    kinds: Mapping[str, Callable[[Tensor], Tensor]], split: Split, size: tuple[int, int]
) -> dict[str, Features]:
    """What images give without any network, by functions of images in [0, 1]; the images are read once for all."""
    widths: dict[str, int] = {}

    def encoded(images: Tensor) -> Encoded:
        made = {name: kind(images) for name, kind in kinds.items()}
        widths.update({name: vectors.shape[1] for name, vectors in made.items()})
        return backbones.Features(torch.cat(list(made.values()), dim=1), images.new_empty(len(images), 0, 0))

    batches = counted(eval_batches(split.images, size=size, indices=split.indices), "features", len(split.indices))
    found = extract(encoded, batches, with_patches=False)
    parts = found.pooled.split([widths[name] for name in kinds], dim=1)
    none = found.pooled.new_empty(len(found.pooled), 0, 0)
    return {name: Features(part.contiguous(), none, found.samples) for name, part in zip(kinds, parts, strict=True)}


def stored_features(bundle: EncoderBundle, split: Split, *, with_patches: bool) -> Features:
    """Those of an earlier call with the same weights, images and size, kept below the cache, or made now.

    Raises:
        InputError: none of the images can be read.
    """
    folder = cache_root() / "features" / _key(bundle, split, with_patches)
    if folder.is_dir():
        try:
            return stored(folder)
        except (OSError, ValueError, EOFError):
            say(f"damaged, and computed again: the features in {folder}")
    with replacing_folder(folder, durable=False) as temporary:
        features_of(
            *(bundle.encoder, bundle.standardize, split, bundle.size), with_patches=with_patches, folder=temporary
        )
    return stored(folder)


def _key(bundle: EncoderBundle, split: Split, with_patches: bool) -> str:
    """sha256 over everything that the features depend on."""
    digest = hashlib.sha256(bundle.fingerprint.encode())
    settings = [STORE_VERSION, bundle.arguments, bundle.size, with_patches]
    if (precision := best_precision(bundle.standardize.mean.device)) != "32":
        settings.append(precision)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    statistics = torch.cat([bundle.standardize.mean.flatten(), bundle.standardize.std.flatten()])
    digest.update(statistics.cpu().numpy().tobytes())
    digest.update(split.images.fingerprint().encode())
    digest.update(np.asarray(split.indices, np.int64).tobytes())
    return digest.hexdigest()[:32]
