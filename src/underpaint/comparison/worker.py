"""One turn of one method of a comparison, in a process of its own: `python -m underpaint.comparison.worker TURN.json`.

A process of its own, so that memory is measured from the same start for each method, and a method that runs out of it
ends alone. Exit status as for the command line; the reason goes into the file that TURN.json names.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from underpaint.errors import InputError, Stopped
from underpaint.pretraining import pretrain
from underpaint.signals import Interrupted, answered_signals


def turn(plan: dict[str, Any], clock: Callable[[], float] = time.perf_counter) -> int:
    """Train until `stop_at` seconds of training by `clock` are done, or to the end."""
    try:
        pretrain(plan["data"], plan["out"], plan["recipe"], stop_at=float(plan["stop_at"]), clock=clock)
        return 0
    except (InputError, Stopped) as error:
        Path(plan["reason"]).write_text(" ".join(str(error).split()))
        return 2 if isinstance(error, InputError) else 3
    except Interrupted as error:
        return 128 + error.signal_number


def _end_with_parent() -> None:
    """The comparison holds the other end of standard input: when it is gone, checkpoint and end."""
    os.read(0, 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with answered_signals():
        sys.exit(turn(json.loads(Path(sys.argv[1]).read_text())))
