"""A recipe: every setting of a run as plain, checked data. `recipe.yaml` in a run folder is one."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jsonargparse

from underpaint.config import FORMAT, SECTIONS, AnyEncoder, AnyMethod, Data, Length, Optimiser, Recipe, check
from underpaint.errors import InputError
from underpaint.methods import METHODS
from underpaint.reading import one_line, read_yaml

# what has another name since format 1
RENAMED = (
    "hidden_ratio to mask_ratio, standardize_targets to norm_pix_loss, vocabulary to codebook_size, cell to "
    "mask_patch_size, optimiser.rate to optimiser.lr, energy's context: visible to method conditional-energy"
)


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as nested dicts, lists, numbers and strings."""

    def listed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: listed(inner) for key, inner in value.items()}
        return [listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return listed(asdict(recipe))


def method_settings(name: str) -> dict[str, Any]:
    """The settings of a method with their defaults: its constructor's keyword arguments."""
    parameters = list(inspect.signature(METHODS[name]).parameters.values())[1:]  # without the encoder
    return {parameter.name: parameter.default for parameter in parameters}


def override(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set one value of a plain recipe in place: `override(settings, "method.mask_ratio", 0.6)`."""
    section, _, name = path.partition(".")
    if section not in settings or section in ("measured", "format") or (name == "") != (section == "init"):
        known = ", ".join(f"{s}.NAME" for s in ("method", "encoder", *SECTIONS))
        raise InputError(f"--set {path}: no such setting; paths are {known}, init")
    if section == "init":
        settings["init"] = value
    elif section == "method" and name == "name":
        if value != settings["method"]["name"]:
            settings["method"] = {"name": value}  # another method has other settings
    else:
        settings[section][name] = value


def checked(settings: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, every name and type checked, every default filled in.

    Raises:
        InputError: an unknown name (the known ones are listed) or a value of the wrong type.
    """
    settings = copy.deepcopy(dict(settings))
    if (found := settings.get("format", FORMAT)) != FORMAT:
        raise InputError(
            f"recipe: format {_shown(found)}; this version reads format {FORMAT}: pretrain anew, or write `format: {FORMAT}` and "
            f"rename {RENAMED} in a recipe of your own"
        )
    method, encoder = names_known(settings)
    _only_known(f"method {method['name']}", method, ["name", *method_settings(method["name"])])
    given = {section: _worded(section, settings.get(section) or {}, kind) for section, kind in SECTIONS.items()}
    if isinstance(side := given["data"].get("image_size"), int):
        given["data"]["image_size"] = (side, side)
    given["method"] = _worded(
        "method", {key: value for key, value in method.items() if key != "name"}, METHODS[method["name"]].__init__
    )
    try:
        parsed = _parser(METHODS[method["name"]]).parse_object(given, defaults=True).as_dict()
    except Exception as error:
        raise InputError(f"recipe: {one_line(error)}") from error
    recipe = Recipe(
        method={"name": method["name"], **(parsed.get("method") or {})},
        encoder=encoder,
        init=settings.get("init"),
        data=Data(**parsed["data"]),
        optimiser=Optimiser(**parsed["optimiser"]),
        run=Length(**parsed["run"]),
        measured=dict(settings.get("measured") or {}),
    )
    recipe.data.image_size = tuple(recipe.data.image_size)  # pyright: ignore[reportAttributeAccessIssue]
    check(recipe)
    return recipe


@cache
def _parser(method: type) -> jsonargparse.ArgumentParser:
    """Of the sections of a recipe; to make one takes as long as to read ten recipes. (Not by a name, which a notebook may give
    to another class.)"""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section)
    parser.add_class_arguments(method, "method", skip={"encoder"})
    return parser


def names_known(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections `method` and `encoder` of plain settings, in which every name is known but those that only the method
    itself knows: nothing heavy is imported for this.

    Raises:
        InputError: an unknown name; the known ones are listed.
    """
    _only_known("recipe", settings, [f.name for f in fields(Recipe)])
    for section in ("method", "encoder", "measured"):
        if not isinstance(value := settings.get(section) or {"name": ""}, Mapping):
            raise InputError(f"{section}: is {_shown(value)}; it must be a mapping of settings")
        if section != "measured" and not isinstance(value.get("name"), str):
            raise InputError(f"{section}: has no name")
    method = dict(settings.get("method") or {"name": AnyMethod.name})
    encoder = dict(settings.get("encoder") or {"name": AnyEncoder.name})
    if method["name"] not in METHODS:
        raise InputError(f"method: there is no {_shown(method['name'])}; there are: {', '.join(sorted(METHODS))}")
    for section, kind in SECTIONS.items():
        _only_known(section, settings.get(section) or {}, [f.name for f in fields(kind)])
    return method, encoder


def _worded(section: str, given: Mapping[str, Any], annotated: Any) -> dict[str, Any]:
    """Settings as they were written, where one of a few words is asked for: YAML reads `off` as a boolean, `32` as a
    number, and so does whoever writes `--set run.compile=off`.

    Raises:
        InputError: nothing is written where there has to be something.
    """
    kinds = get_type_hints(annotated)
    for name, value in given.items():
        if value is None and name in kinds and type(None) not in get_args(kinds[name]) and kinds[name] is not Any:
            raise InputError(f"{section}.{name}: has no value; leave it out for the default")
    return {name: _word(value, _words(kinds.get(name))) for name, value in given.items()}


def _words(kind: Any) -> list[str]:
    """The words that an annotation of literals lists; none for any other."""
    if get_origin(kind) is Literal:
        return [word for word in get_args(kind) if isinstance(word, str)]
    return [word for part in get_args(kind) for word in _words(part)]


def _word(value: Any, words: list[str]) -> Any:
    written = (str(value),)
    if isinstance(value, bool):
        written = ("on", "true", "yes") if value else ("off", "false", "no")
    return next((word for word in words if word in written), value)


def _only_known(where: str, given: Mapping[str, Any], known: list[str]) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: is {_shown(given)}; it must be a mapping of {', '.join(known)}")
    for name in given:
        if name not in known:
            raise InputError(f"{where}: no setting {_shown(name)}; there are: {', '.join(known)}")


def _shown(value: object) -> str:
    """The beginning of a value that is wrong."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def stored_recipe(folder: Path) -> Recipe | None:
    """The recipe of a run folder; None where there is none."""
    file = folder / "recipe.yaml"
    return checked(read_yaml(file)) if file.is_file() else None


def method_options(recipe: Recipe, tokenizer: Path | None = None) -> dict[str, Any]:
    """What the method's class is called with: the recipe's settings; image size and seed are the run's where the method
    asks for them and none are given; and a run's own `tokenizer`, once it is there."""
    options = {key: value for key, value in recipe.method.items() if key != "name"}
    for name, value in (("image_size", recipe.data.image_size), ("seed", recipe.run.seed)):
        if name in options and options[name] is None:
            options[name] = value
    if tokenizer is not None and tokenizer.is_file():
        options["tokenizer"] = str(tokenizer)
    return options


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What two recipes differ in, a line each, except what may change when a run goes on."""
    free = {
        "run": {"epochs", "steps", "minutes", "devices", "nodes", "loggers", "recompute"},
        "data": {"workers", "changed"},
    }
    lines = []
    before, after = plain(old), plain(new)
    for section in ("method", "encoder", "data", "optimiser", "run"):
        names = {**before[section], **after[section]}
        for name in names:
            was, now = before[section].get(name), after[section].get(name)
            if was != now and name not in free.get(section, ()):
                lines.append(f"{section}.{name}: {was} in the run, {now} now")
    if before["init"] != after["init"]:
        lines.append(f"init: {before['init']} in the run, {after['init']} now")
    return lines
