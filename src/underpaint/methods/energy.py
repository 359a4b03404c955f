"""Energy-inspired pretraining: Wang et al., ICLR 2023, arXiv 2302.01384.

One network, no decoder. Forward, the network is an energy: one scalar an image, low for images like the data.
Backward, the gradient of that energy with respect to the *input* says how to change a corrupted image to make it more
likely. Training asks that a few such steps restore the image. For n = 0 .. N-1, from x_0 = corrupt(x):

    x_n     = stop_gradient(x_n)                     each step is a loss of its own
    E       = head(encoder(x_n))                     one scalar an image
    x_{n+1} = x_n - step_size * dE/dx_n              kept differentiable: a double backward
    loss   += smooth_l1(x_{n+1}, x)                  the whole image

Any corruption will do: hidden cells, patches out of order, lost resolution, noise, lost colour, or one of these an
image. For patches out of order in a ViT, what is restored is the order: each patch comes with a wrong position
embedding z, and z is the variable that the gradient changes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from underpaint.backbones import Backbone, TokenBackbone
from underpaint.blocks import MaskedDecoder
from underpaint.corruptions import add_noise, downsample, gray, mask_cells, shuffle_patches
from underpaint.masking import Mask, hidden_count, hidden_map, random_mask
from underpaint.methods.method import Method, Objective
from underpaint.patches import patchify, put, standardize, take, unpatchify, unstandardize, weighted_mean

TASKS = ("mask", "shuffle", "downsample", "noise", "gray")
SMALLEST_STEP = 1e-4


class Corruption(NamedTuple):
    """What is random in a step, a row an image; None where no task of the method needs it."""

    task: Int[Tensor, "b"]  # place in TASKS
    mask: Mask | None  # of cells
    order: Int[Tensor, "b n"] | None  # place k gets patch order[k]
    factor: Int[Tensor, "b"] | None  # of lost resolution, place in the method's `factors`
    kept: Float[Tensor, "b"] | None  # share of the variance that noise leaves
    noise: Float[Tensor, "b c height width"] | None

    def to(self, device: torch.device) -> "Corruption":
        moved = [None if field is None else field.to(device) for field in self]
        return Corruption(*moved)  # pyright: ignore[reportArgumentType]

    def rows(self, rows: slice) -> "Corruption":
        cut = [
            field.rows(rows) if isinstance(field, Mask) else None if field is None else field[rows] for field in self
        ]
        return Corruption(*cut)  # pyright: ignore[reportArgumentType]

    def repeat(self, batch: int) -> "Corruption":
        one = [
            field.repeat(batch) if isinstance(field, Mask) else None if field is None else _repeated(field, batch)
            for field in self
        ]
        return Corruption(*one)  # pyright: ignore[reportArgumentType]


def _repeated(values: Tensor, batch: int) -> Tensor:
    return values.expand(batch, *values.shape[1:])


class State(NamedTuple):
    """What the gradient may change: images, and in a ViT that sorts patches the positions of its patches."""

    images: Float[Tensor, "b c height width"]
    positions: Float[Tensor, "b n d"] | None

    @property
    def variables(self) -> tuple[Tensor, ...]:
        return (self.images,) if self.positions is None else (self.images, self.positions)

    @classmethod
    def of(cls, variables: Iterable[Tensor]) -> "State":
        images, *positions = variables
        return cls(images, positions[0] if positions else None)

    def detach(self) -> "State":
        return State.of(variable.detach() for variable in self.variables)


class Given(NamedTuple):
    """What the energy of hidden patches is conditioned on: the encoder's tokens of the visible ones."""

    latent: Float[Tensor, "b v d"]
    mask: Mask


