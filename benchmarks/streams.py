"""Images a second that are read of shards: in windows, and each by itself; from a disk whose cache was emptied, and from a
web server that takes 20 ms to answer, as a store of objects does. Nothing is decoded; one process; rounds take turns.

    python benchmarks/streams.py IMAGES FOLDER           FOLDER gets 2 GiB of shards, made of the images again and again
    python benchmarks/streams.py IMAGES FOLDER --gib 8
"""

import argparse
import io
import itertools
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from underpaint.data import Crops, ImageSet, load_images, open_source

BATCH, SIZE = 256, (224, 224)
SHARD = 2**28  # bytes
LATENCY = 0.02  # seconds


def make(images: str, folder: Path, size: float) -> None:
    """Shards of so many bytes in all; those that are there stay."""
    source = open_source(images)
    files = itertools.cycle([source.read(k) for k in range(len(source.entries))])
    folder.mkdir(parents=True, exist_ok=True)
    number = itertools.count()
    for shard in range(round(size / SHARD)):
        held = 0
        with tarfile.open(folder / f"{shard:04}.tar", "w") as archive:
            while held < SHARD:
                data = next(files)
                info = tarfile.TarInfo(f"{next(number):08}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                held += len(data)


class Answer(BaseHTTPRequestHandler):
    """Ranges of the files of a folder."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    folder = Path()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(LATENCY)
        file = self.folder / self.path.lstrip("/")
        size = file.stat().st_size
        first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(size, int(last) + 1) if last else size
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            with file.open("rb") as opened:
                opened.seek(start)
                self.wfile.write(opened.read(stop - start))


def serve(folder: Path, port: Any) -> None:
    Answer.folder = folder
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    port.send(server.server_address[1])
    server.serve_forever()


def forget(folder: Path) -> None:
    """Let the system forget what it holds of the shards."""
    os.sync()
    for file in folder.glob("*.tar"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(images: ImageSet, first: int, count: int, read: Callable[[int], bytes]) -> float:
    """Images a second in `count` batches from the `first` on."""
    crops = Crops(images, SIZE, BATCH, 0)
    began = time.perf_counter()
    for batch in range(first, first + count):
        _, samples = crops._samples(batch)
        if crops._windows is not None:
            images.ahead(crops._windows.ahead(batch, crops._rows))
        for sample in samples.tolist():
            read(sample)
    return count * BATCH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--window", type=float, default=0.25, help="GiB")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if not list(given.folder.glob("*.tar")):
        make(given.images, given.folder, given.gib * 2**30)
    here, there = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(given.folder, there), daemon=True)
    server.start()
    last = len(list(given.folder.glob("*.tar"))) - 1
    url = f"wds:http://127.0.0.1:{here.recv()}/{{0000..{last:04}}}.tar"
    began = time.perf_counter()
    local, far = open_source(f"wds:{given.folder}/*.tar"), open_source(url)
    assert local.pieces is not None
    took = time.perf_counter() - began
    print(f"{len(local.entries):,} images of {len(local.pieces.sizes)} pieces; listed in {took:.1f} s")
    print(f"the index again: {timed(lambda: open_source(url)):.2f} s")
    everything = range(len(local.entries))
    load = {"size": SIZE, "cache_limit": 0.0}
    windows = load_images(local, everything, window=given.window, **load)
    far_windows = load_images(far, everything, window=given.window, **load)
    other = open_source(f"wds:{given.folder}/*.tar")
    permuted = load_images(other, everything, window=1e6, **load)
    alone: Any = far._reader._alone  # type: ignore[attr-defined]
    batches = max(1, round(given.window * 2**30 / (local.pieces.sizes.sum() / len(everything) * BATCH)))  # type: ignore
    ways: dict[str, Callable[[], float]] = {
        "disk, windows": lambda: rate(windows, batches, 2 * batches, local.read),
        "disk, at random": lambda: rate(permuted, batches, 2 * batches, other.read),
        "web, windows": lambda: rate(far_windows, batches, 2 * batches, far.read),
        "web, at random (an eighth of the batches)": lambda: rate(permuted, batches, batches // 4 or 1, alone),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _, (way, measure) in itertools.product(range(given.rounds), ways.items()):
        forget(given.folder)
        tempfile.tempdir = tempfile.mkdtemp(dir=given.folder)  # no piece is there yet
        far._reader.__dict__.update(_made=None, _asked=set())
        far._reader._files.clear()  # type: ignore[attr-defined]
        found[way].append(measure())
        shutil.rmtree(tempfile.tempdir)
    for way, rates in found.items():
        print(f"{way}: {np.median(rates):,.0f} images/s ({', '.join(f'{each:,.0f}' for each in rates)})")
    server.kill()


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
