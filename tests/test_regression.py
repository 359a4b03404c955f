"""A number for each image: read from tables and parquet, regressed on features, and said of other images."""

import csv
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_pictures
from PIL import Image
from scipy import stats
from sklearn.linear_model import Ridge as Reference

from underpaint.backbones import create_arguments, from_arguments, save_encoder
from underpaint.cli import main
from underpaint.data import open_source
from underpaint.errors import InputError
from underpaint.evaluation.regression import PENALTIES, ridge
from underpaint.evaluation.results import bootstrap
from underpaint.patches import Standardize


def write_bright(folder: Path, count: int = 60, column: str = "brightness") -> Path:
    """Noisy pictures, and in labels.csv how bright each is."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        level = rng.uniform(40, 210)
        pixels = (level + rng.normal(0, 30, (32, 32, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
        rows.append((f"images/{number:03d}.png", f"{pixels.mean() / 10:.4f}"))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", column), *rows])
    return folder


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bright(tmp_path_factory.mktemp("bright"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    arguments = create_arguments("vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, **small)
    torch.manual_seed(0)
    save_encoder(folder, from_arguments(arguments), arguments, Standardize([0.5] * 3, [0.25] * 3))
    return folder


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())["tasks"]["regression"]


def test_a_number_is_regressed_beside_baselines_and_said_of_other_images(
    bright: Path, encoder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "worth"
    assert main(["evaluate", str(encoder), "--data", str(bright), "--task", "regression", "--out", str(out)]) == 0
    found = results(out)
    assert (found["train"], found["test"], found["number"]) == (48, 12, "brightness")
    assert list(found["rows"]) == ["encoder", "untrained", "raw pixels", "HOG", "mean"]
    assert found["rows"]["encoder"]["mae"] < 0.5 * found["rows"]["mean"]["mae"]
    assert found["rows"]["encoder"]["r2"] > 0.8
    assert found["rows"]["mean"]["r2"] < 0.05
    assert set(found["gains"]["encoder over untrained"]) == {"mae", "mae_error", "r2", "r2_error"}
    assert all(row["mae_error"] > 0 and row["r2_error"] >= 0 for row in found["rows"].values())
    assert (out / "regression" / "numbers.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "numbers: 60 images, column 'brightness'" in said
    assert "Mean absolute error" in said
    # what was kept says the numbers, and the errors are those that were told
    used = tmp_path / "used"
    assert main(["predict", str(out), str(bright), "--out", str(used)]) == 0
    with open(used / "predictions.csv") as file:
        numbers = {row["path"]: float(row["brightness"]) for row in csv.DictReader(file)}
    source = open_source(bright)
    wanted = {entry.name: entry.number for entry in source.entries}
    assert numbers.keys() == wanted.keys()
    assert np.corrcoef([numbers[k] for k in wanted], [wanted[k] or 0.0 for k in wanted])[0, 1] > 0.9
    with Image.open(used / "predictions.png") as picture:
        assert picture.width > 600


def test_data_without_numbers_are_refused_in_one_line(
    pictures: Path, encoder: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["evaluate", str(encoder), "--data", str(pictures), "--task", "regression"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "has no numbers; expected a numeric column" in error
    assert error.count("\n") == 1


@pytest.mark.quick
@pytest.mark.parametrize(("n", "d"), [(400, 12), (60, 200)])
def test_ridge_is_that_of_scikit_learn(n: int, d: int) -> None:
    """At the same penalty, with more images than features and with fewer."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) * np.logspace(0, -2, d) + 5
    y = x[:, :3] @ [1.0, -2.0, 30.0] + rng.normal(size=n) + 100
    made = ridge(torch.from_numpy(x), y)
    assert made.penalty in PENALTIES
    standard = (x - x.mean(0)) / x.std(0)
    reference = Reference(alpha=made.penalty * n, solver="cholesky").fit(standard, y)
    np.testing.assert_allclose(made(torch.from_numpy(x)), reference.predict(standard), rtol=1e-4)
    with pytest.raises(InputError, match="not all finite"):
        ridge(torch.full((5, 3), torch.nan), np.arange(5.0))


@pytest.mark.quick
def test_noise_gets_a_strong_penalty_and_two_images_some() -> None:
    rng = np.random.default_rng(0)
    noise = ridge(torch.from_numpy(rng.normal(size=(200, 50))), rng.normal(size=200))
    assert (noise.penalty or 0) >= 1
    few = ridge(torch.from_numpy(rng.normal(size=(2, 3))), np.array([1.0, 2.0]))
    assert few.penalty in PENALTIES  # nothing to choose by


