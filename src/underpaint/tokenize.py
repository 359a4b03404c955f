"""Fit or train a tokenizer on images, and say how good it is: `underpaint tokenizer`, and runs that are given none."""

import math
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from underpaint.computing import lay_out
from underpaint.config import Data, bounds_of, outside
from underpaint.console import progress, say
from underpaint.data import Crops, ImageSet, eval_batches, load_images, open_source, pretraining_indices, train_batches
from underpaint.errors import InputError
from underpaint.locking import locked
from underpaint.report.figures.pictures import sheet
from underpaint.tokenizers import (
    ConvTokenizer,
    KMeansPatches,
    Tokenizer,
    codebook_size_for,
    described,
    refuse_collapsed,
    sample_patches,
    save_tokenizer,
    width_for,
)
from underpaint.train.fit import Fitting, fit_task
from underpaint.train.optim import adamw
from underpaint.train.schedules import Duration, Schedule

KINDS = ("kmeans", "fsq", "vq")
HELD_OUT, HELD_OUT_IMAGES = 20, 2_000  # each 20th image, and at most so many, judge
SHOWN = 6
PATCHES_A_WORD = 256  # that k-means is fitted to
COUNTED_A_WORD = 64  # n a word have a cross-entropy about 1 / 2n nats above that of the true frequencies: 0.008
LR = 1e-3  # of AdamW, at its highest
STEPS = 5_000
BATCH = 128
SMALL = 64  # pixels: up to here images are small


