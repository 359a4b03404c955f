import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from underpaint.cli import main
from underpaint.data import (
    Entry,
    Source,
    Unreadable,
    copies,
    decode,
    eval_batches,
    labelled_indices,
    load_images,
    open_source,
    pretraining_indices,
)
from underpaint.data.sources import parquet as parquet_module
from underpaint.errors import InputError
from underpaint.files import SOURCES

pytestmark = pytest.mark.quick
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(value: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, 7, 9)).save(buffer, kind)
    return buffer.getvalue()


def tree(root: Path, *names: str) -> Path:
    for n, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(n) if path.suffix == ".png" else b"text")
    return root


def zipped(root: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    return target


def tarred(root: Path, target: Path, mode: str = "w") -> Path:
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        archive.add(root, ".")
    return target


def lists(sides: tuple[np.ndarray, np.ndarray] | None) -> tuple[list[int], list[int]]:
    assert sides is not None
    return sides[0].tolist(), sides[1].tolist()


def names(source: Source, split: str | None = None) -> list[str]:
    return [entry.name for entry in source.entries if split is None or entry.split == split]


CLASSES = ("cat/1.png", "cat/2.png", "dog/a/1.png", "dog/2.png")


def test_plain_folder_of_any_depth(tmp_path):
    source = open_source(tree(tmp_path, "1.png", "a/2.png", "a/b/c/3.png"))
    assert names(source) == ["1.png", "a/2.png", "a/b/c/3.png"]
    assert source.entries[0] == Entry("1.png", None, None)
    assert source.classes is None
    assert pretraining_indices(source).tolist() == [0, 1, 2]
    assert labelled_indices(source) is None
    assert decode(source.read(2))[0, 0].tolist() == [2, 7, 9]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_kinds_of_files_read_the_same(tmp_path, kind):
    root = tree(tmp_path / "root", *(f"top/{split}/{name}" for split in ("train", "val") for name in CLASSES))
    data = root
    if kind == "zip":
        data = zipped(root, tmp_path / "x.zip")
    elif kind != "folder":
        data = tarred(root, tmp_path / f"x.{kind}", "w:" + kind.partition(".")[2])
    source = open_source(data)
    assert names(source)[0] == "top/train/cat/1.png"
    assert len(names(source, "train")) == len(names(source, "val")) == 4
    assert source.classes == ["cat", "dog"]
    assert [entry.label for entry in source.entries] == [0, 0, 1, 1] * 2
    for again in (source, pickle.loads(pickle.dumps(source))):
        assert [decode(again.read(i))[0, 0, 0] for i in range(8)] == [0, 1, 3, 2, 4, 5, 7, 6]
    assert open_source(data).fingerprint() == source.fingerprint()
    assert any("top" in note for note in source.notes)
    assert lists(labelled_indices(source)) == ([0, 1, 2, 3], [4, 5, 6, 7])


def test_top_folder_is_looked_through_once(tmp_path):
    source = open_source(tree(tmp_path, *(f"top/{name}" for name in CLASSES), "LICENSE.txt"))
    assert source.classes == ["cat", "dog"]
    twice = open_source(tree(tmp_path / "two", *(f"a/b/{name}" for name in CLASSES)))
    assert twice.classes is None


def test_split_names(tmp_path):
    source = open_source(tree(tmp_path, "train/1.png", "valid/2.png", "images/validation/3.png", "Test/4.png", "5.png"))
    assert {entry.name: entry.split for entry in source.entries} == {
        "train/1.png": "train",
        "valid/2.png": "val",
        "images/validation/3.png": "val",
        "Test/4.png": "test",
        "5.png": None,
    }
    assert [source.entries[i].name for i in pretraining_indices(source)] == ["train/1.png"]


def test_a_lone_split_folder_stays_a_split(tmp_path):
    source = open_source(tree(tmp_path, *(f"train/{name}" for name in CLASSES)))
    assert {entry.split for entry in source.entries} == {"train"}
    assert source.classes == ["cat", "dog"]


def test_answers_are_never_images(tmp_path):
    source = open_source(
        tree(tmp_path, "images/1.png", "masks/1.png", "semantic/train/1.png", "labels/1.png", "annotations/1.png")
    )
    assert names(source) == ["images/1.png"]
    assert source.skipped == []


def test_label_rule(tmp_path):
    lone = open_source(tree(tmp_path / "one", "cat/1.png", "cat/2.png", "masks/1.png"))
    assert lone.classes is None
    loose = open_source(tree(tmp_path / "loose", *CLASSES, *(f"{n}.png" for n in range(4))))
    assert loose.classes is None
    called = open_source(tree(tmp_path / "called", "images/1.png", "more/1.png"))
    assert called.classes is None
    unlabelled_test = open_source(tree(tmp_path / "test", *(f"train/{name}" for name in CLASSES), "test/1.png"))
    assert unlabelled_test.classes == ["cat", "dog"]
    sides = labelled_indices(unlabelled_test)
    assert sides is not None
    assert {unlabelled_test.entries[i].split for side in sides for i in side} == {"train"}


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("Training", "Testing"), ("train", "test")),
        (("TRAIN", "VALIDATION"), ("train", "val")),
        (("train2017", "val2017"), ("train", "val")),
        (("images/training", "images/eval_1"), ("train", "test")),
        (("learning", "hold-out"), ("train", "test")),
        (("train", "dev"), ("train", "val")),
        (("Training", "unlabelled"), (None, None)),  # one word for a split alone may be a class
        (("train", "evaluation"), ("train", "test")),
        (("train-1", "Test_1"), ("train", "test")),
    ],
)
def test_other_words_for_splits_are_splits_and_not_classes(tmp_path, folders, splits):
    source = open_source(tree(tmp_path, *(f"top/{folder}/{name}" for folder in folders for name in CLASSES)))
    assert [entry.split for entry in source.entries] == [
        s for _, s in sorted(zip(folders, splits, strict=True)) for _ in CLASSES
    ]
    if None not in splits:
        assert source.classes == ["cat", "dog"]
        assert sorted(str(entry.label) for entry in source.entries) == ["0"] * 4 + ["1"] * 4


