"""Restoring by steps down the gradient of an energy, and learning to.

For n = 0 .. N-1, from x_0 = corrupt(x):

    x_n     = stop_gradient(x_n)                     each step is a loss of its own
    E       = read(tokens(x_n))                      one scalar an image
    x_{n+1} = x_n - step_size * dE/dx_n              kept differentiable: a double backward
    loss   += smooth_l1(x_{n+1}, target)             the whole image
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from underpaint.masking import Mask
from underpaint.methods.masked import MaskedMethod
from underpaint.methods.method import N, Objective

State = tuple[Tensor, ...]  # what the gradient changes: images first
SMALLEST_STEP = 1e-4


class Given(NamedTuple):
    """What an energy of hidden patches is conditioned on: the encoder's tokens of the visible ones."""

    latent: Float[Tensor, "b v d"]
    mask: Mask


class Descent(MaskedMethod[N]):
    """A method whose energy restores what was corrupted.

    Args:
        steps: N, restoring steps (2 in both secondary sources; 1 costs half).
        step_size: start value of the learned step size, one for all that changes or one each (0.1 as published). None:
            measured on the first batch so that the step changes a pixel by 0.1 (root of the mean square), since the scale
            of dE/dx at initialisation spans four orders of magnitude between encoders.
        readout: how one scalar is read from the tokens: a linear of each, summed or averaged; or "square", half the
            squared length of a linear map of each, summed. A linear read-out sends the same vector back to every token,
            whatever it holds; a square one sends the token itself back, so that what restores must be in the features.
    """

    steps: int = 1
    step_size: float | Sequence[float] | None = None
    readout: Literal["sum", "mean", "class", "square"] = "sum"

    slope = "exact"  # or "difference"

    def begin(self, dim: int, final_norm: nn.Module | None, variables: int = 1) -> None:
        """The read-out of tokens of this width, which come out of `final_norm`, and a step size for each variable."""
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; at least 1 is needed")
        self.num_losses = self.steps if self.slope == "exact" else 2 * self.steps
        self.calibrated = self.step_size is not None
        given = self.step_size if isinstance(self.step_size, Sequence) else [self.step_size or 0.1] * variables
        self.log_step_sizes = nn.ParameterList(nn.Parameter(torch.tensor(math.log(size))) for size in given)
        # a bias would be a constant of the energy
        self.head = nn.Linear(dim, dim if self.readout == "square" else 1, bias=False)
        nn.init.xavier_uniform_(self.head.weight)
        if self.readout != "square" and isinstance(final_norm, nn.LayerNorm) and final_norm.bias is not None:
            final_norm.bias.requires_grad_(False)  # a constant of the energy too: no gradient ever reaches it

    # --- what a method says of itself ------------------------------------------------------------------------------

    def corrupt(self, images: Float[Tensor, "b c height width"], noise: N) -> State:
        raise NotImplementedError

    def target(self, images: Float[Tensor, "b c height width"], noise: N) -> Float[Tensor, "b c height width"]:
        """What is to be restored."""
        return images

    def restored_fully(self, images: Float[Tensor, "b c height width"], noise: N) -> State:
        """The state that is to be reached."""
        return (self.target(images, noise),)

    def given(self, images: Float[Tensor, "b c height width"], noise: N) -> Given | None:
        """What the energy is conditioned on."""
        return None

    def tokens(self, *state: Tensor, given: Given | None = None) -> Float[Tensor, "b n d"]:
        """What the energy is read from."""
        raise NotImplementedError

    def counted(self, squares: Float[Tensor, "b c height width"], noise: N) -> Float[Tensor, "b c height width"]:
        """The squared errors of what was corrupted; 0 elsewhere."""
        raise NotImplementedError

    def shown(self, state: State, images: Float[Tensor, "b c height width"], noise: N) -> Tensor:
        """A state as pictures."""
        return state[0]

    # --- the energy and one step down ------------------------------------------------------------------------------

    def energy(self, *state: Tensor, given: Given | None = None) -> Float[Tensor, "b"]:
        """One scalar an image."""
        read = self.head(self.tokens(*state, given=given))
        read = read if read.dtype == torch.float64 else read.float()
        if self.readout == "square":
            return 0.5 * read.square().sum((1, 2))
        return read.mean((1, 2)) if self.readout == "mean" else read.sum((1, 2))

    def slopes(self, state: State, given: Given | None = None) -> tuple[State, Float[Tensor, "b"]]:
        """dE/dx of all that changes, itself differentiable, and the energy."""

        def summed(*changed: Tensor) -> tuple[Tensor, Tensor]:
            energy = self.energy(*changed, given=given)
            return energy.sum(), energy

        # the fused attention kernels have no second derivative
        with sdpa_kernel(SDPBackend.MATH) if self.slope == "exact" else nullcontext():
            return torch.func.grad(summed, argnums=tuple(range(len(state))), has_aux=True)(*state)

    def recompute_blocks(self) -> None:
        raise ValueError(
            "run.recompute: the gradient inside the energy cannot be computed again; a smaller batch needs less"
        )

    def step_sizes(self) -> list[Tensor]:
        return [value.clamp(min=math.log(SMALLEST_STEP)).exp() for value in self.log_step_sizes]

    def moved(self, state: State, slopes: State) -> State:
        """One restoring step down the energy; no clamp of pixels, which would kill gradients."""
        three = zip(state, self.step_sizes(), slopes, strict=True)
        return tuple(variable - size * slope for variable, size, slope in three)

    def step(self, state: State, noise: N) -> State:
        return self.moved(state, self.slopes(state, self.given(state[0], noise))[0])

    @torch.no_grad()
    def restored(self, images: Float[Tensor, "b c height width"], noise: N) -> list[State]:
        """The corrupted images, and what each step makes of them."""
        states = [self.corrupt(images, noise)]
        for _ in range(self.steps):
            states.append(detached(self.step(states[-1], noise)))
        return states

    # --- the loss, step by step ------------------------------------------------------------------------------------

    def losses(self, state: State, target: Float[Tensor, "b c height width"], noise: N) -> Float[Tensor, "b"]:
        """Smooth L1 (beta 1) of an image's pixels."""
        return functional.smooth_l1_loss(state[0], target, reduction="none").mean((1, 2, 3))

    def forward(
        self,
        images: Float[Tensor, "b c height width"],
        noise: N | None = None,
        part: int | None = None,
        carry: Any = None,
    ) -> Objective:
        if noise is None:
            noise = self.sample_for(images)
        one = self._exact if self.slope == "exact" else self._difference
        if part is not None:
            return one(images, noise, part, carry)
        objective = one(images, noise, 0, None)
        loss = objective.loss
        for number in range(1, self.num_losses):
            objective = one(images, noise, number, objective.carry)
            loss = loss + objective.loss
        return Objective(loss, objective.terms, weights=objective.weights)

    def _exact(self, images: Tensor, noise: N, part: int, carry: Any) -> Objective:
        """Step number `part`, from what the step before it reached."""
        state, target = carry or (self.corrupt(images, noise), self.target(images, noise))
        slopes, energy = self.slopes(state, self.given(state[0], noise))
        moved = self.moved(state, slopes)
        terms, weights = {}, {}
        if part + 1 == self.steps:
            corrupted = state if part == 0 else self.corrupt(images, noise)
            terms, weights = self.terms(corrupted, target, noise, moved, slopes, energy)
        loss = self.losses(moved, target, noise).mean()
        return Objective(loss, terms, (detached(moved), target), weights)

    def _difference(self, images: Tensor, noise: N, part: int, carry: Any) -> Objective:
        """Two parts a step, each with the memory of one ordinary forward and backward.

        With w = step_size * d loss / d x_{n+1}, the gradient for the weights is that of -<w, dE/dx_n>: of
        -(E(x_n + h w) - E(x_n - h w)) / (2 h), a part for each of the two energies, h a thousandth of |x| / |w|.
        """
        if part % 2 == 1:
            minus, weight, reached, target, (terms, weights) = carry
            surrogate = (weight * self.energy(*minus, given=self.given(images, noise))).sum()
            return Objective(surrogate - surrogate.detach(), terms, (reached, target), weights)
        state, target = carry or (self.corrupt(images, noise), self.target(images, noise))
        given = self.given(state[0], noise)
        with torch.no_grad():  # the inner gradient alone
            slopes, energy = self.slopes(state, given)
        moved = self.moved(state, slopes)
        loss = self.losses(moved, target, noise).mean()  # its gradient reaches the step sizes
        reached = detached(moved)

        def loss_at(*variables: Tensor) -> Tensor:
            return self.losses(variables, target, noise).mean()

        wanted = torch.func.grad(loss_at, tuple(range(len(reached))))(*reached)
        directions = [size.detach() * slope for size, slope in zip(self.step_sizes(), wanted, strict=True)]
        h = 1e-3 * _length(state) / _length(directions).clamp_min(1e-12)
        plus, minus = (
            tuple(_along(x, d, sign * h) for x, d in zip(state, directions, strict=True)) for sign in (1, -1)
        )
        weight = 0.5 / h
        surrogate = -(weight * self.energy(*plus, given=given)).sum()
        told = {}, {}
        if part + 2 == self.num_losses:
            corrupted = state if part == 0 else self.corrupt(images, noise)
            told = self.terms(corrupted, target, noise, moved, slopes, energy)
        return Objective(loss + surrogate - surrogate.detach(), {}, (minus, weight, reached, target, told))

    # --- what is told of it ----------------------------------------------------------------------------------------

    def by_task(self, noise: N) -> dict[str, Float[Tensor, "b"] | float]:
        """By the name of its error: 1 for the images that have a task."""
        return {"error": 1.0}

    @torch.no_grad()
    def terms(
        self, corrupted: State, target: Tensor, noise: N, restored: State, slopes: State, energy: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of a step, and the weights of those that some images have and others not.

        An error is the squared one on what was corrupted, over that of doing nothing: a loss over a whole image falls
        while nothing is restored, since what was not corrupted is right already.
        """
        left, before = (self.left(state, target, noise) for state in (restored, corrupted))
        weights: dict[str, Tensor] = {}
        terms = {
            "baseline": self.steps * self.losses(corrupted, target, noise).mean(),
            "step_size": self.step_sizes()[0],
            "gradient_rms": slopes[0].square().mean().sqrt(),
            "energy": energy.mean(),
        }
        for name, those in self.by_task(noise).items():
            weights[name] = (before * those).sum()
            terms[name] = (left * those).sum() / weights[name].clamp_min(torch.finfo(left.dtype).tiny)
        return {name: value.detach() for name, value in terms.items()}, weights

    def left(self, state: State, target: Tensor, noise: N) -> Float[Tensor, "b"]:
        """The squared error on what was corrupted."""
        return self.counted((state[0] - target).square(), noise).mean((1, 2, 3))

    def errors(self, images: Float[Tensor, "b c height width"], noise: N) -> dict[str, tuple[Tensor, Tensor]]:
        """After restoring, and after doing nothing."""
        states, target = self.restored(images, noise), self.target(images, noise)
        return {"mask": (self.left(states[-1], target, noise), self.left(states[0], target, noise))}

    def calibrate(
        self,
        images: Float[Tensor, "b c height width"],
        noise: N,
        mean: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> dict[str, float | list[float]]:
        if self.calibrated:
            return {}
        with torch.no_grad():
            state = self.corrupt(images, noise)
            slopes, _ = self.slopes(state, self.given(state[0], noise))
            for log_size, slope in zip(self.log_step_sizes, slopes, strict=True):
                rms = float(mean(slope.square().mean()).sqrt())
                if rms > 0:  # a head of zeros has no gradient yet
                    log_size.fill_(math.log(max(SMALLEST_STEP, 0.1 / rms)))
        self.calibrated = True
        found = [float(log_size.detach().exp()) for log_size in self.log_step_sizes]
        return {"step_size": found[0] if len(found) == 1 else found}

    def fixed(self, images: Tensor, task: str | None) -> N:
        """The noise of a picture."""
        return self.fixed_noise(images, 1)[0]

    @torch.no_grad()
    def restore(
        self, images: Float[Tensor, "b c height width"], noise: N | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """Original, corrupted, each step, and how far a step moves each pixel of the original itself, bright where
        it is most. Of a mixture, the images have its tasks in turn."""
        noise = self.fixed(images, task) if noise is None else noise
        states = self.restored(images, noise)
        frames = {"original": images, "corrupted": self.shown(states[0], images, noise)}
        for number, state in enumerate(states[1:], start=1):
            frames["restored" if number == self.steps else f"step {number}"] = self.shown(state, images, noise)
        still = self.restored_fully(images, noise)
        change = (self.step(still, noise)[0] - still[0]).square().mean(1, keepdim=True).sqrt()
        bright = change / change.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
        frames["unusual"] = (4 * bright - 2).expand_as(images)  # about black to white of standardised images
        return frames


def detached(state: State) -> State:
    return tuple(variable.detach() for variable in state)


def _length(variables: Sequence[Tensor]) -> Float[Tensor, "b"]:
    """The Euclidean length of all of an image's variables together."""
    return torch.stack([variable.flatten(1).square().sum(1) for variable in variables]).sum(0).sqrt()


def _along(x: Tensor, direction: Tensor, h: Tensor) -> Tensor:
    return x + h.view(-1, *(1,) * (x.dim() - 1)) * direction
