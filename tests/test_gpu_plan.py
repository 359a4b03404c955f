"""The plan for a GPU, as far as a CPU can follow it: `scripts/gpu/run.sh dry`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts" / "gpu"
ASKED = {1: {"tests", "steps", "precision"}, 2: {"peak", "loader", "ranks"}, 3: {"compare"}}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_plan_runs_to_its_end(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "PACK": str(tmp_path / "none")}
    found = subprocess.run(
        [SCRIPTS / "run.sh", "dry", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    for number, names in ASKED.items():
        told = json.loads((tmp_path / "out" / f"part{number}.json").read_text())
        assert set(told) == names
        for name in names - {"tests"}:
            assert told[name], name
            assert not [line for line in told[name] if "failed" in line], told[name]


def test_a_part_that_is_not_there_is_said(tmp_path: Path) -> None:
    found = subprocess.run([SCRIPTS / "run.sh", "4", tmp_path], capture_output=True, text=True)
    assert found.returncode == 2
    assert "no part '4'" in found.stderr


def test_what_is_printed_is_collected(tmp_path: Path) -> None:
    for name, text in {"one": 'noise\n{"a": 1}\n', "two": '{"failed": "x"}\n[1]\n'}.items():
        line = [sys.executable, SCRIPTS / "collect.py", tmp_path / "part.json", name]
        subprocess.run(line, input=text, text=True, check=True)
    assert json.loads((tmp_path / "part.json").read_text()) == {"one": [{"a": 1}], "two": [{"failed": "x"}]}
