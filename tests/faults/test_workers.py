"""Processes that decode are killed while a run trains, as the system does where memory runs out."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import pretrain
from killed import looks_often
from safetensors.torch import load_file

from underpaint.data import Crops
from underpaint.errors import Stopped
from underpaint.train.run_folder import Run

TINY = {"encoder.embed_dim": 32, "encoder.depth": 1, "encoder.num_heads": 2, "method.decoder_dim": 32}


def run(pictures: Path, out: Path) -> Run:
    flags: dict[str, Any] = {"method": "mae", "encoder": "vit_tiny_patch16_224", "image_size": (16, 16)}
    return pretrain(pictures, out, **flags, patch_size=8, batch_size=8, steps=14, workers=2, settings=TINY, stop_at=1e9)


def killing(monkeypatch: pytest.MonkeyPatch, batch: int, done: Path | None) -> None:
    """From here on the process that makes this batch kills itself: each, or the first only where a file is given."""
    real, here = Crops.__call__, os.getpid()

    def call(crops: Crops, number: int, *rows: slice) -> Any:
        if number == batch and os.getpid() != here and (done is None or not done.exists()):
            if done is not None:
                done.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(crops, number, *rows)

    monkeypatch.setattr(Crops, "__call__", call)
    looks_often(monkeypatch)


@pytest.mark.timeout(120)
def test_a_run_goes_on_where_a_worker_is_killed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = run(pictures, tmp_path / "whole")
    killing(monkeypatch, 12, tmp_path / "done")
    capsys.readouterr()
    hit = run(pictures, tmp_path / "hit")
    assert (tmp_path / "done").exists()
    told = "".join(capsys.readouterr())
    assert ": a process that decodes images was killed (signal 9), probably for memory" in told
    expected, found = (load_file(one.path / "encoder.safetensors") for one in (whole, hit))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    losses = [[line["loss"] for line in one.lines("metrics.jsonl")] for one in (whole, hit)]
    assert losses[0] == losses[1]


@pytest.mark.timeout(120)
def test_a_run_ends_in_a_line_where_workers_are_killed_again_and_again(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killing(monkeypatch, 12, None)
    with pytest.raises(
        Stopped, match=r"^step 1[0-2]: a process that decodes images was killed .*; the checkpoint of step 8 is"
    ):
        run(pictures, tmp_path / "hit")
