"""Every method on every family of encoders: does it build, learn, leak, and what does a step cost?

    python benchmarks/backbones.py PHOTOS.parquet           all pairs; goes on where it was stopped
    python benchmarks/backbones.py PHOTOS.parquet --only resnet,eva02 --method mae
    python benchmarks/backbones.py --page                   writes docs/results/backbones.md of what was found

Images of 64 px (the column `image`), batches of 16, 20 steps of AdamW at 1e-3, gradients clipped at 1 as in a run. Of each pair docs/results/backbones.json
has: the loss of the first and of the last three steps over its baseline; seconds a step (median) and the share of the matrix
rate that its counted FLOPs reach; how hidden places are kept from what is learned ("visible": the network runs on the others
alone; "empty": `visible.py`; "input": hidden pixels are at the mean, and no more; "token", "colour": a learned one is in their
place); and the leak: hidden pixels are changed, and the largest change of what is said
of them over the largest number said, which must be 0. Of a pair that cannot be it has the sentence that a user gets.
"""

import argparse
import gc
import io
import json
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from step import counted_flops, matrix_rate
from torch import Tensor

import underpaint
from underpaint.backbones.maps import Stages
from underpaint.draws import Draws
from underpaint.errors import InputError
from underpaint.masking import hidden_map
from underpaint.methods import CAE, CIM, METHODS, BEiT, Energy, LocalMIM, SimMIM
from underpaint.tokenizers import sample_patches

ROOT = Path(__file__).parents[1]
FOUND, PAGE = ROOT / "docs" / "results" / "backbones.json", ROOT / "docs" / "results" / "backbones.md"
SIZE, BATCH, STEPS, RATE = 64, 16, 20, 1e-3
SEVEN = ("mae", "simmim", "beit", "energy", "cae", "localmim", "cim")

SMALL = {"patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # plain transformers
    "ViT": ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 4}),
    "DeiT-3": ("deit3_small_patch16_224", SMALL),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", SMALL),
    "SigLIP": ("vit_base_patch16_siglip_224", SMALL),
    "CLIP": ("vit_base_patch16_clip_224", SMALL),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL),
    "EVA-02": ("eva02_tiny_patch14_224", SMALL),
    "PE": ("vit_pe_spatial_small_patch16_512", SMALL),
    "RoPE-ViT": ("vit_small_patch16_rope_mixed_224", SMALL),
    "NaFlexViT": ("naflexvit_base_patch16_gap", SMALL),
    "BEiT": ("beit_base_patch16_224", SMALL),
    "CaiT": ("cait_xxs24_224", {"patch_size": 8, "depth": 4}),
    "ViT, relative": ("vit_relpos_small_patch16_224", SMALL),
    # hierarchical transformers and hybrids
    "Swin": ("swin_tiny_patch4_window7_224", {}),
    "SwinV2": ("swinv2_tiny_window8_256", {}),
    "Hiera": ("hiera_tiny_224", {}),
    "MViTv2": ("mvitv2_tiny", {}),
    "PVTv2": ("pvt_v2_b0", {}),
    "Twins": ("twins_svt_small", {}),
    "DaViT": ("davit_tiny", {}),
    "FocalNet": ("focalnet_tiny_srf", {}),
    "MaxViT": ("maxvit_pico_rw_256", {}),
    "CoAtNet": ("coatnet_pico_rw_224", {}),
    "CAFormer": ("caformer_s18", {}),
    "EfficientFormerV2": ("efficientformerv2_s0", {}),
    "FastViT": ("fastvit_t8", {}),
    "MobileViT": ("mobilevitv2_050", {}),
    "EdgeNeXt": ("edgenext_xx_small", {}),
    "XCiT": ("xcit_nano_12_p8_224", {}),
    # convolutional nets
    "ResNet": ("resnet18", {}),
    "ResNetV2": ("resnetv2_18", {}),
    "ConvNeXt": ("convnext_atto", {}),
    "ConvNeXt V2": ("convnextv2_atto", {}),
    "EfficientNet": ("efficientnet_b0", {}),
    "RegNet": ("regnety_002", {}),
    "MobileNetV3": ("mobilenetv3_small_100", {}),
    "MobileNetV4": ("mobilenetv4_conv_small", {}),
    "DenseNet": ("densenet121", {}),
    "NFNet": ("nfnet_l0", {}),
    "VGG": ("vgg11_bn", {}),
    "InceptionNeXt": ("inception_next_atto", {}),
}


