"""`underpaint export`: what is written says the same as our encoder, in the libraries that it is for."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import write_pictures
from forked import CommandLine
from PIL import Image
from test_regression import write_bright
from test_transforms import saved
from timm.optim import create_optimizer_v2
from tiny import ENCODERS
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import underpaint
from underpaint.backbones import create_arguments, from_arguments, save_encoder
from underpaint.cli import main
from underpaint.data import Scaling
from underpaint.errors import Stopped
from underpaint.evaluation.bundle import open_bundle
from underpaint.evaluation.detect import AnchorConfig, detector
from underpaint.evaluation.keep import keep
from underpaint.evaluation.segment import segmenter
from underpaint.evaluation.settings import DetectConfig, SegmentConfig
from underpaint.exporting import FORMATS
from underpaint.exporting import export as exporting
from underpaint.exporting.subject import open_subject
from underpaint.patches import Standardize

pytestmark = pytest.mark.xdist_group("export")  # one process makes the run
TINY = {"encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2}


class Made:
    """A tiny run with what evaluations trained on it, made once, and images of its data."""

    def __init__(self, folder: Path, server: CommandLine):
        self.folder, self.server = folder, server
        self.pictures = write_pictures(folder / "pictures", 45)
        self.run, self.worth = folder / "run", folder / "worth"
        sets = [f"--set={name}={value}" for name, value in TINY.items()]
        small = ("--encoder", "vit_tiny_patch16_224", "--image-size", 32, "--patch-size", 8, "--steps", 3)
        self.call("pretrain", self.pictures, "--out", self.run, "--method", "mae", *small, "--batch-size", 16, *sets)
        asked = ("--task", "linear,attentive,finetune", "--recipe", "small", "--set", "epochs=1", "--out", self.worth)
        self.call("evaluate", self.run, "--data", self.pictures, *asked)

    def call(self, *arguments: Any) -> str:
        ended = self.server(*arguments)
        assert ended.status == 0, ended.error
        return ended.out + ended.error

    def images(self, count: int = 5) -> list[Path]:
        return sorted(self.pictures.rglob("*.png"))[:count]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: CommandLine) -> Made:
    return Made(tmp_path_factory.mktemp("exported"), server)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def usage(folder: Path, **names: Any) -> dict[str, Any]:
    """What the code of the card gives."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    with torch.no_grad():
        exec(compile(code.replace("PATH", str(folder)), "README.md", "exec"), names)
    return names


def test_timm_gives_our_features_and_is_trained_on(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = made.call("export", made.run, "--to", "timm", "--out", out)
    assert "images of its data" in said
    assert "tolerance 0.0001" in said
    encoder = underpaint.load_encoder(made.run)
    images = encoder.transform(made.images())
    with torch.no_grad():
        model: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        close(model(images), encoder(images).pooled)
        with Image.open(made.images()[0]) as image:
            named = usage(out, image=image)
        close(named["feature"], encoder(images[:1]).pooled)
        close(named["map"].flatten(2).transpose(1, 2), encoder(images[:1]).patches)
    # and as timm's train.py does, with a head of so many classes
    torch.manual_seed(0)
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=3, drop_path_rate=0.1)
    assert list(model.pretrained_cfg["mean"]) == list(encoder.takes.mean)  # pyright: ignore[reportOptionalMemberAccess]
    optimiser = create_optimizer_v2(model, opt="adamw", lr=3e-3, layer_decay=0.75)
    images, labels = encoder.transform(made.images(18)), torch.arange(18) // 15
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        losses.append(torch.nn.functional.cross_entropy(model(images), labels))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


def test_torchvision_detects_on_an_exported_backbone(tmp_path: Path) -> None:
    """A ResNet, as `features_only` makes a backbone of it; without our code, a step is taken and images are looked at."""
    out = underpaint.export(saved(tmp_path / "encoder", "resnet"), "timm", tmp_path / "out")
    taken: Any = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True, out_indices=[-1])

    class Backbone(torch.nn.Module):
        out_channels = taken.feature_info.channels()[-1]

        def __init__(self) -> None:
            super().__init__()
            self.body = taken

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"0": self.body(images)[0]}

    torch.manual_seed(0)
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    pool = MultiScaleRoIAlign(["0"], 3, 2)
    size = {"min_size": 32, "max_size": 32, "image_mean": [0.4] * 3, "image_std": [0.25] * 3}
    model = FasterRCNN(Backbone(), 2, rpn_anchor_generator=anchors, box_roi_pool=pool, **size)
    images = [torch.rand(3, 32, 32) for _ in range(2)]
    target = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([1])}
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        losses.append(sum(model(images, [target, target]).values()))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert "boxes" in model.eval()(images)[0]


