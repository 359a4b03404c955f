"""Seconds until the ten likeliest mistakes of a new user are answered, as a table for docs/reliability.md.

    python benchmarks/mistakes.py [--images 20000]

Each is a command of its own on a folder of that many images, of which none should be decoded before the answer. An answer
cannot come before Python and what it takes to know the answer are there, so `--help` and the imports of a method are timed
beside them.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SHOWN = 110  # characters of an answer


def write(folder: Path, images: int) -> None:
    """Small photographs in one folder, so without labels."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(images):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number:06}.png")


def asked(command: list[str]) -> tuple[float, int, list[str]]:
    """Seconds, exit status, and the lines on standard error."""
    began = time.perf_counter()
    ended = subprocess.run(
        [Path(sys.executable).with_name("underpaint"), *command], capture_output=True, text=True, check=False
    )
    return time.perf_counter() - began, ended.returncode, ended.stderr.splitlines()


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--images", type=int, default=20_000)
    images = given.parse_args().images
    with tempfile.TemporaryDirectory() as named:
        root = Path(named)
        data, out, run = str(root / "photographs"), str(root / "out"), str(root / "run")
        write(Path(data), images)
        write(root / "few", 64)
        (root / "empty").mkdir()
        small = ["--encoder", "vit_tiny_patch16_224", "--image-size", "32", "--patch-size", "8", "--method", "mae"]
        first = ["pretrain", str(root / "few"), "--out", run, *small, "--steps", "1", "--batch-size", "8"]
        done = asked(first)
        assert done[1] == 0, done
        mistakes = {
            "a folder that is not there": ["pretrain", data + "s", "--out", out],
            "a folder without images": ["pretrain", str(root / "empty"), "--out", out],
            "a method's name": ["pretrain", data, "--out", out, "--method", "MAE-v2"],
            "a setting's name": ["pretrain", data, "--out", out, "--method", "mae", "--set", "method.maskratio=0.5"],
            "an encoder's name": ["pretrain", data, "--out", out, "--encoder", "vit_smal_patch16_224"],
            "an image size that patches do not divide": [
                *("pretrain", data, "--out", out, "--encoder", "vit_small_patch16_224", "--image-size", "100")
            ],
            "a method that the encoder does not suit": [
                *("pretrain", data, "--out", out, "--method", "cae", "--encoder", "resnet18")
            ],
            "a number that cannot be": ["pretrain", data, "--out", out, "--lr", "-1"],
            "a run folder of another run": ["pretrain", data, "--out", run, "--method", "simmim"],
            "no labels to judge by": ["evaluate", run, "--data", data, "--task", "linear", "--out", out],
        }
        print("| mistake | seconds | status | answer |\n|---|---|---|---|")
        for name, command in mistakes.items():
            seconds, status, lines = asked(command)
            shown = lines[0].replace(str(root), "...").removeprefix("underpaint: ") if lines else ""
            shown = shown[:SHOWN] + ("..." if len(shown) > SHOWN else "")
            more = f" (and {len(lines) - 1} lines)" if len(lines) > 1 else ""
            print(f"| {name} | {seconds:.1f} | {status} | {shown}{more} |", flush=True)
        print(f"\n`--help`: {asked(['--help'])[0]:.1f} s; images: {images:,}")
        for module in ("torch", "underpaint.methods.mae", "underpaint.pretraining"):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            print(f"`import {module}`: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
