"""The first hour of somebody with a folder of images, as it goes: `docs/first-hour.md` is what this writes.

    python scripts/first_hour.py SHARED [--work DIR]

SHARED holds data/tiny-imagenet-100, of whose photographs it makes an unlabelled folder and a labelled one below DIR. Each
command below is run there as a user types it, and its answer and its seconds are written into the page. A command whose
answer is there already (DIR/answers.json) is not run again, so that the script goes on where it was stopped.
"""

import argparse
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-hour.md"
PHOTOS, CLASSES, TRAIN = 6_000, 20, 60  # images, classes, labelled images a class
LINES = 14  # of an answer that are shown at its start and at its end


class Step(NamedTuple):
    """What is said before a command, the command, and what is said after its answer."""

    before: str
    command: str
    after: str = ""


WALK: tuple[tuple[str, tuple[Step, ...]], ...] = (
    (
        "A folder without labels",
        (
            Step("What is in the folder, and what can be done with it?", "underpaint check photos/"),
            Step(
                "What would be trained, and how long would it take?",
                "underpaint pretrain photos/ --out runs/first --preview",
            ),
            Step(
                "Five minutes, since this is a first look. Only the length is said; the rest is planned for it.",
                "underpaint pretrain photos/ --out runs/first --minutes 5",
                "The same command goes on where it was interrupted. Its page, `runs/first/report.html`, is there from the "
                "first probe on and loads itself again while the run goes on.",
            ),
            Step(
                "Where does the run stand? This can be asked from another terminal at any time.",
                "underpaint watch runs/first",
            ),
            Step(
                "What does it see? `seen/explore.html` opens in a browser.",
                "underpaint explore runs/first photos/ --out seen",
            ),
            Step(
                "Which images to label first?", "underpaint suggest runs/first photos/ --count 100 --out to-label.csv"
            ),
        ),
    ),
    (
        "A labelled set",
        (
            Step("How were the labels understood?", "underpaint check labelled/ --out checked"),
            Step(
                "What is the encoder worth here, beside the same network untrained, and what needs no network?",
                "underpaint evaluate runs/first --data labelled/ --task knn,linear --out runs/worth",
            ),
            Step(
                "And as the start of a classifier, beside public weights? With a network, name them: "
                "`--beside timm:vit_small_patch16_224.augreg_in21k`; here the run stands beside itself from scratch.",
                "underpaint evaluate runs/first --data labelled/ --task finetune --minutes 1 --out runs/classifier",
            ),
            Step("Use the classifier.", "underpaint predict runs/classifier labelled/val --out found"),
        ),
    ),
)


def prepare(shared: Path, folder: Path) -> None:
    """The two folders, of tiny ImageNet's photographs of 64 px; no image is in both."""
    data = shared / "data" / "tiny-imagenet-100"
    if (folder / "labelled").is_dir():
        return
    with tempfile.TemporaryDirectory(dir=folder) as part:
        made = Path(part)
        taken: dict[int, int] = {}
        photos = 0
        for row in pq.read_table(data / "train.parquet").to_pylist():
            label = int(row["label"])
            taken[label] = taken.get(label, 0) + 1
            if label < CLASSES and taken[label] <= TRAIN:
                write(row["image"], made / "labelled" / "train" / f"class{label:02d}" / f"{taken[label]:03d}.png")
            elif photos < PHOTOS:
                write(row["image"], made / "photos" / f"{photos:05d}.png")
                photos += 1
        seen: dict[int, int] = {}
        for row in pq.read_table(data / "val.parquet").to_pylist():
            label = int(row["label"])
            if label < CLASSES:
                seen[label] = seen.get(label, 0) + 1
                write(row["image"], made / "labelled" / "val" / f"class{label:02d}" / f"{seen[label]:03d}.png")
        (made / "photos").rename(folder / "photos")
        (made / "labelled").rename(folder / "labelled")


def write(image: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(image["bytes"])) as picture:
        picture.convert("RGB").save(file)


def answer(command: str, folder: Path) -> dict[str, Any]:
    """Run a command; its lines, and the seconds to the first of them and to the last."""
    words = [sys.executable, "-m", "underpaint.cli", *shlex.split(command)[1:]]
    environment = {**os.environ, "UNDERPAINT_CACHE": str(folder / "cache"), "COLUMNS": "110"}
    began = time.monotonic()
    process = subprocess.Popen(
        words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    progress: list[str] = []  # it goes to the other stream
    reader = threading.Thread(target=lambda: progress.extend(process.stderr or ()))
    reader.start()
    lines, first = [], None
    for line in process.stdout:
        first = first or time.monotonic() - began
        lines.append(elsewhere(line.rstrip(), folder))
    status = process.wait()
    reader.join()
    if status:
        raise SystemExit(f"{command}: status {status}\n{''.join(progress)}")
    return {"lines": lines, "first": first, "all": time.monotonic() - began}


def elsewhere(line: str, folder: Path) -> str:
    """Without the places of this machine."""
    return line.replace(str(folder), "/home/you").replace(sys.executable, "python")


def shown(lines: list[str]) -> str:
    kept = lines if len(lines) <= 2 * LINES + 1 else [*lines[:LINES], "...", *lines[-LINES:]]
    return "\n".join(kept)


def page(answers: dict[str, Any], machine: str) -> str:
    text = f"""# The first hour

A walk with two folders of photographs of 64 px, one without labels ({PHOTOS:,} images) and one with ({CLASSES} classes, {TRAIN} images
each to train, 50 to test), on {machine}. Every command was run as it stands here, by `scripts/first_hour.py`, which wrote this
page; the seconds are from Enter to the first line of the answer, and to the last.
"""
    rows = []
    for title, steps in WALK:
        text += f"\n## {title}\n"
        for step in steps:
            found = answers[step.command]
            text += f"\n{step.before}\n\n    {step.command}\n\n```text\n{shown(found['lines'])}\n```\n"
            first = "" if found["first"] is None else f"first line after {found['first']:.1f} s, "
            text += f"\n*{first}done after {found['all']:.0f} s*\n" + (f"\n{step.after}\n" if step.after else "")
            rows.append(f"| `{step.command}` | {found['first'] or 0:.1f} | {found['all']:.1f} |")
    table = "\n".join(rows)
    return f"{text}\n## From Enter to the answer\n\n| command | first line [s] | done [s] |\n|---|---|---|\n{table}\n"


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("shared", type=Path)
    given.add_argument("--work", type=Path, default=ROOT / "runs" / "first-hour")
    given.add_argument("--machine", default=f"{os.cpu_count()} cores without a GPU")
    asked = given.parse_args()
    folder = asked.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(asked.shared.resolve(), folder)
    kept = folder / "answers.json"
    answers = json.loads(kept.read_text()) if kept.is_file() else {}
    for _, steps in WALK:
        for step in steps:
            if step.command not in answers:
                print(step.command, flush=True)
                answers[step.command] = answer(step.command, folder)
                kept.write_text(json.dumps(answers))
    PAGE.write_text(page(answers, asked.machine))


if __name__ == "__main__":
    main()
