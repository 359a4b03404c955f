"""Named runs. Each is a function whose docstring names the source, what to expect, and how long it takes."""

from collections.abc import Callable

from underpaint.recipes.recipe import Data, Length, Optimiser, Recipe

TINY = {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}


def mae_vit_base_in1k() -> Recipe:
    """MAE ViT-B/16 on ImageNet-1K as published (arXiv 2111.06377, table 8): decoder 512 x 8, batch 4096.

    The paper: 800 epochs; 83.6 % fine-tuned at 1600.
    """
    return Recipe(
        method={"name": "mae", "hidden_ratio": 0.75, "decoder_dim": 512, "decoder_depth": 8},
        encoder={"name": "vit_base_patch16_224"},
        data=Data(image_size=(224, 224), workers=8),
        optimiser=Optimiser(rate=1.5e-4, warmup=40 / 800, batch_size=4096, clip=1e9),
        run=Length(epochs=800.0),
    )


def mae_tiny_32() -> Recipe:
    """MAE for 32-px images on a laptop, tuned here: a ViT 128 wide, 4 blocks, 4-px patches, 8 minutes."""
    return Recipe(
        method={"name": "mae", "hidden_ratio": 0.75},
        encoder=dict(TINY),
        data=Data(image_size=(32, 32), crop_scale=(0.4, 1.0)),
        optimiser=Optimiser(rate=1e-3, batch_size=256),
        run=Length(minutes=8.0),
    )


def energy_tiny_32() -> Recipe:
    """The energy method for 32-px images on a laptop, tuned here: the same ViT, 15 minutes."""
    return Recipe(
        method={"name": "energy", "hidden_ratio": 0.5},
        encoder=dict(TINY),
        data=Data(image_size=(32, 32), crop_scale=(0.4, 1.0)),
        optimiser=Optimiser(rate=2e-3, batch_size=64),
        run=Length(minutes=15.0),
    )


def _energy_in1k(encoder: str) -> Recipe:
    """Known from secondary sources: N = 2, step size 0.1, AdamW 0.9/0.95, weight decay 0.05, rate 1e-4 at batch 256,
    cosine, random resized crops. Open, and chosen here: epochs, warm-up, clipping, cells of 32 px at 0.6."""
    return Recipe(
        method={"name": "energy", "hidden_ratio": 0.6, "cell": 32, "steps": 2, "step_size": 0.1},
        encoder={"name": encoder},
        data=Data(image_size=(224, 224), workers=8),
        optimiser=Optimiser(rate=1e-4, batch_size=256),
        run=Length(epochs=100.0),
    )


def energy_vit_small_in1k() -> Recipe:
    """Energy ViT-S/16 on ImageNet-1K, as far as known (arXiv 2302.01384); epochs, warm-up and masks are our choice."""
    return _energy_in1k("vit_small_patch16_224")


def energy_vit_base_in1k() -> Recipe:
    """Energy ViT-B/16 on ImageNet-1K, as far as known (arXiv 2302.01384); epochs, warm-up and masks are our choice."""
    return _energy_in1k("vit_base_patch16_224")


RECIPES: dict[str, Callable[[], Recipe]] = {
    "mae-vit-base-in1k": mae_vit_base_in1k,
    "mae-tiny-32": mae_tiny_32,
    "energy-tiny-32": energy_tiny_32,
    "energy-vit-small-in1k": energy_vit_small_in1k,
    "energy-vit-base-in1k": energy_vit_base_in1k,
}

__all__ = ["RECIPES", "Data", "Length", "Optimiser", "Recipe"]
