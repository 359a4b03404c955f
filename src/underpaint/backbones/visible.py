"""Feature maps of the visible part of an image alone, from a network that knows nothing of masks.

SparK (Tian et al., arXiv 2301.03580) and ConvNeXt V2 (Woo et al., arXiv 2301.00808) keep hidden places empty through a
convolutional network: the mask, at each stride, empties them before every convolution that looks beyond its place, and
norms take their statistics over visible places. Here this is a mode around timm's own network, not another network:
inside `with VisibleOnly(visible):` whatever looks from one place at others is given maps whose hidden places are 0, and
means over the whole map (of squeeze-excitation, too) are means over what is visible. Nothing is put on the network, so
nothing has to be taken off it.

What a network does beside that (attention over all places, shifts, maps of odd sizes) may still carry something from
hidden places to visible ones. `soundly` tries it: with numbers of no meaning in all hidden places of all maps, the visible
ones must not change.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from underpaint.computing import full

Function = Callable[..., Any]
EMPTIED: set[Function] = {  # what looks at the places around one, and where an empty one counts for nothing
    F.pad,
    F.max_pool2d,
    torch.max_pool2d,
    F.avg_pool2d,
    F.interpolate,
    torch.norm,
    torch.linalg.norm,
    torch.linalg.vector_norm,
    Tensor.norm,
    torch.sum,
    Tensor.sum,
}


class VisibleOnly(TorchFunctionMode):
    """Inside, places of feature maps that are hidden are empty for all others.

    Args:
        visible: 1 where a place of the coarsest grid is visible, 0 where it is hidden. A map of which each place of that
            grid is a square of places takes part; another is left as it is.
        noise: numbers of no meaning are drawn from here and stand in the hidden places of every map (for `soundly`).
    """

    def __init__(self, visible: Float[Tensor, "b 1 rows columns"], noise: torch.Generator | None = None):
        super().__init__()
        self.visible, self.noise = visible, noise
        self.shares: dict[tuple[int, int], Tensor] = {}

    def __torch_function__(
        self, func: Function, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if not isinstance(first, Tensor) or first.ndim != 4 or len(first) != len(self.visible):
            return func(*args, **kwargs)  # no maps of these images; windows of them, it may be
        if func is torch.conv2d:
            return self._convolve(first, args, kwargs)
        if func in EMPTIED:
            made = func(self.emptied(first), *args[1:], **kwargs)
            if func is F.pad:
                made.emptied = True  # its size is that of no grid, and its hidden places are empty
            return made
        if func in (torch.mean, Tensor.mean) and (over := self._spatial(first, args, kwargs)) is not None:
            keep = bool(kwargs.get("keepdim", len(args) > 2 and args[2]))
            return self._mean(first, over, keep)
        if func is F.adaptive_avg_pool2d and args[1] in (1, (1, 1), [1, 1]) and self._fits(first):
            return self._mean(first, (2, 3), True)
        if func is F.batch_norm and self._fits(first):
            return self._batch_norm(*args, **kwargs)
        if func is F.group_norm and self._fits(first):
            return self._group_norm(*args, **kwargs)
        return func(*args, **kwargs)

    # --- places -----------------------------------------------------------------------------------------------------

    def _fits(self, maps: Tensor, over: tuple[int, int] = (2, 3)) -> bool:
        """Whether the places of these maps lie along the dimensions `over`."""
        (rows, columns), size = self.visible.shape[-2:], (maps.shape[over[0]], maps.shape[over[1]])
        return (
            len(maps) == len(self.visible)
            and size[0] % rows == 0
            and size[1] % columns == 0
            and size[0] // rows == size[1] // columns
        )

    def share(self, size: Sequence[int]) -> Float[Tensor, "b 1 height width"]:
        """1 where a place of a map of this size is visible."""
        rows, columns = int(size[0]), int(size[1])
        if (rows, columns) not in self.shares:
            factor = rows // self.visible.shape[-2]
            finer = self.visible.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            self.shares[rows, columns] = finer
        return self.shares[rows, columns]

    def _like(self, maps: Tensor, over: tuple[int, ...]) -> Tensor:
        """1 at the visible places of these maps, which lie along the dimensions `over`; in their precision, or better where
        sums are taken (the numbers are whole)."""
        shares = self.share([maps.shape[dim] for dim in over])
        return shares if over == (2, 3) else shares.permute(0, 2, 3, 1)

    def _spatial(self, maps: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
        """The dimensions of a mean, where they are those of the places."""
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(dims, (tuple, list)) or len(dims) != 2:
            return None
        over = tuple(sorted(int(dim) % maps.ndim for dim in dims))
        where = (over[0], over[1])
        return where if where in ((2, 3), (1, 2)) and self._fits(maps, where) else None

    def emptied(self, maps: Tensor) -> Tensor:
        """Maps [b, c, height, width], or with their channels last, with 0 in hidden places."""
        if getattr(maps, "emptied", False):
            return maps
        for over in ((2, 3), (1, 2)):
            if self._fits(maps, over):
                return maps * self._like(maps, over).to(maps.dtype)
        return maps

    # --- what looks further than one place --------------------------------------------------------------------------

    def _convolve(self, maps: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if tuple(weight.shape[-2:]) != (1, 1) and not getattr(maps, "emptied", False) and self._fits(maps):
            maps = maps * self._like(maps, (2, 3)).to(maps.dtype)
        made = torch.conv2d(maps, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
        if self.noise is not None and self._fits(made):
            drawn = torch.randn(made.shape, generator=self.noise)
            made = made + (1 - self._like(made, (2, 3))) * 10 * drawn
        return made

    def _mean(self, maps: Tensor, over: tuple[int, int], keepdim: bool) -> Tensor:
        """Of the visible places; like the norms computed in float32 or more."""
        shares, exact = self._like(maps, over), full(maps)
        return ((exact * shares).sum(over, keepdim=keepdim) / shares.sum(over, keepdim=keepdim)).to(maps.dtype)

    def _batch_norm(
        self,
        maps: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """torch's, with the statistics of the visible places of a batch."""
        if not training:
            return F.batch_norm(maps, running_mean, running_var, weight, bias, False, momentum, eps)
        shares, exact = self._like(maps, (2, 3)), full(maps)
        count = shares.sum()
        mean = (exact * shares).sum((0, 2, 3)) / count
        centred = exact - mean.view(1, -1, 1, 1)
        variance = (centred.square() * shares).sum((0, 2, 3)) / count
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
                unbiased = variance.detach() * (count / (count - 1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
        made = centred * scale.view(1, -1, 1, 1)
        return (made if bias is None else made + bias.view(1, -1, 1, 1)).to(maps.dtype)

    def _group_norm(
        self,
        maps: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """torch's, with the statistics of the visible places of an image."""
        grouped, shares = full(maps).unflatten(1, (num_groups, -1)), self._like(maps, (2, 3)).unsqueeze(1)
        count = shares.sum((2, 3, 4), keepdim=True) * grouped.shape[2]
        centred = grouped - (grouped * shares).sum((2, 3, 4), keepdim=True) / count
        variance = (centred.square() * shares).sum((2, 3, 4), keepdim=True) / count
        made = (centred * (variance + eps).rsqrt()).flatten(1, 2)
        made = made if weight is None else made * weight.view(1, -1, 1, 1)
        return (made if bias is None else made + bias.view(1, -1, 1, 1)).to(maps.dtype)


@torch.no_grad()
def soundly(model: nn.Module, maps: Callable[[nn.Module, Tensor], list[Tensor]], size: tuple[int, int, int]) -> bool:
    """Whether nothing of hidden places reaches visible ones inside `VisibleOnly`, in training as in use.

    Args:
        maps: the feature maps of a network, the coarsest last.
        size: channels, height and width in pixels of an image.
    """
    tried, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for value in tried.parameters():
        few = value.numel() and bool((value == value.flatten()[0]).all() | (value.abs().max() < 0.01))
        if few:  # a branch that starts as nothing, or next to it (gMLP's), takes part
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    images = torch.randn(2, *size, generator=generator)
    places = maps(tried.eval(), images)[-1].shape[-2:]
    order = torch.rand(2, places[0] * places[1], generator=generator).argsort(1)
    visible = (order < max(1, order.shape[1] // 2)).float().view(2, 1, *places)
    for training in (True, False):
        tried.train(training)
        found = []
        for noise in (None, generator):
            with torch.random.fork_rng(devices=[]), VisibleOnly(visible, noise) as only:
                torch.manual_seed(0)
                try:
                    found.append([only.emptied(made) for made in maps(tried, images)])
                except Exception:  # of tensors that look like maps and are not
                    return False
        if not all(_alike(*two) for two in zip(*found, strict=True)):
            return False
    return True


def _alike(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
