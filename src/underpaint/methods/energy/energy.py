"""Energy-inspired pretraining: Wang et al., ICLR 2023, arXiv 2302.01384.

One network, no decoder. Forward, the network is an energy: one scalar an image, low for images like the data.
Backward, the gradient of that energy with respect to the *input* says how to change a corrupted image to make it more
likely. Training asks that a few such steps restore the image (`descent.py`).

Any corruption will do: hidden cells, patches out of order, lost resolution, noise, lost colour, or one of these an
image. For patches out of order in a ViT, what is restored is the order: each patch comes with a wrong position
embedding z, and z is the variable that the gradient changes.

Batch norms take their running statistics everywhere in the energy, or the images of a batch would change one another's
slopes; each step first takes these statistics up again on its clean images, by a forward without gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from timm.layers.activations import HardSigmoid, HardSwish
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from underpaint.backbones import Backbone, TokenBackbone
from underpaint.backbones.norms import batch_norms
from underpaint.computing import full, in_full
from underpaint.corruptions import AddNoise, Corruption, Downsample, Gray, Hide, Shuffle
from underpaint.draws import Draws
from underpaint.masking import masking, repeated, some_rows, to_device
from underpaint.methods.energy.descent import Descent, Given, State
from underpaint.methods.method import Objective
from underpaint.patches import patchify, take, unpatchify, weighted_mean

CORRUPTIONS: dict[str, Callable[["Energy"], Corruption]] = {
    "mask": lambda energy: Hide(energy.masking),
    "shuffle": lambda energy: Shuffle(energy.piece),
    "downsample": lambda energy: Downsample(),
    "noise": lambda energy: AddNoise(),
    "gray": lambda energy: Gray(),
}


# torch's own have no second derivative; timm's say the same by a clamp, which has one
TWICE: dict[type[nn.Module], type[nn.Module]] = {nn.Hardsigmoid: HardSigmoid, nn.Hardswish: HardSwish}


def twice_differentiable(encoder: nn.Module) -> None:
    """Put activations that have a second derivative in the place of those that have none, with the same values."""
    for parent in encoder.modules():
        for name, child in list(parent.named_children()):
            if made := TWICE.get(type(child)):
                setattr(parent, name, made())


class Corrupting(NamedTuple):
    """What is random in a step: the number of each image's task, and what each corruption needs."""

    task: Int[Tensor, "b"]
    drawn: dict[str, Any]

    to = to_device
    rows = some_rows
    repeat = repeated


