"""What a run spends on judging itself: probes on the way are spaced by what they cost, and the judgement has its share."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from asking import pretrain

import underpaint.pretraining
from underpaint.config import Recipe
from underpaint.judging import LEAST_SECONDS, full_sizes, probe_every, quick_sizes, seconds_allowed


def measured(seconds: float, steps: int, batch: int = 256, share: float = 0.1) -> Recipe:
    recipe = Recipe(measured={"seconds_per_step": seconds, "steps": steps})
    recipe.optimiser.batch_size, recipe.run.probe_share = batch, share
    return recipe


@pytest.mark.quick
def test_sizes_and_spacing_keep_the_budget() -> None:
    ten_minutes = measured(0.4, 1_500)
    assert seconds_allowed(ten_minutes) == pytest.approx(30)
    assert quick_sizes(ten_minutes) == (2_449, 980)  # 1.4 x 0.4 / 256 s an image: four of them take 30 s
    assert [probe_every(ten_minutes, seconds) for seconds in (1.0, 7.5, 7.6, 10.1, 15.1, 40.0)] == [
        375,
        375,
        500,
        750,
        1_500,
        1_500,
    ]
    assert full_sizes(ten_minutes, (2_449, 980), 3_429, 2.0) == (14_288, 2_858)
    assert full_sizes(ten_minutes, (2_449, 980), 3_429, 0.2) == (50_000, 10_000)
    large = measured(25.0, 24)  # ViT-S/16 at 224 px
    assert quick_sizes(large) == (500, 200)  # the least that says something
    assert full_sizes(large, (500, 200), 700, 100.0) == (1_000, 500)
    assert full_sizes(large, (5_000, 400), 5_400, 1_000.0) == (5_000, 500)  # no fewer than a quick probe
    assert quick_sizes(measured(0.4, 100_000)) == (5_000, 2_000)
    assert seconds_allowed(measured(0.4, 1_500, share=0.5)) == pytest.approx(150)
    assert seconds_allowed(measured(0.4, 10)) == LEAST_SECONDS
    for steps in (1, 3, 7, 100):
        assert 1 <= probe_every(measured(0.1, steps), 0.1) <= steps


TINY: dict[str, Any] = {"image_size": 16, "patch_size": 4, "batch_size": 16, "steps": 12}
SETTINGS = {"encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2, "run.log_every": 1}


class Slow:
    """A clock of which each quick probe takes so many seconds, and nothing else any."""

    def __init__(self, seconds: float, monkeypatch: pytest.MonkeyPatch):
        self.now, real = 0.0, underpaint.pretraining._look

        def look(*arguments: Any) -> Any:
            self.now += seconds
            return real(*arguments)

        monkeypatch.setattr(underpaint.pretraining, "_look", look)

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.mark.parametrize(("seconds", "probed"), [(1.0, [0, 3, 6, 9, 12]), (4.0, [0, 6, 12]), (60.0, [0, 12])])
def test_probes_of_a_run_are_spaced_by_what_the_first_one_took(
    seconds: float, probed: list[int], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(underpaint.pretraining, "quick_sizes", lambda recipe: (20, 8))
    monkeypatch.setattr(
        underpaint.pretraining, "full_sizes", lambda recipe, quick, images, took: (40, 12 if took > 3 else 8)
    )
    run = pretrain(
        pictures,
        tmp_path / "run",
        settings=SETTINGS,
        clock=Slow(seconds, monkeypatch),
        encoder="vit_tiny_patch16_224",
        **TINY,
    )
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "probe" in line] == probed
    kept = yaml.safe_load((run.path / "recipe.yaml").read_text())["measured"]
    assert (kept["probe_every"], kept["quick_probe"]) == (probed[1], [20, 8])
    assert kept["judgement"] == [40, 12 if seconds > 3 else 8]
    probes = json.loads((run.path / "probes.json").read_text())
    assert [probes["train"], probes["test"]] == kept["judgement"]
    assert any("The probes saw 40 and" in note and "run.probe_share" in note for note in probes["notes"])
    if seconds > 1:
        return
    asked = {**SETTINGS, "run.probe_every": 5}
    run = pretrain(
        pictures,
        tmp_path / "asked",
        settings=asked,
        clock=Slow(60.0, monkeypatch),
        encoder="vit_tiny_patch16_224",
        **TINY,
    )
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "probe" in line] == [0, 5, 10, 12]  # as was asked
