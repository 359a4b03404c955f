"""What is not said of a run is planned: for the images, the machine and the time, and only around what is said."""

import shlex
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
import yaml
from conftest import write_pictures
from forked import CommandLine
from PIL import Image

from underpaint.config import PLANNED, Recipe
from underpaint.methods import METHODS
from underpaint.planning import cost_of
from underpaint.recipes.plan import Looked, Machine, Plan, plan, vit_flops
from underpaint.recipes.recipe import checked
from underpaint.recipes.request import laid_over

LAPTOP = Machine("cpu", "laptop", 2, 1, 206e9, 24 * 2**30)  # of docs/log.md
GPU = Machine("cuda", "GPU", 16, 1, 6e14, 80 * 2**30)
SMALL = Looked(50_000, 32, 32, 3, True)
FRAMES = Looked(367, 360, 480, 3, True)
PHOTOS = Looked(1_281_167, 375, 500, 3, False)


def recipe_of(said: dict[str, Any], looked: Looked, machine: Machine = LAPTOP, family: str = "vit") -> Recipe:
    """The recipe that a plan becomes: it is one, whatever is said."""
    found = plan(said, looked, machine, family)
    assert set(found.reasons) == {"method", "encoder", "images", "batch", "length"}
    assert isinstance(found, Plan)
    return checked(laid_over(found.settings, {}, said))


@pytest.mark.quick
def test_small_images_on_a_laptop_get_what_was_tuned_there() -> None:
    recipe = recipe_of({}, SMALL)
    assert recipe.method["name"] == "localmim"
    assert recipe.method["target"] == "hog"
    assert recipe.method["taps"] == [-3, -1]
    assert (recipe.encoder["embed_dim"], recipe.encoder["depth"], recipe.encoder["patch_size"]) == (128, 4, 4)
    assert (recipe.data.image_size, recipe.optimiser.batch_size, recipe.optimiser.lr) == ((32, 32), 256, 2e-3)
    assert (recipe.run.minutes, recipe.run.epochs, recipe.run.steps) == (20.0, None, None)


@pytest.mark.quick
def test_the_time_scales_the_plan() -> None:
    assert recipe_of({"run.minutes": 5.0}, SMALL).method["name"] == "mae"  # HOG starts slower
    sizes = [recipe_of({"run.minutes": minutes}, FRAMES) for minutes in (1.0, 30.0, 120.0, 1440.0)]
    areas = [recipe.data.image_size[0] * recipe.data.image_size[1] for recipe in sizes]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1] / 10
    assert [recipe.encoder.get("embed_dim", 192) for recipe in sizes] == [128, 192, 192, 192]
    assert all(recipe.run.minutes and recipe.run.epochs is None for recipe in sizes)
    assert recipe_of({}, PHOTOS).data.workers is None  # by the machine that it runs on
    slow = Machine("cpu", "old laptop", 2, 1, 20e9, 4 * 2**30)
    assert recipe_of({}, FRAMES, slow).data.image_size[0] <= 48
    large = recipe_of({}, PHOTOS, GPU)
    assert large.encoder["name"] == "vit_base_patch16_224"
    assert (large.data.image_size, large.run.minutes) == ((224, 224), 1440.0)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("looked", "size", "channels"),
    [
        (FRAMES, (48, 64), 3),  # the proportions of the frames, an even number of patches
        (Looked(5_000, 64, 512, 1, True), (32, 96), 1),
        (Looked(60_000, 28, 28, 1, True), (28, 28), 1),
        (Looked(300, 10_980, 10_980, 10, True), (64, 64), 10),
        (Looked(34, 1_024, 1_024, 3, True), (64, 64), 3),
        (Looked(900, 8, 8, 3, True), (8, 8), 3),
        (Looked(900, 5, 7, 3, False), (8, 8), 3),
    ],
)
def test_sizes_follow_the_images(looked: Looked, size: tuple[int, int], channels: int) -> None:
    recipe = recipe_of({}, looked)
    assert recipe.data.image_size == size
    assert recipe.data.channels == channels
    assert recipe.optimiser.batch_size <= looked.images


