"""Small images that the tests make."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# here: where a module under the shape-checking hook is the first to import them, they are compiled anew in each process
import lightning_fabric  # noqa: F401
import numpy as np
import pytest
import sklearn.linear_model  # noqa: F401
import timm  # noqa: F401
import torch._dynamo  # noqa: F401
import torchvision  # noqa: F401
from forked import CommandLine
from PIL import Image

os.environ.setdefault("WANDB_MODE", "offline")
SCRATCH = tempfile.TemporaryDirectory(prefix="up-")  # a short path: sockets of processes that decode lie there


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", SCRATCH.name)  # where pieces of data lie that were brought


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


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """Runs commands in processes of their own."""
    made = CommandLine(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


def word_file(pictures: Path) -> Path:
    """An FSQ tokenizer of 64 words of 4 px, trained on these pictures at 16 px for a few seconds, beside their folder."""
    file = pictures.with_name("words.safetensors")
    if not file.is_file():
        import torch

        from underpaint.tokenizers import ConvTokenizer, save_tokenizer  # here: after the shape-checking hook

        torch.manual_seed(0)
        tokenizer = ConvTokenizer("fsq", 64, 4, dim=16, blocks=1)
        found = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(pictures.rglob("*.png"))]
        images = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255
        images = torch.nn.functional.avg_pool2d(images, 2)
        optimiser = torch.optim.AdamW(tokenizer.parameters(), 2e-3)
        for step in range(150):
            optimiser.zero_grad()
            tokenizer.loss(images[step % 5 :: 5]).backward()
            optimiser.step()
        save_tokenizer(tokenizer.eval(), file)
    return file
