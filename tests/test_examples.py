"""The examples of the documentation are executed."""

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import made_picture
from test_transforms import saved

import underpaint
from underpaint.masking import MASKS
from underpaint.methods import METHODS
from underpaint.targets import TARGETS

ROOT = Path(__file__).parents[1]


def modules_with_examples() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(underpaint.__path__, "underpaint.")]
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [name for name in names if any(t.examples for t in finder.find(importlib.import_module(name)))]


def test_there_are_examples() -> None:
    assert {"underpaint.backbones.build", "underpaint.methods.mae", "underpaint.methods.energy.energy"} <= set(
        modules_with_examples()
    )


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.fixture
def unchanged() -> Iterator[None]:
    """What the examples add to the lists of names is gone afterwards."""
    lists: list[dict[str, Any]] = [MASKS, TARGETS, METHODS.data]
    before = [dict(names) for names in lists]
    yield
    for names, kept in zip(lists, before, strict=True):
        names.clear()
        names.update(kept)


@pytest.fixture
def beside_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with an encoder in runs/first and an image in photos/."""
    saved(tmp_path / "runs" / "first", "vit")
    (tmp_path / "photos").mkdir()
    made_picture(np.random.default_rng(0), 1).save(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("unchanged", "beside_a_run")
@pytest.mark.parametrize("page", ["README.md", "docs/explore.md", "docs/export.md", "docs/extending.md"])
def test_python_in_the_documentation_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
