"""Features computed once, kept on disk and memory-mapped: probes of any number of images in the memory of a few."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from underpaint.data import ImageSet, eval_batches
from underpaint.data.sources import cache_root
from underpaint.errors import InputError
from underpaint.evaluate.bundle import EncoderBundle
from underpaint.evaluate.features import HALF_LIMIT
from underpaint.files import replacing_folder

BATCH = 256


class Stored(NamedTuple):
    """Features of images, on disk."""

    pooled: Float[Tensor, "n d"]  # float32
    patches: Float[Tensor, "n t d"]  # float16; t is 0 where none were asked for
    samples: Int[np.ndarray, "n"]  # numbers in the image set of those that could be read


def stored_features(
    bundle: EncoderBundle, images: ImageSet, indices: Sequence[int], *, patches: bool, cache_dir: Path | None = None
) -> Stored:
    """The features of these images, from an earlier call with the same weights, images and size, or made now.

    Raises:
        InputError: none of the images can be read.
    """
    folder = cache_root(cache_dir) / "features" / _key(bundle, images, indices, patches)
    if not (folder / "samples.npy").is_file():
        with replacing_folder(folder, durable=False) as temporary:
            _make(bundle, images, indices, patches, temporary)
    # copy on write, so that nobody can spoil the files
    pooled, tokens = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("pooled", "patches"))
    return Stored(torch.from_numpy(pooled), torch.from_numpy(tokens), np.load(folder / "samples.npy"))


def _key(bundle: EncoderBundle, images: ImageSet, indices: Sequence[int], patches: bool) -> str:
    """sha256 over everything that the features depend on."""
    digest = hashlib.sha256(save(bundle.weights()))
    digest.update(json.dumps([bundle.arguments, bundle.size, patches], sort_keys=True).encode())
    digest.update(torch.cat([bundle.standardize.mean.flatten(), bundle.standardize.std.flatten()]).numpy().tobytes())
    digest.update(images.fingerprint().encode())
    digest.update(np.asarray(indices, np.int64).tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _make(bundle: EncoderBundle, images: ImageSet, indices: Sequence[int], patches: bool, folder: Path) -> None:
    device = bundle.standardize.mean.device
    pooled, tokens, samples = [], None, []
    written = 0
    for batch in eval_batches(images, size=bundle.size, batch_size=BATCH, indices=indices, device=device):
        found = bundle.encoder(bundle.standardize(batch.images))
        pooled.append(found.pooled.float().cpu().numpy())
        samples += batch.samples
        if patches:
            if tokens is None:
                shape = (len(indices), *found.patches.shape[1:])
                tokens = np.lib.format.open_memmap(folder / "all.npy", "w+", np.float16, shape)
            half = found.patches.float().clamp(-HALF_LIMIT, HALF_LIMIT).half().cpu().numpy()
            tokens[written : written + len(half)] = half
            written += len(half)
    if not pooled:
        raise InputError("none of the images to judge by can be read")
    vectors = np.concatenate(pooled)
    if tokens is None:
        tokens = np.zeros((len(vectors), 0, vectors.shape[1]), np.float16)
        np.save(folder / "patches.npy", tokens)
    elif written == len(tokens):
        tokens.flush()
        del tokens
        os.replace(folder / "all.npy", folder / "patches.npy")
    else:  # some could not be read
        np.save(folder / "patches.npy", tokens[:written])
        del tokens
        (folder / "all.npy").unlink()
    np.save(folder / "pooled.npy", vectors)
    np.save(folder / "samples.npy", np.asarray(samples, np.int64))
