"""The loop: what a run leaves, and that nothing which ends it early changes what it would have become."""

import errno
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import pretrain
from conftest import word_file, write_pictures
from forked import CommandLine
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import slow_but

from underpaint import load_encoder
from underpaint.cli import main
from underpaint.config import Length, Optimiser, Recipe
from underpaint.errors import InputError, NotFinite, Stopped
from underpaint.methods import METHODS
from underpaint.prepare import planned_steps
from underpaint.seeds import ROLLED_BACK
from underpaint.train.run_folder import Run, training_state
from underpaint.train.schedules import Schedule
from underpaint.train.speed import TINY_FACTOR
from underpaint.train.stepper import Stepper

TINY: dict[str, Any] = {
    "encoder": "vit_tiny_patch16_224",
    "image_size": 16,
    "patch_size": 4,
    "batch_size": 16,
}
SMALL = {"encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2, "run.log_every": 2}
TIMINGS = ("seconds", "images_per_second", "data_wait")
COMMAND = [
    *("--encoder", "vit_tiny_patch16_224", "--image-size", "16", "--patch-size", "4", "--batch-size", "16"),
    *("--set", "encoder.embed_dim=32", "--set", "encoder.depth=2", "--set", "encoder.num_heads=2"),
]


def words(name: str, pictures: Path) -> dict[str, Any]:
    """Settings of methods that predict words: few of k-means, or a file, since training one takes longer."""
    if name in ("beit", "cae"):
        return {"method.codebook_size": 32}
    return {"method.tokenizer": str(word_file(pictures))} if name == "cim" else {}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def last_state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(Run(run).checkpoints()[-1] / "state.safetensors")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_run_leaves_what_is_promised(name: str, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    settings = SMALL | words(name, pictures)
    run = pretrain(pictures, tmp_path / "run", method=name, steps=8, settings=settings, probe_every=4, **TINY)
    said = capsys.readouterr().out
    assert "90 images" in said
    assert ("making a tokenizer: kmeans, 32 words of 4 px" in said) == (name in ("beit", "cae"))
    assert run.tokenizer.is_file() == (name in ("beit", "cae", "cim"))
    assert "images/s" in said
    assert "gain over untrained, points" in said
    assert "Under the linear probe the encoder is" in said
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    for line in lines[1:]:
        assert set(line) >= {"images", "loss", "terms", "lr", "gradient_norm", *TIMINGS}
        assert np.isfinite(line["loss"])
        assert line["terms"]["baseline"] > 0
    assert [line["step"] for line in lines if "probe" in line] == [0, 4, 8]
    assert set(lines[-1]["probe"]) >= {"linear", "linear_error", "attentive", "knn", "rank"}
    for file in (
        *("recipe.yaml", "environment.json", "encoder.safetensors", "encoder.json", "skipped.jsonl"),
        *("report.html", "probes.json", "tensorboard", "pictures/restore-00000008.webp"),
    ):
        assert (run.path / file).exists(), file
    probes = json.loads((run.path / "probes.json").read_text())
    assert set(probes) >= {"encoder", "untrained", "raw_pixels", "hog", "majority", "chance", "gain"}
    assert not list(run.path.rglob("*.part"))
    trained, start = run.load(), load_file(run.path / "encoder.safetensors")
    assert trained is not None
    assert torch.equal(trained[0]["method.encoder.model.norm.weight"], start["norm.weight"])
    assert load_encoder(run.path)(torch.zeros(1, 3, 16, 16)).pooled.shape == (1, 32)


@pytest.mark.quick
def test_epochs_are_whole_passes_of_whole_batches() -> None:
    recipe = Recipe(optimiser=Optimiser(batch_size=8), run=Length(epochs=4.0))
    assert planned_steps(recipe, 34, math.nan) == 16  # each pass leaves two images out
    assert planned_steps(recipe, 32, math.nan) == 16
    assert planned_steps(recipe, 4, math.nan) == 2  # of 8 images each
    assert planned_steps(Recipe(optimiser=Optimiser(batch_size=256), run=Length(epochs=0.5)), 50_000, math.nan) == 98


def test_the_same_recipe_repeats_the_run(pictures: Path, tmp_path: Path) -> None:
    first = pretrain(pictures, tmp_path / "first", steps=4, settings=SMALL, **TINY)
    again = pretrain(pictures, tmp_path / "again", recipe=str(first.path / "recipe.yaml"))
    assert metrics(first.path) == metrics(again.path)
    other = pretrain(pictures, tmp_path / "other", recipe=str(first.path / "recipe.yaml"), seed=1)
    assert metrics(other.path) != metrics(first.path)


class Unbroken(dict[str, Path]):
    """A run of each method that nothing ended early, made when it is asked for."""

    def __init__(self, folder: Path, pictures: Path, server: CommandLine):
        self.folder, self.pictures, self.server = folder, pictures, server

    def __missing__(self, name: str) -> Path:
        self[name] = self.folder / name
        done = self.server(*resumable(name, self.pictures, self[name]))
        assert done.status == 0, done.error
        return self[name]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, pictures: Path, server: CommandLine) -> dict[str, Path]:
    return Unbroken(tmp_path_factory.mktemp("unbroken"), pictures, server)


def resumable(name: str, pictures: Path, out: Path) -> list[str]:
    return [
        *("pretrain", str(pictures), "--out", str(out), "--method", name, "--steps", "12", *COMMAND),
        *("--workers", "2", "--checkpoint-every", "3", "--probe-every", "6"),
        *("--set", "optimiser.accumulation=2", "--set", "run.log_every=2"),
        *(part for key, value in words(name, pictures).items() for part in ("--set", f"{key}={value}")),
    ]


@pytest.mark.xdist_group("unbroken")
@pytest.mark.parametrize(
    ("name", "moment", "count"),
    [
        ("energy", "step", 8),  # of 12; a checkpoint every 3
        ("energy", "save", 3),  # calls 1, 2: step 0 and step 3
        ("energy", "probe", 2),  # call 1: step 0
        ("mae", "step", 5),
        ("mae", "save", 4),
        ("cae", "step", 5),
        ("cae", "save", 3),
        ("cim", "step", 5),
        ("cae", "probe", 1),  # the tokenizer is there, a checkpoint is not
    ],
)
def test_killed_at_any_moment_is_never_killed(
    name: str, moment: str, count: int, pictures: Path, unbroken: dict[str, Path], server: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    died = server(*resumable(name, pictures, out), die=(moment, count))
    assert died.status == -9, died.error
    assert len(metrics(out)) < len(metrics(unbroken[name]))
    resumed = server(*resumable(name, pictures, out))
    assert resumed.status == 0, resumed.error
    if (name, moment) != ("cae", "probe"):
        began = int(resumed.out.partition("going on from step ")[2].partition(" ")[0])
        assert began > 0
    assert metrics(out) == metrics(unbroken[name])
    ours, theirs = last_state(out), last_state(unbroken[name])
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key  # weights and optimiser state, bit for bit
    assert (out / "encoder.safetensors").read_bytes() == (unbroken[name] / "encoder.safetensors").read_bytes()


@pytest.mark.xdist_group("unbroken")
def test_sigterm_saves_first_and_goes_on_from_there(
    pictures: Path, unbroken: dict[str, Path], server: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stopped = server(*resumable("energy", pictures, out), die=("term", 8))
    assert stopped.status == 143, stopped.error
    assert "interrupted" in stopped.error
    found = Run(out).load()
    assert found is not None
    step = found[1]["step"]
    assert step > 0
    resumed = server(*resumable("energy", pictures, out))
    assert f"going on from step {step} of 12" in resumed.out
    assert metrics(out) == metrics(unbroken["energy"])
    assert torch.equal(last_state(out)["method.head.weight"], last_state(unbroken["energy"])["method.head.weight"])


# in `make test` those with words, a batch norm or a loss in parts; test_ranks.py holds the gradients of all
@pytest.mark.xdist_group("unbroken")
@pytest.mark.parametrize("name", slow_but("cim", "localmim"))
def test_two_processes_make_the_loss_of_one(
    name: str, pictures: Path, unbroken: dict[str, Path], server: CommandLine, tmp_path: Path
) -> None:
    done = server(*resumable(name, pictures, tmp_path / name), "--devices", "2", processes=2)
    assert done.status == 0, done.error
    same_losses(tmp_path / name, unbroken[name])


@pytest.mark.xdist_group("unbroken")
def test_a_run_starts_its_other_processes_itself(pictures: Path, unbroken: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "underpaint.cli", *resumable("mae", pictures, tmp_path / "run"), "--devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    same_losses(tmp_path / "run", unbroken["mae"])


def same_losses(two: Path, one: Path) -> None:
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        if ours["loss"] is not None:
            # weights whose gradient is rounding noise (a key's bias) drift apart under AdamW, without effect
            first = ours["step"] == 2
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5 if first else 2e-4)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4 if first else 2e-3)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    run = pretrain(pictures, tmp_path / "run", steps=4, settings=SMALL, checkpoint_every=2, **TINY)
    newest = run.checkpoints()[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8] + b"12345678")
    found = run.load()
    assert found is not None
    assert found[1]["step"] < 4
    assert "is damaged" in capsys.readouterr().err


def test_more_steps_extend_a_run_and_other_settings_are_refused(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    pretrain(pictures, out, steps=4, settings=SMALL, **TINY)
    before = metrics(out)
    pretrain(pictures, out, steps=6)
    assert "going on from step 4 of 6" in capsys.readouterr().out
    assert metrics(out)[: len(before)] == before
    assert metrics(out)[-1]["step"] == 6
    with pytest.raises(InputError, match=r"optimiser.batch_size: 16 in the run, 8 now.*method.name|method.name.*batch"):
        pretrain(pictures, out, batch_size=8, method="mae")
    assert main(["pretrain", str(pictures), "--out", str(out), "--seed", "5"]) == 2
    assert "run.seed: 0 in the run, 5 now" in capsys.readouterr().err


def test_a_run_made_longer_says_so_and_warms_up_again(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    """From the rate that it had to that of the longer schedule, without a jump; a kill on the way changes nothing."""

    def cosine(step: int, steps: int) -> float:  # of the recipe below: peak 1.6e-3 * 16 / 256, a fifth to warm up
        return (
            1e-4
            * np.interp(step, [0, steps / 5], [0, 1])
            * (1.0 if step < steps / 5 else 0.5 + 0.5 * np.cos(np.pi * (step / steps - 0.2) / 0.8))
        )

    def rates(run: Path) -> dict[int, float]:
        return {line["step"]: line["lr"] for line in metrics(run)}

    out, settings = tmp_path / "run", {**SMALL, "optimiser.lr": 1.6e-3, "optimiser.warmup": 0.2, "run.log_every": 1}
    pretrain(pictures, out, steps=5, checkpoint_every=1, settings=settings, **TINY)
    shutil.copytree(out, tmp_path / "early")
    assert "in place of" not in capsys.readouterr().out
    pretrain(pictures, out, steps=25)
    assert "25 steps in place of 5: the learning rate was 0 at step 5" in capsys.readouterr().out
    found = rates(out)
    assert found[5] == pytest.approx(0, abs=1e-12)
    for step in (6, 7, 8):  # a fifth of the 20 steps that were added
        assert found[step] == pytest.approx((step - 5) / 4 * cosine(step, 25))
    for step in range(9, 26):
        assert found[step] == pytest.approx(cosine(step, 25), abs=1e-12)

    # made longer before it ended; and the same, ended and taken up within the second warm-up
    early, broken = tmp_path / "early", tmp_path / "broken"
    shutil.rmtree(Run(early).checkpoints()[-1])
    shutil.copytree(early, broken)
    pretrain(pictures, early, steps=12)
    assert "12 steps in place of 5: the learning rate was 1.46e-05 at step 4" in capsys.readouterr().out
    had, found = cosine(4, 5), rates(early)
    assert found[5] == pytest.approx(had + (cosine(5, 12) - had) / (0.2 * 8))
    assert found[6] == pytest.approx(cosine(6, 12))
    pretrain(pictures, broken, steps=12, stop_at=0.0)
    assert max(rates(broken)) == 5
    pretrain(pictures, broken, steps=12)
    assert rates(broken) == found
    ours, theirs = last_state(broken), last_state(early)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_bad_batches_are_left_out_named_and_rolled_back(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, bad_steps = Stepper.step, {2, 5, 6, 7}
    seen: list[int] = []

    def sometimes_bad(current: Stepper, batch: Any, step: int, factor: float) -> Any:
        if factor == TINY_FACTOR:  # measured, before the first step
            return real(current, batch, step, factor)
        seen.append(step)
        if step in bad_steps and current.seed == 0:
            batch = batch._replace(images=batch.images * float("nan"))
        before = {key: value.clone() for key, value in current.task.state_dict().items()}
        result = real(current, batch, step, factor)
        if step in bad_steps and current.seed == 0:
            for key, value in current.task.state_dict().items():
                assert torch.equal(value, before[key])  # the batch changed nothing
        return result

    monkeypatch.setattr(Stepper, "step", sometimes_bad)
    run = pretrain(pictures, tmp_path / "run", steps=10, settings=SMALL, checkpoint_every=4, probe_every=100, **TINY)
    named = run.lines("not-finite.jsonl")
    assert [line["step"] for line in named] == [3, 6, 7, 8]  # counted from 1, as in the metrics
    assert len(named[0]["paths"]) == 16
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 8, 9]  # back to the checkpoint of step 4, other batches
    assert [line["step"] for line in metrics(run.path)] == [0, 2, 4, 6, 8, 10]
    assert all(line["loss"] is not None for line in metrics(run.path)[1:])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures without labels, so that a probe on the way costs next to nothing."""
    return write_pictures(tmp_path_factory.mktemp("plain"), 48, classes=1)


def ticking() -> Callable[[], float]:
    """A clock that moves on by a tenth of a second whenever it is read: the loop reads it four times a step."""
    readings = itertools.count()
    return lambda: 0.1 * next(readings)


class Failing:
    """Steps of which some have no finite loss, by (roll-back, step) with steps counted from 0. Keeps what it saw."""

    def __init__(self, bad: set[tuple[int, int]], dies_at: int | None = None):
        self.bad, self.dies_at = bad, dies_at
        self.seen: list[tuple[int, int, dict[str, torch.Tensor], list[int], float]] = []

    def into(self, monkeypatch: pytest.MonkeyPatch) -> "Failing":
        real = Stepper.step

        def step(current: Stepper, batch: Any, step: int, factor: float) -> Any:
            if factor == TINY_FACTOR:  # measured, before the first step
                return real(current, batch, step, factor)
            if step == self.dies_at:
                self.dies_at = None
                raise RuntimeError("pulled out")
            rollback = current.seed // ROLLED_BACK
            state = {key: value.clone() for key, value in training_state(current.task, current.optimiser).items()}
            if (rollback, step) in self.bad:
                batch = batch._replace(images=batch.images * float("nan"))
            numbers, bad = real(current, batch, step, factor)
            assert bool(bad) == ((rollback, step) in self.bad)
            self.seen.append((rollback, step, state, list(batch.samples), float(numbers["loss"][0])))
            return numbers, bad

        monkeypatch.setattr(Stepper, "step", step)
        return self


def test_a_roll_back_is_the_checkpoint_bit_for_bit_with_other_data(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing({(0, 5), (0, 6), (0, 7), (1, 7), (1, 8), (1, 9)}).into(monkeypatch)
    settings = SMALL | {"run.log_every": 1, "run.checkpoint_every": 4, "run.probe_every": 1000}
    run = pretrain(
        plain, tmp_path / "run", method="mae", steps=10, settings=settings, stop_at=1e9, clock=ticking(), **TINY
    )
    # checkpoints at 4 and, within the second streak, at 8
    steps = [(rollback, step) for rollback, step, *_ in failing.seen]
    assert steps == [*((0, k) for k in range(8)), *((1, k) for k in range(4, 10)), (2, 8), (2, 9)]
    by = {(rollback, step): (state, samples, loss) for rollback, step, state, samples, loss in failing.seen}
    for one, other in (((0, 4), (1, 4)), ((1, 8), (2, 8))):
        assert set(by[one][0]) == set(by[other][0])
        assert all(torch.equal(value, by[other][0][key]) for key, value in by[one][0].items())
        assert by[one][1] != by[other][1]
    kept = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6), (1, 7), (2, 8), (2, 9)]
    lines = run.lines("metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(11))
    for line, key in zip(lines[1:], kept, strict=True):
        loss = by[key][2]
        assert line["loss"] is None if math.isnan(loss) else line["loss"] == pytest.approx(loss, rel=1e-6)
    assert [line["step"] for line in run.lines("not-finite.jsonl")] == [6, 7, 8, 8, 9, 10]
    # the time of the steps that failed is spent: 0.3 s each of 16, and so it is said
    assert lines[-1]["seconds"] == pytest.approx(0.3 * (8 + 6 + 2))
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("lr")] == list(range(11))
    numbers = [json.loads((one / "state.json").read_text()) for one in run.checkpoints()]
    assert [(one["step"], one["rollbacks"], one["bad"]) for one in numbers][-2:] == [(8, 2, 6), (10, 2, 6)]


@pytest.mark.parametrize("checkpoint_every", [4, 5])
def test_a_run_cut_off_among_bad_steps_is_as_if_it_was_not(
    checkpoint_every: int, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpoints every 4 steps there is one within the streak of three, at which the run is paused; with one every
    5 it dies after two of them were named, and makes them again."""
    bad = {(0, 6), (0, 7), (0, 8)}
    settings = SMALL | {"run.checkpoint_every": checkpoint_every, "run.probe_every": 1000}
    given: dict[str, Any] = {"method": "mae", "steps": 12, "settings": settings, **TINY}
    with monkeypatch.context() as patched:
        Failing(bad).into(patched)
        whole = pretrain(plain, tmp_path / "whole", stop_at=1e9, clock=ticking(), **given)
    failing = Failing(bad, dies_at=None if checkpoint_every == 4 else 8).into(monkeypatch)
    assert failing.bad
    if checkpoint_every == 4:
        pretrain(plain, tmp_path / "cut", stop_at=0.3 * 7 + 0.15, clock=ticking(), **given)
        assert Run(tmp_path / "cut").lines("metrics.jsonl")[-1]["step"] == 8
    else:
        with pytest.raises(RuntimeError, match="pulled out"):
            pretrain(plain, tmp_path / "cut", stop_at=1e9, clock=ticking(), **given)
    cut = pretrain(plain, tmp_path / "cut", stop_at=1e9, clock=ticking(), **given)
    assert cut.lines("not-finite.jsonl") == whole.lines("not-finite.jsonl")
    assert [line["loss"] for line in metrics(cut.path)] == [line["loss"] for line in metrics(whole.path)]
    ours, theirs = last_state(cut.path), last_state(whole.path)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_compiling_is_no_part_of_the_time_of_any_turn(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn is a process that compiles again; what stands for the compiler here takes 100 seconds at the first call."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.1
        return now

    class Compiled(torch.nn.Module):
        def __init__(self, method: torch.nn.Module):
            super().__init__()
            self.method, self.ready = method, False

        def forward(self, *given: Any) -> Any:
            nonlocal now
            now, self.ready = now + 100.0 * (not self.ready), True
            return self.method(*given)

    given: dict[str, Any] = {"method": "mae", "minutes": 0.1, "probe_every": 1000, **TINY}
    pretrain(plain, tmp_path / "as-it-is", settings=SMALL, stop_at=1e9, clock=clock, **given)
    monkeypatch.setattr(torch, "compile", Compiled)
    monkeypatch.setenv("CXX", "sh")  # some compiler is there
    for stop_at in (3.0, 1e9):
        pretrain(plain, tmp_path / "run", settings=SMALL | {"run.compile": "on"}, stop_at=stop_at, clock=clock, **given)
    run = Run(tmp_path / "run")
    assert run.recipe().measured["compile"]
    last, other = (Run(tmp_path / name).lines("metrics.jsonl")[-1] for name in ("run", "as-it-is"))
    assert last["seconds"] == pytest.approx(6.0, abs=0.35)
    assert abs(last["step"] - other["step"]) <= 1
    assert last["step"] >= 19


def test_float16_trains_leaves_out_what_is_not_finite_and_keeps_its_scale(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing({(0, 2)}).into(monkeypatch)
    settings = SMALL | {"run.precision": "16"}
    given: dict[str, Any] = {"method": "mae", "steps": 6, "settings": settings, "probe_every": 1000, **TINY}
    for stop_at in (0.3 * 3 + 0.15, 1e9):
        run = pretrain(plain, tmp_path / "run", stop_at=stop_at, clock=ticking(), **given)
    by = {step: state for _, step, state, *_ in failing.seen}
    weights = [key for key in by[2] if key.startswith("method.")]
    assert all(torch.equal(by[2][key], by[3][key]) for key in weights)  # step 2 changed nothing
    assert not all(torch.equal(by[3][key], by[4][key]) for key in weights)
    found = run.load()
    assert found is not None
    assert found[1]["scaler"]["scale"] == 2.0**15  # torch begins with 2 ** 16, and halves it where a step failed
    assert found[1]["scaler"]["_growth_tracker"] == 3  # good steps since, those before the stop_at included
    assert all(torch.isfinite(value).all() for value in found[0].values())


def test_a_loss_that_stays_not_finite_ends_with_status_3(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = Stepper.step

    def always_bad(current: Stepper, batch: Any, step: int, factor: float) -> Any:
        return real(current, batch._replace(images=batch.images * float("nan")) if step > 3 else batch, step, factor)

    monkeypatch.setattr(Stepper, "step", always_bad)
    out = tmp_path / "run"
    command = ["pretrain", str(pictures), "--out", str(out), *COMMAND, "--steps", "20", "--checkpoint-every", "2"]
    assert main(command) == 3
    assert "stayed not finite (10 batches" in capsys.readouterr().err
    found = Run(out).load()
    assert found is not None
    assert all(torch.isfinite(value).all() for value in found[0].values())


def test_minutes_become_steps_by_measuring(pictures: Path, tmp_path: Path) -> None:
    run = pretrain(pictures, tmp_path / "run", minutes=0.01, settings=SMALL, **TINY)
    measured = run.recipe().measured
    assert measured["steps"] == max(1, round(0.6 / measured["seconds_per_step"]))
    assert metrics(run.path)[-1]["step"] == measured["steps"]


def test_sixty_broken_files_among_a_thousand_are_named_and_not_fatal(tmp_path: Path) -> None:
    from test_data_decode import broken_files  # the ten kinds

    folder = write_pictures(tmp_path / "images", 1000, size=20)
    names = []
    kinds = list(broken_files().items())[:10]
    for k, (kind, (data, _)) in enumerate(kinds * 6):
        name = f"class{k % 3}/broken{k}-{kind}"
        (folder / name).write_bytes(data)
        names.append(name)
    assert len(names) == 60
    run = pretrain(folder, tmp_path / "run", steps=4, settings=SMALL, **{**TINY, "batch_size": 64})
    skipped = {line["path"]: line["reason"] for line in run.lines("skipped.jsonl")}
    assert sorted(skipped) == sorted(names)
    assert all(skipped.values())
    assert metrics(run.path)[-1]["step"] == 4


def test_init_from_a_run_starts_where_it_ended(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    first = pretrain(pictures, tmp_path / "first", steps=4, settings=SMALL, **TINY)
    pretrain(pictures, tmp_path / "second", init=str(first.path), steps=1, settings=SMALL, method="mae", **TINY)
    assert "weights taken as they are, 0 adapted" in capsys.readouterr().out
    ended, began = metrics(first.path)[-1]["probe"], metrics(tmp_path / "second")[0]["probe"]
    assert began["linear"] == ended["linear"]


def test_no_labels_gives_the_rank(tmp_path: Path, capsys: Any) -> None:
    write_pictures(tmp_path / "images", 40, classes=1)
    run = pretrain(tmp_path / "images", tmp_path / "run", steps=2, settings=SMALL, **TINY)
    assert json.loads((run.path / "probes.json").read_text())["rank"]["dim"] == 32
    assert "give --labels" in capsys.readouterr().out


@pytest.mark.quick
def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(0.1)
    assert [schedule.factor(0, share) for share in (0.0, 0.05, 0.1)] == [0, 0.5, 1]
    assert schedule.factor(0, 0.55) == pytest.approx(0.5)
    assert schedule.factor(0, 1.0) == pytest.approx(0)
    assert Schedule(0.0).factor(0, 0.0) == 1


def test_nan_everywhere_from_the_first_step(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda c, b, s, r: real(c, b._replace(images=b.images * float("nan")), s, r))
    with pytest.raises(NotFinite):
        pretrain(pictures, tmp_path / "run", steps=40, settings=SMALL, **TINY)


def test_a_checkpoint_is_written_beside_the_training(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps go on while it is written, and change nothing of it; the next one waits for it."""
    save, step, stepped, order = Run.save, Stepper.step, threading.Event(), list[str]()

    def slow(run: Run, number: int, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        before = {name: value.clone() for name, value in tensors.items()}
        if number == 2:
            assert stepped.wait(30)
        assert all(torch.equal(value, before[name]) for name, value in tensors.items())
        save(run, number, tensors, *rest)
        order.append(f"saved {number}")

    def watched(current: Stepper, batch: Any, number: int, factor: float) -> Any:
        made = step(current, batch, number, factor)
        if factor != TINY_FACTOR:
            order.append(f"step {number + 1}")
            if number == 2:
                stepped.set()
        return made

    monkeypatch.setattr(Run, "save", slow)
    monkeypatch.setattr(Stepper, "step", watched)
    settings = SMALL | {"run.checkpoint_every": 2, "run.probe_every": 1000}
    pretrain(plain, tmp_path / "run", method="mae", steps=6, settings=settings, **TINY)
    assert order.index("step 3") < order.index("saved 2") < order.index("saved 4")
    assert order[-1] == "saved 6"


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Run.save

    def full(run: Run, number: int, *rest: Any) -> None:
        if number == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(run.path / "checkpoints"))
        save(run, number, *rest)

    monkeypatch.setattr(Run, "save", full)
    settings = SMALL | {"run.checkpoint_every": 2, "run.probe_every": 1000, "run.log_every": 1}
    with pytest.raises(Stopped, match="checkpoints: No space left on device; the checkpoint of step 0 is kept"):
        pretrain(plain, tmp_path / "run", method="mae", steps=6, settings=settings, **TINY)
    assert metrics(tmp_path / "run")[-1]["step"] in (2, 3, 4)
