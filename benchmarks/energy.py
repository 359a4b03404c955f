"""Ways to get the energy method's gradient: time against a plain full-token step, and memory.

    python benchmarks/energy.py                    every way on ViT-S/16 at 224 px and on a small ViT at 32 px
    python benchmarks/energy.py --only 32 --seconds 20
    python benchmarks/energy.py --only S/16 --ways exact difference "given visible"

Plain is one forward and backward of all tokens with fused attention and a linear head (what a SimMIM step costs).
Times are medians of steps taken in turns in one process. Memory is the growth over what the process held before the
step, each way in a process of its own (on a GPU: the allocator's peak).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from step import BATCHES, ENCODERS, counted_flops, interleaved, matrix_rate

import underpaint
from underpaint.computing import autocast
from underpaint.train.speed import peak, restart_peak

SMALL = "ViT-128x4/4, 32 px"
SHAPES: dict[str, tuple[dict[str, Any], int]] = {  # encoder, batch
    "ViT-128x4/8, 32 px": (ENCODERS[SMALL] | {"patch_size": 8}, 256),
    **{name: (ENCODERS[name], BATCHES[name]) for name in (SMALL, "ViT-S/16, 224 px")},
}
WAYS = ("plain", "exact", "exact, compiled", "exact, N = 2", "difference", "difference, compiled", "given visible")


def make(way: str, shape: str, device: torch.device) -> tuple[Callable[[], None], int]:
    """One step of this way, and its batch."""
    settings, batch = SHAPES[shape]
    settings = dict(settings)
    batch *= 16 if device.type == "cuda" else 1
    torch.manual_seed(0)
    encoder: Any = underpaint.encoder(settings.pop("name"), **settings)
    images = torch.randn(batch, 3, settings["image_size"], settings["image_size"], device=device)
    if way == "plain":
        pixels = encoder.patch_size[0] * encoder.patch_size[1] * 3
        head = torch.nn.Linear(encoder.dim, pixels).to(device)
        model: torch.nn.Module = torch.nn.ModuleList([encoder.to(device), head])

        def losses() -> Any:
            yield head(encoder(images).patches).square().mean()
    else:
        if way == "given visible":
            method: Any = underpaint.ConditionalEnergy(encoder, step_size=0.3)
        else:
            gradient = "difference" if "difference" in way else "exact"
            method = underpaint.Energy(encoder, steps=2 if "N = 2" in way else 1, step_size=0.3, gradient=gradient)
        method.to(device)
        model = method
        noise = method.sample(batch, *images.shape[-2:]).to(device)
        called: Any = torch.compile(method) if "compiled" in way else method

        def losses() -> Any:
            carry = None
            for part in range(method.num_losses):
                objective = called(images, noise, part, carry) if method.num_losses > 1 else called(images, noise)
                yield objective.loss
                carry = objective.carry

    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        values = losses()
        while True:
            with autocast(device):
                value = next(values, None)
            if value is None:
                break
            value.backward()
        optimiser.step()

    return step, batch


def grown(way: str, shape: str, device: torch.device) -> float:
    """GiB that a step takes beyond what was held before it."""
    step, _ = make(way, shape, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = restart_peak()
    step()
    step()
    return (peak() - before) / 2**30


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--only", default="")
    given.add_argument("--seconds", type=float, default=20.0)
    given.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="plain is always among them")
    given.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = given.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.memory:
        print(json.dumps(grown(*arguments.memory, device)))
        return
    rate = matrix_rate(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    print(f"matrix rate {rate / 1e9:.0f} GFLOP/s; {torch.get_num_threads()} threads")
    ways = [way for way in WAYS if way in {"plain", *arguments.ways}]
    for shape in SHAPES:
        if arguments.only not in shape:
            continue
        steps = {way: make(way, shape, device)[0] for way in ways}
        flops = {way: counted_flops(step) for way, step in steps.items() if "compiled" not in way}
        times = interleaved(steps, device, arguments.seconds)
        memory = {}
        for way in ways:
            command = [sys.executable, __file__, "--memory", way, shape]
            # freed memory goes back at once, so that growth is what a step needs
            environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            memory[way] = float(json.loads(done.stdout.splitlines()[-1]))
        print(f"\n{shape}, batch {make('plain', shape, device)[1]}")
        for way in ways:
            share = f"{flops[way] / times[way] / rate:.2f} of the matrix rate" if way in flops else ""
            print(
                f"{way:<22}{times[way]:8.4f} s {times[way] / times['plain']:6.2f} x time"
                f"{memory[way]:8.2f} GiB {memory[way] / memory['plain']:6.2f} x memory  {share}",
                flush=True,
            )


if __name__ == "__main__":
    main()
