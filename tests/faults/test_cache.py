"""A cache that is damaged is made again, and it is said."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pictures

from underpaint.data import images
from underpaint.data.images import load_images
from underpaint.data.open import open_source
from underpaint.data.sources.base import flat_copy

pytestmark = pytest.mark.quick


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded(folder: Path, limit: float = 2.0) -> images.ImageSet:
    source = open_source(folder)
    return load_images(source, range(len(source.entries)), size=(16, 16), cache_limit=limit)


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flipped(place: float) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return flip


def shortened(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "zeroed": zeroed,
    "a bit at the start": flipped(0),
    "a bit inside": flipped(0.5),
    "a bit at the end": flipped(1),
    "cut off": shortened,
    "emptied": lambda file: os.truncate(file, 0),
    "removed": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["pixels.bin", "index.npz", "set.json"])
def test_a_damaged_cache_is_made_again(name: str, damage: str, cache: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 6)
    before = loaded(pictures)
    (file,) = cache.glob(f"*/{name}")
    whole = file.read_bytes()
    DAMAGES[damage](file)
    again = loaded(pictures)
    said = [note for note in again.notes if "is damaged" in note]
    assert len(said) == 1
    assert f"({name}" in said[0]
    assert "\n" not in said[0]
    assert file.read_bytes() == whole
    for number in range(len(before)):
        np.testing.assert_array_equal(before.raw(number), again.raw(number))
    assert not any("is damaged" in note for note in loaded(pictures).notes)  # said once


def test_what_was_measured_of_a_streamed_set_is_measured_again(cache: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 6)
    before = loaded(pictures, limit=0.0)
    (file,) = cache.glob("*-streamed/set.json")
    file.write_text(file.read_text().replace(str(before.mean[0]), "0.0"))
    again = loaded(pictures, limit=0.0)
    assert "is damaged" in again.notes[0]
    assert again.mean == before.mean


def test_of_a_large_cache_a_sample_is_verified(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BLOCK", 1_024)
    monkeypatch.setattr(images, "VERIFIED", 4)
    pictures = write_pictures(tmp_path / "pictures", 6)
    loaded(pictures)
    assert loaded(pictures).notes == loaded(pictures).notes
    (file,) = cache.glob("*/pixels.bin")
    zeroed(file)
    assert "pixels.bin has another checksum from byte" in loaded(pictures).notes[0]


@pytest.mark.parametrize("damage", ["cut off", "emptied", "removed"])
def test_a_flat_copy_of_another_size_is_made_again(damage: str, cache: Path) -> None:
    written: list[Path] = []

    def write(file: Path) -> None:
        written.append(file)
        file.write_bytes(bytes(100))

    flat, _ = flat_copy("key", ".rows", write)
    assert flat_copy("key", ".rows", write)[0] == flat
    assert len(written) == 1
    DAMAGES[damage](flat)
    assert flat_copy("key", ".rows", write)[0].read_bytes() == bytes(100)
    assert len(written) == 2
