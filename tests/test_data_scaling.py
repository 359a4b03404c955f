"""One range for all images that an encoder meets, measured where it is pretrained; faulty and missing pixels."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from asking import pretrain
from PIL import Image

from underpaint.backbones import describe_encoder
from underpaint.cli import main
from underpaint.data import (
    ImageSet,
    check,
    eval_batches,
    format_check,
    load_images,
    open_source,
    pretraining_indices,
    stored_scaling,
)
from underpaint.data.scaling import weighted_quantiles
from underpaint.errors import InputError
from underpaint.prepare import build, construct, load_data, open_data, standardized
from underpaint.recipes.recipe import checked, override, plain
from underpaint.tokenizers import tokenizer_scaling
from underpaint.train.run_folder import Run

NUCLEI = Path(__file__).parents[2] / "shared" / "data" / "demo-nuclei-128" / "nuclei128.zip"
TINY: dict[str, Any] = {"encoder": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "batch_size": 16}
SMALL = {"encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2}
SIZE = (16, 16)


def tiff(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands: dict[str, Any] = {"photometric": "minisblack", **({"planarconfig": "contig"} if array.ndim == 3 else {})}
    tifffile.imwrite(path, array, **(bands | options))


def microscope(folder: Path, dtype: str = "uint16") -> Path:
    """Grey images of three brightnesses by class, 48 to train on and 24 to judge by; one bright spot in the first
    part, and one image that lies in both."""
    rng = np.random.default_rng(0)
    for k in range(72):
        split, label = ("train", "test")[k >= 48], k % 3
        image = 400 + 500 * label + rng.normal(0, 120, (16, 16)).clip(-390, None)
        if k == 0:
            image[3:6, 3:6] = 60_000
        tiff(folder / split / f"class{label}" / f"{k:03}.tif", np.rint(image).astype(dtype))
    same = (folder / "train" / "class1" / "001.tif").read_bytes()
    (folder / "test" / "class1" / "same.tif").write_bytes(same)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return microscope(tmp_path_factory.mktemp("deep") / "data")


@pytest.fixture(scope="module")
def run(deep: Path) -> Path:
    """A few steps on 16-bit images."""
    return pretrain(deep, deep.parent / "run", settings=SMALL, method="mae", steps=2, probe_every=2, **TINY).path


def load(data: Path, **options: Any) -> ImageSet:
    source = open_source(data)
    return load_images(source, pretraining_indices(source), **{"size": SIZE, **options})


def standardised(images: ImageSet) -> np.ndarray:
    """[n, h, w, c], as a network would see them."""
    batches = list(eval_batches(images, size=SIZE))
    whole = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
    return (whole - np.asarray(images.mean)) / np.asarray(images.std)


# -- one range for all -------------------------------------------------------------------------------------------------


def test_an_image_in_train_and_test_is_one_and_the_same(deep: Path) -> None:
    settings = plain(checked({}))
    for path, value in {"data.path": str(deep), "data.image_size": [16, 16], "data.channels": 1}.items():
        override(settings, path, value)
    said: list[str] = []
    recipe = checked(settings)
    pool, judge = load_data(recipe, open_data(recipe, said.append), said.append)
    assert judge.splits is not None
    train, test = (part.images for part in judge.splits)
    twice = [
        next(iter(eval_batches(images, size=SIZE, indices=[images.names.index(name)]))).images
        for images, name in ((train, "train/class1/001.tif"), (test, "test/class1/same.tif"))
    ]
    assert torch.equal(twice[0], twice[1])
    assert any(line.startswith("16-bit images: values from") for line in said)
    assert any("60000" in line and "clipped" in line for line in said)  # the bright spot is not cut in silence
    assert pool.scaling == test.scaling


def test_the_range_is_recorded_with_run_and_encoder_and_resumed_with(run: Path, deep: Path, tmp_path: Path) -> None:
    recorded = Run(run).recipe().measured["scaling"]
    assert recorded == describe_encoder(run)["scaling"] == json.loads((run / "encoder.json").read_text())["scaling"]
    assert (recorded["dtype"], recorded["types"], len(recorded["low"])) == ("uint16", ["uint16"], 3)
    assert recorded["high"][0] < 10_000
    recipe = str(run / "recipe.yaml")
    other = microscope(tmp_path / "other")
    for file in (other / "train" / "class2").iterdir():
        tiff(file, (3 * tifffile.imread(file).astype(int)).clip(0, 65535).astype(np.uint16))
    anew = pretrain(other, tmp_path / "anew", recipe=recipe).recipe().measured["scaling"]
    assert anew["high"] != recorded["high"]  # other data are measured again
    for file in (deep / "train" / "class2").iterdir():
        file.touch()  # the cache is made again, and the recorded range still holds
    again = pretrain(deep, run, recipe=recipe, steps=3)
    assert again.recipe().measured["scaling"] == recorded


def test_every_use_of_an_encoder_has_its_range(run: Path, deep: Path, tmp_path: Path) -> None:
    """One image alone, whose own range is another, gets what it gets among the others."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "same.tif").write_bytes((deep / "test" / "class1" / "same.tif").read_bytes())

    def table(command: list[str], file: Path) -> dict[str, np.ndarray]:
        assert main([*command, "--out", str(file)]) == 0
        if file.suffix == ".parquet":
            rows = pq.read_table(file).to_pylist()
            return {Path(row["path"]).name: np.asarray(row["vector"]) for row in rows}
        lines = [line.split(",") for line in file.read_text().splitlines()[1:]]
        return {Path(line[0]).name: np.asarray([float(line[1])]) for line in lines}

    for name, command in {"vectors.parquet": ["embed", str(run)], "scores.csv": ["score", str(run)]}.items():
        all_, one = (table([*command, str(where)], tmp_path / f"{where.name}-{name}") for where in (deep, alone))
        np.testing.assert_allclose(all_["same.tif"], one["same.tif"], rtol=2e-4, atol=1e-5)
        assert not np.allclose(all_["same.tif"], all_["002.tif"], rtol=1e-3)
    out = tmp_path / "worth"
    assert main(["evaluate", str(run), "--data", str(deep), "--task", "knn,linear", "--out", str(out)]) == 0
    assert json.loads((out / "linear" / "model.json").read_text())["scaling"] == describe_encoder(run)["scaling"]
    rows = []
    for where in (deep, alone):
        assert (
            main(["predict", str(out / "linear"), str(where), "--out", str(tmp_path / f"predicted-{where.name}")]) == 0
        )
        text = (tmp_path / f"predicted-{where.name}" / "predictions.csv").read_text().splitlines()
        rows.append(next(line.split("same.tif,")[1] for line in text if "same.tif" in line))
    assert rows[0] == rows[1]
    assert main(["restore", str(run), str(alone / "same.tif"), "--out", str(tmp_path / "restored.png")]) == 0


