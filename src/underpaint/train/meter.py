"""Means of what steps report, kept on the device until a line of metrics is written."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from lightning_fabric import Fabric
from torch import Tensor

LAST = 50  # steps over which the last loss is averaged


class Meter:
    """Means of the numbers of the steps since the last line of metrics; part of a checkpoint.

    Sums and weights are kept apart, so that a number that a step has nothing to say about does not count as 0 there.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # [numbers, 2]
        self.recent: deque[Tensor] = deque(maxlen=LAST)  # losses

    def add(self, numbers: Mapping[str, Tensor], bad: Tensor) -> None:
        """The numbers of a step ([2] each: a weighted sum, and its weight), which do not count where it was not finite."""
        self.names = list(numbers)
        values = torch.stack(list(numbers.values()))
        kept = torch.where(bad > 0, torch.zeros_like(values), values)
        self.recent.append(torch.where(bad > 0, math.nan, numbers["loss"][0]))
        self.sums = kept if self.sums is None else self.sums + kept

    def means(self, fabric: Fabric) -> dict[str, float]:
        """Of all processes together, by name; nan where nothing was said."""
        if self.sums is None:
            return {}
        sums = self.sums
        if fabric.world_size > 1:
            sums = fabric.all_reduce(sums, reduce_op="sum")
            assert isinstance(sums, Tensor)
        return {
            name: total / weight if weight else math.nan
            for name, (total, weight) in zip(self.names, sums.tolist(), strict=True)
        }

    def last(self) -> float | None:
        """Mean loss of the last steps; None before the first."""
        known = [loss for loss in torch.stack(list(self.recent)).tolist() if math.isfinite(loss)] if self.recent else []
        return sum(known) / len(known) if known else None

    def reset(self) -> None:
        self.sums = None

    def state(self) -> dict[str, Tensor]:
        found = {} if self.sums is None else {"window_sums": self.sums}
        losses = torch.stack(list(self.recent)) if self.recent else torch.empty(0)
        return found | {"window_losses": losses[losses.isfinite()]}

    def load(self, tensors: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self.sums = tensors["window_sums"].to(device) if "window_sums" in tensors else None
        # a checkpoint of an earlier version has none
        self.recent = deque(tensors.get("window_losses", torch.empty(0)).to(device).unbind(), maxlen=LAST)
