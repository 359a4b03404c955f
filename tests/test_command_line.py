"""Every method on every encoder family, and every shipped recipe, as a user runs them: the command line from a folder of
images to a judged encoder that loads into timm.

For each: three steps. For one of each method and family, and for all in `make test-slow`: the same killed in the second and
started again, bit for bit the same; `restore`, `score`, `embed` (against features from timm and PIL alone) and `evaluate`. What a method does not take is refused in one line.
"""

import csv
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import write_pictures
from forked import CommandLine, Ended
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from underpaint.recipes import CONTINUE, RECIPES

SIDE = 32  # pixels
IMAGES = 30
STEPS = 3

VIT = ("encoder.embed_dim=32", "encoder.depth=4", "encoder.num_heads=2")
SWIN = ("encoder.embed_dim=16", "encoder.depths=[2,2,2,1]", "encoder.num_heads=[1,2,4,8]")
# of each family: a timm name, and what makes it tiny
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", ("encoder.patch_size=8", *VIT)),
    "beit": ("beit_base_patch16_224", ("encoder.patch_size=8", *VIT)),
    "rotary": ("vit_small_patch16_dinov3", ("encoder.patch_size=8", *VIT)),
    "swin": ("swin_tiny_patch4_window7_224", ("encoder.patch_size=2", *SWIN)),
    "swinv2": ("swinv2_tiny_window8_256", ("encoder.patch_size=2", *SWIN)),
    "hiera": ("hiera_tiny_224", ("encoder.patch_size=2", "encoder.embed_dim=16", "encoder.stages=[1,1,1,1]")),
    "resnet": ("resnet10t", ("encoder.output_stride=8", "encoder.channels=[16,16,32,32]", "encoder.stem_width=8")),
    "resnet-groupnorm": (
        "resnet18",
        (
            "encoder.norm_layer=groupnorm",
            "encoder.output_stride=8",
            "encoder.layers=[1,1,1,1]",
            "encoder.channels=[32,32,64,64]",
        ),
    ),
    "convnext": (
        "convnext_atto",
        ("encoder.output_stride=8", "encoder.depths=[1,1,2,1]", "encoder.dims=[16,16,32,32]"),
    ),
    "regnet": ("regnetx_002", ("encoder.output_stride=8",)),
}
EVERY = tuple(family for family in FAMILIES if family not in ("swinv2", "hiera"))  # CIM on these: test_cim.py
WORDS = ("method.codebook_size=16",)
CIM = ("method.codebook_size=64", "method.generator_depth=1", "method.generator_dim=32")

# by method: the families that it is tried with here (benchmarks/backbones.py has many more), and what a user may choose of
# it; the first choice for all, the rest for a ViT
TAKES: dict[str, tuple[str, ...]] = {
    "beit": ("vit", "beit", "rotary", "resnet"),
    "cae": ("vit", "beit", "rotary"),
    "cim": EVERY,
    "conditional-energy": ("vit", "beit"),
    "energy": ("vit", "beit", "rotary", "swin", "resnet", "resnet-groupnorm", "convnext"),
    "localmim": ("vit", "rotary", "swin", "swinv2", "convnext", "regnet"),
    "mae": ("vit", "beit", "swin", "hiera", "resnet", "convnext"),
    "simmim": ("vit", "swin", "resnet-groupnorm"),
}
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "beit": {"": WORDS},
    "cae": {"": WORDS, "pixels": (*WORDS, "method.target=pixels")},
    "cim": {"pixels": CIM, "detect": (*CIM, "method.objective=detect")},
    "conditional-energy": {"": ()},
    "energy": {
        "mixture": ("method.corruption=mixture",),
        **{task: (f"method.corruption={task}",) for task in ("mask", "shuffle", "downsample", "noise", "gray")},
        "published": ("method.steps=2", "method.step_size=0.1"),
    },
    "localmim": {"": (), "parts": ("method.stop_gradient=true", "method.pixel_head=true")},
    "mae": {"pixels": (), "hog": ("method.target=hog",)},
    "simmim": {"": ()},
}
# choices that every family gets; of parts those whose layers are computed one by one
ON_ALL = {("cim", "detect"), ("energy", "published"), ("localmim", "parts")}
IN_PARTS = ("vit", "rotary", "swin")

