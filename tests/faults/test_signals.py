"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2, wherever a command is."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pictures

from underpaint.cli import main
from underpaint.evaluation.probes import ProbeSuite
from underpaint.signals import WATCHED, Interrupted, answered_signals, requeue, watched_signals
from underpaint.train.run_folder import Run

COMMAND = "--method mae --encoder vit_tiny_patch16_224 --image-size 16 --patch-size 8 --steps 4 --batch-size 16 "
COMMAND += (
    "--set encoder.embed_dim=24 --set encoder.depth=2 --set encoder.num_heads=2 --set run.log_every=1 --probe-every 2"
)


def told(number: int, seconds: float = 5.0) -> None:
    """This process is sent a signal, and waits."""
    os.kill(os.getpid(), number)
    time.sleep(seconds)


@pytest.mark.quick
@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_is_answered_at_once_or_noted_and_the_second_one_at_once(number: int, capfd: Any) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, answered_signals():
        told(number)
    assert caught.value.signal_number == number
    with watched_signals("told") as received:
        told(number, 0.01)
        assert received == [number]
        with pytest.raises(Interrupted):
            told(number)
    assert capfd.readouterr().err == "underpaint: told\n"
    assert signal.getsignal(number) == before


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ended early."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(["pretrain", str(pictures), *COMMAND.split(), "--out", str(out)]) == 0
    return out


@pytest.mark.xdist_group("signals")
@pytest.mark.parametrize("which", ["0", "2", "4"])
def test_a_probe_is_left_at_once_and_made_when_the_run_goes_on(
    which: str, whole: Path, pictures: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    command = ["pretrain", str(pictures), *COMMAND.split(), "--out"]
    real, steps = ProbeSuite.quick, []

    def slow(*arguments: Any) -> Any:
        steps.append(len(steps) * 2)
        if str(steps[-1]) == which:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        return real(*arguments)

    monkeypatch.setattr(ProbeSuite, "quick", slow)
    began = time.monotonic()
    assert main([*command, str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 20
    assert f"the checkpoint of step {which} is kept: the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    assert main([*command, str(tmp_path / "run")]) == 0
    timed = ("seconds", "images_per_second", "data_wait")
    lines = [
        [{key: value for key, value in line.items() if key not in timed} for line in Run(run).lines("metrics.jsonl")]
        for run in (whole, tmp_path / "run")
    ]
    assert lines[0] == lines[1]
    files = [(run / "encoder.safetensors").read_bytes() for run in (whole, tmp_path / "run")]
    assert files[0] == files[1]


@pytest.mark.parametrize("number", [signal.SIGUSR2])
def test_a_command_that_decodes_is_left_within_two_seconds(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    code = (
        "import sys, time, underpaint.cli, underpaint.data.images as images\n"
        "def slow(*_, **__):\n    print('decoding', flush=True)\n    time.sleep(60)\n"
        "import underpaint.pretraining as p\np.load_data = slow\n"
        "sys.exit(underpaint.cli.main(sys.argv[1:]))"
    )
    write_pictures(folder, 20)
    command = [sys.executable, "-c", code, "pretrain", str(folder), "--out", str(tmp_path / "run"), *COMMAND.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "decoding" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        began = time.monotonic()
        assert process.stderr is not None
        assert process.stderr.readline() == "underpaint: interrupted\n"
        assert time.monotonic() - began < 2
        status = process.wait(30)
        assert process.stderr.read() == ""
    assert status == 128 + number
    assert not (tmp_path / "run").exists()


@pytest.mark.quick
def test_only_sigusr1_has_a_job_of_slurm_queued_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And only by the first process, once."""
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    def kept(number: int, **environment: str) -> str:
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            interruption = Interrupted(number, "all is kept")
            requeue(interruption)
            requeue(interruption)
        return interruption.kept

    assert kept(signal.SIGUSR1) == "all is kept"
    assert kept(signal.SIGUSR2, SLURM_JOB_ID="12") == "all is kept"
    assert kept(signal.SIGUSR1, SLURM_JOB_ID="12", SLURM_PROCID="1") == "all is kept"
    assert kept(signal.SIGUSR1, SLURM_JOB_ID="12", RANK="3", SLURM_PROCID="0") == "all is kept"
    assert not asked.exists()
    assert kept(signal.SIGUSR1, SLURM_JOB_ID="12", SLURM_PROCID="0") == "all is kept; job 12 is queued again"
    assert asked.read_text() == "requeue 12\n"
    (tmp_path / "scontrol").unlink()
    assert kept(signal.SIGUSR1, SLURM_JOB_ID="12").startswith(
        "all is kept; job 12 could not be queued again ([Errno 2]"
    )