@pytest.mark.quick
@pytest.mark.parametrize(
    ("said", "family"),
    [
        ({"method.name": "mae"}, "vit"),
        ({"method.name": "cim"}, "vit"),
        ({"method.mask_ratio": 0.6}, "vit"),
        ({"method.bins": 18}, "vit"),
        ({"encoder.name": "vit_small_patch16_224"}, "vit"),
        ({"encoder.name": "resnet18"}, "maps"),
        ({"encoder.name": "swin_tiny_patch4_window7_224"}, "swin"),
        ({"encoder.name": "beit_base_patch16_224"}, "beit"),
        ({"encoder.depth": 6}, "vit"),
        ({"encoder.patch_size": 16}, "vit"),
        ({"encoder.patch_size": 14}, "vit"),
        ({"data.image_size": (100, 60)}, "vit"),
        ({"data.image_size": 31}, "vit"),
        ({"optimiser.batch_size": 48, "optimiser.lr": 1e-4}, "vit"),
        ({"optimiser.accumulation": 3}, "vit"),
        ({"run.epochs": 4.0}, "vit"),
        ({"run.steps": 7}, "vit"),
        ({"run.minutes": 0.5}, "vit"),
        ({"init": "timm:vit_tiny_patch16_224", "encoder.name": "vit_tiny_patch16_224"}, "vit"),
    ],
)
@pytest.mark.parametrize("machine", [LAPTOP, GPU])
def test_what_is_said_is_kept(said: dict[str, Any], family: str, machine: Machine) -> None:
    for looked in (SMALL, FRAMES, PHOTOS):
        recipe = recipe_of(said, looked, machine, family)
        for path, value in said.items():
            section, _, name = path.partition(".")
            found = getattr(recipe, section)
            if name:
                found = found[name] if isinstance(found, dict) else getattr(found, name)
            assert found == ((value, value) if path == "data.image_size" and isinstance(value, int) else value)
        if "encoder.name" in said:
            assert set(recipe.encoder) <= {"name", "patch_size", *(["drop_path_rate"] if "init" in said else [])}
        patch = recipe.encoder.get("patch_size")
        assert (
            patch is None
            or not (recipe.data.image_size[0] % patch or recipe.data.image_size[1] % patch)
            or ("data.image_size" in said)
        )


@pytest.mark.parametrize(
    ("method", "said"),
    [
        *((method, said) for method in sorted(METHODS) for said in ({}, {"encoder.depth": 2})),
        ("cim", {"encoder.patch_size": 2}),
        ("cim", {"encoder.name": "vit_tiny_patch16_224"}),
    ],
)
def test_what_is_planned_can_be_built(method: str, said: dict[str, Any]) -> None:
    """Settings that were tuned for one network do not follow into another; and its cost can be counted."""
    cost, _ = cost_of(recipe_of({"method.name": method, **said}, FRAMES))
    assert cost.flops > 1e6
    assert cost.made > 1e4


