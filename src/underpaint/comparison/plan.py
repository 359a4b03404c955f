"""What a comparison is to train: a recipe for each method, alike in all but method and optimiser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from timm.models import is_model_in_modules

from underpaint.config import LENGTHS, Recipe, bounds_of, outside
from underpaint.errors import InputError
from underpaint.files import write_text
from underpaint.locking import holds_anything
from underpaint.methods import METHODS
from underpaint.reading import read_yaml
from underpaint.recipes import RECIPES
from underpaint.recipes.recipe import checked, differences, plain
from underpaint.recipes.request import laid_over, read_recipe, recipe_named
from underpaint.train.devices import started

ROUNDS = (2, 6)  # least and most turns a method has: a point of its curve after each, a minute apart or more
TINY = 64  # pixels: up to here the shipped small recipe of a method serves
FORMAT = 2  # 1 held out other images, and drew other few labels


@dataclass
class Plan:
    """What is to be trained, and what could not be."""

    recipes: dict[str, Recipe]  # by method
    left_out: dict[str, str]  # reason by method
    seeds: list[int]
    minutes: float

    @property
    def rounds(self) -> int:
        return int(min(max(self.minutes, ROUNDS[0]), ROUNDS[1]))

    def stored(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "minutes": self.minutes,
            "seeds": self.seeds,
            "left_out": self.left_out,
            "methods": {name: plain(recipe) for name, recipe in self.recipes.items()},
        }


def recipes_of(
    methods: Sequence[str],
    recipe: str | None = None,
    flags: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Recipe]:
    """The recipe of each method, by the name of its row.

    Args:
        methods: names of methods, of shipped recipes, or of YAML files. A recipe gives its method and optimiser; a
            method alone gets its shipped recipe for small images, or its defaults.
        recipe: where encoder and data settings come from: a shipped name or a YAML file.
        flags, settings: laid over all alike, by the names of `FLAGS` and by path.

    Raises:
        InputError: a name that nothing has, or two have; a value that cannot be.
    """
    if not methods:
        raise InputError("--methods: give at least one of " + ", ".join(METHODS))
    base = laid_over(read_recipe(recipe) if recipe else plain(Recipe()), flags or {}, {})
    size, encoder = checked({"data": base["data"]}).data.image_size, base["encoder"]["name"]
    found: dict[str, Recipe] = {}
    for entry in methods:
        theirs = _settings_of(entry, min(size), (settings or {}).get("encoder.name", encoder))
        chosen = {name: base[name] for name in ("encoder", "data", "init")}
        chosen |= {"method": theirs["method"], "optimiser": theirs["optimiser"], "run": plain(Recipe())["run"]}
        name = Path(entry).stem
        if name in found:
            raise InputError(f"--methods: {name} is named twice")
        found[name] = checked(laid_over(chosen, flags or {}, settings or {}))
    return found


def planned(data: str, recipes: Mapping[str, Recipe], minutes: float, seeds: int) -> Plan:
    """The plan for these images.

    Raises:
        InputError: no recipe; recipes that differ in more than method and optimiser; no time; several processes.
    """
    if not recipes:
        raise InputError("--methods: give at least one of " + ", ".join(METHODS))
    for flag, value, bounds in (
        ("minutes", minutes, bounds_of("run.minutes")),
        ("seeds", seeds, {"at least": 1, "at most": 1_000}),
    ):
        if wrong := outside(value, bounds):
            raise InputError(f"--{flag}: {wrong}")
    (first, one), *others = recipes.items()
    processes, machines = started() or (1, 1)
    if max(processes, machines, one.run.devices or 1, one.run.nodes) > 1:
        raise InputError(
            "compare: methods take turns on one device, each in a process of its own, so that time and memory mean the same for "
            "all; start it as one process, without --devices and --nodes (pretrain takes several)"
        )
    for name, other in others:
        alike = checked(plain(one) | {"method": plain(other)["method"], "optimiser": plain(other)["optimiser"]})
        if differ := differences(alike, other):
            raise InputError(f"methods: {name} is to be compared under other conditions than {first}: {differ[0]}")
    chosen = {}
    for name, recipe in recipes.items():
        settings = plain(recipe)
        settings["data"]["path"] = data
        # turns decide when to look and when to save
        settings["run"] |= {**dict.fromkeys(LENGTHS), "minutes": minutes, "probe_every": 10**9, "devices": 1}
        chosen[name] = checked(settings | {"measured": {}})
    return Plan(chosen, {}, list(range(seeds)), minutes)


def _settings_of(entry: str, side: int, encoder: str) -> dict[str, Any]:
    """The recipe that an entry of `--methods` means; a method without one for this size and kind of encoder (the tuned
    ones are for plain ViTs) gets its defaults."""
    named, small = recipe_named(entry), f"{entry}-tiny-32"
    if named is not None:
        return read_recipe(named)
    tuned = side <= TINY and small in RECIPES and is_model_in_modules(encoder, ["vision_transformer", "deit"])
    return read_recipe(small) if tuned else plain(checked({"method": {"name": entry}}))


def refuse_other(folder: Path) -> None:
    """Raises InputError: the path holds something that is not a comparison, which is never written over."""
    if folder.is_file() or (folder.is_dir() and holds_anything(folder) and not (folder / "compare.yaml").is_file()):
        raise InputError(f"--out {folder}: exists and is not a comparison; choose another path")


def store(folder: Path, plan: Plan) -> None:
    """Write the plan down, or make sure that the one written down is the same; it may have fewer seeds."""
    file = folder / "compare.yaml"
    refuse_other(folder)
    if file.is_file():
        stored = read_yaml(file)
        changed = [] if stored["minutes"] == plan.minutes else [f"minutes: {stored['minutes']:g} there"]
        if stored["format"] != FORMAT:
            changed.insert(0, f"format: {stored['format']} there, {FORMAT} here, which is judged by other images")
        if set(stored["methods"]) != set(plan.recipes):
            changed.append(f"methods: {', '.join(stored['methods'])} there")
        for name in set(stored["methods"]) & set(plan.recipes):
            lines = differences(checked(stored["methods"][name]), plan.recipes[name])
            changed += [f"{name}: {line}" for line in lines]
        if len(stored["seeds"]) > len(plan.seeds):
            changed.append(f"seeds: {len(stored['seeds'])} there, and they cannot become fewer")
        if changed:
            raise InputError(
                f"--out {folder}: holds another comparison ({'; '.join(changed)}); give its own settings to go on, "
                "or another path"
            )
    try:
        for place in ("runs", "recipes", "judged", "pictures"):
            (folder / place).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made: {error.strerror}") from error
    write_text(file, yaml.safe_dump(plan.stored(), sort_keys=False))
