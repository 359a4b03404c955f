"""Files of somebody else: nothing in them makes this program open another file, ask a network, or run code."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import underpaint
from underpaint.backbones import create_arguments, from_arguments, save_encoder
from underpaint.backbones.build import architecture_arguments, create_model
from underpaint.cli import main
from underpaint.errors import InputError
from underpaint.patches import Standardize

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


class Trace:
    """A pickle that leaves a file where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    file = tmp_path / "weights.pth"
    torch.save(Trace(tmp_path / "trace"), file)
    return file


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network: whoever asks for an address fails the test."""
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda _, where: asked.append(where))
    yield
    assert not asked


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """An encoder of somebody else."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    arguments = create_arguments("vit_tiny_patch16_224", image_size=(16, 16), patch_size=4, **SMALL)
    save_encoder(folder, from_arguments(arguments), arguments, Standardize([0.5] * 3, [0.25] * 3))
    return folder


HOSTILE: dict[str, Any] = {
    "checkpoint_path": "FILE",
    "pretrained": True,
    "pretrained_cfg": {"file": "FILE"},
    "pretrained_cfg_overlay": {"url": "http://example.org/weights.pth"},
    "cache_dir": "FILE",
    "model_name": "hf-hub:somebody/something",
}


@pytest.mark.quick
@pytest.mark.parametrize("argument", [*HOSTILE, "local"])
def test_an_encoder_says_its_architecture_and_nothing_else(
    argument: str, theirs: Path, pickled: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    file = theirs / "encoder.json"
    described = json.loads(file.read_text())
    value = HOSTILE.get(argument, f"local-dir:{tmp_path}")
    value = json.loads(json.dumps(value).replace("FILE", str(pickled)))
    described["create_model"]["model_name" if argument == "local" else argument] = value
    file.write_text(json.dumps(described))
    with pytest.raises(InputError):
        underpaint.load_encoder(theirs)
    assert main(["embed", str(theirs), str(pictures), "--out", str(tmp_path / "vectors.parquet")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "timm has no model" in said if argument in ("model_name", "local") else f"'{argument}' is no part of" in said
    assert not (tmp_path / "trace").exists()


@pytest.mark.quick
@pytest.mark.parametrize("argument", HOSTILE)
@pytest.mark.parametrize("task", ["linear", "finetune", "segment-linear", "detect"])
def test_what_an_evaluation_trained_says_no_more(
    argument: str, task: str, theirs: Path, pickled: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    described = json.loads((theirs / "encoder.json").read_text()) | {"task": task, "image_size": [16, 16]}
    described |= {"classes": ["a", "b"], "labels": [0, 1], "encoder": "theirs", "settings": {}, "masks": False}
    described["create_model"][argument] = json.loads(json.dumps(HOSTILE[argument]).replace("FILE", str(pickled)))
    (theirs / "model.json").write_text(json.dumps(described))
    save_file({"weight": torch.zeros(1)}, theirs / "model.safetensors")
    assert main(["predict", str(theirs), str(pictures), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("timm has no model" if argument == "model_name" else f"'{argument}' is no part of") in said
    assert not (tmp_path / "trace").exists()


@pytest.mark.quick
@pytest.mark.parametrize("argument", [name for name in HOSTILE if name != "model_name"])
def test_a_recipe_says_no_more_of_its_encoder(
    argument: str, pickled: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    value = json.dumps(HOSTILE[argument]).replace("FILE", str(pickled))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: {{name: mae}}\nencoder: {{name: vit_tiny_patch16_224, {argument}: {value}}}\n")
    command = ["pretrain", str(pictures), "--out", str(tmp_path / "run"), "--recipe", str(recipe)]
    assert main([*command, "--image-size", "32", "--steps", "1"]) == 2
    assert f"'{argument}' is no part of" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


@pytest.mark.quick
def test_weights_to_start_from_are_no_pickle(pickled: Path, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["pretrain", str(pictures), "--out", str(tmp_path / "run"), "--method", "mae", "--init", str(pickled)]
    assert main([*command, "--encoder", "vit_tiny_patch16_224", "--image-size", "32", "--steps", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "trace").exists()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["encoder.safetensors", "model.safetensors"])
def test_weights_that_are_a_pickle_are_not_read(
    name: str, theirs: Path, pickled: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    (theirs / name).write_bytes(pickled.read_bytes())
    command = ["embed", str(theirs), str(pictures)]
    if name == "model.safetensors":
        described = json.loads((theirs / "encoder.json").read_text())
        (theirs / "model.json").write_text(json.dumps(described | {"task": "linear"}))
        command = ["predict", str(theirs), str(pictures)]
    assert main([*command, "--out", str(tmp_path / "out.parquet")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "trace").exists()


@pytest.mark.quick
def test_yaml_makes_no_objects(tmp_path: Path, pictures: Path, capsys: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'trace'}]\n")
    assert main(["pretrain", str(pictures), "--out", str(tmp_path / "run"), "--recipe", str(recipe)]) == 2
    assert "not YAML" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_what_may_be_said_of_a_model_is_read_from_timm(name: str) -> None:
    known = architecture_arguments(name)
    assert {"num_classes", "in_chans", "drop_path_rate", "norm_layer"} <= known
    assert not known & {"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    with pytest.raises(InputError, match="'scriptable' is no part of"):
        create_model({"model_name": name, "scriptable": True})


@pytest.mark.quick
def test_the_trace_is_one(pickled: Path, tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    torch.load(pickled, weights_only=False)
    assert (tmp_path / "trace").exists()
