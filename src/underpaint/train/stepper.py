"""One optimiser step, as the loop, the first measurement and the benchmarks make it."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from underpaint.backbones.norms import batch_norms
from underpaint.computing import autocast, products
from underpaint.draws import Draws
from underpaint.seeds import seed_everything, step_seed
from underpaint.train.optim import pull_back, skip_where
from underpaint.train.ranks import mean_over_ranks
from underpaint.trainable import Trainable

Numbers = dict[str, Tensor]  # by name [2]: a weighted sum, and its weight


@dataclass
class Stepper:
    """A task, its optimiser, and how a batch becomes a step.

    Attributes:
        optimiser: the rates of its groups (times `lr_scale`, where timm set one) are the peaks.
        transform: a batch to what the task takes, with one row an image where there are several processes or parts.
        batch_size: images a step, over all processes.
        accumulation: parts that a batch is computed in, to save memory.
        precision: of the network's products (`computing`): a step casts around the task's forward alone, so that images, draws,
            losses and the way back of what is float32 stay float32.
        alone: a step is not shared with the other processes: to try what fits, in which one may fail.
        clip: largest norm of the gradient; none where None.
        seed: of all that is random in a step; the loop moves it on after a roll-back.
        stream: of `step_seed`, for what modules draw by themselves.
        model: the task as Fabric (and the compiler) wrap it.
        scaler: scales the loss under float16.
    """

    fabric: Fabric
    task: Trainable
    optimiser: torch.optim.Optimizer
    transform: Callable[[Any], Any]
    batch_size: int
    accumulation: int = 1
    clip: float | None = None
    seed: int = 0
    stream: int = 1
    precision: str = "32"
    compiled: bool = False
    alone: bool = False
    model: Any = field(init=False)
    wrapped: Any = field(init=False)
    peaks: list[float] = field(init=False)
    scaler: torch.amp.GradScaler | None = field(init=False)

    def __post_init__(self) -> None:
        self.renew_scaler(None)
        model: Any = torch.compile(self.task) if self.compiled else self.task
        self.model, self.wrapped = self.fabric.setup(model, self.optimiser)
        self.peaks = [group["lr"] * group.get("lr_scale", 1.0) for group in self.optimiser.param_groups]
        for module in self.model.modules():
            if isinstance(module, DistributedDataParallel):  # else the first process's buffers go to all in each step
                module.broadcast_buffers = False
        norms: list[Any] = batch_norms(self.task)
        self.statistics: list[Tensor] = [each for norm in norms for each in (norm.running_mean, norm.running_var)]

    def renew_scaler(self, state: dict[str, Any] | None) -> None:
        """A scaler as it was; what a step that was cut short had told it is forgotten."""
        self.scaler = torch.amp.GradScaler(self.fabric.device.type) if self.precision == "16" else None
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

    def compile(self) -> "Stepper":
        """The same, compiled."""
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak / group.get("lr_scale", 1.0)
        return replace(self, compiled=True)

    @property
    def local_batch(self) -> int:
        return self.batch_size // self.fabric.world_size

    @property
    def finer(self) -> int | None:
        """The next larger `accumulation`, at least twice this one; None where a part is one image, or cannot be taken apart."""
        size = self.local_batch if self.task.divisible else 0
        return next((parts for parts in range(2 * self.accumulation, size + 1) if size % parts == 0), None)

    def noise(self, inputs: Any, step: int) -> Any:
        """What is random in a step of the images of this process: a function of their numbers in the global batch."""
        first = self.fabric.global_rank * self.local_batch
        draws = Draws.of(step_seed(self.seed, step, 0), self.local_batch, first)
        drawn = self.task.noise_for(inputs, draws)
        return None if drawn is None else drawn.to(self.fabric.device)

    def step(self, batch: Any, step: int, factor: float) -> tuple[Numbers, Tensor]:
        """One optimiser step at `factor` of the peak rates. Returns its numbers and a flag, all still on the device: nothing
        here waits for it.

        The flag is 1 where the gradient was not finite; the step then changed nothing.
        """
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        with torch.no_grad():
            inputs = self.transform(batch)
        noise = self.noise(inputs, step)
        seed_everything(step_seed(self.seed, step, self.stream + self.fabric.global_rank))
        # matrix products by TensorFloat-32 where the task allows it; a CPU has none
        with products(self.task.exact) if self.fabric.device.type == "cuda" else nullcontext():
            numbers = self._backward(inputs, noise)
        norm = self._clip()
        bad = self._take(norm, numbers["loss"][0])
        self.wrapped.zero_grad(set_to_none=True)
        finite = torch.isfinite(norm)
        numbers["gradient_norm"] = torch.stack([torch.where(finite, norm, 0.0), finite.float()]).double()
        return numbers, bad

    def _take(self, norm: Tensor, loss: Tensor) -> Tensor:
        """Move the weights, where the gradient is finite; the flag of a step."""
        finite = torch.isfinite(norm)
        if self.scaler is None:
            bad = (~finite).float()
            skip_where(bad, self.optimiser)
            self.wrapped.step()
        else:
            # float16's scaler meets overflows by itself and lowers its scale, until no scale helps
            least = self.scaler.scale(torch.ones_like(norm)) < 1
            bad = (~torch.isfinite(loss) | (~finite & least)).float()
            if self.fabric.world_size > 1 and not self.alone:
                # each process has a loss of its own, and all must roll back or none
                bad = torch.as_tensor(self.fabric.all_reduce(bad, reduce_op="sum")).clamp(max=1.0)
            self.scaler.step(self.optimiser)
            self.scaler.update()
        pull_back(self.optimiser, finite.float())
        return bad

    def _backward(self, inputs: Any, noise: Any) -> Numbers:
        """Backpropagate every part of the loss of every part of the batch."""
        sums: Numbers = {}
        weights: dict[str, Tensor | float] = {}  # of the numbers that have one; all others count 1 a step
        size, count = self.local_batch // self.accumulation, self.task.num_losses
        for k in range(self.accumulation):
            rows, carry = slice(k * size, (k + 1) * size), None
            some = (
                (inputs, noise)
                if self.accumulation == 1
                else (inputs[rows], None if noise is None else noise.rows(rows))
            )
            for part in range(count):
                last = k + 1 == self.accumulation and part + 1 == count
                # DDP reduces what one backward reaches, and of a loss in parts the last one does not reach all weights
                apart = self.alone or count > 1 or not last
                with self.fabric.no_backward_sync(self.model, enabled=apart):
                    with autocast(self.fabric.device, self.precision):
                        objective = self.model(*some) if count == 1 else self.model(*some, part, carry)
                    loss = objective.loss / self.accumulation
                    self.fabric.backward(loss if self.scaler is None else self.scaler.scale(loss))
                carry = objective.carry
                for name, value in {"loss": objective.loss.detach(), **objective.terms}.items():
                    weight: Tensor | float = 1 / self.accumulation
                    if name in objective.weights:
                        weight = objective.weights[name].double()
                        weights[name] = weights.get(name, 0.0) + weight
                    sums[name] = sums.get(name, 0.0) + value.double() * weight
        if self.fabric.world_size > 1 and not self.alone:
            self._join(gradients=count > 1)
        one = torch.ones_like(sums["loss"])
        return {name: torch.stack([value, torch.as_tensor(weights.get(name, one))]) for name, value in sums.items()}

    def _join(self, gradients: bool) -> None:
        """The means over the processes: of the running statistics of batch norms, each of which saw its own images; and of
        the gradients, where DDP has not taken them."""
        tensors = list(self.statistics)
        if gradients:
            for parameter in self.task.parameters():
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    tensors.append(parameter.grad)
        mean_over_ranks(tensors)

    def _clip(self) -> Tensor:
        """Clip the gradient, all together or by groups; returns its norm before."""
        apart = self.task.clip_groups()
        most = float("inf") if apart or self.clip is None else self.clip  # then this only measures
        if self.scaler is not None:
            self.scaler.unscale_(self.optimiser)
        norm = self.fabric.clip_gradients(self.model, self.wrapped, max_norm=most, error_if_nonfinite=False)
        assert norm is not None
        for group in apart:
            nn.utils.clip_grad_norm_(group, self.clip or float("inf"))
        return norm