def photographs(file: Path, count: int) -> Tensor:
    """Standardised photographs [count, 3, SIZE, SIZE] of a parquet file."""
    rows = next(pq.ParquetFile(file).iter_batches(count, columns=["image"])).to_pylist()
    images = []
    for row in rows:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
            pixels = torch.frombuffer(
                bytearray(picture.convert("RGB").resize((SIZE, SIZE)).tobytes()), dtype=torch.uint8
            )
        images.append(pixels.view(SIZE, SIZE, 3).permute(2, 0, 1) / 255)
    made = torch.stack(images)
    return (made - made.mean((0, 2, 3), keepdim=True)) / made.std((0, 2, 3), keepdim=True)


def built(family: str, name: str, images: Tensor) -> Any:
    """The method on a new encoder, its words ready."""
    encoder_name, settings = FAMILIES[family]
    torch.manual_seed(0)
    encoder: Any = underpaint.encoder(encoder_name, image_size=SIZE, **settings)
    words: dict[str, Any] = {"codebook_size": 64} if name in ("beit", "cae", "cim") else {}
    made: Any = METHODS[name](encoder, **words)
    if isinstance(made, BEiT | CAE):
        made.tokenizer.fit(sample_patches([images.clamp(0, 1)], made.tokenizer.stride, 4096, seed=0))
    if isinstance(made, CIM):
        made.generator.tokenizer.ready = True
    return made


@torch.no_grad()
def leak(method: Any, images: Tensor) -> float:
    """The largest change of what is said of hidden places when their pixels change, over the largest number said."""
    method.eval()
    noise = method.sample(len(images), SIZE, SIZE, Draws.of(1, len(images)))
    if isinstance(method, Energy):  # what is given is the corrupted image; the corruption must have hidden the pixels
        mask, unit = noise.drawn["mask"], method.masking.unit
    elif isinstance(method, CIM):
        mask, unit = noise.mask, method.masking.unit
    else:
        mask, unit = method.mask_at(noise) if hasattr(method, "mask_at") else noise, method.masking.unit
    hidden = hidden_map(mask, (SIZE // unit[0], SIZE // unit[1]), unit)
    said = []
    for pixels in (images, images + 3 * hidden * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))):
        torch.manual_seed(3)
        if isinstance(method, LocalMIM):
            said.append(torch.cat([tokens.flatten() for tokens in method.every_tap(pixels, noise)]))
        elif isinstance(method, Energy):
            said.append(method.restored(pixels, noise)[-1][0])
        elif isinstance(method, CIM):
            said.append(method.generator.predict(pixels, mask))
        else:
            said.append(method.predict(pixels, noise))
    return float((said[0] - said[1]).abs().max() / said[0].abs().max())


def train(method: Any, optimiser: torch.optim.Optimizer, batch: Tensor, noise: Any, told: list[float]) -> None:
    """A step; tells the loss over its baseline."""
    optimiser.zero_grad(set_to_none=True)
    loss, terms = 0.0, {}
    for objective in method.parts(batch, noise):
        objective.loss.backward()
        loss, terms = loss + float(objective.loss.detach()), objective.terms
    torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
    optimiser.step()
    told.append(loss / float(terms["baseline"]))


def how(method: Any) -> str:
    """How hidden places are kept from what is learned; empty for a method that hides none from its encoder."""
    walk, encoder = getattr(method, "walk", None), method.encoder
    if walk is not None:
        return "visible" if type(walk) is not Stages else "empty" if walk.sound else "input"
    if isinstance(method, CAE):
        return "visible"
    if isinstance(method, SimMIM | BEiT):
        return "colour" if encoder.token_dim == encoder.channels else "token"
    return ""


