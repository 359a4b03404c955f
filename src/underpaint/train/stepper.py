"""One optimiser step, as the loop, the measurement at the start and the benchmarks make it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from timm.optim import param_groups_weight_decay
from torch import Tensor

from underpaint.data import Batch
from underpaint.methods import Method
from underpaint.patches import Standardize
from underpaint.recipes.recipe import Recipe


def step_seed(seed: int, step: int, stream: int) -> int:
    """A seed for one purpose in one step."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return int(state) >> 1


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to 0; `progress` is the share of the run that is done."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))))


def rate_at(step: int, recipe: Recipe, progress: float | None = None) -> float:
    """The learning rate of a step: the schedule's, reached by a second warm-up where the run was made longer.

    `progress` is the share of the run that is done by the clock; the share of its steps where None.
    """
    optimiser, steps = recipe.optimiser, recipe.measured["steps"]
    peak = optimiser.lr * optimiser.batch_size / 256
    rate = learning_rate(step / steps if progress is None else progress, peak, optimiser.warmup)
    again = recipe.measured.get("warm_again")
    if again is None or step < again["step"]:
        return rate
    done = (step - again["step"]) / max(1e-12, optimiser.warmup * (steps - again["step"]))
    return rate if done >= 1 else again["rate"] + done * (rate - again["rate"])


def warm_again(step: int, steps_before: int, recipe: Recipe) -> str | None:
    """Note in the recipe that its run, which was to end after `steps_before`, has another length from this step on.

    Where the new schedule has a higher rate here than the old one, it warms up again, from the rate that it had.

    Returns:
        What to say of it; None where the rate does not rise.
    """
    old = replace(recipe, measured={**recipe.measured, "steps": steps_before})
    had = rate_at(step, old)
    recipe.measured.pop("warm_again", None)
    rate = rate_at(step, recipe)
    if rate <= had:
        return None
    steps = recipe.measured["steps"]
    recipe.measured["warm_again"] = {"step": step, "rate": had}
    return (
        f"note: {steps} steps in place of {steps_before}: the learning rate was {had:.3g} at step {step}, where the new "
        f"schedule has {rate:.3g}; it warms up again, over {math.ceil(recipe.optimiser.warmup * (steps - step))} steps"
    )


