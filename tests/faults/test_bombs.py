"""Small files that would fill a machine or hang it: within 2 GiB and some seconds they are read, or said to be too large."""

import importlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from conftest import write_pictures
from killed import looks_often
from PIL import Image

from underpaint.data import Unreadable, decode, read_header
from underpaint.data import images as images_module
from underpaint.data.decode import SECONDS, decode_known
from underpaint.data.images import load_images, resize
from underpaint.data.open import open_source
from underpaint.data.parallel import WorkerLost, ordered_map
from underpaint.data.sources import archive, base
from underpaint.errors import InputError

decoding = importlib.import_module("underpaint.data.decode")  # the package has a function of that name

# reads a file and says its fate and the memory that was taken at most, in KiB
READ = """
import json, re, sys
from pathlib import Path
from underpaint.data import Unreadable, decode
from underpaint.data.images import resize
try:
    array = decode(Path(sys.argv[1]).read_bytes(), channels=3, reduce_to=64, nodata=None)
    fate = list(resize(array, (64, 64)).shape)
except Unreadable as error:
    fate = str(error)
memory = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([fate, memory]))
"""


def png(side: int, bits: int, kind: int, channels: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A black PNG, made row by row."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer, row = zlib.compressobj(1), bytes(1 + side * channels * bits // 8)
    body = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", head, *(chunk(*each) for each in extra), chunk(b"IDAT", body), chunk(b"IEND", b"")]
    )