@pytest.mark.parametrize(
    "classes", [("running", "training", "swimming"), ("test1", "test2", "test3"), ("control1", "test1"), ("dev", "cat")]
)
def test_classes_may_have_words_for_splits_as_names(tmp_path, classes):
    plain = open_source(tree(tmp_path / "plain", *(f"{name}/{n}.png" for name in classes for n in range(2))))
    assert plain.classes == sorted(classes)
    assert {entry.split for entry in plain.entries} == {None}
    split = open_source(
        tree(tmp_path / "split", *(f"{part}/{name}/1.png" for part in ("Train", "Test") for name in classes))
    )
    assert split.classes == sorted(classes)
    assert {entry.split for entry in split.entries} == {"train", "test"}


def test_a_folder_that_holds_all_is_a_split_unless_splits_lie_in_it(tmp_path):
    alone = open_source(tree(tmp_path / "alone", *(f"brain/Training/{name}" for name in CLASSES)))
    assert {entry.split for entry in alone.entries} == {"train"}
    assert alone.classes == ["cat", "dog"]
    called = open_source(tree(tmp_path / "called", *(f"testing/{s}/{n}" for s in ("Training", "dev") for n in CLASSES)))
    assert {entry.split for entry in called.entries} == {"train", "val"}
    assert called.classes == ["cat", "dog"]


def test_a_stray_image_or_a_split_of_one_class_takes_no_labels_away(tmp_path):
    source = open_source(
        tree(tmp_path / "stray", *(f"train/{name}" for name in CLASSES), "train/stray.png", "val/dog/1.png")
    )
    assert source.classes == ["cat", "dog"]
    assert {entry.name: entry.label for entry in source.entries} == {
        "train/cat/1.png": 0,
        "train/cat/2.png": 0,
        "train/dog/2.png": 1,
        "train/dog/a/1.png": 1,
        "train/stray.png": None,
        "val/dog/1.png": 1,
    }
    assert lists(labelled_indices(source)) == ([0, 1, 2, 3], [5])
    assert any("1 of 5 images in train lie beside" in note and "train/stray.png" in note for note in source.notes)
    assert "1 of the 2 classes occur in val" in source.notes
    plain = open_source(tree(tmp_path / "plain", *CLASSES, "5.png"))
    assert [entry.label for entry in plain.entries] == [None, 0, 0, 1, 1]
    other = open_source(tree(tmp_path / "other", *(f"train/{name}" for name in CLASSES), "val/new/1.png"))
    assert [entry.label for entry in other.entries] == [0, 0, 1, 1, None]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "parquet", "parquet folder", "wds"])
