"""What was found on test images, as numbers with their uncertainty, and how two encoders compare on the same images.

A number that is a mean over images has the error of a mean, robust to groups (patient, slide, video) where images have
some; any other is computed again on redrawn sets of images (bootstrap), whole groups where there are some.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.special import stdtrit  # not scipy.stats, which takes most of a second to import

from underpaint.console import progress
from underpaint.errors import InputError

# of the two-sided test of a difference; Satterthwaite's freedom is an approximation that makes up to 1.3 times as many
# false claims with two or three seeds of unlike methods: simulated, they stay within 5 % (decision 11)
LEVEL = 0.04
Groups = Sequence[str] | np.ndarray | None  # of the images, in order; None where each is by itself
Values = Shaped[np.ndarray, "n"]  # of an image each: hits, or errors


@dataclass(frozen=True, eq=False)  # arrays have no single truth value, so two results are not compared by ==
class Probe:
    """The accuracy of one probe on the test part, with its uncertainty."""

    accuracy: float  # share of the test images, 0 to 1
    standard_error: float  # of the accuracy, binomial: sqrt(p (1 - p) / n); robust to groups where there are some
    correct: Bool[np.ndarray, "n"]  # one test image each, in order
    chosen: dict[str, float]  # selected on the validation part of train, never on test
    said: Int[np.ndarray, "n"] | None = None  # the label that each test image was given
    groups: Int[np.ndarray, "n"] | None = None  # number of each test image's group; None where each is by itself

    @classmethod
    def of(
        cls,
        correct: Bool[np.ndarray, "n"],
        chosen: dict[str, float],
        said: Int[np.ndarray, "n"] | None = None,
        groups: Groups = None,
    ) -> "Probe":
        """From the hits on the test images, and the group (patient, slide, video) of each where there are groups."""
        numbers = None if groups is None else _numbered(groups)
        return cls(float(correct.mean()), standard_error(correct, numbers), correct, chosen, said, numbers)

    def grouped(self, groups: Groups) -> "Probe":
        """The same, with the group of each test image."""
        return self if groups is None else Probe.of(self.correct, self.chosen, self.said, groups)

    def numbers(self) -> dict[str, float | dict[str, float]]:
        """What a JSON file keeps: everything but the single hits."""
        return {"accuracy": self.accuracy, "standard_error": self.standard_error, "chosen": dict(self.chosen)}


def mean_variance(values: Values, groups: Int[np.ndarray, "n"] | None = None) -> tuple[float, float]:
    """Variance of the mean of what was found on test images, and its degrees of freedom.

    Images of one group stand or fall together: their deviations are added up before they are squared. Of fewer than two
    images or groups nothing is known: 0 with no degree of freedom.
    """
    rest = values - values.mean()
    if groups is not None:
        rest = np.bincount(_numbered(groups), rest)
    count = len(rest)
    if count < 2:
        return 0.0, 0.0
    return float((rest**2).sum()) * count / (count - 1) / len(values) ** 2, float(count - 1)


def standard_error(values: Values, groups: Int[np.ndarray, "n"] | None = None) -> float:
    """Of a mean over test images; binomial, sqrt(p (1 - p) / n), for hits of images that are each by itself."""
    if groups is None and values.dtype == bool:
        share = float(values.mean())
        return float(np.sqrt(share * (1 - share) / len(values)))
    return float(np.sqrt(mean_variance(values.astype(np.float64), groups)[0]))


def paired_difference(after: Probe, before: Probe) -> tuple[float, float]:
    """Difference of two accuracies on the same test images, `after` minus `before`, and its standard error.

    The images are paired, so those that both probes get right or wrong add nothing to the error: it is the standard
    deviation of the difference an image, divided by sqrt(n), or that of the groups where images have some. It counts the
    test images alone: what another seed would give is not in it. Raises InputError where the test parts differ in size.
    """
    if len(after.correct) != len(before.correct):
        raise InputError(
            f"a gain needs the same test images: after has {len(after.correct)}, before {len(before.correct)}"
        )
    groups = after.groups if after.groups is not None else before.groups
    return _difference(after.correct, before.correct, groups)


def _difference(after: Values, before: Values, groups: Int[np.ndarray, "n"] | None) -> tuple[float, float]:
    difference = after.astype(np.float64) - before
    return float(difference.mean()), float(np.sqrt(mean_variance(difference, groups)[0]))


def _numbered(groups: Sequence[str] | np.ndarray) -> Int[np.ndarray, "n"]:
    return np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers of test images by name, with what their uncertainty, and that of a paired difference, follow from.

    Which images a redrawn set holds depends on the seed alone, so what is judged on the same images is compared in pairs.

    Attributes:
        images: of a number that is a mean over images, the value of each image.
        redrawn: of any other, the same number of redrawn sets of images.
        groups: number of each image's group; None where each is by itself.
        units: images, or groups of them, that are independent of each other; of several sets, of the smallest.
    """

    values: dict[str, float]
    images: Mapping[str, Values] = field(default_factory=dict)
    redrawn: Mapping[str, Float[np.ndarray, "r"]] = field(default_factory=dict)
    groups: Int[np.ndarray, "n"] | None = None
    units: int = 0

    def numbers(self) -> dict[str, float]:
        """Each number and its standard error ("..._error")."""
        found: dict[str, float] = {}
        for name, value in self.values.items():
            alone = name in self.images
            error = standard_error(self.images[name], self.groups) if alone else _spread(self.redrawn[name])
            found |= {name: value, f"{name}_error": error}
        return found

    def above(self, other: "Measured") -> dict[str, float]:
        """Each number minus that of `other`, and the standard error of the difference."""
        found: dict[str, float] = {}
        for name, value in self.values.items():
            if name in self.images:
                difference, error = _difference(self.images[name], other.images[name], self.groups)
            else:
                difference = value - other.values[name]
                error = _spread(self.redrawn[name] - other.redrawn[name])
            found |= {name: difference, f"{name}_error": error}
        return found

    def beyond(self, other: "Measured", name: str, claims: int = 1) -> bool:
        """Whether a number may be said to differ from that of `other`, as one of so many claims on the same question.

        It is, where the difference is beyond Student's t of its error, with as many degrees of freedom as there are
        independent test images less one, or redrawn sets where those are fewer.
        """
        found = self.above(other)
        difference, error = found[name], found[f"{name}_error"]
        freedom = (self.units if name in self.images else min(self.units, len(self.redrawn[name]))) - 1
        if not (error > 0 and freedom > 0):
            return False
        return abs(difference) > float(stdtrit(freedom, 1 - LEVEL / (2 * claims))) * error


