"""Runs of every method, without labels, whose features were made alike: the verdict says so, by the features alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import pretrain
from conftest import word_file, write_pictures

import underpaint.pretraining
from underpaint.methods import METHODS
from underpaint.pretraining import Session
from underpaint.report import verdict
from underpaint.train.run_folder import Run


def words(name: str, pictures: Path) -> dict[str, object]:
    if name in ("beit", "cae"):
        return {"method.codebook_size": 32}
    return {"method.tokenizer": str(word_file(pictures))} if name == "cim" else {}


def made(name: str, data: Path, pictures: Path, out: Path) -> Run:
    return pretrain(
        data,
        out,
        method=name,
        encoder="vit_tiny_patch16_224",
        image_size=16,
        patch_size=4,
        batch_size=16,
        steps=24,
        lr=1e-3,
        settings={
            "encoder.embed_dim": 32,
            "encoder.depth": 2,
            "encoder.num_heads": 2,
            "run.log_every": 1,
            **words(name, pictures),
        },
    )


def one_direction(encoder: Any) -> None:
    """The last norm says the same of every image, but for a thousandth."""
    with torch.no_grad():
        encoder.model.norm.weight.mul_(1e-3)
        encoder.model.norm.bias.fill_(1.0)


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is judged by an encoder whose features were made alike, whatever its loss did."""
    real = underpaint.pretraining._judge

    def judge(session: Session, untrained: Any) -> None:
        one_direction(session.method.encoder)
        real(session, untrained)

    monkeypatch.setattr(underpaint.pretraining, "_judge", judge)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_collapse_turns_the_verdict(name: str, pictures: Path, tmp_path: Path, collapsing: None) -> None:
    data = write_pictures(tmp_path / "data", 48, classes=1, size=16) / "class0"
    run = made(name, data, pictures, tmp_path / "run")
    found = verdict(run.path)
    assert found.word == "collapsed", (found, json.loads((run.path / "probes.json").read_text()).get("rank"))
    assert "dimensions" in found.sentence


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_short_healthy_run_is_no_collapse(name: str, pictures: Path, tmp_path: Path) -> None:
    run = made(name, write_pictures(tmp_path / "data", 48, classes=1, size=16) / "class0", pictures, tmp_path / "run")
    assert verdict(run.path).word != "collapsed", verdict(run.path)
