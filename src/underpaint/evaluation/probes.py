"""What an encoder is worth while it trains and at the end, on images it is judged by.

The untrained encoder gets the same probe with the same choices; nothing is chosen on the test part. Without labels
there is the effective rank of the features (RankMe, arXiv 2210.02885).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from underpaint.backbones import Backbone
from underpaint.backbones.norms import settled
from underpaint.data import ImageSet, Indices, Source, eval_batches, fair_batches, labelled_indices
from underpaint.draws import Draws
from underpaint.errors import InputError
from underpaint.evaluation.attentive import attentive
from underpaint.evaluation.baselines import hog, majority, raw_pixels
from underpaint.evaluation.features import (
    Features,
    Known,
    completed_features,
    counted,
    pixel_features,
    shared_features,
)
from underpaint.evaluation.knn import knn
from underpaint.evaluation.linear import linear
from underpaint.evaluation.rank import effective_rank
from underpaint.evaluation.results import Probe, paired_difference
from underpaint.evaluation.splits import Split, evenly, shots
from underpaint.methods import Method
from underpaint.patches import Standardize
from underpaint.train.ranks import first

QUICK_TRAIN, QUICK_TEST = 5_000, 2_000  # images of a probe while training
FULL_TRAIN, FULL_TEST = 50_000, 10_000  # of the probe at the end
ATTENTIVE_TRAIN = 10_000  # the attentive probe holds every patch token, so it sees fewer images at the end
SETTLING = 2_048  # clean images from which batch norms take their statistics
RESTORED = 2_000  # images on which the restoration is measured
SHOTS = 10  # labelled images a class of the probes with few labels
SUBSET = 0  # the seed by which a part is made smaller: runs of every seed are judged by the same images
KINDS = ("linear", "attentive", "knn")
MOST_CLASSES = 1_000  # that a probe tells apart: its time is images times classes
TOKEN_MEMORY = 1.5e9  # bytes of patch tokens that are held at once


class Labelled(NamedTuple):
    """Features of images, with their labels and, where they have some, groups (patient, slide, video)."""

    features: Features
    labels: Int[np.ndarray, "n"]
    groups: list[str] | None = None

    @classmethod
    def of(cls, features: Features, split: Split) -> "Labelled":
        samples = features.samples.tolist()
        return cls(features, split.labels_of(samples), split.groups_of(samples))

    def part(self, split: Split) -> "Labelled":
        """Those of a part of the images."""
        samples = self.features.samples
        rows = np.flatnonzero(np.isin(samples, split.indices))
        if len(rows) == len(samples):
            return self
        pooled, patches = (tensor[torch.from_numpy(rows)] for tensor in self.features[:2])
        return Labelled.of(Features(pooled, patches, samples[rows]), split)


class Sides(NamedTuple):
    """The images that probes are fitted to, and those that test them."""

    train: Labelled
    test: Labelled


@dataclass(frozen=True)
class Seen:
    """What probes see of an encoder, made in one pass over the images.

    Attributes:
        encoder: as it is judged (`recalibrate_bn`).
        sides: with pooled features; None without labels, and in a process that only helps the first one.
        tokens: of fewer images, with patch tokens too.
        pool: without labels, features of some of the images pretrained on.
        found: what probes found of it already, by kind and images: none is fitted twice.
    """

    encoder: Backbone
    sides: Sides | None = None
    tokens: Sides | None = None
    pool: Features | None = None
    found: dict[tuple[str, bytes, bytes, int], Probe] = field(default_factory=dict)

    def probe(self, kind: str, train: Labelled, test: Labelled, seed: int) -> Probe:
        """One of `KINDS`."""
        key = (kind, train.features.samples.tobytes(), test.features.samples.tobytes(), seed)
        if key not in self.found:
            self.found[key] = probe_features(train, test, seed=seed, kinds=[kind])[kind]
        return self.found[key]

    def known(self, suite: "ProbeSuite") -> list[Known]:
        """The features, for pictures."""
        found = [] if self.pool is None else [Known(suite.pool, self.pool)]
        for sides in (self.sides, self.tokens):
            if sides is not None and suite.splits is not None:
                found += [Known(part.images, side.features) for part, side in zip(suite.splits, sides, strict=True)]
        return found

    @property
    def bytes(self) -> int:
        """Memory of what is held."""
        held = [side.features for sides in (self.sides, self.tokens) for side in sides or ()]
        held += [] if self.pool is None else [self.pool]
        tensors = {t.data_ptr(): t.numel() * t.element_size() for f in held for t in (f.pooled, f.patches)}
        return sum(tensors.values())


def probe_features(train: Labelled, test: Labelled, *, seed: int = 0, kinds: Sequence[str] = KINDS) -> dict[str, Probe]:
    """The probes `kinds` by name; each keeps the order of the test images, so that two encoders can be paired.

    Raises InputError for a kind that does not exist, and what the probes raise.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"no probe '{unknown[0]}'; there are: {', '.join(KINDS)}")
    found = {}
    for kind in kinds:
        probe = {"linear": linear, "attentive": attentive, "knn": knn}[kind]
        x, y = (one.features.patches if kind == "attentive" else one.features.pooled for one in (train, test))
        found[kind] = probe(x, train.labels, y, test.labels, seed=seed).grouped(test.groups)
    return found


