"""The images by which an encoder is judged: the same for every seed and command, and none of them trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import write_pictures
from PIL import Image
from torch import Tensor, nn

from underpaint import prepare
from underpaint.backbones import Backbone, create_arguments, from_arguments
from underpaint.backbones.build import save_encoder
from underpaint.backbones.protocols import Features
from underpaint.cli import main
from underpaint.data import Crops, ImageSet, Indices, Source, load_images, open_source, pretraining_indices
from underpaint.draws import Draws
from underpaint.evaluation import probes as probes_module
from underpaint.evaluation.base import Context
from underpaint.evaluation.baselines import raw_pixels
from underpaint.evaluation.frozen import NearestNeighbours
from underpaint.evaluation.probes import ProbeSuite
from underpaint.methods import Method
from underpaint.patches import Standardize

ENCODER = ["--encoder", "vit_tiny_patch16_224", "--image-size", "16", "--patch-size", "4", "--method", "mae"]
ENCODER += ["--set", "encoder.embed_dim=16", "--set", "encoder.depth=1", "--set", "encoder.num_heads=1"]
BRIEF = [*ENCODER, "--batch-size", "18", "--steps", "6", "--seed", "1"]
IDENTITY = Standardize([0.0] * 3, [1.0] * 3)


class Seen:
    """Names of the images that a command trained on, and of those that judged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: set[str] = set()
        self.judged: list[list[str]] = []
        batches, of, load = prepare.train_batches, ProbeSuite.of, NearestNeighbours.load

        def noted_batches(crops: Crops, **given: Any) -> Any:
            for batch in batches(crops, **given):
                self.trained |= {crops.images.names[k] for k in batch.samples}
                yield batch

        def noted_of(*given: Any) -> ProbeSuite:
            made = of(*given)
            self.judged += [] if made.splits is None else [list(made.splits[1].images.names)]
            return made

        def noted_load(context: Context) -> Any:
            train, test = load(context)
            self.judged.append([test.images.names[k] for k in test.indices])
            return train, test

        monkeypatch.setattr(prepare, "train_batches", noted_batches)
        monkeypatch.setattr(ProbeSuite, "of", noted_of)
        monkeypatch.setattr(NearestNeighbours, "load", noted_load)


