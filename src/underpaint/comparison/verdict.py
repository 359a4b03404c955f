"""The verdict of a comparison in plain words. No sentence says more than `Difference.beyond` allows."""

from collections.abc import Mapping, Sequence

from underpaint.comparison.statistics import Arm, Difference, difference, standing
from underpaint.report.results import Tokenizer
from underpaint.report.words import UNEQUAL, capital, listing, percent_text, points_text, span_text, time_text


def verdict(
    arms: Sequence[Arm],
    *,
    minutes: float,
    shots: int,
    troubled: Mapping[str, str],
    left_out: Mapping[str, str],
    spent: Mapping[str, Sequence[float]] | None = None,
    tokenizers: Mapping[str, Sequence[Tokenizer]] | None = None,
) -> list[str]:
    """Sentences, the advice first.

    Args:
        arms: every row that was judged.
        minutes: of training each method was to have.
        shots: labelled images a class where few were used.
        troubled: methods whose own run is not learning, with its verdict in a word.
        left_out: methods that could not take part, with the reason.
        spent: minutes of training that each method really had, by seed.
        tokenizers: of each method that predicts words, by seed.
    """
    methods = [arm for arm in arms if arm.kind == "method"]
    collapsed = [arm.name for arm in methods if troubled.get(arm.name) == "collapsed"]
    said: list[str] = []
    if methods and "linear" in methods[0].hits:
        said += _with_labels(arms, methods, collapsed, shots)
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
    minutes: float, spent: Mapping[str, Sequence[float]], tokenizers: Mapping[str, Sequence[Tokenizer]]
) -> list[str]:
    """What time the methods had, and what came on top of it."""
    had = [minutes, *(one for those in spent.values() for one in those)]
    if max(had) > UNEQUAL * min(had):
        digits = 1 if minutes >= 1 else 3
        told = {name: span_text(those, lambda one: f"{one:.{digits}f}") for name, those in spent.items()}
        real = [f"{name} had {those} minutes" for name, those in told.items()]
        each = f"for unequal times on this machine ({minutes:g} minutes of training were to be had): {', '.join(real)}"
    else:
        each = f"for {minutes:g} minutes of training each on this machine"
    said = [f"All this is {each}; more can change the order."]
    for name, those in tokenizers.items():
        times = [one.seconds for one in those if one.seconds is not None]
        told = f"in {span_text(times, time_text)}" if times else "in a time that its file does not tell"
        made = "made its tokenizer" if all(one.made for one in those) else "was given a tokenizer, made elsewhere"
        said.append(f"{name} {made} {told}, which comes on top of its minutes.")
    return said


def _with_labels(arms: Sequence[Arm], methods: Sequence[Arm], collapsed: Sequence[str], shots: int) -> list[str]:
    if any(len(arm.hits["linear"]) < 2 for arm in methods):
        return _of_one_seed(arms, methods, collapsed, shots)
    starts = [arm for arm in arms if arm.kind == "start"]
    floors = [arm for arm in arms if arm.kind == "floor"]
    said = [_advice(methods, starts, floors, collapsed)]
    if len(methods) > 1:
        said.append(_ranking(methods, "linear", "linear probe"))
    said += [_gains(start, methods) for start in starts]
    said += [_floor(floor, methods) for floor in floors]
    if len(methods) > 1:
        said += [_ranking(methods, probe, name) for probe, name in _few(methods, shots)]
    return said


def _few(methods: Sequence[Arm], shots: int) -> list[tuple[str, str]]:
    """The probes with few labels that all methods have, and their names."""
    kinds = (("few_linear", "linear"), ("few_attentive", "attentive"))
    return [
        (probe, f"{kind} probe with {shots} labels a class")
        for probe, kind in kinds
        if all(probe in arm.hits for arm in methods)
    ]


def _of_one_seed(arms: Sequence[Arm], methods: Sequence[Arm], collapsed: Sequence[str], shots: int) -> list[str]:
    """The numbers as they are: how far seeds spread is not known, so none is called better."""
    ranked = sorted(methods, key=lambda arm: -arm.accuracy("linear"))
    if len(methods) > 1:
        first = f"{ranked[0].name} has the highest number, but each method was trained once"
    else:
        first = f"{ranked[0].name} was trained once"
    lost = f" {capital(_runs_of(collapsed))} collapsed." if collapsed else ""
    said = [f"{first}, and one seed cannot tell what is better: `--seeds 3` or more can.{lost}"]
    for probe, name in [("linear", "linear probe"), *_few(methods, shots)]:
        if len(methods) > 1 or probe == "linear":
            told = [(arm, standing(arm, probe)) for arm in sorted(methods, key=lambda arm: -arm.accuracy(probe))]
            numbers = ", ".join(f"{arm.name} {percent_text(*found)} %" for arm, found in told)
            said.append(f"{capital(name)}: {numbers} (errors without what another seed would change).")
    for other in [arm for arm in arms if arm.kind != "method"]:
        gaps = ", ".join(f"{arm.name} {_points(difference(arm, other, 'linear'))}" for arm in ranked)
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


