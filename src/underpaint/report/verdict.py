"""Whether a run is learning, stalled, collapsed or starved of data, by which signal, and what to change.

A difference below two standard errors is said not to be measurable. One above is told with its error, which is that of
the test images alone, and is not called measurable: of one run it is not known what another seed would give.
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from underpaint.report.reading import (
    accuracy,
    column,
    mean,
    median,
    number,
    probe_lines,
    rate_setting,
    read_json,
    read_lines,
    read_recipe,
    require_run,
)
from underpaint.report.words import short, signed

PROBES = {
    "linear": "linear probe",
    "attentive": "attentive probe",
    "knn": "kNN accuracy",
}  # the first one there heads the page

# The verdict's thresholds.
ONE_RUN = "error of the test images alone; one run"
MEASURABLE = 2.0  # standard errors: about 1 in 20 differences of nothing look larger
WAITING = 0.5  # share of time: above it, the data decide the speed, not the device
NOT_BELOW = 0.97  # of the baseline: predicting the mean of the patch comes this near without having learned anything
FALL = 0.005  # of the loss, between the last two quarters: less is noise, or too slow to wait for
FEW_SHARE = 0.05  # of the feature dimensions: an encoder that spans fewer says nearly the same of every image
FEW = 2.0  # dimensions, where the number of dimensions is not known
RANK_KEPT = 1 / 3  # of the untrained encoder's rank: chance differences between checkpoints are far smaller
SAME_RANK = 0.8  # of the untrained encoder's rank: where it was as low before, training did not make it so
NO_GRADIENT = 1e-8  # below it, no precision moves a weight
CONSTANT = 0.01  # of the loss: what differs between batches when the model no longer looks at them
FEW_LINES = 8  # log lines: with fewer, a quarter of the run is one number


class Verdict(NamedTuple):
    """What a run came to: one word, one sentence that says by which signal, and what to change."""

    word: Literal["learning", "stalled", "collapsed", "starved"]
    sentence: str
    advice: str


class Change(NamedTuple):
    """How far a probe is above the untrained encoder, as shares of 1; `error` is None where unknown."""

    name: str
    difference: float
    error: float | None

    @property
    def standard_errors(self) -> float:
        """The difference in its own standard errors; 0 where those are unknown: nothing is claimed."""
        return self.difference / self.error if self.error else 0.0


def verdict(run: Path) -> Verdict:
    """Whether a run is learning, stalled, collapsed or starved of data, by which signal, and what to change."""
    require_run(run)
    return judge(read_lines(run / "metrics.jsonl"), read_json(run / "probes.json"), read_recipe(run)[1])


def judge(metrics: list[dict], probes: dict, recipe: dict) -> Verdict:
    """The rules, the gravest first; each names the signal it went by."""
    trained = [line for line in metrics if number(line, "step") > 0 or math.isfinite(number(line, "loss"))]
    loss, gradient = column(trained, "loss"), column(trained, "gradient_norm")
    rate, waiting = column(trained, "lr"), column(trained, "data_wait")
    quarter = max(1, len(loss) // 4)
    if len(loss) == 0:
        return Verdict("stalled", "No training step was logged, so there is nothing to judge.", START_AGAIN)
    if not math.isfinite(loss[-1]) or np.isfinite(loss[-quarter:]).mean() <= 0.5:
        lost, late = (np.count_nonzero(~np.isfinite(part)) for part in (loss, loss[-quarter:]))
        lost = f"{lost} of {len(loss)} log lines, {late} of them in the last quarter"
        return Verdict("stalled", f"The loss was not finite in {lost}.", not_finite_advice(recipe))

    baseline = trivial_loss(trained)
    last, falling = mean(loss[-quarter:]), is_falling(loss)
    below = math.isfinite(baseline) and last < baseline - (1 - NOT_BELOW) * abs(baseline)
    story = loss_sentence(last, baseline, falling, len(loss), has_baseline(trained))
    gains = changes(metrics, probes)
    rose = any(gain.standard_errors >= MEASURABLE for gain in gains)
    rose = rose and not any(gain.standard_errors <= -MEASURABLE for gain in gains)

    rank, untrained_rank, dimensions = ranks(metrics, probes)
    few = max(FEW, FEW_SHARE * dimensions) if math.isfinite(dimensions) else FEW
    fell_to_few = rank < few and not rank >= SAME_RANK * untrained_rank
    lost_most = rank < RANK_KEPT * untrained_rank and (below or falling)
    if (fell_to_few or lost_most) and not rose:  # a probe that rose where none fell has seen that features differ
        since = f", from {untrained_rank:.1f} before training" if math.isfinite(untrained_rank) else ""
        told = "the encoder hardly tells images apart" if fell_to_few else "far less of an image shows in them"
        sentence = f"The features span {rank:.1f} dimensions{since}: {told}."
        return Verdict("collapsed", sentence, collapse_advice(recipe))
    gradient_end, loss_end = gradient[-quarter:], loss[-quarter:]
    dead = not is_zero(rate) and np.isfinite(gradient_end).all() and (gradient_end <= NO_GRADIENT).all()
    if dead and np.ptp(loss_end[np.isfinite(loss_end)]) <= CONSTANT * abs(last):
        sentence = f"The loss stands still at {short(last)} and the gradient is zero: nothing can change any more."
        return Verdict("collapsed", sentence, collapse_advice(recipe))

    worth = change_sentence(gains[0]) if gains else ""
    wait = median(waiting)
    if wait > WAITING:
        return Verdict(
            "starved", f"Training waited for data {wait:.0%} of the time (median). {story} {worth}".strip(), FEED
        )
    if not below and not falling:
        return Verdict("stalled", f"{story} {worth}".strip(), stall_advice(rate, recipe))
    worth = worth or "No probe ran, so what the features are worth is not known."
    return Verdict("learning", f"{story} {worth}", learning_advice(falling, gains))


START_AGAIN = "Run the same command again; it goes on from the last checkpoint, or from the start where there is none."
FEED = (
    "Give the loader more processes (`--workers`), and keep the images cached: resized once, "
    "on a local disk or in memory."
)


def stall_advice(rate: np.ndarray, recipe: dict) -> str:
    """What to do about a loss that does not move; a learning rate of zero is named."""
    if is_zero(rate):
        return f"The learning rate was zero throughout; set it above zero{rate_setting(recipe)}."
    rates = f"Try a learning rate three times higher or lower{rate_setting(recipe)}"
    return f"{rates}, or more `--epochs` or `--steps`."


def not_finite_advice(recipe: dict) -> str:
    """What to do about a loss that left the numbers."""
    return (
        f"Lower the learning rate{rate_setting(recipe)}, and use `--precision bf16` or `32` if it was `16`; "
        "the last good checkpoint is kept."
    )


def collapse_advice(recipe: dict) -> str:
    """What to do about features that are all the same."""
    return (
        f"Lower the learning rate{rate_setting(recipe)} or warm it up longer, and start anew: "
        "a collapsed encoder does not recover."
    )


def learning_advice(falling: bool, gains: list[Change]) -> str:
    """What to do with a run that goes well, or well by its loss only."""
    longer = "The loss was still falling: more `--epochs` or `--steps` may give more." if falling else ""
    if not gains:
        advice = "Give labelled images (`--labels`) to learn whether the features are any good."
    elif gains[0].standard_errors >= MEASURABLE:
        advice = "" if longer else "Nothing needs to change."
    else:
        advice = "Compare with public weights (`--init timm:NAME`), which are often better where images are few."
    return " ".join(part for part in (longer, advice) if part)


def loss_sentence(last: float, baseline: float, falling: bool, lines: int, logged: bool) -> str:
    """Where the loss ended, against what, and where it was going."""
    against = "its trivial baseline" if logged else "where it began"
    if not math.isfinite(baseline):
        where = f"The loss ended at {short(last)}"
    elif baseline > 0:
        share = abs(1 - last / baseline)
        side = "below" if last < baseline else "above"
        at = f"{share:.1%} {side}" if share >= 0.0005 else "no different from"
        where = f"The loss ended at {short(last)}, {at} {against} ({short(baseline)})"
    else:
        where = f"The loss ended at {short(last)}, against {short(baseline)} for {against}"
    few = f" Only {lines} log lines: too early to be sure." if lines < FEW_LINES else ""
    return f"{where}, and was {'still' if falling else 'not'} falling.{few}"


def change_sentence(gain: Change) -> str:
    """What pretraining did to a probe: a number of one run, said to have moved only above two standard errors."""
    points = f"{abs(100 * gain.difference):.1f} points"
    if gain.error is None:
        moved = f"{signed(100 * gain.difference)} points from the untrained encoder, of unknown standard error"
        return f"The {gain.name} moved by {moved}, so nothing can be said."
    error = f"± {100 * gain.error:.1f}"
    if gain.standard_errors >= MEASURABLE:
        return f"The {gain.name} rose by {points} {error} over the untrained encoder ({ONE_RUN})."
    if gain.standard_errors <= -MEASURABLE:
        return f"The {gain.name} fell by {points} {error} below the untrained encoder ({ONE_RUN})."
    moved = f"{signed(100 * gain.difference)} points {error} against the untrained encoder"
    return f"Pretraining did not measurably help the {gain.name} ({moved})."


def is_zero(values: np.ndarray) -> bool:
    """Whether there are finite values and all of them are zero."""
    finite = values[np.isfinite(values)]
    return len(finite) > 0 and not finite.any()


def is_falling(loss: np.ndarray) -> bool:
    """Whether the last quarter of a run lies below the quarter before it, by more than the noise of both."""
    quarter = max(1, len(loss) // 4)
    late, before = loss[-quarter:], loss[-2 * quarter : -quarter]
    late, before = late[np.isfinite(late)], before[np.isfinite(before)]
    if len(late) == 0 or len(before) == 0:
        return False
    fall = float(before.mean() - late.mean())
    noise = math.sqrt(sum(float(part.var(ddof=1)) / len(part) for part in (late, before) if len(part) > 1))
    return fall > FALL * abs(float(before.mean())) and fall > MEASURABLE * noise


def trivial_loss(trained: list[dict]) -> float:
    """The baseline's mean over the last quarter; the loss of the first lines where no baseline was logged."""
    if has_baseline(trained):
        logged = column(trained, "terms", "baseline")
        return mean(logged[-max(1, len(logged) // 4) :]) if np.isfinite(logged[-1]) else mean(logged)
    return mean(column(trained, "loss")[: max(1, len(trained) // 20)])


def has_baseline(trained: list[dict]) -> bool:
    """Whether any line tells the loss of a trivial prediction."""
    return bool(np.isfinite(column(trained, "terms", "baseline")).any())


def changes(metrics: list[dict], probes: dict) -> list[Change]:
    """Each probe against the untrained encoder: the final probes, else the first and last during the run."""
    found = []
    during = probe_lines(metrics)
    for key, name in PROBES.items():
        difference, error = (
            number(probes, "gain", key, "difference"),
            number(probes, "gain", key, "standard_error"),
        )
        if not math.isfinite(difference):
            after, after_error = accuracy(probes, "encoder", key)
            before, before_error = accuracy(probes, "untrained", key)
            if not math.isfinite(after - before) and during and number(during[0], "step") == 0 and len(during) > 1:
                after, after_error = (
                    number(during[-1], "probe", key),
                    number(during[-1], "probe", f"{key}_error"),
                )
                before, before_error = (
                    number(during[0], "probe", key),
                    number(during[0], "probe", f"{key}_error"),
                )
            # as if the two had other test images each: never smaller than the error of the paired difference
            difference, error = after - before, math.hypot(after_error, before_error)
        if math.isfinite(difference):
            found.append(Change(name, difference, error if math.isfinite(error) and error > 0 else None))
    return found


def ranks(metrics: list[dict], probes: dict) -> tuple[float, float, float]:
    """Effective rank of the encoder, of the untrained one, and the dimensions; nan where not known."""
    during = [line for line in probe_lines(metrics) if math.isfinite(number(line, "probe", "rank"))]
    first = number(during[0], "probe", "rank") if during and number(during[0], "step") == 0 else math.nan
    last = number(during[-1], "probe", "rank") if during and number(during[-1], "step") > 0 else math.nan
    encoder, untrained = number(probes, "rank", "encoder"), number(probes, "rank", "untrained")
    return (
        encoder if math.isfinite(encoder) else last,
        untrained if math.isfinite(untrained) else first,
        number(probes, "rank", "dim"),
    )