def make_optimiser(method: Method, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with timm's decay groups: no decay on biases, norms, positions, class and mask tokens."""
    listed = {
        f"{place}.{name}"
        for place, module in method.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    groups = param_groups_weight_decay(method, recipe.optimiser.weight_decay, no_weight_decay_list=listed)
    for name, factor in method.rate_factors().items():
        if (own := dict(method.named_parameters()).get(name)) is not None:
            for group in groups:
                group["params"] = [parameter for parameter in group["params"] if parameter is not own]
            groups.append({"params": [own], "weight_decay": 0.0, "factor": factor})
    device = next(method.parameters()).device
    return torch.optim.AdamW(groups, lr=1.0, betas=recipe.optimiser.betas, fused=device.type in ("cpu", "cuda"))


@dataclass
class Session:
    """What one step needs."""

    fabric: Fabric
    recipe: Recipe
    method: Method
    model: Any  # the method as Fabric (and the compiler) wrap it
    optimiser: torch.optim.AdamW
    stepper: Any  # the optimiser as Fabric wraps it
    standardize: Standardize
    compiled: bool
    seed: int  # of the run, moved on by every roll-back
    clock: Callable[[], float] = time.perf_counter  # seconds; whatever is timed in a run is timed by it

    @property
    def local_batch(self) -> int:
        return self.recipe.optimiser.batch_size // self.fabric.world_size

    def noise(self, batch: Batch, step: int) -> Any:
        """What is random in a step: drawn for the global batch, so that it does not depend on the processes."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, 0))
        drawn = self.method.sample(
            self.recipe.optimiser.batch_size, batch.images.shape[2], batch.images.shape[3], generator
        )
        first = self.fabric.global_rank * self.local_batch
        return drawn.rows(slice(first, first + self.local_batch)).to(self.fabric.device)


def session(
    fabric: Fabric,
    recipe: Recipe,
    method: Method,
    standardize: Standardize,
    compiled: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> Session:
    standardize = standardize.to(fabric.device)
    method = method.to(fabric.device)
    optimiser = make_optimiser(method, recipe)
    wrapped = torch.compile(method) if compiled else method
    model, stepper = fabric.setup(wrapped, optimiser)  # pyright: ignore[reportArgumentType]
    return Session(fabric, recipe, method, model, optimiser, stepper, standardize, compiled, recipe.run.seed, clock)


def scaler_of(fabric: Fabric) -> torch.amp.GradScaler | None:
    """What scales the loss under float16."""
    return getattr(fabric.strategy.precision, "scaler", None)


def update(session: Session, batch: Batch, step: int, rate: float) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step. Returns its numbers and a flag, all still on the device: nothing here waits for it.

    A number is [2]: a weighted sum, and its weight. The flag is 1 where the gradient was not finite; the update then changed nothing (fused AdamW skips by flag).
    """
    fabric, optimiser = session.fabric, session.recipe.optimiser
    noise = session.noise(batch, step)
    torch.manual_seed(step_seed(session.seed, step, 1 + fabric.global_rank))  # dropout and drop path, where used
    with torch.no_grad():
        images = session.standardize(batch.images)
    for group in session.optimiser.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    part = session.local_batch // optimiser.accumulation
    numbers: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}  # of the numbers that have one; all others count 1 a step
    for k in range(optimiser.accumulation):
        rows = slice(k * part, (k + 1) * part)
        count, carry = session.method.num_losses, None
        for number in range(count):
            last = k + 1 == optimiser.accumulation and number + 1 == count
            with fabric.no_backward_sync(session.model, enabled=not last):
                given = (
                    (images[rows], noise.rows(rows)) if count == 1 else (images[rows], noise.rows(rows), number, carry)
                )
                objective = session.model(*given)
                fabric.backward(objective.loss / optimiser.accumulation)
            carry = objective.carry
            for name, value in {"loss": objective.loss.detach(), **objective.terms}.items():
                weight: Any = 1 / optimiser.accumulation
                if name in objective.weights:
                    weight = objective.weights[name].double()
                    weights[name] = weights.get(name, 0.0) + weight
                numbers[name] = numbers.get(name, 0.0) + value.double() * weight
    apart = session.method.clipped_apart()
    most = float("inf") if apart else optimiser.clip  # then this only unscales and measures
    scaler = scaler_of(fabric)
    if scaler is None:
        norm = fabric.clip_gradients(session.model, session.stepper, max_norm=most, error_if_nonfinite=False)
        assert norm is not None
    else:  # Fabric refuses to clip for a fused optimiser, which may well step on gradients that are unscaled already
        scaler.unscale_(session.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(session.method.parameters(), most)
    for group in apart:
        torch.nn.utils.clip_grad_norm_(group, optimiser.clip)
    # float16's scaler meets overflows by itself and lowers its scale; only a loss that is not finite counts there
    bad = (~torch.isfinite(norm if scaler is None else numbers["loss"])).float()
    if scaler is None:
        session.optimiser.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
    elif fabric.world_size > 1:  # each process has a loss of its own, and all must roll back or none
        bad = torch.as_tensor(fabric.all_reduce(bad, reduce_op="sum")).clamp(max=1.0)
    session.stepper.step()
    session.stepper.zero_grad(set_to_none=True)
    numbers["gradient_norm"] = norm.double()
    one = torch.ones_like(numbers["loss"])
    return {name: torch.stack([number, weights.get(name, one)]) for name, number in numbers.items()}, bad


class Window:
    """Means of the numbers of the steps since the last line of metrics; part of a checkpoint.

    Sums and weights are kept apart, so that a number that a step has nothing to say about does not count as 0 there.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # [numbers, 2]

    def add(self, numbers: dict[str, Tensor], bad: Tensor) -> None:
        self.names = list(numbers)
        values = torch.stack(list(numbers.values()))
        kept = torch.where(bad > 0, torch.zeros_like(values), values)
        self.sums = kept if self.sums is None else self.sums + kept

    def means(self, fabric: Fabric) -> dict[str, float]:
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

    def reset(self) -> None:
        self.sums = None

    def state(self) -> dict[str, Tensor]:
        return {} if self.sums is None else {"window_sums": self.sums}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device) -> None:
        self.names = list(numbers["window"])
        self.sums = tensors["window_sums"].to(device) if "window_sums" in tensors else None
