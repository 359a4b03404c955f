"""Small images that the tests make."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def made_picture(rng: np.random.Generator, label: int, size: int = 32) -> Image.Image:
    """Stripes whose direction is the label, in random colours, with a little noise."""
    y, x = np.mgrid[:size, :size] / size
    angle = label * np.pi / 3
    wave = np.sin(2 * np.pi * (3 * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
    colour = rng.uniform(0.2, 0.8, 3)
    picture = colour + 0.25 * wave[..., None] + rng.normal(0, 0.03, (size, size, 3))
    return Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, classes: int = 3, size: int = 32, seed: int = 0) -> Path:
    """`count` pictures below class folders."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        place = folder / f"class{k % classes}"
        place.mkdir(parents=True, exist_ok=True)
        made_picture(rng, k % classes, size).save(place / f"{k:04d}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pictures of 32 px in three classes."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), 90)