def test_equal_sets_in_two_places_have_fingerprints_of_their_own(tmp_path, kind):
    sources = []
    for place in ("a", "b"):
        root = tmp_path / place / "set"
        if "parquet" in kind:
            data = parquet(root / "x.parquet", structs(1, 2))
            data = data if kind == "parquet" else root
        else:
            root.mkdir(parents=True)
            (root / "1.png").write_bytes(picture(1))
            os.utime(root / "1.png", (1e9, 1e9))
            data = root
            if kind == "zip":
                data = zipped(root, tmp_path / place / "x.zip")
            elif kind != "folder":
                data = tarred(root, tmp_path / place / "x.tar")
        for path in (data, *data.glob("*")) if data.is_dir() else (data,):
            os.utime(path, (1e9, 1e9))
        sources.append(f"wds:{data}" if kind == "wds" else data)
    one, other = map(open_source, sources)
    assert one.entries == other.entries
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == open_source(sources[0]).fingerprint()
    if kind == "folder":
        (tmp_path / "link").symlink_to(sources[0])
        assert open_source(tmp_path / "link").fingerprint() == one.fingerprint()


def test_test_split_judges_before_val(tmp_path):
    source = open_source(tree(tmp_path, *(f"{s}/{n}" for s in ("train", "val", "test") for n in CLASSES)))
    sides = labelled_indices(source)
    assert sides is not None
    assert {source.entries[i].split for i in sides[1]} == {"test"}


def test_hold_out_is_stratified_and_left_out_of_pretraining(tmp_path):
    source = open_source(tree(tmp_path, *(f"{name}/{n}.png" for name in ("a", "b") for n in range(20))))
    sides = labelled_indices(source)
    assert sides is not None
    assert sorted(np.concatenate(sides).tolist()) == list(range(40))
    assert [source.entries[i].label for i in sides[1]] == [0] * 4 + [1] * 4
    assert any("hold-out of 8 images" in note for note in source.notes)
    assert pretraining_indices(source).tolist() == sides[0].tolist()
    assert pretraining_indices(source, all_images=True).tolist() == list(range(40))


def held_names(source: Source) -> set[str]:
    sides = labelled_indices(source)
    assert sides is not None
    return {source.entries[i].name for i in sides[1]}


@pytest.mark.parametrize("groups", [None, r"patient(\d+)"])
def test_a_few_more_images_move_few_others_in_or_out_of_the_hold_out(tmp_path, groups):
    files = [f"{c}/patient{p:03d}_{n}.png" for c in "abc" for p in range(50) for n in range(2)]
    before = held_names(open_source(tree(tmp_path, *files), groups=groups))
    after = held_names(open_source(tree(tmp_path, "a/patient900_0.png", "b/patient901_0.png"), groups=groups))
    old = set(files)
    assert len(before) == 60
    # a class holds out one more at most, and one that stood last may give way: a new draw would move about 96
    assert len((before ^ after) & old) <= 4 * (6 if groups else 1)


def test_what_is_of_a_held_out_group_is_left_out_of_pretraining_labelled_or_not(tmp_path):
    files = [f"train/{c}/patient{p}_{n}.png" for c in ("a", "b") for p in range(10) for n in range(3)]
    files += [f"more/patient{p}_9.png" for p in range(10)]
    (tmp_path / "s").mkdir()
    source = open_source(tree(tmp_path / "s", *files), groups=r"patient(\d+)")
    sides = labelled_indices(source)
    assert sides is not None
    judged = {source.group_of(i) for i in sides[1]}
    assert len(judged) == 2
    assert not judged & {source.group_of(i) for i in pretraining_indices(source)}


def test_copies_are_found_by_their_bytes_and_not_by_name_or_size(tmp_path):
    for folder, names_ in (("a", "123"), ("b", "3456")):
        (tmp_path / folder).mkdir()
        for name in names_:
            (tmp_path / folder / f"{name}.png").write_bytes(b"image " + name.encode())
    (tmp_path / "b" / "other.png").write_bytes(b"image 1")  # the same under another name
    (tmp_path / "b" / "2.png").write_bytes(b"image !")  # another under the same name
    first, second = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    for _ in range(2):  # made, and from the cache
        found = copies(first, range(len(first.entries)), second, range(len(second.entries)))
        assert [first.entries[i].name for i in found] == ["1.png", "3.png"]
    archive = open_source(zipped(tmp_path / "a", tmp_path / "a.zip"))
    found = copies(archive, range(3), second, range(len(second.entries)))
    assert [archive.entries[i].name[-5:] for i in found] == ["1.png", "3.png"]


