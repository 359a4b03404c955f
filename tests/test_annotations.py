"""Masks and boxes belong to the images that they were drawn on, and lie on them as these are decoded."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from scenes import box_of, counts_of

from underpaint.data import decode, open_source
from underpaint.data.annotations import coco_annotations, mask_of, masks_of
from underpaint.errors import InputError

pytestmark = pytest.mark.quick


def written(root: Path, files: dict[str, int]) -> Path:
    """Pictures and masks of 6x8 px: the number fills a mask, and is the red of a picture."""
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "L" if {"masks", "semantic", "labels"} & {part.lower() for part in path.parts} else "RGB"
        Image.new(kind, (8, 6), value if kind == "L" else (value, 0, 0)).save(path)
    return root


def pairs_of(root: Path) -> dict[str, str]:
    """The mask of each image; asserts that picture and mask have the same number."""
    source = open_source(root)
    masks = masks_of(root, source)
    for index in masks.names:
        red = {int(value) for value in np.unique(decode(source.read(index))[..., 0])}
        assert red == {int(value) for value in np.unique(masks[index])}, (
            source.entries[index].name,
            masks.names[index],
        )
    return {source.entries[index].name: name for index, name in masks.names.items()}


# -- masks and their images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "places",
    [
        ("{}/images/0001.png", "{}/masks/0001.png"),
        ("images/{}/0001.png", "masks/{}/0001.png"),
        ("{}/images/0001.png", "masks/{}/0001.png"),
        ("set/images/{}/0001.png", "set/{}/masks/0001.png"),
        ("{}/0001.png", "masks/{}/0001.png"),
        ("{}/0001.png", "{}/masks/0001.png"),
        ("images/train/{}/0001.png", "masks/{}/0001.png"),
        ("images/{}/0001.png", "masks/valid/{}/0001.png"),
        ("{}/images/site/0001.png", "{}/masks/0001.png"),
    ],
)
@pytest.mark.parametrize("folders", [("train", "val"), ("patient1", "patient2")])
def test_equal_names_in_several_folders_have_their_own_masks(
    tmp_path: Path, places: tuple[str, str], folders: tuple[str, str]
) -> None:
    if folders[0] == "train" and ("train/" in places[0] or "valid/" in places[1]):
        folders = ("siteA", "siteB")
    written(tmp_path, {place.format(folder): 1 + n for n, folder in enumerate(folders) for place in places})
    assert pairs_of(tmp_path) == {places[0].format(folder): places[1].format(folder) for folder in folders}


def test_split_folders_on_one_side_only_do_not_matter(tmp_path: Path) -> None:
    one = written(
        tmp_path / "one", {"images/train/a.png": 1, "images/val/b.png": 2, "masks/a.png": 1, "masks/b.png": 2}
    )
    assert pairs_of(one) == {"images/train/a.png": "masks/a.png", "images/val/b.png": "masks/b.png"}
    two = written(
        tmp_path / "two", {"images/a.png": 1, "images/b.png": 2, "masks/train/a.png": 1, "masks/val/b.png": 2}
    )
    assert pairs_of(two) == {"images/a.png": "masks/train/a.png", "images/b.png": "masks/val/b.png"}


def test_a_mask_of_another_folder_is_no_answer(tmp_path: Path) -> None:
    files = {"train/images/1.png": 1, "train/masks/1.png": 1, "val/images/1.png": 2, "p1/images/9.png": 4}
    written(tmp_path, {**files, "p2/masks/9.png": 5})
    assert pairs_of(tmp_path) == {"train/images/1.png": "train/masks/1.png"}


@pytest.mark.parametrize(
    ("files", "both"),
    [
        (("images/train/1.png", "images/val/1.png", "masks/1.png"), ("images/train/1.png", "images/val/1.png")),
        (("images/1.png", "masks/p1/1.png", "masks/p2/1.png"), ("masks/p1/1.png", "masks/p2/1.png")),
        (("images/1.png", "masks/1.png", "masks/1.bmp"), ("masks/1.bmp", "masks/1.png")),
        (("train/images/1.png", "train/masks/1.png", "masks/train/1.png"), ("train/masks/1.png", "masks/train/1.png")),
    ],
)
def test_what_is_ambiguous_is_refused_with_both_paths(
    tmp_path: Path, files: tuple[str, ...], both: tuple[str, str]
) -> None:
    written(tmp_path, dict.fromkeys(files, 1))
    with pytest.raises(InputError) as caught:
        masks_of(tmp_path, open_source(tmp_path))
    assert all(name in str(caught.value) for name in both)
    assert "\n" not in str(caught.value)


def test_one_kind_of_masks_is_read_and_the_other_named(tmp_path: Path) -> None:
    written(tmp_path, {"images/1.png": 1, "labels/1.png": 2, "masks/1.png": 1})
    assert pairs_of(tmp_path) == {"images/1.png": "masks/1.png"}
    (note,) = masks_of(tmp_path, open_source(tmp_path)).notes
    assert "masks/" in note
    assert "labels/" in note


def test_masks_behind_a_link_are_found(tmp_path: Path) -> None:
    written(tmp_path / "store", {"images/1.png": 3, "masks/1.png": 3})
    (tmp_path / "data").mkdir()
    for place in ("images", "masks"):
        (tmp_path / "data" / place).symlink_to(tmp_path / "store" / place)
    assert pairs_of(tmp_path / "data") == {"images/1.png": "masks/1.png"}


# -- kinds of masks ----------------------------------------------------------------------------------------------------


def test_wide_palette_one_bit_and_empty_masks_are_whole_numbers(tmp_path: Path) -> None:
    wide = (np.arange(48).reshape(6, 8) * 700).astype(np.uint16)
    small = (np.arange(48).reshape(6, 8) % 5).astype(np.uint8)
    (tmp_path / "masks").mkdir()
    palette = Image.fromarray(small, "L").convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9, 9, 9, 9])  # two colours alike, the numbers not
    palette.putdata(small.reshape(-1).tolist())
    kinds = {"wide.png": wide, "palette.png": small, "bit.png": small > 2, "empty.png": small * 0}
    kinds |= {"big.tif": wide, "little.tif": wide, "long.tif": wide.astype(np.int32)}
    kinds |= {"white0.tif": small, "white0bit.tif": small > 2, "white0wide.tif": wide}
    for name, values in kinds.items():
        if name.endswith(".tif"):
            byteorder, photometric = (
                ">" if name == "big.tif" else "<",
                "miniswhite" if "white" in name else "minisblack",
            )
            tifffile.imwrite(tmp_path / "masks" / name, values, byteorder=byteorder, photometric=photometric)
        else:
            (palette if name == "palette.png" else Image.fromarray(values)).save(tmp_path / "masks" / name)
        written(tmp_path, {f"images/{Path(name).stem}.png": 1})
    source = open_source(tmp_path)
    masks = masks_of(tmp_path, source)
    assert len(masks.names) == len(kinds)
    for index, name in masks.names.items():
        assert np.array_equal(masks[index], kinds[Path(name).name]), name
        assert masks[index].dtype == np.int64


@pytest.mark.parametrize(("content", "said"), [(b"", "cannot be read"), (b"RGB", "is RGB, not an index mask")])
def test_what_is_no_index_mask_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    written(tmp_path, {"images/1.png": 1, "masks/1.png": 1})
    if content:
        Image.new("RGB", (8, 6), "red").save(tmp_path / "masks/1.png")
    else:
        (tmp_path / "masks/1.png").write_bytes((tmp_path / "masks/1.png").read_bytes()[:40])
    masks = masks_of(tmp_path, open_source(tmp_path))
    with pytest.raises(InputError, match=rf"masks/1.png {said}"):
        masks[0]


# -- EXIF orientation ------------------------------------------------------------------------------------------------


def stored_mask(seed: int, size: tuple[int, int]) -> np.ndarray:
    """[height, width] of 0, and a lopsided L of 1, at places that differ with the seed."""
    mask = np.zeros(size, np.uint8)
    top, left = 2 + seed % 3, 3 + seed % 4
    mask[top : top + 9, left : left + 4] = 1
    mask[top : top + 3, left : left + 11] = 1
    return mask


POLYGON = [(0, 0), (11, 0), (11, 3), (4, 3), (4, 9), (0, 9)]  # of that L, from its corner


def turned_by_pil(array: np.ndarray, orientation: int) -> np.ndarray:
    """As PIL's ImageOps.exif_transpose turns it."""
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", exif=exif)
    return np.array(ImageOps.exif_transpose(Image.open(buffer)))