def test_onnx_from_the_command_line(made: Made, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    assert "done:" in made.call("export", made.run, "--to", "onnx", "--out", out)
    session = ort.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    encoder = underpaint.load_encoder(made.run)
    assert encoder.takes is not None
    assert json.loads(said["mean"]) == pytest.approx(encoder.takes.mean)
    assert (said["opset"], said["feature_dim"], said["image_size"]) == ("20", "32", "[32, 32]")
    with torch.no_grad():
        for count in (1, 5):
            unit = encoder.takes.unit(made.images(count)).numpy()
            pooled, patches = session.run(["pooled", "patches"], {"images": unit})
            wanted = encoder(encoder.transform(made.images(count)))
            close(torch.from_numpy(pooled), wanted.pooled)
            close(torch.from_numpy(patches), wanted.patches)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_and_safetensors(made: Made, tmp_path: Path) -> None:
    encoder = underpaint.load_encoder(made.run)
    assert encoder.takes is not None
    with torch.no_grad():
        wanted = encoder(encoder.transform(made.images()))
        made.call("export", made.run, "--to", "torchscript", "--out", tmp_path / "script")
        extra = {"underpaint.json": ""}
        script = torch.jit.load(tmp_path / "script" / "model.pt", _extra_files=extra)
        assert json.loads(extra["underpaint.json"])["pooling"] == "mean of the normed patch tokens"
        pooled, patches = script(encoder.takes.unit(made.images()))
        close(pooled, wanted.pooled)
        close(patches, wanted.patches)
        made.call("export", made.run, "--to", "safetensors", "--out", tmp_path / "own")
        again = underpaint.load_encoder(tmp_path / "own")
        close(again(again.transform(made.images())).pooled, wanted.pooled)
    described = json.loads((tmp_path / "own" / "encoder.json").read_text())
    assert described["trained_on"]["images"] == 36


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViT": {**ENCODERS["vit"]},
    "ViT layer scale": {**ENCODERS["vit"], "init_values": 0.1, "no_embed_class": True},
    "Dinov2WithRegisters": {**ENCODERS["vit"], "reg_tokens": 2},
    "Swin": {**ENCODERS["swin"], "depths": (2, 1), "num_heads": (1, 2)},
    "Swinv2": {
        "name": "swinv2_tiny_window8_256",
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 1),
        "num_heads": (1, 2),
    },
    "ResNet": {"name": "resnet26", "channels": (8, 8, 16, 16)},
    "ResNet basic": {"name": "resnet18", "channels": (8, 8, 16, 16)},
    "ConvNext": {"name": "convnext_tiny", "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "ConvNextV2": {"name": "convnextv2_atto", "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}


def random_encoder(folder: Path, chosen: dict[str, Any], size: tuple[int, int] = (32, 32)) -> Path:
    """With weights none of which are as they begin: norms, scales and biases too."""
    torch.manual_seed(0)
    arguments = create_arguments(**chosen, image_size=size)
    encoder = from_arguments(arguments, size).eval()
    with torch.no_grad():
        for name, value in encoder.model.state_dict().items():
            if value.is_floating_point() and "logit_scale" not in name and "relative" not in name:
                value.add_(torch.rand_like(value) * (0.3 if value.ndim == 1 else 0.05))
    folder.mkdir(parents=True, exist_ok=True)
    colour = Scaling("uint8", ("uint8",), (0.0,) * 3, (255.0,) * 3, (0.5,) * 3)
    save_encoder(folder, encoder, arguments, Standardize([0.4, 0.5, 0.6], [0.25] * 3), colour)
    return folder


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_classes_give_our_features(kind: str, library: Any, made: Made, tmp_path: Path) -> None:
    source = random_encoder(tmp_path / "encoder", TRANSFORMERS[kind])
    out = underpaint.export(source, "transformers", tmp_path / "out")
    model = library.AutoModel.from_pretrained(out)
    assert type(model).__name__ == f"{kind.split()[0]}Model"
    assert not list(out.glob("*.py"))
    encoder = underpaint.load_encoder(source)
    with Image.open(made.images()[0]) as image, torch.no_grad():
        wanted = encoder(encoder.transform([image]))
        named = usage(out, image=image)
    images = named["images"]["pixel_values"]
    close(images, encoder.transform(made.images(1)))
    close(named["feature"], wanted.pooled)
    assert wanted.pooled.std() > 1e-2


