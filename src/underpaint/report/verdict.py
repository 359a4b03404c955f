"""Whether a run is learning, stalled, collapsed or starved of data, by which signal, and what to change; and what follows
for somebody who has to decide: use it, train longer, or do not use it.

A difference below two standard errors is said not to be measurable. One above is told with its error, which is that of
the test images alone, and is not called measurable: of one run it is not known what another seed would give.
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from underpaint.report.reading import (
    Lines,
    at,
    column,
    finite,
    mapping,
    mean,
    number,
    read_lines,
    read_yaml,
    require_run,
    text,
    text_of,
)
from underpaint.report.results import PROBES, Result, Value, of_run
from underpaint.report.standing import Standing, probes_of, standing
from underpaint.report.words import points_text, short

# The verdict's thresholds.
ONE_RUN = "one run; error of the test images alone"
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
TRIVIAL = "its trivial baseline"
FEW_LINES = 8  # log lines: with fewer, a quarter of the run is one number
EARLY = 0.25  # share of a run, before which a loss that does not fall yet is waited for


class Verdict(NamedTuple):
    """What a run came to: one word, one sentence that says by which signal, and what to change."""

    word: Literal["learning", "stalled", "collapsed", "starved"]
    sentence: str
    advice: str


def verdict(run: Path) -> Verdict:
    """Whether a run is learning, stalled, collapsed or starved of data, by which signal, and what to change."""
    require_run(run)
    lines, recipe = read_lines(run / "metrics.jsonl"), read_yaml(text_of(run / "recipe.yaml"))
    return judge(
        lines, of_run(probes_of(run, standing(run, lines, recipe)), lines, text(mapping(recipe), "init")), recipe
    )


class Decision(NamedTuple):
    """What to do with a run, and why, in a sentence; the verdict beside it holds the signals. `advice` is what to do next,
    where there is something."""

    word: Literal["use", "longer", "leave", "keep", "label", "wait", "stop"]
    sentence: str
    advice: str = ""

    @property
    def headline(self) -> str:
        return HEADLINES[self.word]


HEADLINES = {
    "use": "Use it",
    "longer": "Train longer",
    "leave": "Do not use it",
    "keep": "Keep the weights you started from",
    "label": "Label some images first",  # nobody can say yet
    "wait": "Let it go on",
    "stop": "Stop it",
}
NOTHING = {  # of what came to nothing, by the word of its verdict
    "collapsed": "Its features hardly tell images apart any more.",
    "stalled": "It has learned nothing of the images: its loss is no lower than what constant answers reach.",
}
LOWER = "Its loss falls, but is not yet below what constant answers reach, so nothing of the images is learned yet."
SOON = "It has learned nothing of the images yet; it is too early to say more."
STARVED = "The device waited for data most of the time, so few images were seen for the time that it took."


def decide(found: Verdict, lines: Lines, result: Result, stands: Standing) -> Decision:
    """What follows from a verdict, and from the probes, for who has to decide: of weights that it went on from, that they
    are better than what became of them, until the probes say otherwise."""
    decision = _decide(found, lines, result, stands)
    if not result.start or decision.word not in ("leave", "label"):
        return decision
    kept = f"What it started from is {result.start}, as it was."
    if decision.word == "label":
        return decision._replace(advice=f"{decision.advice} Until then, keep the start: {result.start}.".strip())
    return decision._replace(word="keep", sentence=f"{decision.sentence} {kept}")


def _decide(found: Verdict, lines: Lines, result: Result, stands: Standing) -> Decision:
    loss = column([line for line in lines if number(line, "step") > 0], "loss")
    diverged = len(loss) > 0 and not math.isfinite(loss[-1])
    falling = is_falling(loss)
    hopeful = found.word == "stalled" and not diverged and (falling or not len(loss))
    early = found.word == "stalled" and not diverged and not stands.share >= EARLY
    nothing = "Its loss is not finite any more." if diverged else NOTHING.get(found.word, "")
    if stands.word == "going":
        if nothing and not hopeful and not early:
            return Decision("stop", nothing, found.advice)
        if found.word == "starved":
            return Decision("wait", STARVED, found.advice)
        yet = LOWER if hopeful and len(loss) else SOON
        return Decision("wait", yet if nothing else "It learns; what it is worth is told at its end.")
    if stands.word == "stopped" and (not nothing or hopeful or early):
        return Decision("longer", "It stopped before its end.", START_AGAIN)
    if hopeful and len(loss):
        return Decision("longer", LOWER, found.advice)
    if nothing:
        return Decision("leave", nothing, found.advice)
    if found.word == "starved":
        return Decision("longer", STARVED, found.advice)
    return worth_decision(result, falling)._replace(advice=found.advice)


def worth_decision(result: Result, falling: bool) -> Decision:
    """Of a run that learned, by what its features are worth under the linear and the attentive probe: the nearest neighbours
    of methods that restore are poor, whatever their features serve for."""
    gains = {name: result.gain("pretrained", name) for name in ("linear", "attentive")}
    before = "the start" if result.start else "before training"
    moved = {name: gain.sigmas for name, gain in gains.items() if gain.known}
    more = " Its loss was still falling, so more may come of it." if falling else ""
    if not moved:
        return Decision(
            "label", "It learned to restore images; whether its features serve, only labelled images can tell."
        )
    if fell := [name for name, sigmas in moved.items() if sigmas <= -MEASURABLE]:
        return Decision("leave", f"Under the {PROBES[fell[0]]} it is worse than {before}.")
    if not (rising := [name for name, sigmas in moved.items() if sigmas >= MEASURABLE]):
        nothing = f"Nothing measurable was gained over {result.origin}"
        if falling and not result.start:
            return Decision("longer", f"{nothing} yet.{more}")
        return Decision("leave", f"{nothing}.{more}")
    better = f"Under the {PROBES[rising[0]]} it is better than {before}"
    own = result.row("pretrained")["linear"]
    below = [name for name in ("HOG", "raw pixels") if own.minus(result.row(name)["linear"]).sigmas <= -MEASURABLE]
    if below:
        return Decision("longer", f"{better}, but not as good as a linear model on {below[0]}, which needs no network.")
    return Decision("use", f"{better}.{more}")


def judge(lines: Lines, result: Result, recipe: object) -> Verdict:
    """The rules, the gravest first; each names the signal it went by."""
    trained = [line for line in lines if number(line, "step") > 0 or math.isfinite(number(line, "loss"))]
    loss, rate, waited = column(trained, "loss"), column(trained, "lr"), finite(column(trained, "data_wait"))
    late = loss[-max(1, len(loss) // 4) :]
    set_to = at(recipe, "optimiser", "lr")
    was = f" (`--set optimiser.lr=...`, it was {set_to})" if set_to is not None else ""
    if len(loss) == 0:
        return Verdict("stalled", "No training step was logged, so there is nothing to judge.", START_AGAIN)
    if not math.isfinite(loss[-1]) or np.isfinite(late).mean() <= 0.5:
        lost, lost_late = (np.count_nonzero(~np.isfinite(part)) for part in (loss, late))
        said = f"The loss was not finite in {lost} of {len(loss)} log lines, {lost_late} of them in the last quarter."
        return Verdict("stalled", said, f"Lower the learning rate{was}, {NOT_FINITE}")

    (baseline, against), last, falling = trivial_loss(trained), mean(late), is_falling(loss)
    below = math.isfinite(baseline) and last < baseline - (1 - NOT_BELOW) * abs(baseline)
    story = loss_sentence(last, baseline, against, falling, len(loss))
    gains = changes(result)
    if found := collapse(trained, result, below or falling):
        return Verdict("collapsed", found, f"Lower the learning rate{was} {COLLAPSED}")
    worth = next((change_sentence(name, gain, ONE_RUN, result.origin) for name, gain in gains.items()), "")
    if len(waited) and (wait := float(np.median(waited))) > WAITING:
        said = f"Training waited for data {wait:.0%} of the time (median). {story} {worth}"
        return Verdict("starved", said.strip(), FEED)
    constant = against == TRIVIAL and not below and not rose(result)
    if not below and (constant or not falling):
        advice = f"Try a learning rate three times higher or lower{was}, or more `--epochs` or `--steps`."
        if is_zero(rate):
            advice = f"The learning rate was zero throughout; set it above zero{was}."
        elif falling:
            story += " What says the same of every image loses no more, so nothing is learned from them yet."
        return Verdict("stalled", f"{story} {worth}".strip(), advice)
    worth = worth or "No probe ran, so what the features are worth is not known."
    return Verdict("learning", f"{story} {worth}", learning_advice(falling, gains, result.start))


PUBLIC = (
    "Public weights are often better where images are few: "
    "`underpaint evaluate RUN --data LABELLED --task linear --beside timm:NAME` compares."
)
GENTLER = (
    "To change the start less: a lower `--lr`, the first blocks as they are (`--set optimiser.freeze=N`), or a pull towards "
    "the start (`--set optimiser.pull=10`)."
)
START_AGAIN = "Run the same command again; it goes on from the last checkpoint, or from the start where there is none."
NOT_FINITE = "and use `--precision bf16` or `32` if it was `16`; the last good checkpoint is kept."
COLLAPSED = "or warm it up longer, and start anew: a collapsed encoder does not recover."
FEED = (
    "Give the loader more processes (`--workers`), and keep the images cached: resized once, "
    "on a local disk or in memory."
)


def collapse(trained: Lines, result: Result, moved: bool) -> str:
    """By which signal the features of all images became the same; nothing where they did not.

    `moved` is whether the loss fell, or lies below its baseline: a rank that fell without that has other reasons.
    """
    loss, gradient, rate = (column(trained, name) for name in ("loss", "gradient_norm", "lr"))
    quarter = max(1, len(loss) // 4)
    own = result.row("pretrained")
    rank, untrained, dimensions = own["rank"].value, result.row(result.before)["rank"].value, own["dim"].value
    few = max(FEW, FEW_SHARE * dimensions) if math.isfinite(dimensions) else FEW
    fell_to_few = rank < few and not rank >= SAME_RANK * untrained
    lost_most = rank < RANK_KEPT * untrained and moved
    # a probe that rose has seen that features differ, if by more than the brightness of an image
    if (fell_to_few or lost_most) and (rank < FEW or not rose(result)):
        since = f", from {untrained:.1f} before training" if math.isfinite(untrained) else ""
        told = "the encoder hardly tells images apart" if fell_to_few else "far less of an image shows in them"
        return f"The features span {rank:.1f} dimensions{since}: {told}."
    end, last = gradient[-quarter:], mean(loss[-quarter:])
    dead = not is_zero(rate) and np.isfinite(end).all() and (end <= NO_GRADIENT).all()
    if dead and np.ptp(finite(loss[-quarter:])) <= CONSTANT * abs(last):
        return f"The loss stands still at {short(last)} and the gradient is zero: nothing can change any more."
    return ""


def rose(result: Result) -> bool:
    """Whether a probe rose measurably over the untrained encoder, and none fell."""
    sigmas = [gain.sigmas for gain in changes(result).values()]
    return any(one >= MEASURABLE for one in sigmas) and not any(one <= -MEASURABLE for one in sigmas)


def changes(result: Result) -> dict[str, Value]:
    """What each probe gained over the untrained encoder, by its name in a sentence."""
    found = {name: result.gain("pretrained", key) for key, name in PROBES.items()}
    return {name: gain for name, gain in found.items() if gain.known}


def learning_advice(falling: bool, gains: dict[str, Value], start: str = "") -> str:
    """What to do with a run that goes well, or well by its loss only."""
    longer = "The loss was still falling: more `--epochs` or `--steps` may give more." if falling else ""
    if not gains:
        advice = "Give labelled images (`--labels`) to learn whether the features are any good."
    elif next(iter(gains.values())).sigmas >= MEASURABLE:
        advice = PUBLIC if not start else ""
    elif start:
        advice = GENTLER
    else:
        advice = "Compare with public weights (`--init timm:NAME`), which are often better where images are few."
    return " ".join(part for part in (longer, advice) if part)


def loss_sentence(last: float, baseline: float, against: str, falling: bool, lines: int) -> str:
    """Where the loss ended, against what, and where it was going."""
    share = abs(1 - last / baseline) if baseline > 0 else math.nan
    where = ""
    if baseline <= 0:
        where = f", against {short(baseline)} for {against}"
    elif math.isfinite(share):
        at_last = f"{share:.1%} {'below' if last < baseline else 'above'}" if share >= 0.0005 else "no different from"
        where = f", {at_last} {against} ({short(baseline)})"
    few = f" Only {lines} log lines: too early to be sure." if lines < FEW_LINES else ""
    return f"The loss ended at {short(last)}{where}, and was {'still' if falling else 'not'} falling.{few}"


def change_sentence(name: str, change: Value, caveat: str = "", origin: str = "the untrained encoder") -> str:
    """What pretraining did to a probe: a number of one run, said to have moved only above two standard errors.

    `caveat` is said of a move, in parentheses; `origin` is what it moved from.
    """
    points = f"{points_text(*change)} points"
    said = f" ({caveat})" if caveat else ""
    if not change.error > 0:
        return f"The {name} moved by {points} from {origin}, of unknown standard error, so nothing can be said."
    if abs(change.sigmas) < MEASURABLE:
        return f"Pretraining did not measurably help the {name} ({points} against {origin})."
    moved = "rose by {} over" if change.value > 0 else "fell by {} below"
    return f"The {name} {moved.format(points[1:])} {origin}{said}."


def is_zero(values: np.ndarray) -> bool:
    """Whether there are finite values and all of them are zero."""
    known = finite(values)
    return len(known) > 0 and not known.any()


def is_falling(loss: np.ndarray) -> bool:
    """Whether the last quarter of a run lies below the quarter before it, by more than the noise of both."""
    quarter = max(1, len(loss) // 4)
    late, before = finite(loss[-quarter:]), finite(loss[-2 * quarter : -quarter])
    if len(late) == 0 or len(before) == 0:
        return False
    fall = float(before.mean() - late.mean())
    noise = math.sqrt(sum(float(part.var(ddof=1)) / len(part) for part in (late, before) if len(part) > 1))
    return fall > FALL * abs(float(before.mean())) and fall > MEASURABLE * noise


def trivial_loss(trained: Lines) -> tuple[float, str]:
    """The baseline's mean over the last quarter, or the loss of the first lines where none was logged; and what it is."""
    logged = column(trained, "terms", "baseline")
    if not len(finite(logged)):
        return mean(column(trained, "loss")[: max(1, len(trained) // 20)]), "where it began"
    late = logged[-max(1, len(logged) // 4) :] if np.isfinite(logged[-1]) else logged
    return mean(late), TRIVIAL