@pytest.mark.parametrize("groups", [[], ["--groups", r"(\d)\.png"]])
def test_pretrain_and_evaluate_judge_by_the_same_images_and_none_of_them_is_trained_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, groups: list[str]
) -> None:
    seen = Seen(monkeypatch)
    assert main(["pretrain", str(pictures), "--out", str(tmp_path / "run"), *BRIEF, *groups]) == 0
    evaluate = ["evaluate", str(tmp_path / "run"), "--data", str(pictures), "--task", "knn"]
    assert main([*evaluate, "--out", str(tmp_path / "worth"), "--seed", "2"]) == 0
    of_run, of_evaluate = seen.judged
    assert sorted(of_run) == sorted(of_evaluate)
    assert len(of_run) == 18
    assert len(seen.trained) == 72  # six batches are more than an epoch
    assert not seen.trained & set(of_run)
    if groups:
        assert not {name[-5] for name in seen.trained} & {name[-5] for name in of_run}
        assert "groups are those of the run" in capsys.readouterr().out
        assert main([*evaluate, "--out", str(tmp_path / "other"), "--groups", r"class(\d)"]) == 2
        assert "the run kept groups by" in capsys.readouterr().err
        elsewhere = tmp_path / "elsewhere"
        shutil.copytree(
            pictures, elsewhere, copy_function=lambda old, new: shutil.copy(old, new.replace(".png", "x.png"))
        )
        evaluate[3] = str(elsewhere)
        assert main([*evaluate, "--out", str(tmp_path / "other")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "no name in" in said
        assert main([*evaluate, "--out", str(tmp_path / "other"), "--groups", ""]) == 0


def test_all_images_are_trained_on_where_that_is_asked_for_and_every_page_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen, run = Seen(monkeypatch), tmp_path / "run"
    assert main(["pretrain", str(pictures), "--out", str(run), *BRIEF, "--all-images"]) == 0
    assert len(seen.trained) == 90
    assert "--all-images: the probes' test images are among those to pretrain on (18" in capsys.readouterr().out
    probes = json.loads((run / "probes.json").read_text())
    assert probes["seen_in_pretraining"] == 18
    assert probes["restoration"]["test_part"] is False
    assert "18 of the images to test on were pretrained on" in (run / "report.html").read_text()
    evaluate = ["evaluate", str(run), "--data", str(pictures), "--task", "knn", "--out", str(tmp_path / "worth")]
    assert main(evaluate) == 0
    assert "18 of the 18 images held out to test on were pretrained on" in capsys.readouterr().out
    assert "were pretrained on" in (tmp_path / "worth" / "table.md").read_text()


def test_copies_of_the_test_images_of_labels_are_left_out_and_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    labelled, plain = tmp_path / "labelled", tmp_path / "plain"
    for n, file in enumerate(sorted(pictures.rglob("*.png"))):
        split = "test" if n % 3 == 0 else "train"
        target = labelled / split / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        if n % 2 == 0:  # half of both parts are in the other set too, under other names
            plain.mkdir(exist_ok=True)
            shutil.copy(file, plain / f"copy{n}.png")
    seen = Seen(monkeypatch)
    given = ["pretrain", str(plain), "--labels", str(labelled), *BRIEF, "--batch-size", "15"]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    assert "15 images are test images of --labels too (copy0.png" in capsys.readouterr().out
    assert len(seen.trained) == 30
    assert not seen.trained & {f"copy{n}.png" for n in range(0, 90, 6)}
    assert json.loads((tmp_path / "run" / "probes.json").read_text())["seen_in_pretraining"] == 0


def test_a_tokenizer_leaves_the_hold_out_away(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from underpaint import tokenize

    used: list[ImageSet] = []
    make_ready = tokenize.make_ready

    def noted(tokenizer: Any, making: tokenize.Making) -> Any:
        used.append(making.images)
        return make_ready(tokenizer, making)

    monkeypatch.setattr(tokenize, "make_ready", noted)
    seen = Seen(monkeypatch)
    words = ["tokenizer", str(pictures), "--out", str(tmp_path / "words.safetensors"), "--image-size", "16"]
    assert main([*words, "--stride", "4", "--codebook-size", "16"]) == 0
    evaluate = ["evaluate", "timm:vit_tiny_patch16_224", "--untrained", "--image-size", "16", "--data", str(pictures)]
    assert main([*evaluate, "--task", "knn", "--out", str(tmp_path / "worth")]) == 0
    assert len(used[0]) == 72
    assert not set(used[0].names) & set(seen.judged[0])


# -- what is read of many images ---------------------------------------------------------------------------------------


class Recorder(Backbone):
    """An encoder whose pooled features are the raw pixels, and which remembers how bright its images were."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.channels = 16, 3
        self.bright: list[float] = []

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 4, width // 4

    def forward(self, images: Tensor) -> Any:
        self.bright += images.mean(dim=(1, 2, 3)).tolist()
        generator = torch.Generator().manual_seed(0)
        patches = torch.rand(len(images), 16, 16, generator=generator)
        return Features(pooled=raw_pixels(images).float(), patches=patches)


class RecordingMethod(Method):
    def __init__(self) -> None:
        super().__init__()
        self.bright: list[float] = []

    def held_out(self, images: Tensor, draws: Draws) -> dict[str, tuple[Tensor, Tensor]]:
        self.bright += images.mean(dim=(1, 2, 3)).tolist()
        return {"mask": (torch.ones(len(images)), torch.ones(len(images)))}


def judge_of(folder: Path) -> ProbeSuite:
    def load(source: Source, indices: Indices) -> ImageSet:
        return load_images(source, indices, size=(16, 16))

    source = open_source(folder)
    indices = pretraining_indices(source)
    return ProbeSuite.of(source, load, load(source, indices), indices, (16, 16), 0)


@pytest.mark.quick
def test_rank_and_restoration_read_images_from_the_first_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(58):
        Image.fromarray(np.full((16, 16, 3), 4 * n, np.uint8)).save(tmp_path / f"{n:02d}.png")
    monkeypatch.setattr(probes_module, "QUICK_TEST", 20)
    monkeypatch.setattr(probes_module, "RESTORED", 20)
    judge, encoder, method = judge_of(tmp_path), Recorder(), RecordingMethod()
    judge.quick(encoder, IDENTITY)
    judge.restoration(method, IDENTITY)
    for bright in (encoder.bright, method.bright):
        places = np.array(bright) * 255 / 4
        assert len(places) == 20
        assert np.diff(places, prepend=0, append=57).max() < 3.5  # also at both ends


# -- few labels --------------------------------------------------------------------------------------------------------


def test_few_labels_are_drawn_from_all_images_alike_for_networks_and_floors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judge_of(write_pictures(tmp_path, 180, size=16))
    assert judge.splits is not None
    train, _ = judge.splits
    assert len(train.indices) == 144
    # as for a ViT-B/16 with 1,000 classes: memory holds two or three images a class, and one draw in half precision
    monkeypatch.setattr(probes_module, "TOKEN_MEMORY", 4.0 * 16 * 16 * 16)
    worth, floors = judge.worth(Recorder(), IDENTITY, 4), judge.baselines(4)
    for ours, theirs in zip(worth.probes["few_linear"], floors["raw_pixels"].probes["few_linear"], strict=True):
        assert np.array_equal(ours.correct, theirs.correct)
    assert len({probe.correct.tobytes() for probe in worth.probes["few_linear"]}) > 1
    few = judge.few(4)
    for draw in few.draws:
        assert np.bincount(draw.labels).tolist() == [10, 10, 10]
    assert 0 < few.overlap < 0.5  # 10 of 48 a class: 0.21
    assert worth.counts == {"attentive_train": 16, "attentive_test": 16, "shots": 10, "few_attentive_test": 16}
    assert "tested on 16" in judge.notes(worth.counts, 4)[0]
    monkeypatch.setattr(probes_module, "TOKEN_MEMORY", 4.0 * 14 * 16 * 16)
    assert "few_attentive" not in judge.worth(Recorder(), IDENTITY, 2).probes


def test_there_is_no_row_of_few_labels_where_a_class_has_too_few(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, 90, size=16)
    for file in sorted((folder / "class1").iterdir())[12:]:
        file.unlink()
    judge = judge_of(folder)
    worth, floors = judge.worth(Recorder(), IDENTITY, 2), judge.baselines(2)
    for found in (worth, *floors.values()):
        assert not any(name.startswith("few") for name in found.probes)
    assert "class class1 has 10 images to train on" in judge.notes(worth.counts, 2)[-1]


# -- untrained encoders, public weights --------------------------------------------------------------------------------


def test_an_untrained_encoder_with_batch_norms_is_worth_the_same_alone_and_as_the_row_beside(
    pictures: Path, tmp_path: Path
) -> None:
    arguments = create_arguments("resnet18", channels=[8, 16, 16, 32])
    torch.manual_seed(7)
    (tmp_path / "made").mkdir()
    save_encoder(tmp_path / "made", from_arguments(dict(arguments)), arguments, Standardize([0.5] * 3, [0.25] * 3))
    given = ["evaluate", str(tmp_path / "made"), "--data", str(pictures), "--task", "knn", "--image-size", "32"]
    assert main([*given, "--out", str(tmp_path / "both")]) == 0
    assert main([*given, "--out", str(tmp_path / "alone"), "--untrained"]) == 0
    both, alone = (
        json.loads((tmp_path / name / "results.json").read_text())["tasks"]["knn"]["rows"] for name in ("both", "alone")
    )
    assert alone["encoder"] == both["untrained"]


def test_public_weights_that_do_not_fit_in_full_are_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    create_model = timm.create_model

    def local(model_name: str, pretrained: bool = False, **given: Any) -> nn.Module:
        # as some published models are: their last norm has another name, and their attention no biases
        changed: dict[str, Any] = {"global_pool": "avg", "qkv_bias": False} if pretrained else {}
        return create_model(model_name, **(given | changed))

    monkeypatch.setattr(timm, "create_model", local)
    given = ["evaluate", "timm:vit_tiny_patch16_224", "--data", str(pictures), "--task", "knn", "--image-size", "32"]
    assert main([*given, "--out", str(tmp_path / "worth")]) == 0
    said = capsys.readouterr().out
    assert "135 weights taken as they are, 3 adapted; blocks.*.attn.qkv: not in the file (12)" in said
    assert "blocks.*.attn.qkv" in (tmp_path / "worth" / "table.md").read_text()
