"""The rate and the layer decay of fine-tuning: chosen by held-out training labels, in the time given, alike for all."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from asking import pretrain
from conftest import write_pictures
from forked import CommandLine

from underpaint.errors import InputError
from underpaint.evaluation.choice import choose, grid, length_of, settings_of
from underpaint.evaluation.settings import FineTuning
from underpaint.train.schedules import Duration

TINY = {"encoder.embed_dim": 32, "encoder.depth": 1, "encoder.num_heads": 2, "method.decoder_dim": 32}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("few") / "pictures", 40, classes=2)


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    flags: dict[str, Any] = {"method": "mae", "encoder": "vit_tiny_patch16_224", "image_size": (32, 32)}
    pretrain(pictures, out, **flags, patch_size=8, batch_size=8, steps=1, settings=TINY, stop_at=1e9)
    return out


def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())["tasks"]["finetune"]


def test_a_rate_is_chosen_alike_for_all_and_goes_on_after_a_kill(
    run: Path, pictures: Path, server: CommandLine, tmp_path: Path
) -> None:
    command = ["evaluate", run, "--data", pictures, "--task", "finetune", "--set", "layer_decay=1"]
    command += ["--set", "epochs=32", "--set", "batch_size=8", "--out"]
    whole = server(*command, tmp_path / "whole")
    assert whole.status == 0, whole.error
    task = found(tmp_path / "whole")
    for who in ("encoder", "untrained"):
        row = task["rows"][who]
        # 4 pairs, then the better 2 twice as long: half as many steps as those that come after
        assert Counter(one["round"] for one in row["tried"]) == {1: 4, 2: 2}
        assert [one["steps"] for one in row["tried"]] == [8, 8, 8, 8, 16, 16]
        assert {one["layer_decay"] for one in row["tried"]} == {1.0}
        last = row["tried"][4:]
        best = max(last, key=lambda one: (one["accuracy"], -one["loss"]))
        assert row["chosen"] == {"lr": best["lr"], "layer_decay": 1.0}
        assert task["trained"][who]["steps"] == 128
        assert f"fine-tuning of {who}: rate {best['lr']:g} per 256 images and layer decay 1 are chosen" in whole.out
    assert not (tmp_path / "whole/finetune/encoder/choice").is_dir() or not list(
        (tmp_path / "whole/finetune/encoder/choice").iterdir()
    )
    assert "How the rate was chosen" in (tmp_path / "whole" / "report.html").read_text()
    # killed in the middle of the third pair it ends with the same
    out = tmp_path / "killed"
    assert server(*command, out, die=("kill underpaint.train.stepper:Stepper.step", 20)).status == -9
    known = json.loads((out / "finetune/encoder/choice.json").read_text())["tried"]
    assert len(known) == 2
    again = server(*command, out)
    assert again.status == 0, again.error
    assert found(out)["rows"]["encoder"]["tried"][:2] == known  # their minutes tell that they were not made again
    assert rows_of(out) == rows_of(tmp_path / "whole")
    # what is given is not chosen
    fixed = server(*command, tmp_path / "fixed", "--set", "lr=1e-3", "--set", "epochs=2", "--untrained")
    assert fixed.status == 0, fixed.error
    assert "tried" not in found(tmp_path / "fixed")["rows"]["encoder"]


def rows_of(out: Path) -> dict[str, Any]:
    """Without the time that it took."""
    rows = found(out)["rows"]
    for row in rows.values():
        for tried in row.get("tried", []):
            del tried["minutes"]
    return rows


def test_choosing_is_part_of_the_minutes(run: Path, pictures: Path, server: CommandLine, tmp_path: Path) -> None:
    command = ["evaluate", run, "--data", pictures, "--task", "finetune", "--minutes", "0.04", "--set", "batch_size=8"]
    ended = server(*command, "--untrained", "--out", tmp_path / "out")
    assert ended.status == 0, ended.error
    task = found(tmp_path / "out")
    tried = task["rows"]["encoder"]["tried"]
    spent = sum(one["minutes"] for one in tried)
    assert len(tried) > 1 or tried[0]["steps"] < 8
    assert task["trained"]["encoder"]["minutes"] == pytest.approx(max(0.04 - spent, 0.04 * 2 / 3), rel=0.3)


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_best_of_the_grid_is_found_in_half_of_the_steps(tmp_path: Path) -> None:
    config = FineTuning()
    pairs = grid(config, {})
    assert len(pairs) == 8
    assert (pairs[0].lr, pairs[0].layer_decay) == (config.lr, config.layer_decay)
    assert len(grid(config, {"lr": 1})) == 2
    assert len(grid(config, {"layer_decay": 1})) == 4
    assert grid(config, {"lr": 1, "layer_decay": 1}) == [config]
    asked: list[tuple[float, int]] = []

    def tried(pair: FineTuning, length: Duration, folder: Path) -> tuple[int, float, float]:
        asked.append((pair.lr, length.steps))
        return length.steps, 0.9 if pair.lr == 4 * config.lr and pair.layer_decay == 1 else 0.5, 1.0

    chosen = choose(pairs, Duration(4_800), tried, tmp_path, settings_of(config), "it")
    assert (chosen.config.lr, chosen.config.layer_decay) == (4 * config.lr, 1.0)
    assert Counter(steps for _, steps in asked) == {100: 8, 200: 4, 400: 2}
    # nothing is tried twice
    asked.clear()
    assert choose(pairs, Duration(4_800), tried, tmp_path, settings_of(config), "it").config == chosen.config
    assert not asked
    with pytest.raises(InputError, match="other settings"):
        choose(pairs, Duration(4_800), tried, tmp_path, settings_of(config, seed=1), "it")


@pytest.mark.quick
def test_the_rate_of_the_recipe_is_kept_where_nothing_tells_or_there_is_no_time(tmp_path: Path) -> None:
    config = FineTuning()
    pairs = grid(config, {})

    def alike(pair: FineTuning, length: Duration, folder: Path) -> tuple[int, float, float]:
        return length.steps or 3, 0.5, 1.0

    assert choose(pairs, Duration(4_800), alike, tmp_path / "a", {}, "it").config == config
    assert not choose(pairs, Duration(100), alike, tmp_path / "b", {}, "it").tried  # 2 steps a pair
    short = choose(pairs, Duration(1, minutes=0.001), lambda *_: (3, 0.9, 1.0), tmp_path / "c", {}, "it")
    assert (short.config, len(short.tried)) == (config, 1)
    assert length_of(8, Duration(1, minutes=7.2)).minutes == pytest.approx(0.1)
