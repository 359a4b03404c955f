"""How arms of a comparison stand to each other: differences with all of their uncertainty, and what may be claimed.

Three things make an accuracy uncertain: which images it was tested on, which images were labelled where few were, and
the seed of the training. Two arms share the first two, so those are taken from paired differences. The third is the
spread of the seeds of each of the two arms alone, with the degrees of freedom of Welch and Satterthwaite: a method may
be far less stable than another, and an untrained encoder is not spread as a trained one is.

A difference is claimed where its square is beyond the sum of the three variances, each times the square of the
two-sided point of Student's t for as many degrees of freedom as that estimate has (Banerjee 1960). One t for the sum,
with the degrees of freedom of all of it, makes two to three times as many false claims where seeds are two and one
method is unstable: its seeds lie near each other by chance, and the many test images then lend their freedom.
The level is divided by the number of claims that answer one question (Bonferroni): M (M - 1) / 2 among M methods, since
the leader is named after looking; M for the methods against one start or one floor. Tukey's range gains 0 to 5 points
of power over it and makes up to 1.5 times the false claims where variances are unlike.

From one seed nothing is claimed of what has seeds: the numbers are told, with the error of the test images alone.
Images of one group (patient, slide, video) are one observation: their deviations are added up before they are squared,
and there are as many degrees of freedom as groups less one (Liang and Zeger 1986).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit

from underpaint.evaluation.results import LEVEL, mean_variance

Kind = Literal["method", "start", "floor"]


@dataclass(frozen=True, eq=False)
class Arm:
    """One row of a comparison.

    Attributes:
        kind: a method; what it started from; or what needs no network.
        hits: by probe, 1 where a test image was put right [seed, draw of the labelled images, test image].
        rank: effective rank of each seed's features.
        seeded: whether another seed would give other features; not so for what is not trained or drawn here.
        groups: by probe, the number of the group (patient, slide, video) of each test image; absent where each image
            is by itself.
    """

    name: str
    kind: Kind
    hits: Mapping[str, Float[np.ndarray, "s d n"]]
    rank: Sequence[float]
    seeded: bool = True
    groups: Mapping[str, Int[np.ndarray, "n"]] = field(default_factory=dict)

    def accuracy(self, probe: str) -> float:
        """Mean over seeds, draws and test images, 0 to 1."""
        return float(self.hits[probe].mean())


class Part(NamedTuple):
    """One part of the variance of a difference."""

    variance: float
    freedom: float  # degrees of freedom of that estimate; 0 where it cannot be made


class Difference(NamedTuple):
    """One accuracy minus another."""

    value: float
    parts: tuple[Part, ...]  # by test images, by draws of the labelled images, by seeds

    @property
    def error(self) -> float:
        """One standard error, of what is known."""
        return math.sqrt(sum(part.variance for part in self.parts))

    @property
    def freedom(self) -> float:
        """The fewest degrees of freedom of any part; 0 where one is unknown, so that nothing can be claimed."""
        return min(part.freedom for part in self.parts)

    def beyond(self, claims: int = 1) -> bool:
        """Whether the difference may be claimed, as one of so many claims."""
        if not (self.error > 0 and self.freedom > 0):
            return False
        point = 1 - LEVEL / (2 * claims)
        return self.value**2 > sum(float(stdtrit(f, point)) ** 2 * v for v, f in self.parts if v > 0)


def standing(arm: Arm, probe: str) -> tuple[float, float]:
    """The accuracy of an arm, and its standard error, of what is known."""
    hits = arm.hits[probe]
    images = mean_variance(hits.mean(axis=(0, 1)), arm.groups.get(probe))
    parts = [images[0], _draws(hits.mean(axis=(0, 2))).variance, _seeds(arm, probe).variance]
    return float(hits.mean()), math.sqrt(sum(parts))


def difference(a: Arm, b: Arm, probe: str) -> Difference:
    """Accuracy of `a` minus that of `b`, on the same test images and the same labelled images."""
    first, second = a.hits[probe], b.hits[probe]
    paired = first.mean(axis=(0, 1)) - second.mean(axis=(0, 1))
    drawn = first.mean(axis=(0, 2)) - second.mean(axis=(0, 2))
    images = Part(*mean_variance(paired, a.groups.get(probe, b.groups.get(probe))))
    return Difference(float(paired.mean()), (images, _draws(drawn), _welch(_seeds(a, probe), _seeds(b, probe))))


def _draws(values: Float[np.ndarray, "d"]) -> Part:
    """Variance of a mean over draws of the labelled images."""
    if len(values) < 2:
        return Part(0.0, math.inf)
    return Part(float(values.var(ddof=1)) / len(values), float(len(values) - 1))


def _seeds(arm: Arm, probe: str) -> Part:
    """Variance of a mean over seeds; nothing where a seed plays no part."""
    if not arm.seeded:
        return Part(0.0, math.inf)
    seeds = arm.hits[probe].mean(axis=(1, 2))
    if len(seeds) < 2:
        return Part(0.0, 0.0)
    return Part(float(seeds.var(ddof=1)) / len(seeds), float(len(seeds) - 1))


def _welch(a: Part, b: Part) -> Part:
    """The sum of two variances, with the degrees of freedom of Welch and Satterthwaite."""
    total = a.variance + b.variance
    if not (a.freedom and b.freedom and total):
        return Part(total, min(a.freedom, b.freedom))
    return Part(total, total**2 / (a.variance**2 / a.freedom + b.variance**2 / b.freedom))
