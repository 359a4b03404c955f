import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from underpaint.data import check, format_check
from underpaint.data.alike import alike_groups, near_groups

pytestmark = pytest.mark.quick


def photograph(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((60, 50), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))


def write(folder: Path, images: dict[str, Image.Image]) -> Path:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_check_describes_a_set(tmp_path, workers):
    sets = [f"{s}/{c}/{n}.png" for s in ("train", "val") for c in "ab" for n in (1, 2)]
    sets = {name: photograph(n) for n, name in enumerate(sets)}
    sets["val/a/copy.png"] = photograph(0)
    sets["val/b/twin.jpg"] = photograph(1)
    sets["train/a/flat.png"] = Image.new("L", (60, 50), 9)
    write(tmp_path, sets)
    (tmp_path / "train/a/bad.jpg").write_bytes(b"text")
    (tmp_path / "train/a/empty.jpg").touch()
    result = check(tmp_path, workers=workers)
    assert json.loads(json.dumps(result)) == result | {key: list(result[key]) for key in ("height", "width")}
    assert (result["images"], result["readable"]) == (12, 11)
    assert result["height"] == (50, 50.0, 50)
    assert result["channels"] == {"3": 10, "1": 1}
    assert result["dtypes"] == {"uint8": 11}
    assert result["splits"] == {"train": 6, "val": 6}
    assert result["classes"] == {"a": 7, "b": 5}
    assert [skip["path"] for skip in result["unreadable"]] == ["train/a/bad.jpg"]
    assert [skip["path"] for skip in result["left_out"]] == ["train/a/empty.jpg"]
    assert result["duplicates"] == [["train/a/1.png", "val/a/copy.png"]]
    assert result["near_duplicates"] == [["train/a/2.png", "val/b/twin.jpg"]]
    assert result["duplicates_across_splits"] == result["near_duplicates_across_splits"] == 1
    assert result["flat"] == ["train/a/flat.png"]
    text = format_check(result)
    for part in ("readable: 11 of 12", "train/a/bad.jpg", "look alike: 1 groups", "a: 7"):
        assert part in text


def test_near_groups_agree_with_all_pairs():
    draws = np.random.default_rng(0)
    base = draws.integers(0, 2**63, 300, dtype=np.uint64)
    flips = np.uint64(1) << draws.integers(0, 64, (2, 150)).astype(np.uint64)
    hashes = np.concatenate([base, base[:150] ^ flips[0], base[:75] ^ flips[0, :75] ^ flips[1, :75]])
    close = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= 2
    groups = near_groups(hashes)
    together = np.eye(len(hashes), dtype=bool)
    for group in groups:
        together[np.ix_(group, group)] = True
    assert (together | ~close).all()
    assert sum(len(group) for group in groups) == (close.sum(axis=1) > 1).sum()


def test_pictures_decide_where_hashes_agree():
    draws = np.random.default_rng(0)
    one, other = draws.integers(0, 256, (2, 256))
    pictures = (
        np.stack([one, one * 0.9 + 10, other, one + draws.normal(0, 80, 256), other]).clip(0, 255).astype(np.uint8)
    )
    assert alike_groups(np.full(5, 7, np.uint64), pictures) == [[0, 1], [2, 4]]


def test_check_of_a_plain_folder(tmp_path):
    result = check(write(tmp_path, {f"{n}.png": photograph(n) for n in range(3)}))
    assert result["splits"] == {"none": 3}
    assert result["classes"] == {}
    assert "class labels: none" in format_check(result)