def float_tiff(side: int) -> bytes:
    """Half of it has no value."""
    buffer, array = io.BytesIO(), np.full((side, side), -9999, np.float32)
    array[: side // 2] = 1
    options: dict[str, Any] = {"compression": "deflate", "rowsperstrip": 100, "photometric": "minisblack"}
    tifffile.imwrite(buffer, array, extratags=[(42113, "s", 0, "-9999", True)], **options)
    return buffer.getvalue()


def bit_tiff(side: int) -> bytes:
    """RGB of one bit a sample."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compression": "deflate", "rowsperstrip": 100, "photometric": "rgb"}
    tifffile.imwrite(buffer, np.ones((side, side, 3), np.bool_), **options)
    return buffer.getvalue()


LARGE: dict[str, tuple[Any, bool]] = {  # how it is made, and whether it is read
    "RGB": (lambda: png(14_000, 8, 2, 3), True),
    "RGBA": (lambda: png(13_000, 8, 6, 4), True),
    "palette with transparency": (
        lambda: png(14_000, 8, 3, 1, (b"PLTE", bytes(range(256)) * 3), (b"tRNS", bytes(128))),
        True,
    ),
    "16-bit RGBA": (lambda: png(9_900, 16, 6, 4), True),
    "too large 16-bit RGBA": (lambda: png(14_000, 16, 6, 4), False),
    "float TIFF with missing pixels": (lambda: float_tiff(7_900), True),
    "one-bit RGB TIFF": (lambda: bit_tiff(14_000), True),
    "too large float TIFF": (lambda: float_tiff(9_000), False),
}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", LARGE)
def test_no_image_takes_more_than_2_gib(kind: str, tmp_path: Path) -> None:
    make, fits = LARGE[kind]
    file = tmp_path / "image"
    file.write_bytes(make())
    assert file.stat().st_size < 8e6
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-c", READ, file], capture_output=True, text=True, check=True, env=environment
    )
    fate, memory = json.loads(made.stdout)
    assert memory < 2**21, fate
    if fits:
        assert fate == [64, 64, 3]
    else:
        assert re.search(r"data\.max_pixels=200000000 allows; \d+ would do", fate)


@pytest.mark.quick
def test_the_limit_that_is_named_is_the_one_that_suffices() -> None:
    data = png(1_500, 16, 6, 4)
    with pytest.raises(Unreadable, match=r"more than data\.max_pixels=2400000 allows; 45"):
        decode(data, max_pixels=2_400_000)
    assert decode(data, max_pixels=4_600_000).shape == (1_500, 1_500, 3)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("size", [(20, 17), (99, 50), (7, 99)])
def test_resizing_in_strips_gives_the_same(dtype: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((121, 100, 3))
    array = (values * {"uint8": 255, "uint16": 65_535, "float32": 1}[dtype]).astype(dtype)
    whole = resize(array, size)
    monkeypatch.setattr(images_module, "STRIP", 2_000)
    np.testing.assert_array_equal(resize(array, size), whole)


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_in_blocks_gives_the_same(mode: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, {"P": 1, "L": 1, "LA": 2}.get(mode, 4)), np.uint8)
    image = Image.frombytes(mode, (30, 40), noise.tobytes())
    buffer = io.BytesIO()
    if mode == "P":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
        image.save(buffer, "PNG", transparency=bytes(range(256)))
    else:
        image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    whole = decode_known(buffer.getvalue(), channels=channels, nodata=7.0, background=0.3)
    monkeypatch.setattr(decoding, "BLOCK_PIXELS", 100)
    parts = decode_known(buffer.getvalue(), channels=channels, nodata=7.0, background=0.3)
    np.testing.assert_array_equal(parts[0], whole[0])
    assert (parts[1] is None) == (whole[1] is None)


def tiff_of(tags: list[tuple[int, int, int, int]], link: int = 0, rest: bytes = b"") -> bytes:
    """A TIFF with one page: (code, type, count, value) of its tags, and where the next page lies."""
    page = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + page + struct.pack("<I", link) + rest


SMALL = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200)]
SMALL += [(277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64)]
TRAPS = {
    "a circle of pages": (tiff_of(SMALL, link=8, rest=bytes(300)), "go round in a circle"),
    "a tag of gigabytes": (tiff_of([*SMALL, (65_000, 12, 2**31, 8)], rest=bytes(300)), "claim more values"),
    "tags that share their values": (
        tiff_of([*SMALL, *((65_000 + n, 1, 6_000, 8) for n in range(400))], rest=bytes(6_000)),
        "claim more values",
    ),
    "offsets without number": (
        tiff_of([*SMALL[:5], (273, 4, 2**22 + 1, 8)], rest=bytes(2**24 + 100)),
        "claim more values",
    ),
    "a page behind the end": (tiff_of(SMALL, link=2**31, rest=bytes(300)), "a page lies behind its end"),
    "tags behind the end": (b"II*\0" + struct.pack("<IH", 8, 65_535) + bytes(100), "tags of a page lie behind"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("read", [read_header, decode])
def test_a_tiff_that_is_a_trap_is_refused_at_once(name: str, read: Any) -> None:
    data, said = TRAPS[name]
    start = time.process_time()
    with pytest.raises(Unreadable, match=said):
        read(data)
    assert time.process_time() - start < 2


@pytest.mark.quick
def test_the_small_tiff_is_one() -> None:
    """Or the tests above would show nothing."""
    assert decode(tiff_of(SMALL, rest=bytes(300))).shape == (8, 8, 3)


@pytest.mark.quick
def test_a_palette_without_the_colour_of_a_pixel_is_damage() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 255, np.uint8)).convert("P").save(buffer, "TIFF")
    data = buffer.getvalue().replace(struct.pack("<HHI", 320, 3, 768), struct.pack("<HHI", 320, 3, 3))
    assert data != buffer.getvalue()
    with pytest.raises(Unreadable):
        decode(data)


def forever(*_: Any, **__: Any) -> None:
    while True:
        pass


@pytest.mark.quick
@pytest.mark.timeout(40)
def test_an_image_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SECONDS", 0.2)
    monkeypatch.setattr(decoding, "_tiff_layout", forever)
    before = signal.getsignal(signal.SIGPROF)
    for read in (read_header, decode):
        with pytest.raises(Unreadable, match=r"takes longer than 0\.2 s of processor time"):
            read(tiff_of(SMALL, rest=bytes(300)))
    assert signal.getsignal(signal.SIGPROF) == before
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


def killed_for(name: str, number: int) -> Any:
    """A decoder that ends its process at the image whose first pixel is `name`'s."""

    def decode_or_die(data: bytes, *rest: Any, **options: Any) -> Any:
        if data == Path(name).read_bytes():
            os.kill(os.getpid(), number)
        return decode_known(data, *rest, **options)

    return decode_or_die


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "its decoding was killed (signal 9)"),
        (signal.SIGVTALRM, f"takes longer than {2 * SECONDS} s of processor time to read"),
    ],
)
def test_an_image_that_ends_its_worker_is_left_out(
    number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks_often(monkeypatch)
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images_module, "CHUNK", 2)
    pictures = write_pictures(tmp_path / "pictures", 6, classes=1)
    bad = pictures / "class0" / "0003.png"
    monkeypatch.setattr(images_module, "decode_known", killed_for(str(bad), number))
    source = open_source(pictures)
    found = load_images(source, range(6), size=(16, 16), workers=1)
    assert found.skipped == [{"path": "class0/0003.png", "reason": said}]
    assert len(found) == 5