def means(images: Mapping[str, Values], groups: Groups = None) -> Measured:
    """Numbers that are means over images, from the value of each image."""
    values = {name: float(found.mean()) for name, found in images.items()}
    count = len(next(iter(images.values())))
    return Measured(values, dict(images), {}, None if groups is None else _numbered(groups), _units(count, groups))


def bootstrap(
    aggregate: Callable[[Int[np.ndarray, "k"]], Mapping[str, float]],
    sets: Sequence[tuple[int, Groups]],
    redraws: int,
    seed: int,
) -> Measured:
    """Numbers of all images, and of sets redrawn with replacement.

    Args:
        aggregate: the numbers of these images, by their positions, of which some come several times.
        sets: size and groups of each set that is redrawn by itself; positions go on from one to the next.
    """
    generator = np.random.default_rng(seed)
    starts = np.cumsum([0, *(count for count, _ in sets)])

    def redrawn() -> Int[np.ndarray, "k"]:
        parts = (redraw(count, groups, generator) for count, groups in sets)
        return np.concatenate([start + part for start, part in zip(starts, parts, strict=False)])

    values = dict(aggregate(np.arange(starts[-1])))
    found = [aggregate(redrawn()) for _ in progress(range(redraws), "standard errors")]
    redrawn_values = {name: np.array([one[name] for one in found], float) for name in values}
    return Measured(values, {}, redrawn_values, units=min(_units(count, groups) for count, groups in sets))


def _units(count: int, groups: Groups) -> int:
    """How many images, or groups of them, are independent of each other."""
    return count if groups is None else len(np.unique(np.asarray(groups)))


def together(*parts: Measured) -> Measured:
    """Numbers of the same images, of both kinds."""
    joined = Measured({}, {}, {}, parts[0].groups, parts[0].units)
    for part in parts:
        joined = Measured(
            joined.values | part.values,
            {**joined.images, **part.images},
            {**joined.redrawn, **part.redrawn},
            joined.groups,
            min(joined.units, part.units),
        )
    return joined


def redraw(count: int, groups: Groups, generator: np.random.Generator) -> Int[np.ndarray, "k"]:
    """Positions of a redrawn set of `count` images: images one by one, or whole groups."""
    if groups is None:
        return generator.integers(0, count, count)
    numbers = _numbered(groups)
    members = [np.flatnonzero(numbers == k) for k in range(numbers.max() + 1)]
    return np.concatenate([members[k] for k in generator.integers(0, len(members), len(members))])


def _spread(values: Float[np.ndarray, "n"]) -> float:
    """Standard deviation of those that are defined: a redrawn set may hold no object at all."""
    known = values[~np.isnan(values)]
    return float(known.std()) if len(known) else float("nan")
