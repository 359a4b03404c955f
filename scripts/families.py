"""Which method for which family of networks: CIFAR-10, equal minutes, judged alike.

    python scripts/families.py CIFAR10 --minutes 10 [--work DIR]

CIFAR10 is a folder with train.parquet and test.parquet. Of each family a small network for 32 px is pretrained by four methods
under one wall-clock (`underpaint compare`), then fine-tuned with 10 % of the labels, its rate chosen by a held-out part of
them, beside the same network from scratch (`underpaint evaluate`). What is there already is not run again. The results are
docs/results/families.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "docs" / "results" / "families.json"
METHODS = ("localmim", "mae", "simmim", "cim")
FAMILIES: dict[str, tuple[str, ...]] = {
    "ResNet": (
        "resnet18",
        "encoder.output_stride=8",
        "encoder.layers=[1,1,1,1]",
        "encoder.channels=[32,64,128,256]",
    ),
    "ConvNeXt": (
        "convnext_atto",
        "encoder.patch_size=2",
        "encoder.output_stride=8",
        "encoder.depths=[2,2,4,2]",
        "encoder.dims=[32,64,128,192]",
    ),
    "rotary ViT": (
        "vit_small_patch16_dinov3",
        "encoder.patch_size=4",
        "encoder.embed_dim=128",
        "encoder.depth=4",
        "encoder.num_heads=4",
    ),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        "encoder.patch_size=2",
        "encoder.window_size=4",
        "encoder.embed_dim=48",
        "encoder.depths=[2,2,4]",
        "encoder.num_heads=[2,4,8]",
    ),
}


def underpaint(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "underpaint.cli", *map(str, words)], check=True)


def measured(data: Path, work: Path, family: str, minutes: float, tuning: float) -> dict[str, Any]:
    """The probes of a comparison, and the accuracies after fine-tuning."""
    name, *settings = FAMILIES[family]
    out = work / family.replace(" ", "-").lower()
    flags = [word for setting in settings for word in ("--set", setting)]
    common = ("--image-size", "32", "--encoder", name, "--lr", "2e-3", "--batch-size", "256")
    underpaint(
        "compare",
        data,
        "--methods",
        ",".join(METHODS),
        "--minutes",
        f"{minutes:g}",
        "--seeds",
        "1",
        *common,
        *flags,
        "--out",
        out,
    )
    found = json.loads((out / "compare.json").read_text())
    first, *others = (out / "runs" / f"{method}-0" for method in METHODS)
    beside = [word for run in others for word in ("--beside", run)]
    # one layer decay for all, so that the time to choose in goes to the rate
    tasks = ("--task", "finetune", "--label-fraction", "0.1", "--set", "layer_decay=1", "--minutes", f"{tuning:g}")
    underpaint("evaluate", first, *beside, "--data", data, *tasks, "--out", out / "tuned")
    tuned = json.loads((out / "tuned" / "results.json").read_text())["tasks"]["finetune"]
    return {
        "compare": found,
        "finetune": {"rows": tuned["rows"], "gains": tuned.get("gains"), "verdict": tuned.get("verdict")},
    }


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("data", type=Path)
    given.add_argument("--work", type=Path, default=ROOT / "runs" / "families")
    given.add_argument("--minutes", type=float, default=10.0)
    given.add_argument("--tuning", type=float, default=3.0, help="minutes of each fine-tuning")
    given.add_argument("--only", default=",".join(FAMILIES))
    asked = given.parse_args()
    for family in asked.only.split(","):
        made = measured(asked.data, asked.work, family, asked.minutes, asked.tuning)
        every = json.loads(FOUND.read_text()) if FOUND.is_file() else {}
        FOUND.write_text(json.dumps({**every, family: made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
