"""Two processes on one folder."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from underpaint import locking
from underpaint.errors import InputError
from underpaint.locking import HOLDER, LOCK, locked


def _hold(folder: Path, ready: Any) -> None:
    with locked(folder):
        ready.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_and_told_of_the_first(
    holder: Any, pictures: Path, tmp_path: Path, server: Any
) -> None:
    run = tmp_path / "run"
    with (
        pytest.raises(InputError, match=f"process {holder.pid} on {socket.gethostname()} is at work there"),
        locked(run),
    ):
        pass
    ended = server("pretrain", pictures, "--out", run, "--encoder", "vit_tiny_patch16_224", "--image-size", "32")
    assert ended.status == 2
    assert f"process {holder.pid}" in ended.error
    assert ended.error.count("\n") == 1


def test_a_process_that_is_killed_holds_nothing_back(holder: Any, tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["process"] == os.getpid()


def test_a_folder_in_which_nothing_came_to_be_is_gone(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run").exists()


def test_where_there_are_no_locks_it_is_said(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(locking.FileLock, "acquire", none)
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "something").touch()
    assert "without locks" in capsys.readouterr().err


def test_a_second_evaluation_and_a_second_tokenizer_are_refused(pictures: Path, tmp_path: Path, server: Any) -> None:
    for command in (
        ("evaluate", "timm:vit_tiny_patch16_224", "--data", pictures, "--task", "knn", "--out", tmp_path / "worth"),
        ("tokenizer", pictures, "--out", tmp_path / "words.safetensors", "--image-size", "32"),
    ):
        folder = tmp_path / ("worth" if command[0] == "evaluate" else "words.training")
        with locked(folder):
            ended = server(*command)
        assert ended.status == 2, ended.error
        assert f"process {os.getpid()} on {socket.gethostname()} is at work there" in ended.error
        assert ended.error.count("\n") == 1
        assert not folder.exists()
