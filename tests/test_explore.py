"""`explore`, `suggest` and `embed --patches`, from the command line on images that colours tell apart."""

import csv
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from forked import CommandLine
from PIL import Image

from underpaint.backbones import from_arguments
from underpaint.backbones.build import create_arguments, save_encoder
from underpaint.evaluation.bundle import open_bundle
from underpaint.evaluation.neighbourhood import Neighbours, clusters, directions, nearest, typicality
from underpaint.exploring import _by_tsne, copies, layout
from underpaint.patches import Standardize

COLOURS = {"blue": (60, 90, 200), "green": (60, 190, 90), "red": (200, 70, 60)}


def picture(rng: np.random.Generator, colour: str) -> Image.Image:
    """Soft blobs of a colour, no two alike."""
    blobs = Image.fromarray(rng.uniform(0, 255, (5, 5)).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
    pixels = np.asarray(COLOURS[colour]) + 0.35 * (np.asarray(blobs, float)[..., None] - 128)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained ViT of 16-pixel images: colours are what it sees."""
    folder = tmp_path_factory.mktemp("encoder")
    arguments = create_arguments("vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, in_chans=3)
    arguments |= {"embed_dim": 32, "depth": 1, "num_heads": 2}
    torch.manual_seed(0)
    save_encoder(folder, from_arguments(dict(arguments)), arguments, Standardize([0.5] * 3, [0.25] * 3))
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of three classes, with a copy across them, a wrong label, a strange image and a strange name."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for split, count in (("train", 14), ("test", 5)):
        for colour in COLOURS:
            place = folder / split / colour
            place.mkdir(parents=True)
            for k in range(count):
                picture(rng, colour).save(place / f"{k}.png")
    Image.open(folder / "train/red/0.png").save(folder / "test/red/copy.jpg", quality=90)
    (folder / "train/red/1.png").unlink()
    picture(rng, "blue").save(folder / "train/red/wrong.png")
    picture(rng, "green").save(folder / "train/green/<b>&.png")
    strange = np.tile(np.asarray([[0, 255]], np.uint8).repeat(8, 1), (32, 2))
    Image.fromarray(strange).save(folder / "train/green/strange.png")
    return folder


@pytest.fixture(scope="module")
def seen(server: CommandLine, encoder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("seen") / "seen"
    ended = server("explore", encoder, labelled, "--out", out)
    assert ended.status == 0, ended.error
    assert f"embedding-atlas {out}/images.parquet --x x --y y --neighbors neighbors --image image" in ended.out
    return out


def test_explore_writes_what_embedding_atlas_opens(seen: Path, labelled: Path) -> None:
    table = pq.read_table(seen / "images.parquet")
    rows = table.to_pylist()
    names = [row["path"] for row in rows]
    assert sorted(names) == sorted(str(path.relative_to(labelled)) for path in labelled.rglob("*.*"))
    assert [f"{row['split']}/{row['label']}" for row in rows] == [name.rpartition("/")[0] for name in names]
    for number, row in enumerate(rows):
        # as `--neighbors` is documented: {"ids": [...], "distances": [...]}, row numbers from 0, the nearest first
        ids, distances = row["neighbors"]["ids"], row["neighbors"]["distances"]
        assert number not in ids
        assert len(set(ids)) == 15
        assert all(0 <= other < len(rows) for other in ids)
        assert distances == sorted(distances)
        with Image.open(io.BytesIO(row["image"]["bytes"])) as shown:
            assert (shown.format, shown.size) == ("JPEG", (32, 32))
            if row["label"] == "blue":
                assert np.asarray(shown.convert("RGB")).mean((0, 1)).argmax() == 2
    near = {row["path"]: {names[k].split("/")[1] for k in row["neighbors"]["ids"][:3]} for row in rows}
    assert near["test/blue/0.png"] <= {"blue", "red"}
    pairs = {name for name, row in zip(names, rows, strict=True) if row["near_duplicates"] is not None}
    assert pairs == {"train/red/0.png", "test/red/copy.jpg"}
    wrong = rows[names.index("train/red/wrong.png")]
    assert wrong["prediction"] == "blue"
    assert sum(row["prediction"] == row["label"] for row in rows) >= len(rows) - 4
    assert max(rows, key=lambda row: row["oddness"])["path"] == "train/green/strange.png"
    assert np.isfinite([[row["x"], row["y"]] for row in rows]).all()
    assert len({(row["x"], row["y"]) for row in rows}) > len(rows) / 2


def test_the_page_of_explore_needs_nothing_else(seen: Path) -> None:
    page = (seen / "explore.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "://" not in page
    assert "<b>&.png" not in page  # escaped, in lists and in the data of the script
    data = json.loads(re.findall(r'id="explored">(.*?)</script>', page, re.DOTALL)[0])
    assert "train/green/<b>&.png" in data["names"]
    assert list(data["columns"]) == ["cluster", "label", "prediction", "split"]
    assert len(data["near"]) == len(data["names"]) == len(data["places"])
    for title in ("Clusters", "Odd ones", "Near-duplicates", "Unlike their label"):
        assert f"<h2>{title}</h2>" in page
    assert "red, not blue?" in page
    assert "1 group of 2 images" in page


def test_explore_colours_by_predictions(server: CommandLine, encoder: Path, labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "predictions.csv"
    table.write_text("path,class,probability\ntrain/red/0.png,green,0.9\n")
    ended = server("explore", encoder, labelled, "--out", tmp_path / "seen", "--predictions", table)
    assert ended.status == 0, ended.error
    rows = pq.read_table(tmp_path / "seen" / "images.parquet", columns=["path", "prediction"]).to_pylist()
    assert [row for row in rows if row["prediction"]] == [{"path": "train/red/0.png", "prediction": "green"}]
    for text, said in (("path,label\na,b\n", "columns path and class"), ("path,class\na,b\n", "none of its 1 paths")):
        table.write_text(text)
        ended = server("explore", encoder, labelled, "--out", tmp_path / "again", "--predictions", table)
        assert ended.status == 2
        assert said in ended.error
        assert len(ended.error.splitlines()) == 1
        assert not (tmp_path / "again").exists()


# -- suggest ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("unlabelled"), np.random.default_rng(1)
    for colour, count in (("blue", 24), ("green", 14), ("red", 8)):
        for k in range(count):
            picture(rng, colour).save(folder / f"{colour}-{k}.png")
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_suggest_takes_one_of_each_kind_then_goes_on_from_labels(
    server: CommandLine, encoder: Path, unlabelled: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    ended = server("suggest", encoder, unlabelled, "--count", 3, "--out", first)
    assert ended.status == 0, ended.error
    rows = rows_of(first)
    assert list(rows[0]) == ["path", "cluster", "typicality", "reason"]
    assert [row["path"].split("-")[0] for row in rows] == ["blue", "green", "red"]  # the largest cluster first
    assert [row["cluster"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["reason"] == "most typical of a cluster of 24 images with no label"
    # the user adds a column; the image that has no label yet may be asked for again
    told = [row | {"label": row["path"].split("-")[0]} for row in rows]
    told[2]["label"] = ""
    with open(tmp_path / "told.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(told[0]))
        writer.writeheader()
        writer.writerows(told)
    for by, count in (("typical", 1), ("margin", 5), ("random", 44)):
        ended = server(
            *("suggest", encoder, unlabelled, "--count", count, "--by", by, "--labels", tmp_path / "told.csv"),
            *("--out", second),
        )
        assert ended.status == 0, ended.error
        assert "labels: 2 of 46 images, 2 classes" in ended.out
        paths = [row["path"] for row in rows_of(second)]
        assert len(set(paths)) == count
        assert not {row["path"] for row in told[:2]} & set(paths)
        if by == "typical":
            assert paths == [told[2]["path"]]  # the one kind without a label
        if by == "margin":
            assert all(
                "blue or green: " in row["reason"] or "green or blue: " in row["reason"] for row in rows_of(second)
            )


def test_suggest_says_when_chance_is_as_good(
    server: CommandLine, encoder: Path, unlabelled: Path, tmp_path: Path
) -> None:
    many = [f"{colour}-{k}.png,{colour}" for colour in ("blue", "green") for k in range(10)]
    for lines, said in ((many, True), (many[:-1], False)):
        (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines, ""]))
        ended = server(
            *("suggest", encoder, unlabelled, "--count", 2, "--labels", tmp_path / "labels.csv"),
            *("--out", tmp_path / "out.csv"),
        )
        assert ended.status == 0, ended.error
        assert ("--by random is as good" in ended.out) == said


def test_suggest_says_what_it_cannot_use(
    server: CommandLine, encoder: Path, unlabelled: Path, labelled: Path, tmp_path: Path
) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("path,label\nelsewhere.png,red\n")
    out = ["--out", tmp_path / "out.csv"]
    for command, said in (
        ([encoder, labelled], "every image has a label"),
        ([encoder, unlabelled, "--count", 0], "--count 0: must be at least 1"),
        ([encoder, unlabelled, "--by", "margin"], "labels of at least two classes"),
        ([encoder, unlabelled, "--labels", table], "none of its 1 paths is one of the images"),
        ([encoder, unlabelled, "--labels", tmp_path / "none.csv"], "cannot be read"),
    ):
        ended = server("suggest", *command, *out)
        assert ended.status == 2
        assert said in ended.error
        assert len(ended.error.splitlines()) == 1
        assert not (tmp_path / "out.csv").exists()


# -- embed --------------------------------------------------------------------------------------------------------------


def test_embed_writes_patches(server: CommandLine, encoder: Path, unlabelled: Path, tmp_path: Path) -> None:
    ended = server("embed", encoder, unlabelled, "--out", tmp_path / "v.parquet", "--patches", "--image-size", "32x16")
    assert ended.status == 0, ended.error
    table = pq.read_table(tmp_path / "v.parquet")
    patches = table["patches"].combine_chunks().to_numpy_ndarray()
    assert patches.dtype == np.float16
    assert patches.shape == (46, 4, 2, 32)
    vectors = np.asarray(table["vector"].to_pylist())
    np.testing.assert_allclose(patches.astype(np.float64).mean((1, 2)), vectors, atol=2e-3)
    # by hand: one image, cut as evaluation cuts it, its tokens row by row
    bundle = open_bundle(str(encoder), image_size=(32, 16))
    with Image.open(unlabelled / table["path"][5].as_py()) as opened:
        pixels = torch.from_numpy(np.asarray(opened.convert("RGB"))[:, 8:24].copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        tokens = bundle.encoder(bundle.standardize(pixels)).patches[0].reshape(4, 2, 32).numpy()
    np.testing.assert_allclose(patches[5], tokens, atol=2e-3)
    assert np.abs(tokens[0] - tokens[-1]).max() > 0.05


# -- the parts ----------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_all_distances() -> None:
    x = directions(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 3)
    found = nearest(x, 7)
    far = 1 - x.double() @ x.double().T
    far.fill_diagonal_(torch.inf)
    np.testing.assert_array_equal(found.ids, far.argsort(dim=1)[:, :7].numpy())
    np.testing.assert_allclose(found.distances, far.sort(dim=1).values[:, :7].numpy(), atol=1e-5)
    assert nearest(x[:3], 7).ids.shape == (3, 2)


def test_images_that_are_all_alike() -> None:
    x = directions(torch.ones(20, 4))
    assert set(clusters(x, 5)) == {0}
    assert np.isfinite(typicality(x, clusters(x, 5))).all()
    places, how = _by_tsne(x)
    assert not places.any()
    assert "alike" in how


def test_flat_images_are_copies_only_where_they_are_equal() -> None:
    near = Neighbours(np.asarray([[1, 2], [0, 2], [0, 1]]), np.zeros((3, 2), np.float32))
    flat = np.asarray([[10] * 8, [10] * 7 + [11], [90] * 8], np.uint8)
    assert copies(near, flat).tolist() == [0, 0, -1]


def test_umap_gets_each_image_with_itself_first(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Umap:
        def __init__(self, **settings: Any):
            given.update(settings)

        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            return x[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    x = directions(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))
    near = nearest(x, 4)
    places, how = layout(x, near)
    assert how == "UMAP"
    assert places.shape == (30, 2)
    ids, distances = given["precomputed_knn"]
    assert given["n_neighbors"] == ids.shape[1] == 5
    np.testing.assert_array_equal(ids[:, 0], np.arange(30))
    np.testing.assert_array_equal(ids[:, 1:], near.ids)
    assert not distances[:, 0].any()
