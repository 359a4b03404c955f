"""What a run folder holds, as the page and the verdict read it: whatever is missing or damaged is passed over."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from underpaint.errors import InputError

OVERFLOW = 1e30  # a number beyond it is as good as infinite: single precision cannot square it


def require_run(run: Path) -> None:
    """Raises where there is no run to read."""
    if not run.is_dir():
        raise InputError(f"no run folder {run}; `underpaint pretrain DATA --out {run}` makes one")
    if not any((run / name).exists() for name in ("recipe.yaml", "metrics.jsonl")):
        raise InputError(f"{run} is not a run folder: it holds neither recipe.yaml nor metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; a line that was cut short, as by a full disk, is passed over."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty where there is no such file, or no object in it."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_recipe(run: Path) -> tuple[str, dict]:
    """The recipe as text and as a mapping; the mapping is empty where the text is none."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text, {}
    return text, value if isinstance(value, dict) else {}


def number(mapping: Any, *keys: str) -> float:
    """The number at the end of the keys, nan where there is none; a null stands for what was not finite."""
    for key in keys:
        if not isinstance(mapping, dict):
            return math.nan
        mapping = mapping.get(key)
    if isinstance(mapping, bool) or not isinstance(mapping, int | float):
        return math.nan
    return float(mapping) if abs(mapping) < OVERFLOW else math.nan


def column(metrics: list[dict], *keys: str) -> np.ndarray:
    """One number of each line, nan where there is none."""
    return np.array([number(line, *keys) for line in metrics], dtype=float)


def accuracy(probes: dict, *keys: str) -> tuple[float, float]:
    """An accuracy and its standard error, whether they were stored together or the accuracy alone."""
    alone = number(probes, *keys)
    if math.isfinite(alone):
        return alone, math.nan
    return number(probes, *keys, "accuracy"), number(probes, *keys, "standard_error")


def probe_lines(metrics: list[dict]) -> list[dict]:
    """The lines at which a probe ran."""
    return [line for line in metrics if isinstance(line.get("probe"), dict) and line["probe"]]


def mean(values: np.ndarray) -> float:
    """The mean of the finite values, nan where there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def median(values: np.ndarray) -> float:
    """The median of the finite values, nan where there are none."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def rate_setting(recipe: dict) -> str:
    """How to set the learning rate of this run, in parentheses; nothing where the recipe does not tell."""
    optimiser = recipe.get("optimiser")
    if not isinstance(optimiser, dict) or "lr" not in optimiser:
        return ""
    return f" (`--set optimiser.lr=...`, it was {optimiser['lr']})"
