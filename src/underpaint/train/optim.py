"""Optimisers, made in one place, and what is done where a gradient is not finite."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn


def adamw(
    groups: Iterable[Mapping[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999), fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW over groups that have `params`, a peak `lr` and a `weight_decay` each; `fused`, so that a step can be skipped
    by a flag on the device."""
    return torch.optim.AdamW([dict(group) for group in groups], betas=betas, fused=fused)


def layerwise(
    network: nn.Module, name: str, *, lr: float, weight_decay: float, layer_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """timm's optimiser of this name, each layer's rate `layer_decay` times that of the layer above it."""
    options: dict[str, Any] = {"fused": True} if name == "adamw" else {}
    return create_optimizer_v2(
        network,
        opt=name,
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay if layer_decay < 1 else None,
        betas=betas,
        **options,
    )


def pulled(groups: Iterable[Mapping[str, Any]], encoder: Iterable[nn.Parameter], pull: float) -> list[dict[str, Any]]:
    """The same groups, in which the encoder's weights are apart and pulled to where they are now.

    L2-SP (Li et al., ICML 2018, arXiv 1802.01483): decay towards the start in place of decay towards 0. As AdamW's decay,
    it is no part of the gradient, which AdamW would divide by its own size: a step moves a weight by its rate times `pull`
    of its way back (`pull_back`).
    """
    own, made = set(encoder), []
    for group in groups:
        rest = [parameter for parameter in group["params"] if parameter not in own]
        mine = [parameter for parameter in group["params"] if parameter in own]
        if rest:
            made.append({**group, "params": rest})
        if mine:
            start = [parameter.detach().clone() for parameter in mine]
            made.append({**group, "params": mine, "weight_decay": 0.0, "pull": pull, "start": start})
    return made


@torch.no_grad()
def pull_back(optimiser: torch.optim.Optimizer, taken: Tensor) -> None:
    """After a step: what `pulled` has set apart, on its way back; not where `taken` is 0."""
    for group in optimiser.param_groups:
        if "pull" in group:
            share = min(1.0, group["lr"] * group["pull"]) * taken
            for parameter, start in zip(group["params"], group["start"], strict=True):
                parameter.lerp_(start, share.to(parameter.dtype))


def skip_where(bad: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """Make the coming step change nothing where `bad` is 1; nothing here waits for the device.

    A fused optimiser skips by flag. Another one (timm's LAMB) gets gradients of zero: its weights then move by what it
    still holds (momentum, decay), and no further.
    """
    if optimiser.defaults.get("fused"):
        optimiser.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        return
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = torch.where(bad > 0, 0.0, parameter.grad)
