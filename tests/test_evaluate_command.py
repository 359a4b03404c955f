"""`underpaint evaluate`, `predict` and `embed`, from the command line, on small made images."""

import csv
import json
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from asking import pretrain
from conftest import write_pictures
from faster_coco_eval import COCO
from PIL import Image
from scenes import write_scenes
from scipy import ndimage
from test_report import whole
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import underpaint
from underpaint.cli import main
from underpaint.data import load_images, open_source
from underpaint.data.annotations import coco_annotations, mask_of, masks_of
from underpaint.errors import InputError, NotFinite
from underpaint.evaluation.bundle import open_bundle
from underpaint.evaluation.features import features_of, stored_features
from underpaint.evaluation.outliers import mahalanobis, neighbour_distance, separation
from underpaint.evaluation.splits import Split
from underpaint.evaluation.trained import Task
from underpaint.evaluation.written import Places, coco_file, labels_place, write_yolo
from underpaint.report.figures.pictures import colours
from underpaint.seeds import ROLLED_BACK
from underpaint.train import cadence
from underpaint.train.fit import Fitting, Trained, fit_task
from underpaint.train.run_folder import Run
from underpaint.train.schedules import Duration, Schedule
from underpaint.train.stepper import Stepper

TINY = {"encoder.embed_dim": 48, "encoder.depth": 2, "encoder.num_heads": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MAE, briefly trained at 32 px."""
    folder = tmp_path_factory.mktemp("trained")
    pictures = write_pictures(folder / "pictures", 90)
    out = folder / "run"
    pretrain(
        pictures,
        out,
        method="mae",
        encoder="vit_tiny_patch16_224",
        image_size=(32, 32),
        patch_size=8,
        batch_size=16,
        steps=4,
        settings=TINY,
        stop_at=1e9,
    )
    return out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 16, 6, (32, 40))


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that a colour tells apart."""
    folder = tmp_path_factory.mktemp("coloured")
    rng = np.random.default_rng(0)
    for number in range(60):
        means = [110, 110, 110]
        means[number % 3] = 170
        (folder / "abc"[number % 3]).mkdir(exist_ok=True)
        pixels = rng.normal(means, 30, (40, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "abc"[number % 3] / f"{number}.png")
    return folder


def test_an_evaluation_that_is_interrupted_in_its_first_task_goes_on(
    run: Path, coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(run), "--data", str(coloured), "--task", "finetune", "--set", "epochs=3"]
    command += ["--set", "batch_size=24", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    real, calls = Stepper.step, 0

    def told(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(Stepper, "step", told)
    assert main([*command, str(tmp_path / "out")]) == 143
    monkeypatch.undo()
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    assert "the checkpoint of step 3 is kept: the same command goes on" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "out")]) == 2
    assert "no task of this evaluation is finished yet" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out")]) == 0
    assert "going on from step 3" in capsys.readouterr().out
    whole, out = (results(tmp_path / name)["tasks"]["finetune"] for name in ("whole", "out"))
    assert whole["rows"] == out["rows"]


def results(out: Path) -> dict[str, Any]:
    assert (out / "report.html").is_file()
    return json.loads((out / "results.json").read_text())


# -- the loop ----------------------------------------------------------------------------------------------------------


class Toy(Task[Tensor]):
    """A network, an optimiser and batches that depend on the step."""

    def __init__(self, optimiser: str = "adamw") -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        super().__init__(network, 16, Duration(1), Schedule(0.1))
        self.optimised = optimiser
        self.fail_at: int | None = None
        self.nan_at: int | None = None
        self.ended: list[float] = []

    def optimiser(self) -> torch.optim.Optimizer:
        return create_optimizer_v2(self.network, opt=self.optimised, lr=0.1)

    def batches(self, first: int, seed: int) -> Generator[Tensor, None, None]:
        step = first
        while True:
            yield torch.randn(16, 4, generator=torch.Generator().manual_seed(1000 * seed + step))
            step += 1

    def loss(self, batch: Tensor, step: int) -> Tensor:
        if step == self.fail_at:
            raise KeyboardInterrupt
        factor = float("nan") if step == self.nan_at else 1.0
        return factor * (self.network(batch).squeeze(1) - batch.sum(1)).square().mean()

    def after_step(self, progress: float, taken: Tensor) -> None:
        self.ended.append(progress)

    def run(self, folder: Path, duration: Duration, **settings: Any) -> Trained:
        how = Fitting(duration, self.schedule, 0, 1.0, self.size, settings)
        return fit_task(self, self.optimiser(), self.numbered, folder, how)


@pytest.mark.quick
@pytest.mark.parametrize("optimiser", ["adamw", "lamb"])
def test_a_killed_loop_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimiser: str
) -> None:
    whole = Toy(optimiser)
    told = whole.run(tmp_path / "whole", Duration(12))
    assert whole.ended == pytest.approx([step / 12 for step in range(1, 13)])  # the hook comes after every step
    monkeypatch.setattr(cadence, "SAVE_SECONDS", 0.0)
    killed = Toy(optimiser)
    killed.fail_at = 7
    with pytest.raises(KeyboardInterrupt):
        killed.run(tmp_path / "killed", Duration(12))
    again = Toy(optimiser)
    assert again.run(tmp_path / "killed", Duration(12))["steps"] == told["steps"] == 12
    for a, b in zip(whole.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)
    # and a third call has nothing to do
    third = Toy(optimiser)
    third.fail_at = 12
    third.run(tmp_path / "killed", Duration(12))
    assert torch.equal(next(third.network.parameters()), next(whole.network.parameters()))


