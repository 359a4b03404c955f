"""A GPU where there is none: shapes, dtypes and devices of a forward pass as CUDA would have them, and no numbers.

Under `FakeTensorMode` nothing is computed, so tensors can say that they lie on a device that this machine lacks. A read of a
number by the host raises, and so does an operation on tensors of two devices. Autograd's engine asks for a real context, so
only forward passes can be looked at.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)


class Seen(TorchDispatchMode):
    """How often each operation gave a floating-point tensor of each dtype: {(name, dtype): count}."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.counts[func._overloadpacket.__name__, tensor.dtype] += 1
        return out

    def dtypes(self, *names: str) -> set[torch.dtype]:
        """Of what these operations gave."""
        return {dtype for name, dtype in self.counts if name in names}


def moved(mode: FakeTensorMode, value: Any) -> Any:
    """Tensors in tuples, lists and dicts as fakes on the GPU."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        with mode:
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=CUDA)

    return tree_map(one, value)


def move(mode: FakeTensorMode, module: nn.Module) -> nn.Module:
    """The same module, its weights and buffers fakes on the GPU. It was built on the CPU: timm's constructors read numbers."""
    for each in module.modules():
        for name, weight in list(each._parameters.items()):
            if weight is not None:
                each._parameters[name] = nn.Parameter(moved(mode, weight.detach()), requires_grad=weight.requires_grad)
        for name, buffer in list(each._buffers.items()):
            if buffer is not None:
                each._buffers[name] = moved(mode, buffer)
    return module


@contextmanager
def on_gpu(mode: FakeTensorMode, half: bool = True) -> Iterator[Seen]:
    """Inside, new tensors are fakes, and autocast is that of a GPU with bfloat16; what is made is noted."""
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        patch("torch.amp.autocast_mode.is_autocast_available", lambda _: True),
        mode,
        Seen() as seen,
        torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False),
    ):
        yield seen
