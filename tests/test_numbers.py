"""Every number that can be set, set to what nobody means: it is taken and works, or is refused in one line."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import write_pictures
from forked import CommandLine
from scenes import write_scenes
from test_methods import photographs, small

from underpaint.config import DECLARED, SECTIONS
from underpaint.errors import InputError
from underpaint.evaluation.options import Options
from underpaint.evaluation.runner import evaluate
from underpaint.evaluation.settings import SETTINGS as TASKS
from underpaint.evaluation.settings import foresee
from underpaint.methods import METHODS
from underpaint.recipes.recipe import checked, method_options, method_settings

VALUES = (-1, 0, float("nan"), float("inf"), 10**30, "text")
STANDS_FOR = {"method": "mae", "encoder": "vit_tiny_patch16_224"}


def numeric(annotation: Any) -> bool:
    kinds = (annotation, *(inner for kind in get_args(annotation) for inner in (kind, *get_args(kind))))
    return bool({int, float} & {*kinds, *get_args(annotation)}) and annotation is not bool


def written(value: Any) -> str:
    """As YAML reads it."""
    if isinstance(value, float):
        return ".nan" if math.isnan(value) else ".inf"
    return str(value)


SETTINGS = [
    f"{section}.{declared.name}"
    for section, kind in DECLARED.items()
    for declared in dataclasses.fields(kind)
    if numeric(declared.type)
]


def pair(path: str, value: Any) -> Any:
    """Settings of two numbers, one for each side or end."""
    return [value, value] if path in ("data.image_size", "data.crop_scale", "optimiser.betas") else value


def accepted(path: str) -> list[Any]:
    """The values that a recipe takes."""
    section, _, name = path.partition(".")
    found, refused = [], []
    for value in VALUES:
        given = {name: pair(path, value)} | ({"name": STANDS_FOR[section]} if section in STANDS_FOR else {})
        try:
            checked({section: given})
            found.append(value)
        except InputError as error:
            refused.append(str(error))
    assert all("\n" not in line and name in line for line in refused), refused
    return found


@pytest.mark.quick
def test_the_settings_are_those_that_hold_numbers() -> None:
    assert len(SETTINGS) >= 25
    assert {"optimiser.lr", "data.image_size", "run.steps", "run.minutes", "method.mask_ratio"} <= set(SETTINGS)
    assert set(SECTIONS) <= {path.partition(".")[0] for path in SETTINGS}


@pytest.mark.quick
@pytest.mark.parametrize("path", SETTINGS)
def test_nothing_that_is_no_number_is_taken(path: str) -> None:
    for value in accepted(path):
        assert value != "text"
        assert math.isfinite(float(value))
        assert value != -1 or path == "data.nodata"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("few") / "pictures", 12, classes=1)


@pytest.mark.parametrize("path", [path for path in SETTINGS if path.partition(".")[0] in SECTIONS])
def test_what_is_taken_trains_or_says_why_not(path: str, few: Path, server: CommandLine, tmp_path: Path) -> None:
    command = ["pretrain", few, "--method", "mae", "--encoder", "vit_tiny_patch16_224", "--patch-size", 8]
    command += ["--image-size", 16, "--batch-size", 8, "--probe-every", 10**6]
    for setting in ("encoder.embed_dim=32", "encoder.depth=1", "encoder.num_heads=2", "method.decoder_dim=32"):
        command += ["--set", setting]
    if path not in ("run.steps", "run.epochs", "run.minutes"):
        command += ["--steps", 1]
    for number, value in enumerate(accepted(path)):
        ended = server(*command, "--set", f"{path}={written(pair(path, value))}", "--out", tmp_path / str(number))
        name = path.partition(".")[2].replace("_", "")
        assert ended.status in (0, 2, 3), ended.error
        assert "Traceback" not in ended.error, (path, value)
        assert ended.status == 0 or ended.error.count("\n") == 1, ended.error
        assert ended.status != 2 or name in ended.error.replace("_", "").replace("-", ""), ended.error


@pytest.mark.parametrize("name", sorted(METHODS))
def test_numbers_of_a_method_are_taken_or_refused(name: str) -> None:
    """In the way that a run makes a method: what it raises is told in one line."""
    for setting, kind in get_type_hints(METHODS[name]).items():
        if setting not in method_settings(name) or not {int, float} & {kind, *get_args(kind)}:
            continue
        for value in VALUES:
            try:
                recipe = checked({"method": {"name": name, setting: value}})
                given = {k: v for k, v in method_options(recipe).items() if k == setting}
                method = small(name, **given)
            except (InputError, ValueError, TypeError, RuntimeError, ArithmeticError):
                continue
            assert math.isfinite(given[setting]), f"{name}.{setting}={value}"
            objective = method(photographs())
            assert isinstance(objective.loss, torch.Tensor)
            objective.loss.backward()


def refused_for(flag: str, error: str) -> bool:
    """One line that names the flag: it is refused for the number, and for nothing else."""
    return error.count("\n") == 1 and flag in error


@pytest.mark.parametrize("declared", [f.name for f in dataclasses.fields(Options) if numeric(f.type)])
def test_numbers_of_an_evaluation(declared: str, pictures: Path, server: CommandLine, tmp_path: Path) -> None:
    flag = f"--{declared.replace('_', '-')}"
    for value in VALUES:
        command = ["evaluate", "timm:vit_tiny_patch16_224", "--untrained", "--data", pictures, "--task", "knn"]
        command += ["--image-size", 32, f"{flag}={value}", "--out", tmp_path / str(value)]
        ended = server(*command)
        taken = (declared, value) == ("seed", 0) or (declared == "ignore_index" and isinstance(value, int))
        assert ended.status == (0 if taken else 2), (value, ended.error)
        assert taken or refused_for(flag, ended.error)


NUMBERS = {
    f"{task}.{declared.name}": declared
    for task, kind in TASKS.items()
    for declared in dataclasses.fields(kind)
    if numeric(declared.type)
}
# so that one step on small images shows whether a number works
BRIEFLY = {"finetune": {"epochs": 1, "batch_size": 16}, "segment": {"steps": 1, "batch_size": 2, "channels": 8}}
BRIEFLY["detect"] = {"steps": 1, "batch_size": 2, "channels": 16, "regions": 8}


def both(declared: dataclasses.Field[Any], value: Any) -> Any:
    """Settings of two numbers, one for each end."""
    return [value, value] if get_origin(declared.type) is tuple else value


def taken(path: str) -> list[Any]:
    """The values that a setting of a task takes."""
    found, refused, (task, _, name) = [], [], path.partition(".")
    for value in VALUES:
        try:
            foresee([task], Options(settings={name: both(NUMBERS[path], value)}), Path("nowhere"), "hf:none")
            found.append(value)
        except InputError as error:
            refused.append(str(error))
    assert all(f"--set {name}" in line for line in refused), refused
    return found


@pytest.mark.quick
@pytest.mark.parametrize("path", NUMBERS)
def test_settings_of_an_evaluation_have_bounds(path: str) -> None:
    assert NUMBERS[path].metadata["bounds"]
    assert set(taken(path)) <= {0} or path == "finetune.clip"
    name = path.partition(".")[2]
    with pytest.raises(InputError, match=f"--set {name}"):
        foresee(
            ["segment" if path.startswith("finetune") else "finetune"],
            Options(settings={name: "no"}),
            Path("no"),
            "hf:none",
        )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 4, 2, (32, 32))


@pytest.mark.parametrize("path", [path for path in NUMBERS if taken(path)])
def test_what_an_evaluation_takes_works(path: str, pictures: Path, scenes: Path, tmp_path: Path) -> None:
    task, _, name = path.partition(".")
    for number, value in enumerate(taken(path)):
        settings = {**BRIEFLY[task], name: both(NUMBERS[path], value)}
        options = Options(untrained=True, image_size=(32, 32), settings=settings)
        data, out = pictures if task == "finetune" else scenes, tmp_path / str(number)
        found: Any = evaluate("timm:test_vit", data, [task], out, options)
        assert all(
            math.isfinite(row[key]) for row in found["tasks"][task]["rows"].values() for key in row if key == "miou"
        )


@pytest.mark.quick
def test_settings_that_do_not_go_together_or_are_of_no_task() -> None:
    for task, settings, said in (
        ("knn", {"lr": 1}, "--set lr: knn has no settings"),
        ("finetune", {"lrr": 1}, "--set lrr: a setting of fine-tuning is one of augment"),
        ("segment", {"steps": None}, "--set steps=null: it must be a whole number"),
        ("finetune", {"clip": "much"}, "--set clip=much: it must be a number or null"),
        ("segment", {"scale": 2}, "--set scale=2: it must be two numbers"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            foresee([task], Options(settings=settings), Path("nowhere"), "hf:none")


@pytest.mark.parametrize("flag", ["--minutes", "--seed", "--channels", "--image-size", "--stride", "--codebook-size"])
def test_numbers_of_a_tokenizer(flag: str, few: Path, server: CommandLine, tmp_path: Path) -> None:
    for value in VALUES:
        if (flag, value) == ("--seed", 0):
            continue
        command = ["tokenizer", few, "--out", tmp_path / "words.safetensors", "--kind", "fsq", "--image-size", 16]
        ended = server(*command, "--stride", 4, f"{flag}={value}")
        assert ended.status == 2, (flag, value)
        assert refused_for(flag, ended.error)


@pytest.mark.parametrize("flag", ["--minutes", "--seeds"])
def test_numbers_of_a_comparison(flag: str, few: Path, server: CommandLine, tmp_path: Path) -> None:
    for value in VALUES:
        command = ["compare", few, "--methods", "mae", "--out", tmp_path / "which", "--minutes", 1, f"{flag}={value}"]
        ended = server(*command)
        assert ended.status == 2, (flag, value)
        assert refused_for(flag, ended.error)
