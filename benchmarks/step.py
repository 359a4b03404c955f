"""What a training step costs, against the floor that its matrix products set.

    python benchmarks/step.py                      every method x encoder: images/s, memory, share of the matrix rate
    python benchmarks/step.py --parts --only ViT-S   what a step of CIM is made of
    python benchmarks/step.py --peers              MAE beside transformers' ViTMAE and lightly's parts, equal shapes

FLOPs are counted (torch's flop counter over one real step, forward and backward), not guessed. The matrix rate is
that of one large float32 product, measured in the same process. Pairs are interleaved, so drift hits both alike.
"""

import argparse
import gc
import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import underpaint
from underpaint.computing import autocast
from underpaint.methods import CIM, METHODS
from underpaint.methods.words import WordMethod, cross_entropies
from underpaint.train.run_folder import environment
from underpaint.train.speed import peak, restart_peak

ENCODERS: dict[str, dict[str, Any]] = {
    "ViT-128x4/4, 32 px": {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
    },
    "ViT-Ti/16, 224 px": {"name": "vit_tiny_patch16_224", "image_size": 224},
    "ViT-S/16, 224 px": {"name": "vit_small_patch16_224", "image_size": 224},
    "ViT-B/16, 224 px": {"name": "vit_base_patch16_224", "image_size": 224},
    "Swin-T/4, 224 px": {"name": "swin_tiny_patch4_window7_224", "image_size": 224, "drop_path_rate": 0.0},
    "Swin-B/4, 224 px": {"name": "swin_base_patch4_window7_224", "image_size": 224, "drop_path_rate": 0.0},
}
BATCHES = {
    "ViT-128x4/4, 32 px": 128,
    "ViT-Ti/16, 224 px": 32,
    "ViT-S/16, 224 px": 16,
    "ViT-B/16, 224 px": 8,
    "Swin-T/4, 224 px": 16,
    "Swin-B/4, 224 px": 8,
}
ON_GPU = 16  # times larger batches


