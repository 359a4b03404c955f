"""Damaged and hostile inputs by the thousand: each is read, or refused in one line, within 10 seconds and 2 GiB.

    python tests/faults/fuzz.py --seconds 600 --seed 0 [--kind image ...] [--only NUMBER]

Each input is made from (kind, seed, number) alone, so one that is reported comes again with `--only`. A child process
reads them; this one watches its time and memory, and starts another where that one ends.
"""

import argparse
import contextlib
import io
import json
import mmap
import os
import random
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST, LARGEST = 10.0, 2**21  # seconds of processor time an input, KiB of memory
LENGTHS = (0, 1, 2, 255, 256, 32_767, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
Input = Any
Reads = Callable[[Input], None]


@dataclass
class Kind:
    """What makes an input, and what reads it; refusals are exceptions among `Refused`."""

    make: Callable[[random.Random], Input]
    read: Reads


@dataclass
class Found:
    """What one round of a kind came to."""

    inputs: int = 0
    faults: list[str] = field(default_factory=list)


def mutated(rng: random.Random, data: bytes, others: list[bytes] | None = None) -> bytes:
    """A few damages: flips, lengths, cuts, doubled or swapped stretches, the end of another file."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if len(content) < 8:
            break
        place, size = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 12, 64))
        what = rng.randrange(8)
        if what == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif what == 1:
            content[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif what == 2:  # a number of some width, in either order
            place = min(place, len(content) - 8)
            number, (form, width) = rng.choice(LENGTHS), rng.choice((("H", 2), ("I", 4), ("Q", 8)))
            content[place : place + width] = struct.pack(rng.choice("<>") + form, number % 2 ** (8 * width))
        elif what == 3:
            del content[place:]
        elif what == 4:
            del content[place : place + size]
        elif what == 5:
            content[place:place] = content[place : place + size] * rng.choice((1, 2, 50))
        elif what == 6:
            other = rng.randrange(len(content))
            one, two = bytes(content[place : place + size]), bytes(content[other : other + size])
            content[other : other + size], content[place : place + size] = one, two
        elif others:
            other_file = rng.choice(others)
            content[place:] = other_file[min(place, rng.randrange(len(other_file) + 1)) :]
    return bytes(content)


def values(rng: random.Random, depth: int = 0) -> Any:
    """Any plain value."""
    kind = rng.randrange(10 if depth < 3 else 7)
    if kind < 7:
        texts = (
            "",
            "x",
            "nan",
            "inf",
            "-1",
            "\0",
            "mae",
            "timm:x",
            "../..",
            "9" * 400,
            "é\n\t",
            "vit_tiny_patch16_224",
        )
        simple = (None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), 0.5, rng.randrange(-300, 300))
        return rng.choice((rng.choice(texts), rng.choice(simple)))
    if kind == 7:
        return [values(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(("name", "format", "x", ""))): values(rng, depth + 1) for _ in range(rng.randrange(3))}


def varied(rng: random.Random, value: Any) -> Any:
    """Plain data with a value or a name in it that is another."""
    if rng.random() < 0.15:
        return values(rng)
    if isinstance(value, dict) and value:
        name = rng.choice(sorted(value, key=str))
        result = dict(value)
        if rng.random() < 0.1:
            result[rng.choice(("", "x", name + "s" if isinstance(name, str) else "y"))] = result.pop(name)
        else:
            result[name] = varied(rng, value[name])
        if rng.random() < 0.1:
            result.pop(name, None)
        return result
    if isinstance(value, list) and value:
        place = rng.randrange(len(value))
        return [*value[:place], varied(rng, value[place]), *value[place + 1 :]]
    return values(rng)


# -- images -------------------------------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
    """Small images of every format that is read."""
    import imagecodecs
    import numpy as np
    import tifffile
    from PIL import Image

    rng, made = np.random.default_rng(0), []
    smooth = np.linspace(0, 255, 16 * 12 * 4).reshape(16, 12, 4).astype(np.uint8)

    def save(image: Any, form: str, **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        made.append(buffer.getvalue())

    exif = Image.Exif()
    exif[274] = 6
    for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK"):
        image = Image.fromarray(smooth).convert("RGB" if mode in ("P", "CMYK") else "RGBA").convert(mode)
        if mode != "CMYK":
            save(image, "PNG")
            save(image, "GIF" if mode not in ("RGBA", "LA") else "WEBP")
        if mode in ("RGB", "L", "P", "1"):
            save(image, "BMP")
        if mode in ("RGB", "L", "CMYK"):
            save(image, "JPEG", exif=exif)
            save(image, "JPEG", progressive=True, quality=30)
        if mode == "P":
            save(image, "PNG", transparency=3)
            save(image, "GIF", transparency=3)
        save(image, "TIFF", compression=str(rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])))
    save(Image.fromarray(smooth[..., :3]), "WEBP", lossless=True, exif=exif)
    save(Image.fromarray(smooth[..., :3]), "GIF", save_all=True, append_images=[Image.fromarray(smooth[..., 1:])])
    wide = rng.integers(0, 65_536, (9, 8, 4)).astype(np.uint16)
    made += [bytes(imagecodecs.png_encode(np.ascontiguousarray(part))) for part in (wide, wide[..., :3], wide[..., 0])]
    floats = rng.random((10, 8, 3)).astype(np.float32)
    tag = (42113, "s", 0, "-9999", True)
    arrays: list[tuple[Any, dict[str, Any]]] = [
        (wide, {"compression": "deflate", "predictor": True, "photometric": "rgb", "extrasamples": ["unassalpha"]}),
        (wide[..., 0], {"compression": "lzw", "rowsperstrip": 2}),
        (floats, {"extratags": [tag], "photometric": "rgb"}),
        (floats[..., 0].astype(np.float64), {"tile": (16, 16), "compression": "zstd"}),
        (np.moveaxis(floats, 2, 0), {"planarconfig": "separate", "photometric": "rgb"}),
        (rng.integers(0, 255, (3, 9, 8)).astype(np.uint8), {"photometric": "minisblack"}),
        (smooth[..., :3], {"photometric": "cielab"}),
        (smooth, {"photometric": "separated"}),
        (smooth[..., :3], {"compression": "jpeg", "photometric": "ycbcr"}),
        (smooth[..., :3], {"compression": "jpeg2000", "photometric": "rgb"}),
        (smooth[..., :3], {"compression": "webp", "photometric": "rgb"}),
        (smooth[..., 0] > 100, {"bigtiff": True}),
        (rng.integers(0, 9, (2, 5, 9, 8)).astype(np.uint16), {"imagej": True, "metadata": {"axes": "ZCYX"}}),
        (rng.integers(0, 9, (3, 9, 8)).astype(np.int32), {"ome": True}),
        (
            rng.integers(0, 255, (9, 8)).astype(np.uint8),
            {"photometric": "palette", "colormap": rng.integers(0, 65_535, (3, 256), np.uint16)},
        ),
    ]
    for array, options in arrays:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, **options)
        made.append(buffer.getvalue())
    return made


def image_kinds() -> dict[str, Kind]:
    from underpaint.data import Unreadable, decode, read_header
    from underpaint.data.decode import alpha_weighted_sum, read_orientation

    corpus = pictures()

    def make(rng: random.Random) -> Input:
        nodata, reduce_to = rng.choice((None, None, None, 0.0, 255.0)), rng.choice((None, 4))
        return mutated(rng, rng.choice(corpus), corpus), rng.choice((1, 3, 3, None)), nodata, reduce_to

    def read(given: Input) -> None:
        data, channels, nodata, reduce_to = given
        array = decode(data, channels=channels, nodata=nodata, reduce_to=reduce_to)
        assert array.ndim == 3
        assert channels in (None, array.shape[2])
        assert array.flags.writeable

    def read_headers(given: Input) -> None:
        for reader in (read_header, read_orientation):
            with contextlib.suppress(Unreadable):
                reader(given[0])

    def read_sum(given: Input) -> None:
        alpha_weighted_sum(given[0], channels=3)

    return {"image": Kind(make, read), "header": Kind(make, read_headers), "alpha": Kind(make, read_sum)}


# -- archives -----------------------------------------------------------------------------------------------------------


def archive_kinds(folder: Path) -> dict[str, Kind]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from underpaint.data.open import open_source

    images = [image for image in pictures() if len(image) < 400][:4]
    coco = json.dumps({"images": [{"file_name": f"{n}.png"} for n in range(4)], "annotations": []}).encode()
    files = {f"{n % 2}/{n}.png": image for n, image in enumerate(images)}
    files |= {"annotations/train.json": coco, "labels.csv": b"file_name,target\n0/0.png,1.5\n1/1.png,2\n"}
    shard = {f"{n}.png": image for n, image in enumerate(images)} | {f"{n}.cls": b"1" for n in range(3)}
    corpus: dict[str, bytes] = {}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as packed:
            for name, content in files.items():
                packed.writestr(name, content)
        corpus[f"{compression}.zip"] = buffer.getvalue()
    for suffix, mode, held in (
        ("tar", "w", files),
        ("tar.gz", "w:gz", files),
        ("tar.xz", "w:xz", files),
        ("wds", "w", shard),
    ):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
            for name, content in held.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        corpus[suffix] = buffer.getvalue()
    for named in (True, False):
        rows = [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)] if named else images
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": rows, "label": [0, 1, 0, 1], "target": [0.5] * 4}), buffer)
        corpus[f"{named}.parquet"] = buffer.getvalue()
    names = sorted(corpus)

    def make(rng: random.Random) -> Input:
        name = rng.choice(names)
        return name, mutated(rng, corpus[name], list(corpus.values()) if rng.random() < 0.1 else None)

    def read(given: Input) -> None:
        name, data = given
        file = folder / f"data.{name.rpartition('.')[2] if name.endswith(('zip', 'parquet')) else name}"
        file.write_bytes(data)
        try:
            source = open_source(f"wds:{file}" if name == "wds" else file)
            for index in range(min(len(source.entries), 20)):
                with contextlib.suppress(*refused()):
                    source.read(index)
        finally:
            for left in (folder / "cache").glob("flat-*"):
                left.unlink()

    return {"archive": Kind(make, read)}


def annotation_kinds() -> dict[str, Kind]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from underpaint.data.formats import read_labelme, read_voc, read_yolo
    from underpaint.data.sources.tables import _list_rows, _rows

    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>7</xmax><ymax>8.5</ymax></bndbox>"
    item = f"<object><name>a</name><difficult>0</difficult>{box}</object>"
    shape: dict[str, Any] = {"label": "a", "points": [[1, 2], [5.5, 2], [5, 7]], "shape_type": "polygon"}
    shapes = [
        shape,
        {**shape, "points": [[1, 2], [3, 4]], "shape_type": "circle"},
        {**shape, "shape_type": "rectangle"},
    ]
    table = pa.table({"path": ["0.png", "1.png"], "label": [["a"], ["b", "c"]], "weight": [0.5, None]})
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    corpus: dict[str, bytes] = {
        "a.xml": f"<annotation><size><width>8</width><height>9</height></size>{item * 2}</annotation>".encode(),
        "a.json": json.dumps({"shapes": shapes, "imageHeight": 9, "imageWidth": 8}).encode(),
        "yolo.txt": b"0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.5 0.1 0.5 0.5\n2 0.5 0.5 0.2 0.2 0.9\n",
        "labels.csv": b"path,label,split\n0.png,a|b,train\n1.png,1.5,val\n",
        "labels.jsonl": b'{"path": "0.png", "label": ["a"]}\n{"path": "1.png", "label": 3}\n',
        "labels.parquet": parquet.getvalue(),
        "val.txt": b"0.png 3\n1.png n01440764\n",
    }
    names = sorted(corpus)

    def make(rng: random.Random) -> Input:
        name = rng.choice(names)
        return name, mutated(rng, corpus[name], list(corpus.values()) if rng.random() < 0.1 else None)

    def read(given: Input) -> None:
        name, data = given
        with contextlib.suppress(ValueError):
            if name == "a.xml":
                found = read_voc(data)
            elif name == "a.json":
                found = read_labelme(data)
            elif name == "yolo.txt":
                found = read_yolo(data, (9, 8), ["a"])
            else:
                (_list_rows if name == "val.txt" else _rows)(name, lambda _: data)
                return
            assert all(abs(side) <= 1e9 for one in found.objects for side in one.box)

    return {"annotation": Kind(make, read)}


# -- what is said of runs, encoders and caches --------------------------------------------------------------------------


def plain_kinds(folder: Path) -> dict[str, Kind]:
    import yaml

    from underpaint.data.images import _stored, _write_set
    from underpaint.reading import plain_yaml
    from underpaint.recipes import RECIPES
    from underpaint.recipes.recipe import checked, plain, stored_recipe

    recipes = [plain(RECIPES[name]()) for name in sorted(RECIPES)[::4]]
    texts = [yaml.safe_dump(recipe).encode() for recipe in recipes]

    def make_text(rng: random.Random) -> Input:
        return mutated(
            rng, rng.choice(texts)[: rng.choice((100, 300))], [b"{a: &a [1], b: *a}", b"[" * 500, b"? " * 200]
        )

    def read_text(given: Input) -> None:
        with contextlib.suppress(ValueError):
            plain_yaml(given.decode("utf-8", "replace"))

    def make_recipe(rng: random.Random) -> Input:
        return varied(rng, rng.choice(recipes))

    def read_recipe(given: Input) -> None:
        if isinstance(given, dict):
            checked(given)

    def make_file(rng: random.Random) -> Input:
        return mutated(rng, rng.choice(texts), texts)

    def read_file(given: Input) -> None:
        (folder / "recipe.yaml").write_bytes(given)
        stored_recipe(folder)

    described: dict[str, Any] = {
        "streamed": True,
        "estimate": 1.0,
        "statistics": [[0.5], [0.5]],
        "skipped": [],
        "notes": [],
    }
    _write_set(folder, described)
    told = (folder / "set.json").read_bytes()

    def read_set(given: Input) -> None:
        (folder / "set.json").write_bytes(given)
        assert isinstance(_stored(folder), str) or given == told

    return {
        "yaml": Kind(make_text, read_text),
        "recipe": Kind(make_recipe, read_recipe),
        "recipe file": Kind(make_file, read_file),
        "set.json": Kind(lambda rng: mutated(rng, told), read_set),
    }


def model_kinds(folder: Path) -> dict[str, Kind]:
    import torch
    from safetensors.torch import save_file

    from underpaint.backbones import create_arguments, from_arguments, load_encoder, save_encoder
    from underpaint.evaluation.keep import kept
    from underpaint.patches import Standardize
    from underpaint.tokenizers import KMeansPatches, load_tokenizer, save_tokenizer, tokenizer_scaling
    from underpaint.train.run_folder import Run

    small = {"embed_dim": 16, "depth": 1, "num_heads": 1}
    arguments = create_arguments("vit_tiny_patch16_224", image_size=(8, 8), patch_size=4, **small)
    save_encoder(folder, from_arguments(arguments), arguments, Standardize([0.5] * 3, [0.25] * 3))
    described = json.loads((folder / "encoder.json").read_text())
    text = (folder / "encoder.json").read_bytes()
    weights = (folder / "encoder.safetensors").read_bytes()
    model = described | {"task": "linear", "image_size": [8, 8], "classes": ["a", "b"], "labels": [0, 1]}
    model |= {"encoder": "x", "settings": {}, "masks": False}
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    save_tokenizer(KMeansPatches(4, 4), folder / "words.safetensors")
    words = (folder / "words.safetensors").read_bytes()
    run = Run(folder / "run")
    for step in (1, 2):
        run.save(step, {"a": torch.zeros(2)}, {"seconds": 1.0}, [])
    saved = run.path / "checkpoints" / "step-000000002"
    state = {name: (saved / name).read_bytes() for name in ("state.json", "state.safetensors")}

    def make_encoder(rng: random.Random) -> Input:
        if rng.random() < 0.3:
            return mutated(rng, text), weights
        if rng.random() < 0.3:
            return text, mutated(rng, weights)
        return json.dumps(varied(rng, described)).encode(), weights

    def read_encoder(given: Input) -> None:
        (folder / "encoder.json").write_bytes(given[0])
        (folder / "encoder.safetensors").write_bytes(given[1])
        load_encoder(folder)

    def make_model(rng: random.Random) -> Input:
        return (
            json.dumps(varied(rng, model)).encode() if rng.random() < 0.7 else mutated(rng, json.dumps(model).encode())
        )

    def read_model(given: Input) -> None:
        (folder / "model.json").write_bytes(given)
        kept(folder)

    def make_words(rng: random.Random) -> Input:
        return mutated(rng, words)

    def read_words(given: Input) -> None:
        (folder / "words.safetensors").write_bytes(given)
        tokenizer_scaling(folder / "words.safetensors")
        load_tokenizer(folder / "words.safetensors")

    def make_state(rng: random.Random) -> Input:
        name = rng.choice(sorted(state))
        return name, mutated(rng, state[name])

    def read_state(given: Input) -> None:
        for name, content in state.items():
            (saved / name).write_bytes(given[1] if name == given[0] else content)
        found = run.load()
        assert found is not None

    return {
        "encoder": Kind(make_encoder, read_encoder),
        "model.json": Kind(make_model, read_model),
        "tokenizer": Kind(make_words, read_words),
        "checkpoint": Kind(make_state, read_state),
    }


# -- commands -----------------------------------------------------------------------------------------------------------


def command_kinds(folder: Path) -> dict[str, Kind]:
    """Command lines of the real flags; what would train, judge or make something large is looked at and not begun."""
    import underpaint.comparison.run
    import underpaint.demo
    import underpaint.evaluation.runner
    import underpaint.pretraining
    import underpaint.tokenize
    from underpaint.cli import main, parser

    for module, name in (
        (underpaint.comparison.run, "compare"),
        (underpaint.demo, "demo"),
        (underpaint.evaluation.runner, "evaluate"),
        (underpaint.pretraining, "pretrain"),
        (underpaint.tokenize, "make_tokenizer"),
    ):
        setattr(module, name, lambda *_, **__: None)
    images = folder / "images"
    images.mkdir()
    for number, image in enumerate(pictures()[:4]):
        (images / f"{number}.png").write_bytes(image)
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text("method: {name: mae}\n")
    places = [str(folder / name) for name in ("images", "empty", "file", "run", "none", "run/recipe.yaml")]
    words = [
        "",
        "-1",
        "0",
        "1",
        "8",
        "nan",
        "1e400",
        "1e30",
        "64x64",
        "x",
        "0x0",
        "mae",
        "energy",
        "mae,energy",
        "linear",
    ]
    words += ["knn,linear", "timm:none", "hf:", "wds:", "wds:{1..", "hf:/:", "é", "\0", "--", "off", "bf16-mixed"]
    words += [
        "vit_tiny_patch16_224",
        "mae-tiny-32",
        "(",
        "method.mask_ratio=0.5",
        "data.channels=x",
        "run={",
        "a.b.c=[",
        "x=!!x",
    ]
    commands = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices

    def make(rng: random.Random) -> Input:
        name = rng.choice(sorted(commands))
        line = [name]
        for action in commands[name]._actions:
            if action.option_strings and not action.required and rng.random() < 0.8:
                continue
            flag = [rng.choice(action.option_strings)] if action.option_strings else []
            if rng.random() < 0.03:
                continue
            takes = [] if action.nargs == 0 else [rng.choice(places + words if rng.random() < 0.6 else places)]
            line += flag + takes
        if rng.random() < 0.1:
            line.insert(rng.randrange(len(line) + 1), rng.choice(words))
        return line

    def read(given: Input) -> None:
        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            try:
                status = main(given)
            except SystemExit as ended:  # --help, --version
                status = ended.code
        assert status in (0, 2, 3), status
        if status:
            assert said.getvalue().strip().count("\n") == 0, said.getvalue()
            assert said.getvalue().strip()

    return {"command": Kind(make, read)}


GROUPS: dict[str, Callable[[Path], dict[str, Kind]]] = {
    "images": lambda folder: image_kinds(),
    "archives": archive_kinds,
    "plain": plain_kinds,
    "annotations": lambda folder: annotation_kinds(),
    "models": model_kinds,
    "commands": command_kinds,
}
KINDS = {  # the group of each, and its share of the time
    "image": ("images", 6),
    "header": ("images", 2),
    "alpha": ("images", 1),
    "archive": ("archives", 3),
    "annotation": ("annotations", 1),
    "yaml": ("plain", 1),
    "recipe": ("plain", 1),
    "recipe file": ("plain", 1),
    "set.json": ("plain", 1),
    "encoder": ("models", 1),
    "model.json": ("models", 1),
    "tokenizer": ("models", 1),
    "checkpoint": ("models", 1),
    "command": ("commands", 2),
}


def refused() -> tuple[type[Exception], ...]:
    from underpaint.data import Unreadable
    from underpaint.errors import InputError, NotFinite

    return Unreadable, InputError, NotFinite


# -- the child, and who watches it --------------------------------------------------------------------------------------


def child(kind: str, seed: int, first: int, last: int | None, seconds: float, folder: Path) -> None:
    """Read inputs from `first` on; the number of each is in `place` while it is read, faults are lines of `faults`."""
    os.environ["UNDERPAINT_CACHE"] = str(folder / "cache")
    (folder / "cache").mkdir(exist_ok=True)
    tested = folder / "tested"
    tested.mkdir()
    reads = GROUPS[KINDS[kind][0]](tested)[kind]
    known = refused()
    errors = open(folder / "said", "w")  # noqa: SIM115 -- as long as this process
    sys.stderr = errors
    with (folder / "place").open("r+b") as file, mmap.mmap(file.fileno(), 16) as place:
        number, end = first, time.monotonic() + seconds
        while time.monotonic() < end and (last is None or number <= last):
            place[:16] = struct.pack("<QQ", number, 1)
            rng = random.Random(f"{kind} {seed} {number}")
            try:
                reads.read(reads.make(rng))
            except known as error:
                if len(str(error)) > 4_000:
                    report(folder, number, f"no short line: {str(error)[:300]!r}")
            except BaseException:
                report(folder, number, traceback.format_exc())
            number += 1
        place[:16] = struct.pack("<QQ", number, 2)


def report(folder: Path, number: int, text: str) -> None:
    with (folder / "faults").open("a") as file:
        file.write(json.dumps([number, text]) + "\n")


def memory_of(process: int) -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def time_of(process: int) -> float:
    """Seconds of processor time."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def fuzz(kind: str, seed: int, seconds: float, first: int = 0, last: int | None = None) -> Found:
    """Read inputs of a kind for some seconds, or those from `first` to `last`."""
    found, end, number = Found(), time.monotonic() + seconds, first
    while time.monotonic() < end and (last is None or number <= last) and len(found.faults) < 20:
        with tempfile.TemporaryDirectory() as named:
            folder = Path(named)
            (folder / "place").write_bytes(bytes(16))
            command = [
                sys.executable,
                __file__,
                "--child",
                named,
                "--kind",
                kind,
                "--seed",
                str(seed),
                "--first",
                str(number),
            ]
            command += ["--seconds", str(end - time.monotonic())] + (["--last", str(last)] if last is not None else [])
            with (folder / "error").open("w") as errors:
                process = subprocess.Popen(command, stderr=errors, stdout=errors)
            fault, now, since = "", -1, 0.0
            while process.poll() is None:
                time.sleep(0.05)
                place, state = struct.unpack("<QQ", (folder / "place").read_bytes())
                if place != now or state != 1:
                    now, since = place, time_of(process.pid)
                if time_of(process.pid) - since > LONGEST:
                    fault = f"takes more than {LONGEST:g} s"
                elif (memory := memory_of(process.pid)) > LARGEST:
                    fault = f"takes {memory / 2**20:.2f} GiB"
                if fault:
                    process.kill()
                    process.wait()
            place, state = struct.unpack("<QQ", (folder / "place").read_bytes())
            if state != 2 and not fault:
                fault = f"ended with status {process.returncode}: {(folder / 'error').read_text()[-2_000:]}"
            if (folder / "faults").is_file():
                lines = [json.loads(line) for line in (folder / "faults").read_text().splitlines()]
                found.faults += [f"{kind}, seed {seed}, number {which}: {text}" for which, text in lines]
            if fault:
                found.faults.append(f"{kind}, seed {seed}, number {place}: {fault}")
            found.inputs += max(0, place - number) + (1 if state == 1 else 0)
            if state == 0:  # it did not begin
                break
            number = place + 1 if state == 1 else place
            if state == 2:
                break
    return found


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=float, default=600, help="in all")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--kind", action="append", choices=KINDS)
    made.add_argument("--only", type=int, help="one input, by its number")
    made.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    made.add_argument("--last", type=int, help=argparse.SUPPRESS)
    given = made.parse_args()
    kinds = given.kind or list(KINDS)
    if given.child:
        child(kinds[0], given.seed, given.first, given.last, given.seconds, given.child)
        return 0
    shares = sum(KINDS[kind][1] for kind in kinds)
    counts, faults = {}, []
    for kind in kinds:
        only = given.first if given.only is None else given.only
        found = fuzz(kind, given.seed, given.seconds * KINDS[kind][1] / shares, only, given.only)
        counts[kind] = found.inputs
        faults += found.faults
        print(f"{kind:12} {found.inputs:9,} inputs, {len(found.faults)} faults", flush=True)
        for fault in found.faults:
            print(fault, flush=True)
    print(f"seed {given.seed}: {sum(counts.values()):,} inputs, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
