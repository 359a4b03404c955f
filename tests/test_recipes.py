"""Recipes: checked names and types, and twenty steps of each tiny one against checked-in losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import made_picture

from underpaint.cli import parser
from underpaint.errors import InputError
from underpaint.methods import METHODS, SimMIM
from underpaint.recipes import RECIPES
from underpaint.recipes.recipe import checked, method_settings, override, plain
from underpaint.recipes.request import read_recipe

# Mean loss of steps 16 to 20 on made stripes. Tolerance 1 %: kernels of other machines sum in another order, which
# twenty steps hardly amplify; a changed default or formula moves the loss by far more.
EXPECTED = {
    "beit-tiny-32": 5.5132,
    "cae-tiny-32": 6.8196,
    "cim-resnet-32": 0.4861,
    "cim-tiny-32": 0.4412,
    "conditional-energy-tiny-32": 0.3141,
    "energy-tiny-32": 0.2155,
    "localmim-tiny-32": 0.2433,
    "mae-tiny-32": 0.9010,
}


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_shipped_recipes_are_valid_and_survive_yaml(name: str) -> None:
    recipe = checked(plain(RECIPES[name]()))
    assert checked(yaml.safe_load(yaml.safe_dump(plain(recipe)))) == recipe
    assert (RECIPES[name].__doc__ or "").strip()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": {"name": "mae", "hide_ratio": 0.5}}, "no setting 'hide_ratio'; there are: name, mask_ratio"),
        ({"method": {"name": "mae", "mask_ratio": "much"}}, "mask_ratio"),
        ({"optimiser": {"batch_size": "many"}}, "batch_size"),
        ({"optimizer": {}}, "no setting 'optimizer'; there are: method"),
        ({"run": {"epochs": 1, "steps": 1}}, "one of --epochs"),
        ({"run": {"steps": 0}}, "above 0"),
        ({"format": 99}, "format 99"),
        ({"optimiser": {"batch_size": 10, "accumulation": 4}}, "does not divide"),
        ({"optimiser": {"lr": -1e-3}}, r"optimiser.lr: -0.001; it must be at least 0"),
        ({"optimiser": {"betas": [0.9, 1]}}, r"optimiser.betas: 1; it must be at least 0 and below 1"),
        ({"data": {"image_size": [64, 2]}}, r"data.image_size: 2; it must be at least 4"),
        ({"data": {"crop_scale": [1.0, 0.2]}}, "the lower share comes first"),
        ({"method": {"name": "mae", "mask_ratio": 1}}, "method.mask_ratio: 1; it must be above 0 and below 1"),
        (
            {"encoder": {"name": "vit_tiny_patch16_224", "patch_size": 0}},
            "encoder.patch_size: 0; it must be at least 1",
        ),
    ],
)
def test_bad_recipes_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        checked(settings)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("run.compile=off", "off"),
        ("run.compile=on", "on"),
        ("run.compile=false", "off"),
        ("run.compile=true", "on"),
        ("run.compile=auto", "auto"),
        ("run.precision=32", "32"),
        ("run.precision=bf16", "bf16"),
        ("method.readout=class", "class"),
        ("data.flip=off", False),  # what is a boolean stays one
        ("run.seed=1", 1),
    ],
)
def test_words_are_taken_as_they_are_written_on_the_command_line(written: str, meant: Any, tmp_path: Path) -> None:
    path, value = parser().parse_args(["pretrain", "x", "--out", "y", "--set", written]).set[0]
    settings = plain(checked({"method": {"name": "energy"}}))
    override(settings, path, value)
    section, name = path.split(".")
    assert plain(checked(settings))[section][name] == meant
    file = tmp_path / "recipe.yaml"
    other = "name: energy, " if section == "method" else ""
    file.write_text(f"{section}: {{{other}{name}: {written.partition('=')[2]}}}")
    assert read_recipe(str(file))[section][name] == meant


@pytest.mark.quick
def test_a_word_that_a_setting_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="precision"):
        checked({"run": {"precision": False}})


@pytest.mark.quick
def test_settings_are_the_constructors_arguments() -> None:
    assert method_settings("mae")["mask_ratio"] == 0.75
    settings = plain(checked({"method": {"name": "energy", "mask_patch_size": 8}}))
    assert settings["method"] == {"name": "energy", **method_settings("energy"), "mask_patch_size": 8}
    assert settings["method"]["step_size"] is None
    override(settings, "method.name", "mae")
    assert settings["method"] == {"name": "mae"}  # the other method's settings do not follow
    override(settings, "init", "timm:x")
    assert settings["init"] == "timm:x"


@pytest.mark.quick
def test_a_method_that_is_made_anew_has_its_new_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, whose cell is run again."""

    class Mine(SimMIM):
        margin: int = 3

    monkeypatch.setitem(METHODS, "mine", Mine)
    assert checked({"method": {"name": "mine", "margin": 4}}).method["margin"] == 4

    class MineAgain(SimMIM):
        room: float = 0.5

    monkeypatch.setitem(METHODS, "mine", MineAgain)
    found = checked({"method": {"name": "mine", "room": 0.25}}).method
    assert found["room"] == 0.25
    assert "margin" not in found


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_twenty_steps_of_each_tiny_recipe(name: str, tmp_path: Path) -> None:
    import numpy as np
    from asking import pretrain

    rng = np.random.default_rng(0)
    for k in range(64):
        made_picture(rng, k % 3).save(tmp_path / f"{k}.png")
    run = pretrain(
        tmp_path,
        tmp_path.with_name("run-" + name),
        recipe=name,
        steps=20,
        batch_size=32,
        settings={"run.log_every": 10},
    )
    assert torch.get_default_dtype() == torch.float32
    line = run.lines("metrics.jsonl")[-1]
    # the most of CIM's loss is its generator's, which learns next to nothing in twenty steps
    found = line["terms"].get("enhancer", line["loss"])
    assert found == pytest.approx(EXPECTED[name], rel=0.01)
