"""Outliers: can a run tell images like its training data from others?

    python benchmarks/outliers.py RUN TRAIN TEST --others digits noise crops.zip

For each set of others, the area under the ROC curve of the method's score (test images against the others), and of
the distance to the nearest training image in feature space: the mean cosine distance to the 10 nearest of 10,000.
Standard errors by bootstrap over images. `digits` are scikit-learn's, `noise` is normal noise with the mean and
deviation of the training data; anything else is a folder or archive.
"""

import argparse
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from underpaint.data import eval_batches, load_images, open_source
from underpaint.inference import load_method

COUNT, TRAIN, NEIGHBOURS = 1_000, 10_000, 10


def loaded(path: str, count: int, size: tuple[int, int], channels: int) -> Tensor:
    """Images in [0, 1], spread evenly over a data set."""
    source = open_source(path)
    chosen = np.linspace(0, len(source.entries) - 1, min(count, len(source.entries))).round().astype(int)
    images = load_images(source, chosen.tolist(), size=size, channels=channels)
    return torch.cat([batch.images for batch in eval_batches(images, size=size, batch_size=256)])


def others(name: str, size: tuple[int, int], standardize: Any) -> Tensor:
    channels = standardize.mean.numel()
    generator = torch.Generator().manual_seed(0)
    if name == "noise":
        return standardize.inverse(torch.randn(COUNT, channels, *size, generator=generator)).clamp(0, 1)
    if name == "digits":
        digits = torch.tensor(load_digits().images[:COUNT, None] / 16, dtype=torch.float32)
        grown = functional.interpolate(digits, size, mode="bilinear")
        return grown.expand(-1, channels, -1, -1).contiguous()
    return loaded(name, COUNT, size, channels)


def area(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    """AUROC, and its standard error from 200 bootstraps of both sets."""
    generator = np.random.default_rng(0)

    def once(a: np.ndarray, b: np.ndarray) -> float:
        return float(roc_auc_score(np.r_[np.zeros(len(a)), np.ones(len(b))], np.r_[a, b]))

    a, b = inside.numpy(), outside.numpy()
    drawn = [once(generator.choice(a, len(a)), generator.choice(b, len(b))) for _ in range(200)]
    return once(a, b), float(np.std(drawn))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("train", help="training images of the run")
    parser.add_argument("test", help="images of the same kind")
    parser.add_argument("--others", nargs="+", default=["digits", "noise"])
    given = parser.parse_args()
    method, standardize, recipe = load_method(given.run)
    size, channels = recipe.data.image_size, recipe.data.channels

    def scored(images: Tensor) -> Tensor:
        return torch.cat([method.score(standardize(part)) for part in images.split(200)])

    def features(images: Tensor) -> Tensor:
        return functional.normalize(
            torch.cat([method.encoder(standardize(part)).pooled for part in images.split(200)]), dim=1
        )

    memory = features(loaded(given.train, TRAIN, size, channels))

    def distance(images: Tensor) -> Tensor:
        return 1 - (features(images) @ memory.T).topk(NEIGHBOURS, dim=1).values.mean(1)

    inside = loaded(given.test, COUNT, size, channels)
    score, near = scored(inside), distance(inside)
    print(f"{len(inside)} images of the same kind, {len(memory)} training images in memory\n")
    print("| others | images | the method's score | kNN distance |\n|---|---|---|---|")
    for name in given.others:
        images = others(name, size, standardize)
        pairs = [area(score, scored(images)), area(near, distance(images))]
        cells = " | ".join(f"{value:.3f} +- {error:.3f}" for value, error in pairs)
        print(f"| {name} | {len(images)} | {cells} |")


if __name__ == "__main__":
    main()
