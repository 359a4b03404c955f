"""Commands of `underpaint` in processes of their own that need not import torch again.

A server imports everything once and forks a child a command, before it has computed anything: a fork of a process whose
thread pools have run would hang. It reads a request a line from stdin, and answers each with the child's exit status.
"""

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# what commands import when they need it
IMPORTED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.pyplot",
    "sklearn.manifold",
    "underpaint.comparison.run",
    "underpaint.evaluation.runner",
    "underpaint.exporting.export",
    "underpaint.prediction",
    "underpaint.report",
    "underpaint.tokenize",
    "underpaint.pretraining",
    "underpaint.inference",
)


@dataclass
class Ended:
    """What became of a command."""

    status: int  # exit status; minus the signal where one ended it
    out: str
    error: str
    statuses: tuple[int, ...] = ()  # of each process, and what it says to stderr
    errors: tuple[str, ...] = ()


class CommandLine:
    """`underpaint ARGUMENTS` as a user runs it, in a fork of a process that has torch imported."""

    def __init__(self, folder: Path):
        self.folder, self.scratch = folder, tempfile.TemporaryDirectory(prefix="up-")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(
        self,
        *arguments: Any,
        die: tuple[str, int] | None = None,
        dies: int | None = None,
        processes: int = 1,
        record: Path | None = None,
        environments: Sequence[dict[str, str]] | None = None,
        function: str = "",
    ) -> Ended:
        """Run a command; with `die` it is killed at that moment (`killed.arm`), or of several processes the one of rank `dies`;
        with `record` each process writes there what its steps are given (`killed.record`).

        Several `processes` know of each other as those that torchrun starts, or by their `environments`. A `function`,
        "MODULE:NAME", is run in place of a command. Returned are what the first one says, and the first status that is
        not 0.
        """
        out, error = self.folder / "stdout", self.folder / "stderr"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "out": str(out),
            "error": str(error),
            "die": die,
            "dies": dies,
            "function": function,
            "record": record and str(record),
            "environments": environments or (torchrun(processes) if processes > 1 else [{}]),
            "cache": str(self.folder / "cache"),
            "scratch": self.scratch.name,
        }
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the server of commands has ended"
        statuses = json.loads(answer)
        errors = [Path(said(str(error), rank)).read_text() for rank in range(len(statuses))]
        status = next(filter(None, statuses), 0)
        return Ended(status, out.read_text(), errors[0], tuple(statuses), tuple(errors))

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.kill()  # it waits for requests; a process that a test left behind may hold its pipe open
        self.server.wait(60)
        self.server.stdout.close()
        self.scratch.cleanup()


def said(file: str, rank: int) -> str:
    """Where a process of this rank writes what it says."""
    return file if rank == 0 else f"{file}-{rank}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(processes: int, machines: int = 1) -> list[dict[str, str]]:
    """The environment of each of several processes on this machine, as torchrun makes it on so many."""
    local = processes // machines
    shared = {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": local}
    ranks = [
        shared | {"RANK": rank, "LOCAL_RANK": rank % local, "GROUP_RANK": rank // local} for rank in range(processes)
    ]
    return [{name: str(value) for name, value in each.items()} for each in ranks]


def srun(processes: int) -> list[dict[str, str]]:
    """The same of tasks on one machine, as SLURM makes it."""
    shared = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "tests", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": 0}
    shared |= {"SLURM_NTASKS": processes, "SLURM_NTASKS_PER_NODE": processes, "SLURM_NNODES": 1}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [shared | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in each.items()} for each in ranks]


def run(request: dict[str, Any], rank: int) -> NoReturn:
    """A request, in a process that ends with it."""
    import killed

    import underpaint.cli

    status = 1
    try:
        for number, name in ((1, "out"), (2, "error")):
            os.dup2(os.open(said(request[name], rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(request["environments"][rank], UNDERPAINT_CACHE=request["cache"])
        os.makedirs(request["scratch"], exist_ok=True)
        tempfile.tempdir = request["scratch"]
        if request["record"]:
            killed.record(f"{request['record']}-{rank}")
        if request["die"] and request["dies"] in (None, rank):
            killed.arm(*request["die"])
        if request["function"]:
            module, _, name = request["function"].partition(":")
            status = getattr(importlib.import_module(module), name)(*request["arguments"]) or 0
        else:
            sys.argv = ["underpaint", *request["arguments"]]
            status = underpaint.cli.main(request["arguments"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    import numpy as np
    import pyarrow as pa
    import torch

    for name in IMPORTED:
        importlib.import_module(name)
    pa.array(np.zeros(1))  # imports what it finds
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a child would copy every page of what was imported
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank in range(len(request["environments"])):
            child = os.fork()
            if child == 0:
                run(request, rank)
            children.append(child)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        answers.write(f"{json.dumps(ended)}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