@dataclass(frozen=True)
class Making:
    """From what a tokenizer is made, and how.

    Attributes:
        settings: how crops are cut.
        folder: of a training's checkpoints, from which the same call goes on; who saved the tokenizer may remove it.
        duration: of a training; k-means is fitted once.
        clock: seconds, by which it is timed.
        precision: of a training's products; the best of the device where None.
    """

    images: ImageSet
    settings: Data
    batch_size: int
    seed: int
    device: torch.device
    folder: Path
    duration: Duration
    shout: Callable[[str], None] = say
    clock: Callable[[], float] = time.perf_counter
    precision: str | None = None

    def crops(self, first: int, seed: int) -> Generator[Tensor, None, None]:
        """Random crops in [0, 1], from batch `first` on, of all images but those that judge."""
        count = len(self.images)
        indices = [k for k in range(count) if k % HELD_OUT or count < HELD_OUT]
        data = self.settings
        crops = Crops(self.images, data.image_size, self.batch_size, seed, indices, data.crop_scale, data.flip)
        with closing(train_batches(crops, first_batch=first, workers=data.workers, device=self.device)) as batches:
            for batch in batches:
                yield batch.images

    def fit(self, tokenizer: KMeansPatches) -> float:
        """k-means on patches of crops; returns the seconds that it took."""
        began = self.clock()
        with closing(self.crops(0, self.seed)) as batches:
            wanted = PATCHES_A_WORD * tokenizer.codebook_size
            tokenizer.fit(sample_patches(batches, tokenizer.stride, wanted, self.seed), self.seed)
        return self.clock() - began

    def train(self, tokenizer: ConvTokenizer) -> float:
        """By the one loop; returns the seconds that it took, those before an interruption too."""
        tokenizer.requires_grad_(True)
        told = {
            **tokenizer.arguments(),
            "images": self.images.fingerprint(),
            "image_size": self.settings.image_size,
            "crop_scale": self.settings.crop_scale,
            "flip": self.settings.flip,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        optimiser = adamw(tokenizer.param_groups(LR, 0.01), betas=(0.9, 0.95))
        how = Fitting(self.duration, Schedule(0.05), self.seed, 1.0, self.batch_size, told, self.clock, self.precision)
        return 60 * fit_task(tokenizer, optimiser, self.crops, self.folder, how)["minutes"]

    def count(self, tokenizer: Tokenizer) -> None:
        """How often each word comes in such crops."""
        rows, columns = tokenizer.grid(*self.settings.image_size)
        batches = math.ceil(COUNTED_A_WORD * tokenizer.codebook_size / (self.batch_size * rows * columns))
        with closing(self.crops(0, self.seed)) as crops:
            tokenizer.count(progress(islice(crops, batches), "counting words", batches))


def make_ready(tokenizer: Tokenizer, making: Making) -> dict[str, Any]:
    """Fit or train `tokenizer` in place where that is still to be done, judge it, and count its words.

    Returns:
        kind, made (whether it was not ready before), seconds (that making it took; None where it was ready), and quality
        on each 20th image, which is not trained on.

    Raises:
        InputError: too few images; held-out images use hardly any of the words.
    """
    made, seconds = not tokenizer.ready, None
    called = f"{tokenizer.kind}, {tokenizer.codebook_size} words of {tokenizer.stride} px"
    if made:
        making.shout(f"making a tokenizer: {called} ...")
    if made and isinstance(tokenizer, KMeansPatches):
        seconds = making.fit(tokenizer)
    elif made and isinstance(tokenizer, ConvTokenizer):
        seconds = making.train(tokenizer)
    tokenizer.ready = True
    tokenizer.requires_grad_(False).eval()
    tokenizer.zero_grad(set_to_none=True)
    size = (making.settings.image_size[0], making.settings.image_size[1])
    quality = tokenizer.judge(held_out_crops(making.images, size, making.device))
    making.shout(f"{called}, held out: {described(quality)}")
    refuse_collapsed(quality, f"{tokenizer.kind} tokenizer")
    making.count(tokenizer)
    seconds = None if seconds is None else round(seconds, 1)
    return {"kind": tokenizer.kind, "made": made, "seconds": seconds, "quality": quality}


def held_out_crops(images: ImageSet, size: tuple[int, int], device: torch.device) -> Generator[Tensor, None, None]:
    """The images in [0, 1] that judge a tokenizer, which are not trained on."""
    chosen = range(0, len(images), HELD_OUT)[:HELD_OUT_IMAGES]
    with closing(eval_batches(images, size=size, indices=chosen, device=device)) as batches:
        for batch in batches:
            yield batch.images


@dataclass(frozen=True)
class Words:
    """Which words are wanted.

    Attributes:
        kind: kmeans, fsq or vq.
        image_size: of the crops, height and width in pixels.
        stride: pixels of a word: the patch size of the encoders that will use it.
        codebook_size: words; 1024 for images up to 64 px, else 2048 (kmeans, vq) or 4375 (fsq), where None.
        channels: of the images.
    """

    kind: str = "kmeans"
    image_size: tuple[int, int] = (224, 224)
    stride: int = 16
    codebook_size: int | None = None
    channels: int = 3

    def tokenizer(self) -> Tokenizer:
        """As it is before it is fitted or trained.

        Raises:
            InputError: settings that cannot be used.
        """
        kind, size, stride = self.kind, self.image_size, self.stride
        if kind not in KINDS:
            raise InputError(f"--kind {kind}: there are {', '.join(KINDS)}")
        if stride < 1 or size[0] % stride or size[1] % stride:
            raise InputError(f"--stride {stride}: does not divide images of {size[0]}x{size[1]}")
        count = self.codebook_size or (codebook_size_for(size) if kind != "fsq" or max(size) <= SMALL else 4375)
        if kind == "kmeans":
            return KMeansPatches(count, stride, self.channels)
        return ConvTokenizer("fsq" if kind == "fsq" else "vq", count, stride, self.channels, width_for(size))


def make_tokenizer(
    data: str | Path,
    out: str | Path,
    words: Words,
    *,
    minutes: float | None = None,
    groups: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Fit k-means to patches of `data`, or train a convolutional autoencoder; write `out` and its .json and picture.

    Args:
        data: images, as for pretraining.
        out: a .safetensors file.
        minutes: of training (fsq, vq); 5,000 steps where None. Where a training was interrupted, the same call goes on.
        groups: as for pretraining, so that the hold-out of `data`, which is left out, is the same.

    Returns:
        psnr, used, perplexity and unigram on held-out images.

    Raises:
        InputError: settings or data that cannot be used; a codebook of which hardly any is used.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise InputError(f"--out {out}: give a .safetensors file")
    for flag, value, bounds in (
        ("minutes", minutes, bounds_of("run.minutes")),
        ("seed", seed, bounds_of("run.seed")),
        ("channels", words.channels, bounds_of("data.channels")),
        ("codebook-size", words.codebook_size, {"at least": 2, "at most": 1_000_000}),
        ("image-size", min(words.image_size), bounds_of("data.image_size")),
        ("image-size", max(words.image_size), bounds_of("data.image_size")),
    ):
        if value is not None and (wrong := outside(value, bounds)):
            raise InputError(f"--{flag}: {wrong}")
    scratch = path.with_suffix(".training")
    with locked(scratch):
        return _made(data, path, words, scratch, minutes, groups, seed)


def _made(
    data: str | Path, path: Path, words: Words, scratch: Path, minutes: float | None, groups: str | None, seed: int
) -> dict[str, float]:
    size = words.image_size
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = words.tokenizer().to(device)
    lay_out(tokenizer, device)
    source = open_source(data, groups=groups)
    images = load_images(source, pretraining_indices(source), size=size, channels=words.channels)
    for note in source.notes + ([] if images.scaling.plain else [str(images.scaling)]) + images.notes:
        say(note)
    crops = Data(image_size=size, channels=words.channels, crop_scale=(0.4 if max(size) <= SMALL else 0.2, 1.0))
    making = Making(images, crops, BATCH, seed, device, scratch, Duration(STEPS, minutes))
    made = make_ready(tokenizer, making)
    save_tokenizer(tokenizer, path, made["quality"], images.scaling, made["seconds"])
    shutil.rmtree(scratch)
    few = next(held_out_crops(images, size, device))[:SHOWN]
    with torch.no_grad():
        restored = tokenizer.decode(tokenizer.encode(few), tokenizer.grid(*size))
    caption = f"{tokenizer.kind}\n{tokenizer.codebook_size} words"
    sheet({"held-out image": few.cpu(), caption: restored.cpu()}, path.with_suffix(".png"))
    say(f"done: {path}")
    return made["quality"]
