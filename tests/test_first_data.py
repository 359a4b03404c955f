"""Data as it lies in the first hour: masks beside images, boxes in the formats people have, what `check` says of both."""

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import made_picture
from forked import CommandLine
from PIL import Image
from scenes import write_scenes

from underpaint.data import check, open_source, pretraining_indices
from underpaint.data.annotations import coco_annotations, mask_of, masks_of

SHARED = Path(__file__).parents[2] / "shared" / "data"


def unpacked(pack: str, folder: Path) -> Path:
    (found,) = (SHARED / pack).glob("*.zip") if (SHARED / pack).is_dir() else [None]
    if found is None:
        pytest.skip(f"no ../shared/data/{pack}")
    with zipfile.ZipFile(found) as archive:
        archive.extractall(folder)
    (root,) = [each for each in folder.iterdir() if each.is_dir()]
    return root


def tiles(folder: Path, suffix: str = ".png", word: str = "") -> Path:
    """Tiles as of a factory: a folder a defect, Imgs/ in it, and in there images with black and white masks."""
    rng = np.random.default_rng(0)
    for defect in ("MT_Blowhole", "MT_Crack", "MT_Free"):
        place = folder / defect / "Imgs"
        place.mkdir(parents=True)
        for k in range(6):
            picture = np.asarray(made_picture(rng, 0)).copy()
            mask = np.zeros((32, 32), np.uint8)
            if defect != "MT_Free":
                mask[8:20, 4 + k : 20 + k] = 255
                picture[mask > 0] = (250, 30, 30)
            Image.fromarray(picture).save(place / f"exp{k}.jpg")
            Image.fromarray(mask).save(place / f"exp{k}{word}{suffix}")
    return folder


@pytest.mark.quick
@pytest.mark.parametrize(("suffix", "word"), [(".png", ""), (".PNG", "_mask"), (".bmp", "_gt"), (".jpg", "_label")])
def test_masks_beside_images_are_no_images_and_folders_above_are_classes(
    tmp_path: Path, suffix: str, word: str
) -> None:
    source = open_source(tiles(tmp_path / "tiles", suffix, word))
    assert source.classes == ["MT_Blowhole", "MT_Crack", "MT_Free"]
    assert len(source.entries) == 18
    assert all(name.endswith(".jpg") and "_label" not in name for name in source.entries.names)
    assert any("18 files" in note and "--set data.masks=images" in note for note in source.notes)
    masks = masks_of(source.location, source)
    assert len(masks.names) == 18
    assert masks.classes == ["background", "object"]
    counts = [int(masks[index].sum()) for index in sorted(masks.names)]
    assert all(abs(count - 12 * 16) < 20 for count in counts[:12])  # a JPEG blurs the border
    assert counts[12:] == [0] * 6
    assert len(open_source(source.location, masks="images").entries) == 36


@pytest.mark.quick
def test_the_same_in_an_archive(tmp_path: Path) -> None:
    tiles(tmp_path / "tiles")
    packed = shutil.make_archive(str(tmp_path / "tiles"), "zip", tmp_path / "tiles")
    assert len(open_source(packed).entries) == 18


@pytest.mark.quick
def test_photographs_of_one_name_are_images(tmp_path: Path) -> None:
    """The same picture saved twice, and two views of one thing, are no masks; nor is a drawing of few colours."""
    rng = np.random.default_rng(0)
    for k in range(8):
        picture = made_picture(rng, k % 3)
        picture.save(tmp_path / f"{k}.jpg")
        (picture if k % 2 else made_picture(rng, 1)).save(tmp_path / f"{k}.png")
        drawn = Image.fromarray(np.kron(rng.integers(0, 2, (4, 4, 3)) * 255, np.ones((8, 8, 1))).astype(np.uint8))
        drawn.save(tmp_path / f"drawn{k}.jpg", quality=95)
        drawn.save(tmp_path / f"drawn{k}.bmp")
    source = open_source(tmp_path)
    assert len(source.entries) == 32
    assert sum("0 of 8 that were looked at" in note for note in source.notes) == 2