def pair(family: str, name: str, images: Tensor, rate: float, steps: int = STEPS) -> dict[str, Any]:
    """What is found of one method on one family."""
    try:
        method = built(family, name, images)
    except (InputError, ValueError, TypeError) as error:
        return {"refused": str(error)}
    size, draws = len(images) - BATCH, Draws.of(0, BATCH)
    first = method.sample(BATCH, SIZE, SIZE, draws)
    method.calibrate(images[:BATCH], first)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], RATE)
    ratios, times, flops = [], [], 0
    for step in range(steps):
        batch = images[step * BATCH % size :][:BATCH]
        noise = method.sample(BATCH, SIZE, SIZE, draws)
        told: list[float] = []
        work = partial(train, method, optimiser, batch, noise, told)
        if step == 0:
            flops = counted_flops(work)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        ratios.append(told[0])
    took = sorted(times)[len(times) // 2] if times else float("nan")
    found = {
        "before": round(sum(ratios[:3]) / 3, 3),
        "after": round(sum(ratios[-3:]) / 3, 3),
        "seconds": round(took, 4),
        "floor": round(flops / rate, 4),
        "leak": leak(method, images[:2]),
        "hidden": how(method),
    }
    return found


def page(found: dict[str, dict[str, Any]]) -> str:
    pairs = {key: row for key, row in found.items() if key != "machine"}
    served = sum("refused" not in row for row in pairs.values())
    missing = len(FAMILIES) * len(SEVEN) - len(pairs)
    leaks = [key for key, row in pairs.items() if row.get("leak")]
    text = f"""# Methods on families of encoders

Made by `benchmarks/backbones.py` ({found["machine"]["text"]}). {served} of {len(pairs)} pairs that were run are served{f"; {missing} were not run yet" if missing else ""}. Each was trained for {STEPS}
steps of {BATCH} photographs of {SIZE} px. A cell has the loss over its trivial baseline in the first and in the last three steps, then
the share of the matrix rate that a step reaches. 20 steps say that a pair trains, and nothing about what it is worth.

Hidden pixels were changed in each: {"nothing that is said of hidden places changed, to the last bit, in any" if not leaks else "what is said changed in " + ", ".join(leaks)}.
v: the network runs on visible places alone; e: hidden places are empty in the whole network; i: hidden pixels are at the mean of
the data, and no more, since the network carries other things from place to place; t, c: a learned token or colour stands there.

| family | {" | ".join(SEVEN)} |
|---|{"---|" * len(SEVEN)}
"""
    refusals: dict[str, list[str]] = {}
    for family in FAMILIES:
        cells = []
        for name in SEVEN:
            row = pairs.get(f"{family} / {name}")
            if row is None:
                cells.append("not run")
            elif "refused" in row:
                refusals.setdefault(row["refused"], []).append(f"{family} / {name}")
                cells.append(f"- [{list(refusals).index(row['refused']) + 1}]")
            else:
                how = f" {row['hidden'][0]}" if row["hidden"] else ""
                share = 100 * row["floor"] / row["seconds"]
                cells.append(f"{row['before']:.2f} → {row['after']:.2f}, {share:.0f} %{how}")
        text += f"| {family} | {' | '.join(cells)} |\n"
    text += "\n## Why not\n\n"
    for number, (why, where) in enumerate(refusals.items(), start=1):
        text += f"{number}. {why} ({', '.join(where)})\n"
    return text


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("photographs", type=Path, nargs="?")
    given.add_argument("--only", default="", help="families, by commas")
    given.add_argument("--method", default="", help="methods, by commas")
    given.add_argument("--again", action="store_true", help="pairs that were found too")
    given.add_argument("--page", action="store_true", help="write the page alone")
    asked = given.parse_args()
    found: dict[str, Any] = json.loads(FOUND.read_text()) if FOUND.is_file() else {}
    if not asked.page:
        images = photographs(asked.photographs, 12 * BATCH)
        rate = matrix_rate(torch.device("cpu"), torch.float32)
        text = f"{torch.get_num_threads()} threads of {platform.machine()}, matrix rate {rate / 1e9:.0f} GFLOP/s, torch {torch.__version__}"
        found["machine"] = {"text": text}
        for family in FAMILIES:
            for name in SEVEN:
                key = f"{family} / {name}"
                wanted = not asked.only or family in asked.only.split(",")
                wanted = wanted and (not asked.method or name in asked.method.split(","))
                if not wanted or (key in found and not asked.again):
                    continue
                found[key] = pair(family, name, images, rate)
                print(key, found[key], flush=True)
                FOUND.write_text(json.dumps(found, indent=1) + "\n")
                gc.collect()
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
