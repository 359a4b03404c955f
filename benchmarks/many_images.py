"""The index of millions of images: memory, and seconds until the first batch.

    python benchmarks/many_images.py [--images 14000000]

Makes a stored listing of that many names without files, opens it as `pretrain` does (without the spot check of files),
with a reader that makes the bytes of an image, and says what each part took; then what a second process holds of it.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from underpaint.data import Crops, keep, listing, load_images, open_source, pretraining_indices, train_batches
from underpaint.data.sources import folder as folders
from underpaint.data.sources import stored
from underpaint.data.sources.index import Names

CLASSES = 21_000


class MadeReader:
    """The bytes of one of 64 images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._images = []
        for _ in range(64):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            self._images.append(file.getvalue())

    def read(self, index: int) -> bytes:
        return self._images[index % 64]


def memory() -> dict[str, float]:
    """MB of this process: its share of all, and what is its own alone and no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"share": found["Pss"], "own": found["Anonymous"], "resident": found["Rss"]}


def make(root: Path, images: int, labelled: bool) -> None:
    numbers = np.sort(np.arange(images) % CLASSES).astype(np.int32)
    made = (f"n{c:08}/n{c:08}_{n}.JPEG".encode() for n, c in enumerate(numbers.tolist()))
    columns = {
        "name": pa.array(made, pa.large_binary()),
        "split": pa.array(np.full(images, -1, np.int8)),
        "label": pa.array(numbers if labelled else np.full(images, -1, np.int32)),
        "stamp": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * images)), 2),
    }
    facts = {"format": stored.FORMAT, "place": str(root.resolve()), "notes": [], "skipped": [], "seen": images}
    facts |= {"number": None, "splits": [], "folders": [], "sides": []}
    facts["classes"] = [f"n{c:08}" for c in range(CLASSES)] if labelled else None
    stored.write_index(stored.stored_at(root), columns, facts)


def measured(root: Path, images: int) -> None:
    stored.SPOT_CHECKS = 0

    def reader(root: str, names: Names) -> MadeReader:
        return MadeReader()

    folders.FolderReader = reader  # type: ignore[assignment]  # there are no files
    before, start = memory(), time.perf_counter()

    def say(what: str) -> None:
        print(f"  {what}: {time.perf_counter() - start:.1f} s", flush=True)

    source = open_source(root)
    say("opened")
    indices = pretraining_indices(source)
    say("split")
    loaded = load_images(source, indices, size=(32, 32), cache_limit=0)
    say("measured")
    with tempfile.TemporaryDirectory() as folder:
        table, _ = listing(source, Path(folder) / "none")
        large = table.nbytes / 2**20
        kept = {"listing.parquet": table}
        del table
        keep(kept, Path(folder))
    say(f"listed as a run keeps it, {large:.0f} MB for a moment")
    batches = train_batches(Crops(loaded, (32, 32), 256, 0), workers=2)
    next(batches)
    say("first batch")
    after = memory()
    told = {name: f"{after[name] - before[name]:.0f} MB" for name in after}
    each = (after["resident"] - before["resident"]) * 2**20 / images
    print(f"  memory: {told}, {each:.0f} bytes an image resident", flush=True)
    forked(lambda: print(f"  a forked process that walked its names: own {walked(loaded.names):.0f} MB", flush=True))
    batches.close()


def walked(names: Names) -> float:
    before = memory()["own"]
    for n in range(0, len(names), 1000):
        names[n]
    return memory()["own"] - before


def forked(what: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        what()
        os._exit(0)
    os.waitpid(child, 0)


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--images", type=int, default=14_000_000)
    given.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    asked = given.parse_args()
    images = asked.images
    if asked.root is not None:
        measured(asked.root, images)
        return
    for labelled in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["UNDERPAINT_CACHE"] = f"{folder}/cache"
            root = Path(folder) / "images"
            root.mkdir()
            make(root, images, labelled)
            print(
                f"{images:,} images, {'labelled' if labelled else 'not labelled'}; {os.cpu_count()} cores", flush=True
            )
            for _ in range(2):
                # a new process: one that is forked from here would use this one's freed memory again
                again = [sys.executable, __file__, "--images", str(images), "--root", str(root)]
                subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
