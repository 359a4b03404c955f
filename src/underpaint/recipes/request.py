"""What is asked for: a recipe with flags and settings laid over it, checked against the run that is there."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from underpaint.config import FLAGS, LENGTHS, SECTIONS, AnyEncoder, AnyMethod, Recipe, check_bounds
from underpaint.errors import InputError
from underpaint.files import place_of
from underpaint.methods import METHODS
from underpaint.reading import read_yaml
from underpaint.recipes import CONTINUE, RECIPES
from underpaint.recipes.recipe import (
    checked,
    differences,
    names_known,
    override,
    plain,
    stored_recipe,
)

DEFAULT_EPOCHS = 100


def read_recipe(name: str) -> dict[str, Any]:
    """Plain settings of a shipped recipe or a YAML file; what is left out has its default."""
    if name in RECIPES:
        return plain(RECIPES[name]())
    file = Path(name)
    if not file.is_file():
        raise InputError(f"--recipe {name}: neither a file nor one of {', '.join(sorted(RECIPES))}")
    return plain(checked(read_yaml(file)))


def laid_over(base: Mapping[str, Any], flags: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings with those of a call laid over them; a length that is given takes the place of another."""
    chosen = copy.deepcopy(dict(base))
    if any(flags.get(name) is not None or settings.get(f"run.{name}") is not None for name in LENGTHS):
        for name in LENGTHS:
            chosen["run"][name] = None
    for name, path in FLAGS.items():  # in this order: another method has other settings
        if flags.get(name) is not None:
            override(chosen, path, flags[name])
    for path, value in settings.items():
        override(chosen, path, value)
    return chosen


def foresee(data: str | Path, recipe: str | None, flags: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Complain of what is not there, has another name or is out of its bounds, before anything heavy is imported.

    Raises:
        InputError: no such data, recipe, method, section or setting; a number that cannot be.
    """
    for place in (data, flags.get("labels")):
        if place is not None:
            place_of(place)
    chosen = laid_over(read_recipe(recipe) if recipe else plain(Recipe()), flags, settings)
    method, encoder = names_known(chosen)
    check_bounds(method, AnyMethod, "method.{}")
    check_bounds(encoder, AnyEncoder, "encoder.{}")
    for section, kind in SECTIONS.items():
        check_bounds(chosen[section], kind, f"{section}.{{}}")


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


def said(flags: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flags and settings of a command as settings by path; those by `--set` last."""
    return {path: flags[name] for name, path in FLAGS.items() if flags.get(name) is not None} | dict(settings)


def asked(out: Path, recipe: str | Recipe | None, flags: Mapping[str, Any], settings: Mapping[str, Any]) -> Recipe:
    """What a command asks for: its recipe, that of the run in `out`, or the defaults, with flags and settings over it.

    Raises:
        InputError: settings that cannot be.
    """
    base = read_recipe(recipe) if isinstance(recipe, str) else plain(recipe or stored_recipe(out) or Recipe())
    chosen = laid_over(base, flags, settings)
    if chosen != base:
        chosen["measured"] = {}  # measured for other settings
    return checked(chosen)


def named(name: str) -> Recipe:
    """The recipe of a method (its defaults), a shipped one, or that of a YAML file. To be changed and trained:

    >>> recipe = named("mae-tiny-32")
    >>> recipe.optimiser.lr, recipe.run.minutes = 1e-3, 30.0
    >>> recipe.method["mask_ratio"]
    0.75

    Raises:
        InputError: none has that name.
    """
    recipe = checked({"method": {"name": name}} if name in METHODS else read_recipe(name))
    recipe.measured = {}
    return recipe


def planned_around(recipe: str | Recipe | None, settings: Mapping[str, Any], exists: bool) -> Mapping[str, Any] | None:
    """The settings that a new run is planned around: where no recipe is given, or the one for going on from weights;
    None where nothing is planned.

    Raises:
        InputError: no weights to go on from.
    """
    if recipe == CONTINUE and not exists and settings.get("init") is None:
        raise InputError(f"--recipe {CONTINUE}: goes on from weights; give them, --init timm:NAME, a run or a file")
    return settings if recipe in (None, CONTINUE) and not exists else None


def settled(data: str | Path, out: Path, recipe: str | Recipe | None) -> tuple[Recipe, bool]:
    """The recipe of a run on these images, and whether it goes on from an earlier start.

    Raises:
        InputError: settings that differ from those of the run that is to be resumed, each in a line.
    """
    stored = stored_recipe(out)
    given = read_recipe(recipe) if isinstance(recipe, str) else plain(recipe or stored or Recipe())
    chosen = copy.deepcopy(given)
    chosen["data"]["path"] = str(data)
    if all(chosen["run"][name] is None for name in LENGTHS):
        chosen["run"]["epochs"] = DEFAULT_EPOCHS
    if stored is None:
        if chosen != given:
            chosen["measured"] = {}  # measured on other data
        for name in (
            "tokenizer",
            "steps_before",
            "warm_again",
            "statistics",
            "start",
        ):  # of the run that this recipe is from
            chosen["measured"].pop(name, None)
        return checked(chosen), False
    chosen["measured"] = plain(stored)["measured"]
    result = checked(chosen)
    if changed := differences(stored, result):
        raise InputError(
            f"--out {out}: holds a run with other settings ({'; '.join(changed)}); "
            "give its own settings to go on, or another path"
        )
    lengths = [[getattr(each.run, name) for name in LENGTHS] for each in (stored, result)]
    if lengths[0] != lengths[1] and "steps" in result.measured:
        result.measured.setdefault("steps_before", result.measured.pop("steps"))
    return result, True
