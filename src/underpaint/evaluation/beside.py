"""What else one could take: public weights, other runs, the same network from scratch.

The same task with each, on the same test images. What is said of them claims no more than these allow: two are told apart
where Student's t of their paired difference says so at the level of decision 11, divided by the number of pairs, since
the best is named after looking.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from underpaint.evaluation.results import Measured
from underpaint.report.tables import metric
from underpaint.report.words import count_text, listing

SHARES = (0.01, 0.1)  # of the labels, beside all of them
LOWER = ("mae", "fpr95")  # numbers of which less is better
ONCE = (
    "Each network was trained once: the errors are those of the test images, and another `--seed` may change a number by "
    "more."
)


class Arm(NamedTuple):
    """One of those that are weighed: what is judged, the same network from scratch, or another one."""

    name: str
    role: Literal["own", "scratch", "other"]
    measured: Measured

    @property
    def said(self) -> str:
        """In a sentence."""
        return {"own": "this encoder", "scratch": "the same network from scratch", "other": self.name}[self.role]


def shares_of(count: int, least: int) -> tuple[list[float], str]:
    """Shares of the labels, ascending, that leave enough images to learn from; and what is to be said of the others.

    Args:
        count: images to train on.
        least: fewest that will do.
    """
    kept = [share for share in SHARES if round(share * count) >= least]
    if len(kept) == len(SHARES):
        return kept, ""
    left = listing([f"{100 * share:g} %" for share in SHARES if share not in kept])
    few = f"{left} of {count_text(count)} images {'are' if len(SHARES) - len(kept) > 1 else 'is'} fewer than {least}"
    if least <= count * (kept[0] if kept else 1.0) / 2:
        kept = [least / count, *kept]
    if not kept:
        return kept, f"{few}, too few to learn from: there is no curve over the number of labels."
    return kept, f"{few}, too few to learn from: the curve begins with {count_text(round(kept[0] * count))} images."


def advice(arms: Sequence[Arm], name: str, floors: Mapping[str, Measured] | None = None) -> str:
    """Which of them to take by a number, in one sentence; nothing where there is nothing to choose.

    Args:
        floors: what needs no network, by name.
    """
    ranked = sorted((arm for arm in arms if math.isfinite(arm.measured.values[name])), key=lambda arm: _rank(arm, name))
    if len(ranked) < 2:
        return ""
    leader, claims = ranked[0], len(ranked) * (len(ranked) - 1) // 2
    behind = [arm for arm in ranked[1:] if leader.measured.beyond(arm.measured, name, claims)]
    top = [arm for arm in ranked if arm not in behind]
    said = f"{_take(top, behind, name)}."
    for floor, measured in (floors or {}).items():
        if _rank(Arm(floor, "other", measured), name) < _rank(leader, name) and measured.beyond(leader.measured, name):
            said = f"{said[:-1]}; but {floor}, without any network, does measurably better."
    return said


def _take(top: Sequence[Arm], behind: Sequence[Arm], name: str) -> str:
    """What to take of those at the top, who cannot be told apart, and those behind the first of them."""
    leader, roles = top[0], {arm.role for arm in top}
    above = f"measurably {'below' if name in LOWER else 'above'} {_gaps(leader, behind, name)}" if behind else ""
    apart = f"{leader.said} cannot be told from {_gaps(leader, top[1:], name)}"
    also = f"; {leader.said} is {above}" if behind else ""
    public = [arm.name for arm in top if arm.name.startswith("timm:")]
    on = f"; `pretrain --init {public[0]}` would go on from it" if public else ""
    if roles == {"scratch"}:
        return f"train from scratch: that is {above}, so no pretrained weights help here"
    if "scratch" in roles:
        return f"{apart}: no pretrained weights have shown to help here{also}"
    if roles == {"own"}:
        return f"take this encoder: it is {above}"
    if "own" in roles:
        free = f", and {listing(public)} need{'s' * (len(public) == 1)} no pretraining" if public else ""
        return f"{apart}: either serves{free}{also}"
    if len(top) == 1:
        return f"keep {leader.name}: it is {above}{on}"
    return f"keep {listing([arm.name for arm in top], 'or')}: {apart}{also}{on}"


def needed(curves: Mapping[str, Sequence[tuple[int, float]]], name: str) -> str:
    """How many labelled images others need for what the last one reaches with all of them, in one sentence.

    Args:
        curves: by what each is called in a sentence, numbers of images, ascending, and what was reached with them.
        name: of the number.
    """
    known = {who: list(curve) for who, curve in curves.items() if all(math.isfinite(value) for _, value in curve)}
    if len(known) < 2 or any(len(curve) < 2 for curve in known.values()):
        return ""
    sign = -1 if name in LOWER else 1
    last = min(known, key=lambda who: sign * known[who][-1][1])
    count, target = known[last][-1]
    found = [f"{who} {_images(curve, target, sign)}" for who, curve in known.items() if who != last]
    unit = " %" if metric(name).share else ""
    shown = metric(name).text(target, math.nan)
    return (
        f"what {last} reaches with all {count_text(count)} images ({shown}{unit}) is reached, by interpolation, by "
        f"{listing(found)}."
    )


def _images(curve: Sequence[tuple[int, float]], target: float, sign: int) -> str:
    """With how many images a curve reaches what is wanted, on a line over the logarithm of their number."""
    (before, low), rest = curve[0], curve[1:]
    if sign * low >= sign * target:
        return f"with {count_text(before)} or fewer"
    for count, value in rest:
        if sign * value >= sign * target:
            share = (target - low) / (value - low)
            return f"with about {count_text(float(f'{before * (count / before) ** share:.2g}'))}"
        before, low = count, value
    return f"with {count_text(before)}"  # as many as the last has, which it is level with


def _rank(arm: Arm, name: str) -> float:
    value = arm.measured.values[name]
    return value if name in LOWER else -value


def _gaps(leader: Arm, arms: Sequence[Arm], name: str) -> str:
    return listing([f"{arm.said} ({_gap(leader, arm, name)})" for arm in arms]) if arms else ""


def _gap(leader: Arm, arm: Arm, name: str) -> str:
    found = leader.measured.above(arm.measured)
    unit = " points" if metric(name).share else ""
    return f"{metric(name).change(found[name], found[f'{name}_error'])}{unit}"
