"""Does `underpaint suggest` find better images to label than chance does?

    python benchmarks/suggest.py ENCODER DATA --out suggest.jsonl

DATA has labelled train and test images. Of each seed's pool of training images, 20, 50, 100 and 200 are chosen, their
labels are taken from DATA, and a linear probe that has seen nothing else is judged on the test images. "features" says
by which features images are chosen ("encoder", the same one "untrained", "pixels"), "probe" on which it is trained:
always on the encoder's, so that choices can be compared, and on those that chose. "margin" (by the encoder alone) begins with the 20 typical
ones and asks the probe from there on. A line of FILE for each; what is there is not computed again. At the end a
table: mean accuracy over seeds, and the paired gain over chance with its standard error.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from underpaint.data import labelled_indices, open_source
from underpaint.evaluation.baselines import raw_pixels
from underpaint.evaluation.bundle import EncoderBundle, open_bundle
from underpaint.evaluation.features import Features, pixel_features, stored_features
from underpaint.evaluation.splits import Split, stratified
from underpaint.files import append_lines, read_lines
from underpaint.suggesting import choose
from underpaint.suggesting import probe as probe_of

BUDGETS, SEEDS = (20, 50, 100, 200), 5


def sides(bundle: EncoderBundle, data: str, most: int, test: int) -> tuple[Split, Split]:
    """Labelled images to choose from, and to judge by."""
    source = open_source(data)
    found = labelled_indices(source)
    assert found is not None, f"{data}: no labelled train and test images"
    parts = []
    for indices, count in zip(found, (most, test), strict=True):
        some = indices[stratified(source.entries.labels[indices], count, 0)]
        images = bundle.scaled(source, some).images(source, some)
        parts.append(Split(images, range(len(images))))
    return parts[0], parts[1]


def chosen(by: str, x: torch.Tensor, y: np.ndarray, budget: int, seed: int) -> np.ndarray:
    """Which of a pool are labelled at the end."""
    labels = np.full(len(x), -1)
    for step in [size for size in BUDGETS if size <= budget] if by == "margin" else [budget]:
        way = "typical" if by == "margin" and step == BUDGETS[0] else by
        found = [each.image for each in choose(x, step - int((labels >= 0).sum()), labels, by=way, seed=seed)]
        labels[found] = y[found]
    return np.flatnonzero(labels >= 0)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("encoder")
    asked.add_argument("data")
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--images", type=int, default=20_000, help="of train")
    asked.add_argument("--pool", type=int, default=5_000, help="of them, drawn anew with each seed")
    asked.add_argument("--test", type=int, default=5_000)
    asked.add_argument("--by", default="random,typical,margin")
    given = asked.parse_args()
    bundle = open_bundle(given.encoder)
    train, test = sides(bundle, given.data, given.images, given.test)
    features: dict[str, tuple[Features, Features]] = {}
    for name, each in (("encoder", bundle), ("untrained", bundle.random_init(0))):
        features[name] = tuple(stored_features(each, part, with_patches=False) for part in (train, test))  # type: ignore
    raw = {"pixels": raw_pixels}
    features["pixels"] = tuple(pixel_features(raw, part, bundle.size)["pixels"] for part in (train, test))  # type: ignore
    y, wanted = (part.labels_of(features["encoder"][k].samples) for k, part in enumerate((train, test)))
    keys = ("data", "by", "features", "probe", "budget", "seed")
    done = {tuple(line[key] for key in keys): line for line in read_lines(given.out)}
    for seed in range(SEEDS):
        pool = np.random.default_rng(seed).permutation(len(y))[: given.pool]
        for by in given.by.split(","):
            for name in features if by == "typical" else ["encoder"]:
                for budget in BUDGETS:
                    probes = features if by == "random" else dict.fromkeys(("encoder", name))
                    left = [probe for probe in probes if (given.data, by, name, probe, budget, seed) not in done]
                    if not left:
                        continue
                    x = features[name][0].pooled[torch.from_numpy(pool)]
                    found = chosen(by, x, y[pool], budget, seed)
                    for probe in left:
                        fitted, judged = features[probe]
                        both = torch.cat([fitted.pooled[torch.from_numpy(pool)], judged.pooled])
                        asked_for = np.arange(len(pool), len(both))
                        classes, scores = probe_of(both, found, y[pool][found], asked_for)
                        right = classes[scores.argmax(axis=1)] == wanted
                        line = dict(zip(keys, (given.data, by, name, probe, budget, seed), strict=True))
                        line |= {"accuracy": float(right.mean()), "classes": len(np.unique(y[pool][found]))}
                        append_lines(given.out, [line])
                        done[tuple(line[key] for key in keys)] = line
    tell(list(done.values()), given.data)


def tell(lines: list[dict[str, object]], data: str) -> None:
    """A row for each way to choose: accuracy in percent, its paired gain over chance, and how many classes were found."""
    known = {
        (li["by"], li["features"], li["probe"], li["budget"], li["seed"]): li for li in lines if li["data"] == data
    }
    print("| probe on | chosen by | " + " | ".join(f"{budget} labels" for budget in BUDGETS) + " |")
    print("|---|---|" + "---|" * len(BUDGETS))
    for probe in ("encoder", "untrained", "pixels"):
        for by, name in dict.fromkeys((li["by"], li["features"]) for li in known.values() if li["probe"] == probe):
            cells = []
            for budget in BUDGETS:
                some = [known.get((by, name, probe, budget, seed)) for seed in range(SEEDS)]
                other = [known.get(("random", "encoder", probe, budget, seed)) for seed in range(SEEDS)]
                pairs = [(a, b) for a, b in zip(some, other, strict=True) if a is not None and b is not None]
                if len(pairs) < 2:
                    continue
                values = 100 * np.asarray([[each["accuracy"] for each in pair] for pair in pairs], float)
                gain = values[:, 0] - values[:, 1]
                error = gain.std(ddof=1) / len(gain) ** 0.5
                classes = np.mean([float(str(a["classes"])) for a, _ in pairs])
                said = "" if by == "random" else f" ({gain.mean():+.1f} ± {error:.1f})"
                cells.append(f"{values[:, 0].mean():.1f}{said}, {classes:.1f} classes")
            print(f"| {probe} | {by if by == 'random' else f'{by}, {name}'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
