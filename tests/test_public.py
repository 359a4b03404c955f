"""What `import underpaint` gives: the commands as functions, with signatures that tell all."""

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import write_pictures

import underpaint
from underpaint import InputError, Options, Recipe
from underpaint.train.run_folder import Run

SMALL = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def small(name: str) -> Recipe:
    recipe = underpaint.recipe(name)
    recipe.encoder = dict(SMALL)
    recipe.data.image_size = (16, 16)
    recipe.optimiser.batch_size = 16
    recipe.run.steps, recipe.run.minutes = 2, None
    return recipe


@pytest.mark.quick
@pytest.mark.parametrize(
    "name",
    [
        "pretrain",
        "compare",
        "evaluate",
        "predict",
        "embed",
        "explore",
        "suggest",
        "restore",
        "score",
        "recipe",
        "export",
    ],
)
def test_a_command_is_a_function_that_tells_what_it_takes(name: str) -> None:
    function = getattr(underpaint, name)
    parameters = inspect.signature(function).parameters.values()
    assert 1 <= len(parameters) <= 9
    assert all(parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters)
    assert "Raises:" in (function.__doc__ or "")


def test_from_images_to_a_judged_encoder_in_python(pictures: Path, tmp_path: Path) -> None:
    run = underpaint.pretrain(pictures, tmp_path / "run", small("mae"))
    assert isinstance(run, Run)
    assert run.recipe().optimiser.batch_size == 16
    assert underpaint.load_encoder(run.path).dim == 32
    results: Any = underpaint.evaluate(
        run.path, pictures, ["knn", "linear"], tmp_path / "worth", Options(untrained=True)
    )
    assert set(results["tasks"]) == {"knn", "linear"}
    assert underpaint.embed(run.path, pictures, tmp_path / "vectors.parquet") == 90
    assert pq.read_table(tmp_path / "vectors.parquet").num_rows == 90
    assert len(underpaint.score(run.path, pictures)) == 90
    image = next(pictures.rglob("*.png"))
    underpaint.restore(run.path, [image], tmp_path / "sheet.png")
    underpaint.predict(tmp_path / "worth" / "linear", pictures, tmp_path / "predicted")
    assert (tmp_path / "predicted" / "predictions.csv").read_text().count("\n") == 91
    # the same run, asked for by its name alone, has nothing left to do; more steps extend it
    assert underpaint.pretrain(pictures, run.path).load()[1]["step"] == 2  # pyright: ignore[reportOptionalSubscript]
    longer = run.recipe()
    longer.run.steps = 3
    assert underpaint.pretrain(pictures, run.path, longer).load()[1]["step"] == 3  # pyright: ignore[reportOptionalSubscript]


def test_a_comparison_in_python(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 60)
    recipes = {"short mask": small("mae"), "localmim": small("localmim")}
    recipes["short mask"].method["mask_ratio"] = 0.5
    clock = (0.01 * reading for reading in itertools.count()).__next__
    found = underpaint.compare(pictures, tmp_path / "which", recipes, 0.01, seeds=1, clock=clock)
    assert {"short mask", "localmim"} < {row["name"] for row in found["rows"]}
    assert json.loads((tmp_path / "which" / "compare.json").read_text())["verdict"] == found["verdict"]


@pytest.mark.quick
def test_a_recipe_is_checked_where_it_is_used(pictures: Path, tmp_path: Path) -> None:
    recipe = underpaint.recipe("mae")
    with pytest.raises(AttributeError):
        recipe.run.minuets = 3  # pyright: ignore[reportAttributeAccessIssue]
    recipe.optimiser.lr = -1.0
    with pytest.raises(InputError, match=r"optimiser\.lr: -1; it must be at least 0"):
        underpaint.pretrain(pictures, tmp_path / "run", recipe)
    recipe = underpaint.recipe("mae")
    recipe.method["mask_ration"] = 0.5
    with pytest.raises(InputError, match="no setting 'mask_ration'"):
        underpaint.pretrain(pictures, tmp_path / "run", recipe)
    with pytest.raises(InputError, match="maee"):
        underpaint.recipe("maee")
    other = underpaint.recipe("simmim")
    other.data.image_size = (64, 64)
    with pytest.raises(InputError, match=r"other conditions than mae: data\.image_size"):
        underpaint.compare(pictures, tmp_path / "which", {"mae": underpaint.recipe("mae"), "simmim": other}, 1.0)


@pytest.mark.quick
def test_a_recipe_of_format_1_says_what_to_do(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("format: 1\nmethod: {name: mae, hidden_ratio: 0.6}\n")
    for call in (
        lambda: underpaint.pretrain(pictures, tmp_path),
        lambda: underpaint.recipe(str(tmp_path / "recipe.yaml")),
    ):
        with pytest.raises(
            InputError, match=r"format 1; this version reads format 2.*hidden_ratio to mask_ratio"
        ) as said:
            call()
        assert "\n" not in str(said.value)
