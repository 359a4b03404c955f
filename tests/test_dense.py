"""Segmentation and detection: crops, windows, measures against references."""

import copy
import io
import itertools
import json
import shutil
import zipfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import box_of, counts_of, made_scene, write_scenes
from torch import Tensor, nn

import underpaint
import underpaint.evaluation.trained as trained_module
from underpaint.data import open_source
from underpaint.data.annotations import Instances, coco_annotations, masks_of
from underpaint.errors import InputError
from underpaint.evaluation.detect import (
    AnchorConfig,
    Boxed,
    Detect,
    DetectConfig,
    Kind,
    anchor_sides,
    average_precision,
    detection_limit,
    detector,
    letterbox,
    mask_of,
)
from underpaint.evaluation.pyramid import Pyramid, sliding
from underpaint.evaluation.segment import (
    VOID,
    SegmentConfig,
    confusion_of,
    crop_of,
    measures,
    segmenter,
    shares,
    sliding_window_inference,
)
from underpaint.evaluation.trained import sampled_batches

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("zipped", [False, True])
def test_masks_and_boxes_belong_to_their_images(scenes: Path, tmp_path: Path, zipped: bool) -> None:
    data = scenes
    if zipped:
        data = tmp_path / "pack.zip"
        with zipfile.ZipFile(data, "w") as archive:
            for file in sorted(scenes.rglob("*")):
                if file.is_file():
                    archive.write(file, Path("pack") / file.relative_to(scenes))
    source = open_source(data)
    masks = masks_of(data, source)
    assert len(masks.names) == len(source.entries) == 18
    assert masks.classes == ["ground", "disc", "square"]
    boxes = coco_annotations(data, source)
    assert {split: len(found.images) for split, found in boxes.items()} == {"train": 12, "val": 6}
    for index, entry in enumerate(source.entries):
        assert entry.split is not None
        objects = boxes[entry.split].objects(index)
        painted = np.zeros_like(masks[index])
        for label, segment in zip(objects.labels, objects.segments, strict=True):
            assert segment is not None
            painted[mask_of(segment, *painted.shape) > 0] = label // 10
        assert np.array_equal(painted, masks[index])


@pytest.mark.quick
def test_a_mask_of_another_split_is_no_answer(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, 3, 2)
    shutil.rmtree(folder / "annotations")
    # a stem that is in both splits, but has a mask in one
    (folder / "images/val/train000.png").write_bytes((folder / "images/val/val000.png").read_bytes())
    source = open_source(folder)
    masks = masks_of(folder, source)
    without = [source.entries[k].name for k in range(len(source.entries)) if k not in masks.names]
    assert [Path(name).parts[-2:] for name in without] == [("val", "train000.png")]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "names", "ignore"),
    [
        ('["a", "b"]', ["a", "b"], None),
        ('{"classes": ["a", "b"], "ignore_index": 2}', ["a", "b"], 2),
        ('{"0": "a", "2": "c"}', ["a", "1", "c"], None),
        ('{"a": 0, "b": 1}', ["a", "b"], None),
        ('{"classes": [{"index": 1, "name": "b"}, {"index": 0, "name": "a"}]}', ["a", "b"], None),
    ],
)
def test_classes_by_name(tmp_path: Path, text: str, names: list[str], ignore: int | None) -> None:
    folder = write_scenes(tmp_path, 1, 1)
    (folder / "classes.json").write_text(text)
    masks = masks_of(folder, open_source(folder))
    assert (masks.classes, masks.ignore) == (names, ignore)


@pytest.mark.quick
def test_the_three_forms_of_a_mask_agree() -> None:
    from faster_coco_eval import mask as coding

    mask = np.zeros((20, 30), np.uint8)
    mask[4:11, 6:19] = 1
    polygon: Any = [[6, 4, 19, 4, 19, 11, 6, 11]]
    raw: Any = {"size": [20, 30], "counts": counts_of(mask > 0)}
    packed: Any = coding.encode(np.asfortranarray(mask))
    for form in (polygon, raw, packed):
        assert np.array_equal(mask_of(form, 20, 30), mask)


