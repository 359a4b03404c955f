"""Annotations of somebody else, damaged or hostile: what is of no use is counted and named, and nothing is lost."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import made_picture

from underpaint.data import check, open_source
from underpaint.data.annotations import coco_annotations, masks_of
from underpaint.data.formats import read_labelme, read_voc, read_yolo
from underpaint.errors import InputError

pytestmark = pytest.mark.quick

BOX = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>9</xmax><ymax>12</ymax></bndbox>"
LAUGHS = '<!DOCTYPE a [<!ENTITY l "lol"><!ENTITY m "&l;&l;&l;&l;&l;&l;&l;&l;">]><annotation>&m;</annotation>'
FILE = (
    '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotation><object><name>&f;</name></object></annotation>'
)


XML = [LAUGHS, FILE, FILE.encode("utf-16").decode("latin-1"), "<annotation>", "<svg/>", "", "\0", "<a>" * 50_000]


@pytest.mark.parametrize("number", range(len(XML)))
def test_hostile_xml_is_refused(number: int) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=r"not xml|not of Pascal|document type|decode"):
        read_voc(XML[number].encode("latin-1"))
    assert time.process_time() - began < 1


def test_objects_of_no_use_are_named_and_the_others_stay() -> None:
    voc = f"<annotation><object><name>a</name>{BOX}</object><object><name>b</name></object><object>{BOX}</object></annotation>"
    found = read_voc(voc.encode())
    assert [one.box for one in found.objects] == [(2.0, 3.0, 9.0, 12.0)]
    assert len(found.unusable) == 2
    shapes = [
        {"label": "a", "points": [[1, 2], [8, 2], [8, 9]], "shape_type": "polygon"},
        {"label": "b", "points": [[4, 4], [4, 6]], "shape_type": "circle"},
        {"label": "c", "points": [[4, 4]], "shape_type": "point"},
        {"label": "d", "points": [[10**400, 1], [2, 2], [3, 3]]},
        {"label": "e", "points": "none"},
        {"points": [[1, 2], [8, 2], [8, 9]]},
        "a shape",
    ]
    labelme = read_labelme(json.dumps({"shapes": shapes}).encode())
    assert [one.name for one in labelme.objects] == ["a", "b"]
    assert labelme.objects[1].box == pytest.approx((2, 2, 6, 6))
    assert len(labelme.unusable) == 5
    yolo = read_yolo(
        b"0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2 0.9\n-1 0.5 0.5 0.2 0.2\n0 nan 0.5 0.1 0.1\n0 9e9 1 1 1\n0\n",
        (10, 20),
        ["x"],
    )
    assert [(one.name, one.box) for one in yolo.objects] == [("x", (8, 4, 12, 6)), ("1", (8, 4, 12, 6))]
    assert len(yolo.unusable) == 4


OTHER = [b"a caption", b"\xff\xfe", b"0 " * 1000, b"[" * 100_000, b'{"shapes": 1}', b"[]", b"null"]


@pytest.mark.parametrize("number", range(len(OTHER)))
def test_other_files_are_of_no_format(number: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_yolo(OTHER[number], (8, 8), [])
    with pytest.raises(ValueError, match=r"."):
        read_labelme(OTHER[number])


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        made_picture(np.random.default_rng(k), 0, 16).save(folder / f"{k}.jpg")
    return folder


def test_captions_and_other_json_beside_images_are_no_boxes(tmp_path: Path) -> None:
    pictures(tmp_path, 4)
    for k in range(4):
        (tmp_path / f"{k}.txt").write_text("a photograph of stripes\n")
        (tmp_path / f"{k}.json").write_text('{"exposure": 0.1}')
    found = check(tmp_path)
    assert "no boxes; expected" in found["boxes"]["reason"]
    assert found["tasks"]["detection"].startswith("no: needs boxes")


def test_a_few_damaged_files_leave_their_images_out(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 6)
    (tmp_path / "labels").mkdir()
    for k in range(6):
        (tmp_path / "labels" / f"{k}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "labels/1.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "images/2.jpg").write_bytes(b"no image")
    (tmp_path / "labels/3.txt").write_text("")  # an image of nothing
    (tmp_path / "data.yaml").write_text("names: [cat]\nmore: &a [1]\nagain: *a\n")  # aliases are not read
    found = coco_annotations(tmp_path, open_source(tmp_path))["all"]
    assert sorted(found.images) == [0, 3, 4, 5]
    assert len(found.coco["annotations"]) == 3
    assert found.categories == {1: "0"}
    assert any("1 files cannot be used, the first: labels/1.txt" in note for note in found.notes)


def test_a_file_for_an_image_of_another_size_is_not_used(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    for k in range(3):
        size = f"<size><width>16</width><height>{16 + 8 * (k == 1)}</height></size>"
        (tmp_path / f"{k}.xml").write_text(f"<annotation>{size}<object><name>a</name>{BOX}</object></annotation>")
    found = coco_annotations(tmp_path, open_source(tmp_path))["all"]
    assert sorted(found.images) == [0, 2]
    assert any("1.xml: is drawn on an image of 16x24, and the file is 16x16" in note for note in found.notes)


def test_boxes_are_drawn_on_the_image_as_it_is_shown(tmp_path: Path) -> None:
    """YOLO's shares are of the upright image, whose file is turned."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[274] = 6  # shown as 10 wide, 20 high
    picture.save(tmp_path / "images/a.jpg", exif=exif)
    (tmp_path / "labels/a.txt").write_text("0 0.25 0.25 0.5 0.5\n0 0.2 0.2 0.6 0.2 0.6 0.4\n")
    source = open_source(tmp_path)
    found = coco_annotations(tmp_path, source)["all"].objects(0)
    assert found.boxes.tolist() == [[0, 0, 5, 10], pytest.approx([2, 4, 6, 8])]
    with pytest.raises(InputError, match="no masks"):  # not all have an outline
        masks_of(tmp_path, source)
    (tmp_path / "labels/a.txt").write_text("0 0.2 0.2 0.6 0.2 0.6 0.4\n")
    assert masks_of(tmp_path, source)[0].shape == (20, 10)