def test_what_an_encoder_without_a_range_gets_is_said(run: Path, deep: Path, tmp_path: Path, capsys: Any) -> None:
    older = tmp_path / "older"
    older.mkdir()
    described = json.loads((run / "encoder.json").read_text())
    del described["scaling"]
    (older / "encoder.json").write_text(json.dumps(described))
    (older / "encoder.safetensors").write_bytes((run / "encoder.safetensors").read_bytes())
    for encoder in (str(older), "timm:resnet10t"):
        out = tmp_path / encoder.replace(":", "-").replace("/", "-")
        options = ["--untrained", "--image-size", "32"] if encoder.startswith("timm") else []
        command = ["evaluate", encoder, "--data", str(deep), "--task", "knn,linear", "--out", str(out), *options]
        assert main(command) == 0
        said = capsys.readouterr().out
        assert said.count("does not say in which range its images are") == 1
        kept = stored_scaling(json.loads((out / "linear" / "model.json").read_text())["scaling"])
        assert kept is not None
        assert kept.types == ("uint16",)


def test_a_tokenizer_takes_its_range_to_the_runs_that_it_is_given_to(deep: Path, tmp_path: Path) -> None:
    file = tmp_path / "words.safetensors"
    small = ["--kind", "kmeans", "--image-size", "16", "--stride", "4", "--codebook-size", "16"]
    assert main(["tokenizer", str(deep), *small, "--out", str(file)]) == 0
    scaling = tokenizer_scaling(file)
    assert scaling is not None
    other = tmp_path / "other"
    for number, path in enumerate(sorted(deep.rglob("*.tif"))):
        tiff(other / f"{number}.tif", (tifffile.imread(path).astype(int) // 2).astype(np.uint16))
    settings = plain(checked({"method": {"name": "beit", "tokenizer": str(file)}}))
    for path, value in {"data.path": str(other), "data.image_size": [16, 16]}.items():
        override(settings, path, value)
    recipe = checked(settings)
    assert load_data(recipe, open_data(recipe, lambda _: None), lambda _: None)[0].scaling == scaling
    assert load(other, channels=3).scaling != scaling


def test_weights_to_start_from_bring_their_deviation_only_with_their_range(
    run: Path, deep: Path, pictures: Path
) -> None:
    settings = plain(Run(run).recipe()) | {"init": str(run)}
    described = describe_encoder(run)
    same = load(deep, scaling=stored_scaling(described["scaling"]))
    _, standardize = build(checked(settings), same)
    np.testing.assert_allclose(standardize.std.flatten(), described["std"], rtol=1e-6)
    other = load(pictures)
    said: list[str] = []
    standardize = standardized(construct(checked(settings)), other, said.append)
    np.testing.assert_allclose(standardize.std.flatten(), other.std, rtol=1e-6)
    assert "the images of --init had another range" in said[0]


def test_images_of_another_type_are_refused_in_one_line(tmp_path: Path) -> None:
    deep = microscope(tmp_path / "deep")
    scaling = load(deep).scaling
    shallow = tmp_path / "shallow"
    for file in deep.rglob("*.tif"):
        place = shallow / file.relative_to(deep)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((tifffile.imread(file) // 16).clip(0, 255).astype(np.uint8)).save(place.with_suffix(".png"))
    with pytest.raises(
        InputError, match=r"none of 48 images could be read, the first: .*8-bit image where values were"
    ):
        load(shallow, scaling=scaling)
    plain_scaling = load(shallow).scaling
    assert plain_scaling.plain
    with pytest.raises(InputError, match="16-bit image where values were measured on 8-bit images; save it as those"):
        load(deep, scaling=plain_scaling)
    # both in one set meet at full scale, and so they do later on
    (shallow / "train" / "class0" / "deep.png").write_bytes(png16(np.full((16, 16), 257 * 40, np.uint16)))
    Image.fromarray(np.full((16, 16), 40, np.uint8)).save(shallow / "train" / "class0" / "flat.png")
    mixed = load(shallow)
    assert mixed.scaling.types == ("uint8", "uint16")
    both = [mixed.raw(mixed.names.index(f"train/class0/{name}.png")) for name in ("deep", "flat")]
    np.testing.assert_array_equal(both[0], both[1])


def png16(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.quick
def test_8_bit_images_are_scaled_as_ever(pictures: Path) -> None:
    images = load(pictures, size=(32, 32))
    (batch,) = eval_batches(images, size=(32, 32), indices=range(5))
    files = [np.asarray(Image.open(pictures / name)) for name in images.names]
    expected = torch.from_numpy(np.stack(files[:5])).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(batch.images, expected)
    whole = np.stack(files).astype(np.float64) / 255
    np.testing.assert_allclose(images.mean, whole.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(images.std, whole.std((0, 1, 2)), atol=1e-6)
    assert images.notes == []


# -- a range that faults do not change ---------------------------------------------------------------------------------


def bands(folder: Path, flaw: str) -> Path:
    """16 float images of 4 bands with smooth structure, and a flaw."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:16, :16] / 16
    for k in range(16):
        waves = [np.sin(2 * np.pi * (rng.random() + (1 + c % 2) * x + c * y)) for c in range(4)]
        image = np.stack(waves, axis=2) * 0.1 + 0.3 + rng.normal(0, 0.03, (16, 16, 4)) + 0.05 * rng.normal()
        image = image.astype(np.float32)
        if flaw == "wide band":
            image[..., 3] *= 10_000
        elif flaw and k == 3:
            image[5, 7, 2] = {"hot pixel": 65535.0, "-9999": -9999.0, "-3.4e38": -3.4e38, "nan": np.nan}[flaw]
        tiff(folder / f"{k:02}.tif", image)
    return folder


@pytest.mark.quick
@pytest.mark.parametrize("flaw", ["hot pixel", "-9999", "-3.4e38", "nan", "wide band"])
def test_one_flaw_does_not_take_the_contrast_of_all(tmp_path: Path, flaw: str) -> None:
    """The deviation within an image once it is standardised."""
    sound, flawed = (
        standardised(load(bands(tmp_path / name, name), channels=4)).std((1, 2)).mean(0) for name in ("", flaw)
    )
    assert (sound > 0.6).all()
    np.testing.assert_allclose(flawed, sound, rtol=0.05)


@pytest.mark.quick
@pytest.mark.parametrize("how", ["tag", "setting", "nan", "8 bit"])
def test_pixels_without_a_value_enter_no_statistics(tmp_path: Path, how: str) -> None:
    """A quarter of each image is missing; reference: numpy over the others."""
    rng = np.random.default_rng(2)
    marker = {"tag": -9999.0, "setting": 77.0, "nan": np.nan, "8 bit": 0}[how]
    known = []
    for k in range(8):
        image = (
            rng.normal((1000, 50, 5), (100, 9, 1), (16, 16, 3)) if how != "8 bit" else rng.integers(60, 99, (16, 16, 3))
        )
        image = image.astype(np.float32 if how != "8 bit" else np.uint8)
        image[:8, :8] = marker
        known.append(np.concatenate([image[8:].reshape(-1, 3), image[:8, 8:].reshape(-1, 3)]).astype(np.float64))
        tag = {"extratags": [(42113, "s", 0, str(marker), True)]} if how in ("tag", "8 bit") else {}
        tiff(tmp_path / f"{k}.tif", image, photometric="rgb", **tag)
    images = load(tmp_path, **({"nodata": 77.0} if how == "setting" else {}))
    low, span = np.asarray(images.scaling.low), np.asarray(images.scaling.high) - np.asarray(images.scaling.low)
    pooled = np.concatenate(known)
    np.testing.assert_allclose(np.asarray(images.mean) * span + low, pooled.mean(0), rtol=1e-4)
    np.testing.assert_allclose(np.asarray(images.std) * span, pooled.std(0), rtol=1e-3)
    for k in range(8):  # each becomes the mean of the others of its channel
        np.testing.assert_allclose(images.raw(k)[2, 3], known[k].mean(0), rtol=1e-5, atol=0.51 if how == "8 bit" else 0)


@pytest.mark.quick
def test_a_pixel_of_8_bit_colour_is_missing_only_where_all_its_colours_are(tmp_path: Path) -> None:
    red = np.full((16, 16, 3), (200, 0, 0), np.uint8)
    red[:4] = 0
    tiff(tmp_path / "0.tif", red, photometric="rgb", extratags=[(42113, "s", 0, "0", True)])
    np.testing.assert_array_equal(load(tmp_path).raw(0), np.full((16, 16, 3), (200, 0, 0)))
    tiff(tmp_path / "1.tif", np.full((16, 16, 3), np.nan, np.float32), photometric="rgb")
    with pytest.raises(InputError, match="no pixel of channel 1 has a value"):
        load_images(open_source(tmp_path), [1], size=SIZE)


def test_what_a_range_leaves_out_is_said(tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(3)
    for k in range(12):
        image = rng.integers(100, 200, (16, 16, 4)).astype(np.uint16)
        image[..., 1] = 7
        image[..., 2][rng.random((16, 16)) < 0.1] = 65000
        image[3, 3, 3] = 9000 if k == 5 else 150
        tiff(tmp_path / f"{k}.tif", image)
    images = load(tmp_path, channels=4)
    told = " | ".join(images.notes)
    assert "channel 2 of 4: nearly constant over all images (7)" in told
    assert "channel 3 of 4: 11 % of the pixels are 65000, far from all others" in told
    assert "--set data.nodata=65000" in told
    assert (
        "channel 4 of 4: values go from 100 to 9000; beyond 100 to 298 they are clipped (0.033 % of the pixels)" in told
    )
    assert "channel 1" not in told
    assert images.std[1] == 1  # nothing to standardise
    assert main(["check", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for note in images.notes:
        assert note in shown
    assert str(images.scaling) in shown
    assert check(tmp_path)["flat"] == []
    assert "16-bit images: values become 0 to 1 by channel" in format_check(check(tmp_path))


@pytest.mark.quick
def test_12_bit_in_16_is_seen_whole_and_not_as_flat(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    for k in range(6):
        tiff(tmp_path / f"{k}.tif", rng.integers(100, 300, (16, 16)).astype(np.uint16))
    images = load(tmp_path, channels=1)
    assert 0.9 < standardised(images).std() < 1.1
    assert check(tmp_path)["flat"] == []


@pytest.mark.quick
def test_sparse_spots_on_nothing_keep_their_range(tmp_path: Path) -> None:
    """Fewer pixels than the tails that may be faults, on a background of one value."""
    for k in range(20):
        image = np.full((64, 64), 50, np.uint16)
        if k % 2:
            image[k, k] = 50 + 100 * k
        tiff(tmp_path / f"{k:02}.tif", image)
    images = load(tmp_path, channels=1, size=(64, 64))
    assert (images.scaling.low, images.scaling.high) == ((50,), (1950,))


def test_scalings_that_differ_little_share_no_cache(deep: Path) -> None:
    measured = load(deep).scaling
    near = replace(measured, high=(measured.high[0], measured.high[1], measured.high[2] + 2**-10))
    assert str(near) == str(measured)
    assert load(deep, scaling=near).scaling == near
    assert load(deep, scaling=measured).scaling == measured


@pytest.mark.quick
def test_weighted_quantiles_are_those_of_repeated_values() -> None:
    rng = np.random.default_rng(5)
    values, weights = rng.normal(size=300), rng.integers(1, 9, 300)
    repeated = np.repeat(values, weights)
    shares = (0.01, 0.25, 0.5, 0.97)
    expected = np.quantile(repeated, shares, method="inverted_cdf")
    np.testing.assert_array_equal(weighted_quantiles(values, weights.astype(float), shares), expected)


# -- the microscope ----------------------------------------------------------------------------------------------------


def nuclei(folder: Path) -> tuple[Path, Path]:
    """Crops of the demo's nuclei in grey by kind, as 8 bit, and as a microscope of 12 bit in 16 with an offset would
    have written them, one bright spot in the training part."""
    for split in ("train", "val"):
        with zipfile.ZipFile(NUCLEI) as archive:
            listed = json.loads(archive.read(f"nuclei128/annotations/{split}.json"))["images"]
            for number, one in enumerate(listed):
                data = archive.read(f"nuclei128/images/{split}/{one['file_name']}")
                grey = np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((32, 32), Image.Resampling.BOX))
                name = f"{split}/{one['kind']}/{Path(one['file_name']).stem}"
                (folder / "shallow" / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(grey).save(folder / "shallow" / f"{name}.png")
                counts = 300 + 14 * grey.astype(np.uint16)
                if split == "train" and number == 0:
                    counts[10:12, 10:12] = 60_000
                tiff(folder / "deep" / f"{name}.tif", counts)
    return folder / "shallow", folder / "deep"


@pytest.mark.skipif(not NUCLEI.is_file(), reason="needs ../shared/data/demo-nuclei-128")
def test_a_16_bit_microscope_is_judged_like_its_8_bit_twin(tmp_path: Path) -> None:
    found = {}
    for data in nuclei(tmp_path):
        out = tmp_path / f"run-{data.name}"
        settings = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
        flags = ["--method", "mae", "--encoder", "vit_tiny_patch16_224", "--image-size", "32", "--patch-size", "8"]
        steps = ["--steps", "30", "--batch-size", "32", "--probe-every", "30"]
        assert main(["pretrain", str(data), "--out", str(out), *flags, *steps, *settings]) == 0
        found[data.name] = json.loads((out / "probes.json").read_text())
    for who, kind in (("encoder", "linear"), ("encoder", "knn"), ("raw_pixels", "linear"), ("raw_pixels", "knn")):
        one, other = (found[name][who][kind] for name in ("shallow", "deep"))
        error = np.hypot(one["standard_error"], other["standard_error"])
        assert abs(one["accuracy"] - other["accuracy"]) <= max(error, 1 / found["deep"]["test"]), (
            who,
            kind,
            one,
            other,
        )
