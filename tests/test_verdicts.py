"""The verdict on real runs whose truth is known: one that learns, and three that go wrong each in its own way."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import pretrain
from torch import Tensor

import underpaint.prepare
from underpaint.draws import Draws
from underpaint.masking import Mask, random_mask
from underpaint.methods import METHODS, Method, Objective
from underpaint.report import Verdict, verdict

SETTINGS: dict[str, Any] = {
    "encoder.embed_dim": 32,
    "encoder.depth": 2,
    "encoder.num_heads": 2,
    "run.log_every": 4,
}


def verdict_of(
    pictures: Path, out: Path, method: str = "mae", clock: Callable[[], float] = time.perf_counter, **settings: Any
) -> Verdict:
    run = pretrain(
        pictures,
        out,
        recipe="mae-tiny-32",
        method=method,
        patch_size=8,
        batch_size=32,
        steps=160,
        clock=clock,
        settings=SETTINGS | {path.replace("__", "."): value for path, value in settings.items()},
    )
    said = verdict(run.path)
    assert said.sentence in (run.path / "report.html").read_text().replace("\u00a0", " ")
    return said


def test_a_run_that_learns(pictures: Path, tmp_path: Path) -> None:
    found = verdict_of(pictures, tmp_path / "run", optimiser__lr=2e-2)
    assert found.word == "learning"
    assert "below its trivial baseline" in found.sentence


def test_a_learning_rate_of_zero(pictures: Path, tmp_path: Path) -> None:
    found = verdict_of(pictures, tmp_path / "run", optimiser__lr=0.0)
    assert found.word == "stalled"
    assert "`--set optimiser.lr=...`" in found.advice


class Shrink(Method):
    """Asks that all images get the same features: the collapse that other methods only slip into."""

    paper = "none"

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Mask:
        rows, columns = self.encoder.grid(height, width)
        return random_mask(batch, (rows, columns), 1, draws)

    def forward(self, images: Tensor, mask: Mask | None = None) -> Objective:
        pooled = self.encoder(images).pooled
        apart = (pooled - pooled.mean(0)).square().mean() / pooled.square().mean()
        return Objective(apart, {"baseline": torch.ones(())})

    def restore(self, images: Tensor, mask: Mask | None = None) -> dict[str, Tensor]:
        return {"original": images}

    def held_out(self, images: Tensor, draws: Draws) -> dict[str, tuple[Tensor, Tensor]]:
        return {"none": (torch.ones(len(images)), torch.ones(len(images)))}


def test_features_that_collapse(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "shrink", Shrink)
    found = verdict_of(pictures, tmp_path / "run", method="shrink", optimiser__lr=2e-2)
    assert found.word == "collapsed", found
    assert "dimensions" in found.sentence


def test_a_run_starved_of_data(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, now = underpaint.prepare.train_batches, 0.0

    def slow(*given: Any, **named: Any) -> Iterator[Any]:
        nonlocal now
        for batch in quick(*given, **named):
            now += 0.1  # seconds that a batch takes, by the clock below
            yield batch

    def clock() -> float:
        nonlocal now
        now += 0.01
        return now

    monkeypatch.setattr(underpaint.prepare, "train_batches", slow)
    found = verdict_of(pictures, tmp_path / "run", optimiser__lr=2e-2, clock=clock)
    assert found.word == "starved"
    assert found.sentence.startswith("Training waited for data 85% of the time (median).")
    assert "`--workers`" in found.advice
