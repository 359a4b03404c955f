"""Crops of photographs that installed packages carry: images to try everything on, without a download.

The label of a crop is the photograph it is from. Training crops come from the left part of a photograph and test
crops from the right part, so no pixel is in both.
"""

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from PIL import Image

from underpaint.errors import InputError

# name: (package that carries it, file). No twins: of the stereo pair of the motorcycle only the left one, no crops of another.
PHOTOGRAPHS = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "brick": ("skimage.data", "brick.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
    "coffee": ("skimage.data", "coffee.png"),
    "coins": ("skimage.data", "coins.png"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "grass": ("skimage.data", "grass.png"),
    "gravel": ("skimage.data", "gravel.png"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg"),
    "ihc": ("skimage.data", "ihc.png"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "rocket": ("skimage.data", "rocket.jpg"),
}
TRAIN_SHARE = 0.7  # of the width of a photograph
WINDOWS = (48, 64)  # pixels a side of what becomes one crop, in turn: two scales of everything


def write_demo_images(
    folder: Path, *, size: int = 32, train_per_photo: int = 300, test_per_photo: int = 80, seed: int = 0
) -> list[str]:
    """Write `train/NAME/*.png` and `test/NAME/*.png` below `folder`, RGB, `size` pixels a side; returns the names.

    Every crop is a square window of 48 or 64 pixels in turn (larger where `size` is, so that nothing is enlarged), at
    a random place of its part, reduced with antialiasing. The same seed gives the same images. Raises InputError
    where a photograph is missing from its package or too small for windows of that size.
    """
    windows = [max(window, size) for window in WINDOWS]
    for number, name in enumerate(PHOTOGRAPHS):
        generator = np.random.default_rng([seed, number])
        whole = photograph(name)
        width, height = whole.size
        middle = int(width * TRAIN_SHARE)
        if max(windows) > min(height, width - middle):
            raise InputError(
                f"photograph '{name}' is {width} x {height} pixels, too small for demo images of {size} pixels a side"
            )
        parts = (("train", 0, middle, train_per_photo), ("test", middle, width, test_per_photo))
        for part, left, right, count in parts:
            place = folder / part / name
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                window = windows[index % len(windows)]
                x = int(generator.integers(left, right - window + 1))
                y = int(generator.integers(0, height - window + 1))
                crop = whole.crop((x, y, x + window, y + window))
                crop = crop.resize((size, size), Image.Resampling.BICUBIC)
                crop.save(place / f"{index:04d}.png", compress_level=1)
    return list(PHOTOGRAPHS)


def photograph(name: str) -> Image.Image:
    """A photograph as RGB, straight from the files of its package: the package's own reader may want a cache folder."""
    package, file = PHOTOGRAPHS[name]
    try:
        with as_file(files(package) / file) as path, Image.open(path) as image:
            return image.convert("RGB")
    except (ModuleNotFoundError, FileNotFoundError):
        raise InputError(
            f"the installed {package.split('.')[0]} lacks the photograph {file}; reinstall it from its wheel"
        ) from None
