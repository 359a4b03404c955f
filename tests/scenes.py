"""Small scenes with discs and squares, their masks and their boxes, as people have them on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {1: (200, 60, 40), 2: (40, 80, 200)}  # discs, squares


def made_scene(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
    """Picture [h, w, 3], index mask [h, w], and (class, mask) of each object; objects do not overlap."""
    picture = rng.normal(110, 12, (height, width, 3))
    index = np.zeros((height, width), np.uint8)
    objects = []
    y, x = np.mgrid[:height, :width]
    for _ in range(int(rng.integers(2, 5))):
        kind, radius = int(rng.integers(1, 3)), int(rng.integers(4, 8))
        top, left = int(rng.integers(radius, height - radius)), int(rng.integers(radius, width - radius))
        if kind == 1:
            mask = (y - top) ** 2 + (x - left) ** 2 <= radius**2
        else:
            mask = (abs(y - top) <= radius) & (abs(x - left) <= radius)
        if (index[mask] > 0).any():
            continue
        picture[mask] = rng.normal(COLOURS[kind], 12, (int(mask.sum()), 3))
        index[mask] = kind
        objects.append((kind, mask))
    return picture.clip(0, 255).astype(np.uint8), index, objects


def box_of(mask: np.ndarray) -> list[int]:
    """COCO's left, top, width, height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def counts_of(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths, down the columns, beginning with zeros."""
    flat = mask.T.reshape(-1).astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = np.concatenate([[0], changes, [len(flat)]])
    lengths = np.diff(ends).tolist()
    return [0, *lengths] if flat[0] else lengths


def write_scenes(folder: Path, train: int = 12, test: int = 6, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """images/SPLIT, masks/SPLIT, annotations/SPLIT.json with boxes and uncompressed run lengths, classes.json."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", test)):
        images: list[Any] = []
        annotations: list[Any] = []
        for place in ("images", "masks"):
            (folder / place / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, index, objects = made_scene(rng, *size)
            name = f"{split}{number:03d}.png"
            Image.fromarray(picture).save(folder / "images" / split / name)
            Image.fromarray(index).save(folder / "masks" / split / name)
            images.append({"id": number + 1, "file_name": name, "height": size[0], "width": size[1]})
            for kind, mask in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number + 1,
                        "category_id": 10 * kind,
                        "bbox": box_of(mask),
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": {"size": list(size), "counts": counts_of(mask)},
                    }
                )
        categories = [{"id": 10, "name": "disc"}, {"id": 20, "name": "square"}]
        (folder / "annotations").mkdir(exist_ok=True)
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (folder / "annotations" / f"{split}.json").write_text(text)
    (folder / "classes.json").write_text(json.dumps(["ground", "disc", "square"]))
    return folder
