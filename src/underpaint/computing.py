"""In which numbers a device computes, and how a network lies in its memory.

A precision is that of a network's products: "32" (float32), "bf16" (bfloat16), "16" (float16, under which a loss is scaled).
All else is float32 whatever the precision: images, what is drawn, targets, losses, norms, samplers (decision 22).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without which cuBLAS may sum in another order each time


def best_precision(device: torch.device) -> str:
    """bf16 on a GPU that has it: on a CPU without, it is many times slower than float32."""
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if cuda else "32"


def autocast(device: torch.device, precision: str | None = None) -> torch.autocast:
    """Inside, the products of networks are computed in this precision, the best of the device where None.

    Weights are cast where they are used, and casts not kept: gradients of one that is used twice are then added up in float32,
    and earlier versions of torch hand on a cast that was made without gradient.
    """
    half = PRECISIONS[precision or best_precision(device)]
    return torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False)


def in_full(like: Tensor) -> torch.autocast:
    """Inside, what is computed on the device of this tensor stays in the precision of what goes in (`full`)."""
    return torch.autocast(like.device.type, enabled=False)


def full(values: Tensor) -> Tensor:
    """In float32; in float64 what is."""
    return values if values.dtype == torch.float64 else values.float()


def output(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a network says, by the best precision of the device, in float32."""
    with autocast(images.device):
        return full(network(images))


@contextmanager
def products(exact: bool) -> Iterator[None]:
    """Inside, products of float32 numbers on GPUs are `exact`, or by TensorFloat-32: with 10 bits of a mantissa of 23, many
    times as fast. What was set is put back."""
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest" if exact else "high")
        torch.backends.cudnn.allow_tf32 = not exact
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Inside, where `wanted`, GPUs take kernels that give the same numbers each time; an operation that has none ends in a
    RuntimeError of torch's. To be entered before a GPU is used first. What was set is put back."""
    if not wanted:
        yield
        return
    before = {name: os.environ.get(name) for name in WORKSPACE}
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    try:
        os.environ.update(WORKSPACE)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        memory.fill_uninitialized_memory = False  # nothing here reads what was not written
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
        memory.fill_uninitialized_memory = filled
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def channels_last(network: nn.Module, device: torch.device) -> bool:
    """Whether the weights of a network lie with their channels last: on a GPU, whose tensor cores want them so, where more
    than one convolution looks beyond its place (that of patches is one, and is none here)."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    wide = [part for part in network.modules() if isinstance(part, kinds) and tuple(part.kernel_size) != (1, 1)]
    return device.type == "cuda" and len(wide) > 1


def lay_out(network: nn.Module, device: torch.device) -> None:
    """As `channels_last` says; what is computed of it stays the same, and its maps follow its weights."""
    if channels_last(network, device):
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
