"""From a folder of photographs to a trained encoder: `underpaint pretrain` beside what users write with other libraries.

    python benchmarks/end_to_end.py PHOTOS.parquet --setting tiny --epochs 3 --rounds 2 [--work DIR]

MAE with the same architecture, decoder, batch, crops and images seen, each as a command of its own, start-up and all, taken
in turns: ours with an empty cache (cold) and with the one that the run before it left (warm), transformers' ViTMAE over
torchvision's ImageFolder, lightly's parts over its own data set (`make bench` installs both; the peers' scripts are below).
The photographs are those of a parquet file (the column `image`), enlarged to 400 x 533 px and written as JPEG, so that
decoding costs what it costs for photographs.

Told of each: seconds until the trained encoder is on disk, and until the command ends (ours judges and draws between them).
docs/results/end-to-end.json has every run; what is there is not run again.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from PIL import Image

from underpaint.train.run_folder import environment

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "docs" / "results" / "end-to-end.json"
COUNT, HEIGHT, WIDTH, QUALITY = 3_068, 400, 533, 90
WHO = ("ours, cold", "ours, warm", "transformers", "lightly")


class Setting(NamedTuple):
    """One architecture, with its decoder, for images of one size."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder: tuple[int, int]  # width, blocks
    batch: int


SETTINGS = {
    "tiny": Setting(64, 8, 192, 12, 3, (96, 4), 128),
    "small": Setting(224, 16, 384, 12, 6, (192, 4), 64),
    "demo": Setting(32, 4, 128, 4, 4, (96, 2), 256),
}

# what all peers have: the same recipe of optimiser and schedule as ours
PEER = """
import math, sys, torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

folder, out, epochs, size, patch, width, depth, heads, narrow, blocks, batch = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.manual_seed(0)
transform = v2.Compose([
    v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip(), v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
])
data = ImageFolder(folder, transform)
loader = torch.utils.data.DataLoader(data, batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
{model}
steps, rate = epochs * len(loader), 1.5e-4 * batch / 256
optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.05)
warm = max(1, round(0.05 * steps))
schedule = torch.optim.lr_scheduler.LambdaLR(
    optimiser, lambda k: (k + 1) / warm if k < warm else 0.5 * (1 + math.cos(math.pi * (k - warm) / max(1, steps - warm)))
)
for epoch in range(epochs):
    for images, _ in loader:
        value = loss(images)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    print(epoch, float(value), flush=True)
save(out)
"""
MODELS = {
    "transformers": """
from transformers import ViTMAEConfig, ViTMAEForPreTraining
model = ViTMAEForPreTraining(ViTMAEConfig(
    image_size=size, patch_size=patch, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
    intermediate_size=4 * width, decoder_hidden_size=narrow, decoder_num_hidden_layers=blocks,
    decoder_num_attention_heads=max(1, narrow // 32), decoder_intermediate_size=4 * narrow, mask_ratio=0.75, norm_pix_loss=True,
))
loss = lambda images: model(images).loss
save = model.vit.save_pretrained
""",
    "lightly": """
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        vit = VisionTransformer(img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=(size // patch) ** 2, patch_size=patch, embed_dim=width, decoder_embed_dim=narrow,
            decoder_depth=blocks, decoder_num_heads=max(1, narrow // 32), mlp_ratio=4.0,
        )

    def forward(self, x):
        length = self.backbone.sequence_length
        keep, hide = utils.random_token_mask((len(x), length), mask_ratio=0.75, device=x.device)
        narrowed = self.decoder.embed(self.backbone.encode(images=x, idx_keep=keep))
        tokens = utils.set_at_index(utils.repeat_token(self.decoder.mask_token, (len(x), length)), keep, narrowed)
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hide))
        target = utils.get_at_index(utils.patchify(x, patch), hide - 1)
        return torch.nn.functional.mse_loss(predicted, utils.normalize_mean_var(target, dim=-1))

model = Model()
loss = model

def save(out):
    import os
    os.makedirs(out, exist_ok=True)
    torch.save(model.backbone.vit.state_dict(), os.path.join(out, "encoder.pt"))
""",
}


