"""What `run.sh` asks of a GPU, one question a call; answers are lines of JSON. `--dry`: tiny sizes, to be tried on a CPU.

    python scripts/gpu/measure.py steps|precision|peak|loader|ranks|compare [--dry] [--minutes M] [--data CIFAR10]

A check that fails is a line with "failed", and exit status 1.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from step import counted_flops, interleaved, matrix_rate, training_step  # noqa: E402

import underpaint  # noqa: E402
from underpaint.computing import repeatable  # noqa: E402
from underpaint.data import Crops, load_images, open_source, train_batches  # noqa: E402
from underpaint.demo_images import write_demo_images  # noqa: E402
from underpaint.methods import METHODS  # noqa: E402
from underpaint.prepare import build, stepper_for  # noqa: E402
from underpaint.recipes.recipe import checked  # noqa: E402
from underpaint.tokenizers import KMeansPatches  # noqa: E402
from underpaint.train.devices import make_fabric  # noqa: E402
from underpaint.train.run_folder import environment  # noqa: E402

TINY = {"name": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
# of a loss after so many steps: bfloat16 keeps 8 bits of each product, whose errors average out over a batch
CLOSE = {"bf16": 0.05, "bf16, compiled": 0.05, "32, compiled": 0.02}
WORKERS = (0, 4, 8, 16)


def tell(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def flat_images(folder: Path, dry: bool) -> Path:
    """Crops of photographs in one folder, without labels."""
    made, flat = folder / "demo", folder / "flat"
    write_demo_images(made, train_per_photo=10 if dry else 100, test_per_photo=1)
    flat.mkdir()
    for place in sorted((made / "train").rglob("*.png")):
        place.rename(flat / f"{place.parent.name}-{place.name}")
    return flat


# --- the step ------------------------------------------------------------------------------------------------------------


def steps(given: argparse.Namespace) -> bool:
    """Every method on plain ViTs by benchmarks/step.py: images/s, memory, share of the matrix rate."""
    only = ("--only", "ViT-128x4", "--seconds", "0.2") if given.dry else ("--only", "ViT", "--seconds", "1.5")
    return subprocess.run([sys.executable, ROOT / "benchmarks" / "step.py", *only], check=False).returncode == 0


def trained(folder: Path, name: str, precision: str, compiled: bool, count: int, batch: int, **run: Any) -> list[float]:
    """The losses of so many steps on the images of a folder."""
    words = {"codebook_size": 64} if name in ("beit", "cae", "cim") else {}
    settings = {
        "method": {"name": name, **words},
        "encoder": TINY,
        "data": {"image_size": [32, 32]},
        "optimiser": {"batch_size": batch, "lr": 1e-3},
        "run": {"precision": precision, **run},
    }
    recipe = checked(settings)
    with repeatable(recipe.run.deterministic):
        return losses_of(recipe, folder, compiled, count)


def losses_of(recipe: Any, folder: Path, compiled: bool, count: int) -> list[float]:
    fabric, batch = make_fabric(recipe), recipe.optimiser.batch_size
    source = open_source(str(folder))
    images = load_images(source, range(len(source.entries)), size=(32, 32), channels=3)
    method, standardize = build(recipe, images)
    if (tokenizer := method.prepare(standardize)) is not None:
        tokenizer.ready = True  # words of an untrained tokenizer are as good to compare by
        if isinstance(tokenizer, KMeansPatches):
            centres = torch.rand(tokenizer.centres.shape, generator=torch.Generator().manual_seed(0))
            tokenizer.centres.copy_(centres)
    stepper = stepper_for(fabric, recipe, method, standardize, compiled)
    crops = Crops(images, (32, 32), batch, recipe.run.seed)
    losses = []
    with closing(train_batches(crops, device=fabric.device)) as batches:
        for number, one in enumerate(islice(batches, count)):
            numbers, _ = stepper.step(one, number, 1.0)
            losses.append(numbers["loss"][0])
    return torch.stack(losses).tolist()


def precision(given: argparse.Namespace) -> bool:
    """Losses in float32, bfloat16 and compiled lie together; twice the same are the same bits, where that is asked for."""
    count, batch, good = (4, 8, True) if given.dry else (60, 128, True)
    variants = {"bf16": ("bf16", False), "bf16, compiled": ("bf16", True), "32, compiled": ("32", True)}
    if given.dry:
        del variants["bf16, compiled"], variants["32, compiled"]
    with tempfile.TemporaryDirectory() as place:
        folder = flat_images(Path(place), given.dry)
        for name in sorted(METHODS):
            full = trained(folder, name, "32", False, count, batch)
            end = math.fsum(full[-10:]) / len(full[-10:])
            answer: dict[str, Any] = {"method": name, "first": full[0], "float32": end}
            for variant, (kind, compiled) in variants.items():
                found = trained(folder, name, kind, compiled, count, batch)
                value = math.fsum(found[-10:]) / len(found[-10:])
                answer[variant] = value
                if not abs(value / end - 1) < CLOSE[variant]:
                    answer["failed"], good = variant, False
            again = [trained(folder, name, "32", False, 5, batch, deterministic=True) for _ in range(2)]
            answer["repeats"] = again[0] == again[1]
            if not answer["repeats"]:
                answer["failed"], good = "deterministic", False
            tell(**answer)
    return good


# --- how near to the peak ------------------------------------------------------------------------------------------------


def peak(given: argparse.Namespace) -> bool:
    """Images/s and share of a large matrix product's rate; eager and compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate, size = matrix_rate(device, dtype), 64 if given.dry else 224
    tell(matrix_rate=rate)
    small, large, batches = "vit_small_patch16_224", "vit_base_patch16_224", (2, 2) if given.dry else (512, 1024)
    if given.dry:
        small = large = "vit_tiny_patch16_224"

    def supervised() -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
        import timm

        model = timm.create_model(small, img_size=size, num_classes=1000).to(device)
        return model, lambda x: torch.nn.functional.cross_entropy(model(x), torch.zeros(len(x), 1000, device=device))

    def pretrained(name: str, **settings: Any) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
        method: Any = METHODS[name](underpaint.encoder(large, image_size=size), **settings)  # pyright: ignore[reportCallIssue]
        method.to(device)
        return method, lambda x: method(x, method.sample_for(x)).loss

    decoder = {"decoder_dim": 512, "decoder_depth": 8}
    made = {
        "supervised ViT-S": (supervised, batches[0]),
        "MAE ViT-B": (lambda: pretrained("mae", **decoder), batches[1]),
        "LocalMIM ViT-B": (lambda: pretrained("localmim"), batches[1]),
    }
    for name, (make, batch) in made.items():
        model, loss = make()
        images = torch.randn(batch, 3, size, size, device=device)
        whole = training_step(model, lambda loss=loss, x=images: loss(x), device)
        flops = counted_flops(whole)
        seconds = interleaved({"eager": whole}, device, 0.1 if given.dry else 6.0)
        if not given.dry:
            model.compile()
            seconds |= interleaved({"compiled": whole}, device, 6.0)
        for how, took in seconds.items():
            tell(what=name, how=how, batch=batch, images_per_second=batch / took, share_of_peak=flops / took / rate)
        del model, loss, images, whole
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


