"""What damaged inputs by the thousand found, each as a test of its own, and the search itself for a while."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from safetensors.torch import save_file

from underpaint.backbones import create_arguments, from_arguments, load_encoder, save_encoder
from underpaint.data import Unreadable, decode
from underpaint.data.open import open_source
from underpaint.data.sources import remote
from underpaint.errors import InputError
from underpaint.evaluation.keep import kept
from underpaint.files import refuse_inside
from underpaint.patches import Standardize
from underpaint.recipes.recipe import checked
from underpaint.tokenizers import load_tokenizer

SEED = 22


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "kind", ["image", "archive", "annotation", "recipe file", "encoder"]
)  # a process each, which takes the time
def test_damaged_inputs_are_refused_in_one_line(kind: str) -> None:
    """`python tests/faults/fuzz.py --kind KIND --seed SEED --only NUMBER` makes a fault again."""
    share = fuzz.KINDS[kind][1] / sum(share for _, share in fuzz.KINDS.values())
    found = fuzz.fuzz(kind, SEED, 60, last=max(20, int(1_500 * share)))
    assert not found.faults, f"seed {SEED}: " + "\n".join(found.faults)
    assert found.inputs > 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_damaged_inputs_are_refused_in_one_line() -> None:
    for kind, (_, share) in fuzz.KINDS.items():
        found = fuzz.fuzz(kind, SEED + 1, 14 * share)
        assert not found.faults, f"seed {SEED + 1}: " + "\n".join(found.faults)
        assert found.inputs


BAD = """
import os, random, sys
sys.path.insert(0, FOLDER)
import fuzz

def hangs():
    while True:
        pass

def fills():
    held = b"x" * (1_100 * 2**20)
    hangs()

FATES = {1: lambda: 1 / 0, 2: hangs, 3: fills, 4: lambda: os._exit(7)}
NUMBERS = {random.Random(f"bad 0 {n}").random(): n for n in range(6)}
kind = fuzz.Kind(lambda rng: NUMBERS[rng.random()], lambda n: FATES.get(n, lambda: None)())
fuzz.GROUPS["bad"] = lambda folder: {"bad": kind}
fuzz.KINDS["bad"] = ("bad", 1)
sys.exit(fuzz.main())
"""


@pytest.mark.timeout(120)
def test_the_search_sees_what_hangs_fails_and_fills_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above would show nothing."""
    (tmp_path / "bad.py").write_text(BAD.replace("FOLDER", repr(str(Path(fuzz.__file__).parent))))
    monkeypatch.setattr(fuzz, "__file__", str(tmp_path / "bad.py"))
    monkeypatch.setattr(fuzz, "LONGEST", 2.0)
    monkeypatch.setattr(fuzz, "LARGEST", 2**20)
    found = fuzz.fuzz("bad", 0, 100, last=5)
    told = [fault.removeprefix("bad, seed 0, number ")[:35] for fault in found.faults]
    assert told[0].startswith("1: Traceback")
    assert told[1] == "2: takes more than 2 s"
    assert told[2].startswith("3: takes 1.")
    assert told[3].startswith("4: ended with status 7")
    assert len(told) == 4
    assert found.inputs == 6


@pytest.mark.quick
def test_what_is_damaged_is_whole_before() -> None:
    """Or most inputs would be refused for the same reason."""
    for data in fuzz.pictures():
        assert decode(data).shape[2] == 3


@pytest.mark.quick
def test_a_zip_file_with_a_nameless_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("x", b"1")
    data = (tmp_path / "a.zip").read_bytes()
    place = data.index(b"PK\x01\x02")
    changed = data[: place + 28] + b"\0\0\1\0" + data[place + 32 :]  # no name, and the name as something extra
    (tmp_path / "a.zip").write_bytes(changed)
    with pytest.raises(InputError):
        open_source(tmp_path / "a.zip")


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, use_dictionary=False, compression="none", write_statistics=False)
    return buffer.getvalue()


@pytest.mark.quick
@pytest.mark.parametrize("place", ["label", "path"])
def test_a_parquet_file_with_text_that_is_none(place: str, tmp_path: Path) -> None:
    image = {"bytes": b"x", "path": "qqqqq"}
    data = parquet(image=[image], label=["qqqqq" if place == "label" else "y"])
    if place == "label":
        image["path"] = "p"
        data = parquet(image=[image], label=["qqqqq"])
    (tmp_path / "a.parquet").write_bytes(data.replace(b"qqqqq", b"\xff\xff\xff\xff\xff"))
    with pytest.raises(InputError, match="is not a readable parquet file: 'utf-8' codec"):
        open_source(tmp_path / "a.parquet")