@pytest.mark.quick
def test_a_mask_of_another_size_and_a_lone_mask_are_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made_picture(rng, 0).save(tmp_path / "a.jpg")
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    Image.new("L", (16, 16)).save(tmp_path / "b_mask.png")
    assert len(open_source(tmp_path).entries) == 3


@pytest.mark.quick
def test_masks_that_are_no_longer_black_and_white_are_named(tmp_path: Path) -> None:
    source = open_source(tiles(tmp_path))
    masks = masks_of(tmp_path, source)
    Image.fromarray(np.full((32, 32), 3, np.uint8)).save(tmp_path / masks.names[4])
    with pytest.raises(Exception, match=r"exp4\.png holds 3, and the others are black"):
        masks[4]


@pytest.mark.quick
def test_a_hundred_thousand_names_are_matched_in_a_second() -> None:
    import time

    from underpaint.data.sources.beside import beside, masks_beside

    names = sorted(f"a/{k % 100}/part{k:06d}.{suffix}" for k in range(50_000) for suffix in ("jpg", "png"))
    reads: list[str] = []

    def read(name: str) -> bytes:
        reads.append(name)
        made = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise) if name.endswith("jpg") else Image.new("L", (8, 8))
        image.save(made, "JPEG" if name.endswith("jpg") else "PNG")
        return made.getvalue()

    began = time.process_time()
    assert len(masks_beside(names, read, [])) == 50_000
    assert time.process_time() - began < 1
    assert len(reads) < 50
    assert beside([name for name in names if name.endswith("jpg")]) == []


# -- boxes -------------------------------------------------------------------------------------------------------------


def voc_of(coco: dict[str, Any], image: dict[str, Any]) -> str:
    names = {each["id"]: each["name"] for each in coco["categories"]}
    objects = ""
    for one in coco["annotations"]:
        if one["image_id"] == image["id"]:
            left, top, width, height = one["bbox"]
            corners = {"xmin": left + 1, "ymin": top + 1, "xmax": left + width, "ymax": top + height}
            box = "".join(f"<{name}>{value}</{name}>" for name, value in corners.items())
            objects += f"<object><name>{names[one['category_id']]}</name><bndbox>{box}</bndbox></object>"
    size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
    return f'<?xml version="1.0" encoding="UTF-8"?><annotation>{size}{objects}</annotation>'


def yolo_of(coco: dict[str, Any], image: dict[str, Any]) -> str:
    order = [each["id"] for each in coco["categories"]]
    lines = []
    for one in coco["annotations"]:
        if one["image_id"] == image["id"]:
            left, top, width, height = one["bbox"]
            shares = np.array([left + width / 2, top + height / 2, width, height]).reshape(2, 2)
            values = (shares / [image["width"], image["height"]]).reshape(-1)
            if one.get("segmentation") and isinstance(one["segmentation"], list):
                values = (np.array(one["segmentation"][0]).reshape(-1, 2) / [image["width"], image["height"]]).reshape(
                    -1
                )
            lines.append(f"{order.index(one['category_id'])} " + " ".join(f"{value:.8f}" for value in values))
    return "\n".join(lines)


def labelme_of(coco: dict[str, Any], image: dict[str, Any]) -> str:
    names = {each["id"]: each["name"] for each in coco["categories"]}
    shapes = []
    for one in coco["annotations"]:
        if one["image_id"] == image["id"]:
            label = names[one["category_id"]]
            if one.get("segmentation") and isinstance(one["segmentation"], list):
                points, kind = np.array(one["segmentation"][0]).reshape(-1, 2).tolist(), "polygon"
            else:
                left, top, width, height = one["bbox"]
                points, kind = [[left + width, top], [left, top + height]], "rectangle"
            shapes.append({"label": label, "points": points, "shape_type": kind})
    sizes = {"imageHeight": image["height"], "imageWidth": image["width"], "imageData": None}
    return json.dumps({"version": "5.4.1", "shapes": shapes, "imagePath": image["file_name"], **sizes})


