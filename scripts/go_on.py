"""What going on from weights is worth, against the weights themselves and against scratch: `docs/results/go-on.json`.

    python scripts/go_on.py SHARED --minutes 10 [--start-minutes 60] [--judge-minutes 5] [--only cifar10] [--pull 0] [--work DIR]

SHARED holds data/. A ViT of 64 px is pretrained on tiny-imagenet-100 (the start), goes on with the images of each set by the
recipe `continue`, and is pretrained on them from random weights by the start's own recipe, each for so many minutes. One
evaluation a set judges the three, and the untrained network, on the same test images. What is finished is not made again, in
runs and in the file, so that the script goes on where it was stopped; other minutes or another pull are other rows.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "go-on.json"
RECIPE = "localmim-small-64"
START = "tiny-imagenet-100"


class Set(NamedTuple):
    """Images to go on with, how they are judged, and the share of an image that a crop covers."""

    data: str
    tasks: str
    crop: str


SETS = {
    "cifar10": Set("cifar10", "knn,linear", "[0.4,1.0]"),
    "nuclei": Set("nuclei-384/nuclei.zip", "segment", "[0.02,0.2]"),
    "camvid": Set("camvid-480/camvid.zip", "segment", "[0.02,0.2]"),
}


def underpaint(*words: Any) -> None:
    line = [str(word) for word in words]
    print("underpaint", *line, flush=True)
    subprocess.run([sys.executable, "-m", "underpaint.cli", *line], check=True)


def pretrained(data: Path, out: Path, minutes: float, *more: Any) -> Path:
    """A run that is finished; one that was stopped goes on."""
    if not (out / "probes.json").is_file():
        underpaint("pretrain", data, "--out", out, "--minutes", minutes, *more)
    return out


def judged(name: str, data: Path, work: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """The start, what went on from it and what began anew, on one set."""
    images, crop = SETS[name], ("--set", f"data.crop_scale={SETS[name].crop}")
    length = f"{asked.minutes:g}-min"
    start = pretrained(
        data / START, work / f"start-{asked.start_minutes:g}-min", asked.start_minutes, "--recipe", RECIPE
    )
    scratch = pretrained(
        data / images.data, work / f"{name}-scratch-{length}", asked.minutes, "--recipe", RECIPE, *crop
    )
    pull = ("--set", f"optimiser.pull={asked.pull:g}")
    going = ("--recipe", "continue", "--init", start, "--method", "localmim", *crop, *pull)
    on = pretrained(data / images.data, work / f"{name}-continued-{length}-pull-{asked.pull:g}", asked.minutes, *going)
    out = work / f"{name}-judged-{asked.start_minutes:g}-{length}-pull-{asked.pull:g}"
    beside = ("--beside", start, "--beside", scratch, "--label-fraction", 1)
    trained = ("--minutes", asked.judge_minutes) if images.tasks == "segment" else ()
    underpaint("evaluate", on, "--data", data / images.data, "--task", images.tasks, *beside, *trained, "--out", out)
    found = json.loads((out / "results.json").read_text())["tasks"]
    return {task: {"rows": one["rows"], "gains": one.get("gains")} for task, one in found.items()}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("shared", type=Path)
    given.add_argument("--minutes", type=float, required=True, help="of going on, and of beginning anew")
    given.add_argument("--start-minutes", type=float, help="of the start (default: six times as many)")
    given.add_argument("--judge-minutes", type=float, help="of each head of a segmentation (default: half as many)")
    given.add_argument("--pull", type=float, default=0.0)
    given.add_argument("--only", choices=SETS, action="append", help="these sets alone")
    given.add_argument("--work", type=Path, default=ROOT / "runs" / "go-on")
    asked = given.parse_args()
    asked.start_minutes = asked.start_minutes or 6 * asked.minutes
    asked.judge_minutes = asked.judge_minutes or asked.minutes / 2
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in asked.only or SETS:
        found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
        how = {"minutes": asked.minutes, "start_minutes": asked.start_minutes, "pull": asked.pull}
        key = {"set": name, **how, "judge_minutes": asked.judge_minutes}
        if any(all(row.get(part) == value for part, value in key.items()) for row in found):
            continue
        row = {**key, "cores": os.cpu_count(), "tasks": judged(name, asked.shared.resolve() / "data", work, asked)}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps([*found, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
