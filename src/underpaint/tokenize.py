"""Fit or train a tokenizer on images, and say how good it is: `underpaint tokenizer`, and runs that are given none."""

import math
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from underpaint.console import say
from underpaint.data import ImageSet, eval_batches, load_images, open_source, pretraining_indices, train_batches
from underpaint.errors import InputError
from underpaint.recipes.recipe import Data
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


def make_ready(
    tokenizer: Tokenizer,
    images: ImageSet,
    settings: Data,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    folder: Path,
    length: Duration,
    shout: Callable[[str], None] = say,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Fit or train `tokenizer` in place where that is still to be done, on crops of `images`, judge it, and count the
    words of such crops.

    Args:
        settings: how crops are cut.
        folder: of a training's checkpoints, from which the same call goes on; who saved the tokenizer may remove it.
        length: of a training; k-means is fitted once.
        clock: seconds, by which it is timed.

    Returns:
        kind, made (whether it was not ready before), seconds (that making it took; None where it was ready), and quality
        on each 20th image, which is not trained on.

    Raises:
        InputError: too few images; held-out images use hardly any of the words.
    """
    made, seconds, began = not tokenizer.ready, None, clock()

    def crops(first: int, seed: int = seed) -> Generator[Tensor, None, None]:
        return _crops(images, settings, batch_size, seed, device, first)

    if made:
        shout(f"making a tokenizer: {tokenizer.kind}, {tokenizer.codebook_size} words of {tokenizer.stride} px ...")
    if made and isinstance(tokenizer, KMeansPatches):
        with closing(crops(0)) as batches:
            wanted = PATCHES_A_WORD * tokenizer.codebook_size
            tokenizer.fit(sample_patches(batches, tokenizer.stride, wanted, seed), seed)
        seconds = clock() - began
    elif made and isinstance(tokenizer, ConvTokenizer):
        tokenizer.requires_grad_(True)
        told = {
            **tokenizer.arguments(),
            "images": images.fingerprint(),
            "image_size": settings.image_size,
            "crop_scale": settings.crop_scale,
            "flip": settings.flip,
            "batch_size": batch_size,
            "seed": seed,
        }
        optimiser = adamw(tokenizer.param_groups(LR, 0.01), betas=(0.9, 0.95))
        how = Fitting(length, Schedule(0.05), seed, 1.0, batch_size, told, clock)
        trained = fit_task(tokenizer, optimiser, crops, folder, how)
        seconds = 60 * (trained["minutes"] or 0.0)  # that before an interruption, too
    tokenizer.ready = True
    tokenizer.requires_grad_(False).eval()
    tokenizer.zero_grad(set_to_none=True)
    size = (settings.image_size[0], settings.image_size[1])
    quality = tokenizer.judge(held_out_crops(images, size, device))
    shout(f"{tokenizer.kind}, {tokenizer.codebook_size} words of {tokenizer.stride} px, held out: {described(quality)}")
    refuse_collapsed(quality, f"{tokenizer.kind} tokenizer")
    rows, columns = tokenizer.grid(*size)
    with closing(crops(0)) as batches:
        tokenizer.count(
            islice(batches, math.ceil(COUNTED_A_WORD * tokenizer.codebook_size / (batch_size * rows * columns)))
        )
    seconds = None if seconds is None else round(seconds, 1)
    return {"kind": tokenizer.kind, "made": made, "seconds": seconds, "quality": quality}


def _crops(
    images: ImageSet, settings: Data, batch_size: int, seed: int, device: torch.device, first: int
) -> Generator[Tensor, None, None]:
    """Random crops in [0, 1], from batch `first` on, of all images but those that judge."""
    batches = train_batches(
        images,
        size=settings.image_size,
        batch_size=batch_size,
        seed=seed,
        indices=[k for k in range(len(images)) if k % HELD_OUT or len(images) < HELD_OUT],
        first_batch=first,
        workers=settings.workers,
        crop_scale=settings.crop_scale,
        flip=settings.flip,
        device=device,
    )
    with closing(batches):
        for batch in batches:
            yield batch.images


def held_out_crops(images: ImageSet, size: tuple[int, int], device: torch.device) -> Generator[Tensor, None, None]:
    """The images in [0, 1] that judge a tokenizer, which are not trained on."""
    chosen = range(0, len(images), HELD_OUT)[:HELD_OUT_IMAGES]
    with closing(eval_batches(images, size=size, indices=chosen, device=device)) as batches:
        for batch in batches:
            yield batch.images


def make_tokenizer(
    data: str | Path,
    out: str | Path,
    *,
    kind: str = "kmeans",
    image_size: tuple[int, int] = (224, 224),
    stride: int = 16,
    codebook_size: int | None = None,
    minutes: float | None = None,
    batch_size: int = 128,
    channels: int = 3,
    groups: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Fit k-means to patches of `data`, or train a convolutional autoencoder; write `out` and its .json and picture.

    Args:
        data: images, as for pretraining.
        out: a .safetensors file.
        kind: kmeans, fsq or vq.
        image_size: of the crops, height and width in pixels.
        stride: pixels of a word: the patch size of the encoders that will use it.
        codebook_size: words; 1024 for images up to 64 px, else 2048 (kmeans, vq) or 4375 (fsq), where None.
        groups: as for pretraining, so that the hold-out of `data`, which is left out, is the same.
        minutes: of training (fsq, vq); 5,000 steps where None. Where a training was interrupted, the same call goes on.

    Returns:
        psnr, used, perplexity and unigram on held-out images.

    Raises:
        InputError: settings or data that cannot be used; a codebook of which hardly any is used.
    """
    if kind not in KINDS:
        raise InputError(f"--kind {kind}: there are {', '.join(KINDS)}")
    if stride < 1 or image_size[0] % stride or image_size[1] % stride:
        raise InputError(f"--stride {stride}: does not divide images of {image_size[0]}x{image_size[1]}")
    path = Path(out)
    if path.suffix != ".safetensors":
        raise InputError(f"--out {out}: give a .safetensors file")
    if minutes is not None and minutes <= 0:
        raise InputError(f"--minutes {minutes:g}: must be above 0")
    if codebook_size is not None and codebook_size < 2:
        raise InputError(f"--codebook-size {codebook_size}: a tokenizer has 2 words or more")
    words = codebook_size or (codebook_size_for(image_size) if kind != "fsq" or max(image_size) <= 64 else 4375)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer: Any = (
        KMeansPatches(words, stride, channels)
        if kind == "kmeans"
        else ConvTokenizer("fsq" if kind == "fsq" else "vq", words, stride, channels, width_for(image_size))
    )
    tokenizer.to(device)
    source = open_source(data, groups=groups)
    for note in source.notes:
        say(note)
    images = load_images(source, pretraining_indices(source), size=image_size, channels=channels)
    for note in ([] if images.scaling.plain else [str(images.scaling)]) + images.notes:
        say(note)
    made = make_ready(
        tokenizer,
        images,
        Data(image_size=image_size, channels=channels, crop_scale=(0.4 if max(image_size) <= 64 else 0.2, 1.0)),
        batch_size=batch_size,
        seed=seed,
        device=device,
        folder=path.with_suffix(".training"),
        length=Duration(STEPS, minutes),
    )
    save_tokenizer(tokenizer, path, made["quality"], images.scaling, made["seconds"])
    if kind != "kmeans":
        shutil.rmtree(path.with_suffix(".training"))
    few = next(held_out_crops(images, image_size, device))[:SHOWN]
    with torch.no_grad():
        restored = tokenizer.decode(tokenizer.encode(few), tokenizer.grid(*image_size))
    sheet({"held-out image": few.cpu(), f"{kind}\n{words} words": restored.cpu()}, path.with_suffix(".png"))
    say(f"done: {path}")
    return made["quality"]