def test_braces_that_are_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LARGEST_PATTERN", 1_000)
    with pytest.raises(InputError, match=r"wds:\{1\.\.: Unbalanced braces"):
        open_source("wds:{1..")
    with pytest.raises(InputError, match="stands for more than 1,000 shards"):
        open_source("wds:{0..9999999}")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimiser": {"batch_size": None}}, "optimiser.batch_size: has no value"),
        ({"data": {"image_size": None}}, "data.image_size: has no value"),
        ({"method": {"name": "mae", "mask_ratio": None}}, "method.mask_ratio: has no value"),
        ({"encoder": {"name": "vit_tiny_patch16_224", "depth": 10**400}}, "it must be at least"),
        ({"run": {"steps": 10**400}}, "it must be above 0"),
    ],
)
def test_a_recipe_without_a_value_or_with_too_large_a_one(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as raised:
        checked(settings)
    assert said in str(raised.value)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    small = {"embed_dim": 16, "depth": 1, "num_heads": 1}
    arguments = create_arguments("vit_tiny_patch16_224", image_size=(8, 8), patch_size=4, **small)
    save_encoder(tmp_path, from_arguments(arguments), arguments, Standardize([0.5] * 3, [0.25] * 3))
    described = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(described | {"task": "linear"}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    return tmp_path


DAMAGED: dict[str, Any] = {
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "a number": b"1",
    "another format": {"format": "1\n"},
    "no arguments": {"create_model": "x"},
    "no mean": {"mean": None},
    "a word for a mean": {"mean": "x"},
    "std of 0": {"std": [0, 0, 0]},
    "std of other channels": {"std": [1.0]},
    "no number": {"mean": [float("nan")] * 3},
    "a scaling of other names": {"scaling": {"x": 1}},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_description_of_an_encoder_is_one_line(name: str, encoder: Path) -> None:
    for file, read in (("encoder.json", load_encoder), ("model.json", kept)):
        described = json.loads((encoder / file).read_text())
        damage = DAMAGED[name]
        (encoder / file).write_bytes(damage if isinstance(damage, bytes) else json.dumps(described | damage).encode())
        with pytest.raises(InputError) as raised:
            read(encoder)
        assert file in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.quick
def test_an_encoder_without_positions_is_one_line(encoder: Path) -> None:
    described = json.loads((encoder / "encoder.json").read_text())
    del described["create_model"]["patch_size"]  # 16, of 8 pixels
    (encoder / "encoder.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="'vit_tiny_patch16_224' cannot be used"):
        load_encoder(encoder)


def lzw(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, compression="lzw", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_lzw_is_read_as_it_was_written_and_refused_where_it_is_damaged(dtype: str, capfd: Any) -> None:
    """imagecodecs' decoder of damaged streams writes beyond its memory: this ended the process within 2,000 of them."""
    rng = np.random.default_rng(0)
    array = (np.linspace(0, 200, 40 * 36 * 3).reshape(40, 36, 3) + rng.integers(0, 9, (40, 36, 3))).astype(dtype)
    for options in ({}, {"predictor": True}, {"tile": (16, 16)}, {"rowsperstrip": 7}, {"planarconfig": "separate"}):
        given = np.moveaxis(array, 2, 0) if options.get("planarconfig") else array
        data = lzw(given, photometric="rgb", **options)
        assert np.array_equal(decode(data, channels=3), array)
    data = lzw(array, photometric="rgb", rowsperstrip=7)
    refused = 0
    for _ in range(3_000):
        damaged = bytearray(data)
        for place in rng.integers(300, len(data), 3):
            damaged[place] ^= 1 << int(rng.integers(8))
        try:
            decode(bytes(damaged), channels=3)
        except Unreadable:
            refused += 1
    assert refused > 300
    assert capfd.readouterr() == ("", "")


@pytest.mark.quick
def test_a_parquet_file_whose_paths_are_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(image=[{"bytes": fuzz.pictures()[0], "path": b"caf\xe9.png"}]))
    assert [entry.name for entry in open_source(tmp_path / "a.parquet").entries] == ["caf\udce9.png"]


@pytest.mark.quick
def test_a_tokenizer_of_no_words(tmp_path: Path) -> None:
    described = {"format": 1, "kind": "kmeans", "arguments": {"codebook_size": 0, "stride": 8, "channels": 3}}
    save_file({"weight": torch.zeros(1)}, tmp_path / "words.safetensors", {"tokenizer": json.dumps(described)})
    with pytest.raises(InputError, match=r"words\.safetensors: not a tokenizer: "):
        load_tokenizer(tmp_path / "words.safetensors")


@pytest.mark.quick
def test_a_path_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no path: embedded null byte"):
        refuse_inside("a\0b", tmp_path)


@pytest.mark.quick
def test_no_damaged_lzw_reaches_the_decoder_that_it_could_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt  # which no handler of ours takes for damage

    array = np.arange(40 * 36, dtype=np.uint8).reshape(40, 36)
    data = bytearray(lzw(array, rowsperstrip=40))
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages.first
        start, count = page.dataoffsets[0], page.databytecounts[0]
    data[start + count // 2 : start + count] = b"\xff" * (count - count // 2)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", harmed)
    with pytest.raises(Unreadable):
        decode(bytes(data))