@dataclass
class Worth:
    """What features are worth.

    Attributes:
        probes: by name, one each, or one a draw of the labelled images; none without labels.
        rank: effective rank.
        counts: `attentive_train` and `attentive_test`, images of the attentive probe, which holds every patch token;
            `shots`, fewest labelled images of a class in any draw of the probes with few labels;
            `few_attentive_test`, images to test the attentive one of those, 0 where its tokens would not fit.
    """

    probes: dict[str, list[Probe]]
    rank: float
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class FewLabels:
    """The labelled images of the probes with few labels, the same for every encoder and floor.

    Attributes:
        draws: numbers in the training part's image set, `SHOTS` a class, of each draw; none where classes have too few.
        overlap: share of the images of one draw that are in another as well, the mean over pairs of draws.
        reason: why there are none.
    """

    draws: list[Split]
    overlap: float
    reason: str


@dataclass
class ProbeSuite:
    """The images to judge by: labelled splits, or none."""

    pool: ImageSet  # what is pretrained on: for the rank and the pictures
    splits: tuple[Split, Split] | None  # to train a probe on, and to test it on
    size: tuple[int, int]
    seed: int
    seen: int = 0  # images of the test part that were pretrained on, without their labels
    left_out: int = 0  # classes that do not judge, since a probe of so many would take hours
    quick_sizes: tuple[int, int] = (QUICK_TRAIN, QUICK_TEST)  # images of a quick probe, to fit it and to test it
    full_sizes: tuple[int, int] = (FULL_TRAIN, FULL_TEST)  # of the judgement at the end

    @classmethod
    def of(
        cls,
        source: Source,
        load: Callable[[Source, Indices], ImageSet],
        pool: ImageSet,
        pool_indices: Indices,
        size: tuple[int, int],
        seed: int,
    ) -> "ProbeSuite":
        """Labelled images of `source`, read by `load`; `pool` is used again where it holds the training part."""
        found = labelled_indices(source)
        if found is None:
            return cls(pool, None, size, seed)
        parts = []
        found, left_out = _frequent(source, *found)
        for indices in found:
            same = np.array_equal(indices, pool_indices) and source.classes == pool.classes
            images = pool if same else load(source, indices)
            parts.append(Split(images, np.arange(len(images))))
        if len(np.unique(parts[0].labels)) < 2 or not len(parts[1].images):  # of those that can be read
            return cls(pool, None, size, seed)
        return cls(pool, (parts[0], parts[1]), size, seed, left_out=left_out)

    @property
    def skipped(self) -> list[dict[str, str]]:
        """{"path", "reason"} of the labelled images that could not be read and are not in the pool."""
        sets = {id(part.images): part.images for part in self.splits or () if part.images is not self.pool}
        return [line for images in sets.values() for line in images.skipped]

    def shown(self, device: torch.device | str) -> Tensor:
        """The same few images for every picture, in [0, 1]: those of `shown_samples` that can be read."""
        few = self.shown_samples()
        return next(iter(eval_batches(self.pool, size=self.size, indices=few))).images.to(device)

    def shown_samples(self) -> list[int]:
        return list(range(min(6, len(self.pool))))

    def recalibrate_bn(self, encoder: Backbone, standardize: Standardize) -> Backbone:
        """What is judged and kept of an encoder: where it has batch norms, a copy with the statistics of clean images,
        since a method may have shown it corrupted ones, and an untrained one has none."""

        def clean() -> Iterator[Tensor]:
            device = standardize.mean.device
            for batch in fair_batches(self.pool, size=self.size, count=SETTLING, seed=self.seed, device=device):
                yield standardize(batch.images)

        return settled(encoder, clean)

    def restoration(self, method: Method, standardize: Standardize) -> dict[str, Any]:
        """By task: the error on what was corrupted (squared, or the cross-entropy of words) over that of the trivial
        restoration, on test images where there is a test part that was not trained on; each image's draw is its own, the
        same at every call."""
        part = self.splits[1] if self.splits is not None else Split(self.pool, list(range(len(self.pool))))
        chosen = [int(part.indices[k]) for k in evenly(len(part.indices), RESTORED)]
        device = standardize.mean.device
        was = method.training
        method.eval()
        sums: dict[str, list[tuple[Tensor, Tensor]]] = {}
        batches = eval_batches(part.images, size=self.size, indices=chosen, device=device)
        for batch in counted(batches, "restoring", len(chosen)):
            draws = Draws(self.seed, torch.tensor(batch.samples))
            for name, pair in method.held_out(standardize(batch.images), draws).items():
                sums.setdefault(name, []).append((pair[0].double().cpu(), pair[1].double().cpu()))
        method.train(was)
        found: dict[str, Any] = {"images": len(chosen), "test_part": self.splits is not None and not self.seen}
        for name, pairs in sums.items():
            left, before = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
            ratio = float(left.sum() / before.sum().clamp_min(1e-30))
            spread = (left - ratio * before).std() / before.mean().clamp_min(1e-30)
            found[name] = {"error": ratio, "standard_error": float(spread) / len(left) ** 0.5}
        return found

    def glance(self, encoder: Backbone, standardize: Standardize) -> Seen:
        """An encoder's features of the images of a quick probe."""
        encoder = self.recalibrate_bn(encoder, standardize)
        if self.splits is None:
            few = Split(self.pool, evenly(len(self.pool), QUICK_TEST).tolist())
            return Seen(encoder, pool=shared_features(encoder, standardize, few, self.size, with_patches=False))
        x, y = (self._labelled(encoder, standardize, split, True) for split in self._quick(encoder))
        sides = None if x is None or y is None else Sides(x, y)
        return Seen(encoder, sides, sides)

    def see(self, encoder: Backbone, standardize: Standardize, known: Seen | None = None) -> Seen:
        """An encoder's features of the labelled images, for `quick` and `worth`: patch tokens of as many as fit. `known` is what
        was seen of the same weights already."""
        if self.splits is None:
            if known is None:
                return self.glance(encoder, standardize)
            return Seen(self.recalibrate_bn(encoder, standardize), pool=known.pool)
        encoder = self.recalibrate_bn(encoder, standardize)
        pooled, tokens = [], []
        before = (None, None) if known is None or known.tokens is None else known.tokens
        for split, most, had in zip(self.full(), (ATTENTIVE_TRAIN, FULL_TEST), before, strict=True):
            chosen = split.subset(self._most(encoder, most), SUBSET)
            found = completed_features(
                *(encoder, standardize, split, self.size),
                with_patches=np.asarray(chosen.indices),
                known=None if had is None else had.features,
            )
            if found is not None:
                rows = np.flatnonzero(np.isin(found.samples, chosen.indices))
                without = found.pooled.new_empty(len(found.pooled), 0, found.pooled.shape[1])
                pooled.append(Labelled.of(found._replace(patches=without), split))
                some = Features(found.pooled[torch.from_numpy(rows)], found.patches, found.samples[rows])
                tokens.append(Labelled.of(some, chosen))
        found = {} if known is None else known.found
        return Seen(encoder, Sides(*pooled), Sides(*tokens), found=found) if pooled else Seen(encoder)

    def quick(self, encoder: Backbone, standardize: Standardize, seen: Seen | None = None) -> dict[str, float]:
        """Named numbers for a line of metrics, of what was `seen` of the encoder where that is given; of several processes,
        which share the work, the first has them."""
        seen = self.glance(encoder, standardize) if seen is None else seen
        if self.splits is None:
            return {} if seen.pool is None else {"rank": effective_rank(seen.pool.pooled)}
        if seen.tokens is None:
            return {}
        x, y = (side.part(split) for side, split in zip(seen.tokens, self._quick(seen.encoder), strict=True))
        numbers = {"rank": _rank(x.features.pooled)}
        for kind in KINDS:
            probe = seen.probe(kind, x, y, self.seed)
            numbers |= {kind: probe.accuracy, f"{kind}_error": probe.standard_error}
        return numbers

    def _quick(self, encoder: Backbone) -> tuple[Split, Split]:
        """The labelled images of a quick probe."""
        assert self.splits is not None
        train, test = (self._most(encoder, most) for most in self.quick_sizes)
        return self.splits[0].subset(train, SUBSET), self.splits[1].subset(test, SUBSET)

    def final(self, encoder: Seen, untrained: Seen, standardize: Standardize) -> dict[str, Any]:
        """What `probes.json` holds: all probes in full, of what was seen of the encoder and of what it started from, and of the
        baselines; of several processes, which share the work, the first has them."""
        found = {
            "encoder": self.worth(encoder.encoder, standardize, seen=encoder),
            "untrained": self.worth(untrained.encoder, standardize, seen=untrained),
        }
        return self.summary({**found, **self.baselines()}, encoder.encoder) if first() else {}

    def summary(self, found: dict[str, Worth], encoder: Backbone) -> dict[str, Any]:
        """What `probes.json` keeps of an encoder, the untrained one and the baselines, by those names."""
        ranks = {
            "encoder": found["encoder"].rank,
            "untrained": found["untrained"].rank,
            "dim": encoder.dim,
        }
        if self.splits is None:
            return {"rank": ranks}
        train, test = self.full()
        classes = len(np.unique(train.labels))
        probes = {who: {name: probe[0] for name, probe in worth.probes.items()} for who, worth in found.items()}
        gains = {name: paired_difference(probes["encoder"][name], probes["untrained"][name]) for name in KINDS}
        return {
            "train": len(train.indices),
            "test": len(test.indices),
            "classes": classes,
            "chance": 1 / classes,
            **{who: {name: named[name].numbers() for name in KINDS if name in named} for who, named in probes.items()},
            "majority": majority(train.labels, test.labels).numbers(),
            "seen_in_pretraining": self.seen,
            **found["encoder"].counts,
            "notes": self.notes(found["encoder"].counts),
            "gain": {name: {"difference": d, "standard_error": e} for name, (d, e) in gains.items()},
            "rank": ranks,
        }

    def full(self) -> tuple[Split, Split]:
        """The labelled images of the probes at the end."""
        assert self.splits is not None
        train, test = self.full_sizes
        return self.splits[0].subset(train, SUBSET), self.splits[1].subset(test, SUBSET)

    def notes(self, counts: dict[str, int], draws: int = 0) -> list[str]:
        """What must be known to read the probes, in sentences: how few images some of them have, and whether the encoder
        has seen them. `counts` are those of a worth with so many `draws`."""
        if self.splits is None:
            return []
        train, test = self.full()
        said = []
        if self.left_out:
            said.append(
                f"The {MOST_CLASSES:,} classes with the most images judge, of {MOST_CLASSES + self.left_out:,} in all."
            )
        if self.full_sizes < (FULL_TRAIN, FULL_TEST) and len(train.indices) < min(
            FULL_TRAIN, len(self.splits[0].indices)
        ):
            said.append(
                f"The probes saw {len(train.indices):,} and {len(test.indices):,} of the labelled images, for the share of the "
                "run's time that judging it may take (run.probe_share); `underpaint evaluate` takes all."
            )
        if self.seen:
            said.append(
                f"{self.seen:,} of the images to test on were pretrained on, without their labels (all_images)."
            )
        fitted, tested = counts.get("attentive_train", 0), counts.get("attentive_test", 0)
        if 0 < fitted < len(train.indices) or 0 < tested < len(test.indices):
            said.append(f"The attentive probe was fitted on {fitted:,} images and tested on {tested:,}.")
        few = self.few(draws) if draws else None
        if few is not None and few.reason:
            said.append(f"There are no probes with few labels: {few.reason}.")
        elif few is not None and "shots" in counts:
            said.append(
                f"Few labels are {counts['shots']} a class, drawn {draws} times from {len(self.splits[0].indices):,}; "
                f"two draws share {100 * few.overlap:.0f} % of their images on average."
            )
            if not counts.get("few_attentive_test"):
                said.append("No attentive probe has few labels: the patch tokens of a draw would not fit in memory.")
        return said

    def few(self, draws: int) -> FewLabels:
        """So many draws of `SHOTS` images a class from all labelled images of the training part.

        A class needs twice as many, since draws that share most of their images say little of what other draws give.
        """
        assert self.splits is not None
        part = self.splits[0]
        labels = part.labels
        classes, counts = np.unique(labels, return_counts=True)
        fewest = int(counts.min())
        if fewest < 2 * SHOTS:
            label, names = int(classes[counts.argmin()]), part.images.classes or []
            name = names[label] if label < len(names) else str(label)
            reason = f"class {name} has {fewest} images to train on, and draws of {SHOTS} a class need {2 * SHOTS}"
            return FewLabels([], 0.0, reason)
        chosen = [shots(labels, SHOTS, SUBSET + k) for k in range(draws)]
        pairs = [(a, b) for n, a in enumerate(chosen) for b in chosen[:n]]
        shared = [len(np.intersect1d(a, b)) / len(a) for a, b in pairs]
        parts = [Split(part.images, np.asarray(part.indices)[draw]) for draw in chosen]
        return FewLabels(parts, float(np.mean(shared)) if shared else 0.0, "")

    def worth(self, encoder: Backbone, standardize: Standardize, draws: int = 0, seen: Seen | None = None) -> Worth:
        """All probes of an encoder; with `draws`, also probes of `SHOTS` labels a class, drawn so many times. `seen` is what was
        seen of it already.

        Without labels there is the effective rank alone.
        """
        if self.splits is None:
            return Worth({}, self.quick(encoder, standardize, seen).get("rank", math.nan))
        seen = self.see(encoder, standardize) if seen is None else seen
        encoder = seen.encoder
        if seen.sides is None or seen.tokens is None:
            return Worth({}, math.nan)
        (x, y), (tokens, test_tokens) = seen.sides, seen.tokens
        sides = {"linear": seen.sides, "attentive": seen.tokens, "knn": seen.sides}
        probes = {kind: [seen.probe(kind, *both, self.seed)] for kind, both in sides.items()}
        counts = {"attentive_train": len(tokens.labels), "attentive_test": len(test_tokens.labels)}
        fewest = []
        for split in self.few(draws).draws if draws else []:
            # tokens of one draw at a time, and none where half precision would not make them fit
            held = self.attentive_fits(encoder, len(split.indices))
            drawn = self._labelled(encoder, standardize, split, held, (tokens if held else x).features)
            assert drawn is not None  # several processes ask for no draws
            fewest.append(int(np.unique(drawn.labels, return_counts=True)[1].min()))
            few = probe_features(drawn, y, seed=self.seed, kinds=["linear"])
            if held:
                few |= probe_features(drawn, test_tokens, seed=self.seed, kinds=["attentive"])
            for name, probe in few.items():
                probes.setdefault(f"few_{name}", []).append(probe)
        if fewest:
            images = len(probes["few_attentive"][0].correct) if "few_attentive" in probes else 0
            counts |= {"shots": min(fewest), "few_attentive_test": images}
        return Worth(probes, _rank(x.features.pooled), counts)

    def baselines(self, draws: int = 0) -> dict[str, Worth]:
        """The probes of raw pixels and HOG, which need no network; nothing without labels."""
        if self.splits is None:
            return {}
        kinds = {"raw_pixels": raw_pixels, "hog": hog}
        train, test = (pixel_features(kinds, split, self.size) for split in self.full())
        few_labels = self.few(draws).draws if draws else []
        drawn = [pixel_features(kinds, split, self.size) for split in few_labels]
        found = {}
        for name in kinds:
            x, y = (Labelled.of(made[name], split) for made, split in zip((train, test), self.full(), strict=True))
            both = probe_features(x, y, seed=self.seed, kinds=["linear", "knn"])
            probes = {kind: [probe] for kind, probe in both.items()}
            for made, split in zip(drawn, few_labels, strict=True):
                few = probe_features(Labelled.of(made[name], split), y, seed=self.seed, kinds=["linear"])
                probes.setdefault("few_linear", []).append(few["linear"])
            found[name] = Worth(probes, _rank(x.features.pooled))
        return found

    def _labelled(
        self,
        encoder: Backbone,
        standardize: Standardize,
        split: Split,
        with_patches: bool,
        known: Features | None = None,
    ) -> Labelled | None:
        """None in a process that only helps the first one."""
        found = completed_features(encoder, standardize, split, self.size, with_patches=with_patches, known=known)
        return None if found is None else Labelled.of(found, split)

    def _most(self, encoder: Backbone, count: int) -> int:
        """At most `count` images, fewer where their patch tokens would not fit."""
        return min(count, int(TOKEN_MEMORY / (4 * self._token_numbers(encoder))))

    def attentive_fits(self, encoder: Backbone, images: int) -> bool:
        """Whether the patch tokens of so many images fit in half precision: 498 classes of ViT-B/16 at 224 do."""
        return 2 * images * self._token_numbers(encoder) <= TOKEN_MEMORY

    def _token_numbers(self, encoder: Backbone) -> int:
        """Numbers in the patch tokens of an image."""
        rows, columns = encoder.grid(*self.size)
        return rows * columns * encoder.dim


def _frequent(source: Source, train: np.ndarray, test: np.ndarray) -> tuple[list[np.ndarray], int]:
    """The images of the `MOST_CLASSES` classes with the most to train on (the first among equals), and how many classes
    are left out."""
    labels = source.entries.labels
    classes, counts = np.unique(labels[train], return_counts=True)
    kept = classes[np.argsort(-counts, kind="stable")[:MOST_CLASSES]]
    return [part[np.isin(labels[part], kept)] for part in (train, test)], len(classes) - len(kept)


def _rank(pooled: Tensor) -> float:
    """The effective rank of as many features [n, d] as a quick probe reads, evenly from all: files come class by class."""
    return effective_rank(pooled[evenly(len(pooled), QUICK_TEST)])