def write_turned(
    folder: Path, *, size: tuple[int, int], drawn: str, sizes: bool = True, orientations: Any = range(1, 9)
) -> dict[str, np.ndarray]:
    """Images with an EXIF orientation, masks, and COCO json with a polygon, both run lengths and none.

    Args:
        drawn: "stored", on the pixels as they lie in the file, or "shown", on the turned image.
        sizes: whether the json says sizes.

    Returns:
        What masks must be, by name of the image.
    """
    from faster_coco_eval import mask as coding

    expected, images, annotations = {}, [], []
    for place in ("images", "masks", "annotations"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for orientation in orientations:
        mask = stored_mask(orientation, size)
        name = f"o{orientation}"
        exif = Image.Exif()
        exif[274] = orientation
        picture = np.repeat(mask[..., None] * 200, 3, 2)
        file = f"{name}.{('png', 'jpg', 'tif')[orientation % 3]}"
        if file.endswith("tif"):
            tag = [(274, 3, 1, orientation, True)]
            tifffile.imwrite(folder / "images" / file, picture, photometric="rgb", extratags=tag)
        else:
            Image.fromarray(picture).save(folder / "images" / file, exif=exif, quality=100, subsampling=0)
        expected[name] = turned_by_pil(mask, orientation)
        own = mask if drawn == "stored" else expected[name]
        Image.fromarray(own).save(folder / f"masks/{name}.png")
        top, left = 2 + orientation % 3, 3 + orientation % 4
        points = np.array([(left + x, top + y) for x, y in POLYGON], float)
        if drawn == "shown":  # the same corners, found again on the turned image
            rows, columns = (np.arange(n + 1) for n in size)
            grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).astype(np.uint8)
            turned = [turned_by_pil(grid[..., k], orientation) for k in (0, 1)]
            places = [np.argwhere((turned[0] == y) & (turned[1] == x))[0] for x, y in points]
            points = np.array([(x, y) for y, x in places], float)
        packed = coding.encode(np.asfortranarray(own))
        forms = [
            [points.reshape(-1).tolist()],
            {"size": list(own.shape), "counts": counts_of(own > 0)},
            {"size": list(own.shape), "counts": packed["counts"].decode()},
            None,
        ]
        image: dict[str, Any] = {"id": orientation, "file_name": file}
        images.append(image | ({"height": own.shape[0], "width": own.shape[1]} if sizes else {}))
        annotations += [
            {
                "id": 10 * orientation + k,
                "image_id": orientation,
                "category_id": 1,
                "bbox": box_of(own > 0),
                "iscrowd": 0,
            }
            | ({"segmentation": form} if form else {})
            for k, form in enumerate(forms)
        ]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "L"}]}
    (folder / "annotations/train.json").write_text(json.dumps(coco))
    return expected