# -- crops, windows ----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_crop_keeps_image_and_mask_together() -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (10, 14)).repeat(4, 0).repeat(4, 1).astype(np.int64)
    image = torch.from_numpy(mask).float()[None].expand(3, -1, -1) / 4
    for _ in range(20):
        piece, labels = crop_of((image, mask), (32, 32), (1.0, 1.0), rng, torch.zeros(3))
        assert piece.shape == (3, 32, 32)
        assert torch.equal((piece[0] * 4).round().long(), labels)
    piece, labels = crop_of((image, mask), (64, 64), (0.5, 0.5), rng, torch.zeros(3))
    assert bool((labels[20:] == VOID).all())
    assert bool((labels[:20, :28] != VOID).all())


@pytest.mark.quick
@pytest.mark.parametrize(("length", "window", "stride"), [(10, 10, 3), (11, 10, 3), (50, 16, 11), (16, 32, 8)])
def test_windows_cover(length: int, window: int, stride: int) -> None:
    starts = sliding(length, window, stride)
    covered = np.zeros(length, int)
    for start in starts:
        assert start + window <= max(length, window)
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))


class Pointwise(nn.Module):
    """Scores of each pixel from itself alone."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images[:, :1] * 3, 1 - images[:, :1]], dim=1)


@pytest.mark.quick
def test_windows_of_a_pointwise_model_are_the_whole() -> None:
    image = torch.rand(3, 37, 50)
    whole = Pointwise()(image[None]).softmax(1)[0]
    assert torch.allclose(sliding_window_inference(Pointwise(), image, (16, 24), 2, 1 / 3), whole, atol=1e-6)
    assert torch.allclose(sliding_window_inference(Pointwise(), image, (64, 64), 2, 1 / 3), whole, atol=1e-6)


# -- measures ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_iou_is_that_of_a_naive_count() -> None:
    rng = np.random.default_rng(0)
    each = []
    pairs = []
    for _ in range(6):
        truth = rng.integers(0, 4, (13, 9))  # class 4 never occurs
        truth[rng.random(truth.shape) < 0.1] = VOID
        found = np.where(rng.random(truth.shape) < 0.6, truth % 5, rng.integers(0, 5, truth.shape))
        each.append(confusion_of(truth, found, 5))
        pairs.append((truth, found))
    measured = measures(np.stack(each)).numbers()
    iou = shares(np.sum(each, axis=0))[2]
    for label in range(5):
        meet = sum(int(((t == label) & (f == label)).sum()) for t, f in pairs)
        either = sum(int((((t == label) | (f == label)) & (t != VOID)).sum()) for t, f in pairs)
        if label == 4:
            assert np.isnan(iou[4])
        else:
            assert iou[label] == pytest.approx(meet / either)
    assert measured["miou"] == pytest.approx(np.mean(iou[:4]))
    right = sum(int(((t == f) & (t != VOID)).sum()) for t, f in pairs)
    assert measured["pixel_accuracy"] == pytest.approx(right / sum(int((t != VOID).sum()) for t, f in pairs))
    assert 0 < measured["miou_error"] < 0.1


@pytest.mark.quick
def test_images_without_a_known_pixel_or_an_object_change_no_measure() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 3, (8, 8)), rng.integers(0, 3, (8, 8))) for _ in range(3)]
    without = [confusion_of(truth, found, 3) for truth, found in pairs]
    with_void = [confusion_of(one, found, 3) for truth, found in pairs for one in (np.full_like(truth, VOID), truth)]
    patients = [str(k // 2) for k in range(6)]
    wanted = measures(np.stack(without)).numbers()
    assert measures(np.stack(with_void)).numbers() == measures(np.stack(with_void), patients).numbers() == wanted
    images = [{"id": k, "height": 10, "width": 10, "file_name": str(k)} for k in (1, 2)]
    truth = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}]
    coco: Any = {"images": images, "annotations": truth, "categories": [{"id": 1, "name": "a"}]}
    perfect: Any = [{**truth[0], "score": 0.9}]
    found = average_precision(
        coco, perfect, ["bbox"], 100, [1, 2]
    ).numbers()  # in a quarter of the redraws is no object
    assert (found["box_ap"], found["box_ap_error"]) == (pytest.approx(1), 0)
    assert average_precision(coco, [], ["bbox"], 100, [1, 2]).numbers()["box_ap"] == 0
    assert np.isnan(average_precision(coco, [], ["bbox"], 100, [2]).numbers()["box_ap"])


@pytest.mark.quick
def test_a_test_part_without_answers_is_refused(scenes: Path) -> None:
    from underpaint.data.annotations import CocoAnnotations, Masks
    from underpaint.evaluation.base import Context
    from underpaint.evaluation.bundle import EncoderBundle
    from underpaint.evaluation.full_res import FullResImages
    from underpaint.evaluation.options import Options
    from underpaint.evaluation.segment import MaskedSplit, pixels_of_classes

    source = open_source(scenes)
    boxes = coco_annotations(scenes, source)
    empty = CocoAnnotations({**boxes["val"].coco, "annotations": []}, boxes["val"].images, boxes["val"].categories)
    parts = [(found, sorted(found.images)) for found in (boxes["train"], empty)]
    whole = FullResImages(source, list(range(len(source.entries))), 3)
    nothing = EncoderBundle.__new__(EncoderBundle)  # not looked at before the answers are
    train_boxes, test_boxes = (Boxed(whole, found, indices) for found, indices in parts)
    with pytest.raises(InputError, match="no image of test has an object"):
        Detect("detect", Context(nothing, source, Options(), scenes), (train_boxes, test_boxes), DetectConfig())
    masks = masks_of(scenes, source)
    train = MaskedSplit(whole, masks, parts[0][1], 3, VOID)
    names = {index: masks.names[index] for index in parts[1][1]}
    white = Masks(names, [], None, lambda name: _white(masks.read(name)))
    with pytest.raises(InputError, match="no pixel of the test masks has a class"):
        pixels_of_classes(train, MaskedSplit(whole, white, parts[1][1], 3, VOID), ["ground", "disc", "square"])


def _white(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", Image.open(io.BytesIO(data)).size, VOID).save(buffer, "PNG")
    return buffer.getvalue()


def _perturbed(coco: dict[str, Any], kind: str, seed: int = 0) -> list[Any]:
    """CocoAnnotations near the annotations: moved, some left out, some of another class, some made up."""
    rng = np.random.default_rng(seed)
    categories = [c["id"] for c in coco["categories"]]
    shapes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    found = []
    for one in coco["annotations"]:
        if rng.random() < 0.15:
            continue
        left, top, wide, tall = one["bbox"]
        moved = [left + rng.normal(0, 0.08 * wide), top + rng.normal(0, 0.08 * tall), wide, tall]
        label = one["category_id"] if rng.random() < 0.9 else int(rng.choice(categories))
        height, width = shapes[one["image_id"]]
        result = {"image_id": one["image_id"], "category_id": label, "score": float(rng.random())}
        if kind == "bbox":
            result["bbox"] = [float(v) for v in moved]
        else:
            from faster_coco_eval import mask as coding

            mask = np.roll(mask_of(one["segmentation"], height, width), int(rng.integers(-2, 3)), axis=1)
            code = coding.encode(np.asfortranarray(mask.astype(np.uint8)))
            result["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
        found.append(result)
    return found


def _raw_pycocotools(coco: dict[str, Any], results: list[dict[str, Any]], kind: str) -> np.ndarray:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: Any = COCO()
    truth.dataset = copy.deepcopy(coco)
    truth.createIndex()
    measure: Any = COCOeval
    run = measure(truth, truth.loadRes(copy.deepcopy(results)), kind)
    run.evaluate()
    run.accumulate()
    run.summarize()
    return run.stats[:3]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_ap_is_that_of_pycocotools_on_coco(kind: Kind, split: str) -> None:
    """On COCO's own annotations: polygons, compressed run lengths and crowds."""
    pack = SHARED / "coco-mini" / "coco_mini.zip"
    if not pack.is_file():
        pytest.skip("the shared data sets are not here")
    with zipfile.ZipFile(pack) as archive:
        coco = json.loads(archive.read(f"coco_mini/annotations/instances_{split}.json"))
    if split == "train":
        assert any(one["iscrowd"] for one in coco["annotations"])
    results = _perturbed(coco, kind)
    images = [image["id"] for image in coco["images"]]
    found = average_precision(coco, results, [kind], 100, images)
    assert list(found.values.values()) == pytest.approx(list(_raw_pycocotools(coco, results, kind)), abs=1e-9)
    place = {"bbox": "box", "segm": "mask"}[kind]
    assert 0 < found.numbers()[f"{place}_ap_error"] < 0.1


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_of_made_scenes(scenes: Path, kind: Kind) -> None:
    coco = json.loads((scenes / "annotations/train.json").read_text())
    images = [image["id"] for image in coco["images"]]
    results = _perturbed(coco, kind)
    found = average_precision(coco, results, [kind], 100, images)
    assert list(found.values.values()) == pytest.approx(list(_raw_pycocotools(coco, results, kind)), abs=1e-9)
    perfect: list[Any] = [{**one, "score": 0.9} for one in coco["annotations"]]
    if kind == "segm":
        for one in perfect:
            one["segmentation"] = _packed(one["segmentation"])
    best, none = (average_precision(coco, some, [kind], 100, images) for some in (perfect, []))
    assert list(best.values.values()) == pytest.approx([1, 1, 1])
    assert list(none.values.values()) == [0, 0, 0]
    # in pairs: against itself a difference has no error
    place = {"bbox": "box", "segm": "mask"}[kind]
    assert found.above(found)[f"{place}_ap_error"] == 0
    assert best.above(found)[f"{place}_ap_error"] > 0