def test_a_loop_ends_in_time_and_learns(tmp_path: Path) -> None:
    toy = Toy()
    told = toy.run(tmp_path, Duration(1, minutes=0.02))
    assert 0.02 <= told["minutes"] < 0.03
    assert told["steps"] > 10
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.quick
def test_a_loop_refuses_other_settings_and_stops_where_nothing_is_finite(tmp_path: Path) -> None:
    Toy().run(tmp_path / "one", Duration(2), rate=1)
    with pytest.raises(InputError, match="other settings \\(rate 1 there, 2 here\\)"):
        Toy().run(tmp_path / "one", Duration(2), rate=2)
    broken = Toy()
    with torch.no_grad():
        next(broken.network.parameters()).fill_(float("nan"))
    with pytest.raises(NotFinite, match="not finite from the first step on"):
        broken.run(tmp_path / "two", Duration(50))


@pytest.mark.quick
def test_batches_after_a_roll_back_are_others() -> None:
    toy = Toy()
    (step, first), (again, second) = next(toy.numbered(3, 0)), next(toy.numbered(3, ROLLED_BACK))
    assert step == again == 3
    assert not torch.equal(first, second)


@pytest.mark.quick
def test_one_step_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    toy = Toy()
    toy.nan_at = 3
    told = toy.run(tmp_path / "one", Duration(8))
    assert all(bool(p.isfinite().all()) for p in toy.network.parameters())
    assert told["loss"] is not None
    assert math.isfinite(told["loss"])
    last = Run(tmp_path / "one").load()
    assert last is not None
    assert last[1]["bad"] == 1


@pytest.mark.quick
def test_schedule() -> None:
    cosine, line = Schedule(0.1, 0.01), Schedule(0.1, 0.0, power=1.0)
    assert cosine.factor(0, 0.05) == pytest.approx(0.5)
    assert cosine.factor(0, 0.1) == pytest.approx(1)
    assert cosine.factor(0, 1.0) == pytest.approx(0.01)
    assert line.factor(0, 0.55) == pytest.approx(0.5)


# -- features ----------------------------------------------------------------------------------------------------------


