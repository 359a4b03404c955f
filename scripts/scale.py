"""What large runs take, from counted steps and stated rates: the tables of docs/scale.md.

    python scripts/scale.py [--share 0.3] [--decode 250]

FLOPs, weights and kept activations are counted (`train/speed.py`); nothing is computed. What is assumed of the machines is
below, each with where it is from. The share of a GPU's matrix rate that a step reaches was never measured here: --share.
"""

import argparse
from typing import NamedTuple

from underpaint.planning import cost_of
from underpaint.recipes.recipe import checked
from underpaint.train.speed import Cost

RATE = 790e12  # FLOP/s of a large bfloat16 matrix product on an H200, as read on one (its data sheet says 989 without sparsity)
MEMORY = 139 * 2**30  # bytes of an H200 that can be used
INSIDE, BETWEEN = (
    450e9,
    50e9,
)  # bytes a second and direction of a GPU: NVLink within a machine, 400 Gb/s InfiniBand between
KILOBYTES = 110  # of an ImageNet JPEG
BATCH, LARGE = 4096, 32_768  # images: as in the papers, and what 512 GPUs need to be busy
METHODS = {
    "MAE": {"name": "mae", "decoder_dim": 512, "decoder_depth": 8},
    "LocalMIM": {"name": "localmim"},
    "SimMIM": {"name": "simmim"},
    "CIM": {"name": "cim"},
    "energy": {"name": "energy"},
}
ENCODERS = {"ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224"}
GPUS = {"1": (1, BATCH), "8": (8, BATCH), "64 x 8": (512, BATCH), "64 x 8, batch 32,768": (512, LARGE)}
SETS = {"ImageNet-1k, 800 passes": 1_281_167 * 800, "100 M images, 10 passes": 100_000_000 * 10}


class Step(NamedTuple):
    """Of one optimiser step, in seconds: what a GPU computes, and what it waits for gradients that the way back did not hide."""

    computing: float
    waiting: float


def cost(encoder: str, method: str) -> Cost:
    recipe = checked(
        {"method": METHODS[method], "encoder": {"name": ENCODERS[encoder]}, "data": {"image_size": [224, 224]}}
    )
    return cost_of(recipe)[0]


def step(one: Cost, gpus: int, batch: int, share: float) -> Step:
    """Gradients go round a ring: each GPU sends 2 (n - 1) / n of them, in float32, while the way back (two thirds of a step)
    is computed."""
    computing = one.flops * batch / gpus / (RATE * share)
    link = INSIDE if gpus <= 8 else BETWEEN
    sending = 0.0 if gpus == 1 else 2 * (gpus - 1) / gpus * 4 * one.weights / link
    return Step(computing, max(0.0, sending - computing * 2 / 3))


def lasting(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.0f} days"


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--share", type=float, default=0.3, help="of the matrix rate that a step reaches")
    given.add_argument("--decode", type=float, required=True, help="photographs of 400 x 533 px a second and core")
    asked = given.parse_args()
    print("| encoder, method | GFLOP an image | weights | kept an image, bf16 | images at once on an H200 |")
    print("|---|---|---|---|---|")
    costs = {(encoder, method): cost(encoder, method) for encoder in ENCODERS for method in METHODS}
    for (encoder, method), one in costs.items():
        room = int((MEMORY - one.memory(0, True)) / (one.memory(1, True) - one.memory(0, True)))
        print(
            f"| {encoder}, {method} | {one.flops / 1e9:.0f} | {one.weights / 1e6:.0f} M | {one.made / 2 / 2**20:.0f} MiB | {room:,} |"
        )
    print("\n| encoder, method | GPUs | images/s | gradients | cores to decode | read | " + " | ".join(SETS) + " |")
    print("|---|---|---|---|---|---|" + "---|" * len(SETS))
    for (encoder, method), one in costs.items():
        for name, (gpus, batch) in GPUS.items():
            took = step(one, gpus, batch, asked.share)
            speed = batch / (took.computing + took.waiting)
            waits = took.waiting / (took.computing + took.waiting)
            times = " | ".join(lasting(images / speed) for images in SETS.values())
            print(
                f"| {encoder}, {method} | {name} | {speed:,.0f} | {4 * one.weights / 2**20:,.0f} MiB, {100 * waits:.0f} % waiting | "
                f"{speed / asked.decode:,.0f} | {speed * KILOBYTES / 1e6:.2g} GB/s | {times} |"
            )


if __name__ == "__main__":
    main()
