"""What a call asks for: a recipe with flags and settings laid over it, checked against the run that is there."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from underpaint.errors import InputError
from underpaint.files import place_of
from underpaint.methods import METHODS
from underpaint.recipes import RECIPES
from underpaint.recipes.recipe import (
    Recipe,
    checked,
    differences,
    names_known,
    one_line,
    override,
    plain,
    stored_recipe,
)

# flag of the command line and keyword of `pretrain` -> place in the recipe
FLAGS = {
    "method": "method.name",
    "encoder": "encoder.name",
    "patch_size": "encoder.patch_size",
    "image_size": "data.image_size",
    "labels": "data.labels",
    "groups": "data.groups",
    "all_images": "data.all_images",
    "workers": "data.workers",
    "batch_size": "optimiser.batch_size",
    "init": "init",
    "epochs": "run.epochs",
    "steps": "run.steps",
    "minutes": "run.minutes",
    "seed": "run.seed",
    "precision": "run.precision",
    "devices": "run.devices",
    "nodes": "run.nodes",
    "probe_every": "run.probe_every",
    "checkpoint_every": "run.checkpoint_every",
}
DEFAULT_EPOCHS = 100


def read_recipe(name: str) -> dict[str, Any]:
    """Plain settings of a shipped recipe or a YAML file; what is left out has its default."""
    if name in RECIPES:
        return plain(RECIPES[name]())
    file = Path(name)
    if not file.is_file():
        raise InputError(f"--recipe {name}: neither a file nor one of {', '.join(sorted(RECIPES))}")
    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe {name}: not YAML: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"--recipe {name}: holds no settings")
    return plain(checked(found))


def laid_over(base: Mapping[str, Any], flags: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings with those of a call laid over them; a length that is given takes the place of another."""
    chosen = copy.deepcopy(dict(base))
    if any(flags.get(name) is not None for name in ("epochs", "steps", "minutes")):
        for name in ("epochs", "steps", "minutes"):
            chosen["run"][name] = None
    for name, value in flags.items():
        if value is not None:
            override(chosen, FLAGS[name], value)
    for path, value in settings.items():
        override(chosen, path, value)
    return chosen


def foresee(data: str | Path, recipe: str | None, flags: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Complain of what is not there or has another name, before anything heavy is imported.

    Raises:
        InputError: no such data, recipe, method, section or setting.
    """
    for place in (data, flags.get("labels")):
        if place is not None:
            place_of(place)
    names_known(laid_over(read_recipe(recipe) if recipe else plain(Recipe()), flags, settings))


def recipe_named(entry: str) -> str | None:
    """The recipe that an entry of `--methods` names; None for a method.

    Raises:
        InputError: it is neither.
    """
    if entry in METHODS:
        return None
    if entry in RECIPES or Path(entry).is_file():
        return entry
    raise InputError(
        f"--methods: '{entry}' is no method ({', '.join(METHODS)}), no recipe ({', '.join(RECIPES)}) and no file"
    )


def resolve(
    data: str | Path, out: Path, recipe: str | None, flags: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Recipe, bool]:
    """The recipe of a run, and whether it goes on from an earlier start.

    Raises:
        InputError: settings that differ from those of the run that is to be resumed, each in a line.
    """
    stored = stored_recipe(out)
    base = read_recipe(recipe) if recipe else plain(stored or checked({}))
    chosen = laid_over(base, flags, settings)
    chosen["data"]["path"] = str(data)
    if all(chosen["run"][name] is None for name in ("epochs", "steps", "minutes")):
        chosen["run"]["epochs"] = DEFAULT_EPOCHS
    if stored is None:
        if chosen != base:
            chosen["measured"] = {}  # measured for other settings or other data
        return checked(chosen), False
    chosen["measured"] = plain(stored)["measured"]
    result = checked(chosen)
    if changed := differences(stored, result):
        raise InputError(
            f"--out {out}: holds a run with other settings ({'; '.join(changed)}); "
            "give its own settings to go on, or another path"
        )
    lengths = [[getattr(each.run, name) for name in ("epochs", "steps", "minutes")] for each in (stored, result)]
    if lengths[0] != lengths[1] and "steps" in result.measured:
        result.measured.setdefault("steps_before", result.measured.pop("steps"))
    return result, True