def test_errors_are_those_of_the_groups(encoder: Path, tmp_path: Path) -> None:
    folder = write_bright(tmp_path / "data", 40)
    out = [tmp_path / "alone", tmp_path / "grouped"]
    arguments = ["evaluate", str(encoder), "--data", str(folder), "--task", "regression", "--untrained", "--out"]
    assert main([*arguments, str(out[0])]) == 0
    assert main([*arguments, str(out[1]), "--groups", r"(\d)\.png"]) == 0
    for found in map(results, out):
        assert found["rows"]["encoder"]["mae_error"] > 0
        assert found["gains"] == {}


# -- where numbers are read ---------------------------------------------------------------------------------------------


def numbers(data: Path) -> dict[str, float | None]:
    return {entry.name: entry.number for entry in open_source(data).entries}


def a_picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.quick
def test_tables_beside_images_name_them_from_where_they_lie(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_pictures(tmp_path / split, 4, size=8)
        names = sorted(file.relative_to(tmp_path / split).as_posix() for file in (tmp_path / split).rglob("*.png"))
        lines = ["file_name,weight", *(f"{name},{number}.5" for number, name in enumerate(names)), "gone.png,7"]
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
    source = open_source(tmp_path)
    assert {entry.number for entry in source.entries if entry.split == "train"} == {0.5, 1.5, 2.5, 3.5}
    assert all(entry.label is not None for entry in source.entries)
    assert source.number == "weight"
    assert "2 of the 10 images that tables list are not there" in source.notes
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted(tmp_path.rglob("t*/**/*.*")):
            packed.write(file, file.relative_to(tmp_path))
    assert numbers(archive) == numbers_without(tmp_path, archive)


def numbers_without(folder: Path, archive: Path) -> dict[str, float | None]:
    archive.rename(archive.with_suffix(".away"))
    found = numbers(folder)
    archive.with_suffix(".away").rename(archive)
    return found


@pytest.mark.quick
@pytest.mark.parametrize(
    ("table", "wanted", "note"),
    [
        ("file_name,age\na.png,3\nb.png,\n", {"a.png": 3.0, "b.png": None}, "numbers: 1 images, column 'age'"),
        ("path,age,target\na.png,3,1e3\nb.png,4,inf\n", {"a.png": 1000.0, "b.png": None}, "column 'target'"),
        ("image,age,height\na.png,3,1\nb.png,4,2\n", {"a.png": None, "b.png": None}, "columns of numbers: age, height"),
        ("name,kind\na.png,cat\nb.png,dog\n", {"a.png": None, "b.png": None}, "class labels: none"),
        ("who,age\na.png,3\n", {"a.png": None, "b.png": None}, "labels.csv is not read: no column is called file_name"),
        ("", {"a.png": None, "b.png": None}, "labels.csv is not read"),
    ],
)
def test_which_column_is_read(tmp_path: Path, table: str, wanted: dict[str, float | None], note: str) -> None:
    for name in wanted:
        (tmp_path / name).write_bytes(a_picture())
    (tmp_path / "labels.csv").write_text(table)
    assert numbers(tmp_path) == wanted
    assert any(note in line for line in open_source(tmp_path).notes)


@pytest.mark.quick
def test_a_table_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(a_picture())
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(InputError, match=r"labels\.csv cannot be read as CSV"):
        open_source(tmp_path)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"label": [0.5, 1.5]}, [0.5, 1.5]),
        ({"label": [0, 1]}, [None, None]),
        ({"label": [0, 1], "age": [3, None]}, [3.0, None]),
        ({"age": [3.0, 4.0], "value": [1, 2]}, [1.0, 2.0]),
        ({"word": ["a", "b"]}, [None, None]),
    ],
)
def test_numeric_columns_of_parquet(tmp_path: Path, columns: dict[str, list[Any]], wanted: list[float | None]) -> None:
    pq.write_table(pa.table({"image": [a_picture()] * 2, **columns}), tmp_path / "a.parquet")
    assert [entry.number for entry in open_source(tmp_path / "a.parquet").entries] == wanted
    shutil.copy(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert [entry.number for entry in open_source(tmp_path).entries] == wanted * 2


@pytest.mark.quick
def test_the_bootstrap_of_a_correlation_has_the_error_of_fishers_z() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=400)
    said = wanted + rng.normal(size=400)

    def correlation(chosen: np.ndarray) -> dict[str, float]:
        return {"r": float(np.corrcoef(wanted[chosen], said[chosen])[0, 1])}

    found = bootstrap(correlation, [(400, None)], 400, 0).numbers()
    low, high = stats.pearsonr(wanted, said).confidence_interval(0.6827)
    assert found["r_error"] == pytest.approx((high - low) / 2, rel=0.25)
