"""Names that are not UTF-8, folders that cannot be written, and files that were damaged: what is computed is not lost."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from asking import pretrain
from conftest import write_pictures

from underpaint.cli import main
from underpaint.data import load_images, open_source
from underpaint.errors import InputError
from underpaint.evaluation.bundle import open_bundle
from underpaint.evaluation.features import cache_root, stored_features
from underpaint.evaluation.splits import Split

ODD = b"caf\xe9.png"  # Latin-1
TINY = {"encoder.embed_dim": 32, "encoder.depth": 1, "encoder.num_heads": 2, "method.decoder_dim": 32}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in two classes, one of them and one of the classes with a name that is not UTF-8."""
    folder = write_pictures(tmp_path_factory.mktemp("odd") / "pictures", 20, classes=2)
    place = os.fsencode(folder)
    os.rename(place + b"/class0/0000.png", place + b"/class0/" + ODD)
    os.rename(place + b"/class1", place + b"/cla\xdf1")
    return folder


@pytest.fixture(scope="module")
def run(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    flags: dict[str, Any] = {"method": "mae", "encoder": "vit_tiny_patch16_224", "image_size": (16, 16)}
    pretrain(odd, out, **flags, patch_size=8, batch_size=8, steps=1, settings=TINY, stop_at=1e9)
    return out


@pytest.fixture(scope="module")
def worth(run: Path, odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("worth") / "worth"
    assert main(["evaluate", str(run), "--data", str(odd), "--task", "linear", "--out", str(out)]) == 0
    return out


def test_names_that_are_not_utf8(run: Path, odd: Path, worth: Path, tmp_path: Path) -> None:
    assert main(["score", str(run), str(odd), "--out", str(tmp_path / "scores.csv")]) == 0
    assert main(["predict", str(worth), str(odd), "--out", str(tmp_path / "used")]) == 0
    for file in (tmp_path / "scores.csv", tmp_path / "used" / "predictions.csv"):
        lines = file.read_bytes().splitlines()
        assert len(lines) == 21
        assert sum(b"class0/" + ODD in line for line in lines) == 1  # the bytes of the file's own name
    assert main(["embed", str(run), str(odd), "--out", str(tmp_path / "v.parquet")]) == 0
    names = pq.read_table(tmp_path / "v.parquet")["path"].to_pylist()
    assert "class0/caf\\udce9.png" in names
    found = json.loads((worth / "results.json").read_text())["tasks"]["linear"]
    assert set(found["by_class"]) == {"class0", "cla\\udcdf1"}
    assert "cla\\udcdf1" in (worth / "report.html").read_text()


@pytest.mark.parametrize("command", ["score", "embed", "predict", "evaluate"])
def test_what_cannot_be_written_is_refused_first(
    command: str, run: Path, odd: Path, worth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def computed(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was read")

    monkeypatch.setattr("underpaint.data.sources.base.Source.read", computed)
    (tmp_path / "file").write_text("")
    what = [str(worth if command == "predict" else run), str(odd)]
    arguments = [what[0], "--data", what[1], "--task", "knn"] if command == "evaluate" else what
    places = [tmp_path / "file" / "below", Path("/proc/none"), tmp_path / ("n" * 300)]
    for out in (*places, *([tmp_path] if command in ("score", "embed") else [])):
        assert main([command, *arguments, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"underpaint: --out {out}: ")
        assert error.count("\n") == 1


def damaged(file: Path) -> list[str]:
    """What may have become of a file of JSON."""
    text = file.read_text()
    return ["", text[: len(text) // 2], "[]", "{}", "\x00" * len(text), json.dumps({**json.loads(text), "tasks": 3})]


@pytest.mark.parametrize("name", ["results.json", "linear/model.json"])
def test_a_damaged_file_is_one_line(name: str, run: Path, odd: Path, worth: Path, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(worth, tmp_path / "worth")
    for number, text in enumerate(damaged(folder / name)):
        (folder / name).write_text(text)
        if name == "results.json":
            status = main(["evaluate", str(run), "--data", str(odd), "--task", "linear", "--out", str(folder)])
        else:
            status = main(["predict", str(folder), str(odd), "--out", str(tmp_path / "used")])
        error = capsys.readouterr().err
        if name == "linear/model.json" and number == 5:
            assert status == 0  # a word more does no harm
            continue
        assert status == 2, text
        assert error.count("\n") == 1
        assert str(folder) in error


def test_a_model_that_lacks_what_it_takes_is_one_line(odd: Path, worth: Path, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(worth, tmp_path / "worth")
    described = json.loads((folder / "linear/model.json").read_text())
    for name in ("create_model", "mean", "image_size", "classes"):
        for value in (None, 7, ["a"]):
            (folder / "linear/model.json").write_text(json.dumps({**described, name: value}))
            assert main(["predict", str(folder), str(odd), "--out", str(tmp_path / "used")]) == 2, (name, value)
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert "model.json" in error


def test_damaged_features_are_computed_again(run: Path, odd: Path, capsys: Any) -> None:
    bundle = open_bundle(str(run))
    split = Split(load_images(open_source(odd), range(20), size=bundle.size), list(range(20)))
    before = {*(cache_root() / "features").glob("*")}
    wanted = stored_features(bundle, split, with_patches=True)
    pooled, patches = wanted.pooled.clone(), wanted.patches.clone()
    (folder,) = {*(cache_root() / "features").glob("*")} - before
    for name in ("pooled.npy", "patches.bin", "samples.npy", "tokens.npy"):
        for spoil in (
            lambda file: file.write_bytes(file.read_bytes()[:-4]),
            Path.unlink,
            lambda file: file.write_bytes(b""),
        ):
            spoil(folder / name)
            again = stored_features(bundle, split, with_patches=True)
            assert "damaged, and computed again: the features in" in capsys.readouterr().out
            assert np.array_equal(again.pooled, pooled)
            assert np.array_equal(again.patches, patches)


def test_training_with_damaged_settings_is_one_line(run: Path, odd: Path, tmp_path: Path) -> None:
    from underpaint.train.fit import _same_settings

    (tmp_path / "settings.json").write_text("{cut")
    with pytest.raises(InputError, match=r"settings\.json: is damaged"):
        _same_settings(tmp_path, {"a": 1})