def convert(root: Path, kind: str, out: Path, outlined: int | None = None) -> dict[str, Any]:
    """A set with COCO annotations in another format, in the folders that it is used to; the COCO files by split. Of some
    that have outlines, the first ones."""
    cocos = {}
    for file in sorted((root / "annotations").glob("*.json")):
        split, coco = file.stem.removeprefix("instances_"), json.loads(file.read_text())
        if outlined:
            some = {one["image_id"] for one in coco["annotations"] if isinstance(one["segmentation"], list)}
            coco["images"] = [image for image in coco["images"] if image["id"] in some][:outlined]
        cocos[split] = coco
        for image in coco["images"]:
            (found,) = [p for p in root.rglob(Path(image["file_name"]).name) if "masks" not in p.parts]
            stem = found.stem
            places = {
                "voc": (f"{split}/JPEGImages/{found.name}", f"{split}/Annotations/{stem}.xml", voc_of),
                "yolo": (f"images/{split}/{found.name}", f"labels/{split}/{stem}.txt", yolo_of),
                "labelme": (f"{split}/{found.name}", f"{split}/{stem}.json", labelme_of),
            }
            picture, text, write = places[kind]
            for place in (picture, text):
                (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, out / picture)
            (out / text).write_text(write(coco, image))
    if kind == "yolo":
        names = [each["name"] for each in cocos["train"]["categories"]]
        (out / "data.yaml").write_text(f"train: images/train\nval: images/val\nnc: {len(names)}\nnames: {names}\n")
    return cocos


@pytest.fixture(scope="module")
def bccd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("bccd", tmp_path_factory.mktemp("bccd"))


@pytest.fixture(scope="module")
def coco_mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("coco-mini", tmp_path_factory.mktemp("coco"))


@pytest.mark.parametrize("kind", ["voc", "yolo", "labelme"])
def test_real_boxes_mean_the_same_in_every_format(kind: str, bccd: Path, tmp_path: Path) -> None:
    cocos = convert(bccd, kind, tmp_path)
    source = open_source(tmp_path)
    got = coco_annotations(tmp_path, source)
    assert set(got) == set(cocos)
    for split, coco in cocos.items():
        names = {image["id"]: Path(image["file_name"]).name for image in coco["images"]}
        classes = {each["id"]: each["name"] for each in coco["categories"]}
        wanted = Counter(names[one["image_id"]] + " " + classes[one["category_id"]] for one in coco["annotations"])
        boxes = {
            name: sorted(one["bbox"] for one in coco["annotations"] if names[one["image_id"]] == name)
            for name in names.values()
        }
        assert len(got[split].images) == len(names)
        found: Counter[str] = Counter()
        for index in got[split].images:
            name, objects = Path(source.entries.names[index]).name, got[split].objects(index)
            found.update(f"{name} {got[split].categories[label]}" for label in objects.labels.tolist())
            sides = np.concatenate([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]], axis=1)
            sides = sides[np.lexsort(sides.round(2).T[::-1])]
            assert np.abs(sides - np.array(sorted(boxes[name]))).max() < 0.01
        assert found == wanted


@pytest.mark.parametrize("kind", ["yolo", "labelme"])
def test_outlines_mean_the_same_in_every_format(kind: str, coco_mini: Path, tmp_path: Path) -> None:
    cocos = convert(coco_mini, kind, tmp_path, 8)
    source = open_source(tmp_path)
    got = coco_annotations(tmp_path, source)
    compared = 0
    for split, coco in cocos.items():
        sizes = {image["id"]: image for image in coco["images"]}
        for one in coco["annotations"]:
            if one["image_id"] not in sizes or not isinstance(one.get("segmentation"), list) or compared == 20:
                continue
            image = sizes[one["image_id"]]
            index = next(
                k for k in got[split].images if source.entries.names[k].endswith(Path(image["file_name"]).name)
            )
            size = (image["height"], image["width"])
            wanted = mask_of([one["segmentation"][0]], *size)
            masks = [mask_of(s, *size) for s in got[split].objects(index).segments if s is not None]
            overlap = max((wanted & mask).sum() / max(1, (wanted | mask).sum()) for mask in masks)
            assert overlap > 0.97 or wanted.sum() < 40
            compared += 1
    assert compared == 20


