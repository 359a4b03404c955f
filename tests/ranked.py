"""What tests have several processes do, each a call of a function here (`CommandLine(function="ranked:NAME")`)."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from underpaint.config import Recipe
from underpaint.errors import InputError
from underpaint.patches import Standardize
from underpaint.prepare import stepper_for
from underpaint.recipes.recipe import checked
from underpaint.train import ranks
from underpaint.train.devices import make_fabric
from underpaint.train.stepper import Stepper

# of each method, what a user may choose of it, with the number of parts of the batch
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("mae", {}),
    ("simmim", {}),
    ("beit", {}),
    ("cae", {}),
    ("cae", {"target": "pixels"}),
    ("cim", {}),
    ("cim", {"objective": "detect"}),
    ("localmim", {}),
    ("localmim", {"stop_gradient": True, "target": "pixels", "pixel_head": True}),
    ("conditional-energy", {}),
    ("energy", {"corruption": "mixture"}),
    ("energy", {"steps": 3}),
    ("energy", {"steps": 2, "gradient": "difference"}),
]
BATCH = 8


def stepper(fabric: Fabric, name: str, settings: dict[str, Any], accumulation: int) -> Stepper:
    """Of a small method with random weights, the same in every process."""
    from test_methods import small

    recipe = checked(
        {"method": {"name": name, **settings}, "optimiser": {"batch_size": BATCH, "accumulation": accumulation}}
    )
    recipe.measured["precision"] = "32"
    method = small(name, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return stepper_for(fabric, recipe, method, Standardize([0.0] * 3, [1.0] * 3))


def gradients(current: Stepper, images: Tensor) -> dict[str, Tensor]:
    """After the way back, before anything is clipped; of all weights that are trained."""
    rows = slice(
        current.fabric.global_rank * current.local_batch, (current.fabric.global_rank + 1) * current.local_batch
    )
    current._backward(images[rows], current.noise(images[rows], 0))
    found = {}
    for key, parameter in current.task.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            found[key] = parameter.grad.clone()
    return found


def gradients_of_one(file: str) -> None:
    """The largest relative difference between the gradients of several processes and those of one, by case."""
    from test_methods import photographs

    fabric = make_fabric(Recipe())
    one, images, found = Fabric(strategy=SingleDeviceStrategy(torch.device("cpu"))), photographs(BATCH), {}
    for name, settings in OPTIONS:
        for accumulation in (1, 2):
            wanted = gradients(stepper(one, name, settings, 1), images)
            mine = gradients(stepper(fabric, name, settings, accumulation), images)
            assert mine.keys() == wanted.keys()
            size = torch.stack([each.norm() for each in wanted.values()]).norm()
            apart = torch.stack([(mine[key] - wanted[key]).norm() for key in wanted]).norm()
            found[f"{name} {settings} {accumulation}"] = float(apart / size)
    Path(f"{file}-{fabric.global_rank}").write_text(json.dumps(found))


def statistics_of_batch_norms(file: str) -> None:
    """Of a network with batch norms, after a step of each of two processes on images of its own."""
    fabric = make_fabric(Recipe())
    torch.manual_seed(0)

    class Net(nn.Module):
        num_losses, divisible = 1, True

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 1)

        def noise_for(self, inputs: Any, draws: Any) -> None:
            return None

        def clip_groups(self) -> list[Any]:
            return []

        def forward(self, inputs: Tensor, noise: Any = None) -> Any:
            from underpaint.trainable import Objective

            return Objective(self.linear(self.norm(inputs)).square().mean(), {})

    net: Any = Net()
    current = Stepper(fabric, net, torch.optim.AdamW(net.parameters(), 0.1, fused=True), lambda batch: batch, BATCH)
    images = torch.arange(24.0).view(8, 3)
    rows = images[fabric.global_rank * 4 : fabric.global_rank * 4 + 4]
    current.step(rows, 0, 1.0)
    halves = torch.stack([images[:4].mean(0), images[4:].mean(0)])
    torch.testing.assert_close(net.norm.running_mean, 0.1 * halves.mean(0))
    variances = torch.stack([images[:4].var(0), images[4:].var(0)])
    torch.testing.assert_close(net.norm.running_var, 0.9 + 0.1 * variances.mean(0))
    Path(f"{file}-{fabric.global_rank}").write_text(json.dumps(net.linear.weight.flatten().tolist()))


def shared_probe(data: str, file: str) -> None:
    """Features that processes make together, and what one makes."""
    from test_methods import small

    from underpaint.data import load_images, open_source
    from underpaint.evaluation import features
    from underpaint.evaluation.splits import Split

    features.AT_ONCE = 16
    fabric = make_fabric(Recipe())
    with ranks.together(fabric):
        with ranks.node_first():
            source = open_source(data)
            images = load_images(source, np.arange(len(source.entries)), size=(16, 16))
        encoder, split = small("mae").encoder, Split(images, np.arange(len(images))[3:77])
        given: Any = (encoder, Standardize([0.5] * 3, [0.25] * 3), split, (16, 16))
        for limit in (1e9, 1.0):
            features.FULL_PRECISION_BYTES = limit
            shared = features.shared_features(*given, with_patches=True)
            assert (shared is None) == (fabric.global_rank > 0)

            def alone(shared: Any = shared) -> list[Any]:
                return _equal(shared, features.features_of(*given, with_patches=True))

            assert ranks.by_first(alone) == [74, limit == 1.0]
        few = Split(images, np.arange(5))  # fewer than processes have batches
        shared = features.shared_features(given[0], given[1], few, (16, 16), with_patches=False)
        assert fabric.global_rank > 0 or (shared is not None and shared.pooled.shape == (5, 32))
    Path(f"{file}-{fabric.global_rank}").write_text("done")


def _equal(shared: Any, alone: Any) -> list[Any]:
    assert torch.equal(shared.pooled, alone.pooled)
    assert torch.equal(shared.patches, alone.patches)
    assert shared.samples.tolist() == alone.samples.tolist() == list(range(3, 77))
    return [len(alone.samples), shared.patches.dtype == torch.float16]


def turns(file: str) -> None:
    """Four processes on two machines: on each the first one goes first, and no machine waits for another."""
    fabric = make_fabric(Recipe())
    with ranks.together(fabric):
        with ranks.node_first():
            entered = time.monotonic()
            if fabric.local_rank == 0:
                time.sleep(0.2 if fabric.node_rank == 0 else 1.5)
            ended = time.monotonic()
        ranks.meet()
        sent = torch.full((3,), float(fabric.global_rank))
        ranks.send_out([sent])
        assert sent.tolist() == [0.0] * 3
        assert ranks.same(7)
        assert not ranks.same(fabric.global_rank)
    Path(f"{file}-{fabric.global_rank}").write_text(json.dumps([entered, ended]))


def long_work(how: str) -> int:
    """The first process works longer than the others are patient, who wait for it; then it is killed, or fails."""
    ranks.BEAT, ranks.SILENT = 0.2, 1.0
    fabric = make_fabric(Recipe())

    def work() -> str:
        time.sleep(2.5)
        if how == "killed":
            os.kill(os.getpid(), 9)
        if how == "fails":
            raise InputError("nothing here can be used")
        return "made"

    try:
        with ranks.together(fabric):
            assert ranks.by_first(work) == "made"
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        return 3
    return 0


def agreeing(file: str) -> None:
    """Both know a step later what one was told, at the same step, and the first one's clock."""
    fabric = make_fabric(Recipe())
    heard = []
    with ranks.together(fabric):
        agreement = ranks.Agreement()
        for step in range(6):
            told = 15 if fabric.global_rank == 1 and step >= 2 else 0
            heard.append(agreement(told, 100.0 * fabric.global_rank + step))
    Path(f"{file}-{fabric.global_rank}").write_text(json.dumps(heard))
