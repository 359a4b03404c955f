"""What all evaluations by class labels share: accuracy, its baseline, classes by name, and using what was trained."""

import csv
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

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
from underpaint.files import AS_IT_IS, replacing
from underpaint.report.figures.pictures import to_rgb

MAJORITY = "majority"
SHOWN = 24  # images on a picture of what was said
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
    def write(cls, model: nn.Module, saved: Saved, bundle: EncoderBundle, source: Source, folder: Path) -> None:
        """predictions.csv (path, class, probability) and predictions.png."""
        images, names = bundle.images(source), saved["classes"]
        tiles: list[tuple[np.ndarray, str]] = []
        with table(folder, ["path", "class", "probability"]) as add:
            for batch in every(images, bundle):
                best = model(bundle.standardize(batch.images)).softmax(1).max(1)
                shown = to_rgb(batch.images[: SHOWN - len(tiles)]) if len(tiles) < SHOWN else []
                for position, sample in enumerate(batch.samples):
                    name, probability = names[int(best.indices[position])], float(best.values[position])
                    add([images.names[sample], name, f"{probability:.4f}"])
                    if position < len(shown):
                        tiles.append((shown[position], f"{name} {100 * probability:.0f} %"))
        contact_sheet(tiles, folder / "predictions.png")


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
    path = folder / "predictions.csv"
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors=AS_IT_IS) as file:
        writer = csv.writer(file)
        writer.writerow(names)

        def add(row: Sequence[str]) -> None:
            nonlocal count
            count += 1
            writer.writerow(row)

        yield add
    say(f"{path}: {count} images")
