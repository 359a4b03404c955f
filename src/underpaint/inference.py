"""What a finished or unfinished run can be used for: restoring images, and ranking them."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from underpaint.backbones import load_encoder, scaling_for, standardize_for
from underpaint.config import Recipe
from underpaint.console import Going, say
from underpaint.data import Unreadable, eval_batches, load_images, open_source, settle_scaling
from underpaint.errors import InputError
from underpaint.files import AS_IT_IS, check_writable, replacing
from underpaint.methods import METHODS, Method, Restores
from underpaint.patches import Standardize
from underpaint.recipes.recipe import method_options
from underpaint.report.figures.pictures import sheet
from underpaint.train.run_folder import Run
from underpaint.transforms import centred, encoded


def load_method(path: str | Path) -> tuple[Method, Standardize, Recipe]:
    """The whole method of a run (decoder and all) at its last checkpoint, its transform, and its recipe."""
    run = Run(path)
    recipe = run.recipe()
    found = run.load()
    if found is None:
        raise InputError(f"{path}: has no checkpoint yet")
    encoder = load_encoder(path, recipe.data.image_size)
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
    if not isinstance(method, Restores):
        raise InputError(f"{run}: {recipe.method['name']} makes no pictures; there is nothing to restore")
    if corruption is not None and corruption not in method.tasks:
        raise InputError(f"--corruption {corruption}: this run was trained on {', '.join(method.tasks)}")
    size, scaling = recipe.data.image_size, scaling_for(run)
    if scaling is None:
        raise InputError(
            f"{run}: its encoder.json does not say how images are scaled, so nothing can be restored with it"
        )
    rows = []
    for image in images:
        try:
            rows.append(centred(encoded(image), scaling, size, recipe.data.max_pixels))
        except Unreadable as error:
            raise InputError(f"{image}: {error}; give image files") from error
    frames = method.restore(standardize(torch.cat(rows)), task=corruption)
    sheet({caption: standardize.inverse(frame) for caption, frame in frames.items()}, Path(out))


def score(run: str | Path, data: str | Path, out: str | Path | None = None) -> list[tuple[str, float]]:
    """Each image's path and its energy, or the method's own restoration error; most unusual first.

    Args:
        out: a CSV file to write them to, with their ranks. Names of files are written byte by byte as they are.

    Raises:
        InputError: no run there, or no images that can be read; a file that cannot be written.
    """
    path = None if out is None else Path(out)
    if path is not None:
        check_writable(path, file=True)
    method, standardize, recipe = load_method(run)
    size = recipe.data.image_size
    source = open_source(data)
    every, channels = range(len(source.entries)), method.encoder.channels
    scaling = settle_scaling(scaling_for(run), source, every, size=size, channels=channels, tell=say)
    images = load_images(source, every, size=size, channels=channels, scaling=scaling)
    rows: list[tuple[str, float]] = []
    with Going("scoring", len(images)) as going:
        for batch in eval_batches(images, size=size, batch_size=64):
            values = method.score(standardize(batch.images)).tolist()
            rows += [(images.names[k], value) for k, value in zip(batch.samples, values, strict=True)]
            going.advance(len(values))
    rows.sort(key=lambda row: -row[1])
    if path is not None:
        _write_scores(path, rows)
    return rows


def _write_scores(path: Path, rows: Sequence[tuple[str, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors=AS_IT_IS) as file:
            writer = csv.writer(file)
            writer.writerow(["path", "score", "rank"])
            writer.writerows((name, f"{value:.6g}", rank) for rank, (name, value) in enumerate(rows, start=1))
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written: {error.strerror}") from error
