"""Where a run stands: going on, finished, or stopped before its end."""

import math
from pathlib import Path
from typing import Literal, NamedTuple

from underpaint.locking import at_work
from underpaint.report.reading import Lines, number, read_json


class Standing(NamedTuple):
    """Where a run stands after the last line of its metrics.

    Attributes:
        step, steps: those that were made, and those that there will be; nan where that is not known.
        left: seconds of training to the end; nan where that is not known.
    """

    word: Literal["going", "finished", "stopped"]
    step: float
    steps: float
    left: float

    @property
    def share(self) -> float:
        """Of the run that is done, nan where that is not known."""
        return self.step / self.steps if self.steps > 0 else math.nan


def standing(run: Path, lines: Lines, recipe: object, going: bool | None = None) -> Standing:
    """Where a run stands; `going` says whether a process works on it, where that is known."""
    step = number(lines[-1], "step") if lines else 0.0
    steps = number(recipe, "measured", "steps")
    ended = not step < steps and (math.isnan(steps) or (run / "probes.json").is_file())
    word = "finished" if ended else "stopped"
    if (at_work(run) if going is None else going) and not (ended and steps > 0):
        word = "going"
    late = [line for line in lines if number(line, "step") > 0][-max(2, len(lines) // 4) :]
    left = math.nan
    if late and (made := step - number(late[0], "step")) > 0:
        left = (number(late[-1], "seconds") - number(late[0], "seconds")) / made * max(0.0, steps - step)
    return Standing(word, step, steps, left)


def probes_of(run: Path, stands: Standing) -> dict[str, object]:
    """The probes at the end of a run; none where it is not there, as where one that had ended was made longer."""
    return read_json(run / "probes.json") if stands.word == "finished" else {}