# what makes a shipped recipe tiny: by method, and by the start of the encoder's name
METHOD_CUTS = {
    "beit": WORDS,
    "cae": (*WORDS, "method.regressor_depth=1", "method.decoder_depth=1"),
    "cim": CIM,
    "conditional-energy": (),
    "energy": (),
    "localmim": ("method.decoder_dim=32",),
    "mae": ("method.decoder_dim=32", "method.decoder_depth=1"),
}
ENCODER_CUTS = {
    "vit": ("encoder.patch_size=8", *VIT),
    "beit": ("encoder.patch_size=8", *VIT),
    "swin": ("encoder.patch_size=2", *SWIN),
    "resnet10t": ("encoder.channels=[16,16,32,32]", "encoder.stem_width=8"),
    "resnet50": ("encoder.channels=[8,8,8,8]", "encoder.layers=[1,1,1,1]"),
}


class Case(NamedTuple):
    """What `pretrain` is told beside data, place and length."""

    name: str
    flags: tuple[str, ...]
    settings: tuple[str, ...]
    labelled: bool  # whether it sees the labels of its images
    # whether its run is killed and goes on, and is used: of each method and of each family one; all others in the slow test
    used: bool = False


def cases() -> Iterator[Case]:
    seen = set()
    for method, families in TAKES.items():
        for family in families:
            for place, (choice, settings) in enumerate(CHOICES[method].items()):
                if family != "vit" and place and (method, choice) not in ON_ALL:
                    continue
                if choice == "parts" and family not in IN_PARTS:
                    continue
                encoder, cuts = FAMILIES[family]
                name = "-".join(part for part in (method, choice, family) if part)
                # probes take the most of the time, and ask nothing of a method but its encoder
                first = family not in seen
                flags, used = ("--method", method, "--encoder", encoder), first or (family == "vit" and not place)
                yield Case(name, flags, (*cuts, *settings), first, used)
                seen.add(family)


def recipe_cases() -> Iterator[Case]:
    for name, recipe in RECIPES.items():
        if name == CONTINUE:
            continue  # needs weights: test_continue.py
        made = recipe()
        encoder = made.encoder["name"]
        cuts = next(cuts for start, cuts in ENCODER_CUTS.items() if encoder.startswith(start))
        settings = [*METHOD_CUTS[made.method["name"]], *cuts]
        if "mask_patch_size" in made.method:
            settings.append("method.mask_patch_size=8")
        yield Case(name, ("--recipe", name), tuple(settings), False)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("command-line") / "labelled", IMAGES, size=SIDE)


@pytest.fixture(scope="module")
def unlabelled(labelled: Path) -> Path:
    """The same images in one folder."""
    folder = labelled.with_name("unlabelled")
    folder.mkdir()
    for file in labelled.rglob("*.png"):
        shutil.copy(file, folder)
    return folder


def worked(ended: Ended) -> Ended:
    assert ended.status == 0, ended.error
    assert "Traceback" not in ended.error
    assert "Warning" not in ended.error
    return ended


def told(case: Case, labelled: Path, unlabelled: Path) -> list[Any]:
    data = labelled if case.labelled else unlabelled
    arguments = [
        "pretrain",
        data,
        *case.flags,
        "--image-size",
        SIDE,
        "--steps",
        STEPS,
        "--batch-size",
        8,
        "--workers",
        0,
    ]
    arguments += ["--checkpoint-every", 1, "--probe-every", STEPS]
    for setting in (*case.settings, "optimiser.lr=0.02", "run.log_every=1"):
        arguments += ["--set", setting]
    return arguments


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timm_features(run: Path, files: list[Path]) -> Tensor:
    """Vectors of images by timm and PIL alone, from what the run has written."""
    described = json.loads((run / "encoder.json").read_text())
    model: Any = timm.create_model(**described["create_model"])
    model.load_state_dict(load_file(run / "encoder.safetensors"), strict=True)
    images = np.stack([np.asarray(Image.open(file), np.float64) / 255 for file in files])
    images = (images - described["mean"]) / described["std"]
    model.eval()
    with torch.no_grad():
        found = model.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    if described["pooling"] == "mean of the normed patch tokens":
        return found[:, model.num_prefix_tokens :].mean(1)
    if described["pooling"] == "mean of the last map behind head.norm":
        return model.head.norm(found).mean(1)
    assert described["pooling"] == "mean of the last map"
    return found.mean((1, 2)) if "swin" in described["create_model"]["model_name"] else found.mean((2, 3))