def _advice(methods: Sequence[Arm], starts: Sequence[Arm], floors: Sequence[Arm], collapsed: Sequence[str]) -> str:
    """Which method to take, if any; one whose run collapsed is named, and never advised."""
    not_these = f"{_runs_of(collapsed)} collapsed" if collapsed else ""
    sound = [arm for arm in methods if arm.name not in collapsed]
    if not sound:
        return f"Take none of them: {not_these}."
    leader, level, behind = order(sound, "linear")
    # what a user could have without any training: the best of the starts
    bar = max(starts, key=lambda arm: arm.accuracy("linear")) if starts else None

    def proven(arm: Arm) -> bool:
        return bar is None or _above(difference(arm, bar, "linear"), len(methods))

    top = [arm.name for arm in [leader, *level]]
    better = [arm.name for arm in [leader, *level] if proven(arm)]
    if bar and not better:
        if not any(proven(arm) for arm in behind):
            first = f"Take none of them: no method measurably beats the {bar.name}{f', and {not_these}' if collapsed else ''}."
            if bar.name == "public weights":
                return f"{first} Use those as they are, or try more `--minutes` or more images."
            return f"{first} More `--minutes`, more images, or public weights (`--init timm:NAME`) may change that."
        better = [leader.name]  # above one that is above the bar
    if len(top) == 1:
        advice = f"Take {better[0]}"
    elif len(better) == 1:
        advice = (
            f"Take {better[0]}, though it cannot be told from {listing([name for name in top if name != better[0]])}"
        )
    else:
        advice = f"Take {listing(better, 'or')}, which cannot be told apart"
    if collapsed:
        advice += f", not {listing(collapsed, 'or')}, whose run{'s' * (len(collapsed) > 1)} collapsed"
    if ahead := [floor.name for floor in floors if _above(difference(floor, leader, "linear"), len(methods))]:
        return f"{advice}; but a linear probe does measurably better on {listing(ahead)}, without any network."
    return f"{advice}."


def _runs_of(names: Sequence[str]) -> str:
    return f"the run{'s' * (len(names) > 1)} of {listing(names)}"


def _ranking(methods: Sequence[Arm], probe: str, name: str) -> str:
    """The method of the best accuracy, and how the others stand to it."""
    leader, level, behind = order(methods, probe)
    found = f"{percent_text(*standing(leader, probe))} %"

    def gaps(arms: Sequence[Arm]) -> str:
        return listing([f"{arm.name} ({_points(difference(leader, arm, probe))})" for arm in arms])

    if not level:
        return f"{leader.name} has the best {name} ({found}), measurably above {gaps(behind)}."
    but = f", but is above {gaps(behind)}" if behind else ""
    return f"Under the {name} {leader.name} ({found}) is not measurably above {gaps(level)}{but}."


def _sides(found: Mapping[str, Difference]) -> tuple[list[str], list[str], list[str]]:
    """The names of differences that are measurably above zero, of those not measurable, and of those below."""
    above = [name for name, gap in found.items() if _above(gap, len(found))]
    below = [name for name, gap in found.items() if gap.value < 0 and gap.beyond(len(found))]
    return above, [name for name in found if name not in (*above, *below)], below


def _gains(start: Arm, methods: Sequence[Arm]) -> str:
    found = {arm.name: difference(arm, start, "linear") for arm in methods}
    words = ("measurably better", "not measurably different", "measurably worse")
    parts = [
        f"{word}: {', '.join(f'{name} ({_points(found[name])})' for name in names)}"
        for word, names in zip(words, _sides(found), strict=True)
        if names
    ]
    return f"Against the {start.name}, {'; '.join(parts)}."


def _floor(floor: Arm, methods: Sequence[Arm]) -> str:
    found = {arm.name: difference(arm, floor, "linear") for arm in methods}
    words = ("measurably below", "not measurably different from", "measurably above")
    parts = [f"{word} {listing(names)}" for word, names in zip(words, _sides(found), strict=True) if names]
    return f"{floor.name}, without a network, gets {percent_text(*standing(floor, 'linear'))} %: {'; '.join(parts)}."


def _points(found: Difference) -> str:
    return f"{points_text(found.value, found.error)} points"
