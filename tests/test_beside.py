"""`underpaint evaluate --beside`: the same task with public weights, from scratch and ours, and what is said of it."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from asking import pretrain
from conftest import write_pictures
from forked import CommandLine
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from scenes import write_scenes

from underpaint.cli import main
from underpaint.evaluation.beside import Arm, advice, needed, shares_of
from underpaint.evaluation.results import means

TINY = {"encoder.embed_dim": 32, "encoder.depth": 1, "encoder.num_heads": 2, "method.decoder_dim": 32}
PUBLIC = "timm:test_vit"
features_module: Any = import_module("underpaint.evaluation.features")
visualizations_module: Any = import_module("underpaint.evaluation.visualizations")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("some") / "pictures", 240, classes=2)


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    flags: dict[str, Any] = {"method": "mae", "encoder": "vit_tiny_patch16_224", "image_size": (32, 32)}
    pretrain(pictures, out, **flags, patch_size=8, batch_size=8, steps=1, settings=TINY, stop_at=1e9)
    return out


@pytest.fixture
def public(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights where those that were fetched lie, and a network that fails where it is asked."""
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = timm.get_pretrained_cfg("test_vit")
    assert config is not None
    assert config.hf_hub_id is not None
    place = tmp_path / "hub" / f"models--{config.hf_hub_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=config.num_classes)
    file = place / "snapshots" / ("0" * 40) / "model.safetensors"
    save_file(dict(model.state_dict()), file)
    return file


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_public_weights_from_scratch_and_ours_stand_in_one_table(
    run: Path,
    pictures: Path,
    public: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "worth"
    command = ["evaluate", str(run), "--data", str(pictures), "--image-size", "32", "--out", str(out), "--task"]
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))  # where no features are yet
    extracted: list[int] = []
    plain = features_module.extract

    def counting(encoder: Any, batches: Any, **given: Any) -> Any:
        found = plain(encoder, batches, **given)
        extracted.append(len(found.samples) if isinstance(encoder, torch.nn.Module) else 0)
        return found

    monkeypatch.setattr(features_module, "extract", counting)
    monkeypatch.setattr(visualizations_module, "extract", counting)
    assert main([*command, "linear", "--beside", PUBLIC]) == 0
    # all see the images once, shares of the labels and neighbours included (the untrained one has the same weights, since the
    # rate of a run's only step is 0); the colours of patches need tokens, which a linear task does not
    assert sum(extracted) == 2 * 240 + 2 * 192
    task = results(out)["tasks"]["linear"]
    assert task["gains"]["encoder over untrained"]["accuracy"] == 0
    assert list(task["rows"]) == ["encoder", PUBLIC, "untrained", "raw pixels", "HOG", "majority"]
    assert set(task["gains"]) == {"encoder over untrained", f"encoder over {PUBLIC}"}
    gain = task["gains"][f"encoder over {PUBLIC}"]
    assert gain["accuracy"] == pytest.approx(task["rows"]["encoder"]["accuracy"] - task["rows"][PUBLIC]["accuracy"])
    # 1 % of 192 images are fewer than five of each class
    assert [part["train"] for part in task["fewer"]] == [19]
    assert set(task["fewer"][0]["rows"]) == {"encoder", PUBLIC, "untrained"}
    assert any("1 % of 192 images is fewer than 10" in said for said in task["verdict"])
    page = (out / "report.html").read_text()
    assert "Accuracy by the number of labels" in page
    assert capsys.readouterr().out.count("linear: ") > 5
    # what the public weights were trained to can be used, and another encoder is added to what is there
    assert main(["predict", str(out / "beside/timm-test_vit/linear"), str(pictures), "--out", str(tmp_path / "p")]) == 0
    assert main([*command, "linear", "--beside", PUBLIC]) == 0
    assert "finished before, and kept: linear" in capsys.readouterr().out
    assert main([*command, "linear", "--beside", PUBLIC, "--beside", str(run)]) == 0
    more = results(out)["tasks"]["linear"]
    assert more["rows"][str(run)] == more["rows"]["encoder"]
    assert {name: more["rows"][name] for name in task["rows"]} == task["rows"]
    save_file({name: value + 1 for name, value in timm.create_model("test_vit").state_dict().items()}, public)
    assert main([*command, "linear", "--beside", PUBLIC]) == 2
    assert f"the weights of {PUBLIC} have changed since" in capsys.readouterr().err