def check_training(server: CommandLine, case: Case, run: Path, tmp_path: Path, arguments: list[Any]) -> None:
    """An unbroken run, and one that is killed in its second step and goes on: the same to the last bit."""
    unbroken = tmp_path / "unbroken"
    ended = server(
        *arguments, "--out", unbroken, die=("judge", 1)
    )  # trained and written; its judgement would be as below
    assert ended.status == -9, ended.error
    ended = server(*arguments, "--out", run, die=("step", 2))
    assert ended.status == -9, ended.error
    assert [line["step"] for line in lines(run)] == [0, 1]
    ended = worked(server(*arguments, "--out", run))
    assert "going on from step 1 of 3" in ended.out + ended.error
    once, again = lines(unbroken), lines(run)
    assert [line["step"] for line in again] == [line["step"] for line in once] == [0, 1, 2, 3]
    for one, other in zip(once[1:], again[1:], strict=True):
        assert math.isfinite(other["loss"])
        assert (one["loss"], one["terms"], one["gradient_norm"]) == (
            other["loss"],
            other["terms"],
            other["gradient_norm"],
        )
    assert (unbroken / "encoder.safetensors").read_bytes() == (run / "encoder.safetensors").read_bytes()
    assert (unbroken / "encoder.json").read_text() == (run / "encoder.json").read_text()
    check_run(run, case)


def check_run(run: Path, case: Case) -> None:
    """That a run came to its end."""
    losses = [line["loss"] for line in lines(run)[1:]]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == STEPS  # it does learn something, be it wrong
    load_file(run / "encoder.safetensors")
    assert "</html>" in (run / "report.html").read_text()
    probes = json.loads((run / "probes.json").read_text())
    assert 1 <= probes["rank"]["encoder"] <= probes["rank"]["dim"]
    assert ("gain" in probes) == case.labelled
    for name, found in probes["restoration"].items():
        assert name in ("images", "test_part") or 0 < found["error"] < 100


