"""Every method on a tiny encoder of each kind that it takes, ready for a step, and steps by it."""

from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

import underpaint
from underpaint.draws import Draws
from underpaint.methods import METHODS
from underpaint.patches import Standardize
from underpaint.prepare import stepper_for
from underpaint.recipes.recipe import checked
from underpaint.train.stepper import Stepper

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (1, 2, 1),
        "num_heads": (1, 2, 4),
    },
    "resnet": {"name": "resnet10t", "output_stride": 8, "channels": (16, 16, 32, 32), "stem_width": 8},
}
PLAIN = ("cae", "conditional-energy")  # need a plain transformer
SERVED = [(name, kind) for name in sorted(METHODS) for kind in ENCODERS if kind == "vit" or name not in PLAIN]


def made(name: str, kind: str = "vit", **settings: Any) -> Any:
    """A method that is to be trained on standardised images of 32 px."""
    torch.manual_seed(0)
    if name in ("beit", "cae"):
        settings = {"codebook_size": 16, **settings}
    if name == "cim":
        settings = {"codebook_size": 64, "generator_depth": 1, "generator_dim": 32, "image_size": (32, 32), **settings}
    method: Any = METHODS[name](underpaint.encoder(**ENCODERS[kind], image_size=32), **settings)  # pyright: ignore[reportCallIssue]
    words = method.prepare(Standardize([0.5] * 3, [0.25] * 3))
    if words is not None:
        if name in ("beit", "cae"):
            words.centres.copy_(torch.rand(words.centres.shape))
        words.ready = True  # any map from images to words and back
        words.requires_grad_(False).eval()
    return method.train()


def slow_but(*kept: str) -> list[Any]:
    """All methods as parameters, of which only these are tried in `make test`."""
    return [pytest.param(name, marks=() if name in kept else pytest.mark.slow) for name in sorted(METHODS)]


def photographs(count: int = 4, size: int = 32) -> Tensor:
    """Smooth images, standardised."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 4 - 2


def stepping(method: Any, precision: str = "32", batch: int = 4, **optimiser: Any) -> Stepper:
    """What makes its steps, on images that are standardised already."""
    recipe = checked({"method": {"name": "mae"}, "optimiser": {"batch_size": batch, "lr": 0.05, **optimiser}})
    recipe.measured["precision"] = precision
    cuda = torch.cuda.is_available()
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=1)
    fabric.launch()
    return stepper_for(fabric, recipe, method, Standardize([0.0] * 3, [1.0] * 3))


def drawn(method: Any, images: Tensor, seed: int = 0) -> Any:
    return method.sample(len(images), *images.shape[-2:], Draws.of(seed, len(images))).to(images.device)