# --- what feeds it -------------------------------------------------------------------------------------------------------


def loader(given: argparse.Namespace) -> bool:
    """JPEGs of about 400 x 533 px as crops of 224 px on the device, by workers."""
    from PIL import Image

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "jpeg"
        folder.mkdir()
        for number, small in enumerate(
            sorted(flat_images(Path(place), given.dry).iterdir())[: 16 if given.dry else 1000]
        ):
            with Image.open(small) as image:
                image.resize((533, 400)).save(folder / f"{number:05d}.jpg", quality=90)
        source = open_source(str(folder))
        images = load_images(source, range(len(source.entries)), size=(224, 224), channels=3, cache_limit=0.0)
        batch = 4 if given.dry else 256
        for workers in WORKERS[: 1 if given.dry else None]:
            with closing(train_batches(Crops(images, (224, 224), batch, 0), workers=workers, device=device)) as batches:
                next(batches)
                began, count = time.perf_counter(), 0
                while time.perf_counter() - began < (0.2 if given.dry else 15.0):
                    count += len(next(batches).images)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                tell(workers=workers, cores=os.cpu_count(), images_per_second=count / (time.perf_counter() - began))
    return True


def ranks(given: argparse.Namespace) -> bool:
    """One rank under torchrun has the losses of a run without it; a run that goes on has those of one that never stopped."""
    with tempfile.TemporaryDirectory() as place:
        folder = flat_images(Path(place), given.dry)
        words = [
            "pretrain",
            folder,
            "--recipe",
            "mae-tiny-32",
            "--set",
            "run.deterministic=true",
            "--set",
            "run.log_every=1",
        ]
        words += ["--batch-size", "8" if given.dry else "64", "--precision", "32"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "underpaint.cli"]
        plain = [sys.executable, "-m", "underpaint.cli"]
        count, half = ("4", "2") if given.dry else ("40", "20")
        # twice as long from its middle on has another schedule, so both runs are made longer there
        calls = {
            "plain": [(plain, half), (plain, count)],
            "torchrun": [(torchrun, half), (torchrun, count)],
            "mixed": [(plain, half), (torchrun, count)],
        }
        losses = {}
        for name, parts in calls.items():
            for command, length in parts:
                line = [*command, *words, "--steps", length, "--out", Path(place) / name]
                status = subprocess.run([str(word) for word in line], check=False).returncode
                if status:
                    tell(what=name, failed=f"status {status}")
                    return False
            lines = (Path(place) / name / "metrics.jsonl").read_text().splitlines()
            losses[name] = [json.loads(line)["loss"] for line in lines]
        same = all(found == losses["plain"] for found in losses.values())
        tell(
            what="losses are the same bits",
            same=same,
            losses=losses["plain"][-1],
            **({} if same else {"failed": losses}),
        )
    return same


