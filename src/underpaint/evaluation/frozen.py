"""Probes of frozen features: nearest neighbours, linear, attentive; of an encoder, the same one untrained, and none.

Everything is chosen on a part of train, nothing on test.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.computing import autocast, full, in_full
from underpaint.evaluation.attentive import AttentiveHead, attentive_head
from underpaint.evaluation.base import ENCODER, PIXELS, UNTRAINED, Kept, Row
from underpaint.evaluation.baselines import majority
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.evaluation.classify import MAJORITY, Classification
from underpaint.evaluation.features import Features, Known
from underpaint.evaluation.keep import Saved
from underpaint.evaluation.knn import knn
from underpaint.evaluation.linear import linear_head
from underpaint.evaluation.probes import ProbeSuite
from underpaint.evaluation.results import Probe
from underpaint.evaluation.settings import NoSettings
from underpaint.evaluation.visualizations import write_visualizations


class LinearHead(nn.Module):
    """Scores from pooled features."""

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(dim, outputs)

    def forward(self, pooled: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        return self.linear(pooled)


class Headed(nn.Module):
    """An encoder with a head on its pooled features, or on its patch tokens."""

    def __init__(self, encoder: nn.Module, head: nn.Module, of_patches: bool):
        super().__init__()
        self.encoder, self.head, self.of_patches = encoder, head, of_patches

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b k"]:
        with autocast(images.device):
            found = self.encoder(images)
        with in_full(images):  # a probe is of features in float32
            return self.head(full(found.patches if self.of_patches else found.pooled))


class Fitted(NamedTuple):
    """A probe, and its head where it can be used on other images."""

    probe: Probe
    head: nn.Module | None = None


class FrozenProbe(Classification[NoSettings, Fitted]):
    """A probe of features that were computed once."""

    Config = NoSettings
    pixels = True  # whether features without a network have what is probed

    def probe(self, x: Features, labels: np.ndarray, y: Features, wanted: np.ndarray) -> Fitted:
        """Fitted to the features and labels of train, `x`, and judged by those of test, `y`."""
        raise NotImplementedError

    def rows(self) -> list[Row]:
        who = [*self.context.encoders, *(PIXELS if self.pixels else ()), MAJORITY]
        return [Row(name, name) for name in who]

    def fit(self, row: Row) -> Fitted:
        if row.who == MAJORITY:
            return Fitted(majority(self.train.labels, self.wanted).grouped(self.test.groups_of(self.seen)))
        x, y = (self.context.features(row.who, split) for split in self.data)
        labels, self.wanted = self.train.labels_of(x.samples.tolist()), self.test.labels_of(y.samples.tolist())
        self.fitted, self.seen = len(labels), y.samples.tolist()
        found = self.probe(x, labels, y, self.wanted)
        return found._replace(probe=found.probe.grouped(self.test.groups_of(self.seen)))

    def predict(self, row: Row, model: Fitted) -> Probe:
        return model.probe

    def kept(self, row: Row, model: Fitted) -> Kept | None:
        if model.head is None:
            return None
        labels, names = self.classes()
        network = Headed(self.context.encoders[row.who].encoder, model.head, self.input == "tokens")
        return Kept(network, names, {"labels": labels})

    def visualize(self, row: Row, found: Probe, folder: Path) -> None:
        super().visualize(row, found, folder)
        pictures = self.context.folder / "pictures"
        if row.who == ENCODER and pictures not in self.context.drawn:  # once for all probes
            self.context.drawn.add(pictures)
            bundle, seed = self.context.bundle, self.context.options.seed
            untrained = self.context.encoders.get(UNTRAINED) or bundle.random_init(seed)
            suite = ProbeSuite(self.train.images, self.data, bundle.size, seed)
            known = [
                [Known(split.images, self.context.features(who, split)) for split in self.data]
                if who in self.context.encoders
                else []
                for who in (ENCODER, UNTRAINED)
            ]
            write_visualizations(
                bundle.encoder, untrained.encoder, suite, bundle.standardize, pictures, known=(known[0], known[1])
            )


class NearestNeighbours(FrozenProbe):
    """Weighted nearest neighbours by cosine."""

    input = "pooled"

    def probe(self, x: Features, labels: np.ndarray, y: Features, wanted: np.ndarray) -> Fitted:
        return Fitted(knn(x.pooled, labels, y.pooled, wanted, seed=self.context.options.seed))


class LinearProbe(FrozenProbe):
    """Logistic regression."""

    input = "pooled"

    def probe(self, x: Features, labels: np.ndarray, y: Features, wanted: np.ndarray) -> Fitted:
        probe, (weight, bias) = linear_head(x.pooled, labels, y.pooled, wanted, seed=self.context.options.seed)
        head = LinearHead(weight.shape[1], len(weight))
        head.load_state_dict({"linear.weight": weight, "linear.bias": bias})
        return Fitted(probe, head)

    @classmethod
    def rebuild(cls, saved: Saved, bundle: EncoderBundle) -> nn.Module:
        return Headed(bundle.encoder, LinearHead(bundle.encoder.dim, len(saved["classes"])), False)


class AttentiveProbing(FrozenProbe):
    """CAE's attentive probe."""

    input = "tokens"
    pixels = False

    def probe(self, x: Features, labels: np.ndarray, y: Features, wanted: np.ndarray) -> Fitted:
        return Fitted(*attentive_head(x.patches, labels, y.patches, wanted, seed=self.context.options.seed))

    @classmethod
    def rebuild(cls, saved: Saved, bundle: EncoderBundle) -> nn.Module:
        return Headed(bundle.encoder, AttentiveHead.untrained(bundle.encoder.dim, len(saved["classes"])), True)