def synchronised(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a large matrix product."""
    size = size if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        synchronised(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronised(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


class _Counter(TorchDispatchMode):
    """Adds up torch's own FLOP formulas. (FlopCounterMode also tracks modules, which torch.func.grad forbids.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def counted_flops(step: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attention of one step."""
    with _Counter() as counter:
        step()
    return counter.total


def interleaved(steps: dict[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, float]:
    """The median time of each step, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(next(iter(times.values()))) < 3:
        for name, step in steps.items():
            synchronised(device)
            start = time.perf_counter()
            step()
            synchronised(device)
            times[name].append(time.perf_counter() - start)
    return {name: sorted(found)[len(found) // 2] for name, found in times.items()}


def training_step(model: torch.nn.Module, loss: Callable[[], Tensor], device: torch.device) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with autocast(device):
            value = loss()
        value.backward()
        optimiser.step()

    return step


def peak_memory(step: Callable[[], Any], device: torch.device) -> float | None:
    """GiB at the peak of a step: of the GPU, else of the whole process; None where the system does not tell.

    A CPU's process keeps freed memory, so a later row can only look larger: `--only` measures one encoder alone.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if not restart_peak():
        return None
    step()
    return round(peak() / 2**30, 2)


def own_rows(device: torch.device, seconds: float, only: str, methods: list[str]) -> list[dict[str, Any]]:
    """Every method on every encoder that admits it."""
    rate = matrix_rate(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    rows = []
    for encoder_name, settings in ENCODERS.items():
        if only not in encoder_name:
            continue
        batch = BATCHES[encoder_name] * (ON_GPU if device.type == "cuda" else 1)
        images = torch.randn(batch, 3, settings["image_size"], settings["image_size"], device=device)
        for name in methods:
            arguments = dict(settings)
            encoder = underpaint.encoder(arguments.pop("name"), **arguments)
            try:
                method = METHODS[name](encoder).to(device)  # pyright: ignore[reportCallIssue]
            except TypeError:  # this method needs another kind of encoder
                continue
            if isinstance(method, WordMethod):  # words as costly as fitted ones
                method.tokenizer.load_state_dict({"centres": torch.rand_like(method.tokenizer.centres)}, strict=False)
                method.tokenizer.ready = True
            if isinstance(method, CIM):
                method.generator.tokenizer.ready = True
            mask = method.sample(batch, images.shape[2], images.shape[3]).to(device)
            step = training_step(method, lambda m=method, k=mask, x=images: m(x, k).loss, device)
            flops = counted_flops(step)
            took = interleaved({"step": step}, device, seconds)["step"]
            rows.append(
                {
                    "method": name,
                    "encoder": encoder_name,
                    "batch": batch,
                    "images_per_second": round(batch / took, 1),
                    "gflop_per_image": round(flops / batch / 1e9, 2),
                    "floor_seconds": round(flops / rate, 4),
                    "seconds": round(took, 4),
                    "share_of_matrix_rate": round(flops / took / rate, 3),
                    "peak_gib": peak_memory(step, device),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            del method, step
            gc.collect()
    print(f"matrix rate {rate / 1e9:.0f} GFLOP/s")
    return rows


def cim_parts(device: torch.device, seconds: float, encoder_name: str) -> dict[str, float]:
    """Seconds of each part of a CIM step, taken in turns with the whole step."""
    arguments = dict(ENCODERS[encoder_name])
    batch = BATCHES[encoder_name] * (ON_GPU if device.type == "cuda" else 1)
    size = arguments["image_size"]
    method = CIM(underpaint.encoder(arguments.pop("name"), **arguments)).to(device)
    method.generator.tokenizer.ready = True
    images = torch.randn(batch, 3, size, size, device=device)
    noise = method.sample(batch, size, size).to(device)
    corrupted = method.corrupt(images, noise)
    hidden = corrupted.golden.gather(1, noise.mask.hidden)

    def part(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with autocast(device):
                value = work()
            if isinstance(value, Tensor) and value.requires_grad:
                value.backward()

        return run

    parts = {
        "encode": part(lambda: method.generator.words(images)),
        "generator": part(lambda: cross_entropies(method.generator.predict(images, noise.mask), hidden).mean()),
        "sampling": part(lambda: method.sample_tokens(corrupted.logits, hidden, noise.uniform)),
        "decode": part(lambda: method.generator.spoken(images, corrupted.words)),
        "enhancer": part(lambda: method.losses(images, corrupted)[0].mean()),
        "step": training_step(method, lambda: method(images, noise).loss, device),
    }
    found = interleaved(parts, device, seconds)
    print(json.dumps({"encoder": encoder_name, **{name: round(took, 4) for name, took in found.items()}}))
    share = (found["encode"] + found["generator"] + found["sampling"] + found["decode"]) / found["step"]
    print(f"tokenizer and generator: {share:.2f} of the step")
    return found


def peers(device: torch.device, seconds: float) -> None:
    """MAE at ViT-S/16, 224 px, decoder 192 x 4: ours, transformers' and one made of lightly's parts."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import vit_small_patch16_224
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    batch = 16 * (ON_GPU if device.type == "cuda" else 1)
    images = torch.randn(batch, 3, 224, 224, device=device)
    encoder: Any = underpaint.encoder("vit_small_patch16_224")
    ours = underpaint.MAE(encoder, decoder_dim=192, decoder_depth=4).to(device)
    config = ViTMAEConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        decoder_hidden_size=192,
        decoder_num_hidden_layers=4,
        decoder_num_attention_heads=6,
        decoder_intermediate_size=768,
        mask_ratio=0.75,
        norm_pix_loss=True,
    )
    theirs = ViTMAEForPreTraining(config).to(device)  # pyright: ignore[reportArgumentType]

    class Lightly(torch.nn.Module):
        """The MAE of lightly's documentation, from lightly's parts."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = MaskedVisionTransformerTIMM(vit=vit_small_patch16_224())
            self.decoder = MAEDecoderTIMM(
                num_patches=196,
                patch_size=16,
                embed_dim=384,
                decoder_embed_dim=192,
                decoder_depth=4,
                decoder_num_heads=6,
                mlp_ratio=4.0,
            )

        def forward(self, x: Tensor) -> Tensor:
            length = self.backbone.sequence_length
            keep, hide = utils.random_token_mask((len(x), length), mask_ratio=0.75, device=x.device)
            encoded = self.backbone.encode(images=x, idx_keep=keep)
            narrowed = self.decoder.embed(encoded)
            tokens = utils.repeat_token(self.decoder.mask_token, (len(x), length))
            tokens = utils.set_at_index(tokens, keep, narrowed.type_as(tokens))
            decoded = self.decoder.decode(tokens)
            predicted = self.decoder.predict(utils.get_at_index(decoded, hide))
            target = utils.get_at_index(utils.patchify(x, 16), hide - 1)
            return torch.nn.functional.mse_loss(predicted, utils.normalize_mean_var(target, dim=-1))

    lightly = Lightly().to(device)
    steps = {
        "underpaint": training_step(ours, lambda: ours(images).loss, device),
        "transformers": training_step(theirs, lambda: theirs(images).loss, device),
        "lightly": training_step(lightly, lambda: lightly(images), device),
    }
    took = interleaved(steps, device, seconds * len(steps))
    for name, value in took.items():
        flops = counted_flops(steps[name]) / batch / 1e9
        print(
            f"{name:<14} {batch / value:8.1f} images/s  {flops:6.2f} GFLOP/image  "
            f"{value / took['underpaint']:.2f} times our step"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="beside other libraries")
    parser.add_argument("--parts", action="store_true", help="the parts of a CIM step, for --only")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring a row")
    parser.add_argument("--only", default="", help="encoders whose name holds this")
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(json.dumps({**environment(), "commit": commit.stdout.strip()}))
    if given.peers:
        peers(device, given.seconds)
    elif given.parts:
        for name in ENCODERS:
            if given.only in name:
                cim_parts(device, given.seconds, name)
    else:
        own_rows(device, given.seconds, given.only, given.methods)


if __name__ == "__main__":
    main()