def compare(given: argparse.Namespace) -> bool:
    """All methods with the tiny ViT under one wall-clock; goes on in runs/gpu-compare."""
    out = ROOT / "runs" / ("gpu-compare-dry" if given.dry else "gpu-compare")
    data = given.data
    if given.dry or not (data / "train.parquet").is_file():
        data = ROOT / "runs" / "gpu-images"
        if not data.is_dir():
            write_demo_images(data, train_per_photo=20 if given.dry else 300, test_per_photo=6 if given.dry else 80)
    encoder = [word for name, value in TINY.items() if name != "name" for word in ("--set", f"encoder.{name}={value}")]
    names = ("mae", "localmim") if given.dry else sorted(METHODS)
    line = ["compare", data, "--methods", ",".join(names), "--minutes", f"{given.minutes:g}", "--seeds", "1"]
    line += [
        "--image-size",
        "32",
        "--encoder",
        TINY["name"],
        *encoder,
        "--batch-size",
        "16" if given.dry else "256",
        "--lr",
        "2e-3",
    ]
    status = subprocess.run(
        [sys.executable, "-m", "underpaint.cli", *map(str, line), "--out", out], check=False
    ).returncode
    if (out / "compare.json").is_file():
        found = json.loads((out / "compare.json").read_text())
        tell(rows=found["rows"], verdict=found["verdict"])
    return status == 0


ASKED = {each.__name__: each for each in (steps, precision, peak, loader, ranks, compare)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=ASKED)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--data", type=Path, default=Path(".gpu-pack/data"))
    given = parser.parse_args()
    tell(environment=environment())
    sys.exit(0 if ASKED[given.what](given) else 1)


if __name__ == "__main__":
    main()