def agrees(folder: Path, expected: dict[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """Asserts that pictures, masks, boxes, polygons and run lengths lie on each other; returns the notes."""
    source = open_source(folder)
    masks, boxes = masks_of(folder, source), coco_annotations(folder, source)["train"]
    sizes = {image["id"]: (image["height"], image["width"]) for image in boxes.coco["images"]}
    for index, entry in enumerate(source.entries):
        want = expected[Path(entry.name).stem]
        seen = decode(source.read(index))[..., 0] > 100
        assert np.array_equal(seen, want > 0)
        assert np.array_equal(masks[index], want), entry.name
        assert sizes[boxes.images[index]] == want.shape
        found = boxes.objects(index)
        left, top, width, height = box_of(want > 0)
        assert np.allclose(found.boxes, [[left, top, left + width, top + height]] * 4), entry.name
        polygon, *lengths = (mask_of(s, *want.shape) for s in found.segments if s is not None)
        assert all(np.array_equal(one, want) for one in lengths), entry.name
        assert np.array_equal(polygon, want), entry.name
    return masks.notes, boxes.notes


@pytest.mark.parametrize(("size", "drawn"), [((20, 28), "stored"), ((20, 28), "shown"), ((24, 24), "stored")])
def test_masks_boxes_and_segments_turn_with_their_image_as_pil_turns_it(
    tmp_path: Path, size: tuple[int, int], drawn: str
) -> None:
    expected = write_turned(tmp_path, size=size, drawn=drawn)
    for notes in agrees(tmp_path, expected):
        (note,) = notes
        assert "7 images have an EXIF orientation" in note
        assert f"of {7 if drawn == 'stored' else 0} are drawn on the pixels as stored" in note


def test_answers_without_a_size_lie_as_those_where_the_size_tells(tmp_path: Path) -> None:
    """A half turn or a mirror image does not change the size: the upright images of the set tell."""
    expected = write_turned(tmp_path, size=(20, 28), drawn="shown", orientations=(1, 2, 3, 6))
    agrees(tmp_path, expected)
    alone = tmp_path / "alone"
    agrees(alone, write_turned(alone, size=(20, 28), drawn="stored", orientations=(2, 3)))
    without = tmp_path / "without"
    agrees(without, write_turned(without, size=(20, 28), drawn="stored", sizes=False))


def test_a_mask_with_an_orientation_of_its_own_follows_that(tmp_path: Path) -> None:
    expected = write_turned(tmp_path, size=(24, 24), drawn="stored", orientations=(3, 6, 8))
    for orientation in (3, 6, 8):
        path = tmp_path / f"masks/o{orientation}.png"
        stored = np.array(Image.open(path))
        path.unlink()
        if orientation == 3:
            tag = [(274, 3, 1, orientation, True)]
            tifffile.imwrite(path.with_suffix(".tif"), stored, photometric="minisblack", extratags=tag)
        else:
            exif = Image.Exif()
            exif[274] = orientation
            Image.fromarray(stored).save(path, exif=exif)
    agrees(tmp_path, expected)


def test_a_mask_of_another_size_than_its_image_is_refused_by_name(tmp_path: Path) -> None:
    from underpaint.evaluation.full_res import FullResImages
    from underpaint.evaluation.segment import VOID, MaskedSplit

    expected = write_turned(tmp_path, size=(20, 28), drawn="stored")
    Image.new("L", (20, 20)).save(tmp_path / "masks/o6.png")
    source = open_source(tmp_path)
    indices = list(range(len(source.entries)))
    read = MaskedSplit(FullResImages(source, indices, 3), masks_of(tmp_path, source), indices, 2, VOID).read
    for index in indices:
        stem = Path(source.entries[index].name).stem
        if stem == "o6":
            with pytest.raises(
                InputError, match=r"masks/o6.png is 20x20 pixels and its image 28x20; they must be alike"
            ):
                read(index)
            continue
        image, mask = read(index)
        assert np.array_equal(mask, expected[stem])
        assert np.array_equal(image[0].numpy() > 0.4, mask > 0)


# -- COCO files ------------------------------------------------------------------------------------------------------


def write_coco(root: Path, file: str, *places: str, files: dict[str, int] | None = None, **change: Any) -> Path:
    """Images of 8x6 px, the n-th listed one with a box at left n, and the files themselves."""
    written(root, files if files is not None else {f"images/{place}": 1 for place in places})
    images = [{"id": n, "file_name": name, "width": 8, "height": 6} for n, name in enumerate(places)]
    annotations = [{"id": n, "image_id": n, "category_id": 1, "bbox": [n, 0, 2, 2]} for n in range(len(places))]
    if change:
        annotations[0] |= change
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (root / "annotations" / file).write_text(json.dumps(coco))
    return root


def lefts(root: Path, split: str = "train") -> dict[str, list[float]]:
    source = open_source(root)
    found = coco_annotations(root, source)[split]
    return {source.entries[k].name: found.objects(k).boxes[:, 0].tolist() for k in found.images}


@pytest.mark.parametrize(
    ("listed", "files"),
    [
        (("a/f.png", "b/f.png"), ("images/a/f.png", "images/b/f.png")),
        (("a/f.png", "b/f.png"), ("a/f.png", "b/f.png")),
        (("images/a/f.png", "images/b/f.png"), ("images/a/f.png", "images/b/f.png")),
        (("a/f.png", "b/f.png"), ("images/train/a/f.png", "images/train/b/f.png")),
        (("a/f.png", "b/f.png"), ("train/images/a/f.png", "train/images/b/f.png")),
        (("/home/me/set/g.png", "./images/h.png"), ("images/train/g.png", "images/h.png")),
        (("C:\\pictures\\g.png", "a\\f.png"), ("images/g.png", "images/a/f.png")),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_coco_images_are_found_by_their_whole_path(
    tmp_path: Path, listed: tuple[str, ...], files: tuple[str, ...], zipped: bool
) -> None:
    root = write_coco(tmp_path / "set", "train.json", *listed, files=dict.fromkeys(files, 1))
    if not zipped:
        assert lefts(root) == {name: [n] for n, name in enumerate(files)}
        assert {entry.split for entry in open_source(root).entries} == {"train"}
        return
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    assert lefts(tmp_path / "x.zip") == {f"set/{name}": [n] for n, name in enumerate(files)}


def test_listed_images_that_are_not_there_are_counted_and_named(tmp_path: Path) -> None:
    """A name that two files have, or that is listed twice, or in another folder, is no image's."""
    listed = ("f.png", "x/g.png", "y/g.png", "c/h.png", "gone.png", "there.png")
    there = ("images/a/f.png", "images/b/f.png", "images/g.png", "images/d/h.png", "images/there.png")
    root = write_coco(tmp_path, "train.json", *listed, files=dict[str, int].fromkeys(there, 1))
    assert lefts(root) == {"images/there.png": [5]}
    (note,) = (note for note in open_source(root).notes if "lists" in note)
    assert "annotations/train.json lists 5 images" in note
    assert "f.png, x/g.png, y/g.png, ..." in note


def test_a_box_without_area_is_left_out_and_counted(tmp_path: Path) -> None:
    root = write_coco(tmp_path, "train.json", "a.png", "b.png", bbox=[1, 1, 0, 3])
    assert lefts(root) == {"images/a.png": [], "images/b.png": [1]}
    found = coco_annotations(root, open_source(root))["train"]
    assert found.notes == [
        "annotations/train.json: 1 boxes without area are left out, the first: annotation 0 (a.png) of 0 x 3 px"
    ]
    assert [annotation["bbox"] for annotation in found.coco["annotations"]] == [[1, 0, 2, 2]]


def test_annotations_of_id_0_or_of_equal_ids_count_in_the_measure(tmp_path: Path) -> None:
    from underpaint.evaluation.detect import average_precision

    for number, ids in enumerate([(0, 1), (5, 5)]):
        root = write_coco(tmp_path / str(number), "train.json", "a.png", "b.png")
        file = root / "annotations/train.json"
        coco = json.loads(file.read_text())
        for annotation, own in zip(coco["annotations"], ids, strict=True):
            annotation |= {"id": own, "area": 4, "iscrowd": 0}
        file.write_text(json.dumps(coco))
        found = coco_annotations(root, open_source(root))["train"]
        perfect: list[Any] = [{**annotation, "score": 0.9} for annotation in coco["annotations"]]
        assert average_precision(found.coco, perfect, ["bbox"], 100, [0, 1]).numbers()["box_ap"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bbox": [1, 2, 3]}, "no bbox of four numbers"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, r"run lengths of size \[8, 6\]; expected .* \[6, 8\]"),
        ({"bbox": [float("nan"), 2, 3, 3]}, "outside the image of 8x6"),
    ],
)
def test_odd_annotations_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    root = write_coco(tmp_path, "train.json", "a.png", **change)
    with pytest.raises(InputError, match=rf"train.json: annotation 0 \(a.png\) .*{said}"):
        coco_annotations(root, open_source(root))


def test_coco_files_that_contradict_are_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path, "train.json", "a.png")
    write_coco(tmp_path, "instances_train2017.json", "b.png")
    with pytest.raises(InputError, match=r"instances_train2017.json and annotations/train.json both annotate train"):
        coco_annotations(root, open_source(root))
    (root / "annotations/instances_train2017.json").unlink()
    Image.new("RGB", (80, 60)).save(root / "images/a.png")
    with pytest.raises(InputError, match=r"train.json lists a.png as 8x6, and the file is 80x60"):
        coco_annotations(root, open_source(root))
    root = write_coco(tmp_path, "train.json", "c.png", "images/c.png", files={"images/c.png": 1})
    with pytest.raises(InputError, match=r"train.json lists images/c.png twice, as images 0 and 1"):
        coco_annotations(root, open_source(root))
