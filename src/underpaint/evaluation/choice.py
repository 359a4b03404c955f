"""The rate and the layer decay of fine-tuning, chosen by labels held out of training, before all of them are trained on.

No rate serves every network and number of labels: one that is not tuned can cost ten points, and favours whom it happens
to suit. So every network that is judged has the same grid, and the same share of its time to choose from it by successive
halving: all pairs are trained briefly, the better half of them twice as long from the start, and so on, each by its whole
schedule, until one is left.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

from underpaint.console import say
from underpaint.errors import InputError
from underpaint.evaluation.settings import FineTuning
from underpaint.files import write_json
from underpaint.reading import read_object
from underpaint.report.words import percent_text
from underpaint.train.schedules import Duration

RATES = (1.0, 0.25, 4.0, 16.0)  # times that of the recipe, which comes first: among equals it is kept
SHARE = (
    1 / 3
)  # of the minutes of a network; where its steps are counted, half as many come before them, which is the same
FEWEST = 8  # steps of the shortest training: fewer say nothing
HELD = 1_000  # labels to choose by, at most


class Tried(TypedDict):
    """A training that was made to choose."""

    lr: float
    layer_decay: float
    round: int
    accuracy: float  # on the held-out labels
    loss: float
    steps: int
    minutes: float  # with its test


@dataclass(frozen=True)
class Choice:
    """What was chosen: the settings, and all that was tried; nothing where there was nothing to choose, or no time."""

    config: FineTuning
    tried: list[Tried]

    @property
    def minutes(self) -> float:
        return sum(one["minutes"] for one in self.tried)


def grid(config: FineTuning, given: Mapping[str, object]) -> list[FineTuning]:
    """Pairs of rate and layer decay, that of the recipe first; what is given (`--set`) is not chosen."""
    rates = [1.0] if "lr" in given else RATES
    decays = [config.layer_decay] if "layer_decay" in given else dict.fromkeys([config.layer_decay, 1.0])
    return [replace(config, lr=rate * config.lr, layer_decay=decay) for rate in rates for decay in decays]


def length_of(pairs: int, whole: Duration) -> Duration:
    """Of the shortest training, so that all rounds together have their share of the whole."""
    parts = pairs * math.ceil(math.log2(pairs))
    minutes = None if whole.minutes is None else whole.minutes * SHARE / parts
    return Duration(round(whole.steps * SHARE / (1 - SHARE) / parts), minutes)


def choose(
    pairs: list[FineTuning],
    whole: Duration,
    tried_by: Callable[[FineTuning, Duration, Path], tuple[int, float, float]],
    folder: Path,
    settings: Mapping[str, object],
    who: str,
) -> Choice:
    """The pair that does best on held-out labels; the first where no time is left to choose.

    What was tried is kept in `folder`, so that a choice that was interrupted goes on; its networks are not.

    Args:
        whole: of the training that the choice is for, and of the choice itself where it is in minutes.
        tried_by: trains a pair for so long in a folder; steps, accuracy and loss on the held-out labels.
        settings: plain data, on which the choice depends.
        who: is trained, in a message.

    Raises:
        InputError: `folder` holds a choice by other settings.
    """
    if len(pairs) == 1:
        return Choice(pairs[0], [])
    first = length_of(len(pairs), whole)
    if first.minutes is None and first.steps < FEWEST:
        say(f"{who}: {whole.steps} steps are too few to choose a rate by: that of the recipe is taken")
        return Choice(pairs[0], [])
    file = folder / "choice.json"
    known: list[Tried] = []
    if file.is_file():
        stored = read_object(file)
        if stored.get("settings") != dict(settings):
            raise InputError(f"--out: {file} holds a choice by other settings; choose another path")
        known = list(stored["tried"])
    folder.mkdir(parents=True, exist_ok=True)
    tried: list[Tried] = []
    left, number = list(pairs), 0
    while len(left) > 1:
        length = Duration(first.steps * 2**number, None if first.minutes is None else first.minutes * 2**number)
        found: list[Tried] = []
        for config in left:
            place = folder / "choice" / f"{number}-{len(found)}"
            if len(known) > len(tried):
                found.append(known[len(tried)])
            else:
                began = time.perf_counter()
                steps, accuracy, loss = tried_by(config, length, place)
                minutes = (time.perf_counter() - began) / 60
                found.append(
                    Tried(
                        lr=config.lr,
                        layer_decay=config.layer_decay,
                        round=number + 1,
                        accuracy=accuracy,
                        loss=loss,
                        steps=steps,
                        minutes=minutes,
                    )
                )
                write_json(file, {"settings": dict(settings), "tried": [*tried, found[-1]]})
            tried.append(found[-1])
            shutil.rmtree(place, ignore_errors=True)
            if found[-1]["steps"] < FEWEST:
                say(f"{who}: {found[-1]['steps']} steps fit, too few to choose a rate by: that of the recipe is taken")
                return Choice(pairs[0], tried)
        ranked = sorted(range(len(left)), key=lambda k: (-found[k]["accuracy"], found[k]["loss"]))
        best = found[ranked[0]]
        left = [left[k] for k in ranked[: math.ceil(len(left) / 2)]]
        number += 1
    say(
        f"{who}: rate {best['lr']:g} per 256 images and layer decay {best['layer_decay']:g} are chosen of {len(pairs)} pairs "
        f"({percent_text(best['accuracy'])} % of the held-out labels after {best['steps']} steps); `--set` fixes them"
    )
    return Choice(left[0], tried)


def settings_of(config: FineTuning, **more: object) -> dict[str, object]:
    """What a choice depends on, as JSON gives it back."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return {**plain, **more}
