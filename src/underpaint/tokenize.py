"""`underpaint tokenizer`: fit or train a tokenizer on a folder of images, and say how good it is."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from underpaint.data import ImageSet, eval_batches, load_images, open_source, pretraining_indices, train_batches
from underpaint.errors import InputError
from underpaint.fit import Length, Schedule, fit
from underpaint.methods.words import PATCHES_A_WORD
from underpaint.pictures import sheet
from underpaint.progress import say
from underpaint.recipes.recipe import Data
from underpaint.tokenizers import (
    ConvTokenizer,
    KMeansPatches,
    Tokenizer,
    described,
    refuse_collapsed,
    sample_patches,
    save_tokenizer,
    vocabulary_for,
)

KINDS = ("kmeans", "fsq", "vq")
HELD_OUT, HELD_OUT_IMAGES = 20, 2_000  # each 20th image, and at most so many, judge
SHOWN = 6
RATE = 1e-3  # of AdamW, at its highest
STEPS = 5_000


def fitting_crops(
    images: ImageSet, settings: Data, batch_size: int, seed: int, device: torch.device, first: int = 0
) -> Generator[Tensor, None, None]:
    """Random crops in [0, 1], the same on every process, of all images but those that judge."""
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
    """The images in [0, 1] that judge a tokenizer, which `fitting_crops` leaves out."""
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
    vocabulary: int | None = None,
    minutes: float | None = None,
    batch_size: int = 128,
    channels: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """Fit k-means to patches of `data`, or train a convolutional autoencoder; write `out` and its .json and picture.

    Args:
        data: images, as for pretraining.
        out: a .safetensors file.
        kind: kmeans, fsq or vq.
        image_size: of the crops, height and width in pixels.
        stride: pixels of a word: the patch size of the encoders that will use it.
        vocabulary: words; 1024 for images up to 64 px, else 2048 (kmeans, vq) or 4375 (fsq), where None.
        minutes: of training (fsq, vq); 5,000 steps where None. Where a training was interrupted, the same call goes on.

    Returns:
        psnr, used, perplexity and unigram on held-out images.

    Raises:
        InputError: settings or data that cannot be used; a vocabulary of which hardly any is used.
    """
    if kind not in KINDS:
        raise InputError(f"--kind {kind}: there are {', '.join(KINDS)}")
    if image_size[0] % stride or image_size[1] % stride:
        raise InputError(f"--stride {stride}: does not divide images of {image_size[0]}x{image_size[1]}")
    path = Path(out)
    if path.suffix != ".safetensors":
        raise InputError(f"--out {out}: give a .safetensors file")
    source = open_source(data, seed=seed)
    for note in source.notes:
        say(note)
    indices = pretraining_indices(source)
    images = load_images(source, indices, size=image_size, channels=channels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = vocabulary or (vocabulary_for(image_size) if kind != "fsq" or max(image_size) <= 64 else 4375)
    torch.manual_seed(seed)

    settings = Data(image_size=image_size, channels=channels)

    def trained_on(first: int) -> Generator[Tensor, None, None]:
        return fitting_crops(images, settings, batch_size, seed, torch.device(device), first)

    tokenizer: Tokenizer
    if kind == "kmeans":
        tokenizer = KMeansPatches(words, stride, channels).to(device)
        with closing(trained_on(0)) as batches:
            tokenizer.fit(sample_patches(batches, stride, PATCHES_A_WORD * words, seed), seed)
    else:
        tokenizer = _trained(kind, words, stride, channels, batch_size, trained_on, minutes, seed, path, device)
    quality = tokenizer.eval().quality(held_out_crops(images, image_size, torch.device(device)))
    say(f"{kind}, {words} words of {stride} px: {described(quality)}")
    refuse_collapsed(quality, str(path))
    save_tokenizer(tokenizer, path, quality)
    few = next(held_out_crops(images, image_size, torch.device(device)))[:SHOWN]
    with torch.no_grad():
        restored = tokenizer.decode(tokenizer.encode(few), tokenizer.grid(*image_size))
    sheet({"held-out image": few.cpu(), f"{kind}\n{words} words": restored.cpu()}, path.with_suffix(".png"))
    say(f"done: {path}")
    return quality


def _trained(
    kind: Any,
    words: int,
    stride: int,
    channels: int,
    batch_size: int,
    trained_on: Any,
    minutes: float | None,
    seed: int,
    path: Path,
    device: str,
) -> ConvTokenizer:
    tokenizer = ConvTokenizer(kind, words, stride, channels).to(device)
    optimiser = torch.optim.AdamW(tokenizer.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.01)
    fit(
        tokenizer,
        optimiser,
        trained_on,
        lambda images, step: tokenizer.loss(images),
        folder=path.with_suffix(".training"),
        length=Length(STEPS, minutes),
        schedule=Schedule(0.05),
        seed=seed,
        clip=1.0,
        batch_size=batch_size,
        settings={**tokenizer.arguments(), "batch_size": batch_size, "seed": seed},
    )
    tokenizer.ready = True
    return tokenizer
