"""Runs of every method, without labels, whose features were made alike: the verdict says so, by the features alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import pretrain
from conftest import word_file, write_pictures
from tiny import slow_but

import underpaint.pretraining
from underpaint.methods import METHODS
from underpaint.pretraining import Session
from underpaint.report import verdict
from underpaint.report.results import of_run
from underpaint.report.verdict import judge
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
        session.seen = None  # what was seen of it before
        real(session, untrained)

    monkeypatch.setattr(underpaint.pretraining, "_judge", judge)


# the verdict is by the features alone, so two methods stand for all; those are in `make test-slow`
@pytest.mark.parametrize("name", slow_but("cim", "mae"))
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


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every encoder is trained without its patches, by their positions alone, so all that it can learn are constants."""
    construct, judge = underpaint.pretraining.construct, underpaint.pretraining._judge

    def blinded(*asked: Any) -> Any:
        made = construct(*asked)
        made.method.encoder.model.patch_embed.norm.register_forward_hook(lambda module, given, found: found * 0)
        return made

    def judged(session: Session, untrained: Any) -> None:
        untrained.model.patch_embed.norm._forward_hooks.clear()  # a copy from before training
        session.start = None  # what was seen of it, blind
        judge(session, untrained)

    monkeypatch.setattr(underpaint.pretraining, "construct", blinded)
    monkeypatch.setattr(underpaint.pretraining, "_judge", judged)


@pytest.mark.parametrize("name", slow_but("cae", "energy", "mae"))
def test_a_run_that_learned_constants_alone_has_collapsed(
    name: str, pictures: Path, tmp_path: Path, blind: None
) -> None:
    """Judged by labels too, which do not excuse it."""
    run = made(name, write_pictures(tmp_path / "data", 48, classes=3, size=16), pictures, tmp_path / "run")
    found = verdict(run.path)
    assert found.word == "collapsed", found
    assert "The features span 1.0 dimensions" in found.sentence


def judged(losses: list[float], baseline: float, rank: float, gain: float) -> str:
    """The word for a run of 32 dimensions whose probe moved by `gain`, of a standard error of 0.01."""
    lines = [
        {"step": step, "loss": loss, "lr": 1e-3, "gradient_norm": 1.0, "terms": {"baseline": baseline}}
        for step, loss in enumerate(losses, start=1)
    ]
    probes = {
        "encoder": {"linear": 0.5 + gain, "linear_error": 0.01},
        "untrained": {"linear": 0.5, "linear_error": 0.01},
        "gain": {"linear": gain, "linear_error": 0.01},
        "rank": {"encoder": rank, "untrained": 20.0, "dim": 32},
    }
    return judge(lines, of_run(probes, lines), {}).word


@pytest.mark.quick
def test_a_loss_that_falls_to_what_constants_reach_is_not_learning() -> None:
    falling = [5.0 - k * 0.1 for k in range(40)]  # to 1.1
    assert judged(falling, baseline=1.0, rank=15.0, gain=0.0) == "stalled"
    assert judged(falling, baseline=1.0, rank=15.0, gain=0.1) == "learning"
    assert judged(falling, baseline=3.0, rank=15.0, gain=0.0) == "learning"


@pytest.mark.quick
def test_a_probe_that_rose_excuses_few_dimensions_but_not_one() -> None:
    falling = [5.0 - k * 0.1 for k in range(40)]
    assert judged(falling, baseline=3.0, rank=1.2, gain=0.1) == "collapsed"
    assert judged(falling, baseline=3.0, rank=3.0, gain=0.1) == "learning"
    assert judged(falling, baseline=3.0, rank=3.0, gain=0.0) == "collapsed"
