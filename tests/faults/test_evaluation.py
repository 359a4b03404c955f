"""An evaluation that was interrupted anywhere goes on, and ends with the numbers of one that was not."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from asking import pretrain
from conftest import write_pictures
from forked import CommandLine
from scenes import write_scenes

from underpaint.cli import main

SIGKILLED, TERMINATED = -9, (143, -15)
TINY = {"encoder.embed_dim": 32, "encoder.depth": 1, "encoder.num_heads": 2, "method.decoder_dim": 32}
FINETUNE = ["--task", "knn,finetune", "--set", "epochs=2", "--set", "batch_size=8"]
DETECT = ["--task", "detect", "--set", "steps=4", "--set", "batch_size=2", "--set", "channels=16", "--set", "regions=8"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("few") / "pictures", 40, classes=2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 6, 3, (32, 32))


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    flags: dict[str, Any] = {"method": "mae", "encoder": "vit_tiny_patch16_224", "image_size": (32, 32)}
    pretrain(pictures, out, **flags, patch_size=8, batch_size=8, steps=1, settings=TINY, stop_at=1e9)
    return out


def numbers(out: Path) -> dict[str, Any]:
    """All that was found, without the time that it took."""
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    for task in tasks.values():
        for trained in task.get("trained", {}).values():
            del trained["minutes"]
    assert (out / "report.html").is_file()
    return tasks


@pytest.fixture(scope="module")
def undisturbed(
    run: Path, pictures: Path, scenes: Path, server: CommandLine, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    found = {}
    for name, data, tasks in (("finetune", pictures, FINETUNE), ("detect", scenes, DETECT)):
        out = tmp_path_factory.mktemp("undisturbed") / name
        ended = server("evaluate", run, "--data", data, *tasks, "--out", out)
        assert ended.status == 0, ended.error
        found |= numbers(out)
    return found


STEP, STORED = "underpaint.train.stepper:Stepper.step", "underpaint.evaluation.base:stored_features"


@pytest.mark.parametrize(
    ("moment", "count", "kept"),
    [
        ("kill underpaint.evaluation.features:np.save", 5, ""),  # in the second pass of features
        ("term underpaint.evaluation.features:np.save", 5, "no finished task yet"),
        (f"kill {STORED}", 3, ""),  # between two rows
        ("kill underpaint.evaluation.runner:write_report", 1, "knn, finetune"),  # all is judged
        (f"kill {STEP}", 3, "knn"),
        (f"term {STEP}", 3, "knn, the checkpoints of finetune"),
        (f"kill {STEP}", 10, "knn"),  # the encoder is trained, the untrained one half
        (f"term {STEP}", 10, "knn, the checkpoints of finetune"),
        ("kill underpaint.evaluation.finetune:FineTune.predict", 2, "knn"),
        ("term underpaint.evaluation.finetune:FineTune.predict", 2, "knn, the checkpoints of finetune"),
        ("kill underpaint.evaluation.runner:keep", 1, "knn"),
    ],
)
def test_a_classification_goes_on(
    moment: str,
    count: int,
    kept: str,
    run: Path,
    pictures: Path,
    server: CommandLine,
    tmp_path: Path,
    undisturbed: dict[str, Any],
) -> None:
    shutil.rmtree(server.folder / "cache" / "features", ignore_errors=True)
    goes_on(["evaluate", run, "--data", pictures, *FINETUNE], moment, count, kept, server, tmp_path / "out")
    assert numbers(tmp_path / "out") == {name: undisturbed[name] for name in ("knn", "finetune")}


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        (f"term {STEP}", 2),
        (f"kill {STEP}", 6),
        ("kill underpaint.evaluation.detect:detected", 2),
        ("term underpaint.evaluation.detect:average_precision", 2),
    ],
)
def test_a_detector_goes_on(
    moment: str, count: int, run: Path, scenes: Path, server: CommandLine, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    goes_on(["evaluate", run, "--data", scenes, *DETECT], moment, count, "", server, tmp_path / "out")
    assert numbers(tmp_path / "out") == {"detect": undisturbed["detect"]}


def goes_on(command: Sequence[Any], moment: str, count: int, kept: str, server: CommandLine, out: Path) -> None:
    """The command, ended at a moment, says what is kept where it can; given again it takes that and ends well."""
    ended = server(*command, "--out", out, die=(moment, count))
    assert ended.status in ((SIGKILLED,) if moment.startswith("kill") else TERMINATED), ended.error
    if ended.status == 143 and kept:
        assert f"interrupted; kept in {out}: {kept}; the same command goes on" in ended.out
    again = server(*command, "--out", out)
    assert again.status == 0, again.error
    assert ("finished before, and kept: knn" in again.out) == kept.startswith("knn")


def test_predictions_go_on(run: Path, pictures: Path, server: CommandLine, tmp_path: Path) -> None:
    worth = tmp_path / "worth"
    assert server("evaluate", run, "--data", pictures, "--task", "linear", "--out", worth).status == 0
    assert server("predict", worth, pictures, "--out", tmp_path / "whole").status == 0
    command = ["predict", worth, pictures, "--out", tmp_path / "used"]
    for moment in ("kill underpaint.evaluation.classify:to_rgb", "kill underpaint.evaluation.classify:contact_sheet"):
        assert server(*command, die=(moment, 1)).status == SIGKILLED
    assert server(*command).status == 0
    for name in ("predictions.csv", "predictions.png"):
        assert (tmp_path / "used" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_is_finished_is_kept_and_not_taken_for_something_else(
    run: Path, pictures: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, images = shutil.copytree(run, tmp_path / "run"), shutil.copytree(pictures, tmp_path / "pictures")
    out = tmp_path / "out"

    def said(tasks: str, *more: str, status: int = 2) -> str:
        capsys.readouterr()
        assert main(["evaluate", str(own), "--data", str(images), "--task", tasks, "--out", str(out), *more]) == status
        found = capsys.readouterr()
        return found.out if status == 0 else found.err

    assert "finished before" not in said("knn,outliers", "--against", str(pictures), status=0)
    before = numbers(out)
    assert "finished before, and kept: knn\n" in said("knn,linear", status=0)
    assert {name: numbers(out)[name] for name in before} == before
    other = write_pictures(tmp_path / "other", 6)
    assert "holds outliers with other settings (against" in said("outliers", "--against", str(other))
    assert said("knn", "--seed", "1").count("seed 0 there, 1 here") == 1
    (images / "class0" / "0000.png").touch()
    assert f"the images of {images} have changed since" in said("knn")
    shutil.rmtree(images)
    shutil.copytree(pictures, images)
    monkeypatch.setattr("underpaint.evaluation.bundle.EncoderBundle.fingerprint", "other")
    assert f"the weights of {own} have changed since" in said("knn")


def test_wrong_questions_are_refused_before_anything_is_decoded_or_made(
    run: Path, pictures: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def made(*_: Any, **__: Any) -> Any:
        raise AssertionError("an image was decoded, or a network made")

    monkeypatch.setattr("underpaint.evaluation.bundle.load_encoder", made)
    monkeypatch.setattr("underpaint.evaluation.bundle.from_arguments", made)
    monkeypatch.setattr("underpaint.data.sources.base.Source.read", made)
    out = tmp_path / "out"
    for data, arguments, said in (
        (pictures, ["--task", "lineal"], "there are knn"),
        (scenes, ["--task", "knn"], "no class labels"),
        (pictures, ["--task", "regression"], "no numbers"),
        (pictures, ["--task", "segment"], "no masks"),
        (pictures, ["--task", "knn,detect"], "no boxes"),
        (pictures, ["--task", "knn", "--image-size", "30"], "does not divide into the encoder's patches of 8x8"),
        (pictures, ["--task", "finetune", "--set", "epochs=-1"], "--set epochs: -1"),
        (pictures, ["--task", "outliers", "--against", str(tmp_path / "none")], "no such data"),
    ):
        assert main(["evaluate", str(run), "--data", str(data), "--out", str(out), *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not out.exists()


def test_whatever_takes_long_shows_how_far_it_is(
    run: Path, pictures: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("underpaint.console.PATIENCE", 0.0)
    monkeypatch.setattr("underpaint.console.BETWEEN", 0.0)
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    worth, out = str(tmp_path / "worth"), str(tmp_path / "out")
    evaluating = ["evaluate", str(run), "--data", str(pictures), "--out", worth, "--task"]
    segmenting = ["evaluate", str(run), "--data", str(scenes), "--out", f"{worth}-scenes", "--untrained", "--task"]
    brief = ["--set", "steps=1", "--set", "batch_size=2", "--set", "channels=8"]
    for command, shown in (
        ([*evaluating, "knn,linear,attentive"], "decoding features nearest~neighbours linear~probe attentive~probe"),
        ([*segmenting, "segment,detect", *brief], "reading~masks testing standard~errors"),
        (["predict", f"{worth}/linear", str(pictures), "--out", out], "predicting"),
        (["predict", f"{worth}-scenes/detect", str(scenes), "--out", out], "predicting"),
        (["embed", str(run), str(pictures), "--out", f"{out}/v.parquet"], "features"),
        (["score", str(run), str(pictures), "--out", f"{out}/s.csv"], "scoring"),
    ):
        assert main(command) == 0
        said = capsys.readouterr().out
        assert all(
            re.search(f"^{what.replace('~', ' ')}[^:]*: [0-9,]+ (of|so far)", said, re.MULTILINE)
            for what in shown.split()
        ), said