def test_groups_stay_on_one_side(tmp_path):
    files = [f"{c}/patient{p}_{n}.png" for c in ("a", "b") for p in range(10) for n in range(3)]
    source = open_source(tree(tmp_path, *files), groups=r"patient(\d+)")
    sides = labelled_indices(source)
    assert sides is not None
    train, test = ({source.group_of(i) for i in side} for side in sides)
    assert not train & test
    assert len(test) == 2
    with pytest.raises(InputError, match="regular expression"):
        open_source(tmp_path, groups="(")


def coco(*files: str) -> str:
    return json.dumps({"images": [{"id": n, "file_name": name} for n, name in enumerate(files)], "annotations": []})


def test_coco_json_defines_the_splits(tmp_path):
    root = tree(tmp_path / "root", "x/images/1.png", "x/images/2.png", "x/images/val2017/3.png", "x/images/4.png")
    (root / "x/annotations").mkdir()
    (root / "x/annotations/train.json").write_text(coco("1.png", "2.png", "gone.png"))
    (root / "x/annotations/instances_val2017.json").write_text(coco("3.png"))
    for data in (root, zipped(root, tmp_path / "x.zip"), tarred(root, tmp_path / "x.tar")):
        source = open_source(data)
        assert [entry.split for entry in source.entries] == ["train", "train", None, "val"]
        assert source.classes is None
        assert any("lists 1 images that are not there" in note for note in source.notes)
    (root / "x/annotations/train.json").write_text("{")
    with pytest.raises(InputError, match=r"annotations/train\.json is not COCO json"):
        open_source(root)


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("Training-00000-of-00001.parquet", "train"),
        ("TESTING.parquet", "test"),
        ("dev2.parquet", "val"),
        ("hold-out.0.parquet", "test"),
        ("trainers.parquet", None),
        ("learning/1.parquet", "train"),
    ],
)
def test_files_are_named_by_the_same_words_for_splits(tmp_path, file, split):
    parquet(tmp_path / "set" / file, structs(1))
    parquet(tmp_path / "set/validation/2.parquet", structs(2))
    source = open_source(tmp_path / "set")
    assert {entry.name: entry.split for entry in source.entries} == {"1.png": split, "2.png": "val"}
    for place in (Path(file).with_suffix(".tar"), "validation/2.tar"):
        (tmp_path / "shards" / place).parent.mkdir(parents=True, exist_ok=True)
        shard(tmp_path / "shards" / place, {"a.png": picture()})
    shards = open_source(f"wds:{tmp_path}/shards/**/*.tar")
    assert sorted(str(entry.split) for entry in shards.entries) == sorted([str(split), "val"])


def test_what_is_skipped(tmp_path):
    tree(tmp_path, "1.png", "notes.doc", "readme.md", "classes.json", ".hidden/2.png", ".3.png", "LICENSE")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    source = open_source(tmp_path)
    assert names(source) == ["1.png"]
    reasons = {skip["path"]: skip["reason"] for skip in source.skipped}
    assert reasons.keys() == {"notes.doc", "empty.jpg", "folder.jpg", "link.png"}
    assert reasons["notes.doc"] == "not an image"


def test_reading_what_has_gone_has_a_reason(tmp_path):
    source = open_source(tree(tmp_path, "1.png"))
    (tmp_path / "1.png").unlink()
    with pytest.raises(Unreadable, match="No such file"):
        source.read(0)


def test_damaged_member_of_an_archive(tmp_path):
    data = zipped(tree(tmp_path / "root", "1.png", "2.png"), tmp_path / "x.zip")
    content = bytearray(data.read_bytes())
    content[50] ^= 0xFF
    data.write_bytes(content)
    with pytest.raises(Unreadable):
        open_source(data).read(0)
    cut = tmp_path / "x.tar"
    shard(cut, {"1.png": picture(), "2.png": picture()})
    cut.write_bytes(cut.read_bytes()[: 512 + 20])  # in the middle of the first image
    with pytest.raises(Unreadable, match="truncated"):
        open_source(cut).read(0)


