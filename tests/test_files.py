"""Files and folders that are whole or not there."""

import json
import math
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from underpaint.files import append_lines, read_lines, replacing, replacing_folder, write_json
from underpaint.train.run_folder import Run

pytestmark = pytest.mark.quick


def half(replacing: AbstractContextManager[Path], name: str) -> None:
    """Write a part, and come to grief."""
    with replacing as temporary:
        (temporary / name).write_text("half")
        raise InterruptedError


def test_a_file_is_replaced_when_it_is_complete_and_not_before(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with replacing(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    with pytest.raises(InterruptedError):
        half(replacing(file), "")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_replaced_when_it_is_complete_and_not_before(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "set"
    for text in ("old", "new"):
        with replacing_folder(folder) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "a.txt").write_text(text)
            assert text == "old" or (folder / "inner" / "a.txt").read_text() == "old"
        assert (folder / "inner" / "a.txt").read_text() == text
        assert folder.stat().st_mode == folder.parent.stat().st_mode  # as readable as any other
    with pytest.raises(InterruptedError):
        half(replacing_folder(folder), "b.txt")
    assert [path.name for path in folder.rglob("*")] == ["inner", "a.txt"]
    assert list(folder.parent.iterdir()) == [folder]


def test_what_was_half_made_a_day_ago_goes_and_what_is_being_made_stays(tmp_path: Path) -> None:
    old, new = tmp_path / "set.1.part", tmp_path / "set.2.part"
    for folder in (old, new):
        folder.mkdir()
    file = tmp_path / "a.json.7.part"
    file.write_text("{")
    for path in (old, file):
        os.utime(path, (time.time() - 90_000, time.time() - 90_000))
    with replacing_folder(tmp_path / "set"):
        pass
    write_json(tmp_path / "a.json", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "set", "set.2.part"]


def test_a_checkpoint_takes_away_what_a_killed_process_left_of_another(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "checkpoints" / "step-000000003.ab12.part").mkdir(parents=True)
    run.save(5, {"a": torch.zeros(2)}, {"seconds": 1.0}, [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000005"]


def test_json_holds_no_number_that_json_has_not(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": (math.nan, 1.5), "b": [-math.inf]})

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refused)
    assert found == {"a": [None, 1.5], "b": [None]}


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert read_lines(file) == []
    append_lines(file, [{"a": 1}])
    append_lines(file, [{"a": math.inf}])
    with file.open("a") as opened:
        opened.write('{"a": 3')
    assert read_lines(file) == [{"a": 1}, {"a": None}]


@pytest.mark.quick
def test_a_line_after_one_that_was_cut_off_is_its_own(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_lines(file, [{"a": 1}])
    with file.open("a") as cut:
        cut.write('{"a": 2, "b"')
    append_lines(file, [{"a": 3}])
    assert [line["a"] for line in read_lines(file)] == [1, 3]