def photographs(file: Path, folder: Path) -> Path:
    """A folder of JPEGs in ten classes, made once."""
    if (folder / "done").is_file():
        return folder / "images"
    number = 0
    for batch in pq.ParquetFile(file).iter_batches(256, columns=["image"]):
        for row in batch.to_pylist():
            if number == COUNT:
                break
            place = folder / "images" / f"class{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            with Image.open(io.BytesIO(row["image"]["bytes"])) as small:
                large = small.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            large.save(place / f"{number:05d}.jpg", quality=QUALITY)
            number += 1
    (folder / "done").touch()
    return folder / "images"


def ours(images: Path, out: Path, setting: Setting, epochs: int) -> list[str]:
    words: dict[str, Any] = {
        "encoder.embed_dim": setting.width,
        "encoder.depth": setting.depth,
        "encoder.num_heads": setting.heads,
        "method.decoder_dim": setting.decoder[0],
        "method.decoder_depth": setting.decoder[1],
        "data.crop_scale": "[0.2,1.0]",
    }
    line = [sys.executable, "-m", "underpaint.cli", "pretrain", images, "--out", out, "--method", "mae", "--all-images"]
    line += ["--encoder", "vit_tiny_patch16_224", "--image-size", setting.image, "--patch-size", setting.patch]
    line += ["--batch-size", setting.batch, "--lr", "1.5e-4", "--epochs", epochs]
    return [
        str(word) for word in (*line, *(part for name, value in words.items() for part in ("--set", f"{name}={value}")))
    ]


def theirs(who: str, images: Path, out: Path, setting: Setting, epochs: int, work: Path) -> list[str]:
    script = work / f"{who}.py"
    script.write_text(PEER.format(model=MODELS[who]))
    numbers = [epochs, *setting[:5], *setting.decoder, setting.batch]
    return [str(word) for word in (sys.executable, script, images, out, *numbers)]


def timed(who: str, images: Path, setting: Setting, epochs: int, work: Path) -> dict[str, float]:
    """Seconds until the last time that the encoder was written, and until the command ended."""
    out, cache = work / "out", work / "cache"
    shutil.rmtree(out, ignore_errors=True)
    if who == "ours, cold":
        shutil.rmtree(cache, ignore_errors=True)
    line = (
        ours(images, out, setting, epochs)
        if who.startswith("ours")
        else theirs(who, images, out, setting, epochs, work)
    )
    began = time.time()
    with (work / "output.txt").open("w") as output:
        subprocess.run(
            line, check=True, stdout=output, stderr=output, env={**os.environ, "UNDERPAINT_CACHE": str(cache)}
        )
    ended = time.time()
    names = ("encoder.safetensors", "model.safetensors", "encoder.pt")
    written = max(path.stat().st_mtime for path in (out / name for name in names) if path.is_file())
    return {"ready": round(written - began, 2), "ended": round(ended - began, 2)}


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("photographs", type=Path)
    given.add_argument("--setting", choices=SETTINGS, default="tiny")
    given.add_argument("--epochs", type=int, default=3)
    given.add_argument("--rounds", type=int, default=2)
    given.add_argument(
        "--only", default=",".join(WHO).replace(", ", ":"), help="of " + ",".join(WHO).replace(", ", ":")
    )
    given.add_argument("--work", type=Path, default=ROOT / "runs" / "end-to-end")
    asked = given.parse_args()
    work = asked.work.resolve()
    images, setting = photographs(asked.photographs, work / "photographs"), SETTINGS[asked.setting]
    for number in range(asked.rounds):
        for who in (name.replace(":", ", ") for name in asked.only.split(",")):
            found = json.loads(FOUND.read_text()) if FOUND.is_file() else {}
            key = f"{asked.setting}, {asked.epochs} epochs, {who}, round {number + 1}"
            if key in found:
                continue
            row = {**timed(who, images, setting, asked.epochs, work), "images": COUNT * asked.epochs}
            commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
            row |= {"commit": commit.stdout.strip(), "torch": environment()["torch"], "cores": os.cpu_count()}
            print(key, row, flush=True)
            FOUND.write_text(json.dumps({**found, key: row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
