"""Sets of many images: columns in place of objects, a stored listing, an order that needs no memory."""

import hashlib
import os
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from underpaint.data import open_source, pretraining_indices, split_indices
from underpaint.data.shuffle import shuffled
from underpaint.data.sources import folder as folder_module
from underpaint.data.sources import stored
from underpaint.data.sources.base import Listing, Source
from underpaint.data.sources.index import Entries, Entry, Names


class NoReader:
    def read(self, index: int) -> bytes:
        return b""


def made_source(entries: list[Entry], groups: str | None = None) -> Source:
    stamps = [f"{n} {n * n}" for n in range(len(entries))]
    classes = [str(k) for k in range(100)]
    return Source(
        "made",
        Listing("made", "/x", entries, stamps, NoReader(), classes, [], []),
        re.compile(groups) if groups else None,
    )


def old_hold_out(source: Source, indices: list[int]) -> tuple[list[int], list[int]]:
    """The hold-out as it was computed image by image, by which published numbers were judged."""
    labels = [source.entries[i].label for i in indices]
    place = {label: n for n, label in enumerate(sorted(set(labels), key=str))}
    members: dict[str, list[int]] = {}
    for position, i in enumerate(indices):
        members.setdefault(source.group_of(i), []).append(position)
    wanted = np.zeros(len(place))
    for label, size in Counter(labels).items():
        wanted[place[label]] = min(max(1, round(0.2 * size)), size - 1)
    held = np.zeros(len(place))
    test: list[int] = []

    def order(name: str) -> tuple[bytes, str]:
        return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), name

    for name in sorted(members, key=order):
        group = members[name]
        touched, counts = np.unique([place[labels[p]] for p in group], return_counts=True)
        after = held[touched] + counts
        if ((after - wanted[touched]) ** 2).sum() < ((held[touched] - wanted[touched]) ** 2).sum():
            held[touched] = after
            test += group
    chosen = set(test)
    return [i for p, i in enumerate(indices) if p not in chosen], [indices[p] for p in sorted(chosen)]


@pytest.mark.parametrize("groups", [None, r"p(\d+)_"])
@pytest.mark.parametrize("classes", [0, 1, 3, 40])
def test_the_same_images_are_held_out_as_ever(groups: str | None, classes: int) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        labels = [None if not classes or rng.random() < 0.1 else int(rng.integers(classes)) for _ in range(400)]
        names = [f"{'p' if rng.random() < 0.9 else 'x'}{rng.integers(80)}_{n}.png" for n in range(400)]
        source = made_source([Entry(n, None, k) for n, k in zip(names, labels, strict=True)], groups)
        for indices in (list(range(400)), rng.permutation(400)[:150].tolist(), [5], [7, 3]):
            train, test = split_indices(source, indices)
            assert (train.tolist(), test.tolist()) == old_hold_out(source, indices)


def test_the_fingerprint_is_the_one_that_caches_are_kept_under() -> None:
    names = ["a/1.png", "a/\udcff.png", "b/ä.png"]
    source = made_source([Entry(name, None, None) for name in names])
    digest = hashlib.sha256(b"made\0/x\0")
    for n, name in enumerate(names):
        digest.update(f"{name}\0{n} {n * n}\n".encode("utf-8", "surrogateescape"))
    assert source.fingerprint() == source.fingerprint() == digest.hexdigest()


def test_entries_are_what_went_in() -> None:
    entries = [Entry("a\udcff", "train", 3, 1.5), Entry("b", None, None, None), Entry("c", "val", 0, -2.0)]
    columns = Entries.of(*zip(*[(e.name, e.split, e.label, e.number) for e in entries], strict=True))
    assert list(columns) == entries == [columns[k] for k in range(3)]
    assert columns[-1] == entries[-1]
    assert columns[1:] == entries[1:]
    assert Names.of("xyz")[1:] == ["y", "z"]
    with pytest.raises(IndexError):
        columns[3]


