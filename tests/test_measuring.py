"""What is found out about a run before its first step: the machine's rate, the cost of a step, how long it takes."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from tiny import made, photographs, stepping

from underpaint import planning, pretraining
from underpaint.cli import main
from underpaint.data import Batch
from underpaint.errors import InputError
from underpaint.recipes import RECIPES
from underpaint.train import devices, speed
from underpaint.train.speed import measure
from underpaint.train.stepper import Stepper


class Clock:
    """Moves by so many seconds a step, each in its turn, the last for good; and by an image's share of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[float], batch: int):
        self.now, self.seconds, self.images = 0.0, iter(seconds), list[int]()
        self.last = seconds[0]
        step = Stepper.step

        def stepped(current: Stepper, given: Batch, *arguments: Any) -> Any:
            self.images.append(len(given.images))
            if len(given.images) == batch:
                self.last = next(self.seconds, self.last)
            self.now += self.last * len(given.images) / batch
            return step(current, given, *arguments)

        monkeypatch.setattr(Stepper, "step", stepped)

    def __call__(self) -> float:
        return self.now


def measured(monkeypatch: pytest.MonkeyPatch, seconds: list[float], steps: int, **given: Any) -> tuple[Any, Clock]:
    """What is measured where whole steps take these seconds, and what it took."""
    size = 64
    clock = Clock(monkeypatch, seconds, size)
    current = stepping(made("mae"), batch=size)
    batch = Batch(photographs(size), list(range(size)))
    return measure(current, [batch], False, lambda _: steps, lambda _: None, clock, **given), clock


def test_first_steps_are_slow_and_are_not_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, clock = measured(monkeypatch, [1.6, 1.2, 1.8, 2.0, 0.5], 10_000)
    assert found["seconds_per_step"] == 0.5
    assert clock.images == [8, *[64] * 7]  # an eighth, four slow ones, and three that take equal times
    again, _ = measured(monkeypatch, [1.6, 1.2, 1.8, 2.0, 0.5], 10, exact=True)  # a minute, say
    assert again["seconds_per_step"] == 0.5


@pytest.mark.parametrize(
    ("step", "steps", "most"), [(3.0, 10_000, 20.0), (9.0, 10_000, 20.0), (0.5, 100, 2.5), (2.0, 5, 2.25)]
)
def test_steps_are_timed_for_so_long(step: float, steps: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found, clock = measured(monkeypatch, [step, 1.2 * step] * 20, steps)  # never settled
    assert clock() <= max(most, 1.125 * step) + 0.2 * step  # a step and an eighth are always made; the last may be slow
    assert step <= found["seconds_per_step"] <= 1.21 * step


def test_a_step_that_would_take_too_long_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "restart_peak", lambda: 2**30)
    monkeypatch.setattr(speed, "peak", lambda: 2**30 + 2**20 + 16 * weights)
    weights = sum(each.numel() for each in made("mae").parameters() if each.requires_grad)
    found, clock = measured(monkeypatch, [80.0], 10_000)
    assert found["seconds_per_step"] == 80.0
    assert clock.images[0] == 8
    assert clock() <= 20.0  # none of all images
    held = (2**30 + 16 * weights + 8 * 2**20) / 2**30
    assert found["memory_gib"] == pytest.approx(held, abs=0.01)


def test_weights_and_optimiser_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    method = made("mae")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    current = stepping(method, batch=64)
    batch = Batch(photographs(64), list(range(64)))
    measure(current, [batch], False, lambda _: 10_000, lambda _: None)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert not current.optimiser.state


@pytest.fixture
def fabric() -> Fabric:
    made = Fabric(accelerator="cpu", devices=1)
    made.launch()
    return made


def test_the_matrix_rate_is_kept(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNDERPAINT_CACHE", str(tmp_path / "cache"))
    rates, asked = [1e9, 5e8, 2e9, 3e8, 4e8], list[float]()

    def timed(_: Fabric, __: str, seconds: float) -> float:
        asked.append(seconds)
        return rates[len(asked) - 1]

    monkeypatch.setattr(devices, "_matrix_rate", timed)
    assert [devices.matrix_rate(fabric, "32") for _ in range(3)] == [1e9, 1e9, 2e9]  # a busy machine says nothing
    assert asked == [devices.MEASURED, devices.AGAIN, devices.AGAIN]
    kept = tmp_path / "cache" / "matrix-rates.json"
    assert list(json.loads(kept.read_text()).values()) == [2e9]
    for damaged in ("{", "[1]"):
        kept.write_text(damaged)
        assert devices.matrix_rate(fabric, "32") == rates[len(asked) - 1]
    assert asked[3:] == [devices.MEASURED] * 2
    assert capsys.readouterr().out == ""


def test_the_matrix_rate_of_this_machine(fabric: Fabric) -> None:
    assert 1e8 < devices._matrix_rate(fabric, "32", 0.0) < 1e14


@pytest.mark.parametrize("name", ["mae-tiny-32", "energy-tiny-32", "cim-resnet-32", "beit-tiny-32"])
def test_weights_that_hold_no_numbers_cost_as_much(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    recipe = RECIPES[name]()
    found, encoder = planning.cost_of(recipe)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(planning, "_Unfilled", nullcontext)
    filled, other = planning.cost_of(recipe)
    assert found.flops == filled.flops > 0
    assert found.weights == filled.weights
    assert found.made == pytest.approx(filled.made, rel=1e-3)
    assert type(encoder) is type(other)


def test_a_run_that_takes_long_says_so_before_it_is_measured(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def enough(*_: Any) -> Any:
        raise InputError("enough")

    monkeypatch.setattr(pretraining, "decide", enough)
    monkeypatch.setattr(planning, "matrix_rate", lambda *_: 1e11)
    asked = ["pretrain", str(pictures), "--recipe", "mae-tiny-32", "--out"]
    assert main([*asked, str(tmp_path / "long"), "--steps", "1000000"]) == 2
    said = next(line for line in capsys.readouterr().out.splitlines() if "by a count" in line)
    rate = 1e11 * 0.56 / planning.cost_of(RECIPES["mae-tiny-32"]())[0].flops
    assert said.startswith(
        f"about {1e6 * 256 / rate / 86_400:.1f} days by a count: 1,000,000 steps of 256, {rate:,.0f} "
    )
    for length in (["--steps", "10"], ["--minutes", "500"]):
        assert main([*asked, str(tmp_path / length[0]), *length]) == 2
        assert "by a count" not in capsys.readouterr().out
