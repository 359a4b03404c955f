"""What lies in folders: rights, damaged files, outputs that cannot be."""

import json
import os
import resource
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from underpaint.cli import main
from underpaint.comparison import run as comparison
from underpaint.files import read_lines, replacing, replacing_folder
from underpaint.locking import locked
from underpaint.train.run_folder import Run

COMMAND = (
    "--method mae --encoder vit_tiny_patch16_224 --image-size 16 --patch-size 8 --batch-size 16 --set run.log_every=1 "
)
COMMAND += "--set encoder.embed_dim=24 --set encoder.depth=2 --set encoder.num_heads=2 --checkpoint-every 2"


def pretrain(pictures: Path, out: Path, steps: int = 4) -> int:
    return main(["pretrain", str(pictures), "--out", str(out), *COMMAND.split(), "--steps", str(steps)])


@pytest.mark.quick
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for write in (replacing, replacing_folder):
            with write(tmp_path / write.__name__) as partial:
                file = partial if write is replacing else partial / "file"
                os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors makes them
    finally:
        os.umask(before)
    for file in (tmp_path / "replacing", tmp_path / "replacing_folder" / "file"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.quick
def test_a_damaged_line_is_left_out_and_said(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\xff\n[1]\n{"step": 3}\n{"step": 4')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 3}]
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        f"line {n} is damaged and left out; the others are as they were" for n in (2, 3)
    ]


def test_a_changed_number_of_a_checkpoint_is_seen(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    assert pretrain(pictures, tmp_path / "run") == 0
    run = Run(tmp_path / "run")
    last = run.checkpoints()[-1] / "state.json"
    numbers = json.loads(last.read_text())
    last.write_text(json.dumps({**numbers, "step": 9}))
    capsys.readouterr()
    found = run.load()
    assert found is not None
    assert found[1]["step"] == 3
    assert "state.json is wrong" in capsys.readouterr().err
    for text in ("[]", "{}", "nonsense", ""):
        last.write_text(text)
        found = run.load()
        assert found is not None
        assert found[1]["step"] == 3


@pytest.mark.parametrize("inside", ["", "runs/first"])
def test_an_output_inside_the_images_is_refused(inside: str, pictures: Path, capsys: Any) -> None:
    before = sorted(pictures.rglob("*"))
    assert pretrain(pictures, pictures / inside) == 2
    assert "lies inside" in capsys.readouterr().err
    assert sorted(pictures.rglob("*")) == before


@pytest.mark.parametrize("inside", ["", "runs/first"])
def test_a_comparison_refuses_a_place_before_an_image_is_decoded(
    inside: str, pictures: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(comparison, "load_data", None)
    command = ["compare", str(pictures), "--methods", "mae", "--minutes", "1", "--recipe", "mae-tiny-32", "--out"]
    before = sorted(pictures.rglob("*"))
    assert main([*command, str(pictures / inside)]) == 2
    assert "lies inside" in capsys.readouterr().err
    assert sorted(pictures.rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    assert main([*command, str(tmp_path / "other")]) == 2
    assert "is not a comparison" in capsys.readouterr().err
    with locked(tmp_path / "held"):
        child = os.fork()
        if child == 0:
            os._exit(main([*command, str(tmp_path / "held")]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


@pytest.mark.parametrize("place", ["file/run", "loop"])
def test_an_output_that_cannot_be_made_is_one_line(place: str, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert pretrain(pictures, tmp_path / place) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / place) in error


def test_a_disk_that_is_full_stops_the_run_with_a_line_and_keeps_the_checkpoint(
    pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    assert pretrain(pictures, tmp_path / "run") == 0
    kept = {file: file.read_bytes() for file in (tmp_path / "run" / "checkpoints").rglob("*.*")}
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # a file cannot grow, as on a full disk
    try:
        status = pretrain(pictures, tmp_path / "run", steps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert status == 3
    assert error.count("\n") == 1
    assert "the checkpoint of step 4 is kept: the same command goes on" in error
    assert {file: file.read_bytes() for file in kept} == kept
    assert pretrain(pictures, tmp_path / "run", steps=8) == 0


def test_a_link_to_itself_among_the_images_is_left_out(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    (data / "loop.png").symlink_to("loop.png")
    assert main(["check", str(data)]) == 0
    assert "loop.png" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_what_is_judged_or_predicted_lies_outside_the_images(command: str, pictures: Path, capsys: Any) -> None:
    out = ["--out", str(pictures / "out")]
    asked = ["timm:vit_tiny_patch16_224", "--data", str(pictures), "--task", "knn"]
    assert main([command, *(asked if command == "evaluate" else ["nowhere", str(pictures)]), *out]) == 2
    assert "lies inside" in capsys.readouterr().err