def test_classifiers_as_transformers_and_timm(made: Made, library: Any, tmp_path: Path) -> None:
    """What was fine-tuned, and the linear probe, which is a head of the same network."""
    for task, folder in (("finetune", made.worth / "finetune"), ("linear", made.worth / "linear")):
        underpaint.predict(folder, made.pictures, tmp_path / task)
        rows = [row.split(",") for row in (tmp_path / task / "predictions.csv").read_text().splitlines()[1:]]
        wanted = {row[0]: (row[1], float(row[2])) for row in rows}
        out = underpaint.export(folder, "transformers", tmp_path / f"{task}-transformers")
        classifier = library.AutoModelForImageClassification.from_pretrained(out)
        processor = library.AutoImageProcessor.from_pretrained(out)
        plain = timm.create_model(
            f"local-dir:{underpaint.export(folder, 'timm', tmp_path / f'{task}-timm')}", pretrained=True
        )
        for path in made.images(3):
            with Image.open(path) as image, torch.no_grad():
                images = processor(image, return_tensors="pt")
                scores = classifier(**images).logits.softmax(1)[0]
                close(plain.eval()(images["pixel_values"]).softmax(1)[0], scores)
            name, probability = wanted[str(path.relative_to(made.pictures))]
            assert classifier.config.id2label[int(scores.argmax())] == name
            assert float(scores.max()) == pytest.approx(probability, abs=2e-4)


