"""What all evaluations by class labels share: accuracy, its baseline, classes by name, and using what was trained."""

import csv
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from underpaint.computing import output
from underpaint.console import say
from underpaint.data import Batch, ImageSet, Source, eval_batches
from underpaint.evaluation.base import ENCODER, SHOTS, Context, Evaluation, Row, class_name, labelled
from underpaint.evaluation.baselines import majority
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.evaluation.features import counted
from underpaint.evaluation.keep import Saved
from underpaint.evaluation.plots import confusion_picture, contact_sheet
from underpaint.evaluation.results import Measured, Probe, means
from underpaint.evaluation.splits import Split
from underpaint.evaluation.written import Written
from underpaint.files import AS_IT_IS, replacing
from underpaint.report.figures.pictures import spread, to_rgb
from underpaint.report.predictions import by_count

MAJORITY = "majority"
SHOWN = 24  # images on a picture of what was said
TABLE, PICTURE = "predictions.csv", "predictions.png"
Settings = TypeVar("Settings")
Model = TypeVar("Model")
Splits = tuple[Split, Split]  # to train on, and to test on


class Classification(Evaluation[Settings, Splits, Model, Probe]):
    """Images with class labels; a row is measured by which test images it puts right."""

    annotation = "label"

    def __init__(self, name: str, context: Context, data: Splits, config: Settings):
        super().__init__(name, context, data, config)
        self.train, self.test = data
        self.fitted = len(self.train.indices)
        self.wanted = self.test.labels  # of a streamed set: known to be read only when all have been

    @classmethod
    def annotated(cls, source: Source) -> object:
        return labelled(source)

    @classmethod
    def load(cls, context: Context) -> Splits:
        return context.labelled

    def majority(self) -> Probe:
        return majority(self.train.labels, self.wanted)

    def least(self) -> int:
        return SHOTS * len(self.classes()[0])

    def classes(self) -> tuple[list[int], list[str]]:
        """The labels that occur in train, ascending, and their names."""
        labels = np.unique(self.train.labels).tolist()
        return labels, [class_name(self.train.images, label) for label in labels]

    def measure(self, found: Probe) -> Measured:
        return means({"accuracy": found.correct}, found.groups)

    def beside(self, row: Row, found: Probe) -> dict[str, object]:
        return {"chosen": found.chosen}

    def facts(self) -> dict[str, object]:
        return {"train": self.fitted, "test": len(self.wanted), "classes": len(np.unique(self.train.labels))}

    def details(self, found: Mapping[str, Probe]) -> dict[str, object]:
        said = found[ENCODER].said
        assert said is not None
        return {
            "by_class": {
                class_name(self.train.images, label): float((said[self.wanted == label] == label).mean())
                for label in np.unique(self.wanted).tolist()
            }
        }

    def visualize(self, row: Row, found: Probe, folder: Path) -> None:
        if row.who == ENCODER and found.said is not None:
            name = lambda label: class_name(self.train.images, label)  # noqa: E731
            confusion_picture(self.wanted, found.said, name, folder / "confusion.png")

    @classmethod
    @torch.no_grad()
    def write(cls, model: nn.Module, saved: Saved, bundle: EncoderBundle, source: Source, folder: Path) -> Written:
        """predictions.csv (path, class, probability) and predictions.png."""
        images, names = bundle.images(source), saved["classes"]
        tiles, sums = Tiles(len(images)), {name: [0, 0.0] for name in names}
        with table(folder, ["path", "class", "probability"]) as add:
            for batch in every(images, bundle):
                best = output(model, bundle.standardize(batch.images)).softmax(1).max(1)
                said = [(names[k], p) for k, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
                for sample, (name, probability) in zip(batch.samples, said, strict=True):
                    add([images.names[sample], name, f"{probability:.4f}"])
                    sums[name] = [sums[name][0] + 1, sums[name][1] + probability]
                tiles.add(batch, [f"{name} {100 * probability:.0f} %" for name, probability in said])
        tiles.write(folder / PICTURE)
        counts = {name: both for name, both in sums.items() if both[0]}
        rows = [[name, f"{counts[name][0]:,}", f"{counts[name][1] / counts[name][0]:.0%}"] for name in by_count(counts)]
        files = {TABLE: "an image a line: path, class, probability"}
        return Written(tiles.count, ["Class", "Images", "Mean probability"], rows, files, PICTURE)


class Tiles:
    """Some of the images, evenly apart, each with what was said of it."""

    def __init__(self, total: int):
        self.wanted, self.count = set(spread(total, SHOWN)), 0
        self.made: list[tuple[np.ndarray, str]] = []

    def add(self, batch: Batch, said: Sequence[str]) -> None:
        """The images of a batch, in their order."""
        kept = [k for k in range(len(said)) if self.count + k in self.wanted]
        if kept:
            self.made += zip(to_rgb(batch.images[kept]), [said[k] for k in kept], strict=True)
        self.count += len(said)

    def write(self, path: Path) -> None:
        contact_sheet(self.made, path)


def every(images: ImageSet, bundle: EncoderBundle) -> Generator[Batch, None, None]:
    """All images as the encoder takes them, with progress."""
    batches = eval_batches(images, size=bundle.size, device=bundle.standardize.mean.device)
    return counted(batches, "predicting", len(images))


@contextmanager
def table(folder: Path, names: list[str]) -> Generator[Callable[[Sequence[str]], object], None, None]:
    """What adds a row to predictions.csv, which is there when all of them are.

    Names of files are written byte by byte as they are, UTF-8 or not.
    """
    count = 0
    path = folder / TABLE
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors=AS_IT_IS) as file:
        writer = csv.writer(file)
        writer.writerow(names)

        def add(row: Sequence[str]) -> None:
            nonlocal count
            count += 1
            writer.writerow(row)

        yield add
    say(f"{path}: {count} images")