def scene_polygons(root: Path) -> None:
    """Give the objects of scenes outlines of four corners in place of run lengths."""
    for file in (root / "annotations").glob("*.json"):
        coco = json.loads(file.read_text())
        for one in coco["annotations"]:
            left, top, width, height = one["bbox"]
            right, bottom = left + width, top + height
            one["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
        file.write_text(json.dumps(coco))


ENCODER = "timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def encoder(server: CommandLine, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, two steps long."""
    out = tmp_path_factory.mktemp("run") / "run"
    small = [f"--set=encoder.{name}={value}" for name, value in (("embed_dim", 16), ("depth", 2), ("num_heads", 2))]
    ended = server(
        *("pretrain", pictures, "--out", out, "--method", "mae", "--encoder", "vit_tiny_patch16_224", *small),
        *("--image-size", 32, "--patch-size", 8, "--steps", 2, "--batch-size", 8),
    )
    assert ended.status == 0, ended.error
    return out


@pytest.mark.parametrize(
    ("kind", "tasks"), [("voc", "detect"), ("yolo", "segment,detect"), ("labelme", "segment,detect")]
)
def test_every_format_is_evaluated_to_its_end(
    server: CommandLine, encoder: Path, kind: str, tasks: str, tmp_path: Path
) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=4, test=2, size=(32, 32))
    scene_polygons(scenes)
    convert(scenes, kind, tmp_path / "data")
    ended = server("check", tmp_path / "data", "--out", tmp_path / "checked")
    assert ended.status == 0, ended.error
    command = next(line for line in ended.out.splitlines() if line.startswith("  detection: underpaint evaluate"))
    assert command.endswith("--task detect")
    assert ("segmentation: no" in ended.out) == (kind == "voc")
    with Image.open(tmp_path / "checked/annotated.png") as sheet:
        assert sheet.width > 256
    settings = ["--set", "steps=1", "--set", "batch_size=2", "--set", "channels=8"]
    out = tmp_path / "worth"
    ended = server(
        *("evaluate", encoder, "--data", tmp_path / "data", "--out", out, "--task", tasks, "--image-size", 32),
        *settings,
    )
    assert ended.status == 0, ended.error + ended.out
    results = json.loads((out / "results.json").read_text())["tasks"]
    assert set(results) == set(tasks.split(","))
    assert results["detect"]["train"] == 4
    assert results["detect"]["names"] == ["disc", "square"]


def test_masks_beside_images_are_evaluated_to_their_end(server: CommandLine, encoder: Path, tmp_path: Path) -> None:
    data = tiles(tmp_path / "tiles")
    ended = server("check", data, "--out", tmp_path / "checked")
    assert ended.status == 0, ended.error
    assert "segmentation: underpaint evaluate" in ended.out
    assert "classification: underpaint evaluate" in ended.out
    assert "object: 1" in ended.out  # a share of the pixels
    found = json.loads((tmp_path / "checked/check.json").read_text())
    assert (found["images"], found["masks"]["images"]) == (18, 18)
    ended = server(
        *("evaluate", encoder, "--data", data, "--out", tmp_path / "worth", "--task", "segment", "--image-size", 32),
        *("--set", "steps=1", "--set", "batch_size=2", "--set", "channels=8"),
    )
    assert ended.status == 0, ended.error + ended.out
    results = json.loads((tmp_path / "worth/results.json").read_text())["tasks"]["segment"]
    assert results["names"] == ["background", "object"]


# -- check -------------------------------------------------------------------------------------------------------------


def test_check_needs_no_torch_and_takes_seconds(bccd: Path) -> None:
    asked = "import sys; from underpaint.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", asked, "check", bccd], capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines()[-1] == "False"
    assert "boxes: COCO json, 4,886 objects on 364 images" in ended.stdout
    # two frames of one smear, on either side of the split
    assert "look alike: 1 groups, 1 of them across splits" in ended.stdout