class Energy(Method):
    """Restore corrupted images by steps down the gradient of an energy.

    >>> import torch, underpaint
    >>> energy = underpaint.Energy(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = energy(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline', 'energy', 'error', 'gradient_rms', 'step_size']

    Args:
        encoder: any `Backbone` without batch norm (its statistics would couple the images of a batch).
        corruption: one task, or a mixture with one task an image, drawn uniformly.
        mask_ratio: share of the cells that masking hides.
        cell: pixels of a side of a hidden cell, and of a shuffled patch where the encoder is no ViT; the patch of a
            ViT, else 8, where None.
        factors: of lost resolution, one an image.
        steps: N, restoring steps (2 in both secondary sources; 1 costs half).
        step_size: start value of the learned step size (0.1 as published). None: measured on the first batch so that
            the step changes a pixel by 0.1 (root of the mean square), since the scale of dE/dx at initialisation
            spans four orders of magnitude between encoders.
        position_step: the same for positions.
        step_rate: learning rate of the step sizes' logarithms over that of the weights.
        readout: how one scalar is read from the tokens: a linear of each patch token, summed or averaged; of the
            class token; or "square", half the squared length of a linear map of each patch token, summed. A linear
            read-out sends the same vector back to every token, whatever it holds; a square one sends the token itself
            back, so that what restores must be in the features.
        loss_on: the whole image, or hidden cells only (masking).
        zero_head: the head starts at 0, so that restoration starts as the identity.
        context: "image", the whole corrupted image goes through the encoder; or "visible", the energy is that of the
            hidden patches given the visible ones (masking in a ViT, cells of one patch).
        upper_dim: width of the blocks above the encoder (context visible); half the encoder's where None.
        upper_depth: their number; a sixth of the encoder's depth where None, half of a masked autoencoder's decoder:
            going back through them does the other half.
        norm_pix_loss: hidden patches to mean 0 and variance 1 each, as in MAE (context visible).
        gradient: exact (double backward), or by a central finite difference along d loss / d x_{n+1}, which needs
            first derivatives only and their memory, and is approximate.

    Raises:
        ValueError: the encoder has batch norm; a setting that does not fit encoder or images.
    """

    places: Tensor | None

    def __init__(
        self,
        encoder: Backbone,
        corruption: Literal["mask", "shuffle", "downsample", "noise", "gray", "mixture"] = "mask",
        mask_ratio: float = 0.5,
        cell: int | None = None,
        factors: Sequence[int] = (2, 4),
        steps: int = 1,
        step_size: float | None = None,
        position_step: float | None = None,
        step_rate: float = 1.0,
        readout: Literal["sum", "mean", "class", "square"] = "sum",
        loss_on: Literal["image", "hidden"] = "image",
        zero_head: bool = False,
        context: Literal["image", "visible"] = "image",
        upper_dim: int | None = None,
        upper_depth: int | None = None,
        norm_pix_loss: bool = False,
        gradient: Literal["exact", "difference"] = "exact",
    ):
        super().__init__()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.model.modules()):
            raise ValueError(
                "the energy method needs an encoder without batch norm, which couples the images of a batch: "
                "a ViT, or --set encoder.norm_layer=groupnorm"
            )
        if corruption == "gray" and encoder.channels == 1:
            raise ValueError("corruption gray needs images of more than one channel")
        if steps < 1:
            raise ValueError(f"steps is {steps}; at least 1 is needed")
        if zero_head and readout == "square":
            raise ValueError("a square readout whose head starts at 0 never leaves it: zero_head needs a linear one")
        self.encoder = encoder
        tasks = TASKS if corruption == "mixture" else (corruption,)
        self.tasks = tuple(task for task in tasks if encoder.channels > 1 or task != "gray")
        self.mask_ratio, self.factors, self.loss_on = mask_ratio, tuple(factors), loss_on
        self.readout, self.steps, self.gradient_by = readout, steps, gradient
        self.num_losses = steps if gradient == "exact" else 2 * steps
        patch: tuple[int, int] = getattr(encoder, "patch_size", (8, 8))
        self.cell: tuple[int, int] = (cell, cell) if cell else patch
        self.piece = patch if isinstance(encoder, TokenBackbone) else self.cell  # what is put in order
        self.calibrated = step_size is not None
        self.log_step_size = nn.Parameter(torch.tensor(math.log(step_size or 0.1)))
        self.step_rate = step_rate
        self.upper, self.norm_pix_loss = None, norm_pix_loss
        dim, final_norm = encoder.dim, getattr(encoder.model, "norm", None)
        if context == "visible":
            if not isinstance(encoder, TokenBackbone) or self.tasks != ("mask",) or self.cell != patch:
                raise ValueError("context visible needs a plain ViT, corruption mask, and cells of one patch")
            grid = encoder.grid(*encoder.image_size)
            dim = upper_dim or max(64, round(encoder.dim / 2 / 32) * 32)
            self.upper = MaskedDecoder(encoder.dim, grid, dim, upper_depth or max(1, encoder.depth // 6), None)
            self.embed_hidden = nn.Linear(patch[0] * patch[1] * encoder.channels, dim, bias=False)
            nn.init.xavier_uniform_(self.embed_hidden.weight)
            final_norm = self.upper.norm
        elif norm_pix_loss:
            raise ValueError("norm_pix_loss needs context visible: elsewhere the target is the image itself")
        # a bias would be a constant of the energy
        self.head = nn.Linear(dim, dim if readout == "square" else 1, bias=False)
        nn.init.zeros_(self.head.weight) if zero_head else nn.init.xavier_uniform_(self.head.weight)
        if readout != "square" and isinstance(final_norm, nn.LayerNorm) and final_norm.bias is not None:
            final_norm.bias.requires_grad_(False)  # a constant of the energy too: no gradient ever reaches it
        places = None  # the true position of each patch, where those are what is restored
        if "shuffle" in self.tasks and isinstance(encoder, TokenBackbone):
            places = encoder.positions().detach().clone()
            # the target and the input of the other tasks are the same fixed positions
            encoder.model.pos_embed.requires_grad_(False)
            self.log_position_step = nn.Parameter(torch.tensor(math.log(position_step or 0.1)))
            self.calibrated = self.calibrated and position_step is not None
        self.register_buffer("places", places, persistent=False)
        has_class = isinstance(encoder, TokenBackbone) and getattr(encoder.model, "cls_token", None) is not None
        if readout == "class" and (self.upper is not None or not has_class):
            raise ValueError("readout class needs an encoder with a class token, and context image")

    def lr_scales(self) -> dict[str, float]:
        return {name: self.step_rate for name in ("log_step_size", "log_position_step") if hasattr(self, name)}

    # --- corrupting ------------------------------------------------------------------------------------------------

    def sample(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Corruption:
        needed = [("cell", self.cell[0])] if {"mask", "shuffle"} & set(self.tasks) else []
        needed += [("factor", factor) for factor in self.factors] if "downsample" in self.tasks else []
        for name, side in needed:
            if height % side or width % side:
                raise ValueError(f"{name} {side} px does not divide an image of {height}x{width}")
        cells = (height // self.cell[0]) * (width // self.cell[1])
        pieces = (height // self.piece[0]) * (width // self.piece[1])
        drawn = torch.randint(len(self.tasks), (batch,), generator=generator)
        task = torch.tensor([TASKS.index(name) for name in self.tasks])[drawn]
        mask = order = factor = kept = noise = None
        if "mask" in self.tasks:
            grid = (height // self.cell[0], width // self.cell[1])
            mask = random_mask(batch, grid, hidden_count(cells, self.mask_ratio), generator)
        if "shuffle" in self.tasks:
            order = torch.rand(batch, pieces, generator=generator).argsort(1)
        if "downsample" in self.tasks:
            factor = torch.randint(len(self.factors), (batch,), generator=generator)
        if "noise" in self.tasks:
            kept = torch.rand(batch, generator=generator)
            noise = torch.randn(batch, self.encoder.channels, height, width, generator=generator)
        return Corruption(task, mask, order, factor, kept, noise)

    def corrupt(self, images: Float[Tensor, "b c height width"], noise: Corruption) -> State:
        """Each image by its own task; where there are several, all are made and one is taken."""
        corrupted = images
        for name in self.tasks:
            made = self._corrupt_all(images, name, noise)
            if len(self.tasks) == 1:
                corrupted = made
            else:
                corrupted = torch.where(self._is(name, noise).view(-1, 1, 1, 1), made, corrupted)
        if self.places is None:
            return State(corrupted, None)
        places = self.places.expand(len(images), -1, -1)
        if noise.order is None:  # drawn for other tasks alone: `restore --corruption`
            return State(corrupted, places)
        wrong = take(places, noise.order)
        return State(corrupted, torch.where(self._is("shuffle", noise).view(-1, 1, 1), wrong, places))

    def _is(self, name: str, noise: Corruption) -> Tensor:
        return noise.task == TASKS.index(name)

    def _corrupt_all(self, images: Tensor, name: str, noise: Corruption) -> Tensor:
        if name == "mask":
            assert noise.mask is not None
            return mask_cells(images, noise.mask, self.cell)
        if name == "shuffle":
            assert noise.order is not None
            return images if self.places is not None else shuffle_patches(images, noise.order, self.piece)
        if name == "downsample":
            assert noise.factor is not None
            made = images
            for place, factor in enumerate(self.factors):
                made = torch.where((noise.factor == place).view(-1, 1, 1, 1), downsample(images, factor), made)
            return made
        if name == "noise":
            assert noise.noise is not None
            assert noise.kept is not None
            return add_noise(images, noise.noise, noise.kept)
        return gray(images)

    # --- the energy and one step down ------------------------------------------------------------------------------

    def given(self, images: Float[Tensor, "b c height width"], noise: Corruption) -> Given | None:
        """The visible patches through the encoder, where the energy is conditioned on them."""
        if self.upper is None:
            return None
        assert noise.mask is not None
        assert isinstance(self.encoder, TokenBackbone)
        visible = noise.mask.visible
        return Given(self.encoder.encode(self.encoder.embed(images, visible), visible).tokens, noise.mask)

    def energy(
        self,
        images: Float[Tensor, "b c height width"],
        positions: Float[Tensor, "b n d"] | None = None,
        given: Given | None = None,
    ) -> Float[Tensor, "b"]:
        """One scalar an image."""
        if self.upper is not None:
            assert given is not None
            hidden = take(patchify(images, self.piece), given.mask.hidden)
            tokens = self.upper(given.latent, given.mask, self.embed_hidden(hidden))
        elif self.readout == "class" or positions is not None:
            assert isinstance(self.encoder, TokenBackbone)
            encoded = self.encoder.encode(self.encoder.embed(images), positions=positions)
            tokens = encoded.special[:, :1] if self.readout == "class" else encoded.tokens
        else:
            tokens = self.encoder(images).patches
        read = self.head(tokens)
        read = read if read.dtype == torch.float64 else read.float()
        if self.readout == "square":
            return 0.5 * read.square().sum((1, 2))
        return read.mean((1, 2)) if self.readout == "mean" else read.sum((1, 2))

    def gradient(self, state: State, given: Given | None = None) -> tuple[State, Float[Tensor, "b"]]:
        """dE/dx and dE/dz, themselves differentiable, and the energy."""
        wanted = tuple(range(len(state.variables)))

        def summed(*changed: Tensor) -> tuple[Tensor, Tensor]:
            energy = self.energy(*changed, given=given)
            return energy.sum(), energy

        # the fused attention kernels have no second derivative
        with sdpa_kernel(SDPBackend.MATH) if self.gradient_by == "exact" else nullcontext():
            found, energy = torch.func.grad(summed, argnums=wanted, has_aux=True)(*state.variables)
        return State.of(found), energy

    def step_sizes(self) -> list[Tensor]:
        """Of images, and of positions where those are restored."""
        logarithms = [self.log_step_size] if self.places is None else [self.log_step_size, self.log_position_step]
        return [value.clamp(min=math.log(SMALLEST_STEP)).exp() for value in logarithms]

    def step(self, state: State, noise: Corruption) -> State:
        """One restoring step down the energy; no clamp of pixels, which would kill gradients."""
        return self._moved(state, self.gradient(state, self.given(state.images, noise))[0])

    def _moved(self, state: State, gradient: State) -> State:
        three = zip(state.variables, self.step_sizes(), gradient.variables, strict=True)
        return State.of(variable - size * slope for variable, size, slope in three)

    # --- the loss, step by step ------------------------------------------------------------------------------------

    def forward(
        self,
        images: Float[Tensor, "b c height width"],
        noise: Corruption | None = None,
        part: int | None = None,
        carry: Any = None,
    ) -> Objective:
        if noise is None:
            noise = self.sample(len(images), images.shape[2], images.shape[3]).to(images.device)
        one = self._exact if self.gradient_by == "exact" else self._difference
        if part is not None:
            return one(images, noise, part, carry)
        objective = one(images, noise, 0, None)
        loss = objective.loss
        for number in range(1, self.num_losses):
            objective = one(images, noise, number, objective.carry)
            loss = loss + objective.loss
        return Objective(loss, objective.terms, weights=objective.weights)

    def _exact(self, images: Tensor, noise: Corruption, part: int, carry: Any) -> Objective:
        """Step number `part`, from what the step before it reached."""
        state, target = carry or (self.corrupt(images, noise), self.target(images, noise))
        gradient, energy = self.gradient(state, self.given(state.images, noise))
        moved = self._moved(state, gradient)
        terms, weights = {}, {}
        if part + 1 == self.steps:
            corrupted = state if part == 0 else self.corrupt(images, noise)
            terms, weights = self._terms(corrupted, target, noise, moved, gradient, energy)
        return Objective(self.loss(moved, target, noise), terms, (moved.detach(), target), weights)

    def _difference(self, images: Tensor, noise: Corruption, part: int, carry: Any) -> Objective:
        """Two parts a step, each with the memory of one ordinary forward and backward.

        With w = step_size * d loss / d x_{n+1}, the gradient for the weights is that of -<w, dE/dx_n>: of
        -(E(x_n + h w) - E(x_n - h w)) / (2 h), a part for each of the two energies, h a thousandth of |x| / |w|.
        """
        if part % 2 == 1:
            minus, weight, reached, target, (terms, weights) = carry
            surrogate = (weight * self.energy(*minus.variables, given=self.given(images, noise))).sum()
            return Objective(surrogate - surrogate.detach(), terms, (reached, target), weights)
        state, target = carry or (self.corrupt(images, noise), self.target(images, noise))
        given = self.given(state.images, noise)
        with torch.no_grad():  # the inner gradient alone
            gradient, energy = self.gradient(state, given)
        moved = self._moved(state, gradient)
        loss = self.loss(moved, target, noise)  # its gradient reaches the step sizes
        reached = moved.detach()
        wanted = tuple(range(len(reached.variables)))

        def loss_at(*variables: Tensor) -> Tensor:
            return self.loss(State.of(variables), target, noise)

        slopes = torch.func.grad(loss_at, wanted)(*reached.variables)
        directions = [size.detach() * slope for size, slope in zip(self.step_sizes(), slopes, strict=True)]
        h = 1e-3 * _length(state.variables) / _length(directions).clamp_min(1e-12)
        plus, minus = (
            State.of(_along(x, d, sign * h) for x, d in zip(state.variables, directions, strict=True))
            for sign in (1, -1)
        )
        weight = 0.5 / h
        surrogate = -(weight * self.energy(*plus.variables, given=given)).sum()
        told = {}, {}
        if part + 2 == self.num_losses:
            corrupted = state if part == 0 else self.corrupt(images, noise)
            told = self._terms(corrupted, target, noise, moved, gradient, energy)
        return Objective(loss + surrogate - surrogate.detach(), {}, (minus, weight, reached, target, told))

    def loss(self, state: State, target: Float[Tensor, "b c height width"], noise: Corruption) -> Float[Tensor, ""]:
        """Smooth L1 (beta 1): of an image's pixels, or of the positions of its patches, mean over the batch."""
        error = functional.smooth_l1_loss(state.images, target, reduction="none")
        each = error.mean((1, 2, 3))
        if self.loss_on == "hidden" and noise.mask is not None:
            hidden = self._hidden(target, noise)
            each = torch.where(self._is("mask", noise), (error * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)), each)
        if state.positions is not None and self.places is not None:
            places = self.places.expand_as(state.positions)
            sorting = functional.smooth_l1_loss(state.positions, places, reduction="none").mean((1, 2))
            each = torch.where(self._is("shuffle", noise), sorting, each)
        return each.mean()

    def target(self, images: Float[Tensor, "b c height width"], noise: Corruption) -> Float[Tensor, "b c height width"]:
        """What is to be restored: the images, with each hidden patch standardised where that is asked for."""
        if not self.norm_pix_loss:
            return images
        assert noise.mask is not None
        patches = patchify(images, self.piece)
        hidden = standardize(take(patches, noise.mask.hidden))
        return unpatchify(put(patches, noise.mask.hidden, hidden), self.piece, self._pieces(images))

    def _pieces(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.piece[0], images.shape[-1] // self.piece[1]

    def _hidden(self, images: Tensor, noise: Corruption) -> Tensor:
        assert noise.mask is not None
        grid = (images.shape[-2] // self.cell[0], images.shape[-1] // self.cell[1])
        return hidden_map(noise.mask, grid, self.cell).expand_as(images)

    # --- what is told of it ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _terms(
        self, corrupted: State, target: Tensor, noise: Corruption, restored: State, gradient: State, energy: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms, and the weights of those that some images have and others not."""
        left, before = (self._error(state, target, noise) for state in (restored, corrupted))
        weights = {}
        terms = {
            "baseline": self.steps * self.loss(corrupted, target, noise),
            "step_size": self.step_sizes()[0],
            "gradient_rms": gradient.images.square().mean().sqrt(),
            "energy": energy.mean(),
        }
        for name in self.tasks:
            those = self._is(name, noise).to(left.dtype)
            called = "error" if len(self.tasks) == 1 else f"error_{name}"
            weights[called] = (before * those).sum()
            terms[called] = (left * those).sum() / weights[called].clamp_min(torch.finfo(left.dtype).tiny)
        if "shuffle" in self.tasks:
            those = self._is("shuffle", noise).to(left.dtype)
            terms["placed"], weights["placed"] = weighted_mean(self.placed(target, restored), those), those.sum()
        return {name: value.detach() for name, value in terms.items()}, weights

    def errors(
        self, images: Float[Tensor, "b c height width"], noise: Corruption, restored: State
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Squared error on what was corrupted, after restoring and after doing nothing; a loss over a whole image
        falls while nothing is restored, since what was not corrupted is right already."""
        target = self.target(images, noise)
        return self._error(restored, target, noise), self._error(self.corrupt(images, noise), target, noise)

    def _error(self, state: State, target: Tensor, noise: Corruption) -> Float[Tensor, "b"]:
        squares = (state.images - target).square()
        if noise.mask is not None:
            masked = self._is("mask", noise).view(-1, 1, 1, 1)
            squares = torch.where(masked, squares * self._hidden(target, noise), squares)
        each = squares.mean((1, 2, 3))
        if state.positions is not None and self.places is not None:
            moved = (state.positions - self.places).square().mean((1, 2))
            each = torch.where(self._is("shuffle", noise), moved, each)
        return each

    def placed(self, images: Float[Tensor, "b c height width"], state: State) -> Float[Tensor, "b"]:
        """Share of an image's patches whose place is read off right: the nearest position, or the patch of the
        original that looks most like what was restored there."""
        if self.places is not None:
            assert state.positions is not None
            nearest = self.nearest(state.positions)
        else:
            nearest = torch.cdist(patchify(state.images, self.piece), patchify(images, self.piece)).argmin(2)
        return (nearest == torch.arange(nearest.shape[1], device=nearest.device)).to(images.dtype).mean(1)

    def nearest(self, positions: Float[Tensor, "b n d"]) -> Int[Tensor, "b n"]:
        """The place whose true position is nearest to each of these."""
        assert self.places is not None
        return (self.places.square().sum(1) - 2 * positions @ self.places.T).argmin(2)

    def calibrate(
        self,
        images: Float[Tensor, "b c height width"],
        noise: Corruption,
        mean: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> dict[str, float]:
        if self.calibrated:
            return {}
        with torch.no_grad():
            state = self.corrupt(images, noise)
            gradient, _ = self.gradient(state, self.given(state.images, noise))
        found = {}
        for name, log_size, slope in (
            ("step_size", self.log_step_size, gradient.images),
            ("position_step", getattr(self, "log_position_step", None), gradient.positions),
        ):
            if log_size is None or slope is None:
                continue
            rms = float(mean(slope.square().mean()).sqrt())
            if rms > 0:  # a head of zeros has no gradient yet
                with torch.no_grad():
                    log_size.fill_(math.log(max(SMALLEST_STEP, 0.1 / rms)))
            found[name] = float(log_size.detach().exp())
        self.calibrated = True
        return found

    @torch.no_grad()
    def held_out(
        self, images: Float[Tensor, "b c height width"], generator: torch.Generator
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Each task on all of these images; and the share of patches placed right, beside 1."""
        found = {}
        drawn = self.sample(len(images), images.shape[2], images.shape[3], generator).to(images.device)
        for name in self.tasks:
            noise = drawn._replace(task=torch.full_like(drawn.task, TASKS.index(name)))
            last = self.restored(images, noise)[-1]
            found[name] = self.errors(images, noise, last)
            if name == "shuffle":
                found["placed"] = (self.placed(images, last), torch.ones(len(images), device=images.device))
        return found

    @torch.no_grad()
    def restored(self, images: Float[Tensor, "b c height width"], noise: Corruption) -> list[State]:
        """The corrupted images, and what each step makes of them."""
        states = [self.corrupt(images, noise)]
        for _ in range(self.steps):
            states.append(self.step(states[-1], noise).detach())
        return states

    @torch.no_grad()
    def restore(self, images: Float[Tensor, "b c height width"], noise: Corruption | None = None) -> dict[str, Tensor]:
        """Original, corrupted, each step, and how far a step moves each pixel of the original itself, bright where
        it is most. Of a mixture, the images have its tasks in turn."""
        if noise is None:
            tasks = torch.tensor([TASKS.index(name) for name in self.tasks], device=images.device)
            turns = tasks[torch.arange(len(images), device=images.device) % len(tasks)]
            same: Corruption = self.fixed_noise(images, 1)[0]
            noise = same._replace(task=turns)
        states = self.restored(images, noise)
        frames = {"original": images, "corrupted": self._shown(states[0], images, noise)}
        for number, state in enumerate(states[1:], start=1):
            caption = "restored" if number == self.steps else f"step {number}"
            frames[caption] = self._shown(state, images, noise)
        still = State(
            self.target(images, noise), None if self.places is None else self.places.expand(len(images), -1, -1)
        )
        change = (self.step(still, noise).images - still.images).square().mean(1, keepdim=True).sqrt()
        bright = change / change.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
        frames["unusual"] = (4 * bright - 2).expand_as(images)  # about black to white of standardised images
        return frames

    def _shown(self, state: State, images: Tensor, noise: Corruption) -> Tensor:
        """Where positions are restored, the patches lie where their positions say; mean and contrast of patches that
        were standardised are those of the original."""
        if self.norm_pix_loss:
            assert noise.mask is not None
            patches, hidden = patchify(state.images, self.piece), noise.mask.hidden
            shown = unstandardize(take(patches, hidden), take(patchify(images, self.piece), hidden))
            return unpatchify(put(patches, hidden, shown), self.piece, self._pieces(images))
        if self.places is None or state.positions is None:
            return state.images
        patches = patchify(images, self.piece)
        index = self.nearest(state.positions).unsqueeze(-1).expand_as(patches)
        arranged = torch.zeros_like(patches).scatter(1, index, patches)
        sorted_ = self._is("shuffle", noise).view(-1, 1, 1, 1)
        return torch.where(sorted_, unpatchify(arranged, self.piece, self._pieces(images)), state.images)

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """The energy; where it is that of hidden patches, its mean over four fixed masks."""
        if self.upper is None:
            return self.energy(images)
        energies = [
            self.energy(self.target(images, noise), given=self.given(images, noise))
            for noise in self.fixed_noise(images, 4)
        ]
        return torch.stack(energies).mean(0)


def _length(variables: Iterable[Tensor]) -> Float[Tensor, "b"]:
    """The Euclidean length of all of an image's variables together."""
    return torch.stack([variable.flatten(1).square().sum(1) for variable in variables]).sum(0).sqrt()


def _along(x: Tensor, direction: Tensor, h: Tensor) -> Tensor:
    return x + h.view(-1, *(1,) * (x.dim() - 1)) * direction