def test_other_families_say_what_would_do(made: Made, library: Any, tmp_path: Path, capsys: Any) -> None:
    cases: list[tuple[Any, str, str]] = [
        (saved(tmp_path / "r", "resnet"), "transformers", "its stem or blocks are no plain ResNet's"),
        (
            random_encoder(tmp_path / "e", {"name": "efficientnet_b0"}),
            "transformers",
            "EfficientNet is not among its classes",
        ),
        (random_encoder(tmp_path / "n", {**ENCODERS["vit"], "class_token": False}), "transformers", "no class token"),
        (random_encoder(tmp_path / "q", {**ENCODERS["vit"], "qk_norm": True}), "transformers", "ViTModel"),
        (
            random_encoder(tmp_path / "s", {**ENCODERS["swin"], "depths": (1,) * 4, "num_heads": (1,) * 4}),
            "transformers",
            "windows are not all alike",
        ),
        (made.worth / "attentive", "timm", "what 'attentive' trains is no network of timm's own"),
    ]
    for source, to, said in cases:
        assert main(["export", str(source), "--to", to, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "would do" in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_a_package_that_is_not_there(
    made: Made, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    run = str(made.run)
    monkeypatch.setitem(FORMATS, "onnx", FORMATS["onnx"]._replace(packages=("no_such_package",)))
    for arguments, said in (
        ([run, "--to", "timm", "--out", str(tmp_path / "mine")], "is no export of underpaint"),
        ([run, "--to", "timm", "--out", str(tmp_path / "file")], "is a file"),
        ([run, "--to", "tim", "--out", str(tmp_path / "out")], "invalid choice: 'tim'"),
        (["nowhere", "--to", "timm", "--out", str(tmp_path / "out")], "nowhere: no such encoder"),
        ([run, "--to", "onnx", "--out", str(tmp_path / "out")], "no_such_package: pip install underpaint[onnx]"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_what_differs_is_not_kept(made: Made, tmp_path: Path, monkeypatch: Any) -> None:
    """One weight that is wrong after it was written; and an earlier export stays as it was."""
    out = underpaint.export(made.run, "safetensors", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    writer = exporting.writer

    def spoiled(to: str) -> Any:
        def write(subject: Any, folder: Path) -> Any:
            found = writer(to)(subject, folder)
            return found._replace(
                read=lambda images: {name: value * 1.0002 for name, value in found.read(images).items()}
            )

        return write

    monkeypatch.setattr(exporting, "writer", spoiled)
    with pytest.raises(Stopped, match=r"pooled 0\.0002"):
        underpaint.export(made.run, "safetensors", out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_without_the_runs_data_photographs_are_taken(tmp_path: Path) -> None:
    source = random_encoder(tmp_path / "encoder", ENCODERS["vit"], (32, 64))
    out = underpaint.export(source, "timm", tmp_path / "out")
    said = json.loads((out / "export.json").read_text())
    assert (said["images"], said["compared_on"]) == (8, "photographs of the demo")
    assert 0 <= said["differences"]["pooled"] < said["tolerance"]
    assert "On which images its weights were trained is not known" in (out / "README.md").read_text()


def test_the_card_says_where_it_is_from_and_what_it_is_worth(made: Made, tmp_path: Path) -> None:
    said = (underpaint.export(made.run, "safetensors", tmp_path / "run") / "README.md").read_text()
    head = yaml.safe_load(said.split("---")[1])
    assert head == {
        "library_name": "underpaint",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["underpaint", "self-supervised", "vit_tiny_patch16_224"],
    }
    assert "# license: FILL IN" in said
    for part in (
        "36 images, 3 channels, read from a folder",
        "Weights started from random numbers",
        "method: {name: mae",
        "| step | images | loss | trivial | linear probe |",
        "| pretrained |",
        "Train longer.",
        "## Limits",
    ):
        assert part in said, part
    assert str(made.folder) not in said
    tuned = underpaint.export(made.worth / "finetune", "safetensors", tmp_path / "tuned")
    said = (tuned / "README.md").read_text()
    assert "Classes: class0, class1, class2." in said
    assert "## What `finetune` came to" in said
    assert str(made.folder) not in said + (tuned / "model.json").read_text() + (tuned / "export.json").read_text()


def test_started_weights_are_named_with_their_licence(made: Made, tmp_path: Path) -> None:
    folder = random_encoder(tmp_path / "encoder", ENCODERS["vit"])
    described = json.loads((folder / "encoder.json").read_text())
    described["start"] = {"from": "timm", "name": "vit_tiny_patch16_224.augreg_in21k", "licence": "apache-2.0"}
    (folder / "encoder.json").write_text(json.dumps(described))
    said = (underpaint.export(folder, "safetensors", tmp_path / "out") / "README.md").read_text()
    assert "Weights started from timm vit_tiny_patch16_224.augreg_in21k (licence: apache-2.0)" in said


def kept(folder: Path, task: str) -> Path:
    """A segmenter or a detector on a tiny ViT, as `evaluate` keeps one, with random weights."""
    bundle = open_bundle(str(random_encoder(folder / "encoder", ENCODERS["vit"])))
    torch.manual_seed(0)
    kind, _, head = task.partition("-")
    facts: dict[str, object]
    if kind == "segment":
        config = SegmentConfig(channels=16)
        network, facts = segmenter(bundle.encoder, head, 2, bundle.size, config), {"settings": asdict(config)}
        torch.nn.init.normal_(network.head.weight)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    else:
        config, sizes = DetectConfig(channels=16), AnchorConfig(((4.0, 8.0),), 100, 2)
        network: Any = detector(bundle.encoder, bundle.size, 2, True, sizes, config)
        scores = network.roi_heads.box_predictor.cls_score  # so that some regions hold an object and most do not
        torch.manual_seed(0)
        torch.nn.init.normal_(scores.weight, std=3)
        torch.nn.init.constant_(scores.bias, 0)
        scores.bias.data[0] = 6
        facts = {"settings": asdict(config), "sizes": asdict(sizes), "masks": True, "categories": [1, 2]}
    keep(folder / task, task, bundle, network.eval(), ["round", "square"], facts)
    return folder / task


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("task", ["segment-linear", "segment-upernet"])
def test_segmenters_as_graphs(task: str, made: Made, tmp_path: Path) -> None:
    source = kept(tmp_path, task)
    made.call("export", source, "--to", "torchscript", "--out", tmp_path / "script")
    subject = open_subject(str(source))
    images = torch.rand(3, 3, 32, 32)
    wanted = subject.outputs(images)["logits"]
    assert wanted.shape == (3, 2, 32, 32)
    with torch.no_grad():
        close(torch.jit.load(tmp_path / "script" / "model.pt")(images)[0], wanted)
    made.call("export", source, "--to", "safetensors", "--out", tmp_path / "own")
    close(open_subject(str(tmp_path / "own")).outputs(images)["logits"], wanted)
    if task == "segment-linear":
        made.call("export", source, "--to", "onnx", "--out", tmp_path / "onnx")
        session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "onnx" / "model.onnx")
        assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["round", "square"]
        close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), wanted)
    assert main(["export", str(source), "--to", "timm", "--out", str(tmp_path / "timm")]) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_detector_as_torchscript(made: Made, tmp_path: Path) -> None:
    """Of one image at a time, with as many objects as it finds: on a blank image others than on a picture."""
    source = kept(tmp_path, "detect")
    made.call("export", source, "--to", "torchscript", "--out", tmp_path / "script")
    script, subject = torch.jit.load(tmp_path / "script" / "model.pt"), open_subject(str(source))
    assert subject.names == ("boxes", "labels", "scores", "masks")
    counts = set()
    for images in (torch.zeros(1, 3, 32, 32), torch.rand(1, 3, 32, 32)):
        wanted = subject.outputs(images)
        with torch.no_grad():
            found = dict(zip(subject.names, script(images), strict=True))
        counts.add(len(wanted["boxes"]))
        for name in subject.names:
            close(found[name].float(), wanted[name].float())
    assert len(counts) == 2
    assert main(["export", str(source), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_an_attentive_probe_and_a_regression_in_every_format_that_takes_them(made: Made, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    bright, worth = write_bright(tmp_path / "bright", 30), tmp_path / "worth"
    made.call("evaluate", made.run, "--data", bright, "--task", "regression", "--out", worth)
    images = torch.rand(3, 3, 32, 32)
    for source, name, shape in (
        (made.worth / "attentive", "logits", (3, 3)),
        (worth / "regression", "number", (3, 1)),
    ):
        wanted = open_subject(str(source)).outputs(images)[name]
        assert wanted.reshape(3, -1).shape == shape
        assert wanted.std() > 1e-4
        made.call("export", source, "--to", "torchscript", "--out", tmp_path / f"{name}-script")
        with torch.no_grad():
            close(torch.jit.load(tmp_path / f"{name}-script" / "model.pt")(images)[0], wanted)
        made.call("export", source, "--to", "safetensors", "--out", tmp_path / f"{name}-own")
        close(open_subject(str(tmp_path / f"{name}-own")).outputs(images)[name], wanted)
        made.call("export", source, "--to", "onnx", "--out", tmp_path / f"{name}-onnx")
        session = ort.InferenceSession(tmp_path / f"{name}-onnx" / "model.onnx", providers=["CPUExecutionProvider"])
        close(torch.from_numpy(session.run([name], {"images": images.numpy()})[0]), wanted)
    out = underpaint.export(worth / "regression", "timm", tmp_path / "regression-timm")
    encoder = underpaint.load_encoder(made.run)
    assert encoder.takes is not None
    with torch.no_grad():
        plain: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        said = plain(encoder.transform(made.images(3)))
    wanted = open_subject(str(worth / "regression")).outputs(encoder.takes.unit(made.images(3)))["number"]
    close(said.flatten(), wanted.flatten())


def test_a_convolutional_net_in_onnx_takes_any_size(made: Made, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    source = random_encoder(tmp_path / "encoder", TRANSFORMERS["ConvNext"])
    made.call("export", source, "--to", "onnx", "--out", tmp_path / "out")
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["any_size"] == "true"
    encoder = open_bundle(str(source))
    for size in ((1, 32, 32), (2, 64, 96)):
        images = torch.rand(size[0], 3, *size[1:])
        with torch.no_grad():
            wanted = encoder.encoder(encoder.standardize(images)).pooled
        close(torch.from_numpy(session.run(["pooled"], {"images": images.numpy()})[0]), wanted)
