"""Classes, numbers and splits from tables and lists beside images."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import made_picture, write_pictures
from forked import CommandLine

from underpaint.data import check, open_source
from underpaint.data.sources import folder as folder_module
from underpaint.data.sources import stored
from underpaint.errors import InputError

NAMES = [f"{k:02d}.png" for k in range(6)]


def images(folder: Path, names: list[str] = NAMES) -> Path:
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        made_picture(np.random.default_rng(k), 0, 8).save(folder / name)
    return folder


def said(data: Path) -> dict[str, tuple[str | None, str | None, float | None]]:
    source = open_source(data)
    return {
        entry.name: (entry.split, None if entry.label is None else (source.classes or [])[entry.label], entry.number)
        for entry in source.entries
    }


ROWS = [{"path": name, "label": ["cat", "dog"][k % 2], "weight": k + 0.5} for k, name in enumerate(NAMES)]


def write_table(file: Path, rows: list[dict[str, Any]]) -> Path:
    separator = "\t" if file.suffix == ".tsv" else ","
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
        file.write_text("\n".join(lines))
    return file


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["labels.csv", "labels.tsv", "metadata.jsonl", "metadata.parquet"])
def test_a_table_beside_images_names_classes_and_numbers(tmp_path: Path, kind: str) -> None:
    table = write_table(images(tmp_path) / kind, ROWS[:4])
    found = said(tmp_path)
    assert [found[name][1] for name in NAMES] == ["cat", "dog", "cat", "dog", None, None]
    assert [found[name][2] for name in NAMES] == [0.5, 1.5, 2.5, 3.5, None, None]
    assert any("4 images by a table" in note for note in open_source(tmp_path).notes)
    assert list(said(table)) == NAMES[:4]  # as DATA, it is those that it names
    assert said(table)[NAMES[1]] == (None, "dog", 1.5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("labels", "wanted", "number"),
    [
        ([3, 10, 3, 10, 3, 10], ["3", "10"], False),
        (["cat|dog", "cat", "dog", "", "cat;dog", "cat"], ["cat", "dog"], False),
        ([1.5, 2, 3, 4, 5, 6], None, True),
        ([10, 20, 30, 40, 50, 60], None, True),
    ],
)
def test_what_a_label_may_be(tmp_path: Path, labels: list[Any], wanted: list[str] | None, number: bool) -> None:
    images(tmp_path)
    rows = [{"file_name": name, "label": label} for name, label in zip(NAMES, labels, strict=True)]
    write_table(tmp_path / "labels.csv", rows)
    source = open_source(tmp_path)
    assert source.classes == wanted
    assert (source.number == "label") == number
    if "cat|dog" in labels:
        (note,) = [note for note in source.notes if "several labels" in note]
        assert "2 classes (cat 4, dog 3)" in note
        assert "the 3 images with exactly one label" in note


@pytest.mark.quick
def test_columns_of_yes_and_no_are_several_labels(tmp_path: Path) -> None:
    images(tmp_path)
    rows = [{"image": name, "cat": k % 2, "dog": k % 3 // 2} for k, name in enumerate(NAMES)]
    write_table(tmp_path / "labels.csv", rows)
    found = said(tmp_path)
    assert [found[name][1] for name in NAMES] == [None, "cat", "dog", "cat", None, None]


@pytest.mark.quick
def test_lists_of_imagenet_and_of_voc(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    images(folder, [f"train/{wnid}/images/{k}.JPEG" for wnid in ("n01443537", "n01629819") for k in range(2)])
    images(folder, ["val/images/val_0.JPEG", "val/images/val_1.JPEG"])
    (folder / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn01629819\t0\t1\t2\t3\nval_1.JPEG\tn01443537\t0\t1\t2\t3\n"
    )
    (folder / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n")
    found = said(folder)
    assert found["val/images/val_0.JPEG"][:2] == ("val", "European fire salamander (n01629819)")
    assert found["train/n01443537/images/1.JPEG"][:2] == ("train", "goldfish (n01443537)")
    voc = images(tmp_path / "voc", [f"VOC2007/JPEGImages/{k:06d}.jpg" for k in range(4)])
    (voc / "VOC2007/ImageSets/Main").mkdir(parents=True)
    (voc / "VOC2007/ImageSets/Main/train.txt").write_text("000000\n000001\n")
    (voc / "VOC2007/ImageSets/Main/val.txt").write_text("000002\n")
    (voc / "VOC2007/ImageSets/Main/cat_train.txt").write_text("000000 -1\n000001  1\n")
    assert [split for split, _, _ in said(voc).values()] == ["train", "train", "val", None]


@pytest.mark.quick
def test_other_tables_are_left_alone(tmp_path: Path) -> None:
    write_pictures(tmp_path, 6)
    (tmp_path / "data.csv").write_text("name,label\nsomebody,1\nelse,2\n")
    (tmp_path / "train.txt").write_text("epoch 1\nepoch 2\n")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    source = open_source(tmp_path)
    assert source.classes == ["class0", "class1", "class2"]
    assert len(source.notes) == 4  # nothing of the tables


HOSTILE = [b"\xff\xfe\x00", b"PAR1 and no more PAR1", b"[" * 100_000, b"{}\n1\n", b"path,label\n../../etc/passwd,x\n"]


@pytest.mark.quick
@pytest.mark.parametrize("number", range(len(HOSTILE)))
@pytest.mark.parametrize("kind", ["data.csv", "data.jsonl", "data.parquet"])
def test_a_hostile_table_is_one_line(tmp_path: Path, kind: str, number: int) -> None:
    images(tmp_path)
    (tmp_path / kind).write_bytes(HOSTILE[number])
    assert len(open_source(tmp_path).entries) == 6
    with pytest.raises(InputError) as raised:
        open_source(tmp_path / kind)
    assert "\n" not in str(raised.value)


@pytest.mark.quick
def test_a_stored_listing_sees_that_a_table_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "LISTED_ANEW", 1)
    monkeypatch.setattr(stored, "SETTLED", 0)
    table = write_table(images(tmp_path) / "train.tsv", ROWS)
    assert said(tmp_path)[NAMES[0]][1] == "cat"
    assert stored.stored_at(tmp_path).is_file()
    time.sleep(0.01)
    table.write_text(table.read_text().replace("cat", "cow"))
    assert said(tmp_path)[NAMES[0]][1] == "cow"


@pytest.mark.quick
@pytest.mark.parametrize("column", ["fine_label", "labels"])
def test_columns_of_hugging_face_have_names(tmp_path: Path, column: str) -> None:
    pictures = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(images(tmp_path / "a").iterdir())]
    names: dict[str, Any] = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    values: list[Any] = [k % 2 for k in range(6)]
    if column == "labels":  # several an image
        names, values = {"_type": "Sequence", "feature": names}, [[0], [1], [0, 1], [], [1], [0]]
    table = pa.table({"image": pictures, column: values})
    metadata = {"huggingface": json.dumps({"info": {"features": {column: names}}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "train.parquet")
    source = open_source(tmp_path / "train.parquet")
    assert source.classes == ["cat", "dog"]
    wanted = [0, 1, 0, 1, 0, 1] if column == "fine_label" else [0, 1, None, None, 1, 0]
    assert [entry.label for entry in source.entries] == wanted


def test_a_table_is_evaluated_to_its_end(server: CommandLine, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 24)
    found = sorted((tmp_path / "pictures").rglob("*.png"))
    rows = [
        {"path": file.relative_to(tmp_path).as_posix(), "label": "ab"[k % 2], "brightness": k / 10}
        for k, file in enumerate(found)
    ]
    table = write_table(tmp_path / "mine.jsonl", rows)
    tasks = check(table)["tasks"]
    assert tasks["classification"].endswith("--task knn,linear")
    assert tasks["regression"].endswith("--task regression")
    ended = server(
        *("evaluate", "timm:test_vit", "--data", table, "--task", "knn,regression", "--image-size", 32),
        *("--untrained", "--out", tmp_path / "worth"),
    )
    assert ended.status == 0, ended.error
    results = json.loads((tmp_path / "worth/results.json").read_text())["tasks"]
    assert results["knn"]["classes"] == 2
    assert results["regression"]["train"] > 0
