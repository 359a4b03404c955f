"""Features in three lines from files, PIL images and arrays; and encoders that are compiled, exported and copied whole."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from tiny import ENCODERS, photographs

import underpaint
from underpaint.backbones import create_arguments, from_arguments, save_encoder
from underpaint.data import Scaling
from underpaint.errors import InputError
from underpaint.patches import Standardize

EIGHT_BIT = Scaling("uint8", ("uint8",), (0.0,) * 3, (255.0,) * 3, (0.5,) * 3)
SIXTEEN_BIT = Scaling("uint16", ("uint16",), (0.0,) * 2, (4095.0,) * 2, (0.5,) * 2)
KINDS = [*ENCODERS, "convnext"]


def saved(folder: Path, kind: str, scaling: Scaling | None = EIGHT_BIT, channels: int = 3) -> Path:
    """A tiny encoder of 32 px, with random weights, in a folder of its own."""
    torch.manual_seed(0)
    convnext = {"name": "convnext_atto", "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    chosen: Any = ENCODERS.get(kind, convnext)
    arguments = create_arguments(**chosen, image_size=(32, 32), in_chans=channels)
    made = from_arguments(arguments, (32, 32)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(folder, made, arguments, Standardize([0.4] * channels, [0.25] * channels), scaling)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of unlike sizes, forms and shapes, as files."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (9, 12, 3), np.uint8)
    large = Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6
    large.save(folder / "a.jpg", exif=exif)
    large.resize((40, 36)).convert("P").save(folder / "b.png")
    large.resize((50, 30)).convert("L").save(folder / "c.png")
    alpha = large.resize((33, 70)).convert("RGBA")
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (70, 33), np.uint8)))
    alpha.save(folder / "d.png")
    return folder


@pytest.mark.quick
def test_three_lines_give_the_features_that_embed_writes(mixed: Path, tmp_path: Path) -> None:
    run = saved(tmp_path / "encoder", "vit")
    encoder = underpaint.load_encoder(run)
    features = encoder(encoder.transform(sorted(mixed.glob("*.*"))))
    underpaint.embed(run, mixed, tmp_path / "vectors.parquet")
    table = pq.read_table(tmp_path / "vectors.parquet").to_pydict()
    assert table["path"] == ["a.jpg", "b.png", "c.png", "d.png"]
    torch.testing.assert_close(features.pooled, torch.tensor(table["vector"]), atol=1e-5, rtol=1e-5)
    assert features.pooled.std(0).max() > 1e-3  # the images do differ


@pytest.mark.quick
def test_files_images_and_arrays_are_the_same_images(mixed: Path, tmp_path: Path) -> None:
    encoder = underpaint.load_encoder(saved(tmp_path, "vit"))
    for name in ("a.jpg", "b.png", "c.png", "d.png"):
        file = encoder.transform(mixed / name)
        with Image.open(mixed / name) as image:
            # a JPEG is decoded at a fraction of its size where it comes as a file
            close = 0.15 if name == "a.jpg" else 0.0
            torch.testing.assert_close(encoder.transform(image), file, atol=close, rtol=0)
            if name != "a.jpg":
                plain = image.convert("RGB") if image.mode == "P" else image
                torch.testing.assert_close(encoder.transform([np.asarray(plain)]), file, atol=0, rtol=0)
    assert encoder.transform([mixed / "a.jpg", str(mixed / "b.png")]).shape == (2, 3, 32, 32)


@pytest.mark.quick
def test_arrays_of_sixteen_bits_and_other_channels(tmp_path: Path) -> None:
    encoder = underpaint.load_encoder(saved(tmp_path, "resnet", SIXTEEN_BIT, 2))
    values = np.random.default_rng(0).integers(0, 4096, (40, 48, 2)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    torch.testing.assert_close(encoder.transform(values), encoder.transform(tmp_path / "a.tif"), atol=0, rtol=0)
    whole = np.full((32, 32, 2), 4095, np.uint16)
    torch.testing.assert_close(encoder.transform(whole), torch.full((1, 2, 32, 32), 0.6 / 0.25))


@pytest.mark.quick
def test_what_is_no_image_for_it_is_one_line(mixed: Path, tmp_path: Path) -> None:
    encoder = underpaint.load_encoder(saved(tmp_path, "vit"))
    wrong: list[tuple[Any, str]] = [
        ("absent.png", r"absent\.png: No such file"),
        ([], "no images"),
        (np.zeros((4, 4, 3)), "image 0: a float image where values were measured on 8-bit images"),
        ([mixed / "b.png", np.zeros((8, 8, 5), np.uint8)], "image 1: "),
        (np.zeros((8, 8, 3), np.int64), "an array of 8x8x3 int64; give"),
        (np.zeros((2, 3, 8, 8), np.uint8), "an array of 2x3x8x8 uint8; give"),
    ]
    for images, said in wrong:
        with pytest.raises(InputError, match=said) as found:
            encoder.transform(images)
        assert "\n" not in str(found.value)
    with pytest.raises(InputError, match=r"load_encoder\(RUN\) does"):
        underpaint.encoder(**ENCODERS["vit"], image_size=32).transform(mixed / "b.png")
    # a convolutional net written before underpaint said its size, and one whose range nobody knows
    older = saved(tmp_path / "older", "resnet")
    described = json.loads((older / "encoder.json").read_text())
    del described["image_size"]
    (older / "encoder.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="image_size="):
        underpaint.load_encoder(older).transform(mixed / "b.png")
    assert underpaint.load_encoder(older, (64, 32)).transform(mixed / "b.png").shape == (1, 3, 64, 32)
    for damaged in ([0, 32], [32], "32", {"a": 1}):
        (older / "encoder.json").write_text(json.dumps({**described, "image_size": damaged}))
        with pytest.raises(InputError, match="'image_size' is damaged"):
            underpaint.load_encoder(older)


@pytest.mark.quick
def test_a_copy_is_the_same_encoder(mixed: Path, tmp_path: Path) -> None:
    encoder = underpaint.load_encoder(saved(tmp_path, "swin"))
    made = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    images = made.transform([mixed / "a.jpg", mixed / "b.png"])
    assert made(images).pooled.abs().max() > 1e-3
    assert encoder.half().transform(mixed / "b.png").dtype == torch.float16


@pytest.mark.unhooked
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_encoder_is_compiled_and_exported(kind: str, tmp_path: Path) -> None:
    encoder = underpaint.load_encoder(saved(tmp_path, kind))
    images = photographs(2)
    with torch.no_grad():
        want = encoder(images)
        compiled: Any = torch.compile(encoder, backend="aot_eager", fullgraph=True)
        exported = torch.export.export(encoder, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for found in (compiled(images), exported.module()(images)):
            torch.testing.assert_close(found.pooled, want.pooled, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.patches, want.patches, atol=1e-5, rtol=1e-5)
        more = photographs(3)
        torch.testing.assert_close(exported.module()(more).pooled, encoder(more).pooled, atol=1e-5, rtol=1e-5)