def dies(number: int, by: int = signal.SIGKILL) -> int:
    if number == 2:
        os.kill(os.getpid(), by)
    return number


@pytest.mark.timeout(60)
def test_a_killed_worker_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    looks_often(monkeypatch)
    with pytest.raises(WorkerLost, match=r"^a process that decodes images was killed \(signal 9\).*fewer --workers"):
        list(ordered_map(dies, range(8), 1))
    bus_error = r"killed \(signal 7\), probably for want of shared memory \(/dev/shm\)"
    with pytest.raises(WorkerLost, match=bus_error):
        list(ordered_map(partial(dies, by=signal.SIGBUS), range(8), 1))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


PICTURE = png(8, 8, 2, 3)


@pytest.mark.quick
def test_a_file_of_a_zip_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LARGEST_FILE", 100_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", PICTURE)
        packed.writestr("b.png", PICTURE + bytes(10_000_000))
        packed.writestr("annotations/train.json", bytes(10_000_000))
    with pytest.raises(InputError, match=r"a\.zip: annotations/train\.json .*more than 100,000 bytes"):
        open_source(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", PICTURE)
        packed.writestr("b.png", PICTURE + bytes(10_000_000))
    source = open_source(tmp_path / "b.zip")
    assert source.read(0) == PICTURE
    with pytest.raises(Unreadable, match="unpacks to more than 100,000 bytes; unpack the archive and give the folder"):
        source.read(1)


def packed_tar(file: Path, size: int) -> Path:
    with tarfile.open(file, "w:gz") as packed:
        for name, content in (("a.png", PICTURE), ("b.png", PICTURE + bytes(size))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return file


@pytest.mark.quick
def test_a_packed_tar_file_that_becomes_too_large_is_one_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "LARGEST_UNPACKED", 2**20)
    file = packed_tar(tmp_path / "a.tar.gz", 10_000_000)
    for data in (str(file), f"wds:{file}"):
        with pytest.raises(InputError, match=r"unpacks to more than 1,048,576 bytes; .* give the folder"):
            open_source(data)
    assert not list(cache.glob("*"))


@pytest.mark.quick
def test_a_packed_tar_file_leaves_room_on_the_disk(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "FREE_AFTERWARDS", 2**60)
    with pytest.raises(InputError, match="would fill the disk of the cache"):
        open_source(packed_tar(tmp_path / "a.tar.gz", 10_000))
    assert not list(cache.glob("*"))


@pytest.mark.quick
def test_a_file_of_a_tar_that_claims_gigabytes_is_left_out(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "LARGEST_FILE", 100_000)
    source = open_source(packed_tar(tmp_path / "a.tar.gz", 200_000))
    assert source.read(0) == PICTURE
    with pytest.raises(Unreadable, match="more than 100,000 bytes"):
        source.read(1)


def test_rows_that_share_their_bytes_fill_no_memory(tmp_path: Path) -> None:
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array([bytes(2**20)], pa.binary()))
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 2e6
    file = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0)
    assert file.total_uncompressed_size < 2e6  # of 100 GiB
    source = open_source(tmp_path / "a.parquet")
    start = time.process_time()
    with pytest.raises(Unreadable, match="unpacks to more than"):
        source.read(0)
    assert time.process_time() - start < 5
