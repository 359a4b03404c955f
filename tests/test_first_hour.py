"""The commands of the first hour (scripts/first_hour.py), run here on little, to their end."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import write_pictures
from forked import CommandLine

ROOT = Path(__file__).parents[1]
MINUTES = re.compile(r"--minutes \S+")


def walk() -> list[str]:
    spec = importlib.util.spec_from_file_location("first_hour", ROOT / "scripts" / "first_hour.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [step.command for _, steps in module.WALK for step in steps]


@pytest.mark.quick
def test_the_page_has_the_commands_of_the_walk() -> None:
    page = (ROOT / "docs" / "first-hour.md").read_text()
    commands = walk()
    assert [line.strip() for line in page.splitlines() if line.startswith("    underpaint ")] == commands
    for command in commands:
        assert page.count(f"| `{command}` |") == 1, command


@pytest.mark.timeout(180)
def test_the_walk_of_the_first_hour(server: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "classes", 120)
    for part, numbers in (("train", range(60)), ("val", range(60, 90))):
        for file in sorted((tmp_path / "classes").rglob("*.png")):
            if int(file.stem) in numbers:
                place = tmp_path / "labelled" / part / file.parent.name
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place / file.name)
    (tmp_path / "photos").mkdir()
    for file in sorted((tmp_path / "classes").rglob("*.png")):
        shutil.copy(file, tmp_path / "photos" / file.name)
    places = ("photos", "labelled", "runs/", "seen", "to-label.csv", "checked", "found")
    for command in walk():
        short = MINUTES.sub("--minutes 0.02", command)
        words = [
            str(tmp_path / word) if word.startswith(places) else word
            for word in shlex.split(short.replace("--count 100", "--count 10"))[1:]
        ]
        done = server(*words)
        assert done.status == 0, f"{command}\n{done.error}"
        assert done.out.strip(), command
    for made in ("runs/first/report.html", "seen/explore.html", "to-label.csv", "runs/worth/report.html", "found"):
        assert (tmp_path / made).exists(), made
