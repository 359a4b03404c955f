"""Labels that cannot judge: images are pretrained on all the same, and it is said why nothing is judged by labels."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asking import pretrain
from conftest import made_picture

from underpaint.cli import main
from underpaint.data import labelled_indices, open_source, pretraining_indices
from underpaint.evaluation import probes
from underpaint.train.run_folder import Run

TINY = {"encoder.embed_dim": 32, "encoder.depth": 1, "encoder.num_heads": 2, "method.decoder_dim": 32}


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    made_picture(np.random.default_rng(number), number % 3, 16).save(file, format="PNG")
    return file.getvalue()


def labelled(path: Path, labels: Sequence[int | str]) -> Path:
    """A parquet file with an image for each label."""
    images = pa.array([{"bytes": encoded(number), "path": None} for number in range(len(labels))])
    pq.write_table(pa.table({"image": images, "label": list(labels)}), path)
    return path


def trained(data: Path, out: Path) -> Run:
    flags: dict[str, Any] = {"method": "mae", "encoder": "vit_tiny_patch16_224", "image_size": (16, 16)}
    return pretrain(data, out, **flags, patch_size=8, batch_size=8, steps=1, settings=TINY)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0] * 20, "they are all of one class"),
        (list(range(20)), "no class has two images, one of which could judge"),
        ([f"name {k}" for k in range(20)], "no class has two images, one of which could judge"),
    ],
)
def test_a_column_that_cannot_judge(labels: list[Any], said: str, tmp_path: Path, capsys: Any) -> None:
    data = labelled(tmp_path / "images.parquet", labels)
    run = trained(data, tmp_path / "run")
    assert f"class labels: not used, {said}\n" in capsys.readouterr().out
    found = json.loads((run.path / "probes.json").read_text())
    assert "linear" not in found.get("encoder", {})
    assert found["rank"]["encoder"] > 0
    assert (run.path / "report.html").is_file()
    assert len(pretraining_indices(open_source(data))) == 20  # none is held out to judge by
    command = ["evaluate", str(run.path), "--data", str(data), "--task", "knn", "--out", str(tmp_path / "worth")]
    assert main(command) == 2
    assert f"its class labels cannot judge: {said}" in capsys.readouterr().err


def test_folders_of_one_image_each(tmp_path: Path, capsys: Any) -> None:
    for number in range(12):
        place = tmp_path / "images" / f"class{number}"
        place.mkdir(parents=True)
        (place / "image.png").write_bytes(encoded(number))
    trained(tmp_path / "images", tmp_path / "run")
    assert "class labels: not used, no class has two images" in capsys.readouterr().out


def test_one_class_with_several_images_is_enough(tmp_path: Path) -> None:
    sides = labelled_indices(open_source(labelled(tmp_path / "images.parquet", [0] * 10 + [1])))
    assert sides is not None
    assert len(sides[1]) == 2


def test_the_most_frequent_of_many_classes_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MOST_CLASSES", 4)
    labels = [k for k in range(12) for _ in range(10 if k in (3, 5, 8, 9) else 4)]
    run = trained(labelled(tmp_path / "images.parquet", labels), tmp_path / "run")
    found = json.loads((run.path / "probes.json").read_text())
    assert (found["classes"], found["train"], found["test"]) == (4, 32, 8)
    assert found["notes"] == ["The 4 classes with the most images judge, of 12 in all."]
    assert "The 4 classes with the most images judge" in (run.path / "report.html").read_text()


@pytest.mark.quick
def test_the_first_among_equally_frequent_classes_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MOST_CLASSES", 2)
    source = open_source(labelled(tmp_path / "images.parquet", [0, 1, 2, 2, 2, 0, 1, 1]))
    (train, test), left_out = probes._frequent(source, np.arange(7), np.asarray([7]))
    assert (train.tolist(), test.tolist(), left_out) == ([0, 2, 3, 4, 5], [], 1)
