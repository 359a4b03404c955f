"""What a folder holds, as pages and verdicts read it: whatever is missing or damaged is passed over."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Float

from underpaint.errors import InputError

OVERFLOW = 1e30  # a number beyond it is as good as infinite: single precision cannot square it


def require_run(run: Path) -> None:
    """Raises where there is no run to read."""
    if not run.is_dir():
        raise InputError(f"no run folder {run}; `underpaint pretrain DATA --out {run}` makes one")
    if not any((run / name).exists() for name in ("recipe.yaml", "metrics.jsonl")):
        raise InputError(f"{run} is not a run folder: it holds neither recipe.yaml nor metrics.jsonl")


# -- files ---------------------------------------------------------------------------------------------------------


def text_of(path: Path) -> str:
    """What a text file says; nothing where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def json_of(text: str) -> dict[str, object]:
    """The object that a text holds as JSON; empty where it holds none."""
    try:
        return mapping(json.loads(text))
    except ValueError:
        return {}


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty where there is no such file, or no object in it."""
    return json_of(text_of(path))


def read_lines(path: Path) -> list[dict[str, object]]:
    """The objects of a file of JSON lines; a line that was cut short, as by a full disk, is passed over."""
    return [found for line in text_of(path).splitlines() if (found := json_of(line))]


def read_yaml(text: str) -> dict[str, object]:
    """The mapping that a text holds as YAML; empty where it holds none."""
    try:
        return mapping(yaml.safe_load(text))
    except yaml.YAMLError:
        return {}


# -- values --------------------------------------------------------------------------------------------------------


def at(value: object, *keys: str) -> object:
    """What lies at the end of the keys; None where nothing does."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: object, *keys: str) -> float:
    """The number at the end of the keys, nan where there is none; a null stands for what was not finite."""
    found = at(value, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return math.nan
    return float(found) if abs(found) < OVERFLOW else math.nan


def text(value: object, *keys: str) -> str:
    """What lies at the end of the keys, as text; what is no mapping on the way stands for itself."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else value
    return "" if value is None else str(value)


def mapping(value: object, *keys: str) -> dict[str, object]:
    """The mapping at the end of the keys, its names as text; empty where there is none."""
    found = at(value, *keys)
    return {str(key): inner for key, inner in found.items()} if isinstance(found, dict) else {}


def sequence(value: object, *keys: str) -> list[object]:
    """The list at the end of the keys; empty where there is none."""
    found = at(value, *keys)
    return list(found) if isinstance(found, list) else []


def numbers(value: object, *keys: str) -> list[float]:
    """The numbers of the list at the end of the keys, nan where an entry is none."""
    return [number(one) for one in sequence(value, *keys)]


def texts(value: object, *keys: str) -> list[str]:
    """The entries of the list at the end of the keys, as text."""
    return [str(one) for one in sequence(value, *keys)]


# -- lines of metrics ------------------------------------------------------------------------------------------------

Lines = Sequence[dict[str, object]]


def column(lines: Lines, *keys: str) -> Float[np.ndarray, "n"]:
    """One number of each line, nan where there is none."""
    return np.array([number(line, *keys) for line in lines], dtype=float)


def probe_lines(lines: Lines) -> Lines:
    """Those at which a probe ran."""
    return [line for line in lines if mapping(line, "probe")]


def finite(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
    """Those that are finite."""
    return values[np.isfinite(values)]


def mean(values: Float[np.ndarray, "n"]) -> float:
    """The mean of the finite values, nan where there are none."""
    values = finite(values)
    return float(values.mean()) if len(values) else math.nan