def _packed(segment: Any) -> dict[str, Any]:
    from faster_coco_eval import mask as coding

    code = coding.encode(np.asfortranarray(mask_of(segment, *segment["size"])))
    return {"size": list(segment["size"]), "counts": code["counts"].decode()}


# -- detection ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_boxes_stay_around_their_objects() -> None:
    rng = np.random.default_rng(1)
    for trial in range(12):
        picture, _, objects = made_scene(rng, 60, 80)
        boxes = np.array([box_of(mask) for _, mask in objects], float)
        boxes[:, 2:] += boxes[:, :2]
        given = Instances(
            boxes,
            np.array([kind for kind, _ in objects]),
            np.zeros(len(objects), bool),
            [{"size": [60, 80], "counts": counts_of(mask)} for _, mask in objects],
        )
        image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        generator = rng if trial % 2 else None
        made, target, _ = letterbox(image, given, (48, 48), True, generator)
        assert made.shape == (3, 48, 48)
        for box, mask in zip(target["boxes"].numpy(), target["masks"].numpy(), strict=True):
            tight = np.array(box_of(mask > 0), float)
            tight[2:] += tight[:2]
            assert np.abs(tight - box).max() <= 1.5


@pytest.mark.quick
def test_sizes_come_from_the_data() -> None:
    sides = np.repeat([5.0, 9.0, 16.0, 40.0], 10)
    boxes = np.stack([np.zeros(40), np.zeros(40), sides, sides], axis=1)
    # objects of 40 px ask for strides 4 and 8 (of which four are 32 px), not for 16
    assert [side for level in anchor_sides(boxes, 4) for side in level] == pytest.approx([5, 9, 16, 40])
    assert [len(level) for level in anchor_sides(boxes, 4)] == [2, 2]
    same = np.tile([[0.0, 0.0, 10.0, 10.0]], (5, 1))
    assert anchor_sides(same, 4) == ((10, 12.5),)
    assert len(anchor_sides(30 * boxes, 4)) == 4
    assert detection_limit([3, 200]) == 300
    assert detection_limit([3]) == 100


