"""The contract of an evaluation, and what it may ask of the call that it is part of.

An evaluation is a class: what it needs of data and encoder, how it fits and predicts, and what it keeps of each image, from
which its numbers follow. The runner (`runner.py`) does the rest for all alike: the same network untrained, intervals,
paired differences, results, tables, what is kept for `underpaint predict`. A new one is a module and a line in
`EVALUATIONS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from underpaint.console import say
from underpaint.data import ImageSet, Indices, Source, labelled_indices, labels_judge
from underpaint.errors import InputError
from underpaint.evaluation.baselines import hog, raw_pixels
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.evaluation.features import Features, pixel_features, stored_features
from underpaint.evaluation.keep import Saved
from underpaint.evaluation.options import Options
from underpaint.evaluation.results import Measured
from underpaint.evaluation.settings import NoSettings, changed
from underpaint.evaluation.splits import Split, stratified
from underpaint.evaluation.written import Written
from underpaint.files import utf8

ENCODER, UNTRAINED = "encoder", "untrained"  # the encoder that is judged, and the same choices with random weights
SHOTS = 5  # images, of each class where there are classes: with fewer there is nothing to choose by
PIXELS: dict[str, Callable[[Tensor], Tensor]] = {"raw pixels": raw_pixels, "HOG": hog}  # features without a network


class Row(NamedTuple):
    """A line of results."""

    name: str
    who: str  # ENCODER, UNTRAINED, or what needs no network
    variant: str = ""  # where an evaluation has several: a head, a score


class Kept(NamedTuple):
    """What `underpaint predict` is to use: a network, the names of its classes, and what else rebuilding it takes."""

    network: nn.Module
    classes: list[str]
    facts: dict[str, object]


@dataclass
class Context:
    """What the evaluations of a call share.

    Attributes:
        folder: of the whole call.
        fraction: share of the training images that is used.
        alone: whether the same encoder with random weights is left out.
        whole: what holds all of the labelled images, where this one uses a share of them.
        with_patches: whether any evaluation needs patch tokens: one pass then gives them to all.
    """

    bundle: EncoderBundle
    source: Source
    options: Options
    folder: Path
    with_patches: bool = False
    fraction: float = 1.0
    alone: bool = False
    whole: "Context | None" = None
    found: dict[str, Any] = field(default_factory=dict)  # annotations that were looked for already, by their kind
    drawn: set[Path] = field(default_factory=set)  # what several evaluations would draw alike
    _features: dict[tuple[str, int], Features] = field(default_factory=dict, init=False)

    @cached_property
    def encoders(self) -> dict[str, EncoderBundle]:
        """The encoder and, where it is trained, the same one with random weights, by the names of their rows."""
        if self.alone or not self.bundle.trained:
            return {ENCODER: self.bundle}
        return {ENCODER: self.bundle, UNTRAINED: self.bundle.random_init(self.options.seed)}

    @property
    def device(self) -> torch.device:
        return self.bundle.standardize.mean.device

    def load(self, source: Source, indices: Indices) -> Split:
        """All of these images that can be read, at the encoder's size; what is left out is said."""
        images = self.bundle.images(source, indices)
        if images.skipped:
            first = f"{images.skipped[0]['path']}: {images.skipped[0]['reason']}"
            say(f"{len(images.skipped)} images of {source.location} are left out, the first: {first}")
        return Split(images, np.arange(len(images)))

    def features(self, who: str, split: Split) -> Features:
        """Of an encoder (from disk, where an earlier call had the same), or of `PIXELS`; one pass for all evaluations."""
        key = (who, id(split))
        if key not in self._features:
            if who in PIXELS:
                made = pixel_features(PIXELS, split, self.bundle.size)
                self._features.update({(name, id(split)): found for name, found in made.items()})
            elif (part := self._part(who, split)) is not None:
                self._features[key] = part
            else:
                self._features[key] = stored_features(self.encoders[who], split, with_patches=self.with_patches)
        return self._features[key]

    def _part(self, who: str, split: Split) -> Features | None:
        """Those of a part of the labelled images, where those of all are known."""
        for other in () if self.whole is None else self.whole.labelled:
            found = self.whole._features.get((who, id(other))) if self.whole is not None else None
            if found is not None and other.images is split.images and np.isin(split.indices, other.indices).all():
                rows = torch.from_numpy(np.flatnonzero(np.isin(found.samples, split.indices)))
                patches = found.patches[rows] if len(found.patches) == len(found.samples) else found.patches[:0]
                return Features(found.pooled[rows], patches, found.samples[rows.numpy()])
        return None

    @cached_property
    def all_labelled(self) -> tuple[Split, Split]:
        """All images with class labels, to train on and to test on."""
        if self.whole is not None:
            return self.whole.all_labelled
        train, test = labelled(self.source)
        return self.load(self.source, train), self.load(self.source, test)

    @cached_property
    def labelled(self) -> tuple[Split, Split]:
        """Images with class labels, a share of them to train on, and those to test on.

        Raises:
            InputError: there are no labels; a class in test that train lacks.
        """
        source, (train, test) = self.source, self.all_labelled
        if self.fraction < 1:
            count = max(len(np.unique(train.labels)), round(self.fraction * len(train.indices)))
            train = train.subset(count, self.options.seed)
        lacking = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
        if lacking:
            shown = ", ".join(class_name(train.images, label) for label in lacking[:3])
            raise InputError(f"{source.location}: {len(lacking)} classes occur in test and not in train ({shown})")
        return train, test

    def fewer(self, indices: Indices) -> Indices:
        """The share of the training images that is used."""
        if self.fraction == 1:
            return indices
        count = max(1, round(self.fraction * len(indices)))
        return np.asarray(indices)[stratified(np.zeros(len(indices), int), count, self.options.seed)]