@pytest.mark.quick
@pytest.mark.parametrize("form", ["roboflow", "cvat", "label studio"])
def test_coco_json_lies_where_other_tools_write_it(form: str, tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=4, test=2, size=(32, 32))
    wanted = coco_annotations(scenes, open_source(scenes))
    data = tmp_path / "data"
    for split in ("train", "val"):
        text = (scenes / f"annotations/{split}.json").read_text()
        coco = json.loads(text)
        for image in coco["images"]:
            image["file_name"] = Path(image["file_name"]).name
        folder = {"train": "train/", "val": "valid/"}[split]
        place, images = {
            "roboflow": (f"{folder}_annotations.coco.json", folder),
            "cvat": ("annotations/instances_default.json", "images/"),
            "label studio": ("result.json", "images/"),
        }[form]
        if form != "roboflow" and split == "val":
            continue
        (data / place).parent.mkdir(parents=True, exist_ok=True)
        (data / images).mkdir(parents=True, exist_ok=True)
        (data / place).write_text(json.dumps(coco))
        for image in coco["images"]:
            shutil.copy(next((scenes / "images" / split).glob(image["file_name"])), data / images / image["file_name"])
    found = coco_annotations(data, open_source(data))
    assert set(found) == ({"train", "val"} if form == "roboflow" else {"all"})
    for split, each in found.items():
        other = wanted["train" if split == "all" else split]
        assert len(each.images) == len(other.images)
        assert len(each.coco["annotations"]) == len(other.coco["annotations"])


@pytest.mark.quick
def test_boxes_outside_and_objects_of_no_use_are_counted(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=4, test=2, size=(32, 32))
    convert(scenes, "yolo", tmp_path / "data")
    text = tmp_path / "data/labels/train"
    first, second, *_ = sorted(text.iterdir())
    first.write_text("0 0.95 0.5 0.4 0.2\n1 0.5 0.5 0.2 0.2\n")
    second.write_text("0 0.5 0.5 0.2\n1 nan 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2\n")
    boxes = check(tmp_path / "data")["boxes"]
    assert boxes["outside"] == 1
    assert any("2 objects cannot be used, the first: labels/train" in note for note in boxes["notes"])
    assert set(boxes["classes"]) == {"disc", "square"}
    coco = json.loads((scenes / "annotations/train.json").read_text())
    coco["annotations"][0]["bbox"] = [20, 10, 30, 5]
    (scenes / "annotations/train.json").write_text(json.dumps(coco))
    assert check(scenes)["boxes"]["outside"] == 1


def test_near_duplicates_are_left_out_of_pretraining(server: CommandLine, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for k in range(count):
            (tmp_path / "data" / split / f"class{k % 2}").mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (7, 8, 3), dtype=np.uint8))
            made = noise.resize((32, 32), Image.Resampling.BICUBIC)
            made.save(tmp_path / "data" / split / f"class{k % 2}" / f"{split}{k}.png")
    one = Image.open(tmp_path / "data/train/class0/train0.png")
    one.save(tmp_path / "data/train/class0/again.jpg", quality=95)
    two = Image.open(tmp_path / "data/train/class1/train1.png")
    two.resize((64, 64)).save(tmp_path / "data/val/class1/larger.jpg", quality=95)
    ended = server("check", tmp_path / "data", "--out", tmp_path / "checked")
    assert "look alike: 2 groups, 1 of them across splits" in ended.out
    with Image.open(tmp_path / "checked/alike.png") as sheet:
        assert sheet.height > 256
    with (tmp_path / "checked/alike.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == ["train", "val", "train", "train"]  # what lies across splits comes first
    small = [f"--set=encoder.{name}={value}" for name, value in (("embed_dim", 16), ("depth", 2), ("num_heads", 2))]
    ended = server(
        *("pretrain", tmp_path / "data", "--out", tmp_path / "run", "--method", "mae", *small, "--drop-duplicates"),
        *("--encoder", "vit_tiny_patch16_224", "--image-size", 32, "--patch-size", 8, "--steps", 1, "--batch-size", 4),
    )
    assert ended.status == 0, ended.error
    assert "--drop-duplicates: 2 of 9 images look like another and are left out" in ended.out
    assert "7 images to pretrain on" in ended.out
    assert len(pretraining_indices(open_source(tmp_path / "data"))) == 9
