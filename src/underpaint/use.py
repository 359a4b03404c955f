"""What a finished or unfinished run can be used for: restoring images, and ranking them."""

from collections.abc import Sequence
from pathlib import Path

import torch

from underpaint.backbones import load_encoder, standardize_for
from underpaint.data import Unreadable, centre_boxes, crop_resize, decode, eval_batches, load_images, open_source
from underpaint.errors import InputError
from underpaint.methods import METHODS, Energy, Method
from underpaint.patches import Standardize
from underpaint.pictures import sheet
from underpaint.recipes import Recipe
from underpaint.recipes.recipe import method_options
from underpaint.runs import Run


def load_method(path: str | Path) -> tuple[Method, Standardize, Recipe]:
    """The whole method of a run (decoder and all) at its last checkpoint, its transform, and its recipe."""
    run = Run(path)
    recipe = run.recipe()
    found = run.load()
    if found is None:
        raise InputError(f"{path}: has no checkpoint yet")
    encoder = load_encoder(path)
    options = method_options(recipe, run.tokenizer)
    method = METHODS[recipe.method["name"]](encoder, **options)  # pyright: ignore[reportCallIssue]
    weights = {k.removeprefix("method."): v for k, v in found[0].items() if k.startswith("method.")}
    method.load_state_dict(weights)
    method.eval()
    return method, standardize_for(path), recipe


def restore(run: str | Path, images: Sequence[str | Path], out: str | Path, *, corruption: str | None = None) -> None:
    """Write a sheet with a row an image: original, corrupted, restored; `corruption` is one of the method's tasks.

    Raises:
        InputError: an image that cannot be read; a corruption that the method was not trained on.
    """
    method, standardize, recipe = load_method(run)
    if corruption is not None:
        known: tuple[str, ...] = getattr(method, "tasks", ("mask",))
        if corruption not in known:
            raise InputError(f"--corruption {corruption}: this run was trained on {', '.join(known)}")
        if isinstance(method, Energy):
            method.tasks = (corruption,)
    size, (low, high) = recipe.data.image_size, recipe.measured["value_range"]
    rows = []
    for image in images:
        try:
            array = decode(Path(image).read_bytes(), channels=method.encoder.channels)
        except OSError as error:
            raise InputError(f"{image}: {error.strerror}; give image files") from error
        except Unreadable as error:
            raise InputError(f"{image}: {error}; give image files") from error
        whole = torch.from_numpy(array).permute(2, 0, 1)[None]
        boxes = torch.from_numpy(centre_boxes([array.shape[:2]], size))
        rows.append(crop_resize(whole, boxes, torch.zeros(1, dtype=torch.bool), size).sub(low).div(high - low))
    frames = method.restore(standardize(torch.cat(rows)))
    sheet({caption: standardize.inverse(frame) for caption, frame in frames.items()}, Path(out))


def score(run: str | Path, data: str | Path) -> list[tuple[str, float]]:
    """Each image's path and score, most unusual first."""
    method, standardize, recipe = load_method(run)
    size = recipe.data.image_size
    source = open_source(data)
    images = load_images(source, range(len(source.entries)), size=size, channels=method.encoder.channels)
    rows = []
    for batch in eval_batches(images, size=size, batch_size=64):
        values = method.score(standardize(batch.images)).tolist()
        rows += [(images.names[k], value) for k, value in zip(batch.samples, values, strict=True)]
    return sorted(rows, key=lambda row: -row[1])