def check_uses(server: CommandLine, run: Path, tmp_path: Path, labelled: Path, tasks: list[str]) -> None:
    """`restore`, `score`, `embed` and `evaluate`, of a finished run."""
    files = sorted(labelled.rglob("*.png"))
    frames = set()
    for task in tasks:
        picture = tmp_path / "sheet.png"
        wanted = ["--corruption", task] if len(tasks) > 1 else []
        worked(server("restore", run, *files[:2], "--out", picture, *wanted))
        with Image.open(picture) as sheet:
            pixels = np.asarray(sheet.convert("RGB"), int)
        tile, gap = 96, 6  # an image of 32 px is shown at thrice its size
        top = pixels.shape[0] - 2 * (tile + gap)
        assert top in (22, 39, 56)  # captions of one to three lines
        columns, left = divmod(pixels.shape[1] - gap, tile + gap)
        assert left == 0
        for row, file in enumerate(files[:2]):
            tiles = [
                pixels[top + row * (tile + gap) :][:tile, gap + column * (tile + gap) :][:, :tile]
                for column in range(columns)
            ]
            original = np.asarray(Image.open(file), int).repeat(3, 0).repeat(3, 1)
            assert np.abs(tiles[0] - original).max() <= 1
            frames.add(tiles[1].tobytes())
            assert np.abs(tiles[1] - tiles[0]).max() > 1  # corrupted
            assert np.abs(tiles[-1] - tiles[1]).max() > 1  # and changed again, or judged
    assert columns >= 3
    assert len(frames) == 2 * len(tasks)  # each corruption is another
    worked(server("score", run, labelled, "--out", tmp_path / "scores.csv"))
    with open(tmp_path / "scores.csv") as file:
        rows = list(csv.DictReader(file))
    values = [float(row["score"]) for row in rows]
    names = sorted(str(file.relative_to(labelled)) for file in files)
    assert sorted(row["path"] for row in rows) == names
    assert [int(row["rank"]) for row in rows] == list(range(1, IMAGES + 1))
    assert np.isfinite(values).all()
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > IMAGES / 2
    worked(server("embed", run, labelled, "--out", tmp_path / "vectors.parquet"))
    table = pq.read_table(tmp_path / "vectors.parquet")
    assert sorted(table["path"].to_pylist()) == names
    vectors = torch.tensor(table["vector"].to_pylist())
    expected = timm_features(run, [labelled / name for name in table["path"].to_pylist()])
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    assert vectors.std(0).max() > 1e-4  # images differ
    worked(server("evaluate", run, "--data", labelled, "--task", "knn", "--out", tmp_path / "worth"))
    found = json.loads((tmp_path / "worth" / "results.json").read_text())["tasks"]["knn"]
    assert found["train"] + found["test"] == IMAGES
    assert list(found["rows"]) == ["encoder", "untrained", "raw pixels", "HOG", "majority"]
    for row in found["rows"].values():
        hits = row["accuracy"] * found["test"]
        assert hits == pytest.approx(round(hits))
        assert 0 <= hits <= found["test"]
    assert found["rows"]["majority"]["accuracy"] == pytest.approx(1 / 3)  # 10 of each class
    assert found["rows"]["HOG"]["accuracy"] > 0.6  # stripes by their direction


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in (*cases(), *recipe_cases())])
def test_from_images_to_a_judged_encoder_by_commands(
    case: Case, server: CommandLine, labelled: Path, unlabelled: Path, tmp_path: Path
) -> None:
    run, arguments = tmp_path / "run", told(case, labelled, unlabelled)
    if case.used:
        check_training(server, case, run, tmp_path, arguments)
        check_uses(server, run, tmp_path, labelled, tasks_of(case))
    else:
        worked(server(*arguments, "--out", run))
        check_run(run, case)


def tasks_of(case: Case) -> list[str]:
    mixture = "method.corruption=mixture" in case.settings
    return ["mask", "shuffle", "downsample", "noise", "gray"] if mixture else ["mask"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases() if not case.used])
def test_the_runs_of_all_others_are_killed_and_used(
    case: Case, server: CommandLine, labelled: Path, unlabelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    check_training(server, case, run, tmp_path, told(case, labelled, unlabelled))
    check_uses(server, run, tmp_path, labelled, tasks_of(case))


REFUSED = {
    "cae": "CAE needs a plain transformer, whose output for hidden patches alone",
    "conditional-energy": "conditional-energy needs an encoder that runs on part of its patches (a plain ViT), not ",
}
REFUSES = {
    "cae": ("swin", "resnet", "convnext"),
    "conditional-energy": ("swin", "resnet", "convnext"),
}


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, family) for method, families in REFUSES.items() for family in families],
)
def test_an_encoder_that_a_method_does_not_take_is_refused_in_one_line(
    method: str, family: str, server: CommandLine, unlabelled: Path, tmp_path: Path
) -> None:
    encoder, cuts = FAMILIES[family]
    flags = ("--method", method, "--encoder", encoder)
    ended = server(*told(Case("", flags, cuts, False), unlabelled, unlabelled), "--out", tmp_path / "run")
    assert ended.status == 2
    complaints = [line for line in ended.error.splitlines() if line.startswith("underpaint: ")]
    assert complaints == ended.error.splitlines()[-1:]
    assert complaints[0].startswith(f"underpaint: method {method}: {REFUSED[method]}")
    assert not (tmp_path / "run").exists()
