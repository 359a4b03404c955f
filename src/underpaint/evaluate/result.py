"""What a probe found, and how two probes of the same test images compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from underpaint.errors import InputError


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
        groups: Sequence[Any] | np.ndarray | None = None,
    ) -> "Probe":
        """From the hits on the test images, and the group (patient, slide, video) of each where there are groups."""
        accuracy = float(correct.mean())
        error = float(np.sqrt(accuracy * (1 - accuracy) / len(correct)))
        if groups is None:
            return cls(accuracy, error, correct, chosen, said)
        numbers = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1).astype(np.int64)
        error = float(np.sqrt(mean_variance(correct.astype(np.float64), numbers)[0]))
        return cls(accuracy, error, correct, chosen, said, numbers)

    def grouped(self, groups: Sequence[Any] | np.ndarray | None) -> "Probe":
        """The same, with the group of each test image."""
        return self if groups is None else Probe.of(self.correct, self.chosen, self.said, groups)

    def numbers(self) -> dict[str, Any]:
        """What a JSON file keeps: everything but the single hits."""
        return {"accuracy": self.accuracy, "standard_error": self.standard_error, "chosen": dict(self.chosen)}


def mean_variance(values: Float[np.ndarray, "n"], groups: Int[np.ndarray, "n"] | None = None) -> tuple[float, float]:
    """Variance of the mean of what was found on test images, and its degrees of freedom.

    Images of one group stand or fall together: their deviations are added up before they are squared. Of fewer than two
    images or groups nothing is known: 0 with no degree of freedom.
    """
    rest = values - values.mean()
    if groups is not None:
        rest = np.bincount(np.unique(groups, return_inverse=True)[1].reshape(-1), rest)
    count = len(rest)
    if count < 2:
        return 0.0, 0.0
    return float((rest**2).sum()) * count / (count - 1) / len(values) ** 2, float(count - 1)


def redraw(count: int, groups: Sequence[Any] | np.ndarray | None, generator: np.random.Generator) -> np.ndarray:
    """Places of a redrawn set (bootstrap) of `count` images: images one by one, or whole groups."""
    if groups is None:
        return generator.integers(0, count, count)
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(numbers.reshape(-1) == k) for k in range(len(names))]
    return np.concatenate([members[k] for k in generator.integers(0, len(names), len(names))])


def gain(after: Probe, before: Probe) -> tuple[float, float]:
    """Difference of two accuracies on the same test images, `after` minus `before`, and its standard error.

    The images are paired, so those that both probes get right or wrong add nothing to the error: it is the standard
    deviation of the difference an image, divided by sqrt(n), or that of the groups where images have some. It counts the
    test images alone: what another seed would give is not in it. Raises InputError where the test parts differ in size.
    """
    if len(after.correct) != len(before.correct):
        raise InputError(
            f"a gain needs the same test images: after has {len(after.correct)}, before {len(before.correct)}"
        )
    difference = after.correct.astype(np.float64) - before.correct
    groups = after.groups if after.groups is not None else before.groups
    return float(difference.mean()), float(np.sqrt(mean_variance(difference, groups)[0]))


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers of test images by name, and the same of redrawn sets of them (bootstrap).

    Which images a redraw holds depends on the seed alone, so what is judged on the same images is compared in pairs.
    """

    values: dict[str, float]
    redrawn: dict[str, list[float]]

    def numbers(self) -> dict[str, float]:
        """Each number and its standard error ("..._error")."""
        found: dict[str, float] = {}
        for name, value in self.values.items():
            found |= {name: value, f"{name}_error": _spread(np.asarray(self.redrawn[name]))}
        return found

    def above(self, other: "Measured") -> dict[str, float]:
        """Each number minus that of `other`, and the standard error of the difference."""
        found: dict[str, float] = {}
        for name, value in self.values.items():
            differences = np.asarray(self.redrawn[name]) - np.asarray(other.redrawn[name])
            found |= {name: value - other.values[name], f"{name}_error": _spread(differences)}
        return found


def measured(names: Sequence[str], values: Sequence[float], redraws: Sequence[Sequence[float]]) -> Measured:
    """From the numbers of all images, and those of each redraw, in the order of `names`."""
    columns = {name: [float(redraw[k]) for redraw in redraws] for k, name in enumerate(names)}
    return Measured(dict(zip(names, map(float, values), strict=True)), columns)


def _spread(values: Float[np.ndarray, "n"]) -> float:
    """Standard deviation of those that are defined: a redraw may hold no object at all."""
    known = values[~np.isnan(values)]
    return float(known.std()) if len(known) else float("nan")