@pytest.mark.parametrize("count", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_the_order_of_a_large_set_is_a_permutation(count: int) -> None:
    found = shuffled(np.arange(count), count, 1, 2)
    assert sorted(found.tolist()) == list(range(count))
    some = np.arange(count)[::3]
    assert np.array_equal(shuffled(some, count, 1, 2), found[::3])  # whatever else is asked for


def test_the_order_of_a_large_set_is_well_mixed() -> None:
    count = 100_003
    orders = [shuffled(np.arange(count), count, *key) for key in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
        assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.02
        found = np.histogram2d(np.arange(count), order, bins=20)[0]
        expected = count / 400
        assert 250 < ((found - expected) ** 2 / expected).sum() < 480  # chi-square of about 361 degrees, sigma 27
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).sum() < 12  # 1 is expected
        assert abs(np.corrcoef(orders[one], orders[other])[0, 1]) < 0.02


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """3,000 files that look like images, of which the listing is stored at once."""
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_module, "LISTED_ANEW", 100)
    root = tmp_path / "many"
    for k in range(3):
        (root / f"class{k}").mkdir(parents=True)
        for n in range(1_000):
            (root / f"class{k}" / f"{n}.png").write_bytes(b"x")
    (root / "class0" / "empty.png").touch()
    (root / "labels.csv").write_text("name,age\nclass0/1.png,4\nclass1/2.png,5\n")
    settle(root)
    return root


def settle(root: Path) -> None:
    """Folders seem to have changed a minute ago."""
    then = time.time() - 60
    for folder in [root, *root.glob("class*")]:
        os.utime(folder, (then, then))


def listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Source, bool]:
    """The source, and whether the folder was walked through for it."""
    walked = []
    walk = folder_module.walk
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "walk", lambda *given: walked.append(1) or walk(*given))
        return open_source(root), bool(walked)


def same(one: Source, other: Source) -> bool:
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("entries", "classes", "notes", "skipped", "number", "kind")
    ) and (one.fingerprint(), one.read(7), one.size(7)) == (other.fingerprint(), other.read(7), other.size(7))


def test_the_second_opening_takes_the_stored_listing(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, walked = listed(many, monkeypatch)
    assert walked
    second, walked = listed(many, monkeypatch)
    assert not walked
    assert same(first, second)
    assert second.number == "age"
    assert [skip["path"] for skip in second.skipped] == ["class0/empty.png"]


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "rewritten", "table", "filled", "below"])
def test_a_changed_folder_is_listed_anew(many: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    before, _ = listed(many, monkeypatch)
    place = many / "class1"
    if change == "added":
        (place / "new.png").write_bytes(b"x")
    elif change == "removed":
        (place / "7.png").unlink()
    elif change == "renamed":
        (place / "7.png").rename(place / "seven.png")
    elif change == "rewritten":  # in place: no folder's time changes
        for file in place.iterdir():
            file.write_bytes(b"other")
    elif change == "table":
        (many / "labels.csv").write_text("name,age\nclass0/1.png,40\nclass1/2.png,5\n")
    elif change == "filled":
        (many / "class0" / "empty.png").write_bytes(b"x")
    else:
        (place / "below").mkdir()
    after, walked = listed(many, monkeypatch)
    assert walked
    if change in ("added", "removed", "renamed", "rewritten", "filled"):
        assert after.fingerprint() != before.fingerprint()
    if change == "table":
        assert {entry.number for entry in after.entries} == {None, 40.0, 5.0}


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "flipped", "folder"])
def test_a_damaged_listing_is_made_again(many: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    first, _ = listed(many, monkeypatch)
    file = stored.stored_at(many)
    data = bytearray(file.read_bytes())
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        data[200:-600:7] = data[200:-600:7] if damage != "flipped" else bytes(255 - b for b in data[200:-600:7])
        file.write_bytes({"cut": data[:3000], "empty": b"", "noise": os.urandom(5000)}.get(damage, bytes(data)))
    second, walked = listed(many, monkeypatch)
    assert walked
    assert same(first, second)


def test_a_folder_that_is_being_written_to_is_not_stored(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(many / "class2")
    assert [listed(many, monkeypatch)[1] for _ in range(2)] == [True, True]
    assert not stored.stored_at(many).exists()


def test_a_cache_that_cannot_be_written_stores_nothing(
    many: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "file"))
    assert [listed(many, monkeypatch)[1] for _ in range(2)] == [True, True]


def test_a_small_folder_is_listed_each_time(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "LISTED_ANEW", 20_000)
    assert [listed(many, monkeypatch)[1] for _ in range(2)] == [True, True]


def test_an_index_of_many_names_is_small(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(many, monkeypatch)
    source, _ = listed(many, monkeypatch)
    columns = source.entries
    held = columns.names.column.nbytes + columns.splits.nbytes + columns.labels.nbytes
    assert held + pretraining_indices(source).nbytes < 100 * len(columns)
