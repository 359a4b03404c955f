"""Sets that are read in pieces: shards and parquet here and elsewhere, their order in windows, what is read of them."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from safetensors.torch import load_file

from underpaint.cli import main
from underpaint.data import Batch, Crops, ImageSet, Source, Unreadable, load_images, open_source, train_batches
from underpaint.data.shuffle import Windows
from underpaint.data.sources import parquet as parquet_module
from underpaint.data.sources import pieces as pieces_module
from underpaint.data.sources import remote, webdataset
from underpaint.errors import InputError
from underpaint.train.run_folder import Run

sys.path.insert(0, str(Path(__file__).parent))
from forked import CommandLine

SIZE = (16, 16)
SHARDS, EACH, BATCH = 6, 11, 6  # 66 images: 11 batches an epoch
NAMES = "train-{000..005}.tar"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches and pieces of one's own, nothing in memory://, and no waiting between tries."""
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    with tempfile.TemporaryDirectory(prefix="up-", dir="/tmp") as short:  # sockets of processes that decode lie there
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def picture(number: int) -> bytes:
    draws = np.random.default_rng(number)
    pixels = draws.integers(0, 256, (*draws.integers(18, 24, 2), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(number) for number in range(SHARDS * EACH)]  # about 1.4 kB each


def tarred(samples: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def shards(labels: bool = False) -> dict[str, bytes]:
    found = {}
    for n in range(SHARDS):
        samples: dict[str, bytes] = {}
        for k in range(n * EACH, (n + 1) * EACH):
            samples |= {f"{k:04}.png": PICTURES[k]} | ({f"{k:04}.cls": b"%d" % (k % 3)} if labels else {})
        found[f"train-{n:03}.tar"] = tarred(samples)
    return found


def here(folder: Path, labels: bool = False) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in shards(labels).items():
        (folder / name).write_bytes(data)
    return f"wds:{folder}/{NAMES}"


def in_memory(labels: bool = False) -> str:
    fsspec.filesystem("memory").pipe({f"/bucket/{name}": data for name, data in shards(labels).items()})
    return f"wds:memory://bucket/{NAMES}"


class Web(ThreadingHTTPServer):
    """A web server of some files, and what it was asked for: method, path, and range of bytes."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], ranges: bool = True):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files, self.ranges, self.refusal = files, ranges, 404
        self.asked: list[tuple[str, str, str | None]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Answer(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        web: Any = self.server
        wanted = self.headers.get("Range") if self.command == "GET" else None
        web.asked.append((self.command, self.path, wanted))
        data = web.files.get(self.path.lstrip("/"))
        status = 200
        if data is None:
            status, data = web.refusal, b""
        elif wanted and web.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, data = 206, data[int(first) : int(last) + 1 if last else None]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", hashlib.sha256(data).hexdigest()[:16])
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def web() -> Iterator[Callable[..., Web]]:
    servers: list[Web] = []

    def start(files: dict[str, bytes], ranges: bool = True) -> Web:
        servers.append(Web(files, ranges))
        return servers[-1]

    yield start
    for system in list(HTTPFileSystem._cache.values()):  # connections that nobody closes are warnings at the end
        if system._session is not None:
            HTTPFileSystem.close_session(system.loop, system._session)
    HTTPFileSystem.clear_instance_cache()
    for server in servers:
        server.close()


def loaded(data: str | Source, window: int = 30_000, indices: Any = None) -> ImageSet:
    """A set that is not kept decoded; `window` in bytes, of about 94,000."""
    source = open_source(data) if isinstance(data, str) else data
    chosen = range(len(source.entries)) if indices is None else indices
    return load_images(source, chosen, size=SIZE, cache_limit=0.0, window=window / 2**30)


def batches(images: ImageSet, count: int = 22, first: int = 0, workers: int = 0, **options: Any) -> list[Batch]:
    crops = Crops(images, SIZE, **{"batch_size": BATCH, "seed": 3, **options})
    with closing(train_batches(crops, first_batch=first, workers=workers)) as found:
        return list(itertools.islice(found, count))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.samples == b.samples and torch.equal(a.images, b.images) for a, b in zip(left, right, strict=True)
    )


def elsewhere(source: Source, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The reader of a source as on another machine, where no piece is yet."""
    reader: Any = source._reader
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp())
    reader.__dict__.update(_made=None, _asked=set())
    reader._files.clear()
    return reader


# The order


@pytest.mark.quick
@pytest.mark.parametrize("batch", [1, 6, 7, 64, 100, 128])
def test_an_epoch_in_windows_is_a_permutation(batch: int) -> None:
    draws = np.random.default_rng(0)
    counts = draws.integers(1, 9, 100)
    samples = np.sort(draws.permutation(5000)[: counts.sum()])
    windows = Windows(samples, np.arange(100), counts, batch, 2, 5)
    whole = np.arange(len(samples) // batch * batch)
    found = windows(4, whole)
    assert len(set(found.tolist())) == len(whole)
    assert set(found.tolist()) <= set(samples.tolist())
    some = draws.permutation(whole)[: batch * 2]
    assert np.array_equal(windows(4, some), found[some])  # whatever else was asked for, and in which order
    assert not np.array_equal(windows(5, whole), found)
    assert not np.array_equal(Windows(samples, np.arange(100), counts, batch, 2, 6)(4, whole), found)


@pytest.mark.quick
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_process_needs_the_pieces_of_its_rows_alone_and_reads_them_ahead(world: int) -> None:
    """16 windows of 800 images; the pieces that a process reads ahead in a window are those that it needs in the next."""
    counts = np.full(1280, 10)
    samples, batch, steps = np.arange(12_800), 32, 25
    windows = Windows(samples, np.arange(1280) + 7, counts, batch, steps, 1)
    total, needed = 400, 0
    for rank in range(world):
        rows = slice(rank * batch // world, (rank + 1) * batch // world)
        pieces: list[set[int]] = []
        for epoch, window in itertools.product((0, 1), range(16)):
            places = np.arange(window * steps * batch, (window + 1) * steps * batch).reshape(steps, batch)[:, rows]
            pieces.append(set((windows(epoch, places.reshape(-1)) // 10 + 7).tolist()))
        for number in range(31):
            steps_of = [
                windows.ahead(batch_number, rows) for batch_number in range(number * steps, (number + 1) * steps)
            ]
            assert set(itertools.chain(*steps_of)) == pieces[number + 1]
            assert max(map(len, steps_of)) <= len(pieces[number + 1]) // steps + 1
        needed += sum(len(each) for each in pieces[:16])
    assert total * batch == len(samples)
    # every piece by one process, but those at the borders of their rows, and of windows
    assert 1280 <= needed <= 1280 + 16 * world


@pytest.mark.quick
def test_a_batch_is_drawn_from_all_of_a_window() -> None:
    counts = np.full(400, 16)
    windows = Windows(np.arange(6400), np.arange(400), counts, 64, 10, 0)
    for window in range(10):
        places = np.arange(window * 640, (window + 1) * 640)
        pieces = windows(0, places).reshape(10, 64) // 16
        of_window = set(pieces.reshape(-1).tolist())
        assert 40 <= len(of_window) <= 42
        for batch in pieces:
            assert len(set(batch.tolist())) > 30  # 64 lanes of 10 images each, at most 16 of a piece


# Shards


def test_local_shards_are_opened_once_and_no_file_is_looked_at_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = loaded(here(tmp_path / "set"))
    assert any(note.startswith("read in windows of about 2") for note in images.notes), images.notes
    opens, looks = [], []
    monkeypatch.setattr(
        os, "open", lambda path, *a, _open=os.open, **k: (opens.append(str(path)), _open(path, *a, **k))[1]
    )
    monkeypatch.setattr(
        os, "stat", lambda path, *a, _stat=os.stat, **k: (looks.append(str(path)), _stat(path, *a, **k))[1]
    )
    images._source._reader._files.clear()  # pyright: ignore[reportAttributeAccessIssue]
    epoch = batches(images, 11)
    assert len({k for batch in epoch for k in batch.samples}) == 66
    assert sorted(path for path in opens if path.endswith(".tar")) == sorted(
        f"{tmp_path}/set/{name}" for name in shards()
    )
    assert not [path for path in looks if path.endswith(".tar")]


@pytest.mark.parametrize("place", ["here", "memory"])
def test_batches_are_a_function_of_seed_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(pieces_module, "PIECE", 4096)  # three or so to a shard
    images = loaded(here(tmp_path / "set") if place == "here" else in_memory())
    assert len(images._source.pieces.starts) - 1 > 2 * SHARDS  # pyright: ignore[reportOptionalMemberAccess]
    whole = batches(images)
    for epoch in (whole[:11], whole[11:]):
        assert len({k for batch in epoch for k in batch.samples}) == 66
    assert [b.samples for b in whole[:11]] != [b.samples for b in whole[11:]]
    assert same(batches(images, 9, first=7), whole[7:16])  # resumed in the middle of an epoch
    assert same(batches(images, 13, first=4, workers=2), whole[4:17])
    for world in (2, 3, 6):
        ranks = [batches(images, rank=rank, world=world) for rank in range(world)]
        for number, batch in enumerate(whole):
            assert [k for rank in ranks for k in rank[number].samples] == batch.samples
    larger = batches(loaded(images._source, window=200_000))  # one window: permuted as a whole
    assert [b.samples for b in larger] != [b.samples for b in whole]
    part = np.arange(1, 66, 2)[::-1]  # of some images, in whatever order
    found = batches(loaded(images._source, 20_000, part), 5)
    assert len({k for batch in found for k in batch.samples}) == 30


@pytest.mark.parametrize("kind", ["memory", "https", "whole files"])
def test_remote_shards_are_as_local_ones(tmp_path: Path, web: Callable[..., Web], kind: str) -> None:
    local = open_source(here(tmp_path / "set", labels=True))
    if kind == "memory":
        data = in_memory(labels=True)
    else:
        data = f"wds:{web(shards(labels=True), ranges=kind == 'https').url}/{NAMES}"
    source = open_source(data)
    assert source.entries == local.entries
    assert (source.classes, source.kind, source.skipped) == (local.classes, local.kind, [])
    assert source.classes == ["0", "1", "2"]
    assert [source.read(k) for k in range(66)] == [local.read(k) for k in range(66)] == PICTURES
    assert [source.size(k) for k in range(66)] == [len(data) for data in PICTURES]
    assert same(batches(loaded(source)), batches(loaded(local)))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_of_remote_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """An epoch brings each piece once to this machine, whatever the number of processes; going on in the middle of it brings
    what its window and the next one need."""
    monkeypatch.setattr(pieces_module, "PIECE", 4096)
    source = open_source(in_memory())
    reader: Any = source._reader
    images = loaded(source, window=16_000)
    reader.limit = 10**9  # nothing has to go meanwhile
    log = tmp_path / "log"

    def read_range(url: str, start: int, end: int) -> bytes:
        with log.open("a") as file:
            file.write(f"{url} {start} {end} {os.getpid()}\n")
        return remote.read_range(url, start, end)

    monkeypatch.setattr(webdataset, "read_range", read_range)
    processes: list[str] = []  # that asked for each of the requests of `asked`

    def asked(first: int, count: int) -> list[tuple[str, int, int]]:
        log.write_text("")
        elsewhere(source, monkeypatch)
        batches(images, count, first=first, workers=workers)
        lines = [line.split() for line in log.read_text().splitlines()]
        processes[:] = [process for *_, process in lines]
        return [(url, int(start), int(end)) for url, start, end, _ in lines]

    assert source.pieces is not None
    ranges = reader._bring._ranges
    pieces = {}  # of several images: the request that brings one
    piece_of = {}  # by the request that brings one image of several alone
    for piece, (first, stop) in enumerate(itertools.pairwise(source.pieces.starts.tolist())):
        if stop - first > 1:
            for number, start, *sizes in ranges[first:stop].tolist():
                piece_of[f"memory://bucket/train-{number:03}.tar", start, start + sum(sizes)] = piece
            number, start, _ = ranges[first].tolist()
            pieces[f"memory://bucket/train-{number:03}.tar", start, int(ranges[stop - 1, 1:].sum())] = stop - first
    assert len(pieces) > 20
    epoch = asked(0, 11)
    brought = [request for request in epoch if request in pieces]
    assert sorted(brought) == sorted(set(brought))  # none was brought twice
    # single images of the first window are asked for by each process, and pieces that need one image alone by one
    assert len(brought) >= len(pieces) - 4
    # which process comes to a piece before it is brought depends on their speed; none asks for two of its images alone
    alone = [
        (process, piece_of[request]) for process, request in zip(processes, epoch, strict=True) if request in piece_of
    ]
    assert len(alone) == len(set(alone))
    assert len(set(processes)) <= max(1, workers)
    if not workers:
        assert len(epoch) < 1.5 * len(source.pieces.sizes)
    resumed = {request for request in asked(6, 1) if request in pieces}
    assert len(resumed) < 0.75 * len(pieces)


def test_what_stays_on_the_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE", 4096)
    images = loaded(in_memory(), window=6_000)
    most = 0
    for number in range(22):
        batches(images, 1, first=number)
        most = max(most, sum(path.stat().st_size for path in Path(tempfile.gettempdir()).rglob("*.piece")))
    assert 12_000 < most <= 4 * 6_000 + 8_000  # a piece brought since it was last looked through
    (folder,) = (path.parent for path in list(Path(tempfile.gettempdir()).rglob("*.piece"))[:1])
    for path in folder.glob("*.piece"):
        path.write_bytes(path.read_bytes()[:-9])  # as a machine that went down leaves it
    images._source._reader._files.clear()  # pyright: ignore[reportAttributeAccessIssue]
    assert [images._source.read(k) for k in range(66)] == PICTURES


@pytest.mark.quick
def test_the_index_is_kept_and_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = in_memory(labels=True)
    before = open_source(data)
    read: list[str] = []

    def opened(url: str, size: int | None) -> Any:
        read.append(url)
        return remote.opened(url, size)

    monkeypatch.setattr(webdataset, "opened", opened)
    again = open_source(data)
    assert read == []
    assert again.entries == before.entries
    assert again.fingerprint() == before.fingerprint()
    fsspec.filesystem("memory").pipe("/bucket/train-002.tar", tarred({"new.png": PICTURES[0], "new.cls": b"7"}))
    changed = open_source(data)
    assert [url.rpartition("/")[2] for url in read] == ["train-002.tar"]
    assert len(changed.entries) == 56
    assert changed.classes == ["0", "1", "2", "7"]
    assert changed.fingerprint() != before.fingerprint()
    (index,) = (tmp_path / "cache/listings").glob("*.arrow")
    index.write_bytes(index.read_bytes()[:1000])
    assert open_source(data).entries == changed.entries
    assert len(read) == 1 + SHARDS


@pytest.mark.quick
@pytest.mark.parametrize(("place", "broken"), [("header", 0), ("image", 1)])
def test_a_shard_that_is_cut_short_is_read_up_to_there(
    tmp_path: Path, web: Callable[..., Web], place: str, broken: int
) -> None:
    files = shards()
    with tarfile.open(fileobj=io.BytesIO(files["train-001.tar"])) as archive:
        fifth = archive.getmembers()[4]
    files["train-001.tar"] = files["train-001.tar"][: (fifth.offset_data if place == "image" else fifth.offset) + 100]
    (tmp_path / "set").mkdir()
    for name, data in files.items():
        (tmp_path / "set" / name).write_bytes(data)
    for start in (f"{tmp_path}/set", web(files).url, web(files, ranges=False).url):
        source = open_source(f"wds:{start}/{NAMES}")
        assert "train-001.tar is cut short; what comes before is read" in source.notes
        assert len(source.entries) == 66 - EACH + 4 + broken
        found = []
        for k, name in enumerate(source.entries.names):
            try:
                assert source.read(k) == PICTURES[int(name[-8:-4])]
            except Unreadable as error:
                found.append(f"{name}: {error}")
        assert len(found) == broken
        assert all(each.startswith("train-001.tar/0015.png: truncated: its archive ends") for each in found)


@pytest.mark.quick
def test_errors_of_remote_shards_are_one_line(
    web: Callable[..., Web], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    server = web({"a.tar": b"nothing of the kind" * 100, "b.tar.gz": b"x"})
    url = server.url

    def fails(data: str, text: str) -> None:
        assert main(["check", data]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert text in error

    fails("wds:memory://none/{0..3}.tar", "memory://none/0.tar: no such file, or no such bucket")
    fails("wds:memory://none/*.tar", "no such shard: memory://none/*.tar")
    fails(f"wds:{url}/none-{{0..3}}.tar", "none-0.tar: no such file, or no such bucket")
    fails(f"wds:{url}/a.tar", "a.tar is not a readable tar file")
    fails(f"wds:{url}/b.tar.gz", "a compressed shard has no random access")
    fails(f"parquet:{url}/a.tar", "a.tar is not a readable parquet file")
    fails("wds:nosuch://a/b.tar", "nosuch://a/b.tar: Protocol not known: nosuch")
    fails("wds:pipe:cat a.tar", "no commands are run")
    server.refusal = 403
    fails(f"wds:{url}/none.tar", "none.tar: no permission to read it")
    server.close()
    fails(f"wds:{url}/a.tar", "cannot be read: ")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    fails("wds:s3://bucket/a.tar", "s3fs")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.delitem(sys.modules, "fsspec.core", raising=False)
    fails("wds:s3://bucket/a.tar", "needs the package fsspec: pip install underpaint[webdataset]")
    fails("hf://datasets/somebody/something", "needs the package fsspec: pip install underpaint[hub]")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bucket_that_goes_away_ends_the_run_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    images = loaded(in_memory())
    tries: list[int] = []

    def gone(*_: Any, **__: Any) -> bytes:
        tries.append(1)
        raise ConnectionResetError("the connection\nwas reset")

    elsewhere(images._source, monkeypatch)
    batches(images, 1)
    MemoryFileSystem.cat_file, real = gone, MemoryFileSystem.cat_file
    try:
        with pytest.raises(InputError) as caught:
            batches(images, 11, workers=workers)
    finally:
        MemoryFileSystem.cat_file = real
    assert str(caught.value).startswith("memory://bucket/train-00")
    assert str(caught.value).endswith("cannot be read: the connection was reset")
    assert len(tries) == (0 if workers else remote.TRIES)
    assert len(batches(images, 11)) == 11


# Parquet


def tables(each: int = 11, group: int = 4) -> dict[str, bytes]:
    found = {}
    for n in range(SHARDS):
        numbers = range(n * each, (n + 1) * each)
        rows = [{"bytes": PICTURES[k], "path": f"{k:04}.png"} for k in numbers]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": rows, "label": [k % 3 for k in numbers]}), buffer, row_group_size=group)
        found[f"train-{n:03}.parquet"] = buffer.getvalue()
    return found


@pytest.mark.parametrize("kind", ["folder", "pattern", "file://", "memory", "https", "hub"])
def test_large_and_remote_parquet_is_read_by_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: Callable[..., Web], kind: str
) -> None:
    files = tables()
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        (tmp_path / "set" / name).write_bytes(content)
    small = open_source(tmp_path / "set")
    assert small.pieces is None
    monkeypatch.setattr(parquet_module, "IN_MEMORY", 1)
    data: str | Path = tmp_path / "set"
    if kind == "pattern":
        data = f"parquet:{tmp_path}/set/train-*.parquet"
    elif kind == "file://":
        data = f"parquet:file://{tmp_path}/set/{NAMES.replace('tar', 'parquet')}"
    elif kind == "memory":
        fsspec.filesystem("memory").pipe({f"/bucket/{name}": content for name, content in files.items()})
        data = "parquet:memory://bucket/*.parquet"
    elif kind == "https":
        data = f"parquet:{web(files).url}/{NAMES.replace('tar', 'parquet')}"
    elif kind == "hub":
        fsspec.register_implementation("hf", Hub, clobber=True)
        Hub().pipe({f"/datasets/me/photos/data/{name}": content for name, content in files.items()})
        data = "hf://datasets/me/photos"
    try:
        source = open_source(data)
        assert source.entries == small.entries
        assert source.pieces is not None
        assert np.diff(source.pieces.starts).tolist() == [4, 4, 3] * SHARDS
        draws = np.random.default_rng(0).permutation(66).tolist()
        assert [source.read(k) for k in draws] == [PICTURES[k] for k in draws]
        images = loaded(source)
        whole = batches(images)
        assert len({k for batch in whole[:11] for k in batch.samples}) == 66
        assert same(batches(images, 6, first=8, workers=0 if kind == "https" else 2), whole[8:14])
    finally:
        fsspec.register_implementation("hf", "huggingface_hub.HfFileSystem", clobber=True)


class Hub(MemoryFileSystem):
    """Stands in for the file system of the hub."""

    protocol = "hf"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("hf://"))


@pytest.mark.quick
def test_what_a_row_group_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "IN_MEMORY", 1)
    pq.write_table(pa.table({"image": [PICTURES[0], None, PICTURES[2]]}), tmp_path / "a.parquet", compression="none")
    source = open_source(tmp_path / "a.parquet")
    with pytest.raises(Unreadable, match="no image bytes"):
        source.read(1)
    assert source.read(2) == PICTURES[2]
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:4] + bytes(2000) + content[2004:])
    with pytest.raises(Unreadable, match="cannot be read"):
        open_source(tmp_path / "b.parquet").read(0)


MEASURE = """
import sys
from pathlib import Path
from underpaint.data import open_source
from underpaint.data.sources import parquet
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
parquet.IN_MEMORY = 2**20
source = open_source(sys.argv[1])
source.set_window(2.0**23)
before, total, most = peak(), 0, 0
for k in range(len(source.entries)):
    total += len(source.read(k))
    if k % 5 == 0:
        most = max(most, sum(path.stat().st_size for path in Path(sys.argv[2]).rglob("*.p*")))
print(total, peak() - before, most / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_large_parquet_file_is_neither_held_nor_copied_whole(tmp_path: Path) -> None:
    """200 MiB in row groups of 10, each a single page: the memory that reading all of it takes, and what lies on the disk meanwhile."""
    noise = np.random.default_rng(0).integers(0, 256, 2**20, dtype=np.uint8).tobytes()
    file = tmp_path / "a.parquet"
    schema = pa.schema([("image", pa.binary())])
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for group in range(20):
            rows = [noise[k:] + noise[:k] for k in range(group, group + 10)]
            writer.write_table(pa.table({"image": rows}, schema=schema))
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", MEASURE, str(file), str(tmp_path / "tmp")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    total, grown, most = map(float, done.stdout.split())
    assert total == 200 * 2**20
    assert grown < 60  # MiB
    assert 30 < most <= 4 * 8 + 10  # four windows and a piece
    assert not list((tmp_path / "cache").rglob("flat-*"))


# The command line

TINY = [
    *("--method", "mae", "--encoder", "vit_tiny_patch16_224", "--image-size", "16", "--patch-size", "4"),
    *("--batch-size", str(BATCH), "--checkpoint-every", "3", "--set", "encoder.embed_dim=32"),
    *("--set", "encoder.depth=1", "--set", "encoder.num_heads=2", "--set", "run.log_every=2"),
    *("--set", "data.cache_limit=0", "--set", f"data.window={20_000 / 2**30}"),
]


@pytest.mark.parametrize(
    ("kind", "processes", "workers"),
    [
        ("https", 2, 1),
        pytest.param("file://", 1, 2, marks=pytest.mark.slow),
        pytest.param("https", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_shards_goes_on_in_the_middle_of_an_epoch(
    tmp_path: Path, web: Callable[..., Web], server: CommandLine, kind: str, processes: int, workers: int
) -> None:
    """Killed at its 9th step, of 11 an epoch; the images that its steps were given, and the images themselves."""
    here(tmp_path / "set")
    data = f"wds:file://{tmp_path}/set/{NAMES}" if kind == "file://" else f"wds:{web(shards()).url}/{NAMES}"
    command = ["pretrain", data, *TINY, "--steps", "22", "--workers", workers]
    command += ["--devices", processes] if processes > 1 else []
    given: list[dict[tuple[int, int], list[int]]] = []
    for name, deaths in (("whole", [None]), ("broken", [9, None])):
        seen: dict[tuple[int, int], list[int]] = {}
        for turn, count in enumerate(deaths):
            record = tmp_path / f"{name}-{turn}"
            die = None if count is None else ("step", count)
            done = server(*command, "--out", tmp_path / name, die=die, processes=processes, record=record)
            assert (done.status == 0) == (count is None), done.error
            for rank in range(processes):
                for line in map(json.loads, Path(f"{record}-{rank}").read_text().splitlines()):
                    key = line["step"], line["rank"]
                    assert seen.setdefault(key, line["samples"]) == line["samples"]
        given.append(seen)
    assert given[0] == given[1]
    assert sorted({step for step, _ in given[0]}) == list(range(22))
    first = [k for step in range(11) for rank in range(processes) for k in given[0][step, rank]]
    assert len(set(first)) == 66
    states = [load_file(Run(tmp_path / name).checkpoints()[-1] / "state.safetensors") for name in ("whole", "broken")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_commands_on_remote_shards(tmp_path: Path, web: Callable[..., Web], server: CommandLine) -> None:
    url = f"wds:{web(shards(labels=True)).url}/{NAMES}"
    done = server("check", url, "--out", tmp_path / "check")
    assert done.status == 0, done.error
    assert "readable: 66 of 66" in done.out
    assert "class labels: 66 images, 3 classes" in done.out
    done = server("pretrain", url, "--out", tmp_path / "run", "--preview")
    assert done.status == 0, done.error
    assert not (tmp_path / "run").exists()
    done = server("pretrain", url, "--out", tmp_path / "run", *TINY, "--steps", "3")
    assert done.status == 0, done.error
    assert "read in windows of about" in done.out
    done = server("evaluate", tmp_path / "run", "--data", url, "--task", "knn", "--out", tmp_path / "worth")
    assert done.status == 0, done.error