def test_stored_features_are_those_of_the_encoder(run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(str(run))
    images = load_images(open_source(pictures), range(20), size=bundle.size)
    split = Split(images, list(range(3, 20)))
    stored = stored_features(bundle, split, with_patches=True)
    found = features_of(bundle.encoder, bundle.standardize, split, bundle.size, with_patches=True)
    assert torch.equal(stored.pooled, found.pooled)
    assert torch.allclose(stored.patches.float(), found.patches, atol=2e-3)
    assert stored.samples.tolist() == list(range(3, 20))
    encoder = bundle.encoder
    bundle.encoder = None  # pyright: ignore[reportAttributeAccessIssue] -- a second call asks for the weights' name only
    monkeypatch.setattr(type(bundle), "weights", lambda _: dict(encoder.model.state_dict().items()))
    again = stored_features(bundle, split, with_patches=True)
    assert torch.equal(again.pooled, stored.pooled)
    assert again.patches.dtype == torch.float16
    assert features_of(encoder, bundle.standardize, split, bundle.size, with_patches=False).patches.shape == (17, 0, 48)


def test_bundles(run: Path) -> None:
    own = open_bundle(str(run))
    larger = open_bundle(str(run), image_size=(48, 64))
    blank = open_bundle(str(run), untrained=True)
    assert own.size == (32, 32)
    assert larger.encoder(torch.zeros(1, 3, 48, 64)).patches.shape[1] == 48
    assert torch.equal(own.weights()["blocks.0.attn.qkv.weight"], larger.weights()["blocks.0.attn.qkv.weight"])
    assert not torch.equal(own.weights()["blocks.0.attn.qkv.weight"], blank.weights()["blocks.0.attn.qkv.weight"])
    twin = own.random_init(0)
    assert torch.equal(twin.weights()["blocks.0.attn.qkv.weight"], blank.weights()["blocks.0.attn.qkv.weight"])
    public = open_bundle("timm:resnet10t", untrained=True, image_size=(64, 64))
    assert public.encoder(torch.zeros(1, 3, 64, 64)).pooled.shape == (1, 512)
    with pytest.raises(InputError, match="timm has no model"):
        open_bundle("timm:resnet1000")


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_frozen_tasks_and_their_use(run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "worth"
    arguments = ["evaluate", str(run), "--data", str(pictures), "--task", "knn,linear,attentive", "--out", str(out)]
    assert main(arguments) == 0
    found = results(out)["tasks"]
    assert set(found) == {"knn", "linear", "attentive"}
    assert list(found["linear"]["rows"]) == ["encoder", "untrained", "raw pixels", "HOG", "majority"]
    assert found["linear"]["train"] + found["linear"]["test"] == 90
    assert found["linear"]["rows"]["encoder"]["accuracy"] > found["linear"]["rows"]["majority"]["accuracy"]
    assert set(found["linear"]["gains"]["encoder over untrained"]) == {"accuracy", "accuracy_error"}
    for task in ("knn", "linear", "attentive"):
        assert (out / task / "confusion.png").stat().st_size > 1000
    # what was kept gives the accuracy that was said
    for task in ("linear", "attentive"):
        used = tmp_path / f"used-{task}"
        assert main(["predict", str(out / task), str(pictures), "--out", str(used)]) == 0
        with open(used / "predictions.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 90
        assert all(0 < float(row["probability"]) <= 1 for row in rows)
        right = np.mean([Path(row["path"]).parts[-2] == row["class"] for row in rows])
        assert right >= found[task]["rows"]["encoder"]["accuracy"] * found[task]["test"] / 90
        with Image.open(used / "predictions.png") as picture:
            assert picture.width > 600
        said = json.loads((used / "predictions.json").read_text())
        assert {row[0]: int(row[1]) for row in said["rows"]} == Counter(row["class"] for row in rows)
        assert said["count"] == 90
        assert '<th scope="row">class0</th>' in whole(used / "report.html")[0]


def test_kept_linear_probe_says_what_the_probe_said(run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "worth"
    assert main(["evaluate", str(run), "--data", str(pictures), "--task", "linear", "--out", str(out)]) == 0
    source = open_source(pictures)
    from underpaint.data import labelled_indices

    sides = labelled_indices(source)
    assert sides is not None
    test = [source.entries[k].name for k in sides[1]]
    assert main(["predict", str(out), str(pictures), "--out", str(tmp_path / "used")]) == 0
    with open(tmp_path / "used" / "predictions.csv") as file:
        said = {row["path"]: row["class"] for row in csv.DictReader(file)}
    right = np.mean([Path(name).parts[-2] == said[name] for name in test])
    assert right == pytest.approx(results(out)["tasks"]["linear"]["rows"]["encoder"]["accuracy"])


def test_fine_tuning(run: Path, coloured: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    arguments = ["evaluate", str(run), "--data", str(coloured), "--task", "finetune", "--out", str(out)]
    settings = ["epochs=20", "batch_size=24", "lr=1e-2", "ema_decay=0.9", "mixup=0.2", "augment=rand-m5-mstd0.5-inc1"]
    settings = [part for setting in settings for part in ("--set", setting)]
    assert main([*arguments, *settings]) == 0
    found = results(out)["tasks"]["finetune"]
    assert found["trained"]["encoder"]["steps"] == round(20 * found["train"] / 24)
    assert list(found["rows"]) == ["encoder", "untrained", "majority"]
    assert found["rows"]["encoder"]["accuracy"] > 0.9
    assert main(["predict", str(out), str(coloured), "--out", str(tmp_path / "used")]) == 0
    # a second call goes on from where the first ended: nothing is trained again, and the numbers are the same
    assert main([*arguments, *settings]) == 0
    assert results(out)["tasks"]["finetune"]["rows"] == found["rows"]


@pytest.mark.parametrize("recipe", ["mae-vit-base", "localmim-vit-base", "cae-vit-base", "energy", "rsb-a2", "rsb-a3"])
def test_published_recipes_run(run: Path, pictures: Path, tmp_path: Path, recipe: str) -> None:
    arguments = ["evaluate", str(run), "--data", str(pictures), "--task", "finetune", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--recipe", recipe, "--set", "epochs=2", "--set", "batch_size=24", "--untrained"]) == 0
    found = results(tmp_path / "out")["tasks"]["finetune"]
    assert found["trained"]["encoder"]["steps"] == round(2 * found["train"] / 24)
    assert 0 < found["trained"]["encoder"]["loss"] < 2  # ln 3 for a softmax over three classes
    assert found["recipe"]["optimiser"] == ("lamb" if recipe.startswith("rsb") else "adamw")


def test_segmentation(run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "masks"
    arguments = ["evaluate", str(run), "--data", str(scenes), "--task", "segment", "--out", str(out)]
    assert main([*arguments, "--set", "steps=150", "--set", "batch_size=4", "--set", "channels=16"]) == 0
    found = results(out)["tasks"]["segment"]
    assert (found["train"], found["test"], found["names"]) == (16, 6, ["ground", "disc", "square"])
    rows = found["rows"]
    assert list(rows) == [
        "most frequent class",
        "encoder, linear",
        "untrained, linear",
        "raw pixels, linear",
        "HOG, linear",
        "encoder, upernet",
        "untrained, upernet",
    ]
    assert rows["encoder, upernet"]["miou"] > rows["most frequent class"]["miou"] + 0.1
    # the whole image, where nobody says
    assert found["image_sizes"] == {"encoder": [32, 40]}
    assert "crops and windows of 32x40 px, 4 a step" in capsys.readouterr().out
    for head in ("linear", "upernet"):
        assert (out / "segment" / head / "segmentations.png").is_file()
        used = tmp_path / f"used-{head}"
        assert main(["predict", str(out / "segment" / head), str(scenes), "--out", str(used)]) == 0
        masks = sorted((used / "masks").rglob("*.png"))
        assert len(masks) == 22
        with Image.open(masks[0]) as mask:
            assert mask.size == (40, 32)
            assert mask.mode == "P"
            assert mask.convert("RGB").getpixel((0, 0)) == tuple(colours(3)[np.asarray(mask)[0, 0]])
    # read back as the masks of the images that they are of, by what reads anybody's
    shutil.copytree(scenes / "images", used / "images")
    shutil.move(used / "masks" / "images", tmp_path / "masks-of-images")
    shutil.rmtree(used / "masks")
    shutil.move(tmp_path / "masks-of-images", used / "masks")
    source = open_source(used)
    found_masks = masks_of(used, source)
    assert len(found_masks.names) == 22
    assert found_masks.classes == ["ground", "disc", "square"]
    said = json.loads((used / "predictions.json").read_text())
    counts = np.sum([np.bincount(found_masks[k].reshape(-1), minlength=3) for k in found_masks.names], axis=0)
    assert [row[1] for row in said["rows"]] == [f"{share:.1%}" for share in counts / counts.sum()]
    text, _ = whole(used / "report.html")
    assert "Some of the images" in text
    assert "masks/" in text


def test_detection(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, used = tmp_path / "boxes", tmp_path / "used"
    arguments = ["evaluate", str(run), "--data", str(scenes), "--task", "detect", "--out", str(out), "--untrained"]
    assert main([*arguments, "--set", "steps=3", "--set", "batch_size=2", "--set", "channels=16"]) == 0
    found = results(out)["tasks"]["detect"]
    assert (found["train"], found["test"], found["names"]) == (16, 6, ["disc", "square"])
    assert set(found["rows"]) == {"encoder"}
    assert {"box_ap50", "mask_ap50", "box_ap50_error"} <= set(found["rows"]["encoder"])
    assert (out / "detect" / "detections.png").is_file()
    said = capsys.readouterr().out
    assert "detect: " in said
    assert "2 images a step, maps from stride 2 on" in said
    assert found["image_sizes"] == {"encoder": [32, 40]}
    assert "encoder had fewer than 20 steps" in found["verdict"][0]
    assert "Too short to compare anything" in (out / "report.html").read_text()
    monkeypatch.setattr("underpaint.evaluation.detect.LEAST", 0.0)  # three steps make nothing that is sure
    assert main(["predict", str(out), str(scenes), "--out", str(used)]) == 0
    coco = json.loads((used / "detections.json").read_text())
    assert len(coco["images"]) == 22
    assert [c["name"] for c in coco["categories"]] == ["disc", "square"]
    # by the tool that measures, and by what reads anybody's boxes
    tool = COCO(str(used / "detections.json"))
    assert len(tool.getAnnIds()) == len(coco["annotations"]) > 22
    shutil.copytree(scenes / "images", used / "images")
    (used / "annotations").mkdir()
    shutil.copy(used / "detections.json", used / "annotations" / "train.json")
    read = coco_annotations(used, open_source(used))["train"]
    assert len(read.images) == 22
    assert sum(len(read.objects(k).boxes) for k in read.images) == len(coco["annotations"])
    # YOLO's outlines are those of the masks, for each image a file
    names = [image["file_name"] for image in coco["images"]]
    labels = {name: used / Path(name.replace("images", "labels")).with_suffix(".txt") for name in names}
    assert sorted(used.rglob("labels/**/*.txt")) == sorted(labels.values())
    assert yaml.safe_load((used / "data.yaml").read_text())["names"] == {0: "disc", 1: "square"}
    same = []
    parts: Any = ndimage.label
    for image in coco["images"]:
        own = tool.imgToAnns[image["id"]]
        lines = labels[image["file_name"]].read_text().splitlines()
        assert len(lines) == len(own)
        for line, one in zip(lines, own, strict=True):
            number, *shares = line.split()
            assert {"0": 10, "1": 20}[number] == one["category_id"]
            size = image["height"], image["width"]
            drawn = mask_of([(np.array(shares, float).reshape(-1, 2) * size[::-1]).reshape(-1).tolist()], *size)
            truth = mask_of(one["segmentation"], *size)
            if parts(truth)[1] == 1 and truth.sum() > 30:
                same.append((drawn & truth).sum() / (drawn | truth).sum())
    assert len(same) > 10
    assert np.mean(same) > 0.9
    text, _ = whole(used / "report.html")
    total = sum(int(row[1].replace(",", "")) for row in json.loads((used / "predictions.json").read_text())["rows"])
    assert total == len(coco["annotations"])
    assert "labels/" in text
    assert main(["report", str(used)]) == 0


def test_boxes_of_yolo_and_places_of_files(tmp_path: Path) -> None:
    image: Any = {"id": 1, "file_name": "a.jpg", "height": 40, "width": 80}
    objects: Any = [{"image_id": 1, "category_id": 7, "bbox": [20.0, 10.0, 40.0, 20.0], "score": 0.9}]
    write_yolo(tmp_path / "labels" / "a.txt", objects, {7: 3}, image)
    assert (tmp_path / "labels" / "a.txt").read_text() == "3 0.5 0.5 0.5 0.5\n"
    write_yolo(tmp_path / "none.txt", [], {}, image)
    assert (tmp_path / "none.txt").read_text() == ""
    places = Places(["x/a.jpg", "x/a.png", "../b.tif", "images/train/c.png"], ".txt")
    found = [str(labels_place(places(name))) for name in ("x/a.jpg", "x/a.png", "../b.tif", "images/train/c.png")]
    assert found == ["labels/x/a.jpg.txt", "labels/x/a.png.txt", "labels/b.txt", "labels/train/c.txt"]


def test_outliers(run: Path, pictures: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "strange"
    arguments = ["evaluate", str(run), "--data", str(pictures), "--task", "outliers", "--out", str(out)]
    assert main([*arguments, "--against", str(scenes)]) == 0
    found = results(out)["tasks"]["outliers"]
    assert found["strange"] == 22
    assert "the method's own score" in found["rows"]
    assert all(0 <= row["auroc"] <= 1 for row in found["rows"].values())
    assert len(list((out / "outliers").glob("*.png"))) == len(found["rows"]) == 6


def test_outlier_scores() -> None:
    rng = np.random.default_rng(0)
    train = torch.from_numpy(rng.normal(size=(5000, 4)) * [1, 2, 3, 4] + 5)
    x = torch.from_numpy(rng.normal(size=(50, 4)) * [1, 2, 3, 4] + 5)
    exact = (((x.numpy() - 5) / [1, 2, 3, 4]) ** 2).sum(1)
    assert mahalanobis(train, x) == pytest.approx(exact, rel=0.1, abs=0.1)
    near = neighbour_distance(train, train[:20])
    assert bool((near < neighbour_distance(train, -train[:20])).all())
    perfect = separation(np.arange(100.0), np.arange(200.0, 300.0))
    assert perfect.values == {"auroc": 1, "aupr": 1, "fpr95": 0}
    none = separation(rng.normal(size=2000), rng.normal(size=2000)).numbers()
    assert none["auroc"] == pytest.approx(0.5, abs=3 * none["auroc_error"] + 0.01)
    assert none["fpr95"] == pytest.approx(0.95, abs=0.03)


def test_embed(run: Path, pictures: Path, tmp_path: Path) -> None:
    assert main(["embed", str(run), str(pictures), "--out", str(tmp_path / "v.parquet")]) == 0
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.num_rows == 90
    encoder, standardize = underpaint.load_encoder(run), underpaint.standardize_for(run)
    with Image.open(pictures / table["path"][4].as_py()) as picture:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        wanted = encoder(standardize(image)).pooled[0]
    assert torch.allclose(torch.tensor(table["vector"][4].as_py()), wanted, atol=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "lineal"], "'lineal': there are knn, linear"),
        (["--task", "outliers"], "give the other images with --against"),
        (["--task", "linear", "--label-fraction", "0"], "must be above 0 and at most 1"),
        (["--task", "segment"], "no masks; expected index PNGs"),
        (["--task", "detect"], "no boxes; expected COCO json"),
        (["--task", "finetune", "--recipe", "none"], "for fine-tuning there are mae-vit-base"),
        (["--task", "finetune", "--set", "rates=1"], "a setting of fine-tuning is one of"),
        (["--task", "linear", "--image-size", "30"], "does not"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, pictures: Path, tmp_path: Path, capsys: Any, arguments: list[str], said: str
) -> None:
    assert main(["evaluate", str(run), "--data", str(pictures), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_bad_answers_are_one_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    def said(data: Path, task: str) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert main(["evaluate", str(run), "--data", str(data), "--task", task, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    scenes = write_scenes(tmp_path / "wrong", 4, 2, (32, 40))
    Image.fromarray(np.full((32, 40), 9, np.uint8)).save(scenes / "masks/train/train001.png")
    assert "train001.png holds class 9; there are 0 to 2" in said(scenes, "segment")
    scenes = write_scenes(tmp_path / "size", 4, 2, (32, 40))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(scenes / "masks/train/train001.png")
    assert "is 8x8 pixels and its image 32x40" in said(scenes, "segment")
    scenes = write_scenes(tmp_path / "one", 4, 2, (32, 40))
    for file in (scenes / "masks").rglob("*.png"):
        Image.fromarray(np.zeros((32, 40), np.uint8)).save(file)
    assert "needs at least 2 classes in train" in said(scenes, "segment")
    scenes = write_scenes(tmp_path / "colour", 4, 2, (32, 40))
    Image.new("RGB", (40, 32), "red").save(scenes / "masks/train/train001.png")
    assert "not an index mask" in said(scenes, "segment")
    pictures = write_pictures(tmp_path / "classes/train", 12)
    write_pictures(tmp_path / "classes/test", 8, classes=4)
    assert "1 classes occur in test and not in train (class3)" in said(pictures.parent, "linear")
    for name in ("class1", "class2"):
        shutil.rmtree(tmp_path / "classes/train" / name)
        shutil.rmtree(tmp_path / "classes/test" / name)
    shutil.rmtree(tmp_path / "classes/test/class3")
    assert said(pictures.parent, "linear")  # one class is no labels


def test_detections_are_written_as_they_come_and_there_when_all_are(tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    image: Any = {"id": 1, "file_name": "caf\udce9.jpg", "height": 40, "width": 80}
    box: Any = {"image_id": 1, "category_id": 7, "bbox": [0.0, 0.0, 4.0, 5.0], "score": 0.9}

    def ended() -> None:
        with coco_file(path, {7: "cell"}) as add:
            for _ in range(1000):
                add(image, [box])
            assert next(tmp_path.iterdir()).stat().st_size > 50_000
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ended()
    assert not list(tmp_path.iterdir())
    with coco_file(path, {7: "cell"}):
        pass
    assert json.loads(path.read_text())["annotations"] == []
    with coco_file(path, {7: "cell"}) as add:
        add(image, [box, box])
    whole_file = json.loads(path.read_text())
    assert [(one["id"], one["area"]) for one in whole_file["annotations"]] == [(1, 20.0), (2, 20.0)]
    assert whole_file["images"][0]["file_name"] == "caf\udce9.jpg"