def test_the_count_of_a_step_is_that_of_the_log() -> None:
    """GFLOP an image, docs/log.md 2026-11-21: by the formula, and counted (energy with its second derivatives)."""
    for name, logged in (("mae", 0.13), ("energy", 0.70), ("simmim", 0.34)):
        assert cost_of(recipe_of({"method.name": name}, SMALL))[0].flops / 1e9 == pytest.approx(logged, rel=0.05)
    for width, size, patch, counted in ((192, 224, 16, 2.12), (384, 224, 16, 7.96), (768, 224, 16, 30.79)):
        assert vit_flops(width, 12, (size, size), patch, 3) / 1e9 == pytest.approx(counted, rel=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of 40 x 64 px in two classes, under a name that a shell has to quote."""
    place = write_pictures(tmp_path_factory.mktemp("plan") / "my photos", 40, classes=2, size=64)
    for path in place.rglob("*.png"):
        with Image.open(path) as picture:
            picture.crop((0, 0, 64, 40)).save(path)
    return place


def test_the_bare_command_says_its_plan_and_writes_nothing_where_it_is_a_preview(
    folder: Path, server: CommandLine, tmp_path: Path
) -> None:
    ended = server("pretrain", folder, "--out", tmp_path / "run", "--preview")
    assert ended.status == 0, ended.error
    said = ended.out.splitlines()
    first = next(number for number, line in enumerate(said) if line.startswith("plan for 32 images on"))
    assert "40 images" in said[0]  # and how the data is understood, before
    for line, name, flag in zip(
        said[first + 1 :],
        ("method", "encoder", "images", "batch", "length"),
        ("--method]", "--encoder]", "--image-size, --patch-size]", "--batch-size, --lr]", "--epochs, --steps]"),
        strict=False,
    ):
        assert line.split()[0] == name
        assert line.endswith(flag)
        assert ": " in line  # the reason
    assert "x 32 / 256" in said[first + 4]
    assert "GiB" in said[first + 6]
    assert list(tmp_path.iterdir()) == []
    again = server(
        "pretrain", folder, "--out", tmp_path / "run", "--preview", "--method", "mae", "--image-size", "32x48"
    )
    assert "method   mae: as asked" in again.out
    assert "32x48 px, patches of 4" in again.out
    wrong = server(
        "pretrain", folder, "--out", tmp_path / "run", "--preview", "--method", "cae", "--encoder", "resnet18"
    )
    assert wrong.status == 2
    assert wrong.error.count("\n") == 1


def test_a_planned_run_to_its_end_and_what_comes_next(folder: Path, server: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    command = ["pretrain", folder, "--out", out, "--minutes", "0.02"]
    ended = server(*command)
    assert ended.status == 0, ended.error
    assert ended.out.index("plan for") < ended.out.index("images to pretrain on")  # before anything is decoded
    assert "peak learning rate" in ended.out.partition(" images/s, ")[2]  # as it was measured
    stored = yaml.safe_load((out / "recipe.yaml").read_text())
    assert stored["run"]["minutes"] == 0.02
    assert stored["encoder"]["embed_dim"] == 128
    # nothing is chosen again: not where the run goes on, not where it is repeated
    again = server(*command)
    assert again.status == 0, again.error
    assert "plan for" not in again.out
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    assert {name: kept[name] for name in PLANNED if name in kept} == {
        name: stored[name] for name in PLANNED if name in stored
    }
    other = server("pretrain", folder, "--out", tmp_path / "other", "--init", out, "--preview")
    assert f"{stored['encoder']['name']}, 128 wide, 4 blocks: as asked" in other.out, other.error
    assert "= 0.0005 x" in other.out  # a quarter of 2e-3: gently, from weights that are good already
    page, judge, python = [shlex.split(line) for line in ended.out.splitlines()[-3:]]
    assert ended.out.splitlines()[-4].startswith("next: look at the page, judge it")
    assert page[1:3] == ["-m", "webbrowser"]
    assert Path(url2pathname(urlparse(page[3]).path)).is_file()
    assert judge[0] == "underpaint"
    judged = server(*judge[1:])
    assert judged.status == 0, judged.error
    assert (tmp_path / "a run-worth" / "report.html").is_file()
    assert python[1] == "-c"
    exec(compile(python[2], "next", "exec"), {})


def test_two_processes_plan_alike(folder: Path, server: CommandLine, tmp_path: Path) -> None:
    ended = server("pretrain", folder, "--out", tmp_path / "run", "--epochs", "1", "--devices", 2, processes=2)
    assert ended.status == 0, ended.error
    assert ended.out.count("plan for") == 1
