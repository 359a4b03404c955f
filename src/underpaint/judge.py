"""What an encoder is worth while it trains and at the end, on images it is judged by.

The untrained encoder gets the same probe with the same choices; nothing is chosen on the test part. Without labels
there is the effective rank of the features (RankMe, arXiv 2210.02885).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from underpaint.backbones import Backbone
from underpaint.backbones.norms import settled
from underpaint.data import Batch, ImageSet, Source, eval_batches, fair_batches, labelled_indices
from underpaint.evaluate import (
    Features,
    Probe,
    attentive,
    effective_rank,
    extract,
    gain,
    hog,
    knn,
    linear,
    majority,
    probe_features,
    raw_pixels,
    shots,
    stratified,
)
from underpaint.evaluate.parts import Part
from underpaint.methods import Method
from underpaint.patches import Standardize

QUICK_TRAIN, QUICK_TEST = 5_000, 2_000  # images of a probe while training
FULL_TRAIN, FULL_TEST = 50_000, 10_000  # of the probe at the end
ATTENTIVE_TRAIN = 10_000  # the attentive probe holds every patch token, so it sees fewer images at the end
SETTLING = 2_048  # clean images from which batch norms take their statistics
RESTORED = 2_000  # images on which the restoration is measured
SHOTS = 10  # labelled images a class of the probes with few labels
KINDS = ("linear", "attentive", "knn")
TOKEN_MEMORY = 1.5e9  # bytes of patch tokens that are held at once


@dataclass
class Worth:
    """What features are worth.

    Attributes:
        probes: by name, one each, or one a draw of the labelled images; none without labels.
        rank: effective rank.
    """

    probes: dict[str, list[Probe]]
    rank: float


@dataclass
class Judge:
    """The images to judge by: labelled parts, or none."""

    pool: ImageSet  # what is pretrained on: for the rank and the pictures
    parts: tuple[Part, Part] | None  # to train a probe on, and to test it on
    size: tuple[int, int]
    seed: int

    @classmethod
    def of(
        cls,
        source: Source,
        load: Callable[[Source, list[int]], ImageSet],
        pool: ImageSet,
        pool_indices: Sequence[int],
        size: tuple[int, int],
        seed: int,
    ) -> "Judge":
        """Labelled images of `source`, read by `load`; `pool` is used again where it holds the training part."""
        found = labelled_indices(source, seed)
        if found is None:
            return cls(pool, None, size, seed)
        parts = []
        for indices in found:
            chosen = list(indices)
            images = pool if chosen == list(pool_indices) and source.classes == pool.classes else load(source, chosen)
            parts.append(Part(images, list(range(len(images)))))
        return cls(pool, (parts[0], parts[1]), size, seed)

    def shown(self, device: torch.device | str) -> Tensor:
        """The same few images for every picture, in [0, 1]."""
        few = list(range(min(6, len(self.pool))))
        return next(iter(eval_batches(self.pool, size=self.size, indices=few))).images.to(device)

    def settled(self, encoder: Backbone, standardize: Standardize) -> Backbone:
        """What is judged and kept of an encoder: where it has batch norms, a copy with the statistics of clean images,
        since a method may have shown it corrupted ones, and an untrained one has none."""

        def clean() -> Iterator[Tensor]:
            device = standardize.mean.device
            for batch in fair_batches(self.pool, size=self.size, count=SETTLING, seed=self.seed, device=device):
                yield standardize(batch.images)

        return settled(encoder, clean)

    def restoration(self, method: Method, standardize: Standardize) -> dict[str, Any]:
        """By task: the error on what was corrupted (squared, or the cross-entropy of words) over that of the trivial
        restoration, on test images where there is a test part; each image's draw is its own, the same at every call."""
        part = self.parts[1] if self.parts is not None else Part(self.pool, list(range(len(self.pool))))
        chosen = part.indices[:: max(1, len(part.indices) // RESTORED)][:RESTORED]
        device = standardize.mean.device
        generator = torch.Generator().manual_seed(self.seed)
        was = method.training
        method.eval()
        sums: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for batch in eval_batches(part.images, size=self.size, indices=chosen, device=device):
            for name, pair in method.held_out(standardize(batch.images), generator).items():
                sums.setdefault(name, []).append((pair[0].double().cpu(), pair[1].double().cpu()))
        method.train(was)
        found: dict[str, Any] = {"images": len(chosen), "test_part": self.parts is not None}
        for name, pairs in sums.items():
            left, before = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
            ratio = float(left.sum() / before.sum().clamp_min(1e-30))
            spread = (left - ratio * before).std() / before.mean().clamp_min(1e-30)
            found[name] = {"error": ratio, "standard_error": float(spread) / len(left) ** 0.5}
        return found

    def _floor(self, floor: Callable[[Tensor], Tensor], part: Part) -> tuple[Tensor, np.ndarray]:
        """Features without a network [n, d], and the labels of the images that could be read."""
        features, seen = [], []
        for batch in eval_batches(part.images, size=self.size, indices=part.indices):
            features.append(floor(batch.images).float())
            seen += batch.samples
        return torch.cat(features), part.labels_of(seen)

    def quick(self, encoder: Backbone, standardize: Standardize) -> dict[str, float]:
        """Named numbers for a line of metrics."""
        encoder, device = self.settled(encoder, standardize), standardize.mean.device
        if self.parts is None:
            few = list(range(min(QUICK_TEST, len(self.pool))))
            batches = eval_batches(self.pool, size=self.size, indices=few, device=device)
            pooled = extract(encoder, batches, transform=standardize, with_patches=False).pooled
            return {"rank": effective_rank(pooled)}
        train = self.parts[0].subset(self._most(encoder, QUICK_TRAIN), self.seed)
        test = self.parts[1].subset(self._most(encoder, QUICK_TEST), self.seed)
        x, x_labels = self._features(encoder, standardize, train, True)
        y, y_labels = self._features(encoder, standardize, test, True)
        probes = probe_features(x, x_labels, y, y_labels, seed=self.seed)
        numbers = {"rank": effective_rank(x.pooled[:QUICK_TEST])}
        for name, probe in probes.items():
            numbers |= {name: probe.accuracy, f"{name}_error": probe.standard_error}
        return numbers

    def final(
        self,
        encoder: Backbone,
        untrained: Backbone,
        standardize: Standardize,
        start: str,
        shout: Callable[[str], None],
    ) -> dict[str, Any]:
        """All probes in full, of the encoder, of what it started from, and of the floors; told in plain words.

        `start` says in words what it started from.
        """
        if self.parts is not None:
            shout("judging the encoder, the untrained one, raw pixels and HOG ...")
        found = {
            "encoder": self.worth(encoder, standardize),
            "untrained": self.worth(untrained, standardize),
            **self.floors(),
        }
        report = self.summary(found, encoder)
        if self.parts is None:
            shout(
                f"no labels: effective rank {found['encoder'].rank:.1f} of {encoder.dim} "
                f"(untrained {found['untrained'].rank:.1f}); give --labels to know what the encoder is worth"
            )
        else:
            _tell(found, start, shout)
        return report

    def summary(self, found: dict[str, Worth], encoder: Backbone) -> dict[str, Any]:
        """What `probes.json` keeps of an encoder, the untrained one and the floors, by those names."""
        ranks = {
            "encoder": found["encoder"].rank,
            "untrained": found["untrained"].rank,
            "dim": encoder.dim,
        }
        if self.parts is None:
            return {"rank": ranks}
        train, test = self.full()
        classes = len(np.unique(train.labels))
        probes = {who: {name: probe[0] for name, probe in worth.probes.items()} for who, worth in found.items()}
        gains = {name: gain(probes["encoder"][name], probes["untrained"][name]) for name in KINDS}
        return {
            "train": len(train.indices),
            "test": len(test.indices),
            "classes": classes,
            "chance": 1 / classes,
            **{who: {name: named[name].numbers() for name in KINDS if name in named} for who, named in probes.items()},
            "majority": majority(train.labels, test.labels).numbers(),
            "attentive_train": min(len(train.indices), self._most(encoder, ATTENTIVE_TRAIN)),
            "gain": {name: {"difference": d, "standard_error": e} for name, (d, e) in gains.items()},
            "rank": ranks,
        }

    def full(self) -> tuple[Part, Part]:
        """The labelled images of the probes at the end."""
        assert self.parts is not None
        return self.parts[0].subset(FULL_TRAIN, self.seed), self.parts[1].subset(FULL_TEST, self.seed)

    def worth(self, encoder: Backbone, standardize: Standardize, draws: int = 0) -> Worth:
        """All probes of an encoder; with `draws`, also probes of `SHOTS` labels a class, drawn so many times.

        Without labels there is the effective rank alone.
        """
        if self.parts is None:
            return Worth({}, self.quick(encoder, standardize)["rank"])
        encoder = self.settled(encoder, standardize)
        train, test = self.full()
        x, x_labels = self._features(encoder, standardize, train, False)
        y, y_labels = self._features(encoder, standardize, test, False)
        few = train.subset(self._most(encoder, ATTENTIVE_TRAIN), self.seed)
        some = test.subset(self._most(encoder, FULL_TEST), self.seed)
        tokens, token_labels = self._features(encoder, standardize, few, True)
        test_tokens, test_token_labels = self._features(encoder, standardize, some, True)
        probes = {
            "linear": [linear(x.pooled, x_labels, y.pooled, y_labels, seed=self.seed)],
            "attentive": [
                attentive(tokens.patches, token_labels, test_tokens.patches, test_token_labels, seed=self.seed)
            ],
            "knn": [knn(x.pooled, x_labels, y.pooled, y_labels, seed=self.seed)],
        }
        if draws:
            chosen = [shots(token_labels, SHOTS, self.seed + k) for k in range(draws)]
            probes["few_linear"] = [
                linear(tokens.pooled[k], token_labels[k], y.pooled, y_labels, seed=self.seed) for k in chosen
            ]
            probes["few_attentive"] = [
                attentive(tokens.patches[k], token_labels[k], test_tokens.patches, test_token_labels, seed=self.seed)
                for k in chosen
            ]
        return Worth(probes, effective_rank(x.pooled[:QUICK_TEST]))

    def floors(self, draws: int = 0) -> dict[str, Worth]:
        """The probes of raw pixels and HOG, which need no network; nothing without labels."""
        if self.parts is None:
            return {}
        train, test = self.full()
        found = {}
        for name, floor in (("raw_pixels", raw_pixels), ("hog", hog)):
            x, labels = self._floor(floor, train)
            y, test_labels = self._floor(floor, test)
            probes = {
                "linear": [linear(x, labels, y, test_labels, seed=self.seed)],
                "knn": [knn(x, labels, y, test_labels, seed=self.seed)],
            }
            if draws:
                few = stratified(labels, ATTENTIVE_TRAIN, self.seed)  # the images that encoders get
                chosen = [few[shots(labels[few], SHOTS, self.seed + k)] for k in range(draws)]
                probes["few_linear"] = [linear(x[k], labels[k], y, test_labels, seed=self.seed) for k in chosen]
            found[name] = Worth(probes, effective_rank(x[:QUICK_TEST]))
        return found

    def _features(
        self, encoder: Backbone, standardize: Standardize, part: Part, with_patches: bool
    ) -> tuple[Features, np.ndarray]:
        device = standardize.mean.device
        seen: list[int] = []

        def noted() -> Iterator[Batch]:
            for batch in eval_batches(part.images, size=self.size, indices=part.indices, device=device):
                seen.extend(batch.samples)
                yield batch

        features = extract(encoder, noted(), transform=standardize, with_patches=with_patches)
        return features, part.labels_of(seen)

    def _most(self, encoder: Backbone, count: int) -> int:
        """At most `count` images, fewer where their patch tokens would not fit."""
        rows, columns = encoder.grid(*self.size)
        return min(count, int(TOKEN_MEMORY / (4 * rows * columns * encoder.dim)))


def _tell(found: dict[str, Worth], start: str, shout: Callable[[str], None]) -> None:
    """The table and the verdict that end a run."""
    shout(f"{'':<22}{'linear':>16}{'attentive':>16}{'kNN':>16}")
    names = {
        "encoder": "pretrained encoder",
        "untrained": start,
        "raw_pixels": "raw pixels",
        "hog": "HOG",
    }
    probes = {who: {name: probe[0] for name, probe in worth.probes.items()} for who, worth in found.items()}
    for who, label in names.items():
        cells = [
            f"{probes[who][kind].accuracy:.3f} +- {probes[who][kind].standard_error:.3f}"
            if kind in probes[who]
            else "-"
            for kind in KINDS
        ]
        shout(f"{label:<22}" + "".join(f"{cell:>16}" for cell in cells))
    difference, error = gain(probes["encoder"]["linear"], probes["untrained"]["linear"])
    if difference > 2 * error:
        shout(
            f"pretraining helped: {100 * difference:+.1f} +- {100 * error:.1f} points of linear probe over the {start}"
        )
    else:
        shout(
            f"pretraining did not measurably help: {100 * difference:+.1f} +- {100 * error:.1f} points of linear probe "
            f"over the {start}"
        )
    best_floor = max(("raw_pixels", "hog"), key=lambda who: probes[who]["linear"].accuracy)
    if probes["encoder"]["linear"].accuracy <= probes[best_floor]["linear"].accuracy:
        shout(f"note: {names[best_floor]} without any network do as well or better here")