ENCODERS = {
    "vit": lambda: underpaint.encoder(
        "vit_tiny_patch16_224", image_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3
    ),
    "swin": lambda: underpaint.encoder(
        "swin_tiny_patch4_window7_224",
        image_size=64,
        patch_size=2,
        embed_dim=24,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 3),
        window_size=4,
    ),
    "resnet": lambda: underpaint.encoder("resnet10t"),
    "convnext": lambda: underpaint.encoder("convnext_atto"),
}


@pytest.mark.parametrize("name", list(ENCODERS))
def test_pyramids_have_their_strides(name: str) -> None:
    pyramid = Pyramid(ENCODERS[name](), 16, depths=True)
    maps = pyramid(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 16, side, side) for side in (16, 8, 4, 2)]
    finer = Pyramid(ENCODERS[name](), 16, depths=False, first=2)
    assert [m.shape[-1] for m in finer(torch.randn(1, 3, 64, 64))] == [32, 16, 8, 4]


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_encoder_segments_and_detects(name: str) -> None:
    """Shapes, a gradient in the encoder, and detections that come back in the image's own pixels."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    for head in ("linear", "upernet"):
        encoder = ENCODERS[name]()
        model = segmenter(encoder, head, 3, (64, 64), SegmentConfig(channels=16)).train()
        found = model(images)
        assert found.shape == (2, 3, 64, 64)
        found.square().mean().backward()
        moved = any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in encoder.parameters())
        assert moved == (head == "upernet")
    encoder = ENCODERS[name]()
    model = detector(
        encoder, (64, 64), 2, True, AnchorConfig(((6.0, 10.0), (16.0, 24.0)), 100), DetectConfig(channels=16)
    ).train()
    boxes = torch.tensor([[8.0, 8.0, 20.0, 22.0]])
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, 8:22, 8:20] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}
    losses = model(list(images), [target, {k: v.clone() for k, v in target.items()}])
    torch.stack(list(losses.values())).sum().backward()
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in encoder.parameters())
    for one in model.eval()(list(images)):
        assert one["masks"].shape[1:] == (1, 64, 64)
        assert bool(((one["boxes"] >= 0) & (one["boxes"] <= 64)).all())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bbox": [40, 10, 60, 10]}, "outside the image of 64x48"),
        ({"category_id": 3}, "category 3, which is not listed"),
        ({"image_id": 99}, "image 99, which is not listed"),
    ],
)
def test_wrong_boxes_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = write_scenes(tmp_path, 2, 1)
    file = folder / "annotations/train.json"
    coco = json.loads(file.read_text())
    coco["annotations"][0] |= change
    file.write_text(json.dumps(coco))
    with pytest.raises(InputError, match=said):
        coco_annotations(folder, open_source(folder))


@pytest.mark.quick
def test_broken_annotations_are_named(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, 2, 1)
    (folder / "annotations/train.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(InputError, match=r"train.json is not COCO json"):
        coco_annotations(folder, open_source(folder))
    (folder / "classes.json").write_text('[{"nome": "a"}]')
    with pytest.raises(InputError, match=r"classes.json does not name classes"):
        masks_of(folder, open_source(folder))


@pytest.mark.quick
def test_batches_that_are_made_ahead_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(generator: np.random.Generator) -> list[tuple[Tensor, dict[str, Tensor]]]:
        count = int(generator.integers(1, 4))
        image = torch.from_numpy(generator.random((3, 8, 8)))
        return [(image, {"boxes": torch.from_numpy(generator.random((count, 4)))}) for _ in range(2)]

    found = []
    for workers in (0, 2):
        monkeypatch.setattr(trained_module, "reading_workers", lambda *_, workers=workers, **__: workers)
        with closing(sampled_batches(sample, 3, 5, torch.device("cpu"))) as batches:
            found.append(list(itertools.islice(batches, 7)))
    for here, ahead in zip(*found, strict=True):
        for (image, target), (other, same) in zip(here, ahead, strict=True):
            assert torch.equal(image, other)
            assert torch.equal(target["boxes"], same["boxes"])
