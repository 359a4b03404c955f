"""`pretrain` and `compare` with flags and settings laid over a recipe, as the command line lays them."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from underpaint import pretraining
from underpaint.comparison import run as comparing
from underpaint.comparison.plan import recipes_of
from underpaint.config import COMPARED, FLAGS
from underpaint.recipes.request import asked
from underpaint.train.run_folder import Run


def pretrain(
    data: str | Path,
    out: Path,
    *,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
    stop_at: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **flags: Any,
) -> Run:
    assert set(flags) <= set(FLAGS)
    chosen = asked(out, recipe, flags, settings or {})
    return pretraining.pretrain(data, out, chosen, stop_at=stop_at, clock=clock)


def compare(
    data: str | Path,
    out: Path,
    *,
    methods: Sequence[str],
    minutes: float,
    seeds: int = 2,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
    clock: Callable[[], float] | None = None,
    **flags: Any,
) -> dict[str, Any]:
    assert set(flags) <= set(COMPARED)
    recipes = recipes_of(methods, recipe, flags, settings)
    return comparing.compare(data, out, recipes, minutes, seeds=seeds, clock=clock)
