"""What was measured, in one form: of a run (probes.json), an evaluation (results.json) and a comparison (compare.json).

A result is rows of numbers on the same test images: what is judged, what it started from, and what needs no training.
Pages, tables on a terminal and tables for a README are made of it (`tables.py`), and verdicts read it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from underpaint.report.reading import Lines, at, mapping, number, probe_lines, sequence, text, texts

Kind = Literal["own", "start", "baseline"]
PROBES = {"linear": "linear probe", "attentive": "attentive probe", "knn": "kNN accuracy"}  # of a run, in a sentence
FEW = ("few_linear", "few_attentive")  # the further probes of a comparison
BRIEF = (*PROBES, *FEW, "gain", "rank", "images_per_second", "memory_gib", "minutes")  # on a terminal and in a README
COLUMNS = (*BRIEF, "loss_over_baseline")  # of a comparison, on its page


class Value(NamedTuple):
    """A number and its standard error, nan where they are not known; shares are from 0 to 1."""

    value: float = math.nan
    error: float = math.nan

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)

    @property
    def sigmas(self) -> float:
        """The value in its own standard errors; 0 where those are unknown: nothing is claimed."""
        return self.value / self.error if self.error > 0 else 0.0

    def minus(self, other: "Value") -> "Value":
        """The difference as if the two had other test images each: never a smaller error than that of pairs."""
        return Value(self.value - other.value, math.hypot(self.error, other.error))


@dataclass(frozen=True)
class Row:
    """Numbers by metric of what is judged ("own"), what it was before training ("start"), or what needs none
    ("baseline")."""

    name: str
    kind: Kind
    values: Mapping[str, Value]

    def __getitem__(self, metric: str) -> Value:
        return self.values.get(metric, Value())


@dataclass(frozen=True)
class Gain:
    """By metric, the difference of two rows, paired by the test images."""

    name: str
    of: str
    values: Mapping[str, Value]


class Tokenizer(NamedTuple):
    """Whether a run made its tokenizer itself, and the seconds that making it took, there or elsewhere, where known."""

    made: bool
    seconds: float | int | None


@dataclass(frozen=True)
class Result:
    """Everything measured on the same test images.

    Attributes:
        name: of the task, or of what the rows are; the head of the first column.
        counts: `train`, `test` (images) and `classes`, where they are known.
        notes: what must be known to read the numbers, in sentences.
        start: the weights that training went on from, as `--init` named them; nothing where they were random.
    """

    name: str
    rows: Sequence[Row]
    gains: Sequence[Gain] = ()
    notes: Sequence[str] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    start: str = ""

    @property
    def before(self) -> str:
        """The row of what was before training."""
        return before_training(self.start)

    @property
    def origin(self) -> str:
        """The same in a sentence."""
        return "the start" if self.start else "the untrained encoder"

    def row(self, name: str) -> Row:
        """The row of that name; one without numbers where there is none."""
        return next((row for row in self.rows if row.name == name), Row(name, "baseline", {}))

    def gain(self, of: str, metric: str) -> Value:
        """What a row has gained; unknown where nothing was compared."""
        return next((gain.values.get(metric, Value()) for gain in self.gains if gain.of == of), Value())


def before_training(start: str) -> str:
    """What a row of the encoder before training is called, by the weights that it started from."""
    return "start" if start else "untrained"


def values(found: object) -> dict[str, Value]:
    """Numbers by name, in all the ways that files keep them.

    `{name: 0.5, name_error: 0.1}`; or `{name: {key: 0.5, "standard_error": 0.1}}` with the key accuracy, difference or
    error. What is no number is left out.
    """
    known = {}
    for name, inner in mapping(found).items():
        key = next((key for key in ("accuracy", "difference", "error") if key in mapping(inner)), "")
        one = Value(number(inner, key), number(inner, "standard_error"))
        if not key:
            one = Value(number(inner), number(found, f"{name}_error"))
        if one.known and not name.endswith("_error"):
            known[name] = one
    return known


def _result(name: str, found: object, rows: Sequence[Row], gains: Sequence[Gain], start: str = "") -> Result:
    """With what a file says beside its rows; majority and chance, which are alike for every probe, are rows too."""
    beside = values(found)
    probes = [probe for probe in (*PROBES, *FEW) if any(row[probe].known for row in rows)]
    for_all = [
        Row(name, "baseline", dict.fromkeys(probes, beside[name])) for name in ("majority", "chance") if name in beside
    ]
    counts = {name: beside[name].value for name in ("train", "test", "classes") if name in beside}
    return Result(name, [*rows, *for_all], gains, texts(found, "notes"), counts, start)


def of_run(probes: object, lines: Lines = (), start: str = "") -> Result:
    """A run as probes.json holds it, with `rank` and `dim` beside the accuracies of the encoder.

    Where gains or ranks are not there, they are those of the probes on the way (`lines` of metrics.jsonl). `start` is what
    its recipe has as `init`.
    """
    during = probe_lines(lines)
    early = values(at(during[0], "probe")) if during and number(during[0], "step") == 0 else {}
    late = values(at(during[-1], "probe")) if during and number(during[-1], "step") > 0 else {}
    rank = values(at(probes, "rank"))
    after, before, gains = (values(at(probes, key)) for key in ("encoder", "untrained", "gain"))
    for probe in PROBES:
        for one, other in ((after, before), (late, early)):
            if probe not in gains and probe in one and probe in other:
                gains[probe] = one[probe].minus(other[probe])
    ranks = rank.get("encoder", late.get("rank", Value())), rank.get("untrained", early.get("rank", Value()))
    rows = [
        Row("pretrained", "own", {**after, "rank": ranks[0], "dim": rank.get("dim", Value())}),
        Row(before_training(start), "start", {**before, "rank": ranks[1]}),
        Row("raw pixels", "baseline", values(at(probes, "raw_pixels"))),
        Row("HOG", "baseline", values(at(probes, "hog"))),
    ]
    gained = Gain(f"gain over {before_training(start)}", "pretrained", gains)
    return _result("Features", probes, rows, [gained], start)


def of_evaluation(results: object) -> list[Result]:
    """Every task of an evaluation, as results.json holds them."""
    made = []
    for task, found in mapping(results, "tasks").items():
        gains = [Gain(name, "encoder", values(one)) for name, one in mapping(found, "gains").items()]
        rows = [Row(name, _kind(name), values(one)) for name, one in mapping(found, "rows").items()]
        made.append(_result(task, found, rows, gains))
    return made


def _kind(name: str) -> Kind:
    """Of a row of an evaluation, or the kind that a comparison says."""
    if name.startswith(("encoder", "the method")):
        return "own"
    return "start" if name.startswith(("untrained", "start")) else "baseline"


def of_comparison(result: object) -> Result:
    """The rows of a comparison, as compare.json holds them."""
    found = rows_of(result)
    kinds = {name: text(one, "kind") for name, one in found.items()}
    rows = [
        Row(name, "own" if kinds[name] == "method" else _kind(kinds[name]), values(one) | values(at(one, "probes")))
        for name, one in found.items()
    ]
    start = text(result, "start")
    gains = [Gain(f"{name} over {start}", name, values(at(one, "gain"))) for name, one in found.items()]
    return _result("", result, rows, gains)


def restoration_of(found: Mapping[str, object]) -> Result:
    """How well methods restore images that they were not trained on, by task; `found` is by method what files hold."""
    rows = [Row(name, "own", values({**mapping(errors), "images": None})) for name, errors in found.items()]
    return Result("Method", [row for row in rows if row.values])


def rows_of(result: object) -> dict[str, dict[str, object]]:
    """What compare.json holds of each row, by name."""
    return {text(row, "name"): mapping(row) for row in sequence(result, "rows") if isinstance(row, dict)}


def tokenizers_of(found: object) -> list[Tokenizer] | None:
    """Of a method of a comparison that predicts words, by seed; None where it is not told whether there are some."""
    times = [(bool(at(one, "made")), number(one, "seconds")) for one in sequence(found)]
    made = [Tokenizer(made, seconds if math.isfinite(seconds) else None) for made, seconds in times]
    return made if isinstance(found, list) else None
