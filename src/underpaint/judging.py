"""What a run may spend on judging itself: a share of its training, half of it on the way and half at the end.

Short runs may spend 10 seconds on each; and a probe of few hundred images, below which it says nothing, is always made.
"""

from underpaint.config import Recipe
from underpaint.evaluation.probes import FULL_TEST, FULL_TRAIN, QUICK_TEST, QUICK_TRAIN

LEAST_SECONDS = 10.0  # of a short run, on the way and at the end
FEWEST, FEWEST_AT_END = (500, 200), (1_000, 500)  # images of a quick probe, and at the end: to fit it, to test it
PROBES = 4  # at the start and at each quarter; the last one is part of the judgement
# of the time that training takes for an image: features of the whole image, where MAE's encoder sees a quarter of it
FORWARD = 1.4
# of a quick probe's time for an image: the encoder, what it started from, and pixels and HOG together
JUDGED = 3


def seconds_allowed(recipe: Recipe) -> float:
    """For probes on the way together, and again for the judgement at the end."""
    training = recipe.measured["seconds_per_step"] * recipe.measured["steps"]
    return max(LEAST_SECONDS, recipe.run.probe_share / 2 * training)


def quick_sizes(recipe: Recipe) -> tuple[int, int]:
    """Images of a quick probe, to fit it and to test it."""
    each = FORWARD * recipe.measured["seconds_per_step"] / recipe.optimiser.batch_size
    share = seconds_allowed(recipe) / (PROBES * each * (QUICK_TRAIN + QUICK_TEST))
    return _sizes(share, FEWEST, (QUICK_TRAIN, QUICK_TEST))


def full_sizes(recipe: Recipe, quick: tuple[int, int], images: int, seconds: float) -> tuple[int, int]:
    """Images of the judgement at the end, no fewer than of a `quick` probe, where one of so many images took so many seconds."""
    share = seconds_allowed(recipe) / (JUDGED * seconds / images * (FULL_TRAIN + FULL_TEST))
    fewest = max(quick[0], FEWEST_AT_END[0]), max(quick[1], FEWEST_AT_END[1])
    return _sizes(share, fewest, (FULL_TRAIN, FULL_TEST))


def probe_every(recipe: Recipe, seconds: float) -> int:
    """Steps between probes that take so many seconds each: a quarter of the run, or more."""
    more = min(PROBES - 1, int(seconds_allowed(recipe) / seconds) - 1)
    return -(-recipe.measured["steps"] // (more + 1 if more > 0 else 1))


def _sizes(share: float, fewest: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
    fit, test = (max(least, min(all_, round(share * all_))) for least, all_ in zip(fewest, most, strict=True))
    return fit, test
