"""The curves of a comparison at equal epochs, equal FLOPs and equal wall-clock.

    python benchmarks/equal.py runs/which/compare.json --probe linear --reach mae

FLOPs of a step are counted on each method's own recipe (forward and all backward, matrix products, convolutions and
attention), so this needs no data. Between two judgements a curve is taken as straight. `--reach NAME` also says when
each method first is where NAME ends.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import counted_flops

from underpaint.backbones import create_arguments, from_arguments
from underpaint.methods import METHODS

BATCH = 64


def flops_per_image(recipe: dict[str, Any]) -> float:
    torch.manual_seed(0)
    encoder = dict(recipe["encoder"])
    size = tuple(recipe["data"]["image_size"])
    arguments = create_arguments(encoder.pop("name"), image_size=size, in_chans=recipe["data"]["channels"], **encoder)
    options = {name: value for name, value in recipe["method"].items() if name != "name"}
    method: Any = METHODS[recipe["method"]["name"]](from_arguments(arguments), **options)  # pyright: ignore[reportCallIssue]
    images = torch.randn(BATCH, recipe["data"]["channels"], *size)
    noise = method.sample(BATCH, *size)
    method.calibrate(images, noise)

    def step() -> None:
        for part in method.parts(images, noise):
            part.loss.backward()

    return counted_flops(step) / BATCH


def first_time(minutes: np.ndarray, values: np.ndarray, goal: float) -> float | None:
    """When a curve, straight between its points, first is at least `goal`; None where it never is."""
    above = np.flatnonzero(values >= goal)
    if not len(above):
        return None
    k = int(above[0])
    if k == 0:
        return float(minutes[0])
    share = (goal - values[k - 1]) / (values[k] - values[k - 1])
    return float(minutes[k - 1] + share * (minutes[k] - minutes[k - 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", type=Path, nargs="+", help="compare.json")
    parser.add_argument("--probe", default="linear")
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--reach", help="a method: when is each where this one ends?")
    given = parser.parse_args()
    curves: dict[str, dict[str, np.ndarray]] = {}
    for file in given.compared:
        result = json.loads(file.read_text())
        for row in result["rows"]:
            if row["kind"] != "method":
                continue
            curve = result["curves"][row["name"]]
            images = np.array(curve["images"])
            flops = flops_per_image(row["recipe"])
            print(f"{row['name']}: {flops / 1e9:.4f} GFLOP an image, {row['images_per_second']:.0f} images/s")
            curves[row["name"]] = {
                "epochs": images / result["images"],
                "PFLOP": images * flops / 1e15,
                "minutes": np.array(curve["minutes"]),
                given.probe: np.array(curve["probes"][given.probe]["value"]),
                "error": np.array(curve["probes"][given.probe]["error"]),
            }
    for unit in ("epochs", "PFLOP", "minutes"):
        end = min(curve[unit][-1] for curve in curves.values())
        at = np.linspace(0, end, given.points)
        print(f"\n| {given.probe} probe at {unit} | {' | '.join(f'{x:.2f}' for x in at)} |")
        print("|---" * (len(at) + 1) + "|")
        for name, curve in curves.items():
            values = np.interp(at, curve[unit], curve[given.probe])
            print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    if given.reach is not None and given.reach not in curves:
        parser.error(f"--reach {given.reach}: there are {', '.join(curves)}")
    if given.reach is not None:
        goal = curves[given.reach]
        value, error = goal[given.probe][-1], goal["error"][-1]
        print(f"\n{given.reach} ends at {value:.3f} +- {error:.3f} after {goal['minutes'][-1]:.1f} minutes")
        for name, curve in curves.items():
            # the same goal less and plus its standard error says how sure the time is
            times = [
                first_time(curve["minutes"], curve[given.probe], at) for at in (value, value - error, value + error)
            ]
            shown = [f"{minutes:.1f}" if minutes is not None else "never" for minutes in times]
            print(f"  {name}: {shown[0]} minutes ({shown[1]} to one standard error less, {shown[2]} to one more)")
    for name, curve in curves.items():
        print(f"\n{name}: standard error of a point {curve['error'].max():.3f}; whole curve:")
        for epoch, minute, value in zip(curve["epochs"], curve["minutes"], curve[given.probe], strict=True):
            print(f"  {epoch:.2f} epochs, {minute:.2f} min: {value:.3f}")


if __name__ == "__main__":
    main()