def test_input_errors(tmp_path):
    def fails(data: str | Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            open_source(data)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "none", "no such data")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no images: 0 files seen")
    fails(tree(tmp_path / "docs", "a.doc", "b.doc"), "2 files seen, the first: a.doc: not an image")
    for name in ("x.zip", "x.tar", "x.parquet", "x.bin"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        fails(tmp_path / name, "x")
    zipped(tree(tmp_path / "packed", "1.png"), tmp_path / "empty" / "in.zip")
    fails(tmp_path / "empty", "archive; give that instead")
    fails("hf:", "hf:NAME")
    fails("wds:" + str(tmp_path / "no-{00..01}.tar"), "no such shard")
    fails("wds:pipe:cat {0..1}.tar", "no commands are run")


def parquet(path: Path, images: list, *, labels: list | None = None, names: list[str] | None = None) -> Path:
    columns: dict = {"image": images}
    if labels is not None:
        columns["label"] = labels
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


def structs(*values: int, prefix: str = "") -> list[dict]:
    return [{"bytes": picture(v), "path": f"{prefix}{v}.png"} for v in values]


@pytest.mark.parametrize("in_memory", [True, False])
def test_parquet_folder(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(parquet_module, "IN_MEMORY", parquet_module.IN_MEMORY if in_memory else 1)
    kinds = {"labels": [1, 0, -1], "names": ["cat", "dog"]}
    parquet(tmp_path / "train-00000-of-00001.parquet", structs(1, 2, 3), **kinds)
    parquet(tmp_path / "data" / "validation.parquet", structs(4, 5, 6), **kinds)
    source = open_source(tmp_path)
    assert [(e.name, e.split, e.label) for e in source.entries if e.split == "train"] == [
        ("1.png", "train", 1),
        ("2.png", "train", 0),
        ("3.png", "train", None),
    ]
    assert len(names(source, "val")) == 3
    assert source.classes == ["cat", "dog"]
    for _ in range(2):  # the flat copy is used again
        source = pickle.loads(pickle.dumps(open_source(tmp_path)))
        found = {e.name: int(decode(source.read(i))[0, 0, 0]) for i, e in enumerate(source.entries)}
        assert found == {f"{n}.png": n for n in range(1, 7)}


def test_parquet_file_of_bytes_with_named_labels(tmp_path):
    file = parquet(tmp_path / "mine.parquet", [picture(1), picture(2), None], labels=["dog", "cat", "dog"])
    source = open_source(file)
    assert names(source) == ["mine/0", "mine/1", "mine/2"]
    assert [entry.label for entry in source.entries] == [1, 0, 1]
    assert source.classes == ["cat", "dog"]
    with pytest.raises(Unreadable, match="no image bytes"):
        source.read(2)


def test_parquet_with_repeated_paths_and_without_images(tmp_path):
    file = parquet(tmp_path / "a.parquet", structs(1, 1))
    assert names(open_source(file)) == ["a/0", "a/1"]
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="no image column"):
        open_source(tmp_path / "b.parquet")


def shard(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_shards(tmp_path):
    pytest.importorskip("braceexpand", reason="webdataset is not installed")
    for n in range(2):
        samples = {
            f"{n}{k}.{suffix}": data
            for k in range(3)
            for suffix, data in (("png", picture(10 * n + k)), ("cls", str(k % 2).encode()), ("mask.png", picture()))
        }
        shard(tmp_path / f"train-{n:02}.tar", samples)
    shard(tmp_path / "val-00.tar", {"x.jpg": picture(50, "JPEG"), "x.cls": b"1"})
    source = open_source(f"wds:{tmp_path}/train-{{00..01}}.tar")
    assert names(source)[0] == "train-00.tar/00.png"
    assert [entry.label for entry in source.entries] == [0, 1, 0] * 2
    assert [int(decode(source.read(i))[0, 0, 0]) for i in range(6)] == [0, 1, 2, 10, 11, 12]
    whole = open_source(f"wds:{tmp_path}/*.tar")
    assert [entry.split for entry in whole.entries] == ["train"] * 6 + ["val"]
    assert lists(labelled_indices(whole)) == (list(range(6)), [6])


def test_hugging_face_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    kinds = {"labels": [1, 0], "names": ["cat", "dog"]}
    parquet(tmp_path / "set" / "train.parquet", structs(1, 2), **kinds)
    parquet(tmp_path / "set" / "test.parquet", structs(3, 4), **kinds)
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert {entry.split for entry in source.entries} == {"train", "test"}
    assert source.classes == ["cat", "dog"]
    assert lists(labelled_indices(source)) == ([0, 1], [2, 3])
    assert [int(decode(source.read(i))[0, 0, 0]) for i in range(4)] == [1, 2, 3, 4]
    part = open_source(f"hf:{tmp_path / 'set'}:train[:1]")
    assert [(e.split, e.label) for e in part.entries] == [("train", 1)]
    with pytest.raises(InputError, match="cannot be loaded"):
        open_source(f"hf:{tmp_path / 'set'}:nosuch")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.setitem(__import__("sys").modules, "braceexpand", None)
    with pytest.raises(InputError, match=r"pip install underpaint\[hub\]"):
        open_source("hf:cifar10")
    with pytest.raises(InputError, match=r"pip install underpaint\[webdataset\]"):
        open_source("wds:x-{0..1}.tar")


PACKS = {  # file: images by split, classes
    "cifar10": ({"train": 50_000, "test": 10_000}, 10),
    "tiny-imagenet-100": ({"train": 40_000, "val": 5_000}, 100),
    "bccd/bccd.zip": ({"train": 205, "val": 87, "test": 72}, None),
    "camvid-480/camvid.zip": ({"train": 367, "val": 101, "test": 233}, None),
    "coco-mini/coco_mini.zip": ({"train": 228, "val": 100}, None),
    "demo-nuclei-128/nuclei128.zip": ({"train": 175, "val": 49}, None),
    "nuclei-384/nuclei.zip": ({"train": 532, "val": 132}, None),
}


@pytest.mark.seconds
@pytest.mark.parametrize("pack", list(PACKS))
def test_shared_packs(pack):
    if not (SHARED / pack).exists():
        pytest.skip(f"shared/data/{pack} is not on this machine")
    splits, classes = PACKS[pack]
    source = open_source(SHARED / pack)
    assert {split: len(names(source, split)) for split in splits} == splits
    assert len(source.entries) == sum(splits.values())
    assert (source.classes and len(source.classes)) == classes
    assert len(pretraining_indices(source)) == splits["train"]
    assert (labelled_indices(source) is None) == (classes is None)
    assert source.skipped == []
    assert decode(source.read(len(source.entries) - 1)).ndim == 3
    assert len(set(names(source))) == len(source.entries)


@pytest.mark.seconds
def test_a_source_of_ones_own_is_one_file_and_a_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As LMDB holds images; the standard library's database stands in for it."""
    import dbm.dumb

    import key_value_source

    monkeypatch.setitem(SOURCES, "lmdb", ("key_value_source:list_pairs", "lmdb:PATH"))
    monkeypatch.setattr(key_value_source, "opener", lambda path: dbm.dumb.open(path[:-4], "r"))  # noqa: SIM115
    with dbm.dumb.open(str(tmp_path / "pairs"), "n") as pairs:
        for file in sorted(pictures.rglob("*.png")):
            pairs[file.relative_to(pictures).as_posix()] = file.read_bytes()
    data = f"lmdb:{tmp_path / 'pairs.dir'}"
    source, folder = open_source(data), open_source(pictures)
    assert source.notes[0] == "LMDB: 90 images"
    assert source.classes == folder.classes
    mine, theirs = ({e.name: (e.label, s.read(k)) for k, e in enumerate(s.entries)} for s in (source, folder))
    assert mine == theirs
    again = pickle.loads(pickle.dumps(source))  # as workers get it
    assert again.read(3) == source.read(3)
    streamed = load_images(source, range(90), size=(8, 8), cache_limit=0.0)
    assert sum(len(batch.samples) for batch in eval_batches(streamed, size=(8, 8), workers=2)) == 90
    assert main(["check", data]) == 0
    assert "90 images" in capsys.readouterr().out
    assert main(["check", f"lmdb:{tmp_path / 'absent'}"]) == 2
    assert "no such database" in capsys.readouterr().err
