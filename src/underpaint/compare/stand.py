"""How arms of a comparison stand to each other: differences with all of their uncertainty, and what may be claimed.

Three things make an accuracy uncertain: which images it was tested on, which images were labelled where few were, and
the seed of the training. Two arms share the first two, so those are taken from paired differences. The third is the
spread of the seeds around their arm's mean, pooled over the arms, since two or three seeds of one arm tell little.
A difference is claimed where it is beyond the two-sided 5 % point of Student's t for as many degrees of freedom as
these estimates have (Welch and Satterthwaite), divided by the number of claims that are made at once (Bonferroni).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

LEVEL = 0.05
Kind = Literal["method", "start", "floor"]


@dataclass(frozen=True, eq=False)
class Arm:
    """One row of a comparison.

    Attributes:
        kind: a method; what it started from; or what needs no network.
        hits: by probe, 1 where a test image was put right [seed, draw of the labelled images, test image].
        rank: effective rank of each seed's features.
        seeded: whether another seed would give other features; not so for what is not trained or drawn here.
    """

    name: str
    kind: Kind
    hits: Mapping[str, Float[np.ndarray, "s d n"]]
    rank: Sequence[float]
    seeded: bool = True

    def accuracy(self, probe: str) -> float:
        """Mean over seeds, draws and test images, 0 to 1."""
        return float(self.hits[probe].mean())


class Spread(NamedTuple):
    """How far the seeds of an arm lie apart: variance of one seed, and the degrees of freedom of that estimate."""

    variance: float
    freedom: int


class Difference(NamedTuple):
    """One accuracy minus another."""

    value: float
    error: float  # one standard error
    freedom: float  # degrees of freedom of the error; inf where only the test images make it

    def beyond(self, claims: int = 1) -> bool:
        """Whether the difference may be claimed, as one of so many claims."""
        if not self.error > 0:
            return False
        return abs(self.value) > self.error * float(student.ppf(1 - LEVEL / (2 * claims), self.freedom))


def spread(arms: Sequence[Arm], probe: str) -> Spread:
    """The variance between seeds, pooled over all arms that have several."""
    squares, freedom = 0.0, 0
    for arm in arms:
        if probe in arm.hits and len(arm.hits[probe]) > 1:
            seeds = arm.hits[probe].mean(axis=(1, 2))
            squares += float(((seeds - seeds.mean()) ** 2).sum())
            freedom += len(seeds) - 1
    return Spread(squares / freedom if freedom else 0.0, freedom)


def standing(arm: Arm, probe: str, seeds: Spread) -> tuple[float, float]:
    """The accuracy of an arm, and its standard error."""
    hits = arm.hits[probe]
    parts = [_images(hits.mean(axis=(0, 1))), _draws(hits.mean(axis=(0, 2))), _seeds(arm, hits, seeds)]
    return float(hits.mean()), math.sqrt(sum(variance for variance, _ in parts))


def difference(a: Arm, b: Arm, probe: str, seeds: Spread) -> Difference:
    """Accuracy of `a` minus that of `b`, on the same test images and the same labelled images."""
    first, second = a.hits[probe], b.hits[probe]
    paired = first.mean(axis=(0, 1)) - second.mean(axis=(0, 1))
    drawn = first.mean(axis=(0, 2)) - second.mean(axis=(0, 2))
    parts = [_images(paired), _draws(drawn), _seeds(a, first, seeds), _seeds(b, second, seeds)]
    # the two parts of the seeds rest on one pooled estimate
    parts[2:] = [(parts[2][0] + parts[3][0], parts[2][1])]
    variance = sum(part for part, _ in parts)
    weights = sum(part**2 / freedom for part, freedom in parts if part > 0 and freedom > 0)
    return Difference(float(paired.mean()), math.sqrt(variance), variance**2 / weights if weights > 0 else math.inf)


def _images(values: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Variance of a mean over test images; of thousands of images, so without end of freedom."""
    return float(values.var()) / len(values), math.inf


def _draws(values: Float[np.ndarray, "d"]) -> tuple[float, float]:
    """Variance of a mean over draws of the labelled images."""
    if len(values) < 2:
        return 0.0, math.inf
    return float(values.var(ddof=1)) / len(values), float(len(values) - 1)


def _seeds(arm: Arm, hits: Float[np.ndarray, "s d n"], seeds: Spread) -> tuple[float, float]:
    """Variance of a mean over seeds; nothing where a seed plays no part."""
    if not arm.seeded or not seeds.freedom:
        return 0.0, math.inf
    return seeds.variance / len(hits), float(seeds.freedom)
