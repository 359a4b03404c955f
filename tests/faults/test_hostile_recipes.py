"""Recipes that are damaged, or that somebody made to hang or fill a machine: one line, status 2, in a moment."""

import time
from pathlib import Path

import pytest

from underpaint.cli import main
from underpaint.errors import InputError
from underpaint.reading import LARGEST_YAML, plain_json
from underpaint.recipes.recipe import stored_recipe
from underpaint.recipes.request import read_recipe

LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
HOSTILE = {
    "aliases": (LAUGHS, "aliases"),
    "an alias of itself": ("method: &a {name: *a}", "aliases"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep in blocks": ("- " * 50_000, "nested too deeply"),
    "large": ("method: {name: mae}\n" + "#" * LARGEST_YAML, "more than the 262,144 bytes that are read"),
    "a number without end": ("format: " + "9" * 10_000, "not YAML"),
    "no time": ("format: !!timestamp noon", "not YAML"),
    "no text": (b"\xff\xfe\x00\xd8", "not UTF-8"),
    "empty": ("", "holds no settings"),
    "a list": ("[1, 2]", "holds no settings"),
    "a word for a method": ("method: mae", "method: is 'mae'; it must be a mapping"),
    "a list for an encoder": ("encoder: [1]", "encoder: is [1]; it must be a mapping"),
    "a word for what was measured": ("measured: fast", "measured: is 'fast'"),
    "a long name": (f"{'a' * 900}: 1", "no setting 'aaa"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_one_line(name: str, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture) -> None:
    text, said = HOSTILE[name]
    run = tmp_path / "run"
    run.mkdir()
    recipe = run / "recipe.yaml"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.perf_counter()
    for read in (lambda: read_recipe(str(recipe)), lambda: stored_recipe(run)):
        with pytest.raises(InputError) as raised:
            read()
        assert said in str(raised.value)
        assert len(str(raised.value).replace(str(tmp_path), "")) < 600
    assert main(["pretrain", str(pictures), "--out", str(tmp_path / "out"), "--recipe", str(recipe)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert time.perf_counter() - start < 10


@pytest.mark.quick
def test_json_ends_in_a_value_error() -> None:
    for text in ("[" * 200_000, "9" * 10_000, "{", b"\xff", ""):
        with pytest.raises(ValueError, match=r"^(nested too deeply|not JSON: )"):
            plain_json(text)