def labelled(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Entries with class labels, to train on and to test on.

    Raises:
        InputError: there are none, or none that can judge.
    """
    sides = labelled_indices(source)
    if sides is None and (useless := labels_judge(source)):
        raise InputError(f"{source.location}: its class labels cannot judge: {useless}")
    if sides is None:
        raise InputError(f"{source.location} has no class labels; expected a folder a class, or a label column")
    return sides


def class_name(images: ImageSet, label: int) -> str:
    """The name of a class, or its number where it has none."""
    names = images.classes or []
    return utf8(names[label]) if label < len(names) else str(label)


Settings = TypeVar("Settings")
Data = TypeVar("Data")
Model = TypeVar("Model")
Found = TypeVar("Found")


class Evaluation(ABC, Generic[Settings, Data, Model, Found]):
    """One judgement of an encoder: `rows` lists what is judged, each is fitted, predicts, and is measured.

    Attributes:
        annotation: what DATA must have.
        input: what is asked of the encoder; "pooled" and "tokens" come from one pass for all evaluations.
        Config: a dataclass of settings, each with a default.
        what: what its settings are of, in a message.
        asks: for what its numbers depend on, beside its settings and what all evaluations of a call share: options by name.
    """

    annotation: ClassVar[Literal["label", "number", "mask", "boxes", "none"]]
    input: ClassVar[Literal["pooled", "tokens", "images"]]
    Config: ClassVar[type]
    what: ClassVar[str] = "this task"
    asks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str, context: Context, data: Data, config: Settings):
        self.name, self.context, self.data, self.config = name, context, data, config
        self.folder = context.folder / name

    @classmethod
    def configure(cls, context: Context) -> Settings:
        """The settings, as changed by the call."""
        settings: Settings = cls.Config()
        # what is given is meant for those that have settings
        return settings if isinstance(settings, NoSettings) else changed(settings, context.options.settings, cls.what)

    @classmethod
    def annotated(cls, source: Source) -> object:
        """What people said of the images, as far as it is known before any is decoded; `load` finds it as
        `context.found[cls.annotation]`. Raises InputError where there is nothing to judge by."""
        return None

    @classmethod
    def fitting_size(cls, context: Context) -> tuple[tuple[int, int], str] | None:
        """Height and width of what the encoder is given where nobody says, and why; None for the encoder's own."""
        return None

    @classmethod
    @abstractmethod
    def load(cls, context: Context) -> Data:
        """The annotated images. Raises InputError where there are none, or none that serve."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """What is judged, in the order of the results, what needs no network included."""

    @abstractmethod
    def fit(self, row: Row) -> Model:
        """On train, with what is chosen chosen on a part of train."""

    @abstractmethod
    def predict(self, row: Row, model: Model) -> Found:
        """What is said of every test image."""

    @abstractmethod
    def measure(self, found: Found) -> Measured:
        """The numbers, from what is kept of each test image."""

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """What results say first: at least how many images were in `train` and `test`."""

    def least(self) -> int:
        """Fewest training images of which it may be asked what a share of the labels is worth."""
        return SHOTS

    def beside(self, row: Row, found: Found) -> dict[str, object]:
        """What a row holds beside its numbers."""
        return {}

    def details(self, found: Mapping[str, Found]) -> dict[str, object]:
        """What results say last, from what was found by row."""
        return {}

    def kept(self, row: Row, model: Model) -> Kept | None:
        """Of the encoder's rows, what can be used on other images."""
        return None

    def visualize(self, row: Row, found: Found, folder: Path) -> None:
        """Pictures of a row."""

    @classmethod
    def rebuild(cls, saved: Saved, bundle: EncoderBundle) -> nn.Module:
        """The network of `kept`, with weights as before training."""
        raise InputError(f"a model of task '{saved['task']}' is of no use on other images")

    @classmethod
    def write(cls, model: nn.Module, saved: Saved, bundle: EncoderBundle, source: Source, folder: Path) -> Written:
        """What the network says of every image of a source, into a folder, as it computes it, with a picture of some."""
        raise NotImplementedError


AnyEvaluation: TypeAlias = type[Evaluation[Any, Any, Any, Any]]
