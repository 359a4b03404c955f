"""The verdict of a comparison in plain words. No sentence says more than `Difference.beyond` allows."""

from collections.abc import Mapping, Sequence
from typing import Any

from underpaint.compare.statistics import Arm, Difference, difference, standing
from underpaint.report.words import span_text, time_text

EQUAL = 1.05  # most that one method's minutes may be over another's where they are called the same


def verdict(
    arms: Sequence[Arm],
    *,
    minutes: float,
    shots: int,
    troubled: Mapping[str, str],
    left_out: Mapping[str, str],
    spent: Mapping[str, Sequence[float]] | None = None,
    tokenizers: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> list[str]:
    """Sentences, the advice first.

    Args:
        arms: every row that was judged.
        minutes: of training each method was to have.
        shots: labelled images a class where few were used.
        troubled: methods whose own run is not learning, with its verdict in a word.
        left_out: methods that could not take part, with the reason.
        spent: minutes of training that each method really had, by seed.
        tokenizers: of each method that predicts words, by seed: `made` by the run, and `seconds` that it took or None.
    """
    methods = [arm for arm in arms if arm.kind == "method"]
    said: list[str] = []
    if methods and "linear" in methods[0].hits:
        said += _with_labels(arms, methods, shots)
        if len(methods[0].hits["linear"]) == 2:
            said.append(
                "Two seeds of a method say little of how far its seeds lie apart, so only large differences can be "
                "claimed: `--seeds 4` would tell more."
            )
        said += _budget(minutes, spent or {}, tokenizers or {})
    elif methods:
        ranks = ", ".join(f"{arm.name} {sum(arm.rank) / len(arm.rank):.1f}" for arm in arms if arm.rank)
        said.append(
            "Without labels it cannot be said which encoder is better: each method's loss measures another thing. "
            f"Effective ranks, where only a very low one means something: {ranks}. Give `--labels`."
        )
    said += [f"The run of {name} is {word}: its own page says why." for name, word in troubled.items()]
    said += [f"{name} was left out: {reason}" for name, reason in left_out.items()]
    return said


def _budget(
    minutes: float, spent: Mapping[str, Sequence[float]], tokenizers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[str]:
    """What time the methods had, and what came on top of it."""
    had = [minutes, *(one for those in spent.values() for one in those)]
    if max(had) > EQUAL * min(had):
        real = [f"{name} had {span_text(those, lambda one: f'{one:.1f}')} minutes" for name, those in spent.items()]
        each = f"for unequal times on this machine ({minutes:g} minutes of training were to be had): {', '.join(real)}"
    else:
        each = f"for {minutes:g} minutes of training each on this machine"
    said = [f"All this is {each}; more can change the order."]
    for name, those in tokenizers.items():
        times = [one["seconds"] for one in those if one["seconds"] is not None]
        told = f"in {span_text(times, time_text)}" if times else "in a time that its file does not tell"
        made = "made its tokenizer" if all(one["made"] for one in those) else "was given a tokenizer, made elsewhere"
        said.append(f"{name} {made} {told}, which comes on top of its minutes.")
    return said


def _with_labels(arms: Sequence[Arm], methods: Sequence[Arm], shots: int) -> list[str]:
    if any(len(arm.hits["linear"]) < 2 for arm in methods):
        return _of_one_seed(arms, methods, shots)
    leader, level, behind = order(methods, "linear")
    starts = [arm for arm in arms if arm.kind == "start"]
    helped = {start.name: {arm.name: difference(arm, start, "linear") for arm in methods} for start in starts}
    top = [leader, *level]
    # what a user could have without any training: the best of the starts
    bar = max(starts, key=lambda arm: arm.accuracy("linear")) if starts else None
    proven = [arm.name for arm in top if bar is None or _above(helped[bar.name][arm.name], len(methods))]
    if bar and not proven and any(_above(helped[bar.name][arm.name], len(methods)) for arm in behind):
        proven = [leader.name]  # above one that is above the bar
    floors = [arm for arm in arms if arm.kind == "floor"]
    ahead = [floor.name for floor in floors if _above(difference(floor, leader, "linear"), len(methods))]
    said = [_advice(top, proven, bar, ahead)]
    if len(methods) > 1:
        said.append(_places(leader, level, behind, "linear", "linear probe"))
    for start in starts:
        said.append(_gains(start, helped[start.name]))
    for floor in floors:
        said.append(_floor(floor, methods))
    if len(methods) > 1:
        for probe, name in _few(methods, shots):
            said.append(_places(*order(methods, probe), probe, name))
    return said


def _few(methods: Sequence[Arm], shots: int) -> list[tuple[str, str]]:
    """The probes with few labels that all methods have, and their names."""
    kinds = (("few_linear", "linear"), ("few_attentive", "attentive"))
    return [
        (probe, f"{kind} probe with {shots} labels a class")
        for probe, kind in kinds
        if all(probe in arm.hits for arm in methods)
    ]


def _of_one_seed(arms: Sequence[Arm], methods: Sequence[Arm], shots: int) -> list[str]:
    """The numbers as they are: how far seeds spread is not known, so none is called better."""
    ranked = sorted(methods, key=lambda arm: -arm.accuracy("linear"))
    if len(methods) > 1:
        first = f"{ranked[0].name} has the highest number, but each method was trained once"
    else:
        first = f"{ranked[0].name} was trained once"
    said = [f"{first}, and one seed cannot tell what is better: `--seeds 3` or more can."]
    for probe, name in [("linear", "linear probe"), *_few(methods, shots)]:
        if len(methods) > 1 or probe == "linear":
            told = [(arm, standing(arm, probe)) for arm in sorted(methods, key=lambda arm: -arm.accuracy(probe))]
            numbers = ", ".join(f"{arm.name} {100 * value:.1f} ± {100 * error:.1f} %" for arm, (value, error) in told)
            said.append(f"{name[0].upper()}{name[1:]}: {numbers} (errors without what another seed would change).")
    for other in [arm for arm in arms if arm.kind != "method"]:
        gaps = ", ".join(f"{arm.name} {points(difference(arm, other, 'linear'))}" for arm in ranked)
        against = f"{other.name}, without a network" if other.kind == "floor" else f"the {other.name}"
        said.append(f"Against {against}: {gaps} of linear probe (error of the test images alone).")
    return said


def order(methods: Sequence[Arm], probe: str) -> tuple[Arm, list[Arm], list[Arm]]:
    """The method of the best accuracy, those that cannot be told from it, and those measurably behind."""
    ranked = sorted(methods, key=lambda arm: -arm.accuracy(probe))
    leader, others = ranked[0], ranked[1:]
    # the leader is named after looking at all: any two of the methods might have been compared here
    claims = len(methods) * len(others) // 2
    behind = [arm for arm in others if _above(difference(leader, arm, probe), claims)]
    return leader, [arm for arm in others if arm not in behind], behind


def _above(found: Difference, claims: int) -> bool:
    return found.value > 0 and found.beyond(claims)


def _advice(top: Sequence[Arm], proven: Sequence[str], bar: Arm | None, ahead: Sequence[str]) -> str:
    if not proven:
        assert bar is not None
        first = f"Take none of them: no method measurably beats the {bar.name}."
        if bar.name == "public weights":
            return f"{first} Use those as they are, or try more `--minutes` or more images."
        return f"{first} More `--minutes`, more images, or public weights (`--init timm:NAME`) may change that."
    if len(top) == 1:
        advice = f"Take {proven[0]}"
    elif len(proven) == 1:
        advice = f"Take {proven[0]}, though it cannot be told from {_all([a.name for a in top if a.name != proven[0]])}"
    else:
        advice = f"Take {_all(proven, 'or')}, which cannot be told apart"
    if ahead:
        return f"{advice}; but a linear probe does measurably better on {_all(ahead)}, without any network."
    return f"{advice}."


def _places(leader: Arm, level: Sequence[Arm], behind: Sequence[Arm], probe: str, name: str) -> str:
    accuracy, error = standing(leader, probe)
    found = f"{100 * accuracy:.1f} ± {100 * error:.1f} %"

    def gaps(arms: Sequence[Arm]) -> str:
        return _all([f"{arm.name} ({points(difference(leader, arm, probe))})" for arm in arms])

    if not level:
        return f"{leader.name} has the best {name} ({found}), measurably above {gaps(behind)}."
    first = (
        f"under the {name} {leader.name} ({found}) is not measurably above {gaps(level)}"
        + (f", but is above {gaps(behind)}" if behind else "")
        + "."
    )
    return first[0].upper() + first[1:]


def _gains(start: Arm, found: Mapping[str, Difference]) -> str:
    better = {name: gain for name, gain in found.items() if _above(gain, len(found))}
    worse = {name: gain for name, gain in found.items() if gain.value < 0 and gain.beyond(len(found))}
    open_ = {name: gain for name, gain in found.items() if name not in better and name not in worse}
    parts = []
    for words, group in (
        ("measurably better", better),
        ("not measurably different", open_),
        ("measurably worse", worse),
    ):
        if group:
            parts.append(f"{words}: {', '.join(f'{name} ({points(gain)})' for name, gain in group.items())}")
    return f"Against the {start.name}, {'; '.join(parts)}."


def _floor(floor: Arm, methods: Sequence[Arm]) -> str:
    accuracy, error = standing(floor, "linear")
    found = {arm.name: difference(arm, floor, "linear") for arm in methods}
    above = [name for name, gap in found.items() if _above(gap, len(methods))]
    below = [name for name, gap in found.items() if gap.value < 0 and gap.beyond(len(methods))]
    open_ = [name for name in found if name not in above and name not in below]
    parts = [
        f"{words} {_all(names)}"
        for words, names in (
            ("measurably below", above),
            ("not measurably different from", open_),
            ("measurably above", below),
        )
        if names
    ]
    return f"{floor.name}, without a network, gets {100 * accuracy:.1f} ± {100 * error:.1f} %: {'; '.join(parts)}."


def points(found: Difference) -> str:
    """A difference in percentage points with its standard error."""
    return f"{round(100 * found.value, 1) + 0.0:+.1f} ± {100 * found.error:.1f} points".replace("-", "−")


def _all(names: Sequence[str], joined: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joined} {names[-1]}"
