"""Probes of frozen features: nearest neighbours, linear, attentive; of an encoder, the same one untrained, and none.

Features are computed once and kept on disk (`store.py`). Everything is chosen on a part of train, nothing on test.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.console import say
from underpaint.data import eval_batches
from underpaint.evaluate.attentive import attentive_head
from underpaint.evaluate.baselines import hog, majority, raw_pixels
from underpaint.evaluate.bundle import EncoderBundle
from underpaint.evaluate.keep import keep
from underpaint.evaluate.knn import knn
from underpaint.evaluate.linear import linear, linear_head
from underpaint.evaluate.plots import confusion_picture
from underpaint.evaluate.result import Probe, gain
from underpaint.evaluate.splits import Split
from underpaint.evaluate.store import stored_features

FROZEN = ("knn", "linear", "attentive")
FLOORS: dict[str, Callable[[Tensor], Tensor]] = {"raw pixels": raw_pixels, "HOG": hog}


class LinearHead(nn.Module):
    """Class scores from pooled features."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(dim, classes)

    def forward(self, pooled: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return self.linear(pooled)


class Classifier(nn.Module):
    """An encoder with a head on its pooled features, or on its patch tokens."""

    def __init__(self, encoder: nn.Module, head: nn.Module, of_patches: bool):
        super().__init__()
        self.encoder, self.head, self.of_patches = encoder, head, of_patches

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b k"]:
        found = self.encoder(images)
        return self.head(found.patches if self.of_patches else found.pooled)


def judge_frozen(
    bundle: EncoderBundle, train: Split, test: Split, tasks: Sequence[str], *, seed: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """By task of `FROZEN`: numbers of every row, the gain over the untrained encoder, and the floors.

    A folder a task gets the trained head (linear, attentive) and the confusion matrix.

    Raises:
        InputError: no image can be read; labels that cannot be probed.
    """
    bundles = {"encoder": bundle} | ({"untrained": bundle.random_init(seed)} if bundle.trained else {})
    found: dict[str, dict[str, Probe]] = {task: {} for task in tasks}
    wanted = np.zeros(0, int)
    sizes: dict[str, int] = {}
    for who, one in bundles.items():
        began = time.perf_counter()
        x = stored_features(one, train.images, train.indices, patches="attentive" in tasks)
        y = stored_features(one, test.images, test.indices, patches="attentive" in tasks)
        labels, wanted = train.labels_of(x.samples.tolist()), test.labels_of(y.samples.tolist())
        groups = test.groups_of(y.samples.tolist())
        sizes = {"train": len(labels), "test": len(wanted)}
        for task in tasks:
            head: nn.Module | None = None
            if task == "knn":
                probe = knn(x.pooled, labels, y.pooled, wanted, seed=seed)
            elif task == "linear":
                probe, (weight, bias) = linear_head(x.pooled, labels, y.pooled, wanted, seed=seed)
                head = LinearHead(weight.shape[1], len(weight))
                head.load_state_dict({"linear.weight": weight, "linear.bias": bias})
            else:
                probe, head = attentive_head(x.patches, labels, y.patches, wanted, seed=seed)
            probe = found[task][who] = probe.grouped(groups)
            if who == "encoder" and head is not None:
                known = np.unique(labels)
                names = [_name(train, label) for label in known.tolist()]
                model = Classifier(one.encoder, head, task == "attentive")
                keep(folder / task, task, one, model, names, labels=known.tolist())
        told = ", ".join(
            f"{task} {probes[who].accuracy:.3f} +- {probes[who].standard_error:.3f}" for task, probes in found.items()
        )
        say(f"{who}: {told} ({time.perf_counter() - began:.0f} s)")
    for name, floor in FLOORS.items():
        if set(tasks) <= {"attentive"}:
            break
        x, labels, _ = _floor(floor, train, bundle)
        y, floor_wanted, groups = _floor(floor, test, bundle)
        for task in [task for task in tasks if task != "attentive"]:
            probe = (knn if task == "knn" else linear)(x, labels, y, floor_wanted, seed=seed)
            found[task][name] = probe.grouped(groups)
    every: dict[str, dict[str, Any]] = {}
    for task in tasks:
        found[task]["majority"] = majority(train.labels, wanted)
        every[task] = classification(found[task], wanted, sizes, train)
        said = found[task]["encoder"].said
        assert said is not None
        confusion_picture(wanted, said, lambda label: _name(train, label), folder / task / "confusion.png")
    return every


def classification(rows: dict[str, Probe], wanted: np.ndarray, sizes: dict[str, int], train: Split) -> dict[str, Any]:
    """What results.json holds of a classification."""
    result: dict[str, Any] = {**sizes, "classes": len(np.unique(train.labels)), "rows": {}}
    for who, probe in rows.items():
        result["rows"][who] = {
            "accuracy": probe.accuracy,
            "accuracy_error": probe.standard_error,
            "chosen": probe.chosen,
        }
    if "untrained" in rows:
        difference, error = gain(rows["encoder"], rows["untrained"])
        result["gains"] = {"encoder over untrained": {"accuracy": difference, "accuracy_error": error}}
    said = rows["encoder"].said
    if said is not None:
        result["by_class"] = {
            _name(train, label): float((said[wanted == label] == label).mean()) for label in np.unique(wanted).tolist()
        }
    return result


def _floor(
    floor: Callable[[Tensor], Tensor], part: Split, bundle: EncoderBundle
) -> tuple[Tensor, np.ndarray, list[str] | None]:
    """Features without a network [n, d], and the labels and groups of the images that could be read."""
    features, seen = [], []
    for batch in eval_batches(part.images, size=bundle.size, indices=part.indices):
        features.append(floor(batch.images).float())
        seen += batch.samples
    return torch.cat(features), part.labels_of(seen), part.groups_of(seen)


def _name(part: Split, label: int) -> str:
    names = part.images.classes or []
    return names[label] if label < len(names) else str(label)
