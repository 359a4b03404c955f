"""Run the command line and kill this process with SIGKILL at a chosen moment.

Arguments: the moment (step, save, probe, judge, term or never), the count of the event at which to die, then those of `underpaint`.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from underpaint import pretraining as train
from underpaint.cli import main
from underpaint.evaluate import probes
from underpaint.train import run_folder as runs

seen = 0


def dying(function: Any, count: int, before_dying: Any = None) -> Any:
    """`function`, whose `count`-th call is the last thing that this process does."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        global seen
        seen += 1
        if seen == count:
            if before_dying:
                before_dying(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return wrapped


def half_a_file(_: Any, path: Path) -> None:
    Path(path).write_bytes(b"half of a checkpoint")


def arm(moment: str, count: int) -> None:
    """From here on this process ends at the `count`-th event of that kind."""
    if moment == "step":
        train.update = dying(train.update, count)
    elif moment == "save":
        runs.save_file = dying(runs.save_file, count, half_a_file)
    elif moment == "probe":
        probes.ProbeSuite.quick = dying(probes.ProbeSuite.quick, count)
    elif moment == "judge":  # trained, and the last checkpoint written
        probes.ProbeSuite.restoration = dying(probes.ProbeSuite.restoration, count)
    elif moment == "term":
        real, calls = train.update, 0

        def told(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)

        train.update = told


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
