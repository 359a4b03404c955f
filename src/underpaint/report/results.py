"""What was measured, in one form: of a run (probes.json), an evaluation (results.json) and a comparison (compare.json).

A result is rows of numbers on the same test images: what is judged, what it started from, and what needs no training.
Pages, tables on a terminal and tables for a README are made of it (`tables.py`), and verdicts read it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from underpaint.report.reading import at, mapping, number, sequence, text, texts

Kind = Literal["own", "start", "floor"]
PROBES = {"linear": "linear probe", "attentive": "attentive probe", "knn": "kNN accuracy"}  # of a run, in a sentence
FEW = ("few_linear", "few_attentive")  # the further probes of a comparison
MEASURED = ("rank", "loss_over_baseline", "images_per_second", "memory_gib", "minutes")  # of its rows, without an error
COLUMNS = (*PROBES, *FEW, "gain", *MEASURED)  # of its table


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


@dataclass(frozen=True)
class Row:
    """Numbers by metric of what is judged ("own"), what it was before training ("start"), or what needs none ("floor")."""

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
    """

    name: str
    rows: Sequence[Row]
    gains: Sequence[Gain] = ()
    notes: Sequence[str] = ()
    counts: Mapping[str, float] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The row of that name; one without numbers where there is none."""
        return next((row for row in self.rows if row.name == name), Row(name, "floor", {}))

    def gain(self, of: str, metric: str) -> Value:
        """What a row has gained; unknown where nothing was compared."""
        return next((gain.values.get(metric, Value()) for gain in self.gains if gain.of == of), Value())


def _counts(found: object) -> dict[str, float]:
    counts = {name: number(found, name) for name in ("train", "test", "classes")}
    return {name: count for name, count in counts.items() if math.isfinite(count)}


def _pair(found: object, value: str, error: str) -> Value:
    return Value(number(found, value), number(found, error))


def _accuracy(found: object) -> Value:
    """An accuracy, whether it was stored with its standard error or alone."""
    alone = number(found)
    return Value(alone) if math.isfinite(alone) else _pair(found, "accuracy", "standard_error")


def _accuracies(found: object) -> dict[str, Value]:
    return {name: _accuracy(inner) for name, inner in mapping(found).items()}


def _differences(found: object) -> dict[str, Value]:
    return {name: _pair(inner, "difference", "standard_error") for name, inner in mapping(found).items()}


def of_run(probes: object) -> Result:
    """The final probes of a run, as probes.json holds them; `rank` and `dim` beside the accuracies."""
    rank = {key: Value(number(probes, "rank", key)) for key in ("encoder", "untrained", "dim")}
    rows = [
        Row("pretrained", "own", {**_accuracies(at(probes, "encoder")), "rank": rank["encoder"], "dim": rank["dim"]}),
        Row("untrained", "start", {**_accuracies(at(probes, "untrained")), "rank": rank["untrained"]}),
        Row("raw pixels", "floor", _accuracies(at(probes, "raw_pixels"))),
        Row("HOG", "floor", _accuracies(at(probes, "hog"))),
    ]
    measured = [probe for probe in PROBES if any(row[probe].known for row in rows)]
    of_all = {"majority": _accuracy(at(probes, "majority")), "chance": Value(number(probes, "chance"))}
    rows += [Row(name, "floor", dict.fromkeys(measured, value)) for name, value in of_all.items()]
    gain = Gain("gain over untrained", "pretrained", _differences(at(probes, "gain")))
    return Result("Features", rows, [gain], texts(probes, "notes"), _counts(probes))


def of_evaluation(results: object) -> list[Result]:
    """Every task of an evaluation, as results.json holds them."""
    return [_of_task(name, found) for name, found in mapping(results, "tasks").items()]


def _of_task(task: str, found: object) -> Result:
    rows = []
    for name, values in mapping(found, "rows").items():
        own = name.startswith(("encoder", "the method"))
        kind: Kind = "own" if own else "start" if name.startswith("untrained") else "floor"
        rows.append(Row(name, kind, _named(values)))
    gains = [Gain(name, "encoder", _named(values)) for name, values in mapping(found, "gains").items()]
    return Result(task, rows, gains, (), _counts(found))


def _named(found: object) -> dict[str, Value]:
    """The numbers of a mapping, each with that of the same name and "_error"."""
    names = [name for name in mapping(found) if not name.endswith("_error") and math.isfinite(number(found, name))]
    return {name: _pair(found, name, f"{name}_error") for name in names}


KINDS: Mapping[str, Kind] = {"method": "own", "start": "start", "floor": "floor"}


def of_comparison(result: object) -> Result:
    """The rows of a comparison, as compare.json holds them, and chance."""
    rows, gains = [], []
    for found in _rows(result):
        name = text(found, "name")
        values = _accuracies(at(found, "probes")) | {key: Value(number(found, key)) for key in MEASURED}
        rows.append(Row(name, KINDS.get(text(found, "kind"), "floor"), values))
        gains.append(Gain("gain", name, _differences(at(found, "gain"))))
    chance = Value(number(result, "chance"))
    if chance.known:
        probes = [probe for probe in (*PROBES, *FEW) if any(probe in row.values for row in rows)]
        rows.append(Row("chance", "floor", dict.fromkeys(probes, chance)))
    return Result("", rows, gains, texts(result, "notes"), _counts(result))


def restoration_of(result: object) -> Result:
    """How well each method of a comparison restores images that it was not trained on, by task."""
    rows = []
    for found in _rows(result):
        errors = mapping(found, "restoration")
        values = {task: _pair(one, "error", "standard_error") for task, one in errors.items() if mapping(one)}
        if values:
            rows.append(Row(text(found, "name"), "own", values))
    return Result("Method", rows)


def _rows(result: object) -> list[dict[str, object]]:
    return [mapping(row) for row in sequence(result, "rows") if isinstance(row, dict)]


def tokenizers_of(row: object) -> list[Tokenizer] | None:
    """Of a method of a comparison that predicts words, by seed; None where it is not told whether there are some."""
    found = at(row, "tokenizers")
    if not isinstance(found, list):
        return None
    times = [(bool(at(one, "made")), number(one, "seconds")) for one in found]
    return [Tokenizer(made, seconds if math.isfinite(seconds) else None) for made, seconds in times]
