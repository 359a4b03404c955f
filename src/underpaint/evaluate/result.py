"""What a probe found, and how two probes of the same test images compare."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from underpaint.errors import InputError


@dataclass(frozen=True, eq=False)  # arrays have no single truth value, so two results are not compared by ==
class Probe:
    """The accuracy of one probe on the test part, with its uncertainty."""

    accuracy: float  # share of the test images, 0 to 1
    standard_error: float  # of the accuracy, binomial: sqrt(p (1 - p) / n)
    correct: Bool[np.ndarray, "n"]  # one test image each, in order
    chosen: dict[str, float]  # selected on the validation part of train, never on test

    @classmethod
    def of(cls, correct: Bool[np.ndarray, "n"], chosen: dict[str, float]) -> "Probe":
        """From the hits on the test images."""
        accuracy = float(correct.mean())
        return cls(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / len(correct))), correct, chosen)

    def numbers(self) -> dict[str, Any]:
        """What a JSON file keeps: everything but the single hits."""
        return {"accuracy": self.accuracy, "standard_error": self.standard_error, "chosen": dict(self.chosen)}


def gain(after: Probe, before: Probe) -> tuple[float, float]:
    """Difference of two accuracies on the same test images, `after` minus `before`, and its standard error.

    The images are paired, so those that both probes get right or wrong add nothing to the error: it is the standard
    deviation of the difference an image, divided by sqrt(n). Raises InputError where the test parts differ in size.
    """
    if len(after.correct) != len(before.correct):
        raise InputError(
            f"a gain needs the same test images: after has {len(after.correct)}, before {len(before.correct)}"
        )
    difference = after.correct.astype(np.float64) - before.correct
    return float(difference.mean()), float(difference.std() / np.sqrt(len(difference)))
