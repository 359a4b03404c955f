"""Batch norms after a training on corrupted images: their statistics are not those of clean ones."""

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Encoder = TypeVar("Encoder", bound=nn.Module)


def batch_norms(encoder: nn.Module) -> list[_BatchNorm]:
    return [module for module in encoder.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@torch.no_grad()
def settled(encoder: Encoder, batches: Callable[[], Iterable[Tensor]]) -> Encoder:
    """The encoder itself where it has no batch norms; else a copy in eval mode whose running statistics are those of
    these standardised images: plain means over batches of equal size, which should each be a fair draw of all."""
    if not batch_norms(encoder):
        return encoder
    made = copy.deepcopy(encoder).eval()
    norms = batch_norms(made)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean
        norm.train()
    for images in batches():
        made(images)
    for norm, own in zip(norms, batch_norms(encoder), strict=True):
        norm.momentum = own.momentum
    return made.eval()
