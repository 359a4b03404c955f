"""What each step is given: a run that was killed, in any epoch, sees the images that an unbroken one sees, in that order."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pictures
from forked import CommandLine
from safetensors.torch import load_file

from underpaint.train.run_folder import Run

IMAGES, BATCH, EPOCHS = 34, 8, 4
EACH = IMAGES // BATCH  # steps of an epoch; two images are left over
COMMAND = [
    *("--method", "mae", "--encoder", "vit_tiny_patch16_224", "--image-size", "16", "--patch-size", "4"),
    *(
        "--batch-size",
        str(BATCH),
        "--steps",
        str(EACH * EPOCHS),
        "--checkpoint-every",
        "3",
        "--set",
        "encoder.embed_dim=32",
    ),
    *("--set", "encoder.depth=1", "--set", "encoder.num_heads=2", "--set", "run.log_every=2"),
]
Given = dict[int, list[int]]  # by step, the images of all ranks
Start = Callable[..., tuple[Path, Given]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, server: CommandLine) -> Start:
    """A run that is killed at a step and goes on, or is not where that is None; and what its steps were given."""
    images = write_pictures(tmp_path_factory.mktemp("resume"), IMAGES, classes=1, size=16) / "class0"  # no labels
    unbroken: dict[Any, tuple[Path, Given]] = {}

    def run(die: int | None, processes: int, streamed: bool, workers: int) -> tuple[Path, Given]:
        key = processes, streamed, workers
        if die is None and key in unbroken:
            return unbroken[key]
        folder = tmp_path_factory.mktemp("run")
        command = ["pretrain", images, "--out", folder / "run", *COMMAND, "--workers", workers]
        command += ["--devices", processes] if processes > 1 else []
        command += ["--set", "data.cache_limit=0"] if streamed else []
        seen: list[dict[str, Any]] = []
        for count in [None] if die is None else [die, None]:
            record = folder / f"seen-{count}"
            done = server(*command, die=count and ("step", count), processes=processes, record=record)
            assert (done.status == 0) == (count is None), done.error
            for rank in range(processes):
                seen += map(json.loads, (record.with_name(f"{record.name}-{rank}")).read_text().splitlines())
        given: dict[int, dict[int, list[int]]] = {}
        for line in seen:  # a step that was made twice must have been given the same
            before = given.setdefault(line["step"], {}).setdefault(line["rank"], line["samples"])
            assert before == line["samples"], line
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["run"]  # one folder, of all ranks
        steps = {step: [image for rank in sorted(ranks) for image in ranks[rank]] for step, ranks in given.items()}
        if die is None:
            unbroken[key] = folder / "run", steps
        return folder / "run", steps

    return run


def check(start: Start, die: int, processes: int, streamed: bool, workers: int) -> None:
    whole, wanted = start(None, processes, streamed, workers)
    run, given = start(die, processes, streamed, workers)
    assert sorted(wanted) == list(range(EACH * EPOCHS))
    assert given == wanted
    epochs = [[image for k in range(EACH) for image in wanted[EACH * e + k]] for e in range(EPOCHS)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == EACH * BATCH
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS
    ours, theirs = (load_file(Run(each).checkpoints()[-1] / "state.safetensors") for each in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# the n-th call is step n - 1: in the middle of the first epoch, its last step, the first one of the second and third, and
# in the middle of these
@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(
    ("die", "processes", "streamed", "workers"),
    [
        (2, 1, False, 0),
        (5, 1, False, 0),
        (7, 1, False, 0),
        (11, 1, False, 0),
        (9, 1, True, 2),
        (7, 1, True, 2),
        (5, 2, False, 0),
        (11, 2, False, 0),
        (11, 2, True, 2),
    ],
)
def test_every_step_is_given_what_it_would_have_been(
    die: int, processes: int, streamed: bool, workers: int, start: Start
) -> None:
    check(start, die, processes, streamed, workers)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_before_any_step(processes: int, streamed: bool, workers: int, start: Start) -> None:
    for die in range(2, EACH * EPOCHS + 1):
        check(start, die, processes, streamed, workers)
