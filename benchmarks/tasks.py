"""The energy method's tasks, one by one and mixed, at equal steps: what each restores, and what each is worth.

    python benchmarks/tasks.py DATA OUT --recipe six.yaml --steps 1000 --seeds 2

Each task trains the recipe's encoder with `method.corruption` set to it, seed by seed. Then, on the test part: squared
error on what was corrupted over that of doing nothing (standard error over images, mean over seeds), the share of
patches placed right, and the linear and kNN probes (50,000 training images) against the untrained encoder, paired by
test image, with the spread of the seeds. Where OUT holds runs they are gone on with.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from underpaint.comparison.statistics import Arm, difference, spread, standing
from underpaint.evaluation.features import features_of
from underpaint.evaluation.knn import knn
from underpaint.evaluation.linear import linear
from underpaint.evaluation.probes import ProbeSuite
from underpaint.inference import load_method
from underpaint.methods.energy import TASKS
from underpaint.prepare import build, open_data
from underpaint.pretraining import pretrain
from underpaint.recipes.request import named


def probed(judge: ProbeSuite, encoder: Any, standardize: Any) -> dict[str, np.ndarray]:
    """By probe, the hits on the test images."""
    made = []
    for part in judge.full():
        made += [features_of(encoder, standardize, part, judge.size, with_patches=False).pooled, part.labels]
    return {
        "linear": linear(*made, seed=judge.seed).correct,  # pyright: ignore[reportArgumentType]
        "knn": knn(*made, seed=judge.seed).correct,  # pyright: ignore[reportArgumentType]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, "mixture"])
    given = parser.parse_args()
    hits: dict[str, list[dict[str, np.ndarray]]] = {}
    restored: dict[str, list[dict[str, Any]]] = {}
    minutes: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        for task in given.tasks:
            recipe = named(given.recipe)
            recipe.method["corruption"] = task
            recipe.run = replace(
                recipe.run, steps=given.steps, epochs=None, minutes=None, seed=seed, probe_every=given.steps
            )
            # as a comparison does: no judging at the end
            run = pretrain(given.data, given.out / f"{task}-{seed}", recipe, stop_at=1e9)
            method, standardize, recipe = load_method(run.path)
            images, judge = open_data(recipe, lambda text: None)
            judge.seed = 0  # the same draws and probes for all
            if "untrained" not in hits or len(hits["untrained"]) <= seed:
                hits.setdefault("untrained", []).append(probed(judge, build(recipe, images)[0].encoder, standardize))
            restored.setdefault(task, []).append(judge.restoration(method, standardize))
            hits.setdefault(task, []).append(probed(judge, method.encoder, standardize))
            lines = [line for line in run.lines("metrics.jsonl") if line["step"]]
            minutes.setdefault(task, []).append(lines[-1]["seconds"] / 60)
            print(f"{task}, seed {seed}: {minutes[task][-1]:.2f} min, {restored[task][-1]}", flush=True)
    arms = {
        name: Arm(name, "method", {k: np.stack([h[k][None].astype(float) for h in found]) for k in found[0]}, [0.0])
        for name, found in hits.items()
    }
    spreads = {probe: spread(list(arms.values()), probe) for probe in ("linear", "knn")}
    print("\n| task | error over doing nothing | placed right | linear | over untrained | kNN | over untrained | min |")
    print("|---|---|---|---|---|---|---|---|")
    for name, arm in arms.items():
        cells = []
        for probe in ("linear", "knn"):
            value, error = standing(arm, probe, spreads[probe])
            cells.append(f"{100 * value:.1f} +- {100 * error:.1f}")
            over = difference(arm, arms["untrained"], probe, spreads[probe])
            cells.append("" if name == "untrained" else f"{100 * over.value:+.1f} +- {100 * over.error:.1f}")
        errors, placed, took = "", "", ""
        if name in restored:
            errors = ", ".join(
                f"{task if len(restored[name][0]) > 4 else ''} {_mean(restored[name], task)}".strip()
                for task in TASKS
                if task in restored[name][0]
            )
            placed = _mean(restored[name], "placed") if "placed" in restored[name][0] else ""
            took = f"{max(minutes[name]):.1f}"
        print(f"| {name} | {errors} | {placed} | {cells[0]} | {cells[1]} | {cells[2]} | {cells[3]} | {took} |")


def _mean(found: list[dict[str, Any]], name: str) -> str:
    """Mean over seeds; of the two errors the larger, since the images are the same."""
    error = max(one[name]["standard_error"] for one in found)
    return f"{np.mean([one[name]['error'] for one in found]):.3f} +- {error:.3f}"


if __name__ == "__main__":
    main()