def test_weights_that_are_not_there_are_one_line_before_anything_is_trained(
    run: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unknown(host: str, port: int) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("underpaint.backbones.weights.socket.getaddrinfo", unknown)
    command = ["evaluate", str(run), "--data", str(pictures), "--task", "knn", "--out", str(tmp_path / "worth")]
    assert main([*command, "--beside", PUBLIC]) == 2
    error = capsys.readouterr().err
    assert "timm:test_vit: the weights cannot be fetched, since" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "worth" / "results.json").exists()
    assert main([*command, "--beside", "runs/none"]) == 2
    assert "no such encoder" in capsys.readouterr().err
    assert main([*command, "--beside", PUBLIC, "--beside", PUBLIC]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_arms_that_are_trained_go_on_after_a_kill(
    run: Path, pictures: Path, server: CommandLine, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    flags: dict[str, Any] = {"method": "mae", "encoder": "vit_tiny_patch16_224", "image_size": (32, 32), "seed": 1}
    pretrain(pictures, other, **flags, patch_size=16, batch_size=8, steps=1, settings=TINY, stop_at=1e9)
    command = ["evaluate", run, "--data", pictures, "--task", "finetune", "--set", "epochs=1", "--beside", other]
    command += ["--set", "batch_size=32", "--label-fraction", "1", "--out"]
    assert server(*command, tmp_path / "whole").status == 0
    # the two networks of 6 steps each are trained, the arm half
    assert server(*command, tmp_path / "out", die=("term underpaint.train.stepper:Stepper.step", 15)).status == 143
    again = server(*command, tmp_path / "out")
    assert again.status == 0, again.error
    assert again.out.count("going on from step 6") == 2
    assert again.out.count("going on from step 3") == 1
    whole, out = (results(tmp_path / name)["tasks"]["finetune"] for name in ("whole", "out"))
    assert list(whole["rows"]) == ["encoder", str(other), "untrained", "majority"]
    assert whole["rows"] == out["rows"]
    assert whole["fewer"] == []  # one share of the labels was asked for
    assert set(whole["trained"]) == {"encoder", "untrained", str(other)}
    assert "fewer than 20 steps" in whole["verdict"][0]


def test_detectors_beside_each_other(run: Path, server: CommandLine, tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", 6, 3, (32, 32))
    command = ["evaluate", run, "--data", scenes, "--task", "detect", "--set", "steps=2", "--set", "channels=16"]
    other = shutil.copytree(run, tmp_path / "copy")
    ended = server(*command, "--set", "regions=8", "--beside", other, "--untrained", "--out", tmp_path / "out")
    assert ended.status == 0, ended.error
    task = results(tmp_path / "out")["tasks"]["detect"]
    assert list(task["rows"]) == ["encoder", str(other)]
    # 6 images: a tenth is none, so the curve begins with the fewest that will do or is left out
    assert {"box_ap", "mask_ap"} <= set(task["gains"][f"encoder over {other}"])
    assert (tmp_path / "out" / "beside").is_dir()


# -- what is said ------------------------------------------------------------------------------------------------------


def arms(**shares: float) -> list[Arm]:
    """Encoders that put such shares of 1,000 test images right, each of them among those of the better ones."""
    roles: Any = {"own": "own", "scratch": "scratch"}
    hits = {name: np.arange(1000) < 1000 * share for name, share in shares.items()}
    return [
        Arm(f"timm:{name}" if name == "public" else name, roles.get(name, "other"), means({"accuracy": right}))
        for name, right in hits.items()
    ]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"own": 0.7, "scratch": 0.5, "public": 0.6}, "take this encoder: it is measurably above timm:public (+10.0"),
        ({"own": 0.7, "scratch": 0.5, "public": 0.8}, "keep timm:public: it is measurably above this encoder (+10.0"),
        ({"own": 0.7, "scratch": 0.5, "public": 0.8}, "`pretrain --init timm:public` would go on from it"),
        (
            {"own": 0.7, "scratch": 0.5, "public": 0.701},
            "timm:public cannot be told from this encoder (+0.1 ± 0.1 points)",
        ),
        ({"own": 0.7, "scratch": 0.5, "public": 0.701}, "either serves, and timm:public needs no pretraining"),
        ({"own": 0.7, "scratch": 0.701, "public": 0.5}, "no pretrained weights have shown to help here"),
        ({"own": 0.5, "scratch": 0.7, "public": 0.4}, "train from scratch"),
    ],
)
@pytest.mark.quick
def test_words_follow_what_can_be_told_apart(shares: dict[str, float], said: str) -> None:
    assert said in advice(arms(**shares), "accuracy")


@pytest.mark.quick
def test_what_needs_no_network_is_named_where_it_is_better() -> None:
    own, scratch, floor = arms(own=0.7, scratch=0.5, pixels=0.9)
    assert "but pixels, without any network, does measurably better" in advice(
        [own, scratch], "accuracy", {"pixels": floor.measured}
    )
    assert "network, does" not in advice([own, floor], "accuracy", {"pixels": scratch.measured})


@pytest.mark.quick
def test_less_is_better_where_it_is_an_error() -> None:
    rng = np.random.default_rng(0)
    errors = rng.uniform(1, 2, 200)
    own, scratch = (means({"mae": errors + more + 0.01 * rng.normal(size=200)}) for more in (0.0, 0.5))
    assert "take this encoder" in advice([Arm("a", "own", own), Arm("b", "scratch", scratch)], "mae")


@pytest.mark.quick
def test_labels_needed_are_read_off_the_curves() -> None:
    curves = {"scratch": [(10, 0.1), (100, 0.2), (1000, 0.4)], "ours": [(10, 0.3), (100, 0.35), (1000, 0.45)]}
    said = needed(curves, "accuracy")
    assert "what scratch reaches with all 1" in said
    # 0.4 is half of the way from 100 to 1,000 images
    assert "by ours with about 320" in said
    assert "with 10 or fewer" in needed({**curves, "best": [(10, 0.5), (100, 0.6), (1000, 0.7)]}, "accuracy")


@pytest.mark.quick
def test_shares_of_few_images() -> None:
    assert shares_of(10_000, 50) == ([0.01, 0.1], "")
    assert shares_of(1_000, 50)[0] == [0.05, 0.1]
    few, said = shares_of(90, 15)
    assert [round(90 * share) for share in few] == [15]
    assert "1 % and 10 % of 90 images are fewer than 15" in said
    assert "begins with 15 images" in said
    assert shares_of(20, 15)[0] == []
    assert "there is no curve" in shares_of(20, 15)[1]