class Energy(Descent[Corrupting]):
    """Restore corrupted images by steps down the gradient of an energy.

    >>> import torch, underpaint
    >>> energy = underpaint.Energy(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = energy(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline', 'energy', 'error', 'gradient_rms', 'step_size']

    Args:
        encoder: any `Backbone`. Its batch norms have running statistics only, of the clean images of the steps so far.
        mask_ratio: share of the cells that masking hides.
        mask: a name of `masking.MASKS`, or such a function.
        mask_patch_size: pixels of a side of a hidden cell, and of a shuffled patch where the encoder is no ViT; the patch
            of a ViT, else 8, where None.
        steps: N, restoring steps (2 in both secondary sources; 1 costs half).
        step_size: start value of the learned step size, or one of pixels and one of positions (0.1 as published); measured
            on the first batch so that the step changes a pixel by 0.1 (root of the mean square) where None.
        readout: how one scalar is read from the tokens: a linear of each patch token, summed or averaged; of the
            class token; or "square", half the squared length of a linear map of each patch token, summed.
        corruption: a name of CORRUPTIONS; "mixture", one of all of them an image, drawn uniformly; or such objects by
            names of one's own.
        gradient: exact (double backward), or by a central finite difference along d loss / d x_{n+1}, which needs
            first derivatives only and their memory, and is approximate; computed in float32 whatever the precision.

    Raises:
        ValueError: the encoder has a batch norm without running statistics, which couples the images of a batch; a
            setting that does not fit encoder or images.
    """

    encoder: Backbone
    mask_ratio: float = 0.5
    corruption: str | Mapping[str, Corruption] = "mask"
    gradient: Literal["exact", "difference"] = "exact"
    places: Tensor | None = field(init=False)  # a buffer [n, d]: the true positions, where the gradient changes them

    def __post_init__(self) -> None:
        encoder = self.encoder
        twice_differentiable(encoder)
        self.norms = batch_norms(encoder)
        if len(self.norms) < sum(isinstance(module, _BatchNorm) for module in encoder.modules()):
            raise ValueError(
                "the energy method needs batch norms with running statistics, since those of a batch couple its images"
            )
        tokens = encoder if isinstance(encoder, TokenBackbone) else None
        if self.readout == "class" and (tokens is None or not tokens.class_token):
            raise ValueError("readout class needs an encoder with a class token")
        side, patch = self.mask_patch_size, getattr(encoder, "patch_size", (8, 8))
        unit: tuple[int, int] = (side, side) if side else patch
        self.masking = masking(self.mask_ratio, self.mask, None, unit)
        self.piece: tuple[int, int] = unit if tokens is None else patch  # what is put in order
        self.corruptions = self._corruptions()
        self.tasks = tuple(self.corruptions)
        self.slope = self.gradient
        places = None  # the true position of each patch, where those are what is restored
        if "shuffle" in self.tasks and tokens is not None and (learned := tokens.positions()) is not None:
            places = learned.detach().clone()
            tokens.fix_positions()  # the target and the input of the other tasks are the same fixed positions
        self.begin(encoder.dim, encoder.final_norm, 1 if places is None else 2)
        self.register_buffer("places", places, persistent=False)

    def _corruptions(self) -> dict[str, Corruption]:
        if isinstance(self.corruption, Mapping):
            return dict(self.corruption)
        channels = self.encoder.channels
        if self.corruption == "mixture":
            return {name: make(self) for name, make in CORRUPTIONS.items() if channels > 1 or name != "gray"}
        if self.corruption not in CORRUPTIONS:
            known = ", ".join([*CORRUPTIONS, "mixture"])
            raise ValueError(f"corruption is '{self.corruption}'; it must be one of {known}")
        if self.corruption == "gray" and channels == 1:
            raise ValueError("corruption gray needs images of more than one channel")
        return {self.corruption: CORRUPTIONS[self.corruption](self)}

    # --- batch norms -----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "Energy":
        """Batch norms stay in eval mode, so that the energy of an image is its own."""
        super().train(mode)
        for norm in self.norms:
            norm.eval()
        return self

    def forward(
        self,
        images: Float[Tensor, "b c height width"],
        noise: Corrupting | None = None,
        part: int | None = None,
        carry: Any = None,
    ) -> Objective:
        if self.norms and self.training and not part:
            self.take_up(images)  # before the energy, whose way back needs the statistics as they were
        return super().forward(images, noise, part, carry)

    def take_up(self, images: Float[Tensor, "b c height width"]) -> None:
        """Move the statistics of batch norms towards those of clean images, by each norm's momentum; the first ones are
        taken over whole. What is not finite is left out."""
        was = self.training
        self.eval()
        outside_of_graphs(self.encoder, self.norms, images)
        self.train(was)

    def calibrate(
        self,
        images: Float[Tensor, "b c height width"],
        noise: Corrupting,
        mean: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> dict[str, float | list[float]]:
        if self.norms:
            self.take_up(images)
        return super().calibrate(images, noise, mean)

    # --- corrupting ------------------------------------------------------------------------------------------------

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Corrupting:
        draws = Draws.some_or_new(draws, batch)
        task = draws.integers(len(self.tasks))
        drawn = {name: one.sample(batch, height, width, draws) for name, one in self.corruptions.items()}
        return Corrupting(task, drawn)

    def has(self, name: str, noise: Corrupting) -> Tensor:
        """Which images have this task."""
        return noise.task == self.tasks.index(name)

    def by_image(
        self, values: Tensor, noise: Corrupting, change: Callable[[str, Corruption], Tensor]
    ) -> Float[Tensor, "b c height width"]:
        """Each image's values changed by its own task; where there are several, all are made and one is taken."""
        if len(self.tasks) == 1:
            [(name, one)] = self.corruptions.items()
            return change(name, one)
        for name, one in self.corruptions.items():
            values = torch.where(self.has(name, noise).view(-1, 1, 1, 1), change(name, one), values)
        return values

    def corrupt(self, images: Float[Tensor, "b c height width"], noise: Corrupting) -> State:
        def change(name: str, one: Corruption) -> Tensor:
            sorting = name == "shuffle" and self.places is not None
            return images if sorting else one.apply(images, noise.drawn[name])

        corrupted = self.by_image(images, noise, change)
        if self.places is None:
            return (corrupted,)
        places = self.places.expand(len(images), -1, -1)
        wrong = take(places, noise.drawn["shuffle"])
        return corrupted, torch.where(self.has("shuffle", noise).view(-1, 1, 1), wrong, places)

    def restored_fully(self, images: Float[Tensor, "b c height width"], noise: Corrupting) -> State:
        return (images,) if self.places is None else (images, self.places.expand(len(images), -1, -1))

    def tokens(self, *state: Tensor, given: Given | None = None) -> Float[Tensor, "b n d"]:
        images, *positions = state
        if not positions and self.readout != "class":
            return self.encoder(images).patches
        assert isinstance(self.encoder, TokenBackbone)
        encoded = self.encoder.encode(self.encoder.embed(images), positions=positions[0] if positions else None)
        return encoded.special[:, :1] if self.readout == "class" else encoded.tokens

    # --- losses and errors, those of sorted positions apart ----------------------------------------------------------

    def losses(self, state: State, target: Float[Tensor, "b c height width"], noise: Corrupting) -> Float[Tensor, "b"]:
        """Smooth L1 (beta 1): of an image's pixels, or of the positions of its patches."""
        each = super().losses(state, target, noise)
        if self.places is None:
            return each
        places = self.places.expand_as(state[1])
        sorting = functional.smooth_l1_loss(state[1], places, reduction="none").mean((1, 2))
        return torch.where(self.has("shuffle", noise), sorting, each)

    def counted(self, squares: Float[Tensor, "b c height width"], noise: Corrupting) -> Tensor:
        return self.by_image(squares, noise, lambda name, one: one.error(squares, noise.drawn[name]))

    def left(self, state: State, target: Tensor, noise: Corrupting) -> Float[Tensor, "b"]:
        each = super().left(state, target, noise)
        if self.places is None:
            return each
        return torch.where(self.has("shuffle", noise), (state[1] - self.places).square().mean((1, 2)), each)

    def by_task(self, noise: Corrupting) -> dict[str, Float[Tensor, "b"] | float]:
        if len(self.tasks) == 1:
            return super().by_task(noise)
        return {f"error_{name}": self.has(name, noise).float() for name in self.tasks}

    @torch.no_grad()
    def terms(
        self, corrupted: State, target: Tensor, noise: Corrupting, restored: State, slopes: State, energy: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Also the share of patches that were put in their place."""
        terms, weights = super().terms(corrupted, target, noise, restored, slopes, energy)
        if "shuffle" in self.tasks:
            those = self.has("shuffle", noise).to(target.dtype)
            terms["placed"], weights["placed"] = weighted_mean(self.placed(target, restored), those), those.sum()
        return terms, weights

    def placed(self, images: Float[Tensor, "b c height width"], state: State) -> Float[Tensor, "b"]:
        """Share of an image's patches whose place is read off right: the nearest position, or the patch of the
        original that looks most like what was restored there."""
        if self.places is not None:
            nearest = self.nearest(state[1])
        else:
            nearest = torch.cdist(patchify(state[0], self.piece), patchify(images, self.piece)).argmin(2)
        return (nearest == torch.arange(nearest.shape[1], device=nearest.device)).to(images.dtype).mean(1)

    def nearest(self, positions: Float[Tensor, "b n d"]) -> Int[Tensor, "b n"]:
        """The place whose true position is nearest to each of these."""
        assert self.places is not None
        with in_full(positions):
            return (self.places.square().sum(1) - 2 * full(positions) @ self.places.T).argmin(2)

    def errors(self, images: Float[Tensor, "b c height width"], noise: Corrupting) -> dict[str, tuple[Tensor, Tensor]]:
        """Each task on all of these images; and the share of patches placed right, beside 1."""
        found = {}
        for number, name in enumerate(self.tasks):
            all_have = noise._replace(task=torch.full_like(noise.task, number))
            states = self.restored(images, all_have)
            found[name] = (self.left(states[-1], images, all_have), self.left(states[0], images, all_have))
            if name == "shuffle":
                found["placed"] = (self.placed(images, states[-1]), torch.ones(len(images), device=images.device))
        return found

    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """The energy."""
        with torch.no_grad():
            return self.energy(images)

    # --- pictures --------------------------------------------------------------------------------------------------

    def fixed(self, images: Tensor, task: str | None) -> Corrupting:
        """One task, or the images have all in turn."""
        turns = torch.arange(len(images), device=images.device) % len(self.tasks)
        numbers = turns if task is None else torch.full_like(turns, self.tasks.index(task))
        return super().fixed(images, task)._replace(task=numbers)

    def shown(self, state: State, images: Float[Tensor, "b c height width"], noise: Corrupting) -> Tensor:
        """Where positions are restored, the patches lie where their positions say."""
        if self.places is None:
            return state[0]
        patches, grid = patchify(images, self.piece), self.encoder.grid(*images.shape[-2:])
        index = self.nearest(state[1]).unsqueeze(-1).expand_as(patches)
        arranged = unpatchify(torch.zeros_like(patches).scatter(1, index, patches), self.piece, grid)
        return torch.where(self.has("shuffle", noise).view(-1, 1, 1, 1), arranged, state[0])


@torch.no_grad()
def follow(encoder: Backbone, norms: Sequence[Any], images: Float[Tensor, "b c height width"]) -> None:
    """One step of the statistics of these batch norms, while the rest of the encoder is in eval mode."""
    before = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    encoder(images)
    for norm, (momentum, *old) in zip(norms, before, strict=True):
        norm.momentum = momentum
        share = torch.where(norm.num_batches_tracked > 1, momentum or 0.1, 1.0)
        for was, now in zip(old, (norm.running_mean, norm.running_var), strict=True):
            now.copy_(torch.where(now.isfinite(), was.lerp(now, share.to(now.dtype)), was))


outside_of_graphs: Any = torch.compiler.disable(follow)  # switching modes is nothing to compile
