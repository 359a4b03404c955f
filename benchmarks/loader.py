"""Random crops a second and core: our loader beside torchvision's ImageFolder, from photographs to batches, in one process.

    python benchmarks/loader.py PHOTOS.parquet [--size 64] [--seconds 8]

The photographs of `end_to_end.py` (400 x 533 px, JPEG), crops of 0.2 to 1 of their area. Decoders are compared too: Pillow
with and without its `draft` (decoding at a reduced size), imagecodecs, torchvision's, and simplejpeg where it is installed.
"Into the cache" decodes all images once, with mean and deviation, into an empty cache. Everything runs on one core, with no
workers and one thread; sources are taken in turns. Told are the median of their rounds and how many times torchvision's
rate that is, the median of the ratios within a round.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from end_to_end import photographs
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from underpaint.data import Crops, load_images, open_source, train_batches
from underpaint.train.run_folder import environment

ROOT = Path(__file__).parents[1]
BATCH, IMAGES = 128, 1_024


def of_torchvision(folder: Path, size: int) -> Iterator[int]:
    steps = [v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip(), v2.ToImage()]
    data = ImageFolder(str(folder), v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)]))
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True)
    while True:
        for images, _ in loader:
            yield len(images)


def of_ours(place: Path | str, size: int, cached: bool) -> Iterator[int]:
    source = open_source(str(place))
    indices = range(min(IMAGES, len(source.entries)))
    images = load_images(source, indices, size=(size, size), channels=3, cache_limit=8.0 if cached else 0.0)
    with closing(train_batches(Crops(images, (size, size), BATCH, 0))) as batches:
        for batch in batches:
            yield len(batch.images)


def parquet_of(folder: Path, file: Path) -> Path:
    if not file.is_file():
        paths = sorted(folder.rglob("*.jpg"))[:IMAGES]
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        pq.write_table(pa.table({"image": rows}), file)
    return file


def shards_of(folder: Path, place: Path, count: int = 4) -> str:
    paths = sorted(folder.rglob("*.jpg"))[:IMAGES]
    place.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        if (file := place / f"{number:04}.tar").is_file():
            continue
        with tarfile.open(file, "w") as shard:
            for path in paths[number::count]:
                shard.add(path, path.name)
    return f"wds:{place}/*.tar"


def into_cache(folder: Path, size: int) -> Iterator[int]:
    """All images decoded once, into a cache that is empty."""
    while True:
        kept = os.environ["UNDERPAINT_CACHE"]
        os.environ["UNDERPAINT_CACHE"] = f"{kept}/cold"
        source = open_source(str(folder))
        images = load_images(
            source, range(min(IMAGES, len(source.entries))), size=(size, size), channels=3, cache_limit=8.0
        )
        shutil.rmtree(f"{kept}/cold")
        os.environ["UNDERPAINT_CACHE"] = kept
        yield len(images)


def decoders(files: list[bytes], size: int) -> dict[str, Callable[[bytes], Any]]:
    """Ways from a file to pixels that are at least twice `size` where they may be fewer than all."""
    import imagecodecs
    from torchvision.io import decode_jpeg

    def pillow(data: bytes, draft: bool) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            if draft:
                image.draft("RGB", (2 * size, 2 * size))
            return np.asarray(image.convert("RGB"))

    ways: dict[str, Callable[[bytes], Any]] = {
        "pillow": lambda data: pillow(data, False),
        "pillow, draft": lambda data: pillow(data, True),
        "imagecodecs": imagecodecs.jpeg8_decode,
        "torchvision.io": lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)),
    }
    try:
        import simplejpeg
    except ImportError:
        return ways
    ways["simplejpeg"] = simplejpeg.decode_jpeg
    ways["simplejpeg, reduced"] = lambda data: simplejpeg.decode_jpeg(data, min_height=2 * size, min_width=2 * size)
    return ways


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("photographs", type=Path)
    given.add_argument("--size", type=int, default=64)
    given.add_argument("--seconds", type=float, default=8.0, help="of a source in each of three rounds")
    given.add_argument("--work", type=Path, default=ROOT / "runs" / "end-to-end")
    asked = given.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, for which nothing starts processes
    cache = tempfile.TemporaryDirectory(dir=asked.work.resolve() if asked.work.is_dir() else None)
    os.environ["UNDERPAINT_CACHE"] = cache.name
    folder = photographs(asked.photographs, asked.work.resolve() / "photographs")
    file = parquet_of(folder, asked.work.resolve() / "photographs.parquet")
    sources = {
        "torchvision, ImageFolder": of_torchvision(folder, asked.size),
        "ours, folder": of_ours(folder, asked.size, False),
        "ours, parquet": of_ours(file, asked.size, False),
        "ours, shards": of_ours(shards_of(folder, asked.work.resolve() / "shards"), asked.size, False),
        "ours, into the cache": into_cache(folder, asked.size),
        "ours, kept decoded": of_ours(folder, asked.size, True),
    }
    print(json.dumps(environment()))
    for source in sources.values():
        next(source)  # what is opened, listed and kept is no part of it
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(3):
        for name, source in sources.items():
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < asked.seconds:
                count += next(source)
            rates[name].append(count / (time.perf_counter() - began))
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:64]]
    ways = decoders(files, asked.size)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            began = time.perf_counter()
            for data in files:
                way(data)
            times[name].append(len(files) / (time.perf_counter() - began))
    first = rates["torchvision, ImageFolder"]
    for name, found in rates.items():
        ratio = statistics.median(one / other for one, other in zip(found, first, strict=True))
        tell(name, found, times_torchvision=round(ratio, 2))
    for name, found in times.items():
        tell(f"decoding, {name}", found)


def tell(name: str, found: list[float], **more: float) -> None:
    print(json.dumps({"source": name, "images_per_second": round(statistics.median(found), 1), **more}))


if __name__ == "__main__":
    main()
